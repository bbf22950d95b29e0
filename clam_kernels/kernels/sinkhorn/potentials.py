# SPDX-License-Identifier: Apache-2.0
"""Potentials of Sinkhorn scaling as the kernels of the backward take them."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this, `level` leaves a common part in the logits: the potentials contain it up to log(N K).
LARGE = 256.0


def pair(value: Tensor) -> Tensor:
    """Potentials [P, size] float64 as the two parts of the kernels, [P, 2, size] float32."""
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
    """The common part of the logits of a column, [P, K] float32: logits are about -f - g. In the
    sum of the logits times their gradients it would cancel to few digits; its product with the sum
    of the gradients (`Back.down`) is added apart.
    """
    active = f.isfinite()
    middle = torch.where(active, f, 0.0).sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp(
        1
    )
    common = torch.where(g.isfinite(), -g - middle, 0.0)
    return torch.where(common.abs() > LARGE, common, 0.0).float().contiguous()


def less(potential: Tensor, log_mass: Tensor) -> Tensor:
    """A potential minus the logarithm of its mass, -inf where either is."""
    out = (potential == -torch.inf) | (log_mass == -torch.inf)
    return torch.where(out, -torch.inf, potential - log_mass)
