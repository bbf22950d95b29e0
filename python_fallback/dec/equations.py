# SPDX-License-Identifier: Apache-2.0
"""The equations of deep embedded clustering in plain torch: any device, twice differentiable, from
N x K x D differences in float64. docs/ops/dec.md has them.

Shapes: z and z0 [..., N, D], mu and mu0 [..., K, D], alpha a number, [] or [..., 1], weight and
log_norm [..., N], log_counts [..., K], p [..., N or 1, K]; leading dims broadcast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import kmeans
from ..common.chunk import broadcast_shapes
from ..common.score import compute_dtype

Alpha = float | Tensor
# The smallest soft count: an assignment below it has a target below it.
LEAST_COUNT = torch.finfo(torch.float32).tiny


def batch_of(*operands: tuple[object, int]) -> torch.Size:
    """Broadcast of the leading dims of (operand, dims below them); a number has none."""
    leads = [o.shape[: max(o.ndim - core, 0)] for o, core in operands if isinstance(o, Tensor)]
    return broadcast_shapes(*leads)


def is_regular(z: Tensor) -> Tensor:
    """Which rows are finite, [..., N]."""
    return z.isfinite().all(-1)


def student_t_scores(z: Tensor, mu: Tensor, alpha: Alpha) -> Tensor:
    """`s_ij = -(alpha + 1)/2 log1p(|z_i - mu_j|^2 / alpha)`, [..., N, K] in float64; `-d2 / 2` for
    the number alpha = inf. A row that is not finite counts as 0; NaN where mu is not finite.
    """
    rows = torch.where(is_regular(z)[..., None], z, 0.0).double()
    gap = rows[..., :, None, :] - mu.double()[..., None, :, :]  # [..., N, K, D]
    far = gap.square().sum(-1) + (mu.double() * 0).sum((-2, -1))[..., None, None]
    if isinstance(alpha, Tensor):
        alpha = alpha.double()[..., None] if alpha.ndim else alpha.double()
    elif math.isinf(alpha):
        return -far / 2
    return -(alpha + 1) / 2 * torch.log1p(far / alpha)


def soft_counts(s: Tensor, regular: Tensor, weight: Tensor | None) -> Tensor:
    """`f_j = sum_i w_i q_ij` over the regular rows, [..., K]."""
    q = torch.where(regular[..., None] | s.isnan(), s.softmax(-1), 0.0)
    share = q if weight is None else q * weight.double()[..., None]
    return torch.where(regular[..., None] | s.isnan(), share, 0.0).sum(-2)


def student_t_stats(
    z: Tensor,
    mu: Tensor,
    alpha: Alpha = 1.0,
    weight: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`L_i = logsumexp_j s_ij`, the label `argmin_j d2_ij`, the soft counts f, and the number of
    rows that are not finite.
    """
    batch, regular = batch_of((z, 2), (mu, 2), (alpha, 1), (weight, 1)), is_regular(z)
    s = student_t_scores(z, mu, alpha)
    lse = torch.where(regular, s.logsumexp(-1), torch.nan)
    counts = soft_counts(s, regular, weight)
    labels = torch.where(lse.isnan(), -1, kmeans.kmeans_assign(z, mu, distances=False)[0])
    bad = (~regular).sum(-1)
    rows, k = z.shape[-2], mu.shape[-2]
    return (
        lse.to(compute_dtype(z.dtype)).expand(*batch, rows).contiguous(),
        labels.expand(*batch, rows).contiguous(),
        counts.expand(*batch, k).contiguous(),
        bad.expand(batch).contiguous(),
    )


def target_of(
    s: Tensor,
    regular: Tensor,
    weight: Tensor | None,
    log_counts: Tensor | None,
    z0: Tensor | None,
    mu0: Tensor | None,
    alpha0: float,
    log_norm: Tensor | None,
) -> Tensor:
    """`p_ij = exp(2 s_ij - log f_j - R_i)`, [..., N, K], of the frozen rows or of the scores s."""
    if z0 is not None and mu0 is not None:
        s = student_t_scores(z0, mu0, alpha0)
    if log_counts is None:
        log_counts = soft_counts(s, regular, weight).clamp(min=LEAST_COUNT).log()
    t = 2 * s - log_counts.double()[..., None, :]
    if z0 is None or log_norm is None:
        return t.softmax(-1)
    return (t - log_norm.double()[..., None]).exp()


def dec_losses(
    z: Tensor,
    mu: Tensor,
    alpha: Alpha = 1.0,
    weight: Tensor | None = None,
    log_counts: Tensor | None = None,
    z0: Tensor | None = None,
    mu0: Tensor | None = None,
    alpha0: float = 1.0,
    log_norm: Tensor | None = None,
    p: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`l_i = sum_j p_ij (log p_ij - log q_ij)`, [..., N], with p a constant."""
    regular, s = is_regular(z), student_t_scores(z, mu, alpha)
    frozen = (log_counts, z0, mu0, alpha0, log_norm)
    if p is None:
        share = target_of(s, regular, weight, *frozen).detach()
    else:
        share = p.detach().double()
        share = share if log_norm is None else share / log_norm.double()[..., None].exp()
        regular = regular & is_regular(p)
    if z0 is not None and p is None:
        regular = regular & is_regular(z0)
    if mu.shape[-2] == 1:
        share = torch.ones_like(share)
    share = torch.where(regular[..., None] | s.isnan(), share, 0.0)
    losses = (torch.xlogy(share, share) - share * s.log_softmax(-1)).sum(-1)
    void = torch.where(regular, 0.0, torch.nan).to(losses.dtype)
    losses = torch.where(regular, losses, 0.0) + void * z.double().sum(-1)
    operands = (z, 2), (mu, 2), (alpha, 1), (weight, 1), (log_counts, 1), (z0, 2), (mu0, 2)
    batch = batch_of(*operands, (log_norm, 1), (p, 2))
    return losses.to(compute_dtype(z.dtype)).expand(*batch, z.shape[-2]).contiguous()
