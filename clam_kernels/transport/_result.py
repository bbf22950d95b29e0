# SPDX-License-Identifier: Apache-2.0
"""What `sinkhorn` found, and what is read off it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from .._core import checks, transforms
from ._gradients import semi_dual
from ._passes import EMPTY, FINE, NOT_CONVERGED
from ._problem import Problem, Scores
from ._strict import evened


@dataclass(frozen=True)
class Sinkhorn:
    """What `sinkhorn` found.

    Attributes
    ----------
    f, g : Tensor [..., N], [..., K]
        Potentials: the plan is exp(scores / epsilon + bias + f + g). With `tol` a constant may go
        from one to the other where it is large. Results are read with all digits of that g.
    err : Tensor [...]
        L1 error of the sums of the side that was not made exact last.
    status : Tensor [...], int64
        0 fine, 1 not converged to `tol`, 2 not finite, 3 infeasible, 4 no row.
    n_iter : int
        Iterations run, of the problem that took most.

    Notes
    -----
    With `process_group` f, codes, plan, labels and topk are of the rows of this process;
    `labels(strict=True)`, `counts`, `value` and `entropy` look at the rows of all processes, which
    all have to call them.
    """

    f: Tensor
    g: Tensor
    err: Tensor
    status: Tensor
    n_iter: int
    problem: Problem = field(repr=False)
    rows_exact: bool = field(default=True, repr=False)
    envelope: bool = field(default=False, repr=False)
    group: Any = field(default=None, repr=False)

    @property
    def converged(self) -> Tensor:
        """Whether each problem is fine: without fault, and within `tol` where that was given."""
        return self.status == FINE

    def codes(self, rows: slice | None = None) -> Tensor:
        """The plan's rows over their sums, softmax_j(logits + g).

        Parameters
        ----------
        rows : slice, optional
            Rows to give; all unless given.

        Returns
        -------
        Tensor [..., N, K]
            0 in rows that take no part, NaN in problems that failed.
        """
        problem = self._still()

        def read(part: slice, x: Tensor) -> Tensor:
            p, out = torch.softmax(x, -1), problem.out(part)
            return p if out is None else p.masked_fill(out[..., None], 0.0)

        return problem.joined(self.g, read, rows)

    def plan(self, rows: slice | None = None) -> Tensor:
        """exp(logits + f + g) [..., N, K], of some rows or all. Rows that were made exact last are
        their masses times their codes: an f that is large has no digits left in float32.
        """
        problem = self._still()

        def exact(part: slice, x: Tensor) -> Tensor:
            p = torch.softmax(x, -1)
            if problem.log_row is None:
                return p / max(self.f.shape[-1], 1)
            return p * problem.log_row[..., part, None].exp().to(p.dtype)

        def other(part: slice, x: Tensor) -> Tensor:
            return (x + self.f[..., part, None]).exp()

        if self.rows_exact:
            return problem.joined(self.g, exact, rows)
        return problem.joined(self.g, other, rows, whole=True)

    def _still(self) -> Problem:
        """The problem as far as codes and plan are differentiated by it."""
        return self.problem.detached() if self.envelope else self.problem

    def labels(self, strict: bool = False) -> Tensor:
        """The prototype of each row's largest code, without an N x K array.

        Parameters
        ----------
        strict : bool
            Whether no prototype gets more rows than its mass is worth (rounded, the rest to the
            largest remainders, lowest index on ties): rows move where that costs least. The shares
            are those of all rows, on whichever process of a group they lie.

        Returns
        -------
        Tensor [..., N], int64
            -1 for rows that take no part and for problems that failed.
        """
        problem, g = self.problem.detached(), self.g.detach()
        parts = []
        for part, x in problem.tiles(g):
            best, out = x.argmax(-1), problem.out(part)
            parts.append(best if out is None else best.masked_fill(out, -1))
        found = torch.cat(parts, -1).masked_fill((self.status > NOT_CONVERGED)[..., None], -1)
        if not strict:
            return found
        if transforms.maps(found):
            raise NotImplementedError(
                "strict: expected False under torch.func.vmap, which has no values to order rows"
                " by; pass the problems as leading dims [..., N, K]"
            )
        return evened(problem, g, found, self.group)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest codes of each row.

        Parameters
        ----------
        k : int
            How many.

        Returns
        -------
        values, indices : Tensor [..., N, k]
            Values 0 in rows that take no part.
        """
        most, k = self.g.shape[-1], checks.whole("k", k, 1)
        checks.value_error(
            1 <= k <= most, lambda: checks.wording("k", f"an int from 1 to {most}", f"{k}")
        )
        problem = self._still()
        values, indices = [], []
        for part, x in problem.tiles(self.g):
            top, out = torch.softmax(x, -1).topk(k, -1), problem.out(part)
            best = top.values if out is None else top.values.masked_fill(out[..., None], 0.0)
            values.append(best)
            indices.append(top.indices)
        return torch.cat(values, -2), torch.cat(indices, -2)

    def counts(self, strict: bool = False) -> Tensor:
        """Rows of each label. Shares of the plan are equal; counts of its labels are nearly so, the
        nearer the harder the plan, or `strict`.

        Parameters
        ----------
        strict : bool
            As of `labels`.

        Returns
        -------
        Tensor [..., K], int64
        """
        labels = self.labels(strict)
        found = torch.zeros_like(self.g, dtype=torch.int64)
        found = found.scatter_add(-1, labels.clamp(min=0), (labels >= 0).long())
        return self._of_all(found)

    def value(self) -> Tensor:
        """<plan, -scores - epsilon bias> + epsilon KL(plan | a b^T) of the optimum [...] float64,
        up to the square of err: epsilon (sum a (f - log a) + sum b (g - log b)).

        With gradient="envelope" this alone has a gradient: minus the plan for the scores.
        """
        problem, f = self.problem, self.f
        if self.envelope:
            f = semi_dual(problem, self.g)
        rows = self._of_all(_side(f, problem.log_row))
        whole = (rows + _side(self.g, problem.log_col)) * problem.epsilon
        return torch.where(self.status == EMPTY, 0.0, whole)

    def entropy(self) -> Tensor:
        """Mean entropy of the codes of the rows [...] float64, in nats; without gradient."""
        total = torch.zeros_like(self.err, dtype=torch.float64)
        rows = torch.zeros_like(total)
        problem = self.problem.detached()
        for part, x in problem.tiles(self.g.detach()):
            p = torch.softmax(x, -1)
            one = torch.special.entr(p).sum(-1).double()
            out = problem.out(part)
            weight = torch.ones_like(one) if out is None else (~out).double()
            one = torch.where(weight > 0, one, 0.0)
            total, rows = total + one.sum(-1), rows + weight.sum(-1)
        total, rows = self._of_all(torch.stack([total, rows]))
        return total / rows.clamp(min=1)

    def _of_all(self, mine: Tensor) -> Tensor:
        """The sum over the processes of a group, if the rows are spread over one."""
        return mine if self.group is None else distributed.gathered(mine, self.group).sum(0)

    def assign(self, scores: Scores) -> Tensor:
        """Codes of other rows at these potentials.

        Parameters
        ----------
        scores : Tensor [..., M, K] or (z [..., M, D], prototypes [..., K, D])
            As `sinkhorn` takes them.

        Returns
        -------
        Tensor [..., M, K]
        """
        other = self.problem.of(scores)
        wide, k = isinstance(scores, Tensor) and scores.ndim < 2, self.g.shape[-1]
        same = not wide and other.n_prototypes == k
        checks.shape("scores", other.first, ["...", "M", k], same, "the result")
        return replace(self, problem=other).codes()


def _side(potential: Tensor, log_mass: Tensor | None) -> Tensor:
    """The sum of a (f - log a); nothing of what has no mass."""
    x = potential.double()
    if log_mass is None:
        size = x.shape[-1]  # its logarithm as a tensor's, or each size would be compiled anew
        return x.sum(-1) / max(size, 1) + x.new_full((), max(size, 1)).log()
    alive = log_mass > -torch.inf
    log_a = torch.where(alive, log_mass.double(), 0.0)
    return torch.where(alive, log_a.exp() * (torch.where(alive, x, 0.0) - log_a), 0.0).sum(-1)
