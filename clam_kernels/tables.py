# SPDX-License-Identifier: Apache-2.0
"""Data matrices from files, by content, and results to files; never a pickle.

`.npy` and `.npz` need numpy alone; CSV, TSV (also gzipped) and Parquet need pyarrow (the extra
`files`).
"""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .exceptions import DataFileError
from .serialize import write_atomically

# A member of an .npz that claims to unpack to more than this many times its stored size is refused.
MAX_EXPANSION = 1000
KINDS = "a file of numbers as .npy, .npz, CSV, TSV or Parquet"
ARRAYS = "a file of numbers as .npy or .npz"
NPY, NPZ = b"\x93NUM", b"PK\x03\x04"


def read(path: str | Path, key: str | None = None) -> tuple[np.ndarray, list[str] | None]:
    """(matrix, column names or None) of a file.

    Parameters
    ----------
    path : str or Path
        .npy (memory-mapped), .npz, CSV, TSV or Parquet; told apart by content.
    key : str, optional
        Array of an .npz that holds several.

    Returns
    -------
    tuple of array [N, D] and list of str or None

    Raises
    ------
    DataFileError
        The file is damaged, of another kind, or holds text where numbers belong.

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
    path = Path(path)
    with _reading(path, KINDS):
        magic = _magic(path)
        if magic in (NPY, NPZ):
            return _matrix(path, _array(path, magic, key)), None
        return _arrow(path, parquet=magic == b"PAR1")


def read_array(path: str | Path, key: str | None = None) -> np.ndarray:
    """Numbers of any shape from an .npy (memory-mapped) or .npz file.

    Parameters
    ----------
    path : str or Path
    key : str, optional
        Array of an .npz that holds several; "x" unless given.

    Returns
    -------
    array [N, ...]

    Raises
    ------
    DataFileError
        The file is damaged, of another kind, or holds something else than numbers.

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
    path = Path(path)
    with _reading(path, ARRAYS):
        magic = _magic(path)
        if magic not in (NPY, NPZ):
            raise DataFileError(f"{path}: expected {ARRAYS}")
        if key is None and magic == NPZ:
            key = _only(path)
        return _numbers(path, _array(path, magic, key))


