# SPDX-License-Identifier: Apache-2.0
"""The equations of Sinkhorn scaling in plain torch, by logsumexp over N x K arrays.
docs/ops/sinkhorn.md has them.

An iteration is a half-step of the prototypes (columns), g_j = log b_j - logsumexp_i(x_ij + f_i),
and one of the rows, f_i = log a_i - logsumexp_j(x_ij + g_j): each makes its marginal exact. Rows
and columns with marginal 0 are masked; their scores may be NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunk import broadcast_shapes
from ..common.score import compute_dtype
from .scaling import EMPTY, FINE, INFEASIBLE, NOT_FINITE, half_steps
from .scaling_batch import pass_results, results


def sinkhorn_potentials(
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(f, g, err, status) of `clam_kernels.ops.sinkhorn.sinkhorn_potentials`, over N x K arrays."""
    x = _logits(logits, log_row, log_col, bias, scale)
    log_a, log_b, g = _operands(x, log_row, log_col, init)
    masked_row, masked_col = (m.detach() == -torch.inf for m in (log_a, log_b))
    x = torch.where(masked_row[..., None] | masked_col[..., None, :], 0.0, x)
    status = _status(x, log_a, log_b, g, masked_row, masked_col)
    x = torch.where((status > FINE)[..., None, None], 0.0, x)
    f = torch.where(masked_row, -torch.inf, 0.0).to(x.dtype)
    g = torch.where(masked_col, -torch.inf, g)
    for side in half_steps(n_iter, prototype_first, init is not None):
        if side == "row":
            f = torch.where(masked_row, -torch.inf, log_a - _logsumexp(x + g[..., None, :], -1))
        else:
            g = torch.where(masked_col, -torch.inf, log_b - _logsumexp(x + f[..., None], -2))
    plan = (x + f[..., None] + g[..., None, :]).detach().exp()
    columns = prototype_first or n_iter == 0
    gap = plan.sum(-2) - log_b.detach().exp() if columns else plan.sum(-1) - log_a.detach().exp()
    return results(f, g, gap.abs().sum(-1), status)


def sinkhorn_potentials_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn_potentials` of the scores z @ prototypes^T."""
    scores = _scores(z, prototypes, log_row, log_col)
    return sinkhorn_potentials(scores, n_iter, log_row, log_col, init, prototype_first, bias, scale)


def sinkhorn_pass(
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(f, log_mass, status) of `clam_kernels.ops.sinkhorn.sinkhorn_pass`, over N x K arrays: f_i =
    log a_i - logsumexp_j(x_ij + g_j), log_mass_j = g_j + logsumexp_i(x_ij + f_i).
    """
    x = _logits(logits, log_row, g, bias, scale)
    log_a, _, g = _operands(x, log_row, None, g)
    masked_row, masked_col = (m.detach() == -torch.inf for m in (log_a, g))
    x = torch.where(masked_row[..., None] | masked_col[..., None, :], 0.0, x)
    masses = torch.where(masked_col, -torch.inf, 0.0).to(x.dtype)
    status = _status(x, log_a, masses, g, masked_row, masked_col, needs_mass=False)
    x = torch.where((status > FINE)[..., None, None], 0.0, x)
    f = torch.where(masked_row, -torch.inf, log_a - _logsumexp(x + g[..., None, :], -1))
    log_mass = torch.where(masked_col, -torch.inf, g + _logsumexp(x + f[..., None], -2))
    return pass_results(f, log_mass, status)


def sinkhorn_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_pass` of the scores z @ prototypes^T."""
    return sinkhorn_pass(_scores(z, prototypes, log_row, g), g, log_row, bias, scale)


def _scores(z: Tensor, prototypes: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Scores z @ prototypes^T; 0, without a gradient, where the vector `rows` or `columns` is
    -inf.
    """
    dtype = compute_dtype(z.dtype)
    return (
        _zero_where_masked(z.to(dtype), rows) @ _zero_where_masked(prototypes.to(dtype), columns).mT
    )


def _logits(
    scores: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """`scale * scores + bias`. Masked scores get no gradient. A score that is not finite adds
    nothing to the gradient of the scale: 0 * inf is NaN.
    """
    x = _zero_where_masked(
        _zero_where_masked(scores.to(compute_dtype(scores.dtype)), rows).mT, columns
    ).mT
    if scale is not None:
        finite = x.isfinite()
        times = scale.to(x.dtype)[..., None, None]
        x = torch.where(finite, torch.where(finite, x, 0.0) * times, x)
    return x if bias is None else x + bias.to(x.dtype)[..., None, :]


def _zero_where_masked(x: Tensor, vector: Tensor | None) -> Tensor:
    """x, 0 in the rows whose entry of `vector` is -inf."""
    return x if vector is None else torch.where((vector == -torch.inf)[..., None], 0.0, x)


def _operands(
    x: Tensor, log_row: Tensor | None, log_col: Tensor | None, init: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log a [..., N], log b [..., K], g [..., K]) with one batch shape; the defaults are uniform
    marginals and g = 0.
    """
    n, k = x.shape[-2:]
    log_a = x.new_full((n,), 1 / max(n, 1)).log() if log_row is None else log_row
    log_b = x.new_full((k,), 1 / k).log() if log_col is None else log_col
    g = x.new_zeros(k) if init is None else init
    batch = broadcast_shapes(x.shape[:-2], *(vector.shape[:-1] for vector in (log_a, log_b, g)))
    vectors = (vector.to(x.dtype) for vector in (log_a, log_b, g))
    log_a, log_b, g = (vector.expand(*batch, vector.shape[-1]) for vector in vectors)
    return log_a, log_b, g


def _status(
    x: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    g: Tensor,
    masked_row: Tensor,
    masked_col: Tensor,
    needs_mass: bool = True,
) -> Tensor:
    """The status of each problem; masked entries of x are 0. With `needs_mass`, a column without an
    entry above -inf makes a problem infeasible.
    """
    x, log_a, log_b, g = (t.detach() for t in (x, log_a, log_b, g))
    not_finite = (x.isnan() | (x == torch.inf)).any(-1).any(-1)
    for vector in (log_a, log_b, torch.where(masked_col, 0.0, g)):
        not_finite = not_finite | (vector.isnan() | (vector == torch.inf)).any(-1)
    is_open = (x > -torch.inf) & ~masked_row[..., None] & ~masked_col[..., None, :]
    is_infeasible = (~is_open.any(-1) & ~masked_row).any(-1)
    if needs_mass:
        is_infeasible = is_infeasible | (~is_open.any(-2) & ~masked_col).any(-1)
    is_infeasible = is_infeasible | masked_col.all(-1)
    status = torch.where(is_infeasible, INFEASIBLE, FINE)
    status = torch.where(not_finite, NOT_FINITE, status)
    return torch.where(masked_row.all(-1), EMPTY, status)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """The logarithm of sum exp(x); -inf, with a gradient of 0, where all entries are -inf."""
    top = x.detach().amax(dim, keepdim=True) if x.shape[dim] else x.new_zeros(())
    top = torch.where(top.isfinite(), top, 0.0)
    total = (x - top).exp().sum(dim, keepdim=True)
    has_entry = total > 0
    log = torch.where(has_entry, total, 1.0).log() + top
    return torch.where(has_entry, log, -torch.inf).squeeze(dim)
