# SPDX-License-Identifier: Apache-2.0
"""One Sinkhorn problem in row chunks: one read and one exponential an entry and iteration, and the
way back through its half-steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.chunk import row_chunks
from ..common.score import FLOOR, FLOOR_OF_SOFTMAX, exp_, softmax_

# What became of a problem; NOT_CONVERGED is for callers that go on to a tolerance.
FINE, NOT_CONVERGED, NOT_FINITE, INFEASIBLE, EMPTY = range(5)
# Entries of a tile of rows, and least rows of one.
TILE_ENTRIES, MIN_ROWS = 1 << 18, 16
# Rows of a sum in the dtype of the tiles.
RUN = 256
# A column's mass below this share of all has lost digits: its logarithm is taken anew.
LEAST = 2.0**-90
# A row whose largest logit, potential added, is beyond this has lost more than 2^-16 in float32.
FAR = 256.0
# A potential above this has lost more than 2^-19 in float32; in gradients, where differences of
# weights are left, and in passes on the way to a tolerance, 2^-24.
LARGE, LARGE_OF_GRADIENTS = 32.0, 1.0


def half_steps(n_iter: int, prototype_first: bool, warm: bool) -> list[str]:
    """The sides that are made exact, in order; f starts at 0, g at 0 or where the caller says."""
    if n_iter == 0:
        return ["row"]
    steps = (["column", "row"] if prototype_first else ["row", "column"]) * n_iter
    return ["row", *steps] if prototype_first and warm else steps


class Scores(NamedTuple):
    """Scores [N, K] in memory; logits are their multiple."""

    x: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    def raw(self, part: slice, out: Tensor) -> Tensor:
        """Some rows of the scores, which may be those in memory; `out` has their shape and the
        compute dtype.
        """
        return self.x[part].to(out.dtype)


class Features(NamedTuple):
    """Scores z @ prototypes^T, which every tile computes anew; logits are their multiple."""

    z: Tensor
    prototypes: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.z.shape[0], self.prototypes.shape[0]

    def raw(self, part: slice, out: Tensor) -> Tensor:
        """Some rows of the scores, in `out`."""
        return torch.mm(self.z[part].to(out.dtype), self.prototypes.to(out.dtype).mT, out=out)


class HalfStep(NamedTuple):
    """One side made exact: `used` is the other side's potential, `found` its own."""

    side: str
    used: Tensor
    found: Tensor


def parts(potential: Tensor, dtype: torch.dtype, large: float = LARGE) -> list[Tensor]:
    """A potential as a sum of values of a dtype: large ones cancel large logits, and their own
    rounding would be a common factor of a whole row or column.
    """
    high = potential.to(dtype)
    size = high.abs()
    if dtype == torch.float64 or not bool((size[size.isfinite()] > large).any()):
        return [high]
    low = torch.where(high.isfinite(), potential - high.double(), 0.0)
    return [high, low.to(dtype)]


def _size(potential: Tensor) -> float:
    size = potential.abs()
    return float(torch.where(size.isfinite(), size, 0.0).amax()) if len(size) else 0.0


def add(x: Tensor, potential: list[Tensor]) -> Tensor:
    """The logits with a potential added, in place."""
    for part in potential:
        x.add_(part)
    return x


def weighed(weight: Tensor, p: Tensor) -> Tensor:
    """The product weight @ p in float64 but for runs of rows: a tolerance would end at the rounding
    of one long float32 sum.
    """
    whole = len(p) - len(p) % RUN
    runs = torch.bmm(weight[:whole].view(-1, 1, RUN), p[:whole].view(-1, RUN, p.shape[1]))
    return runs.double().sum((0, 1)) + (weight[whole:] @ p[whole:]).double()


