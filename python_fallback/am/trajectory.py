# SPDX-License-Identifier: Apache-2.0
"""The states of one chunk in all steps, their gradients, and the sums over rows that the gradients
of the memories need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.chunk import SAVED_ENTRIES, BatchCell, GradientSum, round_up, take
from ..common.score import softmax_backward_
from .exact import ExactSums
from .problem import (
    ROWS,
    CellMemories,
    MemoryProblem,
    RowProducts,
    advance,
    mask_union,
    problem_of,
)


class MemorySums:
    """Sums over rows for the gradients of rho, beta and log_weights: within a chunk in the compute
    dtype, over chunks in float64.

    With h = gain * g, p the weights and gz = p (s - sum_j p_j s_j) of s_k = <h, rho_k>, they are
    sum_n p_nk h_n [b, D, K], sum_n gz_nk x_n [b, D, K], sum_n gz_nk and sum_n gz_nk |x_n|^2
    [b, 1, K]: transposed, because these products run faster.
    """

    def __init__(self, p: MemoryProblem, cell: BatchCell) -> None:
        heights = (p.padded_features, p.padded_features, 1, 1)
        self.chunk = [
            p.rho.new_zeros((cell.size, height, p.padded_memories), dtype=p.dtype)
            for height in heights
        ]
        self.total = [torch.zeros_like(part, dtype=torch.float64) for part in self.chunk]
        self.shared_beta = p.rho.new_zeros((cell.size, 1), dtype=torch.float64)

    def fold(self) -> None:
        """Add the sums of the chunk to the totals, and set them to 0."""
        for part, total in zip(self.chunk, self.total, strict=True):
            total += part
            part.zero_()

    def gradients(self, memories: CellMemories) -> tuple[Tensor, Tensor, Tensor]:
        """(rho [b, K, D], beta [b, K] or [b, 1], log_weights [b, K]):

        rho_k: sum_n p_nk h_n + 2 beta_k sum_n gz_nk (x_n - rho_k);
        beta_k: -sum_n gz_nk |x_n - rho_k|^2; log w_k: sum_n gz_nk.
        """
        h_sum, x_sum, gz_sum, norm_sum = self.total
        rho, norms = memories.flipped.double(), memories.norms.double()
        from_logits = 2 * memories.beta.double() * (x_sum - gz_sum * rho)
        beta = self.shared_beta
        if memories.per_memory:
            beta = 2 * (rho * x_sum).sum(1, keepdim=True) - norms * gz_sum - norm_sum
            beta = beta[:, 0]
        return (h_sum + from_logits).mT, beta, gz_sum[:, 0]


class Trajectory:
    """The states and weights of one chunk in all steps: computed from v, then differentiated."""

    def __init__(
        self,
        p: MemoryProblem,
        cell: BatchCell,
        memories: CellMemories,
        limit: int,
        steps: int,
        step: float,
        needs_beta: bool,
    ) -> None:
        self.p, self.cell, self.memories, self.steps, self.step = p, cell, memories, steps, step
        self.needs_shared_beta = needs_beta and not memories.per_memory
        self.sums = MemorySums(p, cell)
        self.saves_weights = saves_weights(p, steps)
        weight_tiles = max(steps if self.saves_weights else 1, 1)
        self.feature_tiles = [
            p.tile(cell, limit, p.padded_features) for _ in range(5 + max(steps, 1))
        ]
        self.memory_tiles = [
            p.tile(cell, limit, p.padded_memories) for _ in range(1 + weight_tiles)
        ]
        self.columns = [p.tile(cell, limit, 1) for _ in range(2)]
        self.norms = memories.norms.mT.expand(cell.size, -1, -1)
        self.ones = torch.ones_like(self.norms)
        # [b, K, D]: gz @ scaled_rho = 2 sum_k gz_k rho_k, with beta_k where the betas differ
        self.scaled_rho = memories.keys.mT.contiguous() if memories.per_memory else 2 * memories.rho
        self.height = 0
        self.doubt: Tensor | None = None
        self.products = RowProducts(p, cell, limit)

    def forward(self, rows: slice) -> None:
        """Compute the states of one chunk. Then `doubt` has its rows in doubt."""
        self.rows, self.n = rows, rows.stop - rows.start
        self._set_height(round_up(self.n, ROWS))
        memories = self.memories
        self.p.load(self.cell, rows, memories, self.states[0])
        no_doubt = memories.rule.is_free_of_doubt(self.states[0], self.step)
        self.gain = self.p.gain(self.cell, rows, memories, self.step)
        self.doubt = None
        for t in range(self.steps):
            x, is_last = self.states[t], t + 1 == self.steps
            weights = memories.weights(x, self.weights[t])
            is_full_step = self.gain is None and self.step == 1 and not is_last
            recalled = self.states[t + 1] if is_full_step else self.recalled
            if no_doubt and is_last:
                break
            torch.bmm(weights, memories.rho, out=recalled)
            if not no_doubt:
                more = self.products.rows_in_doubt(memories, x, recalled, weights, self.n)
                self.doubt = mask_union(self.doubt, more)
            if not is_last:
                following = self.states[t + 1]
                if not is_full_step:
                    following[:, self.n :].zero_()  # `advance` does not write them
                advance(x, recalled, following, self.n, self.step, self.gain)
        self.doubt = self.p.finite_rows_in_doubt(self.cell, rows, memories, self.doubt)
        if self.doubt is not None:
            self._clear(self.doubt)

    def _clear(self, doubt: Tensor) -> None:
        """Set states and weights of the rows in doubt to 0: they may be NaN or inf, and 0 * NaN is
        NaN.
        """
        for tile in (*self.states, *(self.weights if self.saves_weights else ())):
            tile[:, : self.n].masked_fill_(doubt[..., None], 0.0)

    def _set_height(self, height: int) -> None:
        """Views of the tiles for a chunk of `height` padded rows; most chunks have the same."""
        if height == self.height:
            return
        self.height = height
        self.gz_sums, self.norm_terms = (tile[:, :height] for tile in self.columns)
        self.g, self.h, self.recalled, self.gz_rho, self.beta_terms, *self.states = (
            tile[:, :height] for tile in self.feature_tiles
        )
        self.scores, *self.weights = (tile[:, :height] for tile in self.memory_tiles)
        if not self.saves_weights:
            self.weights = self.weights * self.steps

    def backward(self, grad: Tensor, mask_total: GradientSum | None) -> Tensor:
        """Gradient of the chunk's rows of v. Adds to the sums, and to the gradient of the mask."""
        g, h, n = self.g, self.h, self.n
        self.p.fill(g, take(grad, self.cell, self.rows))
        if self.doubt is not None:
            g[:, :n].masked_fill_(self.doubt[..., None], 0.0)
        if self.needs_shared_beta:
            self.beta_terms.zero_()
            self.norm_terms.zero_()
        for t in reversed(range(self.steps)):
            x, weights = self.states[t], self.weights[t]
            if not self.saves_weights:
                self.memories.weights(x, weights)
            if mask_total is not None:
                self._add_mask_gradient(x, weights, mask_total)
            if self.gain is not None:
                h.copy_(g)[:, :n].mul_(self.gain)
            elif self.step != 1:
                torch.mul(g, self.step, out=h)
            self._backward_step(x, weights, g if self.gain is None and self.step == 1 else h)
        self.sums.fold()
        if self.needs_shared_beta:
            rows = self.beta_terms.sum(-1, dtype=torch.float64) - self.norm_terms[..., 0]
            self.sums.shared_beta += rows.sum(-1, keepdim=True)
        return g[:, :n, : self.p.features]

    def _add_mask_gradient(self, x: Tensor, weights: Tensor, total: GradientSum) -> None:
        """Gradient of update_mask: step * g * (recalled - x), 0 where all memories are masked."""
        torch.bmm(weights, self.memories.rho, out=self.recalled)
        product = self.recalled.sub_(x).mul_(self.g)[:, : self.n, : self.p.features]
        active = self.memories.any_active
        total.add(
            self.cell, product * (self.step if active is None else self.step * active), self.rows
        )

    def _backward_step(self, x: Tensor, weights: Tensor, h: Tensor) -> None:
        """One step back from the state after it to its input x: g becomes
        g - h + 2 sum_k beta_k gz_k (rho_k - x), and the sums of `MemorySums` grow; h = gain * g, or
        g itself for a gain of 1.
        """
        g, memories, scores, gz_rho = self.g, self.memories, self.scores, self.gz_rho
        h_sum, x_sum, gz_sum, norm_sum = self.sums.chunk
        h_sum.baddbmm_(h.mT, weights)
        torch.bmm(h, memories.flipped, out=scores)
        softmax_backward_(scores, weights)  # scores is gz from here on
        x_sum.baddbmm_(x.mT, scores)
        gz_sum.add_(scores.sum(1, keepdim=True))
        torch.bmm(scores, self.scaled_rho, out=gz_rho)
        if memories.per_memory:
            g.sub_(h).add_(gz_rho).addcmul_(scores @ memories.beta.mT, x, value=-2)
            norm_sum.baddbmm_(x.square().sum(-1, keepdim=True).mT, scores)
            return
        # gz_rho - 2 x sum_k gz_k = 2 sum_k gz_k (rho_k - x). That sum is 0 except for rounding,
        # which counts where |rho| is much larger than |rho - x|.
        torch.bmm(scores, self.ones, out=self.gz_sums)
        gz_rho.addcmul_(x, self.gz_sums, value=-2)
        if h is g:
            torch.mul(gz_rho, memories.beta, out=g)
        else:
            g.sub_(h).addcmul_(gz_rho, memories.beta)
        if self.needs_shared_beta:
            # -sum_k gz_k |x - rho_k|^2 of each row: its large terms must cancel before rows add up
            self.beta_terms.addcmul_(gz_rho.addcmul_(x, self.gz_sums), x)
            self.norm_terms.baddbmm_(scores, self.norms)


