# SPDX-License-Identifier: Apache-2.0
"""The equations of Sinkhorn scaling in plain torch, by logsumexp over N x K arrays.
docs/ops/sinkhorn.md has them.

A fixed number of iterations, each a step for the prototypes (columns, g) and one for the rows (f);
a step makes its side exact. Rows and columns of marginal 0 take no part, whatever they hold.
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
    """The equations of `clam_kernels.ops.sinkhorn.sinkhorn_potentials`, by `torch.logsumexp`."""
    x = _logits(logits, log_row, log_col, bias, scale)
    log_a, log_b, g = _operands(x, log_row, log_col, init)
    dead_row, dead_col = (m.detach() == -torch.inf for m in (log_a, log_b))
    x = torch.where(dead_row[..., None] | dead_col[..., None, :], 0.0, x)
    status = _status(x, log_a, log_b, g, dead_row, dead_col)
    x = torch.where((status > FINE)[..., None, None], 0.0, x)
    f = torch.where(dead_row, -torch.inf, 0.0).to(x.dtype)
    g = torch.where(dead_col, -torch.inf, g)
    for side in half_steps(n_iter, prototype_first, init is not None):
        if side == "row":
            f = torch.where(dead_row, -torch.inf, log_a - _logsumexp(x + g[..., None, :], -1))
        else:
            g = torch.where(dead_col, -torch.inf, log_b - _logsumexp(x + f[..., None], -2))
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
    """The equations of `clam_kernels.ops.sinkhorn.sinkhorn_pass`, by logsumexp over arrays."""
    x = _logits(logits, log_row, g, bias, scale)
    log_a, _, g = _operands(x, log_row, None, g)
    dead_row, dead_col = (m.detach() == -torch.inf for m in (log_a, g))
    x = torch.where(dead_row[..., None] | dead_col[..., None, :], 0.0, x)
    masses = torch.where(dead_col, -torch.inf, 0.0).to(x.dtype)
    status = _status(x, log_a, masses, g, dead_row, dead_col, covered=False)
    x = torch.where((status > FINE)[..., None, None], 0.0, x)
    f = torch.where(dead_row, -torch.inf, log_a - _logsumexp(x + g[..., None, :], -1))
    log_mass = torch.where(dead_col, -torch.inf, g + _logsumexp(x + f[..., None], -2))
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
    """Scores; of what a vector of rows or columns has at -inf, 0, and no gradient."""
    wide = compute_dtype(z)
    return _alive(z.to(wide), rows) @ _alive(prototypes.to(wide), columns).mT


def _logits(
    scores: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """Scores times the scale, plus the bias. What takes no part gives no gradient, and a score that
    is not finite gives the scale none: 0 times infinity would be NaN.
    """
    x = _alive(_alive(scores.to(compute_dtype(scores)), rows).mT, columns).mT
    if scale is not None:
        finite = x.isfinite()
        times = scale.to(x.dtype)[..., None, None]
        x = torch.where(finite, torch.where(finite, x, 0.0) * times, x)
    return x if bias is None else x + bias.to(x.dtype)[..., None, :]


def _alive(x: Tensor, vector: Tensor | None) -> Tensor:
    return x if vector is None else torch.where((vector == -torch.inf)[..., None], 0.0, x)


def _operands(
    x: Tensor, log_row: Tensor | None, log_col: Tensor | None, init: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log a [..., N], log b [..., K], g [..., K]), uniform and 0 unless given, of one batch."""
    n, k = x.shape[-2:]
    log_a = x.new_full((n,), 1 / max(n, 1)).log() if log_row is None else log_row
    log_b = x.new_full((k,), 1 / k).log() if log_col is None else log_col
    g = x.new_zeros(k) if init is None else init
    batch = broadcast_shapes(x.shape[:-2], *(vector.shape[:-1] for vector in (log_a, log_b, g)))
    wide = (vector.to(x.dtype) for vector in (log_a, log_b, g))
    log_a, log_b, g = (vector.expand(*batch, vector.shape[-1]) for vector in wide)
    return log_a, log_b, g


def _status(
    x: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    g: Tensor,
    dead_row: Tensor,
    dead_col: Tensor,
    covered: bool = True,
) -> Tensor:
    """What is wrong with each problem; x is 0 where a marginal is. `covered`: a column without an
    open row is wrong.
    """
    x, log_a, log_b, g = (t.detach() for t in (x, log_a, log_b, g))
    bad = (x.isnan() | (x == torch.inf)).any(-1).any(-1)
    for vector in (log_a, log_b, torch.where(dead_col, 0.0, g)):
        bad = bad | (vector.isnan() | (vector == torch.inf)).any(-1)
    open_ = (x > -torch.inf) & ~dead_row[..., None] & ~dead_col[..., None, :]
    stuck = (~open_.any(-1) & ~dead_row).any(-1)
    if covered:
        stuck = stuck | (~open_.any(-2) & ~dead_col).any(-1)
    stuck = stuck | dead_col.all(-1)
    status = torch.where(stuck, INFEASIBLE, FINE)
    status = torch.where(bad, NOT_FINITE, status)
    return torch.where(dead_row.all(-1), EMPTY, status)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """-inf, with a gradient of 0, where all entries are."""
    top = x.detach().amax(dim, keepdim=True) if x.shape[dim] else x.new_zeros(())
    top = torch.where(top.isfinite(), top, 0.0)
    total = (x - top).exp().sum(dim, keepdim=True)
    some = total > 0
    return torch.where(some, torch.where(some, total, 1.0).log() + top, -torch.inf).squeeze(dim)
