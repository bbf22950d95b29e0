# SPDX-License-Identifier: Apache-2.0
"""Encode results as the content of files; text needs no pyarrow."""

from __future__ import annotations

import gzip
import importlib.util
import io
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np

from ..exceptions import DataFileError, needs
from ._table import KeptColumn

TEXT = (".csv", ".tsv", ".csv.gz", ".tsv.gz", "")
KINDS = ".csv, .tsv (also with .gz), .npy or .parquet"
KINDS_WITH_TEXT = ".csv, .tsv (also with .gz) or .parquet"
# Cells with one of these are in quotes, in CSV and in TSV.
SPECIAL = frozenset(',;\t"\n\r')


def suffix_of(path: str | Path) -> str:
    """The suffix that decides the format: the last one, with the one before .gz."""
    path = Path(path)
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def check(suffix: str, also: Sequence[str] = (), keeps_columns: bool = False) -> None:
    """DataFileError unless `encode` or the caller (`also`) can write a file of this suffix."""
    if suffix not in (*TEXT, ".npy", ".parquet", *also):
        kinds = ", ".join([*also, KINDS])
        raise DataFileError(f"expected an output {kinds}, got {suffix!r}")
    if suffix == ".npy" and keeps_columns:
        raise DataFileError(
            f"expected an output {KINDS_WITH_TEXT} for the columns of --keep, got {suffix!r}"
        )
    if suffix == ".parquet" and not _has_pyarrow():
        raise DataFileError(needs("writing Parquet", "pyarrow", "files"))


def _has_pyarrow() -> bool:
    try:
        return importlib.util.find_spec("pyarrow") is not None
    except ValueError:  # a module without a spec
        return False


def encode(
    array: np.ndarray, suffix: str, names: Sequence[str], kept: Sequence[KeptColumn] = ()
) -> bytes:
    """The content of a file; see `tables.encode`."""
    check(suffix, keeps_columns=bool(kept))
    if suffix == ".npy":
        out = io.BytesIO()
        np.save(out, array)
        return out.getvalue()
    columns = array.reshape(len(array), array[:1].size if len(array) else len(names))
    if len(names) != columns.shape[1]:
        raise ValueError(f"names: expected {columns.shape[1]} names, got {len(names)}")
    if suffix == ".parquet":
        return _parquet(columns, names, kept)
    lines = "".join(_lines(columns, names, "\t" if suffix.startswith(".tsv") else ",", kept))
    # the bytes of a file name that is no UTF-8 do not change
    content = lines.encode("utf-8", "surrogateescape")
    return gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content


def _lines(
    columns: np.ndarray, names: Sequence[str], mark: str, kept: Sequence[KeptColumn]
) -> Iterator[str]:
    yield mark.join(map(_cell, [*(column.name for column in kept), *names])) + "\n"
    # str of a number is the shortest text that reads back as the same number; the Python float of
    # a float32 would have the digits of float64
    is_plain = columns.dtype.kind != "f" or columns.dtype == np.float64
    text = _cell if columns.dtype.kind not in "fiub" else str
    before = zip(*(column.texts() for column in kept), strict=True) if kept else repeat(())
    for first, row in zip(before, columns, strict=False):
        cells = map(text, row.tolist() if is_plain else row)
        yield mark.join([*map(_kept_cell, first), *cells]) + "\n"


def _cell(value: object) -> str:
    text = str(value)
    # without quotes U+FEFF at the beginning of a file would be its byte order mark
    is_plain = not text.startswith("\ufeff") and text == text.strip()
    if text and is_plain and not SPECIAL.intersection(text):
        return text
    return '"' + text.replace('"', '""') + '"'


def _kept_cell(text: str) -> str:
    """A cell of a column of the input. An empty one has no quotes: a row has other cells too."""
    return _cell(text) if text else ""


def _parquet(columns: np.ndarray, names: Sequence[str], kept: Sequence[KeptColumn]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    out = io.BytesIO()
    # from_arrays, as two columns may have the same name
    arrays = [column.arrow() for column in kept]
    arrays += [pa.array(np.ascontiguousarray(column)) for column in columns.T]
    names = [*(column.name for column in kept), *names]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), out)
    return out.getvalue()
