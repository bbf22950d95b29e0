# SPDX-License-Identifier: Apache-2.0
"""`swapped_prediction` on a CPU: forward. Row chunks over all views, in tiles of prototypes, never
B x K.

With S'_vik = (z_vi . c_k + b_k) / temperature and h_vi = w_vi / sum_i w_vi:

    q_aik = exp(S_aik / epsilon + f_ai + g_ak),   t_vik = sum_a pairs_av q_aik
    L     = sum_vi h_vi (r_vi lse_vi - sum_k t_vik S'_vik),   r_vi = sum_k t_vik
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.chunk import (
    MAX_VIEWS_ENTRIES,
    VIEWS_ENTRIES,
    VIEWS_ROWS,
    VIEWS_TILE_ENTRIES,
    row_chunks,
)
from ..common.problems import problems
from ..common.score import EXP_FLOOR, compute_dtype, exp_
from .equations import batch_of, default_pairs, is_regular, row_shares

# The score of a masked prototype: finite, because its product with a target of 0 must be 0.
MASKED = -1e30


def fits_one_tile(views: int, k: int) -> bool:
    """Whether a chunk has all prototypes. Forward then computes the gradients too."""
    return max(VIEWS_ROWS.least, views) * k <= MAX_VIEWS_ENTRIES


class SwappedCall(NamedTuple):
    """The arguments of `swapped_prediction`."""

    z: Tensor  # [*, V, B, D]
    prototypes: Tensor  # [*, K, D]
    f: Tensor  # [*, A, B]
    g: Tensor  # [*, A, K]
    temperature: float
    epsilon: float
    bias: Tensor | None  # [*, K]
    target_z: Tensor | None  # [*, A, B, Dt]
    target_prototypes: Tensor | None  # [*, K, Dt]
    target_bias: Tensor | None  # [*, K]
    pairs: Tensor | None  # [*, A, V]
    weight: Tensor | None  # [B] or [*, 1 or V, B]

    @property
    def operands(self) -> tuple[tuple[Tensor | None, int], ...]:
        """The tensors, each with its dims in one problem."""
        first = ((self.z, 3), (self.prototypes, 2), (self.f, 2), (self.g, 2), (self.bias, 1))
        target = ((self.target_z, 3), (self.target_prototypes, 2), (self.target_bias, 1))
        return (*first, *target, (self.pairs, 2), (self.weight, 2))

    @property
    def batch(self) -> torch.Size:
        return batch_of(*self.operands)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.z.dtype)

    @property
    def has_one_tile(self) -> bool:
        return fits_one_tile(self.z.shape[-3], self.prototypes.shape[-2])

    def problems(self) -> Iterator[tuple[tuple[int, ...], SwappedProblem]]:
        """Each problem, by index."""
        for at, tensors in problems(self.batch, *self.operands):
            yield at, SwappedProblem(self, tensors)


class SwappedChunk(NamedTuple):
    """Some rows, in all views; the rows of one sample stand beside each other."""

    part: slice
    rows: Tensor  # [rows, V, D]; a row that is not finite is 0
    targets: Tensor  # [rows, A, Dt], the rows of the teacher
    irregular: Tensor  # [rows, V], which rows are not finite
    irregular_targets: Tensor  # [rows, A]
    share: Tensor  # [rows, V], h


class SwappedState(NamedTuple):
    """The results of all tiles for the rows of a chunk."""

    lse: Tensor  # [rows, V]
    mass: Tensor  # [rows, A], sum_k q; NaN where a code is not finite
    total: Tensor  # [rows, V], r; NaN where a code is not finite
    bad: Tensor  # [rows, V], rows with a weight that are not finite, or whose target is not


class PrototypeScores:
    """`(z . c_k + b_k - shift) / temperature` of some rows, without a copy of the prototypes. The
    shift is the largest bias: no loss depends on it, and float32 would lose digits with it.
    """

    def __init__(
        self, prototypes: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype
    ) -> None:
        self.prototypes, self.factor = prototypes.to(dtype), 1 / temperature
        self.bias = torch.zeros((), dtype=dtype, device=prototypes.device).expand(len(prototypes))
        self.masked: Tensor | None = None
        self.shift = torch.zeros((), dtype=torch.float64, device=prototypes.device)
        if bias is not None:
            wide, masked = bias.double(), bias == -torch.inf
            self.shift = torch.where(wide.amax().isfinite(), wide.amax(), 0.0)
            self.bias = (wide - self.shift).to(dtype)
            if bool(masked.any()):
                self.masked = masked
                self.bias = self.bias.masked_fill(masked, MASKED)
                self.prototypes = self.prototypes.masked_fill(masked[:, None], 0.0)

    def load(self, rows: Tensor, tile: slice, out: Tensor) -> None:
        """The scores of rows [rows, views, D] and one tile of prototypes."""
        left, right, flat = rows.flatten(0, 1), self.prototypes[tile].t(), out.flatten(0, 1)
        torch.addmm(self.bias[tile], left, right, beta=self.factor, alpha=self.factor, out=flat)


class SwappedProblem:
    """One problem: its rows, its prototypes, and its teacher."""

    def __init__(self, call: SwappedCall, tensors: list[Tensor]) -> None:
        self.z, self.prototypes, f, g, bias, target_z, target_c, target_b, pairs, weight = tensors
        self.dtype = dtype = call.dtype
        self.views, self.size, self.k = len(self.z), self.z.shape[1], len(self.prototypes)
        self.g, self.assigned = g.to(dtype), len(f)
        self.temperature, self.epsilon = call.temperature, call.epsilon
        self.student = PrototypeScores(self.prototypes, bias, self.temperature, dtype)
        self.masked = self.student.masked
        self.has_teacher = not (target_z is None and target_c is None and target_b is None)
        if self.has_teacher:
            points = self.prototypes if target_c is None else target_c
            line = bias if target_b is None else target_b
            self.teacher = PrototypeScores(points, line, self.epsilon, dtype)
        shift = (self.teacher if self.has_teacher else self.student).shift
        self.f = (f.double() + shift / self.epsilon).to(dtype)
        self.target_z = self.z[: self.assigned] if target_z is None else target_z
        if pairs is None:
            pairs = default_pairs(self.assigned, self.views, f)
        self.pairs = pairs.to(dtype).mT.contiguous()  # [V, A]
        self.share = row_shares(weight, self.views, self.size, f)  # [V, B]
        rows = self.views
        if call.has_one_tile:
            limit = max(VIEWS_ROWS.least // rows, VIEWS_ENTRIES // (rows * self.k), 1)
            self.width = self.k
        else:
            limit = max(VIEWS_ROWS.most // rows, 1)
            self.width = min(self.k, max(VIEWS_TILE_ENTRIES // (limit * rows), 1))
        self.limit = min(limit, max(self.size, 1))
        entries = self.limit * self.width * (self.views + self.assigned)
        self.scratch = torch.empty(entries, dtype=dtype, device=self.z.device)

    def chunks(self) -> Iterator[SwappedChunk]:
        """Each chunk of rows."""
        for part in row_chunks(self.size, self.limit):
            rows, irregular = self._load(self.z, part)
            targets, other = rows, irregular
            if self.has_teacher:
                targets, other = self._load(self.target_z, part)
            share = self.share[:, part].mT.to(self.dtype)
            other = other[:, : self.assigned]
            yield SwappedChunk(part, rows, targets, irregular, other, share)

    def _load(self, z: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Some rows [rows, views, D], and which of them are not finite."""
        rows = z[:, part].transpose(0, 1).to(self.dtype).contiguous()
        irregular = ~is_regular(rows)
        if bool(irregular.any()):
            rows = rows.masked_fill(irregular[..., None], 0.0)
        return rows, irregular

    def tiles(self) -> Iterator[slice]:
        """The prototypes of each tile."""
        return row_chunks(self.k, self.width)

    def load(self, chunk: SwappedChunk, tile: slice) -> tuple[Tensor, Tensor]:
        """Scores S' [rows, V, tile] and codes q [rows, A, tile] of one tile."""
        n, k = len(chunk.rows), tile.stop - tile.start
        entries = n * self.views * k
        scores = self.scratch[:entries].view(n, self.views, k)
        codes = self.scratch[entries : entries + n * self.assigned * k].view(n, self.assigned, k)
        self.student.load(chunk.rows, tile, scores)
        if not self.has_teacher:
            part = scores[:, : self.assigned]
            torch.add(self.g[:, tile], part, alpha=self.temperature / self.epsilon, out=codes)
        else:
            self.teacher.load(chunk.targets, tile, codes)
            codes.add_(self.g[:, tile])
        codes.add_(self.f[:, chunk.part].mT[..., None])
        return scores, exp_(codes, EXP_FLOOR[codes.dtype])

    def state(self, chunk: SwappedChunk, lse: Tensor, mass: Tensor) -> SwappedState:
        """The state of a chunk from its log-sum-exps and the masses of its codes."""
        mass = mass.masked_fill(chunk.irregular_targets, torch.nan)
        terms = self.pairs * mass[:, None]  # [rows, V, A]
        total = torch.where(self.pairs == 0, 0.0, terms).sum(-1)
        bad = (chunk.irregular | ~total.isfinite()) & (chunk.share != 0)
        return SwappedState(lse, mass, total, bad)

    def losses(
        self, chunk: SwappedChunk, state: SwappedState, log_sums: Tensor, products: Tensor
    ) -> Tensor:
        """The loss of each row [rows, V] in float64: `r log_sums - sum_a pairs_av products_va`,
        where the largest score is subtracted from all scores of a row.
        """
        terms = torch.where(self.pairs == 0, 0.0, self.pairs * products).double()
        losses = state.total.double() * log_sums.double() - terms.sum(-1)
        losses = losses.masked_fill(chunk.share == 0, 0.0)
        return losses.masked_fill(state.bad, torch.nan)


