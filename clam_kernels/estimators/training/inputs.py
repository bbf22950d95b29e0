# SPDX-License-Identifier: Apache-2.0
"""Rows for a trainer, whatever holds them: tensors, arrays and memory maps, files, folders of
images, map-style datasets. Rows are read when a batch asks for them.
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
from ...metrics import unmasked

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
KINDS = "a Tensor, an array, a path to .npy, .npz or a folder of images, or a map-style Dataset"
GREY = ("1", "L", "LA")
ITEMS = "a Dataset whose items are, or are tuples that begin with, a Tensor or an array of numbers"
# Rows whose content tells one data set from another.
PROBES = 64


class Inputs(ABC):
    """Rows [N, ...] of a data set."""

    count: int
    files: list[str] | None = None
    images: tuple[str, int | None] | None = None  # mode and side that images are brought to
    origin: torch.device | None = None
    static = True  # whether a row is the same each time
    known = False  # whether all rows were found finite: looking again would wait for the device

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def raw(self, rows: Tensor) -> Tensor:
        """Some rows as they are kept; rows are int64 on the CPU."""

    def like(self, found: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """What a batch of the dtype found is turned into for an encoder of another."""
        return dtype

    def take(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A batch of rows on a device; NaN and infinity raise with their place."""
        batch = self.raw(rows)
        batch = batch.to(device=device, dtype=self.like(batch.dtype, dtype))
        look = batch.is_floating_point() and not (self.known and self.static)
        if look and not bool(batch.sum().isfinite()):
            _refuse(batch, rows)
        return batch

    @abstractmethod
    def mark(self) -> list[Any]:
        """What tells this data from other data, as JSON."""

    def give(self, result: Tensor) -> Any:
        """A result as users of such data expect it."""
        found = result.detach().cpu().numpy()
        return found.astype(np.int32) if found.dtype == np.int64 else found


class OfTensor(Inputs):
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


class OfArray(Inputs):
    def __init__(self, x: Any) -> None:
        unmasked("data", x)
        self.x = x if isinstance(x, np.ndarray) else np.asarray(x)
        if self.x.dtype.kind not in "fiub":
            raise ValueError(f"data: expected numbers, got dtype {self.x.dtype}")
        self.count = _rows(self.x.shape)

    def raw(self, rows: Tensor) -> Tensor:
        picked = np.asarray(self.x[rows.numpy()])
        return torch.from_numpy(picked.astype(picked.dtype.newbyteorder("="), copy=False))

    def take(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.x.dtype.itemsize > 8:  # longdouble, which torch has not
            self.x = self.x.astype(np.float64)
        return super().take(rows, device, dtype)

    def mark(self) -> list[Any]:
        probes = np.ascontiguousarray(self.x[_probes(self.count).numpy()])
        return [list(self.x.shape), str(self.x.dtype), digest(probes.tobytes())]


class OfImages(Inputs):
    """A folder of images; class folders only name them."""

    def __init__(self, folder: Path, size: int | None, mode: str | None) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise ImportError(needs(f"{folder}: reading images", "pillow", "images")) from None
        found = (p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
        named = [p.as_posix() for p in found if not any(part[0] == "." for part in p.parts)]
        self.folder, self.size, self.files = folder, size, sorted(named)
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
            if image.mode[0] in "IF":  # conversion would cut them off at 255
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
                    f" {self.files[0]}, got {list(image.shape)}; image_size brings all to one size"
                )
            images.append(image)
        return torch.stack(images)

    def mark(self) -> list[Any]:
        assert self.files is not None
        sizes = [f"{name}:{os.stat(self.folder / name).st_size}" for name in self.files]
        return [len(sizes), self.size, digest("\n".join(sizes).encode())]


class OfDataset(Inputs):
    """Anything with a length whose items are inputs, or tuples that begin with one."""

    static = False

    def __init__(self, items: Any) -> None:
        self.items = items
        self.count = _rows([len(items)])

    def like(self, found: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        return dtype if found.is_floating_point else found  # whole numbers may be indices

    def raw(self, rows: Tensor) -> Tensor:
        return torch.stack([self._one(row) for row in rows.tolist()])

    def _one(self, row: int) -> Tensor:
        item = self.items[row]
        item = item[0] if isinstance(item, tuple | list) else item
        if isinstance(item, Tensor):
            return item.detach()
        kind = type(item).__name__
        # numpy makes an array of anything: of a dict one of objects, of an image one of bytes
        checks.type_error(
            hasattr(item, "__array__") or isinstance(item, Real),
            lambda: checks.wording("data", ITEMS, f"{kind} in row {row}"),
        )
        found = np.asarray(item)
        checks.type_error(
            found.dtype.kind in "fiub",
            lambda: checks.wording("data", ITEMS, f"{kind} of dtype {found.dtype} in row {row}"),
        )
        return torch.as_tensor(found, device="cpu")

    def mark(self) -> list[Any]:
        return [self.count, list(self._one(0).shape)]


def inputs_of(data: Any, image_size: int | None = None, mode: str | None = None) -> Inputs:
    """The rows of what was given to `fit`; mode is that of images, None to see what they are."""
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if path.is_dir():
            return OfImages(path, image_size, mode)
        return OfArray(tables.read_array(path))
    if isinstance(data, Tensor):
        return OfTensor(data)
    if isinstance(data, torch.utils.data.IterableDataset):
        raise TypeError(f"data: expected {KINDS}, got an iterable dataset, which has no rows")
    if isinstance(data, np.ndarray | list | tuple) or hasattr(data, "__array__"):
        return OfArray(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return OfDataset(data)
    raise TypeError(f"data: expected {KINDS}, got {type(data).__name__}")


def _rows(shape: Any) -> int:
    if len(shape) == 0 or shape[0] == 0:
        raise ValueError(f"data: expected shape [N, ...] with N >= 1, got {list(shape)}")
    return int(shape[0])


def _probes(count: int) -> Tensor:
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    return torch.linspace(0, count - 1, min(count, PROBES), **wide).long()


def digest(content: bytes) -> str:
    """A short name for some bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _refuse(batch: Tensor, rows: Tensor) -> None:
    """ValueError that names the first entry of a batch that is not finite, if there is one."""
    bad = (~batch.isfinite()).nonzero()[:1].tolist()
    if not bad:
        return  # finite entries whose sum is not
    row, *rest = bad[0]
    what = "NaN" if bool(batch[tuple(bad[0])].isnan()) else "infinity"
    where = f" at {rest}" if rest else ""
    raise ValueError(f"data: expected finite values, got {what} in row {int(rows[row])}{where}")
