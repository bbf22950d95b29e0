# SPDX-License-Identifier: Apache-2.0
"""Powers of two; and chunks of rows, which are small enough to copy in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

# Entries of a chunk of rows.
CHUNK_ENTRIES = 1 << 21


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Row chunks of a data matrix."""
    return iter(x.split(max(1, CHUNK_ENTRIES // x.shape[1])))


def scale_tensor(x: Tensor, exponent: int) -> Tensor:
    """`x * 2**exponent`; no factor of the product overflows."""
    while exponent:
        part = max(-1000, min(1000, exponent))
        x, exponent = x * 2.0**part, exponent - part
    return x


def scale_number(value: float, exponent: int) -> float:
    """`value * 2**exponent`; 0 or inf where no float holds that."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def exponent_of(top: float) -> int:
    """The exponent of the power of two just above a magnitude; 0 for 0."""
    return math.frexp(top)[1] if top > 0 else 0