class RowFold:
    """The running state of a chunk: the largest score of each row and the sum of the exponentials
    of its scores less that, the mass of each code, and the product of each row's scores, less the
    largest, with each code.
    """

    def __init__(self, one: SwappedProblem, chunk: SwappedChunk) -> None:
        self.one, (n, views) = one, chunk.share.shape
        self.top = torch.full_like(chunk.share, MASKED)
        self.sums = torch.zeros_like(chunk.share)
        self.mass = chunk.share.new_zeros(n, one.assigned)
        self.products = chunk.share.new_zeros(n, views, one.assigned)
        self.has_masked_mass = torch.zeros_like(self.products, dtype=torch.bool)

    def add(self, scores: Tensor, codes: Tensor, tile: slice) -> None:
        """Fold a tile; this replaces its scores by their exponentials, less the largest so far."""
        top = torch.maximum(self.top, scores.amax(-1))
        rise = torch.where(self.sums == 0, 0.0, top - self.top)
        self.products -= rise[..., None] * self.mass[:, None]
        self.products.baddbmm_(scores.sub_(top[..., None]), codes.mT)
        self.mass += codes.sum(-1)
        exp_(scores, EXP_FLOOR[scores.dtype])
        self.sums = self.sums * (-rise).exp() + scores.sum(-1)
        self.top = top
        if self.one.masked is not None:  # a target on a masked prototype has an infinite loss
            has_mass = (codes[..., self.one.masked[tile]] > 0).any(-1)
            self.has_masked_mass |= has_mass[:, None]

    def finish(self, chunk: SwappedChunk) -> tuple[SwappedState, Tensor]:
        """The state of the chunk, and the loss of each row."""
        log_sums, products = self.sums.log(), self.products
        state = self.one.state(chunk, self.top + log_sums, self.mass)
        if self.one.masked is not None:
            products = products.masked_fill(self.has_masked_mass, -torch.inf)
        return state, self.one.losses(chunk, state, log_sums, products)


