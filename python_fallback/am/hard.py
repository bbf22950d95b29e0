# SPDX-License-Identifier: Apache-2.0
"""Associative memory at beta = inf: each step moves a row towards its nearest memory.

The index of the nearest memory is the label of `kmeans_assign`: exact in float64, and the lowest
index of a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import kmeans
from ..common.chunk import SAVED_ENTRIES, row_chunks
from ..common.score import active_memories, compute_dtype


def nearest_labels(x: Tensor, rho: Tensor, log_weights: Tensor | None) -> Tensor:
    """Label [..., N] of the nearest active memory; -1 where a row is not finite or all memories are
    masked.
    """
    return kmeans.kmeans_assign_forward(x, rho, None, _masked_memories(rho, log_weights), False)[0]


def _masked_memories(rho: Tensor, log_weights: Tensor | None) -> Tensor | None:
    """[..., K] bool: masked memories; None if none is."""
    active = active_memories(log_weights)
    return None if active is None else ~active.expand(*active.shape[:-1], rho.shape[-2])


def assign(
    function: Callable[..., tuple[Tensor, Tensor]],
    v: Tensor,
    rho: Tensor,
    log_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`am_assign` by `function`, the equation or the CPU backend of `kmeans_assign`.

    An active memory that is not finite gives all rows the label -1 and the distance NaN; where all
    memories are masked the distance is inf.
    """
    masked = _masked_memories(rho, log_weights)
    labels, sqdist = function(v, rho, None, masked, True)
    zero_or_nan = rho * 0 if masked is None else torch.where(masked[..., None], 0.0, rho * 0)
    not_finite = zero_or_nan.sum((-2, -1)).isnan()[..., None]
    labels, sqdist = torch.where(not_finite, -1, labels), torch.where(not_finite, torch.nan, sqdist)
    if masked is not None:
        sqdist = torch.where(masked.all(-1, keepdim=True), torch.inf, sqdist)
    return labels, sqdist


class HardStep:
    """One step at beta = inf, for some rows of all problems."""

    def __init__(
        self, rho: Tensor, log_weights: Tensor | None, mask: Tensor | None, step: float
    ) -> None:
        active = active_memories(log_weights)
        self.rho, self.log_weights, self.mask, self.step = rho, log_weights, mask, step
        # masked memories may be NaN, and 0 * NaN is NaN
        self.memories = rho if active is None else torch.where(active[..., None], rho, 0.0)
        # an active memory that is not finite makes every row NaN
        self.zero_or_nan = (self.memories * 0).sum((-2, -1))[..., None, None]

    def gain(self, rows: slice, x: Tensor) -> Tensor | float:
        """`step * update_mask` of some rows; the number `step` without a mask."""
        if self.mask is None:
            return self.step
        one_row = self.mask.ndim < 2 or self.mask.shape[-2] == 1
        mask = self.mask if one_row else self.mask[..., rows, :]
        return self.step * mask.to(x.dtype)

    def advance(self, x: Tensor, gain: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """(labels, nearest memories, states after the step). A row that is not finite becomes NaN;
        where all memories are masked, the row is its own nearest memory.
        """
        labels = nearest_labels(x, self.rho, self.log_weights)
        labels = labels.expand(*x.shape[:-1])
        expanded = self.memories.expand(*x.shape[:-2], *self.memories.shape[-2:])
        place = labels.clamp(min=0)[..., None]
        recalled = torch.take_along_dim(expanded, place, -2).to(x.dtype)
        nan_or_row = x + (x * 0).sum(-1, keepdim=True)
        recalled = torch.where(labels[..., None] < 0, nan_or_row, recalled) + self.zero_or_nan.to(
            x.dtype
        )
        # exactly the memory for gain 1, and the row for gain 0
        return labels, recalled, gain * recalled + (x - gain * x)


def _row_chunks(rows: int, steps: int, features: int) -> Iterator[slice]:
    """Chunks whose states of all steps fit the budget of saved entries."""
    return row_chunks(rows, max(1, SAVED_ENTRIES // (max(steps, 1) * features)))


def hard_forward(
    v: Tensor,
    rho: Tensor,
    shape: Sequence[int],
    steps: int,
    step: float,
    mask: Tensor | None,
    log_weights: Tensor | None,
) -> Tensor:
    """`x <- x + step * update_mask * (nearest memory - x)`, `steps` times; shape is that of the
    result.
    """
    hard_step, dtype = HardStep(rho, log_weights, mask, step), compute_dtype(v.dtype)
    out = v.new_empty(shape)
    expanded = v.expand(shape)
    for rows in _row_chunks(shape[-2], 1, shape[-1]):
        start = expanded[..., rows, :]
        x = start.to(dtype)
        gain = hard_step.gain(rows, x)
        for _ in range(steps):
            x = hard_step.advance(x, gain)[2]
        if isinstance(gain, Tensor):  # an entry that the mask does not update keeps its bits
            x = torch.where(gain == 0, start.to(dtype), x)
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
    """(gradient of v in the shape of the result, gradient of rho in float64 with the batch of the
    result, gradient of the mask in the shape of the result).

    Labels are constants: with h = step * update_mask * g, each step back gives a row g - h, its
    nearest memory h, and the mask step * g * (nearest memory - x).
    """
    hard_step, dtype, shape = (
        HardStep(rho, log_weights, mask, step),
        compute_dtype(v.dtype),
        grad.shape,
    )
    grad_v, grad_mask = (grad.new_zeros(shape, dtype=dtype) for _ in range(2))
    grad_rho = grad.new_zeros((*shape[:-2], *rho.shape[-2:]), dtype=torch.float64)
    expanded = v.expand(shape)
    for rows in _row_chunks(shape[-2], steps, shape[-1]):
        x = expanded[..., rows, :].to(dtype)
        gain, steps_forward = hard_step.gain(rows, x), []
        for _ in range(steps):
            labels, recalled, following = hard_step.advance(x, gain)
            steps_forward.append((labels, recalled - x))
            x = following
        g = grad[..., rows, :].to(dtype)
        for labels, difference in reversed(steps_forward):
            grad_mask[..., rows, :] += step * g * difference
            h = gain * g
            applied = torch.where(labels[..., None] < 0, 0.0, h)
            grad_rho += kmeans.kmeans_update_forward(h, labels, rho.shape[-2])[0]
            g = g - applied
        grad_v[..., rows, :] = g
    return grad_v, grad_rho, grad_mask
