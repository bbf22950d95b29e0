# SPDX-License-Identifier: Apache-2.0
"""Rows for a trainer: from tensors, arrays and memory maps, files, folders of images, map-style
datasets. The rows of a batch are read when the batch is computed.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import tables
from ..._core import checks
from ...exceptions import DataFileError, needs
from ...metrics import refuse_masked_entries

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
KINDS = "a Tensor, an array, a path to .npy, .npz or a folder of images, or a map-style Dataset"
GREY = ("1", "L", "LA")
ITEMS = "a Dataset whose items are, or are tuples that begin with, a Tensor or an array of numbers"
# Rows whose content identifies a data set in a checkpoint.
PROBES = 64


class Inputs(ABC):
    """Rows [N, ...] of a data set."""

    count: int
    files: list[str] | None = None
    images: tuple[str, int | None] | None = None  # mode and side of images after the conversion
    origin: torch.device | None = None
    is_static = True  # whether a row is the same at each read
    is_checked = False  # whether all rows are finite: each check of a batch waits for the device

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def raw(self, rows: Tensor) -> Tensor:
        """The stored values of some rows; the index is int64 on the CPU."""

    def batch_dtype(self, stored: torch.dtype, encoder: torch.dtype) -> torch.dtype:
        """The dtype of a batch, by that of the stored rows and of the encoder."""
        return encoder

    def take(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A batch of rows on a device; ValueError with the place of NaN or infinity."""
        batch = self.raw(rows)
        batch = batch.to(device=device, dtype=self.batch_dtype(batch.dtype, dtype))
        self.check_finite(batch, rows)
        return batch

    def check_finite(self, batch: Tensor, rows: Tensor) -> None:
        """ValueError with the place of NaN or infinity in a batch that no check has read before."""
        is_unknown = batch.is_floating_point() and not (self.is_checked and self.is_static)
        if is_unknown and not bool(batch.sum().isfinite()):
            _check_finite(batch, rows)

    @abstractmethod
    def mark(self) -> list[Any]:
        """What identifies this data in a checkpoint, as JSON."""

    def give(self, result: Tensor) -> Any:
        """A result in the container of the data: numpy, with int32 labels, or a tensor."""
        array = result.detach().cpu().numpy()
        return array.astype(np.int32) if array.dtype == np.int64 else array


class TensorInputs(Inputs):
    """The rows of a tensor."""

    def __init__(self, x: Tensor) -> None:
        if x.layout != torch.strided:
            raise TypeError(f"data: expected a dense tensor, got one of layout {x.layout}")
        if x.device.type == "meta":
            raise ValueError("data: expected a tensor with values, got one on device meta")
        if x.is_complex():
            raise ValueError("data: expected real numbers, got a complex tensor")
        self.x, self.count, self.origin = x.detach(), _rows(x.shape), x.device

    def raw(self, rows: Tensor) -> Tensor:
        return self.x[rows.to(self.x.device)]

    def mark(self) -> list[Any]:
        probes = self.x[_probes(self.count).to(self.x.device)].cpu().contiguous()
        content = probes.flatten().view(torch.uint8).numpy().tobytes()
        return [list(self.x.shape), str(self.x.dtype).removeprefix("torch."), digest(content)]

    def give(self, result: Tensor) -> Any:
        return result.detach().to(self.x.device)


