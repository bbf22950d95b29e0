# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling in the log domain: potentials f, g that give exp(logits + f + g) its row and
column sums. Equations: docs/ops/sinkhorn.md.

A fixed number of iterations, each a step for the prototypes (columns, g) and one for the rows (f);
a step makes its side exact. Rows and columns of marginal 0 take no part, whatever they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._chunk import row_chunks
from ._score import compute_dtype, softmax_
from .kmeans import problems

# What became of a problem; NOT_CONVERGED is for callers that go on to a tolerance.
FINE, NOT_CONVERGED, NOT_FINITE, INFEASIBLE, EMPTY = range(5)
# Entries of a tile of rows, and least rows of one.
TILE_ENTRIES, MIN_ROWS = 1 << 17, 16
# A column's mass below this has lost digits: its logarithm is taken anew.
LEAST = 2.0**-100
# A potential above this has lost more than 2^-19 in float32.
LARGE = 32.0


# ---- the equations -------------------------------------------------------------------------------


def half_steps(n_iter: int, prototype_first: bool, warm: bool) -> list[str]:
    """The sides that are made exact, in order; f starts at 0, g at 0 or where the caller says."""
    if n_iter == 0:
        return ["row"]
    steps = (["column", "row"] if prototype_first else ["row", "column"]) * n_iter
    return ["row", *steps] if prototype_first and warm else steps


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
    f, g = torch.where(dead_row, -torch.inf, 0.0), torch.where(dead_col, -torch.inf, g)
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
    wide = compute_dtype(z)
    logits = z.to(wide) @ prototypes.to(wide).mT
    if bias is not None:
        logits = logits + bias.to(wide)[..., None, :]
    return sinkhorn(logits, n_iter, log_row, log_col, init, prototype_first, precision)


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
    x: Tensor, log_a: Tensor, log_b: Tensor, g: Tensor, dead_row: Tensor, dead_col: Tensor
) -> Tensor:
    """What is wrong with each problem; x is 0 where a marginal is."""
    x, log_a, log_b, g = (t.detach() for t in (x, log_a, log_b, g))
    bad = (x.isnan() | (x == torch.inf)).any(-1).any(-1)
    for vector in (log_a, log_b, torch.where(dead_col, 0.0, g)):
        bad = bad | (vector.isnan() | (vector == torch.inf)).any(-1)
    open_ = (x > -torch.inf) & ~dead_row[..., None] & ~dead_col[..., None, :]
    stuck = (~open_.any(-1) & ~dead_row).any(-1) | (~open_.any(-2) & ~dead_col).any(-1)
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


# ---- one problem in row chunks: one read and one exponential an entry and iteration --------------


