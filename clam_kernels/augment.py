# SPDX-License-Identifier: Apache-2.0
"""Augmentations of batches, for the argument `augment` of the trainers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._core import checks


class ShiftAndRotate:
    """Shift and rotate each image of a batch by a small random amount, with bilinear interpolation.

        out(p) = image(c + R(a) (p - c) + t),  a ~ U(-degrees, degrees),  t ~ U(-shift, shift) side

    with p a pixel, c the centre of the image, R(a) the rotation by a. This is the augmentation with
    which Guo et al. (2018, "Deep embedded clustering with data augmentation") train on digits.

    Parameters
    ----------
    shape : (height, width) or (channels, height, width), optional
        Shape of an image in a batch of flat rows [B, D]. Without it a batch is [B, height, width]
        or [B, channels, height, width].
    degrees : float in [0, 180], unit degree
        Largest rotation, to both sides.
    shift : float in [0, 1], unit side of the image
        Largest shift along each axis, to both sides.

    Notes
    -----
    A point outside the image has the value of the nearest pixel of the border.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.augment import ShiftAndRotate
    >>> augment = ShiftAndRotate((8, 8), degrees=10, shift=0.1)
    >>> rows = torch.zeros(3, 64)
    >>> augment(rows, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 64])
    """

    def __init__(
        self, shape: Sequence[int] | None = None, *, degrees: float = 10.0, shift: float = 0.1
    ) -> None:
        if shape is not None:
            shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
            sizes_fit = all(checks.is_whole(size) and size >= 1 for size in shape)
            is_image = len(shape) in (2, 3) and sizes_fit
            words = "(height, width) or (channels, height, width) or None"
            checks.expect(is_image, "shape", words, repr(shape))
        self.shape = shape
        self.degrees = _amount("degrees", degrees, 180.0)
        self.shift = _amount("shift", shift, 1.0)

    def __repr__(self) -> str:
        return f"ShiftAndRotate({self.shape}, degrees={self.degrees:g}, shift={self.shift:g})"

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """An augmented draw of a batch.

        Parameters
        ----------
        batch : Tensor [B, D], [B, height, width] or [B, channels, height, width], any float dtype
            The images.
        generator : torch.Generator
            The source of all random numbers, on any device.

        Returns
        -------
        Tensor, shape, dtype and device of batch

        Raises
        ------
        TypeError
            The batch has no float dtype.
        ValueError
            The shape of the batch does not fit.
        """
        checks.tensor("batch", batch)
        checks.floating("batch", batch)
        images = self._images(batch)
        if not len(batch):
            return batch.clone()
        count, _, height, width = images.shape
        draw = torch.rand(
            count, 3, generator=generator, device=generator.device, dtype=torch.float32
        )
        draw = (2 * draw - 1).to(batch.device)
        angle = draw[:, 0] * math.radians(self.degrees)
        right, down = (draw[:, 1:] * 2 * self.shift).unbind(1)  # an image is 2 wide and 2 high
        cos, sin = angle.cos(), angle.sin()
        rows = [cos, -sin * (height / width), right, sin * (width / height), cos, down]
        theta = torch.stack(rows, 1).view(-1, 2, 3)
        wide = images if images.dtype == torch.float64 else images.float()
        grid = functional.affine_grid(theta.to(wide.dtype), list(images.shape), align_corners=False)
        out = functional.grid_sample(
            wide, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return out.to(batch.dtype).reshape(batch.shape)

    def _images(self, batch: Tensor) -> Tensor:
        """The batch as [B, channels, height, width]."""
        if self.shape is None:
            words = "[B, height, width] or [B, channels, height, width]; flat rows need `shape`"
            checks.shape("batch", batch, words, batch.ndim in (3, 4))
            return batch[:, None] if batch.ndim == 3 else batch
        channels, height, width = self.shape if len(self.shape) == 3 else (1, *self.shape)
        size = channels * height * width
        fits = batch.ndim >= 2 and batch[:1].numel() == min(len(batch), 1) * size
        checks.shape("batch", batch, f"[B, {size}] of images {list(self.shape)}", fits)
        return batch.reshape(-1, channels, height, width)


def _amount(name: str, value: Any, most: float) -> float:
    number = checks.real(name, value)
    checks.expect(0 <= number <= most, name, f"a number in [0, {most:g}]", value)
    return number
