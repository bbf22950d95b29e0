# SPDX-License-Identifier: Apache-2.0
"""A transport problem as it was given, and the ops called on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._core.backend import default_precision
from ..ops import sinkhorn as ops
from ._terms import autocast_off, product, scaled

Scores = Tensor | tuple[Tensor, Tensor]
# Logits in memory at once where a result is read: few on a CPU, whose cache holds them; many on a
# GPU, where each tile is a few launches.
TILE_ENTRIES, TILE_ENTRIES_OF_GPU = 1 << 17, 1 << 24
# A potential beyond this has lost more than 2^-19 in float32.
LARGE = 32.0
# A row whose largest logit is beyond this has lost more than 2^-16 in float32.
FAR = 256.0


def potentials_dtype(scores: Tensor) -> torch.dtype:
    """The dtype of the potentials: float64 for float64, else float32."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """Scores, epsilon and bias, and logarithms of the marginals (uniform where None)."""

    scores: Scores
    epsilon: float | Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_col: Tensor | None
    precision: str | None
    # what float32 leaves out of the g at which results are read
    low: Tensor | None = None

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
        return potentials_dtype(self.first)

    def scale(self) -> Tensor:
        """1 / epsilon [], which multiplies the scores wherever they are read."""
        if isinstance(self.epsilon, Tensor):
            return self.epsilon.to(self.first.device, self.dtype).reciprocal()
        return torch.full((), 1.0 / self.epsilon, dtype=self.dtype, device=self.first.device)

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
        return Problem(scores, epsilon, bias, log_row, log_col, self.precision, self.low)

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
        vectors = (self.bias, self.log_row, self.log_col, self.low)
        bias, log_row, log_col, low = (one(x, 1) for x in vectors)
        return Problem(scores, self.epsilon, bias, log_row, log_col, self.precision, low)

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

    def logits(self, rows: slice | Tensor, g: Tensor, whole: bool = False) -> Tensor:
        """Logits of some rows plus g, in the dtype of the potentials; g alone where nothing takes
        part. Unless they are `whole` a row is less a constant where its largest is FAR, which would
        take digits from all of them in float32 and changes no code.
        """
        out, columns, scale = self.out(rows), self.out_columns(), self.scale()
        shift = [x[..., None, :] for x in self._parts(g, columns)]
        if isinstance(self.scores, Tensor):
            x = _without(self.scores[..., rows, :].to(self.dtype), out, -1)
            x = _without(x, columns, -2)
            found = _with(scaled(x, None, scale), shift)
        else:
            z, prototypes = (x.to(self.dtype) for x in self.scores)
            # not only after the product: 0 times NaN would be a gradient
            z, prototypes = _without(z[..., rows, :], out, -1), _without(prototypes, columns, -1)
            x, scale = self._product(z, prototypes * scale), torch.ones_like(scale)
            found = _with(x, shift)
        if whole or not x.is_cpu or x.dtype == torch.float64:
            return found
        top = found.detach().amax(-1, keepdim=True)
        far = top.isfinite() & (top.abs() > FAR)
        if checks.readable(far) and not bool(far.any()):
            return found
        base = torch.where(far, top / scale.detach(), 0.0)
        return _with(scaled(x, base, scale), shift)

    def _parts(self, g: Tensor, columns: Tensor | None) -> list[Tensor]:
        """Values of the potentials' dtype whose sum is g with the bias."""
        if self.bias is None:
            return [g] if self.low is None else [g, self.low]
        bias = self.bias.double()
        bias = bias if columns is None else torch.where(columns, 0.0, bias)
        whole = g.double() + bias  # in float64, where one may cancel the other
        if self.low is None:
            return [whole.to(self.dtype)]
        whole = whole + self.low
        high = whole.to(self.dtype)
        rest = whole - high.double()
        return [high, torch.where(rest.isfinite(), rest, 0.0).to(self.dtype)]

    def _product(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """The product z @ prototypes^T."""
        # dynamo cannot ask for torch's own precision, which is a switch of the whole process
        lower = torch.compiler.is_dynamo_compiling() or default_precision() != "highest"
        return product(z, prototypes, self.precision == "highest" and lower)

    def runs(self, g: Tensor, rows: slice | None = None) -> list[slice]:
        """All rows, or some, in runs whose logits are in memory at once: at least one run. It is
        the only one where autograd keeps the results anyway, and where a compiler finds its own.
        """
        if torch.compiler.is_compiling() or self._recorded(g):
            return [slice(None) if rows is None else rows]
        entries = TILE_ENTRIES if self.first.is_cpu else TILE_ENTRIES_OF_GPU
        start, stop, step = (slice(None) if rows is None else rows).indices(self.first.shape[-2])
        size = max(1, entries // max(1, g.numel())) * step
        starts = range(start, stop, size) or [start]
        return [slice(at, min(at + size, max(stop, at)), step) for at in starts]

    def _recorded(self, g: Tensor) -> bool:
        """Whether autograd records what is read."""
        scores = (self.scores,) if isinstance(self.scores, Tensor) else self.scores
        given = (g, *scores, self.epsilon, self.bias)
        needs = any(isinstance(x, Tensor) and x.requires_grad for x in given)
        return needs and torch.is_grad_enabled()

    def tiles(self, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits + g) of each run."""
        return ((part, self.logits(part, g)) for part in self.runs(g))

    def joined(
        self,
        g: Tensor,
        read: Callable[[slice, Tensor], Tensor],
        rows: slice | None = None,
        whole: bool = False,
    ) -> Tensor:
        """What `read(rows, logits + g)` returns for each run [..., rows, K], in one array."""
        first, *more = self.runs(g, rows)
        found = read(first, self.logits(first, g, whole))
        if not more:
            return found
        count = len(range(self.first.shape[-2])[slice(None) if rows is None else rows])
        array = found.new_empty((*found.shape[:-2], count, found.shape[-1]))
        at = found.shape[-2]
        array[..., :at, :] = found
        for part in more:
            found = read(part, self.logits(part, g, whole))
            array[..., at : at + found.shape[-2], :] = found
            at += found.shape[-2]
        return array

    def calls(self) -> Calls:
        """The ops on this problem."""
        return Calls(self)


def _with(x: Tensor, shift: list[Tensor]) -> Tensor:
    """Logits with potentials added, the first of which may cancel large ones."""
    for part in shift:
        x = x + part
    return x


def _without(x: Tensor, out: Tensor | None, dim: int) -> Tensor:
    """0 where an entry of `out` says so, which lacks a dim of x."""
    return x if out is None else torch.where(out.unsqueeze(dim), 0.0, x)


class Calls:
    """The ops on a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        scores = problem.scores
        stored = isinstance(scores, Tensor)
        self.entries: tuple[Tensor, ...] = (scores,) if isinstance(scores, Tensor) else scores
        self.iterations: Any = (
            ops.sinkhorn_potentials if stored else ops.sinkhorn_potentials_features
        )
        self.step: Any = ops.sinkhorn_pass if stored else ops.sinkhorn_features_pass
        self.rest: dict[str, Any] = {
            "bias": problem.bias, "scale": problem.scale(), "precision": problem.precision
        }  # fmt: skip

    def iterated(
        self, n_iter: int, init: Tensor | None, prototype_first: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(f, g, err, status) after a number of iterations."""
        masses = {"log_row": self.problem.log_row, "log_col": self.problem.log_col}
        rest = {**masses, "init": init, "prototype_first": prototype_first, **self.rest}
        with autocast_off(self.problem.first):
            f, g, err, status = self.iterations(*self.entries, n_iter, **rest)
        return f, g, err, status

    def one_pass(self, g: Tensor, log_row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(f, log_mass, status) after the rows' step at g."""
        with autocast_off(self.problem.first):
            f, log_mass, status = self.step(*self.entries, g, log_row=log_row, **self.rest)
        return f, log_mass, status