class Problem:
    """One problem. Potentials and masses are float64, tiles of the compute dtype. A bias is no part
    of the tiles: it is added to the potentials of the columns, in float64.
    """

    def __init__(
        self,
        entries: Scores | Features,
        log_a: Tensor,
        log_b: Tensor,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        covered: bool = True,
    ) -> None:
        self.entries, self.dtype, self.covered = entries, dtype, covered
        self.bias = None if bias is None else bias.double()
        self.n, self.k = entries.shape
        self.log_a, self.log_b = log_a.double(), log_b.double()
        self.dead_row, self.dead_col = self.log_a == -torch.inf, self.log_b == -torch.inf
        self.some_dead = bool(self.dead_row.any() | self.dead_col.any())
        self.b = self.log_b.exp()
        # masses of the rows over the largest
        alive = not bool(self.dead_row.all())
        self.top = self.log_a.max() if alive else self.log_a.new_zeros(())
        self.a = (self.log_a - self.top).exp().to(dtype)
        self.least = LEAST * self.a.double().sum()
        self.status = FINE
        self.scratch: Tensor | None = None

    def tiles(self) -> list[slice]:
        return list(row_chunks(self.n, max(MIN_ROWS, TILE_ENTRIES // self.k)))

    def tile(self, part: slice, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        """Some rows of the logits, 0 where a marginal is; in scratch if there is any. Base is
        subtracted from the scores of each row.
        """
        if out is None:
            out = self.log_b.new_empty((part.stop - part.start, self.k), dtype=self.dtype)
        x = self.entries.raw(part, out)
        if base is not None:
            x = torch.sub(x, base[:, None], out=out)
        x = torch.mul(x, self.entries.scale, out=out)
        if self.some_dead:
            x.masked_fill_(self.dead_row[part, None], 0.0).masked_fill_(self.dead_col, 0.0)
        return x

    def shifted(self, part: slice, potential: list[Tensor], base: Tensor | None = None) -> Tensor:
        """Some rows of the logits with a potential added, until the next are asked for."""
        if self.scratch is None:  # a tile of its own each time would be new pages each time
            most = max(part.stop - part.start for part in self.tiles())
            self.scratch = self.log_b.new_empty((most, self.k), dtype=self.dtype)
        out = self.scratch[: part.stop - part.start]
        if self.some_dead or self.entries.scale != 1 or base is not None:
            return add(self.tile(part, out, base), potential)  # rounded alike in all steps
        x = self.entries.raw(part, out)
        return add(torch.add(x, potential[0], out=out), potential[1:])

    def raw(self, part: slice) -> Tensor:
        """Some rows of the scores, 0 where they are not finite."""
        out = self.log_b.new_empty((part.stop - part.start, self.k), dtype=self.dtype)
        x = self.entries.raw(part, out)
        return torch.where(x.isfinite(), x, 0.0)

    def biased(self, g: Tensor) -> Tensor:
        """A potential of the columns with the bias added, -inf where it was."""
        return g if self.bias is None else torch.where(g == -torch.inf, g, g + self.bias)

    def summed(self, part: slice, shift: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits of some rows with a potential added, their largest, base): a row whose largest is
        FAR has its base subtracted from the scores before, which leaves digits for the others.
        """
        x = self.shifted(part, shift)
        top = x.amax(1)
        far = top.isfinite() & (top.abs() > FAR)
        if self.dtype == torch.float64 or not bool(far.any()):
            return x, top, None
        base = torch.where(far, top / self.entries.scale, 0.0)
        x = self.shifted(part, shift, base)
        return x, x.amax(1), base

    def near(self, f: Tensor) -> tuple[Tensor, Tensor | None]:
        """(potentials of some rows, base): where one is FAR, what the base of its row leaves."""
        far = f.isfinite() & (f.abs() > FAR)
        if self.dtype == torch.float64 or not bool(far.any()):
            return f, None
        base = torch.where(far, f / -self.entries.scale, 0.0).to(self.dtype)
        return f + base.double() * self.entries.scale, base

    def rows(self, g: Tensor, large: float = LARGE) -> tuple[Tensor, Tensor]:
        """(f, mass of every column over exp(top)) after the rows' step at g, in one pass."""
        f, mass = torch.empty_like(self.log_a), torch.zeros_like(self.log_b)
        shift = parts(self.biased(g), self.dtype, large)
        for part in self.tiles():
            x, top, base = self.summed(part, shift)
            p = exp_(x.sub_(top[:, None]), FLOOR[self.dtype])
            total = p.sum(1)
            f[part] = self.log_a[part] - top.double() - total.double().log()
            if base is not None:
                f[part] -= base.double() * self.entries.scale
            mass += weighed(self.a[part] / total, p)
        lost = not bool(mass.isfinite().all())
        if lost or bool(((mass == 0) & ~self.dead_col).any()):
            self.status = self.diagnosis() or (NOT_FINITE if lost else FINE)
        return torch.where(self.dead_row, -torch.inf, f), mass

    def columns(self, f: Tensor) -> Tensor:
        """Logarithm of sum_i exp(logits + f) of every column, by a running maximum."""
        top = torch.full_like(self.log_b, -torch.inf)
        total = torch.zeros_like(self.log_b)
        for part in self.tiles():
            x = self.shifted(part, parts(f[part, None], self.dtype))
            new = torch.maximum(top, x.amax(0).double())
            at = torch.where(new == -torch.inf, 0.0, new)
            total = (
                total * (top - at).exp()
                + exp_(x.sub_(at.to(self.dtype)), FLOOR[self.dtype]).sum(0).double()
            )
            top = new
        return self.biased(torch.where(top == -torch.inf, 0.0, top) + total.log())

    def step_columns(self, f: Tensor) -> Tensor:
        """The columns' step from f, exactly."""
        found = self.columns(f)
        if not bool(found[~self.dead_col].isfinite().all()):
            self.status = self.diagnosis() or NOT_FINITE
        return self.put(self.log_b - found)

    def next_columns(self, g: Tensor, f: Tensor, mass: Tensor) -> Tensor:
        """The columns' step after the rows' at g, from its masses alone."""
        moved = g + self.log_b - self.top - mass.log()
        if self._lost(mass):
            return torch.where(mass < self.least, self.step_columns(f), self.put(moved))
        return self.put(moved)

    def _lost(self, mass: Tensor) -> bool:
        return bool(((mass < self.least) & ~self.dead_col).any())

    def one_pass(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """(f, logarithm of every column's mass) after the rows' step at g; rows of any mass."""
        f, mass = self.rows(self.put(g), LARGE_OF_GRADIENTS)
        if self.status == FINE and self._lost(mass):
            exact = self.put(g) + self.columns(f)
            return f, torch.where(mass < self.least, exact, mass.log() + self.top)
        return f, mass.log() + self.top

    def put(self, g: Tensor) -> Tensor:
        return torch.where(self.dead_col, -torch.inf, g)

    def solve(
        self,
        n_iter: int,
        init: Tensor | None,
        prototype_first: bool,
        history: list[HalfStep] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(f, g, err); stops where the problem fails. Every half-step goes to the history."""
        self.judge(init)
        g = torch.zeros_like(self.log_b) if init is None else init.double()
        g, f = self.put(g), torch.where(self.dead_row, -torch.inf, 0.0).double()
        mass: Tensor | None = None
        for side in half_steps(n_iter, prototype_first, init is not None):
            if self.status != FINE:
                break
            if side == "row":
                f, mass = self.rows(g)
            else:
                g = self.step_columns(f) if mass is None else self.next_columns(g, f, mass)
            if history is not None:
                used, found = (g, f) if side == "row" else (f, g)
                history.append(HalfStep(side, used, found))
        return f, g, self._error(f, g, mass, prototype_first or n_iter == 0)

    def diagnosis(self) -> int:
        """Whether the logits are finite enough, and every row and column has an open entry."""
        open_column = torch.zeros_like(self.dead_col)
        shut = self.dead_col if self.bias is None else self.dead_col | (self.bias == -torch.inf)
        stuck = False
        for part in self.tiles():
            x = self.tile(part)
            if bool((x.isnan() | (x == torch.inf)).any()):
                return NOT_FINITE
            some = (x > -torch.inf) & ~self.dead_row[part, None] & ~shut
            stuck |= bool((~some.any(1) & ~self.dead_row[part]).any())
            open_column |= some.any(0)
        stuck |= self.covered and bool((~open_column & ~self.dead_col).any())
        return INFEASIBLE if stuck else FINE

    def judge(self, init: Tensor | None) -> None:
        """Status of the marginals and the start."""
        started = [v.double() for v in (init, self.bias) if v is not None]
        vectors = [self.log_a, self.log_b, *(torch.where(self.dead_col, 0.0, v) for v in started)]
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
            return (mass * self.top.exp() - self.b).abs().sum()
        exact, _ = self.rows(g)
        # of the f that is returned, which has lost digits where it is large
        gap = torch.where(self.dead_row, 0.0, f.to(self.dtype).double() - exact)
        return (torch.expm1(gap).abs() * self.log_a.exp()).sum()


class Backward:
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
        """Softmax weights of a half-step for some rows, along each row or down each column, until
        the next are asked for.
        """
        problem = self.problem
        dtype = problem.dtype
        if step.side == "row":
            used = parts(problem.biased(step.used), dtype, LARGE_OF_GRADIENTS)
            return softmax_(problem.summed(part, used)[0], sharp=True)
        down = torch.where(problem.dead_col, -torch.inf, problem.biased(step.found - problem.log_b))
        across, base = problem.near(step.used[part])
        # the larger first: it is what cancels large logits
        first, second = sorted((down, across[:, None]), key=_size, reverse=True)
        x = problem.shifted(part, parts(first, dtype, LARGE_OF_GRADIENTS), base)
        return exp_(add(x, parts(second, dtype, LARGE_OF_GRADIENTS)), FLOOR_OF_SOFTMAX[dtype])

    def tile(self, part: slice) -> Tensor:
        """Gradient of some rows of the logits."""
        problem = self.problem
        total = problem.log_b.new_zeros((part.stop - part.start, problem.k), dtype=problem.dtype)
        for step, adjoint in self.weighed:
            weight = adjoint[part, None] if step.side == "row" else adjoint
            total.addcmul_(self.share(step, part), weight.to(total.dtype), value=-1)
        live = ~(problem.dead_row[part, None] | problem.dead_col)
        return total.mul_(live) if problem.some_dead else total
