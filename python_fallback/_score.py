# SPDX-License-Identifier: Apache-2.0
"""Scores shared by the families, each with one numeric recipe, and the dtype everything is
computed in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def alive_memories(log_weights: Tensor | None) -> Tensor | None:
    """Which memories take part ([..., K], bool): those with log_weight > -inf; None means all."""
    return None if log_weights is None else torch.atleast_1d(log_weights) != -torch.inf


def centred(rho: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(rho - c, c)` with c `[..., 1, D]` the mean of the memories that take part, the others set
    to 0.

    Distances, the step and all gradients do not change under a shift, so c carries no gradient; it
    is what keeps the expanded distance exact for data far from the origin.
    """
    fixed = rho.detach()
    if alive is None:
        c = fixed.mean(-2, keepdim=True)
        return rho - c, c
    keep = alive.expand(*alive.shape[:-1], rho.shape[-2])[..., None]
    c = torch.where(keep, fixed, 0.0).sum(-2, keepdim=True) / keep.sum(-2, keepdim=True).clamp(
        min=1
    )
    return torch.where(keep, rho - c, 0.0), c


def sqdist(x: Tensor, y: Tensor) -> Tensor:
    """`|x_n - y_k|^2` in expanded form, `[..., N, K]`; centre x and y first."""
    norms = y.square().sum(-1)[..., None, :] - 2 * (x @ y.mT)
    return x.square().sum(-1, keepdim=True) + norms


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
