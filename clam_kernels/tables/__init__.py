# SPDX-License-Identifier: Apache-2.0
"""Read data matrices from files, and write results to files. The content decides the format of an
input; a pickle is never loaded.

Reading `.npy` and `.npz` and writing CSV needs numpy alone. Reading CSV and TSV (also gzipped), and
reading and writing Parquet, needs pyarrow (the extra `files`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..exceptions import DataFileError, needs
from ..serialize import write_atomically
from . import _numbers, _write
from ._choice import ColumnChoice, listed
from ._source import NPY, NPZ, PARQUET, Source
from ._table import KeptColumn, Table, column_name

__all__ = [
    "KeptColumn", "Table", "check_output", "encode", "listed", "read", "read_array", "read_table",
    "write",
]  # fmt: skip

KINDS = "a file of numbers as .npy, .npz, CSV, TSV or Parquet"
ARRAYS = "a file of numbers as .npy or .npz"


def read(
    path: str | Path,
    key: str | None = None,
    *,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    index_col: str | Sequence[str] | bool | None = None,
    header: bool | None = None,
    decimal: str = ".",
    expected: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[str] | None]:
    """(matrix, column names or None) of a file.

    Parameters
    ----------
    path : str or Path
        .npy (memory-mapped), .npz, CSV, TSV (also gzipped) or Parquet, whatever the suffix. "-"
        reads standard input.
    key : str, optional
        Array of an .npz that has several.
    columns, drop : sequence of str, optional
        The features, in this order, or columns that are no features: names, or numbers from 0.
    index_col : str, sequence of str or False, optional
        Columns that are no features. None drops the index of a data frame that a Parquet file
        names, and raises for names that pandas gives to an index: empty names before all others,
        and `Unnamed: 0`, `Unnamed: 1`, ... With False both are features.
    header : bool, optional
        Whether the first row of a text has the names. With None it has if it has text, or is 0 to
        D - 1, or has the `expected` names; a warning says so where that may be wrong.
    decimal : "." or ","
        Decimal point of a text.
    expected : sequence of str, optional
        Names of the features, in their order: other columns are dropped with a warning. A first
        row of a text that has all these names is a header.

    Returns
    -------
    tuple of array [N, D] and list of str or None
        A missing cell is NaN. In a text of one column an empty line is a missing cell.

    Raises
    ------
    DataFileError
        The file is damaged or of another kind; a cell is no number, or an integer that float64
        cannot hold (the error names column and row, which count from 1 below the header); a
        column does not exist, or an expected column is missing.

    Warns
    -----
    UserWarning
        The first row may have names although it became data, or data although it became names.

    Examples
    --------
    >>> import os, tempfile, numpy as np
    >>> from clam_kernels import tables
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "x.npy")
    ...     np.save(file, np.eye(2))
    ...     tables.read(file)[0].shape
    (2, 2)
    """
    choice = ColumnChoice(columns, drop, index_col, header, decimal, expected)
    table = _read(Source(path), key, choice)
    return table.matrix, table.names


def read_table(
    path: str | Path, key: str | None = None, *, keep: Sequence[str] = (), **arguments: Any
) -> Table:
    """The features of a file as `read` returns them, and columns that a result repeats.

    Parameters
    ----------
    path : str or Path
    key : str, optional
        Array of an .npz that has several.
    keep : sequence of str
        Columns that are no features and that `write` repeats: names, or numbers from 0. The text
        of their cells does not change.
    **arguments
        `columns`, `drop`, `index_col`, `header`, `decimal` and `expected` of `read`.

    Returns
    -------
    Table

    Raises
    ------
    DataFileError
        As `read`.

    Examples
    --------
    >>> import os, tempfile, numpy as np
    >>> from clam_kernels import tables
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "x.npy")
    ...     np.save(file, np.array([[7, 1, 2], [8, 3, 4]]))
    ...     table = tables.read_table(file, keep=["0"])
    >>> table.matrix.tolist(), tables.encode(np.array([1, 0]), "", ["label"], table.kept).split()
    ([[1, 2], [3, 4]], [b'column0,label', b'7,1', b'8,0'])
    """
    return _read(Source(path), key, ColumnChoice(**arguments, keep=keep))


def _read(source: Source, key: str | None, choice: ColumnChoice) -> Table:
    """The columns that `choice` names, of a file of any kind."""
    source.check_key(key)
    with source.reading(KINDS):
        if source.magic in (NPY, NPZ):
            return _of_array(source, source.matrix(key), choice)
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise DataFileError(needs(f"{source.name}: reading it", "pyarrow", "files")) from None
        from . import _parquet, _text

        return (_parquet if source.magic == PARQUET else _text).read(source, choice)


def _of_array(source: Source, matrix: np.ndarray, choice: ColumnChoice) -> Table:
    """The features of a matrix; the matrix itself if all columns are features."""
    chosen = choice.of(source.name, None, matrix.shape[1])
    kept = choice.kept(source.name, None, matrix.shape[1])
    features = matrix if chosen == list(range(matrix.shape[1])) else matrix[:, chosen]
    _numbers.check_exact_array(source.name, features, chosen)
    repeated = [KeptColumn(column_name(None, i), matrix[:, i]) for i in kept]
    return Table.of(features, None, chosen, repeated)


def read_array(path: str | Path, key: str | None = None) -> np.ndarray:
    """Numbers of any shape from an .npy (memory-mapped) or .npz file.

    Parameters
    ----------
    path : str or Path
    key : str, optional
        Array of an .npz that has several; default "x".

    Returns
    -------
    array [N, ...]

    Raises
    ------
    DataFileError
        The file is damaged, of another kind, has no numbers, or has an integer that float64 cannot
        hold.

    Examples
    --------
    >>> import os, tempfile, numpy as np
    >>> from clam_kernels import tables
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "x.npz")
    ...     np.savez(file, x=np.zeros((2, 8, 8)), y=np.arange(2))
    ...     tables.read_array(file).shape
    (2, 8, 8)
    """
    source = Source(path)
    source.check_key(key)
    with source.reading(ARRAYS):
        if source.magic not in (NPY, NPZ):
            raise DataFileError(f"{source.name}: expected {ARRAYS}")
        if key is None and source.magic == NPZ:
            key = _only(source)
        array = source.numbers(key)
        _numbers.check_exact_array(source.name, array)
        return array


def _only(source: Source) -> str:
    """The name of the only array of an .npz, or "x"."""
    names = source.names()
    if len(names) != 1 and "x" not in names:
        listed = ", ".join(names) or "nothing"
        raise DataFileError(f"{source.name}: holds {listed}, and none is called x")
    return names[0] if len(names) == 1 else "x"


def encode(
    array: np.ndarray, suffix: str, names: Sequence[str], kept: Sequence[KeptColumn] = ()
) -> bytes:
    """A result as the content of a file.

    Parameters
    ----------
    array : array [N] or [N, D]
    suffix : ".csv", ".tsv" (also with ".gz"), ".npy" or ".parquet"; "" is CSV
    names : sequence of str
        One for each column: any text. Text files have it in UTF-8, in quotes where necessary.
    kept : sequence of KeptColumn
        Columns of the input, [N] each, before those of the result.

    Returns
    -------
    bytes

    Raises
    ------
    DataFileError
        Another suffix, Parquet without pyarrow, or kept columns in an .npy.

    Examples
    --------
    >>> import numpy as np
    >>> from clam_kernels import tables
    >>> tables.encode(np.array([[1.5, 0]]), ".csv", ["a,b", "c"]).decode().split()
    ['"a,b",c', '1.5,0.0']
    """
    return _write.encode(array, suffix, names, kept)


def check_output(
    path: str | Path, also: Sequence[str] = (), *, keeps_columns: bool = False
) -> None:
    """Check that `write` can write a file of this name, before there is a result.

    Parameters
    ----------
    path : str or Path
    also : sequence of str
        Suffixes that the caller writes without `write`.
    keeps_columns : bool
        Whether the result repeats columns of the input, which an .npy cannot hold.

    Raises
    ------
    DataFileError
        `write` does not know the suffix, and `also` does not have it; or pyarrow is missing.

    Examples
    --------
    >>> from clam_kernels import tables
    >>> tables.check_output("labels.csv.gz")
    """
    _write.check(_write.suffix_of(path), also, keeps_columns)


def write(
    path: str | Path,
    array: np.ndarray,
    names: Sequence[str],
    kept: Sequence[KeptColumn] = (),
) -> None:
    """Write a result in the format of the suffix; after an error there is no part of a file.

    Parameters
    ----------
    path : str or Path
    array : array [N] or [N, D]
    names : sequence of str
        One for each column.
    kept : sequence of KeptColumn
        Columns of the input, [N] each, before those of the result.

    Raises
    ------
    DataFileError
        `encode` does not know the suffix, or pyarrow is missing for Parquet.

    Examples
    --------
    >>> import os, tempfile, numpy as np
    >>> from clam_kernels import tables
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tables.write(os.path.join(folder, "labels.csv"), np.array([1, 0]), ["label"])
    """
    write_atomically(Path(path), encode(array, _write.suffix_of(path), names, kept))
