# SPDX-License-Identifier: Apache-2.0
"""Scores shared by the families, each with one numeric recipe, and the dtype everything is
computed in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The centre is the mean of the memories whose squared distance from the median of a sample of this
# size is at most so many times the median of these.
SAMPLE, NEAR = 31, 16.0


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def alive_memories(log_weights: Tensor | None) -> Tensor | None:
    """Which memories take part ([..., K], bool): those with log_weight > -inf; None means all."""
    return None if log_weights is None else torch.atleast_1d(log_weights) != -torch.inf


def centred(rho: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(rho - c, c)` with c `[..., 1, D]` the centre of the memories that take part; the others are
    set to 0.

    Distances, the step and all gradients do not change under a shift, so c carries no gradient. It
    keeps the expanded distance accurate for data far from the origin.
    """
    fixed = rho.detach()
    keep = None if alive is None else alive.expand(*alive.shape[:-1], rho.shape[-2])[..., None]
    if keep is not None:
        fixed = torch.where(keep, fixed, 0.0)
    c = centre_of(fixed, keep)
    return (rho - c, c) if keep is None else (torch.where(keep, rho - c, 0.0), c)


def centre_of(rho: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of the memories that stand near the median of a sample: one far memory cannot move it.
    It is NaN where a memory holds what is not finite, and so is every row then.
    """
    middle = _middle(rho, keep)
    gap = rho - middle
    far = gap.square().sum(-1, keepdim=True)
    near = far <= NEAR * _middle(far, keep)
    near = near if keep is None else near & keep
    mean = torch.where(near, gap, 0.0).sum(-2, keepdim=True) / near.sum(-2, keepdim=True).clamp(1)
    return middle + mean + (rho * 0).sum(-2, keepdim=True)


def _middle(values: Tensor, keep: Tensor | None) -> Tensor:
    """Lower median over a sample of at most `SAMPLE` of the memories that take part; 0 if none
    does.
    """
    size = values.shape[-2]
    count = min(size, SAMPLE)
    places = torch.arange(count, dtype=torch.int64, device=values.device)
    if keep is None:
        return values[..., places * size // count, :].median(-2, keepdim=True).values
    alive = keep[..., 0]
    total = alive.sum(-1, keepdim=True)
    first = alive.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    chosen = first.gather(-1, torch.where(total > count, places * total // count, places))[
        ..., None
    ]
    shape = (*values.shape[:-2], count, values.shape[-1])
    sample = values.gather(-2, chosen.expand(shape))
    sample = sample.masked_fill((places >= total)[..., None], torch.inf).sort(-2).values
    middle = (total.clamp(1, count) - 1)[..., None] // 2
    lower = sample.gather(-2, middle.expand(*shape[:-2], 1, shape[-1]))
    return torch.where(total[..., None] > 0, lower, 0.0)


def first_max_(z: Tensor) -> tuple[Tensor, Tensor]:
    """(max(z, -1), index of the first maximum), both `[..., 1]`; z is scratch afterwards.

    Four vectorised passes: torch's own max over the last dim with indices is three times slower.
    Where a row has NaN the maximum is NaN and the index K.
    """
    size = z.shape[-1]
    top = z.amax(-1, keepdim=True)
    countdown = torch.arange(size, 0, -1, dtype=z.dtype, device=z.device)
    return top, (size - z.eq_(top).mul_(countdown).amax(-1, keepdim=True)).long()


# Below one vector's width torch's softmax over the last dim runs scalar, 4 to 8 times slower than
# the same in elementwise passes.
_NARROW = 16


# Weights below exp of these, of the largest of their row or column, are 0: a CPU's exp takes fifty
# times as long where it underflows. Softmax ends earlier, so that products with its weights are no
# denormal numbers either, which are as slow.
FLOOR = {torch.float32: -80.0, torch.float64: -650.0}
FLOOR_OF_SOFTMAX = {torch.float32: -60.0, torch.float64: -600.0}


def exp_(x: Tensor, low: float) -> Tensor:
    """exp(x) in place, 0 from `low` down; NaN stays."""
    if bool(x.amin() > low):  # the same bits in half the time
        return x.exp_()
    return torch.threshold_(x.clamp_(min=low).exp_(), math.exp(low) * (1 + 1e-5), 0.0)


def softmax_(z: Tensor, sharp: bool = False) -> Tensor:
    """softmax(z, -1) in place. `sharp`: many entries lie below the floor, which torch's own takes
    ten times as long for; a third slower where none does.
    """
    if z.shape[-1] >= _NARROW and not sharp:
        return torch._softmax(z, -1, False, out=z)
    z.sub_(z.amax(-1, keepdim=True))
    z = exp_(z, FLOOR_OF_SOFTMAX[z.dtype]) if sharp else z.exp_()
    return z.div_(z.sum(-1, keepdim=True))


def softmax_backward_(g: Tensor, p: Tensor) -> Tensor:
    """P * (g - sum_k(p g)) in place of g: the gradient with respect to the logits of p."""
    if g.shape[-1] >= _NARROW:
        return torch._softmax_backward_data(g, p, -1, g.dtype, grad_input=g)
    g.mul_(p)
    return g.addcmul_(p, g.sum(-1, keepdim=True), value=-1)
