# SPDX-License-Identifier: Apache-2.0
"""One Sinkhorn problem in row chunks, and the gradients of its half-steps. An iteration reads each
score once and computes one exponential of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.chunk import FEWEST_ROWS, TILE_ENTRIES, row_chunks
from ..common.score import EXP_FLOOR, SOFTMAX_FLOOR, exp_, softmax_

# Status of a problem. NOT_CONVERGED is for callers that iterate to a tolerance.
FINE, NOT_CONVERGED, NOT_FINITE, INFEASIBLE, EMPTY = range(5)
# Rows whose sum is computed in the dtype of the tiles.
SUM_ROWS = 256
# Where a column's mass is below this share of the total, digits are lost: `columns` computes its
# logarithm.
LEAST_SHARE = 2.0**-90
# The largest logit of a row, including the potential: beyond this, rounding exceeds 2^-16 in
# float32.
LARGE_LOGIT = 256.0
# A potential: beyond this, rounding exceeds 2^-19 in float32. Gradients are differences of weights,
# and passes iterate to a tolerance: both split a potential if its rounding exceeds 2^-24.
LARGE_POTENTIAL, LARGE_IN_GRADIENTS = 32.0, 1.0


def half_steps(n_iter: int, prototype_first: bool, has_init: bool) -> list[str]:
    """The side of each half-step, in order. f starts at 0, g at `init` or 0."""
    if n_iter == 0:
        return ["row"]
    steps = (["column", "row"] if prototype_first else ["row", "column"]) * n_iter
    return ["row", *steps] if prototype_first and has_init else steps


class Scores(NamedTuple):
    """Scores [N, K] in memory; logits are scale * scores."""

    x: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    def load(self, part: slice, out: Tensor) -> Tensor:
        """Some rows of the scores in the dtype of `out`; may be a view of the scores."""
        return self.x[part].to(out.dtype)


class Features(NamedTuple):
    """Scores z @ prototypes^T, computed for each tile; logits are scale * scores."""

    z: Tensor
    prototypes: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.z.shape[0], self.prototypes.shape[0]

    def load(self, part: slice, out: Tensor) -> Tensor:
        """Compute some rows of the scores in `out`."""
        return torch.mm(self.z[part].to(out.dtype), self.prototypes.to(out.dtype).mT, out=out)


class HalfStep(NamedTuple):
    """One half-step: the potential `own` of its side, computed from the potential `other`."""

    side: str
    other: Tensor
    own: Tensor


def split_potential(
    potential: Tensor, dtype: torch.dtype, large: float = LARGE_POTENTIAL
) -> list[Tensor]:
    """A float64 potential as a sum of tensors of a dtype, two if an entry is `large`. Large entries
    cancel large logits, and their rounding would be a factor of a whole row or column.
    """
    high = potential.to(dtype)
    size = high.abs()
    if dtype == torch.float64 or not bool((size[size.isfinite()] > large).any()):
        return [high]
    low = torch.where(high.isfinite(), potential - high.double(), 0.0)
    return [high, low.to(dtype)]


def _largest_entry(potential: Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    size = potential.abs()
    return float(torch.where(size.isfinite(), size, 0.0).amax()) if len(size) else 0.0


def add_potential_(x: Tensor, potential: list[Tensor]) -> Tensor:
    """Add a potential to the logits x, in place."""
    for part in potential:
        x.add_(part)
    return x


def weighted_sums(weight: Tensor, p: Tensor) -> Tensor:
    """`weight @ p`: sums of SUM_ROWS rows in the dtype of p, their sum in float64. One long float32
    sum would round too much for a tight tolerance.
    """
    whole = len(p) - len(p) % SUM_ROWS
    runs = torch.bmm(weight[:whole].view(-1, 1, SUM_ROWS), p[:whole].view(-1, SUM_ROWS, p.shape[1]))
    return runs.double().sum((0, 1)) + (weight[whole:] @ p[whole:]).double()


class ScalingProblem:
    """One problem. Potentials and masses are float64, tiles have the compute dtype. The bias is
    added to the column potentials in float64, not to the tiles. With `needs_mass` False a column
    may have no mass.
    """

    def __init__(
        self,
        entries: Scores | Features,
        log_a: Tensor,
        log_b: Tensor,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        needs_mass: bool = True,
    ) -> None:
        self.entries, self.dtype, self.needs_mass = entries, dtype, needs_mass
        self.bias = None if bias is None else bias.double()
        self.n, self.k = entries.shape
        self.log_a, self.log_b = log_a.double(), log_b.double()
        self.masked_row, self.masked_col = self.log_a == -torch.inf, self.log_b == -torch.inf
        self.any_masked = bool(self.masked_row.any() | self.masked_col.any())
        self.b = self.log_b.exp()
        # masses of the rows, relative to the largest
        has_rows = not bool(self.masked_row.all())
        self.log_a_max = self.log_a.max() if has_rows else self.log_a.new_zeros(())
        self.a = (self.log_a - self.log_a_max).exp().to(dtype)
        self.least_mass = LEAST_SHARE * self.a.double().sum()
        self.status = FINE
        self.scratch: Tensor | None = None

    def tiles(self) -> list[slice]:
        """The rows of each tile."""
        return list(row_chunks(self.n, max(FEWEST_ROWS, TILE_ENTRIES // self.k)))

    def tile(self, part: slice, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        """`scale * (scores - base)` of some rows, 0 for masked rows and columns; in `out` if given.
        base [rows] is a number of each row.
        """
        if out is None:
            out = self.log_b.new_empty((part.stop - part.start, self.k), dtype=self.dtype)
        x = self.entries.load(part, out)
        if base is not None:
            x = torch.sub(x, base[:, None], out=out)
        x = torch.mul(x, self.entries.scale, out=out)
        if self.any_masked:
            x.masked_fill_(self.masked_row[part, None], 0.0).masked_fill_(self.masked_col, 0.0)
        return x

    def logits_plus(
        self, part: slice, potential: list[Tensor], base: Tensor | None = None
    ) -> Tensor:
        """Some rows of the logits plus a potential, in scratch: the next call overwrites them."""
        if (
            self.scratch is None
        ):  # a new tensor for each tile would touch new memory pages each time
            most = max(part.stop - part.start for part in self.tiles())
            self.scratch = self.log_b.new_empty((most, self.k), dtype=self.dtype)
        out = self.scratch[: part.stop - part.start]
        if self.any_masked or self.entries.scale != 1 or base is not None:
            return add_potential_(
                self.tile(part, out, base), potential
            )  # the same rounding in all steps
        x = self.entries.load(part, out)
        return add_potential_(torch.add(x, potential[0], out=out), potential[1:])

    def finite_scores(self, part: slice) -> Tensor:
        """Some rows of the scores, 0 where they are not finite."""
        out = self.log_b.new_empty((part.stop - part.start, self.k), dtype=self.dtype)
        x = self.entries.load(part, out)
        return torch.where(x.isfinite(), x, 0.0)

    def add_bias(self, g: Tensor) -> Tensor:
        """A column potential plus the bias; -inf stays -inf."""
        return g if self.bias is None else torch.where(g == -torch.inf, g, g + self.bias)

    def reduced_logits(
        self, part: slice, shift: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits of some rows plus a potential, the largest of each row, base). Where the largest
        exceeds LARGE_LOGIT, base is subtracted from the scores first, so that the logits keep their
        digits.
        """
        x = self.logits_plus(part, shift)
        top = x.amax(1)
        large = top.isfinite() & (top.abs() > LARGE_LOGIT)
        if self.dtype == torch.float64 or not bool(large.any()):
            return x, top, None
        base = torch.where(large, top / self.entries.scale, 0.0)
        x = self.logits_plus(part, shift, base)
        return x, x.amax(1), base

    def reduce_potential(self, f: Tensor) -> tuple[Tensor, Tensor | None]:
        """(potentials of some rows, base): where a potential exceeds LARGE_LOGIT, base * scale is
        added to it, and the caller subtracts base from the scores.
        """
        large = f.isfinite() & (f.abs() > LARGE_LOGIT)
        if self.dtype == torch.float64 or not bool(large.any()):
            return f, None
        base = torch.where(large, f / -self.entries.scale, 0.0).to(self.dtype)
        return f + base.double() * self.entries.scale, base

    def rows(self, g: Tensor, large: float = LARGE_POTENTIAL) -> tuple[Tensor, Tensor]:
        """The rows' half-step at g, in one pass: f_i = log a_i - logsumexp_j(logits + g), and the
        mass of every column, sum_i exp(logits + f + g - log_a_max).
        """
        f, mass = torch.empty_like(self.log_a), torch.zeros_like(self.log_b)
        shift = split_potential(self.add_bias(g), self.dtype, large)
        for part in self.tiles():
            x, top, base = self.reduced_logits(part, shift)
            p = exp_(x.sub_(top[:, None]), EXP_FLOOR[self.dtype])
            total = p.sum(1)
            f[part] = self.log_a[part] - top.double() - total.double().log()
            if base is not None:
                f[part] -= base.double() * self.entries.scale
            mass += weighted_sums(self.a[part] / total, p)
        has_nan = not bool(mass.isfinite().all())
        if has_nan or bool(((mass == 0) & ~self.masked_col).any()):
            self.status = self.check_logits() or (NOT_FINITE if has_nan else FINE)
        return torch.where(self.masked_row, -torch.inf, f), mass

    def columns(self, f: Tensor) -> Tensor:
        """The logarithm of sum_i exp(logits + f) of every column, with a running maximum."""
        top = torch.full_like(self.log_b, -torch.inf)
        total = torch.zeros_like(self.log_b)
        for part in self.tiles():
            x = self.logits_plus(part, split_potential(f[part, None], self.dtype))
            new_top = torch.maximum(top, x.amax(0).double())
            base = torch.where(new_top == -torch.inf, 0.0, new_top)
            total = (
                total * (top - base).exp()
                + exp_(x.sub_(base.to(self.dtype)), EXP_FLOOR[self.dtype]).sum(0).double()
            )
            top = new_top
        return self.add_bias(torch.where(top == -torch.inf, 0.0, top) + total.log())

    def step_columns(self, f: Tensor) -> Tensor:
        """The columns' half-step from f: g_j = log b_j - log sum_i exp(logits + f)."""
        log_mass = self.columns(f)
        if not bool(log_mass[~self.masked_col].isfinite().all()):
            self.status = self.check_logits() or NOT_FINITE
        return self.mask_columns(self.log_b - log_mass)

    def next_columns(self, g: Tensor, f: Tensor, mass: Tensor) -> Tensor:
        """The columns' half-step after the rows' half-step at g, from the masses that it
        computed.
        """
        next_g = g + self.log_b - self.log_a_max - mass.log()
        if self._has_small_mass(mass):
            exact = self.step_columns(f)
            return torch.where(mass < self.least_mass, exact, self.mask_columns(next_g))
        return self.mask_columns(next_g)

    def _has_small_mass(self, mass: Tensor) -> bool:
        """Whether the mass of a column has lost digits."""
        return bool(((mass < self.least_mass) & ~self.masked_col).any())

    def one_pass(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """(f, log of the mass of every column) after the rows' half-step at g."""
        f, mass = self.rows(self.mask_columns(g), LARGE_IN_GRADIENTS)
        if self.status == FINE and self._has_small_mass(mass):
            exact = self.mask_columns(g) + self.columns(f)
            return f, torch.where(mass < self.least_mass, exact, mass.log() + self.log_a_max)
        return f, mass.log() + self.log_a_max

    def mask_columns(self, g: Tensor) -> Tensor:
        """g, -inf for masked columns."""
        return torch.where(self.masked_col, -torch.inf, g)

    def solve(
        self,
        n_iter: int,
        init: Tensor | None,
        prototype_first: bool,
        history: list[HalfStep] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(f, g, err) after n_iter iterations, or until the problem fails. Appends every half-step
        to `history`.
        """
        self.check_vectors(init)
        g = torch.zeros_like(self.log_b) if init is None else init.double()
        g, f = self.mask_columns(g), torch.where(self.masked_row, -torch.inf, 0.0).double()
        mass: Tensor | None = None
        for side in half_steps(n_iter, prototype_first, init is not None):
            if self.status != FINE:
                break
            if side == "row":
                f, mass = self.rows(g)
            else:
                g = self.step_columns(f) if mass is None else self.next_columns(g, f, mass)
            if history is not None:
                other, own = (g, f) if side == "row" else (f, g)
                history.append(HalfStep(side, other, own))
        return f, g, self._error(f, g, mass, prototype_first or n_iter == 0)

    def check_logits(self) -> int:
        """NOT_FINITE if a logit is NaN or +inf, INFEASIBLE if a row or column with mass has no
        logit above -inf, otherwise FINE.
        """
        has_entry = torch.zeros_like(self.masked_col)
        masked = self.masked_col
        if self.bias is not None:
            masked = masked | (self.bias == -torch.inf)
        is_infeasible = False
        for part in self.tiles():
            x = self.tile(part)
            if bool((x.isnan() | (x == torch.inf)).any()):
                return NOT_FINITE
            is_open = (x > -torch.inf) & ~self.masked_row[part, None] & ~masked
            is_infeasible |= bool((~is_open.any(1) & ~self.masked_row[part]).any())
            has_entry |= is_open.any(0)
        is_infeasible |= self.needs_mass and bool((~has_entry & ~self.masked_col).any())
        return INFEASIBLE if is_infeasible else FINE

    def check_vectors(self, init: Tensor | None) -> None:
        """Set the status that the marginals, the bias and the start imply."""
        columns = [v.double() for v in (init, self.bias) if v is not None]
        vectors = [self.log_a, self.log_b, *(torch.where(self.masked_col, 0.0, v) for v in columns)]
        if bool(self.masked_row.all()):
            self.status = EMPTY
        elif any(bool((v.isnan() | (v == torch.inf)).any()) for v in vectors):
            self.status = NOT_FINITE
        elif bool(self.masked_col.all()):
            self.status = INFEASIBLE

    def _error(self, f: Tensor, g: Tensor, mass: Tensor | None, columns: bool) -> Tensor:
        """L1 error of the marginal of the side that did not step last."""
        if self.status != FINE or mass is None:
            return self.log_b.new_zeros(())
        if columns:
            return (mass * self.log_a_max.exp() - self.b).abs().sum()
        exact, _ = self.rows(g)
        # the error of the f that is returned: a large f has lost digits in its dtype
        gap = torch.where(self.masked_row, 0.0, f.to(self.dtype).double() - exact)
        return (torch.expm1(gap).abs() * self.log_a.exp()).sum()


class ScalingBackward:
    """Gradients of one problem, through its half-steps in reverse order."""

    def __init__(self, problem: ScalingProblem, done: list[HalfStep], f: Tensor, g: Tensor) -> None:
        self.problem = problem
        self.log_a, self.log_b = torch.zeros_like(problem.log_a), torch.zeros_like(problem.log_b)
        self.f = torch.where(problem.masked_row, 0.0, f.double())
        self.g = torch.where(problem.masked_col, 0.0, g.double())
        self.columns = torch.zeros_like(problem.log_b)  # column sums of the logits' gradient
        self.adjoints: list[tuple[HalfStep, Tensor]] = []
        for step in reversed(done):
            if step.side == "row":
                self._row(step)
            else:
                self._column(step)

    def _row(self, step: HalfStep) -> None:
        """Through f_i = log a_i - logsumexp_j(x_ij + g_j): g_j -= sum_i f_i softmax_j(x + g)."""
        adjoint, self.f = self.f, torch.zeros_like(self.f)
        self.log_a += adjoint
        self.adjoints.append((step, adjoint))
        product = torch.zeros_like(self.g)
        for part in self.problem.tiles():
            weights = self.weights(step, part)
            product += adjoint[part].to(weights.dtype) @ weights
        self.g -= product
        self.columns -= product

    def _column(self, step: HalfStep) -> None:
        """Through g_j = log b_j - logsumexp_i(x_ij + f_i): f_i -= sum_j g_j softmax_i(x + f)."""
        adjoint, self.g = self.g, torch.zeros_like(self.g)
        self.log_b += adjoint
        self.columns -= adjoint  # the weights of a column sum to 1
        self.adjoints.append((step, adjoint))
        for part in self.problem.tiles():
            weights = self.weights(step, part)
            self.f[part] -= weights @ adjoint.to(weights.dtype)

    def clear(self) -> None:
        """Set all gradients to 0: the results of a failed problem are constant."""
        for vector in (self.log_a, self.log_b, self.g, self.columns):
            vector.zero_()
        self.adjoints = []

    def weights(self, step: HalfStep, part: slice) -> Tensor:
        """Softmax weights of a half-step for some rows: softmax_j(x + g) of a row step, softmax_i(x
        + f) of a column step. The next call overwrites them.
        """
        problem = self.problem
        dtype = problem.dtype
        if step.side == "row":
            potential = split_potential(problem.add_bias(step.other), dtype, LARGE_IN_GRADIENTS)
            return softmax_(problem.reduced_logits(part, potential)[0], underflows=True)
        columns = problem.add_bias(step.own - problem.log_b)
        columns = torch.where(problem.masked_col, -torch.inf, columns)
        rows, base = problem.reduce_potential(step.other[part])
        # add the larger potential first: it cancels large logits
        first, second = sorted((columns, rows[:, None]), key=_largest_entry, reverse=True)
        x = problem.logits_plus(part, split_potential(first, dtype, LARGE_IN_GRADIENTS), base)
        return exp_(
            add_potential_(x, split_potential(second, dtype, LARGE_IN_GRADIENTS)),
            SOFTMAX_FLOOR[dtype],
        )

    def grad_logits(self, part: slice) -> Tensor:
        """Gradient of some rows of the logits: minus the sum over half-steps of adjoint *
        weights.
        """
        problem = self.problem
        total = problem.log_b.new_zeros((part.stop - part.start, problem.k), dtype=problem.dtype)
        for step, adjoint in self.adjoints:
            weight = adjoint[part, None] if step.side == "row" else adjoint
            total.addcmul_(self.weights(step, part), weight.to(total.dtype), value=-1)
        active = ~(problem.masked_row[part, None] | problem.masked_col)
        return total.mul_(active) if problem.any_masked else total
