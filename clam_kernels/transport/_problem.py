# SPDX-License-Identifier: Apache-2.0
"""A transport problem as it was given, and the ops called on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import sinkhorn as ops

Scores = Tensor | tuple[Tensor, Tensor]
# Logits that are held at once where only labels or sums are asked for.
TILE_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Problem:
    """Scores over epsilon plus bias, and logarithms of the marginals (uniform where None)."""

    scores: Scores
    epsilon: float | Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_col: Tensor | None
    precision: str | None

    @property
    def first(self) -> Tensor:
        return self.scores if isinstance(self.scores, Tensor) else self.scores[0]

    @property
    def n_prototypes(self) -> int:
        scores = self.scores
        return scores.shape[-1] if isinstance(scores, Tensor) else scores[1].shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """That of the potentials."""
        return torch.float64 if self.first.dtype == torch.float64 else torch.float32

    @property
    def learnt(self) -> bool:
        """Whether epsilon has a gradient."""
        return isinstance(self.epsilon, Tensor) and self.epsilon.requires_grad

    def detached(self) -> Problem:
        """The same without gradients."""

        def cut(x: Any) -> Any:
            return x.detach() if isinstance(x, Tensor) else x

        scores = (
            cut(self.scores)
            if isinstance(self.scores, Tensor)
            else (cut(self.scores[0]), cut(self.scores[1]))
        )
        epsilon, bias = cut(self.epsilon), cut(self.bias)
        log_row, log_col = cut(self.log_row), cut(self.log_col)
        return Problem(scores, epsilon, bias, log_row, log_col, self.precision)

    def at(self, place: tuple[int, ...]) -> Problem:
        """One problem of a batch."""

        def one(x: Any, core: int) -> Any:
            if not isinstance(x, Tensor) or x.ndim <= core:
                return x
            lead = x.shape[: x.ndim - core]
            inner = place[len(place) - len(lead) :]
            return x[tuple(0 if n == 1 else i for i, n in zip(inner, lead, strict=True))]

        scores = (
            one(self.scores, 2)
            if isinstance(self.scores, Tensor)
            else (one(self.scores[0], 2), one(self.scores[1], 2))
        )
        bias, log_row, log_col = (one(x, 1) for x in (self.bias, self.log_row, self.log_col))
        return Problem(scores, self.epsilon, bias, log_row, log_col, self.precision)

    def of(self, scores: Scores) -> Problem:
        """Other rows, uniform, for the same prototypes."""
        return replace(self, scores=scores, log_row=None)

    # ---- logits ----------------------------------------------------------------------------------

    def out(self, rows: slice | Tensor = slice(None)) -> Tensor | None:
        """Which of some rows take no part [..., N]."""
        return None if self.log_row is None else self.log_row[..., rows] == -torch.inf

    def out_columns(self) -> Tensor | None:
        """Which prototypes take no part [..., K]."""
        return None if self.log_col is None else self.log_col == -torch.inf

    def features(self) -> tuple[Tensor, Tensor]:
        """(z, prototypes / epsilon) as they are multiplied. The quotient keeps their dtype, but for
        float16, whose range it leaves: that is float32.
        """
        z, prototypes = self.scores
        prototypes = _without(prototypes, self.out_columns(), -1)
        if z.dtype == torch.float16:
            z, prototypes = z.float(), prototypes.float()
        if _is_one(self.epsilon):
            return z, prototypes
        return z, (prototypes / self.epsilon).to(prototypes.dtype)

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Logits of some rows in the dtype of the potentials, 0 where nothing takes part."""
        out, columns = self.out(rows), self.out_columns()
        if isinstance(self.scores, Tensor):
            return self.scaled(self.scores[..., rows, :].to(self.dtype), out, columns)
        z, prototypes = (x.to(self.dtype) for x in self.features())
        # not only after the product: 0 times NaN would be a gradient
        x = _without(z[..., rows, :], out, -1) @ prototypes.mT
        return self._biased(x, columns)

    def scaled(self, x: Tensor, out: Tensor | None, columns: Tensor | None) -> Tensor:
        """Scores over epsilon, plus the bias; 0 where nothing takes part."""
        x = _without(_without(x, out, -1), columns, -2)
        if not self.learnt:
            x = x if _is_one(self.epsilon) else x / self.epsilon
            return self._biased(x, columns)
        shut = x == -torch.inf  # infinite over epsilon has no gradient
        x = (x.masked_fill(shut, 0.0) / self.epsilon).masked_fill(shut, -torch.inf)
        return self._biased(x, columns)

    def _biased(self, x: Tensor, columns: Tensor | None) -> Tensor:
        if self.bias is None:
            return x
        bias = self.bias.to(x.dtype)
        bias = bias if columns is None else torch.where(columns, 0.0, bias)
        return x + bias[..., None, :]

    def tiles(self, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits + g) in chunks."""
        n, k = self.first.shape[-2], g.shape[-1]
        problems = max(1, g.numel() // k)
        step = max(1, TILE_ENTRIES // (k * problems))
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            yield part, self.logits(part) + g[..., None, :]

    def calls(self) -> Calls:
        """The ops on this problem."""
        return Calls(self)


def _is_one(epsilon: float | Tensor) -> bool:
    return not isinstance(epsilon, Tensor) and epsilon == 1


def _without(x: Tensor, out: Tensor | None, dim: int) -> Tensor:
    """0 where an entry of `out` says so, which lacks a dim of x."""
    return x if out is None else torch.where(out.unsqueeze(dim), 0.0, x)


class Calls:
    """The ops on a problem. Scores are scaled once: an array of their own unless epsilon is 1."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rest: dict[str, Any] = {"precision": problem.precision}
        self.ops: tuple[Any, Any]
        self.entries: tuple[Tensor, ...]
        scores = problem.scores
        if isinstance(scores, Tensor):
            # the ops leave out what takes no part; epsilon's gradient sees it
            out = (problem.out(), problem.out_columns()) if problem.learnt else (None, None)
            half = scores.dtype not in (torch.float32, torch.float64)
            x = scores.float() if half and not _is_one(problem.epsilon) else scores
            self.entries = (problem.scaled(x, *out),)
            self.ops = ops.sinkhorn, ops.sinkhorn_pass
        else:
            self.entries, self.rest["bias"] = problem.features(), problem.bias
            self.ops = ops.sinkhorn_features, ops.sinkhorn_features_pass

    def iterated(
        self, n_iter: int, init: Tensor | None, prototype_first: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(f, g, err, status) after a number of iterations."""
        masses = {"log_row": self.problem.log_row, "log_col": self.problem.log_col}
        rest = {**masses, "init": init, "prototype_first": prototype_first, **self.rest}
        f, g, err, status = self.ops[0](*self.entries, n_iter, **rest)
        return f, g, err, status

    def one_pass(self, g: Tensor, log_row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(f, log_mass, status) after the rows' step at g."""
        f, log_mass, status = self.ops[1](*self.entries, g, log_row=log_row, **self.rest)
        return f, log_mass, status
