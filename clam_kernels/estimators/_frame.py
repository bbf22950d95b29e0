# SPDX-License-Identifier: Apache-2.0
"""The affine frame every fit runs in: features centred on their means, scaled by a power of two.

Centring keeps float32 distances exact far from the origin; the power of two keeps squares finite
for data near the ends of the float range and changes no digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ROWS = 1 << 16


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Row chunks of a data matrix."""
    return iter(x.split(CHUNK_ROWS))


def scaled(x: Tensor, exponent: int) -> Tensor:
    """`x * 2**exponent` without an overflow on the way."""
    while exponent:
        part = max(-1000, min(1000, exponent))
        x, exponent = x * 2.0**part, exponent - part
    return x


def rescaled(value: float, exponent: int) -> float:
    """`value * 2**exponent`, 0 or inf where that is past the ends of the floats."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def _exponent(top: Tensor) -> int:
    """The power of two just above a magnitude; 0 for 0."""
    return math.frexp(float(top))[1] if float(top) > 0 else 0


@dataclass(frozen=True)
class Frame:
    """`z = (x 2^-range - mean) 2^-spread`, mean in units of 2^range."""

    mean: Tensor  # [D] float64
    range: int
    spread: int

    @classmethod
    def of(cls, x: Tensor) -> Frame:
        """Frame of a finite data matrix [N, D]."""
        span = _exponent(torch.stack([part.abs().amax() for part in chunks(x)]).amax())
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for part in chunks(x):
            total += scaled(part.double(), -span).sum(0)
        mean = total / len(x)
        tops = [(scaled(part.double(), -span) - mean).abs().amax() for part in chunks(x)]
        return cls(mean, span, _exponent(torch.stack(tops).amax()))

    @property
    def unit(self) -> int:
        """Exponent of the length 1 of the frame in units of the data."""
        return self.range + self.spread

    def states(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Data in the frame, chunk by chunk; in float64 if the dtype cannot hold it."""
        return torch.cat([self._states(part, dtype) for part in chunks(x)])

    def _states(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        z = scaled(scaled(x.double(), -self.range) - self.mean.to(x.device), -self.spread)
        narrow = z.to(dtype)
        if dtype != torch.float64 and bool((narrow.isinf() & ~z.isinf()).any()):
            return z
        return narrow

    def data(self, z: Tensor) -> Tensor:
        """States as data, float64."""
        return scaled(scaled(z.double(), self.spread) + self.mean.to(z.device), self.range)
