# SPDX-License-Identifier: Apache-2.0
"""The result of `sinkhorn`: potentials, and the codes, labels and sums computed from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from .._core import checks, transforms
from ..ops._facts import EMPTY, FINE, NOT_CONVERGED
from . import _arguments as arguments
from ._gradients import semi_dual
from ._problem import Scores, TransportProblem
from ._strict import enforce_capacities


@dataclass(frozen=True)
class Sinkhorn:
    """The result of `sinkhorn`.

    Attributes
    ----------
    f, g : Tensor [..., N], [..., K]
        Potentials: the plan is exp(scores / epsilon + bias + f + g). With `tol` a large constant
        may move from f to g. Codes, labels and the plan use all float64 digits of that g.
    err : Tensor [...]
        L1 error of the marginal sums of the side whose half-step was not the last.
    status : Tensor [...], int64
        0: fine. 1: not converged to `tol`. 2: not finite. 3: infeasible. 4: no rows.
    n_iter : int
        Number of iterations; in a batch, that of the problem with most.

    Notes
    -----
    With `process_group`, f, codes, plan, labels and topk have the rows of this process.
    `labels(strict=True)`, `counts`, `value` and `entropy` use the rows of all processes: all
    processes must call them.
    """

    f: Tensor
    g: Tensor
    err: Tensor
    status: Tensor
    n_iter: int
    problem: TransportProblem = field(repr=False)
    rows_exact: bool = field(default=True, repr=False)
    envelope: bool = field(default=False, repr=False)
    group: Any = field(default=None, repr=False)

    @property
    def converged(self) -> Tensor:
        """Whether each problem has status 0: it did not fail, and reached `tol` if there is one."""
        return self.status == FINE

    def codes(self, rows: slice | None = None) -> Tensor:
        """The rows of the plan divided by their sums, softmax_j(logits + g).

        Parameters
        ----------
        rows : slice, optional
            Rows to compute; default all.

        Returns
        -------
        Tensor [..., N, K]
            0 in masked rows, NaN in failed problems.
        """
        problem = self._detach_if_envelope()

        def chunk_codes(part: slice, x: Tensor) -> Tensor:
            p, masked = torch.softmax(x, -1), problem.masked_rows(part)
            return p if masked is None else p.masked_fill(masked[..., None], 0.0)

        return problem.map_tiles(self.g, chunk_codes, rows)

    def code_potentials(self) -> tuple[Tensor, Tensor]:
        """(f [..., N], g [..., K]) with codes = exp(scores / epsilon + bias + f + g), without
        gradient: the arguments of `swapped_prediction`. The largest g is 0, and f is -inf for a
        masked row.
        """
        problem, g = self.problem.detach(), self.g.detach().double()
        g = g if problem.g_low is None else g + problem.g_low
        top = g.amax(-1, keepdim=True)
        g = (g - torch.where(top.isfinite(), top, 0.0)).to(self.g.dtype)
        problem, parts = replace(problem, g_low=None), []
        for part in problem.row_chunks(g):
            f = -problem.logits(part, g, exact_size=True).logsumexp(-1)
            masked = problem.masked_rows(part)
            parts.append(f if masked is None else f.masked_fill(masked, -torch.inf))
        return torch.cat(parts, -1), g

    def plan(self, rows: slice | None = None) -> Tensor:
        """exp(logits + f + g) [..., N, K], of some rows or all. If the rows made the last
        half-step, the plan is computed as masses times codes: a large f has too few digits in
        float32.
        """
        problem = self._detach_if_envelope()

        def chunk_of_exact_rows(part: slice, x: Tensor) -> Tensor:
            p = torch.softmax(x, -1)
            if problem.log_row is None:
                return p / max(self.f.shape[-1], 1)
            return p * problem.log_row[..., part, None].exp().to(p.dtype)

        def chunk_of_exact_columns(part: slice, x: Tensor) -> Tensor:
            return (x + self.f[..., part, None]).exp()

        if self.rows_exact:
            return problem.map_tiles(self.g, chunk_of_exact_rows, rows)
        return problem.map_tiles(self.g, chunk_of_exact_columns, rows, exact_size=True)

    def _detach_if_envelope(self) -> TransportProblem:
        """The problem by which codes and the plan are differentiated."""
        return self.problem.detach() if self.envelope else self.problem

    def labels(self, strict: bool = False) -> Tensor:
        """The prototype of each row's largest code, without an N x K array.

        Parameters
        ----------
        strict : bool
            Whether to enforce capacities: no prototype gets more rows than its mass times N,
            rounded down, plus one for the largest remainders (lowest index of a tie). Rows then
            move to other prototypes where that costs least. N counts the rows of all processes of
            a group.

        Returns
        -------
        Tensor [..., N], int64
            -1 for masked rows and in failed problems.
        """
        checks.boolean("strict", strict)
        problem, g = self.problem.detach(), self.g.detach()
        parts = []
        for part, x in problem.tiles(g):
            top_labels, masked = x.argmax(-1), problem.masked_rows(part)
            parts.append(top_labels if masked is None else top_labels.masked_fill(masked, -1))
        labels = torch.cat(parts, -1).masked_fill((self.status > NOT_CONVERGED)[..., None], -1)
        if not strict:
            return labels
        if transforms.maps(labels):
            raise NotImplementedError(
                "strict: expected False under torch.func.vmap, where rows have no values to"
                " compare; pass the problems as leading dims [..., N, K]"
            )
        return enforce_capacities(problem, g, labels, self.group)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest codes of each row.

        Parameters
        ----------
        k : int, 1 <= k <= K
            Number of codes.

        Returns
        -------
        values, indices : Tensor [..., N, k]
            Values are 0 in masked rows.
        """
        most, k = self.g.shape[-1], checks.whole("k", k, 1)
        checks.value_error(
            1 <= k <= most, lambda: checks.wording("k", f"an int from 1 to {most}", f"{k}")
        )
        problem = self._detach_if_envelope()
        values, indices = [], []
        for part, x in problem.tiles(self.g):
            top, masked = torch.softmax(x, -1).topk(k, -1), problem.masked_rows(part)
            value = top.values
            values.append(value if masked is None else value.masked_fill(masked[..., None], 0.0))
            indices.append(top.indices)
        return torch.cat(values, -2), torch.cat(indices, -2)

    def counts(self, strict: bool = False) -> Tensor:
        """Number of rows of each label. The shares of the plan are equal. The shares of the labels
        are nearly equal: a smaller epsilon brings them nearer. With `strict` they are exact.

        Parameters
        ----------
        strict : bool
            As in `labels`.

        Returns
        -------
        Tensor [..., K], int64
        """
        labels = self.labels(strict)
        counts = torch.zeros_like(self.g, dtype=torch.int64)
        counts = counts.scatter_add(-1, labels.clamp(min=0), (labels >= 0).long())
        return self._sum_over_processes(counts)

    def value(self) -> Tensor:
        """<plan, -scores - epsilon bias> + epsilon KL(plan | a b^T) at the optimum [...] float64.

        Computed as epsilon (sum_i a_i (f_i - log a_i) + sum_j b_j (g_j - log b_j)), with an error
        of the order of err^2. With gradient="envelope" only this value has a gradient: minus the
        plan, for the scores.
        """
        problem, f = self.problem, self.f
        if self.envelope:
            f = semi_dual(problem, self.g)
        rows = self._sum_over_processes(_dual_term(f, problem.log_row))
        value = (rows + _dual_term(self.g, problem.log_col)) * problem.epsilon
        return torch.where(self.status == EMPTY, 0.0, value)

    def entropy(self) -> Tensor:
        """Mean entropy -sum_j p_j log p_j of the codes of active rows [...] float64, in nats; no
        gradient.
        """
        total = torch.zeros_like(self.err, dtype=torch.float64)
        rows = torch.zeros_like(total)
        problem = self.problem.detach()
        for part, x in problem.tiles(self.g.detach()):
            p = torch.softmax(x, -1)
            entropies = torch.special.entr(p).sum(-1).double()
            masked = problem.masked_rows(part)
            weight = torch.ones_like(entropies) if masked is None else (~masked).double()
            entropies = torch.where(weight > 0, entropies, 0.0)
            total, rows = total + entropies.sum(-1), rows + weight.sum(-1)
        total, rows = self._sum_over_processes(torch.stack([total, rows]))
        return total / rows.clamp(min=1)

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of a value over the processes of the group, if there is one."""
        return value if self.group is None else distributed.gather(value, self.group).sum(0)

    def assign(self, scores: Scores) -> Tensor:
        """Codes of other rows, with these potentials.

        Parameters
        ----------
        scores : Tensor [..., M, K] or (z [..., M, D], prototypes [..., K, D])
            In the form that `sinkhorn` takes.

        Returns
        -------
        Tensor [..., M, K]
        """
        arguments.check_type(scores)
        problem = self.problem.with_scores(scores)
        is_vector, k = isinstance(scores, Tensor) and scores.ndim < 2, self.g.shape[-1]
        fits = not is_vector and problem.n_prototypes == k
        checks.shape("scores", problem.first, ["...", "M", k], fits, "the result")
        checks.same_device("scores", problem.first, "the result", self.g)
        return replace(self, problem=problem).codes()


def _dual_term(potential: Tensor, log_mass: Tensor | None) -> Tensor:
    """sum_i a_i (f_i - log a_i); an entry without mass adds 0."""
    x = potential.double()
    if log_mass is None:
        size = x.shape[-1]  # log of a tensor: log of a number would compile again for each size
        return x.sum(-1) / max(size, 1) + x.new_full((), max(size, 1)).log()
    has_mass = log_mass > -torch.inf
    log_a = torch.where(has_mass, log_mass.double(), 0.0)
    return torch.where(has_mass, log_a.exp() * (torch.where(has_mass, x, 0.0) - log_a), 0.0).sum(-1)
