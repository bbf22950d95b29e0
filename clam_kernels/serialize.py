# SPDX-License-Identifier: Apache-2.0
"""Model files: safetensors files without code, whose header is checked before memory is allocated.

The metadata in the header has the format version, the class, its parameters and its learned numbers
as JSON. Writing is atomic: a temporary file in the same folder, fsync, rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._version import __version__
from .exceptions import ModelFileError

FORMAT = 1
CLASSES = ("ClAM", "ClAMImputer", "DEC", "KMeans")
# States of training runs, which are no models.
CHECKPOINTS = ("DEC checkpoint", "SeLa checkpoint")
# Limit of a header, which has the names of all columns and the start values of a model, or the
# names of all tensors of an encoder and its optimiser.
MAX_HEADER_BYTES = 1 << 26
_KEYS = {"format", "class", "package", "parameters", "learned"}


def _plain(value: Any) -> Any:
    """A parameter as JSON; arrays keep their dtype, numpy numbers become Python numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written to a model file")


def _parameter(name: str, value: Any) -> Any:
    """A parameter as JSON, or an error that names it."""
    try:
        return _plain(value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}; set it to a value before saving") from None


def _from_json(value: Any) -> Any:
    """The inverse of `_plain`, for one parameter."""
    if isinstance(value, dict):
        return np.array(value["array"], dtype=np.dtype(value["dtype"]))
    return value


def save(
    path: str | PathLike[str],
    kind: str,
    parameters: Mapping[str, Any],
    learned: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a model. A parameter that is not data (a callable, a RandomState) raises a TypeError. A
    header that is too large for `load` raises a ModelFileError, and no file is written.
    """
    from safetensors.torch import save as to_bytes

    plain = {name: _parameter(name, value) for name, value in parameters.items()}
    metadata = {
        "format": str(FORMAT),
        "class": kind,
        "package": __version__,
        "parameters": json.dumps(plain),
        "learned": json.dumps({name: _plain(value) for name, value in learned.items()}),
    }
    payload = to_bytes({k: v.detach().contiguous().clone() for k, v in tensors.items()}, metadata)
    length = struct.unpack("<Q", payload[:8])[0]
    got = f"expected names and settings of at most {MAX_HEADER_BYTES} bytes, got {length}"
    expect(length <= MAX_HEADER_BYTES, f"{path}: {got}: the file could not be read again")
    write_atomically(Path(path), payload)


def write_atomically(path: Path, payload: bytes) -> None:
    """Replace the content of a file; after an error the file is unchanged."""
    temporary, handle = _temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise _about(error, path) from error
        raise


def check_writable(path: Path) -> None:
    """Raise an OSError if `write_atomically` could not create this file."""
    temporary, handle = _temporary(path)
    os.close(handle)
    os.unlink(temporary)


def _temporary(path: Path) -> tuple[Path, int]:
    """(path, descriptor) of a new temporary file in the same folder, open for writing."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        # not by tempfile, whose files only the user may read. os.open applies the umask, which a
        # process cannot read without a change that all threads see.
        return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise _about(error, path) from error


def _about(error: OSError, path: Path) -> OSError:
    """The same error with the name of the target file, not of the temporary one."""
    return OSError(error.errno, os.strerror(error.errno or 0), str(path))


@contextlib.contextmanager
def reading(path: str | PathLike[str]) -> Iterator[None]:
    """A block in which errors that a damaged file causes become a ModelFileError."""
    try:
        yield
    except ModelFileError as error:
        text = str(error)
        raise ModelFileError(text if str(path) in text else f"{path}: {text}") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a valid model file ({error})") from error


def expect(ok: bool, text: str) -> None:
    """Raise a ModelFileError unless ok."""
    if not ok:
        raise ModelFileError(text)


def _header(path: Path) -> dict[str, Any]:
    """The metadata of the JSON header; reads at most MAX_HEADER_BYTES."""
    expect(path.is_file(), "not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        expect(len(start) == 8, f"truncated: {size} bytes")
        length = struct.unpack("<Q", start)[0]
        fits = length <= min(MAX_HEADER_BYTES, size - 8)
        expect(fits, "truncated or no model file: its header is longer than it may be")
        header = json.loads(file.read(length).decode("utf-8"))
    expect(isinstance(header, dict) and isinstance(header.get("__metadata__"), dict), "no metadata")
    return dict(header["__metadata__"])


def class_of(path: str | PathLike[str]) -> str:
    """The class of the model in a file; the first of `CLASSES` if the file cannot be read."""
    try:
        name = _header(Path(path)).get("class")
    except (OSError, ValueError, ModelFileError):
        name = None
    return name if name in CLASSES else CLASSES[0]


def version_of(path: str | PathLike[str]) -> str:
    """The version of clam_kernels that wrote a model file; ModelFileError if it cannot be read."""
    with reading(path):
        return str(_header(Path(path))["package"])


def load(
    path: str | PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(parameters, learned numbers, tensors) of a model of class `kind`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    with reading(path):
        metadata = _header(path)
        expect(set(metadata) == _KEYS, f"unknown metadata {sorted(set(metadata) ^ _KEYS)}")
        newer = int(metadata["format"]) > FORMAT
        expect(not newer, f"written by clam_kernels {metadata['package']}, this is {__version__}")
        name = metadata["class"]
        is_known = name in (*CLASSES, *CHECKPOINTS)
        expect(is_known and name == kind, f"holds a {name}, not a {kind}")
        parameters = json.loads(metadata["parameters"])
        learned = json.loads(metadata["learned"])
        expect(isinstance(parameters, dict) and isinstance(learned, dict), "damaged metadata")
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise ModelFileError(f"{path}: {error}") from error
        expect(all(torch.is_tensor(t) for t in tensors.values()), "damaged tensors")
        return {k: _from_json(v) for k, v in parameters.items()}, learned, tensors
