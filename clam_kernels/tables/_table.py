# SPDX-License-Identifier: Apache-2.0
"""A table in memory: its features, and the columns that a result repeats beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class KeptColumn:
    """A column of the input that the output repeats.

    `values` is an array of numbers [N] or a column of Arrow. A column of a text file has the text
    of its cells, or their bytes if they are no UTF-8.
    """

    name: str
    values: Any

    def texts(self) -> list[str]:
        """The cells as text; an empty text where there is none."""
        if isinstance(self.values, np.ndarray):
            return [str(value) for value in self.values]
        import pyarrow as pa

        kind = self.values.type
        if pa.types.is_floating(kind):
            # str of a numpy number has the digits of its own precision
            numbers = kind.to_pandas_dtype()
            cells = self.values.to_pylist()
            return ["" if cell is None else str(numbers(cell)) for cell in cells]
        if pa.types.is_timestamp(kind) or pa.types.is_time(kind):
            cells = self.values.cast(pa.string()).to_pylist()
        else:
            cells = self.values.to_pylist()
        return ["" if cell is None else _text(cell) for cell in cells]

    def arrow(self) -> Any:
        """The column of a Parquet file."""
        import pyarrow as pa

        if isinstance(self.values, np.ndarray):
            return pa.array(np.ascontiguousarray(self.values))
        return self.values


def _text(cell: object) -> str:
    """A cell as text; bytes that are no UTF-8 stay the same bytes in a file of text."""
    return cell.decode("utf-8", "surrogateescape") if isinstance(cell, bytes) else str(cell)


@dataclass(frozen=True)
class Table:
    """The features of a file as a matrix.

    Attributes
    ----------
    matrix : array [N, D]
        The features; a missing cell is NaN.
    names : list of str or None
        Names of the features.
    numbers : list of int
        Numbers of the features among the columns of the file, from 0.
    kept : list of KeptColumn
        Columns that are no features and that a result repeats, in the order of the file.
    """

    matrix: np.ndarray
    names: list[str] | None
    numbers: list[int]
    kept: list[KeptColumn]

    @classmethod
    def of(
        cls,
        matrix: np.ndarray,
        names: Sequence[str] | None,
        chosen: list[int],
        kept: list[KeptColumn],
    ) -> Table:
        """The table whose features are the `chosen` columns of a file with these names."""
        return cls(matrix, None if names is None else [names[i] for i in chosen], chosen, kept)

    @property
    def feature_names(self) -> list[str]:
        """Names of the features; `column0`, `column1`, ... where the file has no names."""
        return self.names or [column_name(None, i) for i in self.numbers]


def column_name(names: Sequence[str] | None, number: int) -> str:
    """The name of a column, or `column0`, `column1`, ... in a file without names."""
    return f"column{number}" if names is None else names[number]
