# SPDX-License-Identifier: Apache-2.0
"""What `sinkhorn` found, and what is read off it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._core import checks
from ._gradients import semi_dual
from ._passes import FINE, NOT_CONVERGED
from ._problem import Problem, Scores
from ._strict import evened


@dataclass(frozen=True)
class Sinkhorn:
    """What `sinkhorn` found.

    Attributes
    ----------
    f, g : Tensor [..., N], [..., K]
        Potentials: the plan is exp(scores / epsilon + bias + f + g).
    err : Tensor [...]
        L1 error of the sums of the side that was not made exact last.
    status : Tensor [...], int64
        0 fine, 1 not converged to `tol`, 2 not finite, 3 infeasible, 4 no row.
    n_iter : int
        Iterations run, of the problem that took most.
    """

    f: Tensor
    g: Tensor
    err: Tensor
    status: Tensor
    n_iter: int
    problem: Problem = field(repr=False)
    envelope: bool = field(default=False, repr=False)

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
        rows = slice(None) if rows is None else rows
        p = torch.softmax(self._still().logits(rows) + self.g[..., None, :], -1)
        out = self.problem.out(rows)
        return p if out is None else p.masked_fill(out[..., None], 0.0)

    def plan(self, rows: slice | None = None) -> Tensor:
        """exp(logits + f + g) [..., N, K], of some rows or all."""
        rows = slice(None) if rows is None else rows
        x = self._still().logits(rows) + self.g[..., None, :] + self.f[..., rows, None]
        return x.exp()

    def _still(self) -> Problem:
        """The problem as far as codes and plan are differentiated by it."""
        return self.problem.detached() if self.envelope else self.problem

    def labels(self, strict: bool = False) -> Tensor:
        """The prototype of each row's largest code, without an N x K array.

        Parameters
        ----------
        strict : bool
            Whether no prototype gets more rows than its mass is worth (rounded, the rest to the
            largest remainders, lowest index on ties): rows move where that costs least.

        Returns
        -------
        Tensor [..., N], int64
            -1 for rows that take no part and for problems that failed.
        """
        problem, g = self.problem.detached(), self.g.detach()
        found = torch.empty(self.f.shape, dtype=torch.int64, device=self.f.device)
        for part, x in problem.tiles(g):
            best = x.argmax(-1)
            out = problem.out(part)
            found[..., part] = best if out is None else best.masked_fill(out, -1)
        found[self.status > NOT_CONVERGED] = -1
        return evened(problem, g, found) if strict else found

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
        most = self.g.shape[-1]
        whole = isinstance(k, int) and 1 <= k <= most
        checks.value_error(whole, lambda: checks.wording("k", f"an int from 1 to {most}", repr(k)))
        values = [self.g.new_empty((*self.f.shape[:-1], 0, k))]
        indices = [values[0].long()]
        for part, x in self._still().tiles(self.g):
            top = torch.softmax(x, -1).topk(k, -1)
            out = self.problem.out(part)
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
        labels, k = self.labels(strict), self.g.shape[-1]
        found = torch.zeros(self.g.shape, dtype=torch.int64, device=labels.device)
        for at in itertools.product(*map(range, labels.shape[:-1])):
            row = labels[at]
            found[at] = torch.bincount(row[row >= 0], minlength=k)
        return found

    def value(self) -> Tensor:
        """<plan, -scores - epsilon bias> + epsilon KL(plan | a b^T) of the optimum [...] float64,
        up to the square of err: epsilon (sum a (f - log a) + sum b (g - log b)).

        With gradient="envelope" this alone has a gradient: minus the plan for the scores.
        """
        problem, f = self.problem, self.f
        if self.envelope:
            f = semi_dual(problem, self.g)
        n, k = f.shape[-1], self.g.shape[-1]
        sides = ((f, problem.log_row, n), (self.g, problem.log_col, k))
        rows, columns = (_side(x, log_mass, size) for x, log_mass, size in sides)
        return (rows + columns) * problem.epsilon

    def entropy(self) -> Tensor:
        """Mean entropy of the codes of the rows [...], in nats; without gradient."""
        total = torch.zeros_like(self.err, dtype=torch.float64)
        rows = torch.zeros_like(total)
        for part, x in self.problem.detached().tiles(self.g.detach()):
            p = torch.softmax(x, -1)
            one = torch.special.entr(p).sum(-1).double()
            out = self.problem.out(part)
            weight = torch.ones_like(one) if out is None else (~out).double()
            one = torch.where(weight > 0, one, 0.0)
            total, rows = total + one.sum(-1), rows + weight.sum(-1)
        return total / rows.clamp(min=1)

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
        checks.shape("scores", other.first, f"[..., M, {k}]", same, "the result")
        return replace(self, problem=other).codes()


def _side(potential: Tensor, log_mass: Tensor | None, size: int) -> Tensor:
    """The sum of a (f - log a); nothing of what has no mass."""
    x = potential.double()
    if log_mass is None:
        return x.sum(-1) / max(size, 1) + (math.log(size) if size else 0.0)
    alive = log_mass > -torch.inf
    log_a = torch.where(alive, log_mass.double(), 0.0)
    return torch.where(alive, log_a.exp() * (torch.where(alive, x, 0.0) - log_a), 0.0).sum(-1)
