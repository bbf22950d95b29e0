# SPDX-License-Identifier: Apache-2.0
"""Associative memory at beta = inf: each step moves a row towards its nearest memory.

The nearest memory is the label of `kmeans_assign`: that of float64, the lowest index on ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import kmeans
from ..common.chunk import KEPT_ENTRIES, row_chunks
from ..common.score import alive_memories, compute_dtype


def nearest(x: Tensor, rho: Tensor, log_weights: Tensor | None) -> Tensor:
    """Label [..., N] of the nearest memory that takes part; -1 where a row is not finite or no
    memory takes part.
    """
    return kmeans.kmeans_assign_forward(x, rho, None, _dead(rho, log_weights), False)[0]


def _dead(rho: Tensor, log_weights: Tensor | None) -> Tensor | None:
    """Which memories take no part, [..., K]."""
    alive = alive_memories(log_weights)
    return None if alive is None else ~alive.expand(*alive.shape[:-1], rho.shape[-2])


def assign(
    function: Callable[..., tuple[Tensor, Tensor]],
    v: Tensor,
    rho: Tensor,
    log_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`am_assign` by a form of `kmeans_assign`. A memory that takes part and is not finite makes
    all rows NaN, label -1; where no memory takes part the distance is inf.
    """
    dead = _dead(rho, log_weights)
    labels, sqdist = function(v, rho, None, dead, True)
    broken = (rho * 0 if dead is None else torch.where(dead[..., None], 0.0, rho * 0)).sum((-2, -1))
    broken = broken.isnan()[..., None]
    labels, sqdist = torch.where(broken, -1, labels), torch.where(broken, torch.nan, sqdist)
    if dead is not None:
        sqdist = torch.where(dead.all(-1, keepdim=True), torch.inf, sqdist)
    return labels, sqdist


class _Path:
    """The steps of some rows of all problems: labels, and what each step adds to the states."""

    def __init__(
        self, rho: Tensor, log_weights: Tensor | None, mask: Tensor | None, step: float
    ) -> None:
        alive = alive_memories(log_weights)
        self.rho, self.log_weights, self.mask, self.step = rho, log_weights, mask, step
        # a memory that takes no part may hold NaN
        self.memories = rho if alive is None else torch.where(alive[..., None], rho, 0.0)
        # one that takes part and is not finite shows in every row
        self.poison = (self.memories * 0).sum((-2, -1))[..., None, None]

    def gain(self, rows: slice, x: Tensor) -> Tensor | float:
        if self.mask is None:
            return self.step
        one_row = self.mask.ndim < 2 or self.mask.shape[-2] == 1
        mask = self.mask if one_row else self.mask[..., rows, :]
        return self.step * mask.to(x.dtype)

    def advance(self, x: Tensor, gain: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """(labels, nearest memories, the states after a step). A row that is not finite becomes
        NaN; where no memory takes part, the row itself stands for the nearest memory.
        """
        labels = nearest(x, self.rho, self.log_weights)
        labels = labels.expand(*x.shape[:-1])
        wide = self.memories.expand(*x.shape[:-2], *self.memories.shape[-2:])
        place = labels.clamp(min=0)[..., None]
        near = torch.take_along_dim(wide, place, -2).to(x.dtype)
        lost = x + (x * 0).sum(-1, keepdim=True)
        near = torch.where(labels[..., None] < 0, lost, near) + self.poison.to(x.dtype)
        # exactly the memory at gain 1, and the row at gain 0
        return labels, near, gain * near + (x - gain * x)


def _parts(rows: int, steps: int, features: int) -> Iterator[slice]:
    return row_chunks(rows, max(1, KEPT_ENTRIES // (max(steps, 1) * features)))


def hard_forward(
    v: Tensor,
    rho: Tensor,
    shape: Sequence[int],
    steps: int,
    step: float,
    mask: Tensor | None,
    log_weights: Tensor | None,
) -> Tensor:
    """`am_recursion` at beta = inf; shape is that of the result."""
    path, dtype = _Path(rho, log_weights, mask, step), compute_dtype(v)
    out = v.new_empty(shape)
    wide = v.expand(shape)
    for rows in _parts(shape[-2], 1, shape[-1]):
        given = wide[..., rows, :]
        x = given.to(dtype)
        gain = path.gain(rows, x)
        for _ in range(steps):
            x = path.advance(x, gain)[2]
        if isinstance(gain, Tensor):  # an entry that the mask closes keeps its bits
            x = torch.where(gain == 0, given.to(dtype), x)
        out[..., rows, :] = x
    return out


def hard_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    steps: int,
    step: float,
    mask: Tensor | None,
    log_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of v in the shape of the result, of rho in float64 with the batch of the result, of
    the mask in the shape of the result).
    """
    path, dtype, shape = _Path(rho, log_weights, mask, step), compute_dtype(v), grad.shape
    into, opened = (grad.new_zeros(shape, dtype=dtype) for _ in range(2))
    pulled = grad.new_zeros((*shape[:-2], *rho.shape[-2:]), dtype=torch.float64)
    wide = v.expand(shape)
    for rows in _parts(shape[-2], steps, shape[-1]):
        x = wide[..., rows, :].to(dtype)
        gain, walk = path.gain(rows, x), []
        for _ in range(steps):
            labels, near, following = path.advance(x, gain)
            walk.append((labels, near - x))
            x = following
        g = grad[..., rows, :].to(dtype)
        for labels, gap in reversed(walk):
            opened[..., rows, :] += step * g * gap
            h = gain * g
            moved = torch.where(labels[..., None] < 0, 0.0, h)
            pulled += kmeans.kmeans_update_forward(h, labels, rho.shape[-2])[0]
            g = g - moved
        into[..., rows, :] = g
    return into, pulled, opened
