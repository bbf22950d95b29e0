# SPDX-License-Identifier: Apache-2.0
"""Scores that several families compute, each in one way, and the dtype of all computation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The centre is a mean of memories near the median of a sample of this many. A memory is near if its
# squared distance from the median is at most NEAR_FACTOR times the median of these distances.
SAMPLE_SIZE, NEAR_FACTOR = 31, 16.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def active_memories(log_weights: Tensor | None) -> Tensor | None:
    """[..., K] bool: log_weights > -inf; None if there are no log-weights: all are active."""
    return None if log_weights is None else torch.atleast_1d(log_weights) != -torch.inf


def centre_memories(rho: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(rho - c, c)` with c `[..., 1, D]` the centre of the active memories; masked memories become
    0.

    Distances, the step and all gradients do not change under a shift, so c needs no gradient. It
    keeps the expanded distance accurate for data far from the origin.
    """
    fixed = rho.detach()
    keep = None if active is None else active.expand(*active.shape[:-1], rho.shape[-2])[..., None]
    if keep is not None:
        fixed = torch.where(keep, fixed, 0.0)
    c = centre_of(fixed, keep)
    return (rho - c, c) if keep is None else (torch.where(keep, rho - c, 0.0), c)


def centre_of(rho: Tensor, active: Tensor | None) -> Tensor:
    """`[..., 1, D]`: mean of the active memories near the median of a sample, so that one distant
    memory cannot move it; active is [..., K, 1]. NaN where a memory is not finite, so that all rows
    of that problem become NaN.
    """
    median = _sample_median(rho, active)
    gap = rho - median
    sqdist = gap.square().sum(-1, keepdim=True)
    near = sqdist <= NEAR_FACTOR * _sample_median(sqdist, active)
    near = near if active is None else near & active
    mean = torch.where(near, gap, 0.0).sum(-2, keepdim=True) / near.sum(-2, keepdim=True).clamp(1)
    return median + mean + (rho * 0).sum(-2, keepdim=True)


def _sample_median(values: Tensor, active: Tensor | None) -> Tensor:
    """`[..., 1, D]`: lower median of a sample of at most `SAMPLE_SIZE` active rows of `values`
    [..., K, D]; 0 if no row is active.
    """
    size = values.shape[-2]
    count = min(size, SAMPLE_SIZE)
    places = torch.arange(count, dtype=torch.int64, device=values.device)
    if active is None:
        return values[..., places * size // count, :].median(-2, keepdim=True).values
    mask = active[..., 0]
    total = mask.sum(-1, keepdim=True)
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    index = order.gather(-1, torch.where(total > count, places * total // count, places))
    shape = (*values.shape[:-2], count, values.shape[-1])
    sample = values.gather(-2, index[..., None].expand(shape))
    sample = sample.masked_fill((places >= total)[..., None], torch.inf).sort(-2).values
    middle = (total.clamp(1, count) - 1)[..., None] // 2
    median = sample.gather(-2, middle.expand(*shape[:-2], 1, shape[-1]))
    return torch.where(total[..., None] > 0, median, 0.0)


def first_max_(z: Tensor) -> tuple[Tensor, Tensor]:
    """(max(z, -1), index of the first maximum), both `[..., 1]`; overwrites z.

    Four vectorised passes take a third of the time of torch's max over the last dim with indices.
    For a row with NaN the maximum is NaN and the index is K.
    """
    size = z.shape[-1]
    top = z.amax(-1, keepdim=True)
    countdown = torch.arange(size, 0, -1, dtype=z.dtype, device=z.device)
    return top, (size - z.eq_(top).mul_(countdown).amax(-1, keepdim=True)).long()


# torch's softmax over a last dim narrower than one vector computes one number at a time: it takes 4
# to 8 times as long as the same computation in elementwise passes.
_NARROW = 16


# A weight whose logarithm, less that of the largest of its row or column, is below this becomes 0:
# a CPU's exp takes fifty times as long where it underflows. The floor of a softmax is higher, so
# that products with its weights are no denormal numbers either: these are as slow.
EXP_FLOOR = {torch.float32: -80.0, torch.float64: -650.0}
SOFTMAX_FLOOR = {torch.float32: -60.0, torch.float64: -600.0}


def exp_(x: Tensor, floor: float) -> Tensor:
    """exp(x) in place, 0 where x <= floor; NaN stays."""
    if bool(x.amin() > floor):  # the same bits in half the time
        return x.exp_()
    return torch.threshold_(x.clamp_(min=floor).exp_(), math.exp(floor) * (1 + 1e-5), 0.0)


def softmax_(z: Tensor, underflows: bool = False) -> Tensor:
    """softmax(z, -1) in place. `underflows` says that many logits are below the floor: torch's
    softmax then takes ten times as long. Where none is, `underflows` costs a third more.
    """
    if z.shape[-1] >= _NARROW and not underflows:
        return torch._softmax(z, -1, False, out=z)
    z.sub_(z.amax(-1, keepdim=True))
    z = exp_(z, SOFTMAX_FLOOR[z.dtype]) if underflows else z.exp_()
    return z.div_(z.sum(-1, keepdim=True))


def softmax_backward_(g: Tensor, p: Tensor) -> Tensor:
    """`p * (g - sum_k p_k g_k)` in place of g: the gradient of the logits, for weights p."""
    if g.shape[-1] >= _NARROW:
        return torch._softmax_backward_data(g, p, -1, g.dtype, grad_input=g)
    g.mul_(p)
    return g.addcmul_(p, g.sum(-1, keepdim=True), value=-1)
