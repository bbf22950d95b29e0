# SPDX-License-Identifier: Apache-2.0
"""Potentials of Sinkhorn scaling as the kernels of the backward take them."""

from __future__ import annotations

import torch
from torch import Tensor

# What logits have in common is left to the sums up to this: the potentials know it to log (N K).
LARGE = 256.0


def pair(value: Tensor) -> Tensor:
    """Potentials [P, size] in float64 as the kernels have them, [P, 2, size] float32."""
    high = value.float()
    low = torch.where(high.isfinite(), value - high.double(), 0.0)
    return torch.stack([high, low.float()], 1)


def whole(parts: Tensor) -> Tensor:
    """The inverse of `pair`."""
    return parts.double().sum(-2)


def pairs(potentials: Tensor) -> Tensor:
    """`pair` of [., P, size]."""
    return pair(potentials.flatten(0, 1)).view(*potentials.shape[:2], 2, -1)


def level(f: Tensor, g: Tensor) -> Tensor:
    """What the logits of a column have in common, [P, K] float32: they are about -f - g. Times the
    gradients of a column, which sum to what `Back.down` has, it would cost the sums their digits.
    """
    alive = f.isfinite()
    middle = torch.where(alive, f, 0.0).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(1)
    common = torch.where(g.isfinite(), -g - middle, 0.0)
    return torch.where(common.abs() > LARGE, common, 0.0).float().contiguous()


def less(potential: Tensor, log_mass: Tensor) -> Tensor:
    """A potential less the logarithm of its mass, -inf where either is."""
    out = (potential == -torch.inf) | (log_mass == -torch.inf)
    return torch.where(out, -torch.inf, potential - log_mass)
