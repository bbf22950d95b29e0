# SPDX-License-Identifier: Apache-2.0
"""The affine frame of a fit: columns minus their means, divided by a power of two, or by their
deviations where the fit standardises.

Because of the centre, float32 distances keep their digits for data far from the origin. Because
of the power of two, which changes no digit, squares are finite for data near the ends of the float
range.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .scale import chunks, scale_tensor

# Largest magnitude whose squares, and sums of them, float32 holds.
LARGEST = 2.0**40


@dataclass(frozen=True)
class Frame:
    """`z = (x 2^-range - mean) / width`, mean and width in units of 2^range."""

    mean: Tensor  # [D] float64
    range: int
    width: Tensor  # [D] float64, all equal unless the fit standardises
    unit: int  # exponent of the length 1 of the frame in units of the data
    one: float  # the length that counts as 1 where numbers are absolute
    deviation: Tensor  # [D] float64, standard deviation of a column in the frame
    low: Tensor  # [D] float64, least and largest observed entry, in units of the data
    high: Tensor
    is_standard: bool  # whether every column is divided by its deviation
    contrast: float = 1.0  # largest over smallest spread of the columns

    def states(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Data as states, chunk by chunk; in float64 where the dtype cannot hold their squares."""
        return torch.cat([self._states(part, dtype) for part in chunks(x)])

    def _states(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        z = scale_tensor(x.double(), -self.range) - self.mean.to(x.device)
        z = z / self.width.to(x.device)
        if dtype != torch.float64 and float(z.abs().nan_to_num(0.0).amax()) > LARGEST:
            return z
        return z.to(dtype)

    def data(self, z: Tensor) -> Tensor:
        """States as data in float64, clamped to the observed ranges of their columns."""
        x = scale_tensor(z.double() * self.width.to(z.device) + self.mean.to(z.device), self.range)
        return torch.maximum(torch.minimum(x, self.high.to(z.device)), self.low.to(z.device))

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The observed range [D] of every column as states of a device and dtype."""
        low, high = (
            (scale_tensor(x, -self.range) - self.mean) / self.width for x in (self.low, self.high)
        )
        return low.to(like.device, like.dtype), high.to(like.device, like.dtype)

    @property
    def scale(self) -> Tensor:
        """[D] float64: the divisors of the columns in a distance in units of the data."""
        return scale_tensor(self.width, self.range - self.unit)

    def on(self, device: torch.device) -> Frame:
        """The frame on a device."""
        names = ("mean", "width", "deviation", "low", "high")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def move_to(self, state: Tensor) -> Frame:
        """The frame centred on a state."""
        return dataclasses.replace(self, mean=self.mean + state * self.width)

    def include(self, x: Tensor) -> Frame:
        """The frame whose observed range includes more rows."""
        inf = torch.inf
        low = torch.minimum(self.low, x.double().nan_to_num(inf, inf, -inf).amin(0))
        high = torch.maximum(self.high, x.double().nan_to_num(-inf, inf, -inf).amax(0))
        return dataclasses.replace(self, low=low, high=high)
