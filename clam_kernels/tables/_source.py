# SPDX-License-Identifier: Apache-2.0
"""The input of a table: a file, or standard input, whose bytes are read once."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..exceptions import DataFileError

# An array of an .npz whose size is more than this many times its compressed size raises.
MAX_EXPANSION = 1000
NPY, NPZ, PARQUET, GZIP = b"\x93NUM", b"PK\x03\x04", b"PAR1", b"\x1f\x8b"
EMPTY_ZIP = b"PK\x05\x06"
STDIN = "-"


class Source:
    """A file by its path, or standard input under the name "-"."""

    def __init__(self, path: str | Path) -> None:
        self.content: bytes | None = None
        self.path = Path(path)
        self.name = str(path)
        if self.name == STDIN:
            self.name = "standard input"
            self.content = sys.stdin.buffer.read()
        elif not self.path.is_file():
            why = "no such file"
            if self.path.exists():
                why = "not a regular file (the name - reads standard input)"
            raise DataFileError(f"{path}: {why}")
        with self.file() as file:
            self.magic = file.read(4)
        if self.magic == EMPTY_ZIP:
            self.magic = NPZ

    def check_key(self, key: str | None) -> None:
        """DataFileError for a key of a file that is no .npz."""
        if key is not None and self.magic != NPZ:
            raise DataFileError(
                f"{self.name}: --key: expected an .npz file, which holds several arrays"
            )

    def file(self) -> Any:
        """The bytes as a file object."""
        return self.path.open("rb") if self.content is None else io.BytesIO(self.content)

    def stream(self) -> Any:
        """The bytes as a stream of pyarrow, which decompresses gzip."""
        import pyarrow as pa

        raw = pa.OSFile(str(self.path)) if self.content is None else pa.BufferReader(self.content)
        return pa.CompressedInputStream(raw, "gzip") if self.magic.startswith(GZIP) else raw

    @contextlib.contextmanager
    def reading(self, expected: str) -> Iterator[None]:
        """Errors of numpy about a damaged file become a DataFileError in the block."""
        try:
            yield
        except DataFileError:
            raise
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, struct.error) as error:
            raise DataFileError(f"{self.name}: {error} (expected {expected})") from error

    def array(self, key: str | None) -> np.ndarray:
        """The array of an .npy (memory-mapped where it is a file) or one array of an .npz."""
        if self.magic == NPZ:
            return self._member(key)
        if self.content is not None:
            return np.asarray(np.load(self.file(), allow_pickle=False))
        array: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return array

    def names(self) -> list[str]:
        """Names of the arrays of an .npz; other members are no arrays."""
        with self.file() as file, zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
        return [name.removesuffix(".npy") for name in members]

    def _member(self, key: str | None) -> np.ndarray:
        names = self.names()
        if key is None and len(names) != 1:
            listed = ", ".join(names)
            raise DataFileError(
                f"{self.name}: holds {listed}; choose one with --key"
                if names
                else f"{self.name}: holds no array"
            )
        key = names[0] if key is None else key
        if key not in names:
            raise DataFileError(f"{self.name}: holds {', '.join(names)}, not {key}")
        with self.file() as file:
            with zipfile.ZipFile(file) as archive:
                member = archive.getinfo(f"{key}.npy")
            if member.file_size > MAX_EXPANSION * max(member.compress_size, 1):
                raise DataFileError(f"{self.name}: {member.filename} unpacks to more than it may")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                array: np.ndarray = arrays[key]
        return array

    def matrix(self, key: str | None) -> np.ndarray:
        """The numbers of an array of two dims."""
        array = self.numbers(key)
        if array.ndim != 2:
            raise DataFileError(f"{self.name}: expected a matrix, got shape {array.shape}")
        return array

    def numbers(self, key: str | None) -> np.ndarray:
        """An array of numbers, of any shape."""
        array = self.array(key)
        if array.dtype.kind not in "fiub":
            raise DataFileError(f"{self.name}: expected numbers, got dtype {array.dtype}")
        return array
