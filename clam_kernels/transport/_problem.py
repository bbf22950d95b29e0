# SPDX-License-Identifier: Apache-2.0
"""The operands of a transport problem, and the ops called on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._core.backend import default_precision
from ..ops import sinkhorn as sinkhorn_ops
from ..ops._facts import LARGE_LOGIT, compute_dtype
from ._terms import autocast_off, product, scale_scores

Scores = Tensor | tuple[Tensor, Tensor]
# Logits of one tile in the methods of a result: few on a CPU, so that they fit its cache; many on
# a GPU, where each tile takes a few launches.
TILE_ENTRIES, TILE_ENTRIES_OF_GPU = 1 << 17, 1 << 24


def potentials_dtype(scores: Tensor) -> torch.dtype:
    """The dtype of the potentials: float64 for float64, else float32."""
    return compute_dtype(scores.dtype)


@dataclass(frozen=True)
class TransportProblem:
    """Scores, epsilon and bias, and logarithms of the marginals (uniform where None)."""

    scores: Scores
    epsilon: float | Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_col: Tensor | None
    precision: str | None
    # g minus its float32 value: the methods of a result use both
    g_low: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """The scores, or the features z."""
        return self.scores if isinstance(self.scores, Tensor) else self.scores[0]

    @property
    def n_prototypes(self) -> int:
        """Number of prototypes K."""
        scores = self.scores
        return scores.shape[-1] if isinstance(scores, Tensor) else scores[1].shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the potentials."""
        return potentials_dtype(self.first)

    def scale(self) -> Tensor:
        """1 / epsilon [], the factor of the scores."""
        if isinstance(self.epsilon, Tensor):
            return self.epsilon.to(self.first.device, self.dtype).reciprocal()
        return torch.full((), 1.0 / self.epsilon, dtype=self.dtype, device=self.first.device)

    def detach(self) -> TransportProblem:
        """The problem without gradients."""

        def detach(x: Any) -> Any:
            return x.detach() if isinstance(x, Tensor) else x

        scores = (
            detach(self.scores)
            if isinstance(self.scores, Tensor)
            else (detach(self.scores[0]), detach(self.scores[1]))
        )
        epsilon, bias = detach(self.epsilon), detach(self.bias)
        log_row, log_col = detach(self.log_row), detach(self.log_col)
        return TransportProblem(scores, epsilon, bias, log_row, log_col, self.precision, self.g_low)

    def problem_at(self, index: tuple[int, ...]) -> TransportProblem:
        """One problem of a batch."""

        def part_of(x: Any, core: int) -> Any:
            if not isinstance(x, Tensor) or x.ndim <= core:
                return x
            lead = x.shape[: x.ndim - core]
            inner = index[len(index) - len(lead) :]
            return x[tuple(0 if n == 1 else i for i, n in zip(inner, lead, strict=True))]

        scores = (
            part_of(self.scores, 2)
            if isinstance(self.scores, Tensor)
            else (part_of(self.scores[0], 2), part_of(self.scores[1], 2))
        )
        vectors = (self.bias, self.log_row, self.log_col, self.g_low)
        bias, log_row, log_col, g_low = (part_of(x, 1) for x in vectors)
        return TransportProblem(scores, self.epsilon, bias, log_row, log_col, self.precision, g_low)

    def with_scores(self, scores: Scores) -> TransportProblem:
        """The problem of other rows with uniform masses, for the same prototypes."""
        return replace(self, scores=scores, log_row=None)

    # ---- logits ----------------------------------------------------------------------------------

    def masked_rows(self, rows: slice | Tensor = slice(None)) -> Tensor | None:
        """[..., N] bool: the masked rows among `rows`; None if no row is."""
        return None if self.log_row is None else self.log_row[..., rows] == -torch.inf

    def masked_columns(self) -> Tensor | None:
        """[..., K] bool: the masked prototypes; None if none is."""
        return None if self.log_col is None else self.log_col == -torch.inf

    def logits(self, rows: slice | Tensor, g: Tensor, exact_size: bool = False) -> Tensor:
        """Logits of some rows plus g, in the dtype of the potentials; g alone for masked rows and
        prototypes. Where the largest logit of a row exceeds LARGE_LOGIT, the row may have a
        constant subtracted: that changes no code, and float32 keeps more digits. With `exact_size`
        no constant is subtracted.
        """
        masked_rows, masked_columns = self.masked_rows(rows), self.masked_columns()
        scale = self.scale()
        shift = [x[..., None, :] for x in self._potential_parts(g, masked_columns)]
        if isinstance(self.scores, Tensor):
            x = _zero_masked(self.scores[..., rows, :].to(self.dtype), masked_rows, -1)
            x = _zero_masked(x, masked_columns, -2)
            logits = _add_potential(scale_scores(x, None, scale), shift)
        else:
            z, prototypes = (x.to(self.dtype) for x in self.scores)
            # before the product: in its gradient 0 * NaN would be NaN
            z = _zero_masked(z[..., rows, :], masked_rows, -1)
            prototypes = _zero_masked(prototypes, masked_columns, -1)
            x, scale = self._product(z, prototypes * scale), torch.ones_like(scale)
            logits = _add_potential(x, shift)
        if exact_size or not x.is_cpu or x.dtype == torch.float64:
            return logits
        top = logits.detach().amax(-1, keepdim=True)
        is_large = top.isfinite() & (top.abs() > LARGE_LOGIT)
        if checks.readable(is_large) and not bool(is_large.any()):
            return logits
        base = torch.where(is_large, top / scale.detach(), 0.0)
        return _add_potential(scale_scores(x, base, scale), shift)

    def _potential_parts(self, g: Tensor, masked_columns: Tensor | None) -> list[Tensor]:
        """Tensors in the dtype of the potentials whose sum is g + g_low + bias."""
        if self.bias is None:
            return [g] if self.g_low is None else [g, self.g_low]
        bias = self.bias.double()
        bias = bias if masked_columns is None else torch.where(masked_columns, 0.0, bias)
        total = g.double() + bias  # in float64: one may cancel the other
        if self.g_low is None:
            return [total.to(self.dtype)]
        total = total + self.g_low
        high = total.to(self.dtype)
        low = total - high.double()
        return [high, torch.where(low.isfinite(), low, 0.0).to(self.dtype)]

    def _product(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """The product z @ prototypes^T."""
        # dynamo cannot read torch's precision, a setting of the whole process
        lower = torch.compiler.is_dynamo_compiling() or default_precision() != "highest"
        return product(z, prototypes, self.precision == "highest" and lower)

    def row_chunks(self, g: Tensor, rows: slice | None = None) -> list[slice]:
        """The rows, or all rows, in chunks whose logits fit TILE_ENTRIES; at least one chunk. One
        chunk is enough where autograd saves all results, and where a compiler chooses the tiles.
        """
        if torch.compiler.is_compiling() or self._is_recorded(g):
            return [slice(None) if rows is None else rows]
        entries = TILE_ENTRIES if self.first.is_cpu else TILE_ENTRIES_OF_GPU
        start, stop, step = (slice(None) if rows is None else rows).indices(self.first.shape[-2])
        size = max(1, entries // max(1, g.numel())) * step
        starts = range(start, stop, size) or [start]
        return [slice(index, min(index + size, max(stop, index)), step) for index in starts]

    def _is_recorded(self, g: Tensor) -> bool:
        """Whether autograd records the logits."""
        scores = (self.scores,) if isinstance(self.scores, Tensor) else self.scores
        operands = (g, *scores, self.epsilon, self.bias)
        needs = any(isinstance(x, Tensor) and x.requires_grad for x in operands)
        return needs and torch.is_grad_enabled()

    def tiles(self, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits + g) of each chunk."""
        return ((part, self.logits(part, g)) for part in self.row_chunks(g))

    def map_tiles(
        self,
        g: Tensor,
        function: Callable[[slice, Tensor], Tensor],
        rows: slice | None = None,
        exact_size: bool = False,
    ) -> Tensor:
        """`function(rows, logits + g)` [..., rows, K] of each chunk, in one array."""
        first, *more = self.row_chunks(g, rows)
        logits = function(first, self.logits(first, g, exact_size))
        if not more:
            return logits
        count = len(range(self.first.shape[-2])[slice(None) if rows is None else rows])
        array = logits.new_empty((*logits.shape[:-2], count, logits.shape[-1]))
        index = logits.shape[-2]
        array[..., :index, :] = logits
        for part in more:
            logits = function(part, self.logits(part, g, exact_size))
            array[..., index : index + logits.shape[-2], :] = logits
            index += logits.shape[-2]
        return array

    def ops(self) -> ProblemOps:
        """The ops on this problem."""
        return ProblemOps(self)


def _add_potential(x: Tensor, shift: list[Tensor]) -> Tensor:
    """Logits plus the parts of a potential, in order: the first may cancel large logits."""
    for part in shift:
        x = x + part
    return x


def _zero_masked(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """x, 0 where masked; the mask has all dims of x except `dim`."""
    return x if mask is None else torch.where(mask.unsqueeze(dim), 0.0, x)


class ProblemOps:
    """The Sinkhorn ops with the operands of a problem: of scores, or of features."""

    def __init__(self, problem: TransportProblem) -> None:
        self.problem = problem
        scores = problem.scores
        has_scores = isinstance(scores, Tensor)
        self.entries: tuple[Tensor, ...] = (scores,) if isinstance(scores, Tensor) else scores
        self.iterations: Any = (
            sinkhorn_ops.sinkhorn_potentials
            if has_scores
            else sinkhorn_ops.sinkhorn_potentials_features
        )
        self.step: Any = (
            sinkhorn_ops.sinkhorn_pass if has_scores else sinkhorn_ops.sinkhorn_features_pass
        )
        self.options: dict[str, Any] = {
            "bias": problem.bias, "scale": problem.scale(), "precision": problem.precision
        }  # fmt: skip

    def iterate(
        self, n_iter: int, init: Tensor | None, prototype_first: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(f, g, err, status) after n_iter iterations."""
        masses = {"log_row": self.problem.log_row, "log_col": self.problem.log_col}
        options = {**masses, "init": init, "prototype_first": prototype_first, **self.options}
        with autocast_off(self.problem.first):
            f, g, err, status = self.iterations(*self.entries, n_iter, **options)
        return f, g, err, status

    def one_pass(self, g: Tensor, log_row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(f, log_mass, status) after the rows' half-step at g."""
        with autocast_off(self.problem.first):
            f, log_mass, status = self.step(*self.entries, g, log_row=log_row, **self.options)
        return f, log_mass, status
