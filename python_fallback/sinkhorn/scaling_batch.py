# SPDX-License-Identifier: Apache-2.0
"""A batch of Sinkhorn problems, one after the other: results and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..common.chunk import GradientSum, add_batch_dims, broadcast_shapes
from ..common.problems import problems
from ..common.score import compute_dtype
from .scaling import (
    EMPTY,
    FINE,
    INFEASIBLE,
    NOT_FINITE,
    Features,
    HalfStep,
    ScalingBackward,
    ScalingProblem,
    Scores,
)


def results(
    f: Tensor, g: Tensor, err: Tensor, status: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `sinkhorn_potentials`: NaN for a failed problem; f = -inf and g = 0 for a
    problem without rows.
    """
    failed = (status == NOT_FINITE) | (status == INFEASIBLE)
    empty = status == EMPTY
    f = torch.where(empty[..., None], -torch.inf, torch.where(failed[..., None], torch.nan, f))
    g = torch.where(empty[..., None], 0.0, torch.where(failed[..., None], torch.nan, g))
    err = torch.where(empty, 0.0, torch.where(failed, torch.nan, err))
    return f, g, err, status


def pass_results(f: Tensor, log_mass: Tensor, status: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `sinkhorn_pass`: NaN for a failed problem; -inf for a problem without rows."""
    failed = (status == NOT_FINITE) | (status == INFEASIBLE)
    empty = (status == EMPTY)[..., None]
    f, log_mass = (torch.where(failed[..., None], torch.nan, x) for x in (f, log_mass))
    return torch.where(empty, -torch.inf, f), torch.where(empty, -torch.inf, log_mass), status


class SinkhornCall:
    """The operands of one call, and the problems of its batch. `matrices` are the scores, or the
    features and prototypes; `vectors` are bias, log_row, log_col and init. Without `needs_mass` a
    column may have any mass, and is masked where its init is -inf.
    """

    def __init__(
        self,
        matrices: tuple[Tensor, ...],
        vectors: tuple[Tensor | None, ...],
        scale: Tensor | None,
        needs_mass: bool = True,
    ) -> None:
        first, last = matrices[0], matrices[-1]
        self.dtype, self.device = compute_dtype(first.dtype), first.device
        self.matrices, self.needs_mass = len(matrices), needs_mass
        self.shape = (first.shape[-2], last.shape[-2] if len(matrices) == 2 else first.shape[-1])
        self.operands: list[tuple[Tensor | None, int]] = [
            *((x, 2) for x in matrices), *((v, 1) for v in vectors), (scale, 0)
        ]  # fmt: skip
        leads = [o.shape[: o.ndim - core] for o, core in self.operands if o is not None]
        self.batch = broadcast_shapes(*leads)

    def problems(self) -> Iterator[tuple[tuple[int, ...], ScalingProblem, Tensor | None]]:
        """(index in the batch, problem, init) of each problem."""
        n, k = self.shape
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        even_row = like.new_full((n,), -math.log(max(n, 1)))
        even_col = like.new_full((k,), -math.log(k))
        for index, (*matrices, bias, log_a, log_b, init, scale) in problems(
            self.batch, *self.operands
        ):
            # a scale outside the range of the compute dtype becomes inf
            times = 1.0 if scale is None else float(scale.to(self.dtype))
            log_a = even_row if log_a is None else log_a
            log_b = even_col if log_b is None else log_b
            if not self.needs_mass:
                log_b = torch.where(init == -torch.inf, init, 0.0)
            entries = (
                Scores(matrices[0], times)
                if len(matrices) == 1
                else Features(matrices[0], matrices[1], times)
            )
            yield (
                index,
                ScalingProblem(entries, log_a, log_b, self.dtype, bias, self.needs_mass),
                init,
            )

    def forward(self, n_iter: int, prototype_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(f, g, err, status) after n_iter iterations."""
        n, k = self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        f, g = like.new_empty(*self.batch, n), like.new_empty(*self.batch, k)
        err = like.new_empty(self.batch)
        status = torch.empty(self.batch, dtype=torch.int64, device=self.device)
        for index, problem, init in self.problems():
            f[index], g[index], err[index] = problem.solve(n_iter, init, prototype_first)
            status[index] = problem.status
        return results(f, g, err, status)

    def one_pass(self) -> tuple[Tensor, Tensor, Tensor]:
        """(f, log_mass, status) after the rows' half-step at g."""
        n, k = self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        f, log_mass = like.new_empty(*self.batch, n), like.new_empty(*self.batch, k)
        status = torch.empty(self.batch, dtype=torch.int64, device=self.device)
        for index, problem, g in self.problems():
            assert g is not None
            problem.check_vectors(g)
            if problem.status == FINE:
                f[index], log_mass[index] = problem.one_pass(g.double())
            status[index] = problem.status
        return pass_results(f, log_mass, status)

    def backward(
        self,
        backward_of: Callable[..., ScalingBackward],
        grads: tuple[Tensor, Tensor],
        needs: list[bool],
    ) -> tuple[Tensor, ...]:
        """Gradients of all operands, empty for an operand that is None or needs none;
        `backward_of(problem, init, *grads)` computes those of one problem.
        """
        count = self.matrices
        grads = tuple(g.expand(*self.batch, g.shape[-1]) for g in grads)  # type: ignore[assignment]
        totals = [
            GradientSum(
                operand,
                add_batch_dims(operand, len(self.batch), core),
                self.dtype if i < count else torch.float64,
            )
            if operand is not None and need
            else None
            for i, ((operand, core), need) in enumerate(zip(self.operands, needs, strict=True))
        ]
        for index, problem, init in self.problems():
            backward = backward_of(problem, init, grads[0][index], grads[1][index])
            if problem.status != FINE:
                backward.clear()
            views = [None if t is None else t.of_problem(index) for t in totals]
            _add_entries(backward, views[:count], views[-1])
            vectors = (backward.columns, backward.log_a, backward.log_b, backward.g)
            for view, value in zip(views[count:-1], vectors, strict=True):
                if view is not None:
                    view += value
        first = self.operands[0][0]
        assert first is not None
        return tuple(first.new_empty(0) if t is None else t.result() for t in totals)


def _add_entries(
    backward: ScalingBackward, matrices: list[Tensor | None], scale: Tensor | None
) -> None:
    """Add the gradients of the scores, or features and prototypes, and of the scale."""
    if scale is None and not any(x is not None for x in matrices):
        return
    problem = backward.problem
    for part in problem.tiles():
        grad_scores = backward.grad_logits(part)
        if scale is not None:
            scale += (grad_scores * problem.finite_scores(part)).sum(dtype=torch.float64)
        grad_scores.mul_(problem.entries.scale)
        if len(matrices) == 2:
            _add_features(backward, part, grad_scores, matrices)
        elif matrices[0] is not None:
            matrices[0][part] += grad_scores


def _add_features(
    backward: ScalingBackward, part: slice, grad_scores: Tensor, totals: list[Tensor | None]
) -> None:
    """Add the gradients of z and prototypes for the gradient G of some rows of the scores: G @
    prototypes and G^T @ z.
    """
    problem = backward.problem
    assert isinstance(problem.entries, Features)
    z, prototypes = (
        x.to(grad_scores.dtype) for x in (problem.entries.z[part], problem.entries.prototypes)
    )
    if problem.any_masked:  # masked values may be NaN
        z = z.masked_fill(problem.masked_row[part, None], 0.0)
        prototypes = prototypes.masked_fill(problem.masked_col[:, None], 0.0)
    if totals[0] is not None:
        totals[0][part] += grad_scores @ prototypes
    if totals[1] is not None:
        totals[1] += grad_scores.mT @ z


def iterations_backward(n_iter: int, prototype_first: bool) -> Callable[..., ScalingBackward]:
    """The function that differentiates one problem through all its iterations."""

    def backward_of(
        problem: ScalingProblem, init: Tensor | None, f: Tensor, g: Tensor
    ) -> ScalingBackward:
        history: list[HalfStep] = []
        problem.solve(n_iter, init, prototype_first, history)
        return ScalingBackward(problem, history, f, g)

    return backward_of


def pass_backward(
    problem: ScalingProblem, g: Tensor, grad_f: Tensor, grad_mass: Tensor
) -> ScalingBackward:
    """Gradients of one pass. log_mass_j = g_j - h_j, where h is the columns' half-step to the mass
    1: h_j = log 1 - logsumexp_i(x_ij + f_i).
    """
    g = problem.mask_columns(g.double())
    grad_mass = torch.where(problem.masked_col, 0.0, grad_mass.double())
    problem.check_vectors(g)
    f, log_mass = problem.one_pass(g) if problem.status == FINE else (problem.log_a, g)
    columns = torch.where(log_mass == -torch.inf, -torch.inf, g - log_mass)
    backward = ScalingBackward(
        problem, [HalfStep("row", g, f), HalfStep("column", f, columns)], grad_f, -grad_mass
    )
    backward.g += grad_mass
    return backward