def _only(path: Path) -> str:
    """The array of an .npz that holds one, or the one called x."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    if len(names) != 1 and "x" not in names:
        raise DataFileError(f"{path}: holds {', '.join(names) or 'nothing'}, and none is called x")
    return names[0] if len(names) == 1 else "x"


@contextlib.contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """Whatever a damaged file makes numpy stumble over becomes a DataFileError."""
    try:
        yield
    except DataFileError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, struct.error) as error:
        raise DataFileError(f"{path}: {error} (expected {expected})") from error


def _magic(path: Path) -> bytes:
    """First bytes of a file, which tell what it is."""
    if not path.is_file():
        raise DataFileError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        return file.read(4)


def _array(path: Path, magic: bytes, key: str | None) -> np.ndarray:
    if magic == NPZ:
        return _npz(path, key)
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def _npz(path: Path, key: str | None) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        names = [i.filename.removesuffix(".npy") for i in archive.infolist()]
        for member in archive.infolist():
            if member.file_size > MAX_EXPANSION * max(member.compress_size, 1):
                raise DataFileError(f"{path}: {member.filename} unpacks to more than it may")
    if key is None and len(names) != 1:
        raise DataFileError(f"{path}: holds {', '.join(names)}; choose one with --key")
    if key is not None and key not in names:
        raise DataFileError(f"{path}: holds {', '.join(names)}, not {key}")
    with np.load(path, allow_pickle=False) as arrays:
        found: np.ndarray = arrays[key or names[0]]
    return found


def _numbers(path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise DataFileError(f"{path}: expected numbers, got dtype {array.dtype}")
    return array


def _matrix(path: Path, array: np.ndarray) -> np.ndarray:
    if _numbers(path, array).ndim != 2:
        raise DataFileError(f"{path}: expected a matrix, got shape {array.shape}")
    return array


def _arrow(path: Path, parquet: bool) -> tuple[np.ndarray, list[str] | None]:
    try:
        import pyarrow as pa
        from pyarrow import csv
        from pyarrow import parquet as pq
    except ImportError:
        raise DataFileError(f"{path}: reading it needs pyarrow: pip install pyarrow") from None
    names: list[str] | None
    try:
        if parquet:
            table = pq.read_table(path)
            names = list(table.column_names)
        else:
            delimiter, header = _dialect(path)
            table = csv.read_csv(
                path,
                read_options=csv.ReadOptions(autogenerate_column_names=not header),
                parse_options=csv.ParseOptions(delimiter=delimiter),
                convert_options=csv.ConvertOptions(null_values=["", "nan", "NaN", "NA", "null"]),
            )
            names = list(table.column_names) if header else None
    except pa.ArrowException as error:
        raise DataFileError(f"{path}: {error}") from error
    return _columns(path, table), names


def _columns(path: Path, table: Any) -> np.ndarray:
    """The columns of an Arrow table as a matrix; a missing entry is NaN."""
    import pyarrow as pa

    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        number = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
        if not (number or pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
            raise DataFileError(f"{path}: column {name!r}: expected numbers, got {column.type}")
        columns.append(column.cast(pa.float64()).to_numpy())
    return np.column_stack(columns) if columns else np.zeros((table.num_rows, 0))


def _dialect(path: Path) -> tuple[str, bool]:
    """(delimiter, whether the first line is a header) of a text table."""
    import pyarrow as pa

    with pa.input_stream(path, compression="detect") as stream:
        first = stream.read(1 << 16).split(b"\n")[0].decode("utf-8-sig", errors="replace").strip()
    counts = {mark: first.count(mark) for mark in ",\t;"}
    delimiter = max(counts, key=lambda mark: counts[mark])
    return delimiter, not all(_is_number(cell) for cell in first.split(delimiter))


def _is_number(cell: str) -> bool:
    cell = cell.strip().strip('"')
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True


def encode(array: np.ndarray, suffix: str, names: list[str]) -> bytes:
    """A result as the content of a file.

    Parameters
    ----------
    array : array [N] or [N, D]
    suffix : ".csv", ".tsv", ".npy" or ".parquet"
    names : list of str
        One a column.

    Returns
    -------
    bytes

    Raises
    ------
    DataFileError
        Another suffix, or Parquet without pyarrow.

    Examples
    --------
    >>> import numpy as np
    >>> from clam_kernels import tables
    >>> tables.encode(np.array([1, 0]), ".csv", ["label"]).decode().split()
    ['label', '1', '0']
    """
    out = io.BytesIO()
    if suffix == ".npy":
        np.save(out, array)
    elif suffix in (".csv", ".tsv", ""):
        mark = "\t" if suffix == ".tsv" else ","
        # %s of a float is its shortest text that reads back as the same number
        np.savetxt(out, array, fmt="%s", delimiter=mark, header=mark.join(names), comments="")
    elif suffix == ".parquet":
        try:
            import pyarrow as pa
            from pyarrow import parquet as pq
        except ImportError:
            raise DataFileError("writing Parquet needs pyarrow: pip install pyarrow") from None
        columns = array.reshape(len(array), -1).T
        pq.write_table(pa.table(dict(zip(names, map(pa.array, columns), strict=True))), out)
    else:
        raise DataFileError(f"expected an output .csv, .tsv, .npy or .parquet, got {suffix!r}")
    return out.getvalue()


def write(path: str | Path, array: np.ndarray, names: list[str]) -> None:
    """Write a result; the suffix decides the format, and a file is whole or not there.

    Parameters
    ----------
    path : str or Path
    array : array [N] or [N, D]
    names : list of str
        One a column.

    Examples
    --------
    >>> import os, tempfile, numpy as np
    >>> from clam_kernels import tables
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tables.write(os.path.join(folder, "labels.csv"), np.array([1, 0]), ["label"])
    """
    write_atomically(Path(path), encode(array, Path(path).suffix, names))
