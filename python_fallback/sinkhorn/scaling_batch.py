# SPDX-License-Identifier: Apache-2.0
"""Batches of Sinkhorn problems, computed one after the other: their results and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..common.chunk import broadcast_shapes
from ..common.problems import problems
from ..common.score import compute_dtype
from .scaling import (
    EMPTY,
    FINE,
    INFEASIBLE,
    NOT_FINITE,
    Backward,
    Features,
    HalfStep,
    Problem,
    Scores,
)


def results(
    f: Tensor, g: Tensor, err: Tensor, status: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NaN for problems that failed; of one without rows g is 0."""
    failed = (status == NOT_FINITE) | (status == INFEASIBLE)
    empty = status == EMPTY
    f = torch.where(empty[..., None], -torch.inf, torch.where(failed[..., None], torch.nan, f))
    g = torch.where(empty[..., None], 0.0, torch.where(failed[..., None], torch.nan, g))
    err = torch.where(empty, 0.0, torch.where(failed, torch.nan, err))
    return f, g, err, status


def pass_results(f: Tensor, log_mass: Tensor, status: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NaN for problems that failed; of one without rows the masses are 0."""
    failed = (status == NOT_FINITE) | (status == INFEASIBLE)
    empty = (status == EMPTY)[..., None]
    f, log_mass = (torch.where(failed[..., None], torch.nan, x) for x in (f, log_mass))
    return torch.where(empty, -torch.inf, f), torch.where(empty, -torch.inf, log_mass), status


class Case:
    """A call: operands, and the problems of its batch one after the other. `matrices` are scores,
    or features and prototypes; `vectors` are bias, log_row, log_col and start. In a call that is
    not `covered` a column has any mass, and takes part where its start is above -inf.
    """

    def __init__(
        self,
        matrices: tuple[Tensor, ...],
        vectors: tuple[Tensor | None, ...],
        scale: Tensor | None,
        covered: bool = True,
    ) -> None:
        first, last = matrices[0], matrices[-1]
        self.dtype, self.device = compute_dtype(first), first.device
        self.matrices, self.covered = len(matrices), covered
        self.shape = (first.shape[-2], last.shape[-2] if len(matrices) == 2 else first.shape[-1])
        self.operands: list[tuple[Tensor | None, int]] = [
            *((x, 2) for x in matrices), *((v, 1) for v in vectors), (scale, 0)
        ]  # fmt: skip
        leads = [o.shape[: o.ndim - core] for o, core in self.operands if o is not None]
        self.batch = broadcast_shapes(*leads)

    def problems(self) -> Iterator[tuple[tuple[int, ...], Problem, Tensor | None]]:
        """(place in the batch, problem, start) of each."""
        n, k = self.shape
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        even_row = like.new_full((n,), -math.log(max(n, 1)))
        even_col = like.new_full((k,), -math.log(k))
        for at, (*matrices, bias, log_a, log_b, init, scale) in problems(
            self.batch, *self.operands
        ):
            # a scale beyond the compute dtype is infinite in it
            times = 1.0 if scale is None else float(scale.to(self.dtype))
            log_a = even_row if log_a is None else log_a
            log_b = even_col if log_b is None else log_b
            if not self.covered:
                log_b = torch.where(init == -torch.inf, init, 0.0)
            entries = (
                Scores(matrices[0], times)
                if len(matrices) == 1
                else Features(matrices[0], matrices[1], times)
            )
            yield at, Problem(entries, log_a, log_b, self.dtype, bias, self.covered), init

    def forward(self, n_iter: int, prototype_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, k = self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        f, g = like.new_empty(*self.batch, n), like.new_empty(*self.batch, k)
        err = like.new_empty(self.batch)
        status = torch.empty(self.batch, dtype=torch.int64, device=self.device)
        for at, problem, init in self.problems():
            f[at], g[at], err[at] = problem.solve(n_iter, init, prototype_first)
            status[at] = problem.status
        return results(f, g, err, status)

    def one_pass(self) -> tuple[Tensor, Tensor, Tensor]:
        n, k = self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        f, log_mass = like.new_empty(*self.batch, n), like.new_empty(*self.batch, k)
        status = torch.empty(self.batch, dtype=torch.int64, device=self.device)
        for at, problem, g in self.problems():
            assert g is not None
            problem.judge(g)
            if problem.status == FINE:
                f[at], log_mass[at] = problem.one_pass(g.double())
            status[at] = problem.status
        return pass_results(f, log_mass, status)

    def backward(
        self,
        back_through: Callable[..., Backward],
        grads: tuple[Tensor, Tensor],
        needs: list[bool],
    ) -> tuple[Tensor, ...]:
        """Gradients of the operands that are given and needed, empty for the others;
        `back_through(problem, start, *grads)` has those of one problem.
        """
        count = self.matrices
        grads = tuple(g.expand(*self.batch, g.shape[-1]) for g in grads)  # type: ignore[assignment]
        totals = [
            _Total(operand, self.batch, core, self.dtype if i < count else torch.float64)
            if operand is not None and need
            else None
            for i, ((operand, core), need) in enumerate(zip(self.operands, needs, strict=True))
        ]
        for at, problem, init in self.problems():
            back = back_through(problem, init, grads[0][at], grads[1][at])
            if problem.status != FINE:
                back.stop()
            views = [None if t is None else t.view[at] for t in totals]
            _add_entries(back, views[:count], views[-1])
            vectors = (back.columns, back.log_a, back.log_b, back.g)
            for view, found in zip(views[count:-1], vectors, strict=True):
                if view is not None:
                    view += found
        first = self.operands[0][0]
        assert first is not None
        return tuple(first.new_empty(0) if t is None else t.result() for t in totals)


class _Total:
    """Gradient of one operand, summed over the batch that shares it."""

    def __init__(self, operand: Tensor, batch: torch.Size, core: int, dtype: torch.dtype) -> None:
        self.total = torch.zeros(operand.shape, dtype=dtype, device=operand.device)
        self.view = self.total.expand([*batch, *operand.shape[operand.ndim - core :]])
        self.dtype = operand.dtype

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


def _add_entries(back: Backward, matrices: list[Tensor | None], scale: Tensor | None) -> None:
    """Add the gradients of the matrices and of the scale, tile by tile."""
    if scale is None and not any(x is not None for x in matrices):
        return
    problem = back.problem
    for part in problem.tiles():
        slope = back.tile(part)
        if scale is not None:
            scale += (slope * problem.raw(part)).sum(dtype=torch.float64)
        slope.mul_(problem.entries.scale)
        if len(matrices) == 2:
            _add_features(back, part, slope, matrices)
        elif matrices[0] is not None:
            matrices[0][part] += slope


def _add_features(back: Backward, part: slice, slope: Tensor, totals: list[Tensor | None]) -> None:
    """Add what the gradient of some rows of the scores gives the features and the prototypes."""
    problem = back.problem
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


def through_all(n_iter: int, prototype_first: bool) -> Callable[..., Backward]:
    def back_through(problem: Problem, init: Tensor | None, f: Tensor, g: Tensor) -> Backward:
        done: list[HalfStep] = []
        problem.solve(n_iter, init, prototype_first, done)
        return Backward(problem, done, f, g)

    return back_through


def through_pass(problem: Problem, g: Tensor, grad_f: Tensor, grad_mass: Tensor) -> Backward:
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
