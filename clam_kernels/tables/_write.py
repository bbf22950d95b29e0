# SPDX-License-Identifier: Apache-2.0
"""Encode results as the content of files; text needs no pyarrow."""

from __future__ import annotations

import gzip
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..exceptions import DataFileError, needs

TEXT = (".csv", ".tsv", ".csv.gz", ".tsv.gz", "")
KINDS = ".csv, .tsv (also with .gz), .npy or .parquet"
# Cells with one of these are in quotes, in CSV and in TSV.
SPECIAL = frozenset(',;\t"\n\r')


def suffix_of(path: str | Path) -> str:
    """The suffix that decides the format: the last one, with the one before .gz."""
    path = Path(path)
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def check(suffix: str, also: Sequence[str] = ()) -> None:
    """DataFileError unless `encode` or the caller (`also`) can write a file of this suffix."""
    if suffix not in (*TEXT, ".npy", ".parquet", *also):
        kinds = ", ".join([*also, KINDS])
        raise DataFileError(f"expected an output {kinds}, got {suffix!r}")
    if suffix == ".parquet" and not _has_pyarrow():
        raise DataFileError(needs("writing Parquet", "pyarrow", "files"))


def _has_pyarrow() -> bool:
    try:
        return importlib.util.find_spec("pyarrow") is not None
    except ValueError:  # a module without a spec
        return False


def encode(array: np.ndarray, suffix: str, names: Sequence[str]) -> bytes:
    """The content of a file; see `tables.encode`."""
    check(suffix)
    if suffix == ".npy":
        out = io.BytesIO()
        np.save(out, array)
        return out.getvalue()
    columns = array.reshape(len(array), array[:1].size if len(array) else len(names))
    if len(names) != columns.shape[1]:
        raise ValueError(f"names: expected {columns.shape[1]} names, got {len(names)}")
    if suffix == ".parquet":
        return _parquet(columns, names)
    lines = "".join(_lines(columns, names, "\t" if suffix.startswith(".tsv") else ","))
    # the bytes of a file name that is no UTF-8 do not change
    content = lines.encode("utf-8", "surrogateescape")
    return gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content


def _lines(columns: np.ndarray, names: Sequence[str], mark: str) -> Iterator[str]:
    yield mark.join(map(_cell, names)) + "\n"
    # str of a number is the shortest text that reads back as the same number; the Python float of
    # a float32 would have the digits of float64
    is_plain = columns.dtype.kind != "f" or columns.dtype == np.float64
    text = _cell if columns.dtype.kind not in "fiub" else str
    for row in columns:
        yield mark.join(map(text, row.tolist() if is_plain else row)) + "\n"


def _cell(value: object) -> str:
    text = str(value)
    # without quotes U+FEFF at the beginning of a file would be its byte order mark
    is_plain = not text.startswith("\ufeff") and text == text.strip()
    if text and is_plain and not SPECIAL.intersection(text):
        return text
    return '"' + text.replace('"', '""') + '"'


def _parquet(columns: np.ndarray, names: Sequence[str]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    out = io.BytesIO()
    # from_arrays, as two columns may have the same name
    arrays = [pa.array(np.ascontiguousarray(column)) for column in columns.T]
    pq.write_table(pa.Table.from_arrays(arrays, names=list(names)), out)
    return out.getvalue()
