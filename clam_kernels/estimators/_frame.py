# SPDX-License-Identifier: Apache-2.0
"""The affine frame every fit runs in: features centred on their means, scaled by a power of two.

Centring keeps float32 distances exact far from the origin; the power of two keeps squares finite
for data near the ends of the float range and changes no digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._rows import Rows

# Entries of a chunk of rows.
CHUNK_ENTRIES = 1 << 21


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Row chunks of a data matrix."""
    return iter(x.split(max(1, CHUNK_ENTRIES // x.shape[1])))


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


def _exponent(top: float) -> int:
    """The power of two just above a magnitude; 0 for 0."""
    return math.frexp(top)[1] if top > 0 else 0


def pieces(rows: Rows) -> Iterator[tuple[slice, Tensor]]:
    """(rows, values) in chunks that a copy in float64 is no matter for."""
    for part, block in rows.blocks():
        start = part.start
        for x in chunks(block):
            yield slice(start, start + len(x)), x
            start += len(x)


@dataclass(frozen=True)
class Frame:
    """`z = (x 2^-range - mean) 2^-spread`, mean in units of 2^range."""

    mean: Tensor  # [D] float64
    range: int
    spread: int

    @classmethod
    def of(cls, rows: Rows, weight: Tensor | None = None, names: Any = None) -> Frame:
        """Frame of a data matrix, centred on the means of what is observed.

        ValueError if a feature has no observed entry (in a row that counts).
        """
        span = _exponent(rows.top)
        total, held = torch.zeros(2, rows.features, dtype=torch.float64, device=rows.device)
        for part, x in pieces(rows):
            share = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
            if weight is not None:
                share = weight[part, None]
            seen = ~x.isnan()
            total += (scaled(x.double().nan_to_num(), -span) * share).sum(0)
            held += (seen * share).sum(0)
        lost = (held == 0).nonzero()[:, 0].tolist()
        if lost:
            which = lost if names is None else [str(names[i]) for i in lost]
            raise ValueError(f"X: expected an observed entry in every column, got none in {which}")
        mean = total / held
        top = 0.0
        for _, x in pieces(rows):
            far = scaled(x.double(), -span) - mean
            top = max(top, float(far.abs().nan_to_num(0.0).amax()))
        return cls(mean, span, _exponent(top))

    @property
    def unit(self) -> int:
        """Exponent of the length 1 of the frame in units of the data."""
        return self.range + self.spread

    def states(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Data in the frame, chunk by chunk; in float64 if the dtype cannot hold it."""
        return torch.cat([self._states(part, dtype) for part in chunks(x)])

    def all_states(self, rows: Rows) -> Tensor:
        """Every row in the frame."""
        return torch.cat([self._states(x, rows.dtype) for _, x in pieces(rows)])

    def _states(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        z = scaled(scaled(x.double(), -self.range) - self.mean.to(x.device), -self.spread)
        narrow = z.to(dtype)
        if dtype != torch.float64 and bool((narrow.isinf() & ~z.isinf()).any()):
            return z
        return narrow

    def data(self, z: Tensor) -> Tensor:
        """States as data, float64."""
        return scaled(scaled(z.double(), self.spread) + self.mean.to(z.device), self.range)
