# SPDX-License-Identifier: Apache-2.0
"""Read the columns of numbers of a Parquet file by pyarrow, without the index of a data frame."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..exceptions import DataFileError
from . import _numbers
from ._choice import ColumnChoice
from ._source import Source
from ._table import KeptColumn, Table


def read(source: Source, choice: ColumnChoice) -> Table:
    """The features of a Parquet file, and the columns that a result repeats."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    try:
        with source.stream() as stream:
            # not read_table, which takes columns from the names of folders too
            table = pq.ParquetFile(stream).read()
    except pa.ArrowException as error:
        raise DataFileError(f"{source.name}: {error}") from error
    names = list(table.column_names)
    chosen = choice.of(source.name, names, len(names), _index_of(table.schema))
    columns = [_column(source.name, names[i], table.column(i)) for i in chosen]
    kept = choice.kept(source.name, names, len(names))
    repeated = [KeptColumn(names[i], table.column(i)) for i in kept]
    return Table.of(np.column_stack(columns), names, chosen, repeated)


def _index_of(schema: Any) -> list[str]:
    """Names of the columns that pandas wrote as the index of the frame; a range index has none."""
    try:
        levels = (schema.pandas_metadata or {}).get("index_columns", [])
    except ValueError:  # damaged metadata
        return []
    return [level for level in levels if isinstance(level, str)]


def _column(source: str, name: str, column: Any) -> np.ndarray:
    where = f"{source}: column {name!r}"
    numbers = _numbers.of_typed(where, column)
    if numbers is None:
        raise DataFileError(
            f"{where}: expected numbers, got {column.type}; --drop leaves a column out"
        )
    return numbers