class Scores(NamedTuple):
    """Logits [N, K] as they lie in memory."""

    x: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    def tile(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some rows, to work on."""
        return self.x[part].to(dtype, copy=True, memory_format=torch.contiguous_format)


class Features(NamedTuple):
    """Logits z @ prototypes^T + bias, made anew for every tile."""

    z: Tensor
    prototypes: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.z.shape[0], self.prototypes.shape[0]

    def tile(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some rows, to work on."""
        z, c = self.z[part].to(dtype), self.prototypes.to(dtype)
        return z @ c.mT if self.bias is None else torch.addmm(self.bias.to(dtype), z, c.mT)


class HalfStep(NamedTuple):
    """One side made exact: `used` is the other side's potential, `found` its own."""

    side: str
    used: Tensor
    found: Tensor


def parts(potential: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """A potential as a sum of values of a dtype: large ones cancel large logits, and their own
    rounding would be a common factor of a whole row or column.
    """
    high = potential.to(dtype)
    size = high.abs()
    if dtype == torch.float64 or not bool((size[size.isfinite()] > LARGE).any()):
        return [high]
    low = torch.where(high.isfinite(), potential - high.double(), 0.0)
    return [high, low.to(dtype)]


def add(x: Tensor, potential: list[Tensor]) -> Tensor:
    """The logits with a potential added, in place."""
    for part in potential:
        x.add_(part)
    return x


class Problem:
    """One problem. Potentials and masses are float64, tiles of the compute dtype."""

    def __init__(
        self, entries: Scores | Features, log_a: Tensor, log_b: Tensor, dtype: torch.dtype
    ) -> None:
        self.entries, self.dtype = entries, dtype
        self.n, self.k = entries.shape
        self.log_a, self.log_b = log_a.double(), log_b.double()
        self.dead_row, self.dead_col = self.log_a == -torch.inf, self.log_b == -torch.inf
        self.some_dead = bool(self.dead_row.any() | self.dead_col.any())
        self.a, self.b = self.log_a.exp().to(dtype), self.log_b.exp()
        self.status = FINE

    def tiles(self) -> list[slice]:
        return list(row_chunks(self.n, max(MIN_ROWS, TILE_ENTRIES // self.k)))

    def tile(self, part: slice) -> Tensor:
        """Some rows of the logits, 0 where a marginal is."""
        x = self.entries.tile(part, self.dtype)
        if self.some_dead:
            x.masked_fill_(self.dead_row[part, None], 0.0).masked_fill_(self.dead_col, 0.0)
        return x

    def rows(self, g: Tensor, potential: bool = True) -> tuple[Tensor, Tensor]:
        """(f, mass of every column) after the rows' step at g, in one pass; two reductions less
        without f, which is then empty.
        """
        f, mass = torch.empty_like(self.log_a), torch.zeros_like(self.log_b)
        shift = parts(g, self.dtype)
        for part in self.tiles():
            x = add(self.tile(part), shift)
            top = x.amax(1) if potential else None
            p = softmax_(x)
            if top is not None:  # the largest weight is exp(top - lse)
                f[part] = self.log_a[part] - top.double() + p.amax(1).double().log()
            mass += self.a[part] @ p
        lost = not bool(mass.isfinite().all())
        if lost or bool(((mass == 0) & ~self.dead_col).any()):
            self.status = self.diagnosis() or (NOT_FINITE if lost else FINE)
        return torch.where(self.dead_row, -torch.inf, f) if potential else f[:0], mass

    def columns(self, f: Tensor) -> Tensor:
        """Logarithm of sum_i exp(logits + f) of every column, by a running maximum."""
        top = torch.full_like(self.log_b, -torch.inf)
        total = torch.zeros_like(self.log_b)
        for part in self.tiles():
            x = add(self.tile(part), parts(f[part, None], self.dtype))
            new = torch.maximum(top, x.amax(0).double())
            at = torch.where(new == -torch.inf, 0.0, new)
            total = total * (top - at).exp() + x.sub_(at.to(self.dtype)).exp_().sum(0).double()
            top = new
        return torch.where(top == -torch.inf, 0.0, top) + total.log()

    def step_columns(self, f: Tensor) -> Tensor:
        """The columns' step from f, exactly."""
        found = self.columns(f)
        if not bool(found[~self.dead_col].isfinite().all()):
            self.status = self.diagnosis() or NOT_FINITE
        return self._put(self.log_b - found)

    def next_columns(self, g: Tensor, f: Tensor, mass: Tensor) -> Tensor:
        """The columns' step after the rows' at g, from its masses alone."""
        moved = g + self.log_b - mass.log()
        if bool(((mass < LEAST) & ~self.dead_col).any()):
            f = f if len(f) == self.n else self.rows(g)[0]
            return torch.where(mass < LEAST, self.step_columns(f), self._put(moved))
        return self._put(moved)

    def _put(self, g: Tensor) -> Tensor:
        return torch.where(self.dead_col, -torch.inf, g)

    def solve(
        self, n_iter: int, init: Tensor | None, prototype_first: bool, history: bool = False
    ) -> tuple[list[HalfStep], Tensor]:
        """(every half-step, err); stops where the problem fails. Without a history the rows'
        potential is that of their last step alone.
        """
        self.judge(init)
        g = torch.zeros_like(self.log_b) if init is None else init.double()
        g, f = self._put(g), torch.where(self.dead_row, -torch.inf, 0.0).double()
        done: list[HalfStep] = []
        mass: Tensor | None = None
        steps = half_steps(n_iter, prototype_first, init is not None)
        for at, side in enumerate(steps):
            if self.status != FINE:
                break
            if side == "row":
                f, mass = self.rows(g, history or "row" not in steps[at + 1 :])
                done.append(HalfStep(side, g, f))
                continue
            g_new = self.step_columns(f) if mass is None else self.next_columns(g, f, mass)
            done.append(HalfStep(side, f, g_new))
            g = g_new
        return done, self._error(f, g, mass, prototype_first or n_iter == 0)

    def diagnosis(self) -> int:
        """Whether the logits are finite enough, and every row and column has an open entry."""
        open_column = torch.zeros_like(self.dead_col)
        stuck = False
        for part in self.tiles():
            x = self.tile(part)
            if bool((x.isnan() | (x == torch.inf)).any()):
                return NOT_FINITE
            some = (x > -torch.inf) & ~self.dead_row[part, None] & ~self.dead_col
            stuck |= bool((~some.any(1) & ~self.dead_row[part]).any())
            open_column |= some.any(0)
        stuck |= bool((~open_column & ~self.dead_col).any())
        return INFEASIBLE if stuck else FINE

    def judge(self, init: Tensor | None) -> None:
        """Status of the marginals and the start."""
        vectors = [self.log_a, self.log_b]
        if init is not None:
            vectors.append(torch.where(self.dead_col, 0.0, init.double()))
        if bool(self.dead_row.all()):
            self.status = EMPTY
        elif any(bool((v.isnan() | (v == torch.inf)).any()) for v in vectors):
            self.status = NOT_FINITE
        elif bool(self.dead_col.all()):
            self.status = INFEASIBLE

    def _error(self, f: Tensor, g: Tensor, mass: Tensor | None, columns: bool) -> Tensor:
        """L1 error of the side that was not made exact last."""
        if self.status != FINE or mass is None:
            return self.log_b.new_zeros(())
        if columns:
            return (mass - self.b).abs().sum()
        exact, _ = self.rows(g)
        gap = torch.where(self.dead_row, 0.0, f - exact)
        return (torch.expm1(gap).abs() * self.log_a.exp()).sum()


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
        self, form: Callable[..., Scores | Features]
    ) -> Iterator[tuple[tuple[int, ...], Problem, Tensor | None]]:
        """(place in the batch, problem, start) of each."""
        n, k = self.shape
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        even_row = like.new_full((n,), -math.log(max(n, 1)))
        even_col = like.new_full((k,), -math.log(k))
        for at, (*entries, log_a, log_b, init) in problems(self.batch, *self.operands):
            log_a = even_row if log_a is None else log_a
            log_b = even_col if log_b is None else log_b
            yield at, Problem(form(*entries), log_a, log_b, self.dtype), init

    def forward(
        self, form: Callable[..., Scores | Features], n_iter: int, prototype_first: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, k = self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        f, g = like.new_empty(*self.batch, n), like.new_empty(*self.batch, k)
        err = like.new_empty(self.batch)
        status = torch.empty(self.batch, dtype=torch.int64, device=self.device)
        for at, problem, init in self.problems(form):
            done, error = problem.solve(n_iter, init, prototype_first)
            start = torch.zeros_like(problem.log_b) if init is None else init.double()
            last = next((s.found for s in reversed(done) if s.side == "row"), problem.log_a)
            f[at] = last if len(last) == n else problem.log_a  # NaN in the end if it failed before
            g[at] = next(
                (s.found for s in reversed(done) if s.side == "column"), problem._put(start)
            )
            err[at], status[at] = error, problem.status
        return _results(f, g, err, status)

    def backward(
        self,
        form: Callable[..., Scores | Features],
        steps: tuple[int, bool],
        grads: tuple[Tensor, Tensor],
        needs: list[bool],
        add: Callable[..., None],
    ) -> tuple[Tensor, ...]:
        """Gradients of the operands that are given and needed, empty for the others. `add(back,
        part, totals)` adds those of the matrices, tile by tile.
        """
        count = self.core.count(2)
        grads = tuple(g.expand(*self.batch, g.shape[-1]) for g in grads)  # type: ignore[assignment]
        totals = [
            _Total(operand, self.batch, core, self.dtype if i < count else torch.float64)
            if operand is not None and need
            else None
            for i, ((operand, core), need) in enumerate(zip(self.operands, needs, strict=True))
        ]
        for at, problem, init in self.problems(form):
            done, _ = problem.solve(steps[0], init, steps[1], history=True)
            back = _Backward(problem, done, grads[0][at], grads[1][at])
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


class _Backward:
    """Adjoints of one problem, half-step by half-step back."""

    def __init__(self, problem: Problem, done: list[HalfStep], f: Tensor, g: Tensor) -> None:
        self.problem = problem
        self.log_a, self.log_b = torch.zeros_like(problem.log_a), torch.zeros_like(problem.log_b)
        self.f = torch.where(problem.dead_row, 0.0, f.double())
        self.g = torch.where(problem.dead_col, 0.0, g.double())
        self.columns = torch.zeros_like(problem.log_b)  # column sums of the logits' gradient
        self.weighed: list[tuple[HalfStep, Tensor]] = []
        for step in reversed(done):
            if step.side == "row":
                self._row(step)
            else:
                self._column(step)

    def _row(self, step: HalfStep) -> None:
        """Back through f = log a - lse_j(x + g)."""
        adjoint, self.f = self.f, torch.zeros_like(self.f)
        self.log_a += adjoint
        self.weighed.append((step, adjoint))
        passed = torch.zeros_like(self.g)
        for part in self.problem.tiles():
            share = self.share(step, part)
            passed += adjoint[part].to(share.dtype) @ share
        self.g -= passed
        self.columns -= passed

    def _column(self, step: HalfStep) -> None:
        adjoint, self.g = self.g, torch.zeros_like(self.g)
        self.log_b += adjoint
        self.columns -= adjoint  # its weights sum to 1 down each column
        self.weighed.append((step, adjoint))
        for part in self.problem.tiles():
            share = self.share(step, part)
            self.f[part] -= share @ adjoint.to(share.dtype)

    def stop(self) -> None:
        """No gradient: the results of a problem that failed are NaN, whatever the arguments."""
        for vector in (self.log_a, self.log_b, self.g, self.columns):
            vector.zero_()
        self.weighed = []

    def share(self, step: HalfStep, part: slice) -> Tensor:
        """Softmax weights of a half-step for some rows: along each row, or down each column."""
        problem = self.problem
        x = problem.tile(part)
        if step.side == "row":
            return softmax_(add(x, parts(step.used, x.dtype)))
        down = torch.where(problem.dead_col, -torch.inf, step.found - problem.log_b)
        across = parts(step.used[part, None], x.dtype)
        return add(add(x, parts(down, x.dtype)), across).exp_()

    def tile(self, part: slice) -> Tensor:
        """Gradient of some rows of the logits."""
        total = torch.zeros_like(self.problem.tile(part))
        for step, adjoint in self.weighed:
            weight = adjoint[part, None] if step.side == "row" else adjoint
            total.addcmul_(self.share(step, part), weight.to(total.dtype), value=-1)
        live = ~(self.problem.dead_row[part, None] | self.problem.dead_col)
        return total.mul_(live) if self.problem.some_dead else total


class _Total:
    """Gradient of one operand, summed over the batch that shares it."""

    def __init__(self, operand: Tensor, batch: torch.Size, core: int, dtype: torch.dtype) -> None:
        self.total = torch.zeros(operand.shape, dtype=dtype, device=operand.device)
        self.view = self.total.expand(*batch, *operand.shape[operand.ndim - core :])
        self.dtype = operand.dtype

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


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
    case = _Case((logits,), (logits.shape[-2], logits.shape[-1]), log_row, log_col, init)

    def add(back: _Backward, part: slice, totals: list[Tensor]) -> None:
        totals[0][part] += back.tile(part)

    return case.backward(Scores, (n_iter, prototype_first), (grad_f, grad_g), needs, add)


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

    def add(back: _Backward, part: slice, totals: list[Tensor | None]) -> None:
        slope, entries = back.tile(part), back.problem.entries
        assert isinstance(entries, Features)
        if totals[0] is not None:
            totals[0][part] += slope @ entries.prototypes.to(slope.dtype)
        if totals[1] is not None:
            totals[1] += slope.mT @ entries.z[part].to(slope.dtype)

    return case.backward(Features, (n_iter, prototype_first), (grad_f, grad_g), needs, add)
