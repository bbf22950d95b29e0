# SPDX-License-Identifier: Apache-2.0
"""Assignments q and targets p of a chunk, as tiles [K, rows], from its scaled distances.

With s_ij the score and r_ij = exp(s_ij - max_j s_ij) in (0, 1]:

    alpha = 1:    r = 1 / (1 + y)                       no logarithm, no exponential
    other alpha:  log r = -(alpha + 1)/2 log1p(y)
    alpha = inf:  log r = -y / 2
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.score import EXP_FLOOR, exp_
from .distances import Distances
from .equations import LEAST_COUNT

# Log counts that differ by less leave r^2 / f in the range of float32.
NARROW = 40.0


class Ratios(NamedTuple):
    """The ratios r of a chunk; log r and 1 + y are None if the calculation does not need them."""

    r: Tensor  # [K, rows]
    log: Tensor | None  # [K, rows]
    stretch: Tensor | None  # [K, rows]


def ratios_of(d: Distances, y: Tensor) -> Ratios:
    """The ratios r of the chunk that d loaded; y [K, rows] is scratch afterwards."""
    if d.alpha == 1.0:
        stretch = y.add_(1.0)
        return Ratios(stretch.reciprocal(), None, stretch)
    log = y.mul(-0.5) if d.is_gaussian else torch.log1p(y).mul_(-(d.alpha + 1) / 2)
    return Ratios(exp_(log.clone(), EXP_FLOOR[log.dtype]), log, None)


def largest_scores(d: Distances) -> Tensor:
    """max_j s_ij of the chunk, [rows] in float64."""
    if d.is_gaussian:
        return d.nearest * -0.5
    return torch.log1p(d.nearest / d.alpha).mul_(-(d.alpha + 1) / 2)


class LogCounts:
    """The log counts of one problem, and min f / f, which float32 represents if `is_narrow`."""

    def __init__(self, log_counts: Tensor, dtype: torch.dtype) -> None:
        wide = log_counts.double()
        self.log = wide.to(dtype)[:, None]  # [K, 1]
        least, most = (float(x) for x in torch.aminmax(wide))
        self.is_narrow = most - least < NARROW
        self.shift = least
        self.inverse = torch.exp(least - wide).to(dtype)[:, None]  # [K, 1]


def log_counts_of(counts: Tensor) -> Tensor:
    """Log f, with f at least the smallest normal number of float32."""
    return counts.clamp(min=LEAST_COUNT).log()


class TargetTile(NamedTuple):
    """The target p of a chunk, log p (or None), and the sum of p over the centroids."""

    p: Tensor  # [K, rows]
    log: Tensor | None  # [K, rows]
    total: Tensor  # [rows]


def target_of(
    d: Distances, ratios: Ratios, counts: LogCounts, log_norm: Tensor | None
) -> TargetTile:
    """`p_ij = exp(2 s_ij - log f_j - R_i)` with R_i = log_norm [rows], or so that the row sums to
    1. It does not change the ratios.
    """
    r, log, _ = ratios
    if counts.is_narrow:
        p = torch.mul(r, r).mul_(counts.inverse)
        total = p.sum(0)
        if log_norm is None:
            return TargetTile(p.mul_(total.reciprocal()), None, torch.ones_like(total))
        factor = (2 * largest_scores(d) - counts.shift - log_norm).exp_().to(p.dtype)
        return TargetTile(p.mul_(factor), None, total * factor)
    t = torch.log(r).mul_(2.0) if log is None else log * 2.0
    t.sub_(counts.log)
    if log_norm is None:
        t.sub_(t.amax(0))
        t.sub_(t.exp().sum(0).log_())
    else:
        t.add_((2 * largest_scores(d) - log_norm).to(t.dtype))
    p = exp_(t.clone(), EXP_FLOOR[t.dtype])
    return TargetTile(p, t, torch.ones_like(p[0]) if log_norm is None else p.sum(0))


def norms_of(d: Distances, ratios: Ratios, counts: LogCounts) -> Tensor:
    """`R_i = logsumexp_j(2 s_ij - log f_j)`, [rows] in float64."""
    r, log, _ = ratios
    largest = 2 * largest_scores(d)
    if counts.is_narrow:
        total = torch.mul(r, r).mul_(counts.inverse).sum(0).double()
        return total.log_().add_(largest).sub_(counts.shift)
    t = torch.log(r).mul_(2.0) if log is None else log * 2.0
    t.sub_(counts.log)
    top = t.amax(0)
    return t.sub_(top).exp_().sum(0).double().log_().add_(top).add_(largest)


def log_of(x: Tensor) -> Tensor:
    """log(x), finite where x is 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log_()


def divergence(ratios: Ratios, total: Tensor, target: TargetTile) -> Tensor:
    """`sum_j p_ij (log p_ij - log q_ij)`, [rows]; `total` is sum_j r_ij. Ratios and target are
    scratch afterwards.
    """
    p, log_p, _ = target
    if ratios.log is None and log_p is None and ratios.stretch is not None:
        u = log_of(torch.mul(p, ratios.stretch).mul_(total))
        return u.mul_(p).sum(0)
    log_q = torch.log(ratios.r) if ratios.log is None else ratios.log
    u = torch.sub(log_of(p) if log_p is None else log_p, log_q)
    return u.add_(total.log()).mul_(p).sum(0)


def exact_alpha(alpha: float | Tensor) -> float:
    """Alpha as a number: NaN for a tensor with the value inf, whose gradient has no value."""
    value = float(alpha)
    return math.nan if isinstance(alpha, Tensor) and math.isinf(value) else value
