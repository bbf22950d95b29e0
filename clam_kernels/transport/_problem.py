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
    def dtype(self) -> torch.dtype:
        """That of the potentials."""
        return torch.float64 if self.first.dtype == torch.float64 else torch.float32

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

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows in the dtype of the potentials."""
        if isinstance(self.scores, Tensor):
            x = self.scores[..., rows, :].to(self.dtype)
        else:
            z, prototypes = (t.to(self.dtype) for t in self.scores)
            x = z[..., rows, :] @ prototypes.mT
        x = x / self.epsilon
        return x if self.bias is None else x + self.bias.to(x.dtype)[..., None, :]

    def tiles(self, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits + g) in chunks."""
        n, k = self.first.shape[-2], g.shape[-1]
        problems = max(1, g.numel() // k)
        step = max(1, TILE_ENTRIES // (k * problems))
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            yield part, self.logits(part) + g[..., None, :]

    def out(self, rows: slice) -> Tensor | None:
        """Which of some rows take no part."""
        return None if self.log_row is None else self.log_row[..., rows] == -torch.inf

    def calls(self) -> Calls:
        """The ops on this problem."""
        return Calls(self)


class Calls:
    """The ops on a problem. Scores are scaled once: an array of their own unless epsilon is 1."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        scores, epsilon, bias = problem.scores, problem.epsilon, problem.bias
        plain = isinstance(epsilon, (int, float)) and epsilon == 1
        self.rest: dict[str, Any] = {"precision": problem.precision}
        self.ops: tuple[Any, Any]
        self.entries: tuple[Tensor, ...]
        if isinstance(scores, Tensor):
            x = scores if scores.dtype == torch.float64 or plain else scores.float()
            learnt = isinstance(epsilon, Tensor) and epsilon.requires_grad
            if learnt and problem.log_row is not None:  # NaN there would be epsilon's gradient too
                x = torch.where(problem.log_row[..., None] == -torch.inf, 0.0, x)
            x = x if plain else x / epsilon
            self.entries = (x if bias is None else x + bias[..., None, :],)
            self.ops = ops.sinkhorn, ops.sinkhorn_pass
        else:
            z, prototypes = scores
            scaled = prototypes if plain else (prototypes / epsilon).to(z.dtype)
            self.entries, self.rest["bias"] = (z, scaled), bias
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
