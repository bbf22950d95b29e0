# SPDX-License-Identifier: Apache-2.0
"""The gradients of deep embedded clustering on a CPU, written by hand: row chunks, in place, never
N x K.

With g_i the gradient of l_i, P_i = sum_j p_ij and y_ij the scaled distance of `Distances`:

    m_ij    = (p_ij - P_i q_ij) / (1 + y_ij),   a_i = g_i (alpha + 1) / (alpha + min_j d2_ij)
    dz_i    =  a_i (z_i sum_j m_ij - sum_j m_ij mu_j)
    dmu_j   =  mu_j sum_i a_i m_ij - sum_i a_i m_ij z_i
    dalpha  =  sum_ij g_i (P_i q_ij - p_ij) ds_ij/dalpha

All sums are float64 products of values less the centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.chunk import GradientSum, add_batch_dims
from .distances import Distances
from .equations import Alpha
from .forward import LossCall, LossChunk, LossProblem, filled

# Below SMALL the code computes `log1p(x) - x / (1 + x)` as a series of TERMS terms.
SMALL, TERMS = 0.01, 8


def gradient_sums(call: LossCall, needs: Sequence[bool]) -> list[GradientSum | None]:
    """One sum for each of z, mu and alpha that needs a gradient."""
    sums: list[GradientSum | None] = [None] * 3
    for i, (x, core) in enumerate(call.operands[:3]):
        if needs[i] and x is not None:
            is_shared = x.shape[: max(x.ndim - core, 0)].numel() < call.batch.numel()
            dtype = torch.float64 if is_shared or i > 0 else x.dtype
            sums[i] = GradientSum(x, add_batch_dims(x, len(call.batch), core), dtype)
    return sums


def gradient_results(
    call: LossCall, needs: Sequence[bool], sums: Sequence[GradientSum | None]
) -> tuple[Tensor, ...]:
    """One gradient for each tensor argument: zeros for those that only change p."""
    gradients = []
    for i, (x, _) in enumerate(call.operands):
        total = sums[i] if i < 3 else None
        if total is not None:
            gradients.append(total.result())
        elif needs[i] and x is not None:
            gradients.append(torch.zeros(x.shape, dtype=x.dtype, device=x.device))
        else:
            gradients.append(call.z.new_empty(0))
    return tuple(gradients)


class ProblemGradients:
    """The gradients of one problem, chunk after chunk; `parts` are its views of z, mu, alpha."""

    def __init__(self, one: LossProblem, parts: Sequence[Tensor | None], grad: Tensor) -> None:
        d = one.now
        self.d, self.grad = d, grad
        self.z, self.mu, self.alpha = parts
        ones = d.mu.new_ones(d.size, 1)
        self.factor = torch.cat([d.centred, ones], 1).mT.contiguous()  # [D + 1, K]
        self.sums = d.mu.new_zeros(d.size, d.features + 1)  # of a_i m_ij (z_i, 1)

    def add(self, c: LossChunk) -> None:
        """Add the gradients of one chunk."""
        d, (r, _, stretch) = self.d, c.ratios
        g = filled(self.grad, c.part, r.shape[1], self.sums)  # [rows]
        upstream = g
        if c.irregular is not None:
            g = torch.where(c.irregular, 0.0, g)
        # [K, rows], p - P q
        gap = torch.addcmul(c.target.p, r, (c.target.total / c.total).expand_as(r), value=-1)
        if self.alpha is not None and not d.is_gaussian:
            self.alpha += (slopes(d, r.shape[1]).mul_(gap).sum(0) * -g).sum()
        if stretch is not None:
            gap.mul_(r)
        elif not d.is_gaussian:
            gap.mul_(damping(d, gap))
        m = d.wide_tile(r.shape[1]).copy_(gap)
        a = g / d.scale if d.is_gaussian else g * (d.alpha + 1) / d.scale
        if self.mu is not None:
            lines = torch.cat([d.points * a, a[None]])  # [D + 1, rows]
            self.sums.addmm_(m, lines.mT)
        if self.z is not None:
            self._add_rows(c, m, a, upstream)

    def _add_rows(self, c: LossChunk, m: Tensor, a: Tensor, upstream: Tensor) -> None:
        """Add dz of one chunk; NaN for a row that is not finite and has a gradient."""
        d, n = self.d, c.part.stop - c.part.start
        assert self.z is not None
        products = self.factor @ m  # [D + 1, rows]
        products = (d.points * products[-1]).sub_(products[:-1]).mul_(a)
        if c.irregular is not None:
            products[:, c.irregular & (upstream != 0)] = torch.nan
        rows = self.z[c.part]
        rows += products[:, :n].mT.to(rows.dtype)

    def add_one_centroid(self, one: LossProblem) -> None:
        """The gradients for K = 1: 0, and NaN in dz of a row that is not finite."""
        if self.z is not None:
            has_value = one.regular() | (self.grad == 0)
            self.z += torch.where(has_value, 0.0, torch.nan).to(self.z.dtype)[:, None]

    def finish(self) -> None:
        """Add dmu."""
        if self.mu is not None:
            self.mu += self.d.centred * self.sums[:, -1:] - self.sums[:, :-1]


def damping(d: Distances, like: Tensor) -> Tensor:
    """`1 / (1 + y) = g_i / (alpha + d2)`, [K, rows] in the dtype of `like`."""
    far = d.wide_tile(like.shape[1]).clamp(min=0.0)
    return far.add_(d.alpha).reciprocal_().mul_(d.scale).to(like.dtype)


def slopes(d: Distances, width: int) -> Tensor:
    """ds_ij/dalpha less that of the nearest centroid, [K, rows] in float64.

    `ds/dalpha = -1/2 (log1p(x) - x/(1 + x)) + x/(1 + x)/(2 alpha)` with x = d2 / alpha.
    """
    x = d.wide_tile(width).clamp(min=0.0).div_(d.alpha)  # [K, rows]
    return _slope(x, d.alpha).sub_(_slope(d.nearest / d.alpha, d.alpha))


def _slope(x: Tensor, alpha: float) -> Tensor:
    share = x / (1 + x)
    series = torch.zeros_like(x)
    for n in range(TERMS, 1, -1):  # sum_n (-1)^n (n - 1)/n x^n, by Horner's rule
        series = series.mul_(x).add_((n - 1) / n * (-1) ** n)
    series.mul_(x).mul_(x)
    excess = torch.where(x < SMALL, series, torch.log1p(x) - share)
    return share.div_(2 * alpha).sub_(excess, alpha=0.5)


def dec_losses_backward(
    grad: Tensor,
    z: Tensor,
    mu: Tensor,
    alpha: Alpha,
    weight: Tensor | None,
    log_counts: Tensor | None,
    z0: Tensor | None,
    mu0: Tensor | None,
    alpha0: float,
    log_norm: Tensor | None,
    p: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, mu, alpha, weight, log_counts, z0, mu0, log_norm, p); only the first three
    are not zero.
    """
    call = LossCall(z, mu, alpha, weight, log_counts, z0, mu0, alpha0, log_norm, p)
    sums = gradient_sums(call, needs)
    if not any(total is not None for total in sums):
        return gradient_results(call, needs, sums)
    grads = grad.expand(*call.batch, call.rows)
    for at, one in call.problems():
        parts = [None if total is None else total.of_problem(at) for total in sums]
        if one.is_void:
            _spread_nan(parts)
            continue
        gradients = ProblemGradients(one, parts, grads[at])
        if call.size == 1:
            gradients.add_one_centroid(one)
            continue
        for chunk in one.chunks():
            gradients.add(chunk)
        gradients.finish()
    return gradient_results(call, needs, sums)


def _spread_nan(parts: Sequence[Tensor | None]) -> None:
    """Make each gradient of a problem NaN, because its centroids are not finite."""
    for part in parts:
        if part is not None:
            part += torch.nan
