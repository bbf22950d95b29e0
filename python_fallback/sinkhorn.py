# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling in the log domain: potentials f, g that give exp(logits + f + g) its row and
column sums. Equations: docs/ops/sinkhorn.md.

A fixed number of iterations, each a step for the prototypes (columns, g) and one for the rows (f);
a step makes its side exact. Rows and columns of marginal 0 take no part, whatever they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._scaling import (
    EMPTY,
    FINE,
    INFEASIBLE,
    NOT_FINITE,
    Backward,
    Features,
    HalfStep,
    Problem,
    Scores,
    half_steps,
)
from ._score import compute_dtype
from .kmeans import problems

# ---- the equations -------------------------------------------------------------------------------


def sinkhorn(
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The equations of `clam_kernels.ops.sinkhorn.sinkhorn`, by logsumexp over N x K arrays."""
    x = logits.to(compute_dtype(logits))
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
    return _results(f, g, gap.abs().sum(-1), status)


def sinkhorn_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn` of z @ prototypes^T + bias."""
    logits = _logits(z, prototypes, bias, log_row, log_col)
    return sinkhorn(logits, n_iter, log_row, log_col, init, prototype_first, precision)


def sinkhorn_pass(
    logits: Tensor, g: Tensor, log_row: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of `clam_kernels.ops.sinkhorn.sinkhorn_pass`, by logsumexp over arrays."""
    x = logits.to(compute_dtype(logits))
    log_a, _, g = _operands(x, log_row, None, g)
    dead_row, dead_col = (m.detach() == -torch.inf for m in (log_a, g))
    x = torch.where(dead_row[..., None] | dead_col[..., None, :], 0.0, x)
    masses = torch.where(dead_col, -torch.inf, 0.0).to(x.dtype)
    status = _status(x, log_a, masses, g, dead_row, dead_col, covered=False)
    x = torch.where((status > FINE)[..., None, None], 0.0, x)
    f = torch.where(dead_row, -torch.inf, log_a - _logsumexp(x + g[..., None, :], -1))
    log_mass = torch.where(dead_col, -torch.inf, g + _logsumexp(x + f[..., None], -2))
    return _pass_results(f, log_mass, status)


def sinkhorn_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_pass` of z @ prototypes^T + bias."""
    return sinkhorn_pass(_logits(z, prototypes, bias, log_row, g), g, log_row, precision)


def _logits(
    z: Tensor, prototypes: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> Tensor:
    """Logits; of what a vector of rows or columns has at -inf, 0, and no gradient."""
    wide = compute_dtype(z)
    z, prototypes = _alive(z.to(wide), rows), _alive(prototypes.to(wide), columns)
    logits = z @ prototypes.mT
    return logits if bias is None else logits + bias.to(wide)[..., None, :]


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
    batch = torch.broadcast_shapes(
        x.shape[:-2], *(vector.shape[:-1] for vector in (log_a, log_b, g))
    )
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


def _results(
    f: Tensor, g: Tensor, err: Tensor, status: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NaN for problems that failed; of one without rows g is 0."""
    failed = (status == NOT_FINITE) | (status == INFEASIBLE)
    empty = status == EMPTY
    f = torch.where(empty[..., None], -torch.inf, torch.where(failed[..., None], torch.nan, f))
    g = torch.where(empty[..., None], 0.0, torch.where(failed[..., None], torch.nan, g))
    err = torch.where(empty, 0.0, torch.where(failed, torch.nan, err))
    return f, g, err, status


def _pass_results(f: Tensor, log_mass: Tensor, status: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NaN for problems that failed; of one without rows the masses are 0."""
    failed = (status == NOT_FINITE) | (status == INFEASIBLE)
    empty = (status == EMPTY)[..., None]
    f, log_mass = (torch.where(failed[..., None], torch.nan, x) for x in (f, log_mass))
    return torch.where(empty, -torch.inf, f), torch.where(empty, -torch.inf, log_mass), status


# ---- batches of problems -------------------------------------------------------------------------


def sinkhorn_forward(
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn` in row chunks."""
    n, k = logits.shape[-2:]
    case = _Case((logits,), (n, k), log_row, log_col, init)
    return case.forward(Scores, n_iter, prototype_first)


def sinkhorn_features_forward(
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn_features` in row chunks; the logits of one chunk exist at a time."""
    case = _Case((z, prototypes, bias), (z.shape[-2], prototypes.shape[-2]), log_row, log_col, init)
    return case.forward(Features, n_iter, prototype_first)


def sinkhorn_pass_forward(
    logits: Tensor, g: Tensor, log_row: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_pass` in row chunks."""
    return _Case((logits,), _shape(logits), log_row, None, g).one_pass(Scores)


def sinkhorn_features_pass_forward(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_features_pass` in row chunks; the logits of one chunk exist at a time."""
    shape = (z.shape[-2], prototypes.shape[-2])
    return _Case((z, prototypes, bias), shape, log_row, None, g).one_pass(Features)


Form = Callable[..., Scores | Features]


def _shape(logits: Tensor) -> tuple[int, int]:
    return logits.shape[-2], logits.shape[-1]


class _Case:
    """A call: operands, and the problems of its batch one after the other."""

    def __init__(
        self,
        entries: tuple[Tensor | None, ...],
        shape: tuple[int, int],
        log_row: Tensor | None,
        log_col: Tensor | None,
        init: Tensor | None,
    ) -> None:
        first = entries[0]
        assert first is not None
        self.dtype, self.device, self.shape = compute_dtype(first), first.device, shape
        self.core = (2, 2, 1)[: len(entries)]
        vectors = ((log_row, 1), (log_col, 1), (init, 1))
        self.operands = [*zip(entries, self.core, strict=True), *vectors]
        leads = [o.shape[: o.ndim - core] for o, core in self.operands if o is not None]
        self.batch = torch.broadcast_shapes(*leads)

    def problems(
        self, form: Form, covered: bool = True
    ) -> Iterator[tuple[tuple[int, ...], Problem, Tensor | None]]:
        """(place in the batch, problem, start) of each. Of one that need not be `covered` a column
        has any mass, and takes part where its start is above -inf.
        """
        n, k = self.shape
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        even_row = like.new_full((n,), -math.log(max(n, 1)))
        even_col = like.new_full((k,), -math.log(k))
        for at, (*entries, log_a, log_b, init) in problems(self.batch, *self.operands):
            log_a = even_row if log_a is None else log_a
            log_b = even_col if log_b is None else log_b
            if not covered:
                log_b = torch.where(init == -torch.inf, init, 0.0)
            yield at, Problem(form(*entries), log_a, log_b, self.dtype, covered), init

    def forward(
        self, form: Form, n_iter: int, prototype_first: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, k = self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        f, g = like.new_empty(*self.batch, n), like.new_empty(*self.batch, k)
        err = like.new_empty(self.batch)
        status = torch.empty(self.batch, dtype=torch.int64, device=self.device)
        for at, problem, init in self.problems(form):
            f[at], g[at], err[at] = problem.solve(n_iter, init, prototype_first)
            status[at] = problem.status
        return _results(f, g, err, status)

    def one_pass(self, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        n, k = self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        f, log_mass = like.new_empty(*self.batch, n), like.new_empty(*self.batch, k)
        status = torch.empty(self.batch, dtype=torch.int64, device=self.device)
        for at, problem, g in self.problems(form, covered=False):
            assert g is not None
            problem.judge(g)
            if problem.status == FINE:
                f[at], log_mass[at] = problem.one_pass(g.double())
            status[at] = problem.status
        return _pass_results(f, log_mass, status)

    def backward(
        self,
        form: Form,
        back_through: Callable[..., Backward],
        grads: tuple[Tensor, Tensor],
        needs: list[bool],
        covered: bool = True,
    ) -> tuple[Tensor, ...]:
        """Gradients of the operands that are given and needed, empty for the others;
        `back_through(problem, start, *grads)` has those of one problem.
        """
        count = self.core.count(2)
        add = _add_scores if form is Scores else _add_features
        grads = tuple(g.expand(*self.batch, g.shape[-1]) for g in grads)  # type: ignore[assignment]
        totals = [
            _Total(operand, self.batch, core, self.dtype if i < count else torch.float64)
            if operand is not None and need
            else None
            for i, ((operand, core), need) in enumerate(zip(self.operands, needs, strict=True))
        ]
        for at, problem, init in self.problems(form, covered):
            back = back_through(problem, init, grads[0][at], grads[1][at])
            if problem.status != FINE:
                back.stop()
            views = [None if t is None else t.view[at] for t in totals]
            for part in problem.tiles() if any(v is not None for v in views[:count]) else ():
                add(back, part, views[:count])
            vectors = (back.columns, back.log_a, back.log_b, back.g)[count - len(views) :]
            for view, found in zip(views[count:], vectors, strict=True):
                if view is not None:
                    view += found
        first = self.operands[0][0]
        assert first is not None
        return tuple(first.new_empty(0) if t is None else t.result() for t in totals)


# ---- gradients -----------------------------------------------------------------------------------


class _Total:
    """Gradient of one operand, summed over the batch that shares it."""

    def __init__(self, operand: Tensor, batch: torch.Size, core: int, dtype: torch.dtype) -> None:
        self.total = torch.zeros(operand.shape, dtype=dtype, device=operand.device)
        self.view = self.total.expand(*batch, *operand.shape[operand.ndim - core :])
        self.dtype = operand.dtype

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


def _add_scores(back: Backward, part: slice, totals: list[Tensor | None]) -> None:
    """Add the gradients of the matrices of some rows."""
    if totals[0] is not None:
        totals[0][part] += back.tile(part)


def _add_features(back: Backward, part: slice, totals: list[Tensor | None]) -> None:
    slope, problem = back.tile(part), back.problem
    assert isinstance(problem.entries, Features)
    z, prototypes = (
        x.to(slope.dtype) for x in (problem.entries.z[part], problem.entries.prototypes)
    )
    if problem.some_dead:  # they may hold anything
        z = z.masked_fill(problem.dead_row[part, None], 0.0)
        prototypes = prototypes.masked_fill(problem.dead_col[:, None], 0.0)
    if totals[0] is not None:
        totals[0][part] += slope @ prototypes
    if totals[1] is not None:
        totals[1] += slope.mT @ z


def _through_all(n_iter: int, prototype_first: bool) -> Callable[..., Backward]:
    def back_through(problem: Problem, init: Tensor | None, f: Tensor, g: Tensor) -> Backward:
        done: list[HalfStep] = []
        problem.solve(n_iter, init, prototype_first, done)
        return Backward(problem, done, f, g)

    return back_through


def _through_pass(problem: Problem, g: Tensor, grad_f: Tensor, grad_mass: Tensor) -> Backward:
    """The masses are those that a columns' step would divide by: log_mass = g - (log 1 - lse)."""
    g, grad_mass = problem.put(g.double()), torch.where(problem.dead_col, 0.0, grad_mass.double())
    problem.judge(g)
    f, log_mass = problem.one_pass(g) if problem.status == FINE else (problem.log_a, g)
    found = torch.where(log_mass == -torch.inf, -torch.inf, g - log_mass)
    back = Backward(
        problem, [HalfStep("row", g, f), HalfStep("column", f, found)], grad_f, -grad_mass
    )
    back.g += grad_mass
    return back


def sinkhorn_backward(
    grad_f: Tensor,
    grad_g: Tensor,
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    needs: list[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (logits, log_row, log_col, init) through all iterations."""
    case = _Case((logits,), _shape(logits), log_row, log_col, init)
    through = _through_all(n_iter, prototype_first)
    return case.backward(Scores, through, (grad_f, grad_g), needs)


def sinkhorn_features_backward(
    grad_f: Tensor,
    grad_g: Tensor,
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    needs: list[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, prototypes, bias, log_row, log_col, init) through all iterations."""
    shape = (z.shape[-2], prototypes.shape[-2])
    case = _Case((z, prototypes, bias), shape, log_row, log_col, init)
    through = _through_all(n_iter, prototype_first)
    return case.backward(Features, through, (grad_f, grad_g), needs)


def sinkhorn_pass_backward(
    grad_f: Tensor,
    grad_log_mass: Tensor,
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None,
    needs: list[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (logits, g, log_row)."""
    case = _Case((logits,), _shape(logits), log_row, None, g)
    order = [needs[0], needs[2], False, needs[1]]
    grads = (grad_f, grad_log_mass)
    x, a, _, g = case.backward(Scores, _through_pass, grads, order, covered=False)
    return x, g, a


def sinkhorn_features_pass_backward(
    grad_f: Tensor,
    grad_log_mass: Tensor,
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    needs: list[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, prototypes, g, bias, log_row)."""
    shape = (z.shape[-2], prototypes.shape[-2])
    case = _Case((z, prototypes, bias), shape, log_row, None, g)
    order = [needs[0], needs[1], needs[3], needs[4], False, needs[2]]
    grads = (grad_f, grad_log_mass)
    z, c, bias, a, _, g = case.backward(Features, _through_pass, grads, order, covered=False)
    return z, c, g, bias, a