def fold_tiles(one: SwappedProblem, chunk: SwappedChunk) -> tuple[SwappedState, Tensor]:
    """The state and the losses of a chunk, tile by tile."""
    fold = RowFold(one, chunk)
    for tile in one.tiles():
        scores, codes = one.load(chunk, tile)
        fold.add(scores, codes, tile)
    return fold.finish(chunk)


def loss_of(chunk: SwappedChunk, losses: Tensor) -> Tensor:
    """The share of a chunk in the loss of its problem."""
    return torch.where(chunk.share == 0, 0.0, chunk.share.double() * losses).sum()


def swapped_prediction_forward(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    bias: Tensor | None = None,
    target_z: Tensor | None = None,
    target_prototypes: Tensor | None = None,
    target_bias: Tensor | None = None,
    pairs: Tensor | None = None,
    weight: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`swapped_prediction` in row chunks."""
    target = (target_z, target_prototypes, target_bias)
    call = SwappedCall(z, prototypes, f, g, temperature, epsilon, bias, *target, pairs, weight)
    out = z.new_zeros(call.batch, dtype=torch.float64)
    for at, one in call.problems():
        for chunk in one.chunks():
            out[at] += loss_of(chunk, fold_tiles(one, chunk)[1])
    return out.to(call.dtype)