def saves_weights(p: MemoryProblem, steps: int) -> bool:
    """Whether a chunk saves the weights of all steps, instead of computing them again."""
    return steps * p.padded_memories * 16 <= SAVED_ENTRIES


def gradient_totals(p: MemoryProblem, needs: Sequence[bool]) -> list[GradientSum | None]:
    """One sum for each of v, rho, beta, update_mask, log_weights that needs a gradient."""
    batched = (p.v, p.rho, p.beta, p.mask, p.log_weights)
    dtypes = (p.dtype, torch.float64, torch.float64, p.dtype, torch.float64)
    return [
        GradientSum(operand, like, dtype)
        if need and isinstance(operand, Tensor) and isinstance(like, Tensor)
        else None
        for operand, like, dtype, need in zip(p.operands, batched, dtypes, needs, strict=True)
    ]


def gradient_results(p: MemoryProblem, totals: Sequence[GradientSum | None]) -> tuple[Tensor, ...]:
    """The gradient of each operand; empty where it needs none."""
    return tuple(p.v.new_empty(0) if total is None else total.result() for total in totals)


def add_memory_gradients(
    p: MemoryProblem,
    totals: Sequence[GradientSum | None],
    cell: BatchCell,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add a cell's gradients of (rho, beta, log_weights), without their padding, to the totals."""
    rho, beta, weights = gradients
    trimmed = (rho[:, : p.size, : p.features], beta[:, : p.size], weights[:, : p.size])
    for total, value in zip((totals[1], totals[2], totals[4]), trimmed, strict=True):
        if total is not None:
            total.add(cell, value)


class CellExactRows:
    """The rows in doubt of one cell, computed again, and the sums of their gradients."""

    def __init__(
        self, p: MemoryProblem, cell: BatchCell, memories: CellMemories, step: float
    ) -> None:
        self.p, self.cell, self.step, self.centre = p, cell, step, memories.centre
        self.sums: dict[int, ExactSums] = {}

    def _sums_of(self, index: int) -> ExactSums:
        """The sums of one problem of the cell."""
        if index not in self.sums:
            self.sums[index] = ExactSums(self.p.exact(self.cell, index, self.centre))
        return self.sums[index]

    def forward(self, rows: slice, doubt: Tensor, out: Tensor, steps: int) -> None:
        """Write the rows in doubt into out [cell, n, D]."""
        for index, places, x, gain in self.p.exact_inputs(self.cell, rows, doubt, self.step):
            out[index, places] = self._sums_of(index).exact.advance(x, gain, steps).to(out.dtype)

    def energy(self, rows: slice, doubt: Tensor, out: Tensor) -> None:
        """Write the energy of the rows in doubt into out [cell, n, 1]."""
        for index, places, x, _ in self.p.exact_inputs(self.cell, rows, doubt, 1.0):
            out[index, places, 0] = self._sums_of(index).exact.energy(x).to(out.dtype)

    def backward(
        self, rows: slice, doubt: Tensor, grad: Tensor, out: Tensor, steps: int,
        mask_total: GradientSum | None,
    ) -> None:  # fmt: skip
        """Write the gradients of the rows in doubt into out [cell, n, D], and add to the sums."""
        grad = take(grad, self.cell, rows)
        grad_mask = None if mask_total is None else torch.zeros_like(out, dtype=torch.float64)
        for index, places, x, gain in self.p.exact_inputs(self.cell, rows, doubt, self.step):
            g = problem_of(grad, index)[places].double()
            grad_x, grad_gain = self._sums_of(index).backward(x, g, gain, steps)
            out[index, places] = grad_x.to(out.dtype)
            if grad_mask is not None:
                grad_mask[index, places] = grad_gain * self.step
        if mask_total is not None and grad_mask is not None:
            mask_total.add(self.cell, grad_mask, rows)

    def energy_backward(self, rows: slice, doubt: Tensor, grad: Tensor, out: Tensor) -> None:
        """As `backward`, for the gradient [cell, n, 1] of the energy."""
        grad = take(grad, self.cell, rows)
        for index, places, x, _ in self.p.exact_inputs(self.cell, rows, doubt, 1.0):
            g = problem_of(grad, index)[places, 0].double()
            out[index, places] = self._sums_of(index).energy_backward(x, g).to(out.dtype)

    def add_to(self, totals: Sequence[GradientSum | None]) -> None:
        """Add the sums to the totals of (rho, beta, log_weights)."""
        for index, sums in self.sums.items():
            start = self.cell.batch.start + index
            cell = BatchCell(self.cell.lead, slice(start, start + 1))
            parts = (sums.rho[None], sums.beta[None], sums.log_weights[None])
            add_memory_gradients(self.p, totals, cell, parts)


def pad_rows(rows: Tensor, problems: int, height: int) -> Tensor:
    """[b, n, 1] as [problems, height, 1]; padding is 0."""
    full = rows.new_zeros((problems, height, 1))
    full[:, : rows.shape[1]] = rows
    return full