class ArrayInputs(Inputs):
    """The rows of an array, maybe a memory map."""

    def __init__(self, x: Any) -> None:
        refuse_masked_entries("data", x)
        self.x = x if isinstance(x, np.ndarray) else np.asarray(x)
        if self.x.dtype.kind not in "fiub":
            raise ValueError(f"data: expected numbers, got dtype {self.x.dtype}")
        self.count = _rows(self.x.shape)

    def raw(self, rows: Tensor) -> Tensor:
        values = np.asarray(self.x[rows.numpy()])
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))

    def take(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.x.dtype.itemsize > 8:  # longdouble, which torch does not have
            self.x = self.x.astype(np.float64)
        return super().take(rows, device, dtype)

    def mark(self) -> list[Any]:
        probes = np.ascontiguousarray(self.x[_probes(self.count).numpy()])
        return [list(self.x.shape), str(self.x.dtype), digest(probes.tobytes())]


class ImageInputs(Inputs):
    """The images in a folder and in its folders, in the order of their paths."""

    def __init__(self, folder: Path, size: int | None, mode: str | None) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise ImportError(needs(f"{folder}: reading images", "pillow", "images")) from None
        paths = (p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
        names = [p.as_posix() for p in paths if not any(part[0] == "." for part in p.parts)]
        self.folder, self.size, self.files = folder, size, sorted(names)
        self.count = len(self.files)
        if not self.files:
            raise DataFileError(f"{folder}: expected images ({', '.join(IMAGES)}), got none")
        if mode is None:
            mode = "L" if all(map(self._is_grey, self.files)) else "RGB"
        self.mode, self.images = mode, (mode, size)
        self.shape = self._image(self.files[0]).shape

    def _open(self, name: str) -> Any:
        import PIL.Image

        try:
            return PIL.Image.open(self.folder / name)
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise DataFileError(f"{self.folder / name}: {error}") from error

    def _is_grey(self, name: str) -> bool:
        with self._open(name) as image:
            return image.mode in GREY

    def _image(self, name: str) -> Tensor:
        """[C, H, W] in [0, 1]."""
        from PIL import ImageOps

        with self._open(name) as image:
            if image.mode[0] in "IF":  # a conversion would clamp values at 255
                raise DataFileError(f"{self.folder / name}: expected 8 bits, got mode {image.mode}")
            try:
                image = image.convert(self.mode)
            except (OSError, ValueError, SyntaxError) as error:
                raise DataFileError(f"{self.folder / name}: {error}") from error
            if self.size is not None:
                image = ImageOps.fit(image, (self.size, self.size))
            pixels = np.array(image, dtype=np.float32)
        pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1) / np.float32(255)
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def raw(self, rows: Tensor) -> Tensor:
        assert self.files is not None
        images = []
        for row in rows.tolist():
            image = self._image(self.files[row])
            if image.shape != self.shape:
                raise DataFileError(
                    f"{self.folder / self.files[row]}: expected {list(self.shape)} as in"
                    f" {self.files[0]}, got {list(image.shape)}; image_size scales all to one size"
                )
            images.append(image)
        return torch.stack(images)

    def mark(self) -> list[Any]:
        assert self.files is not None
        sizes = [f"{name}:{os.stat(self.folder / name).st_size}" for name in self.files]
        return [len(sizes), self.size, digest("\n".join(sizes).encode())]


class DatasetInputs(Inputs):
    """The items of an object with a length: inputs, or tuples that begin with one."""

    is_static = False

    def __init__(self, items: Any) -> None:
        self.items = items
        self.count = _rows([len(items)])

    def batch_dtype(self, stored: torch.dtype, encoder: torch.dtype) -> torch.dtype:
        """The encoder's dtype; whole numbers, which may be indices, keep their dtype."""
        return encoder if stored.is_floating_point else stored

    def raw(self, rows: Tensor) -> Tensor:
        return torch.stack([self._one(row) for row in rows.tolist()])

    def _one(self, row: int) -> Tensor:
        item = self.items[row]
        item = item[0] if isinstance(item, tuple | list) else item
        if isinstance(item, Tensor):
            return item.detach()
        kind = type(item).__name__
        # numpy converts anything to an array: a dict to objects, an image to bytes
        checks.type_error(
            hasattr(item, "__array__") or isinstance(item, Real),
            lambda: checks.wording("data", ITEMS, f"{kind} in row {row}"),
        )
        array = np.asarray(item)
        checks.type_error(
            array.dtype.kind in "fiub",
            lambda: checks.wording("data", ITEMS, f"{kind} of dtype {array.dtype} in row {row}"),
        )
        return torch.as_tensor(array, device="cpu")

    def mark(self) -> list[Any]:
        return [self.count, list(self._one(0).shape)]


def inputs_of(data: Any, image_size: int | None = None, mode: str | None = None) -> Inputs:
    """The rows of the data of `fit`; `mode` is that of images, None to read it from them."""
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if path.is_dir():
            return ImageInputs(path, image_size, mode)
        return ArrayInputs(tables.read_array(path))
    if isinstance(data, Tensor):
        return TensorInputs(data)
    if isinstance(data, torch.utils.data.IterableDataset):
        raise TypeError(f"data: expected {KINDS}, got an iterable dataset, which has no rows")
    if isinstance(data, np.ndarray | list | tuple) or hasattr(data, "__array__"):
        return ArrayInputs(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DatasetInputs(data)
    raise TypeError(f"data: expected {KINDS}, got {type(data).__name__}")


def _rows(shape: Any) -> int:
    if len(shape) == 0 or shape[0] == 0:
        raise ValueError(f"data: expected shape [N, ...] with N >= 1, got {list(shape)}")
    return int(shape[0])


def _probes(count: int) -> Tensor:
    places = torch.linspace(0, count - 1, min(count, PROBES), dtype=torch.float64, device="cpu")
    return places.long()


def digest(content: bytes) -> str:
    """A hash of some bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _check_finite(batch: Tensor, rows: Tensor) -> None:
    """ValueError, which names the first entry of a batch that is not finite, if there is one."""
    bad = (~batch.isfinite()).nonzero()[:1].tolist()
    if not bad:
        return  # the entries are finite, their sum is not
    row, *rest = bad[0]
    what = "NaN" if bool(batch[tuple(bad[0])].isnan()) else "infinity"
    where = f" at {rest}" if rest else ""
    raise ValueError(f"data: expected finite values, got {what} in row {int(rows[row])}{where}")
