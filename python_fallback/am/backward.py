# SPDX-License-Identifier: Apache-2.0
"""The gradients of an associative memory on a CPU, written by hand: row chunks, in place, never
N x K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.chunk import BatchCell, GradientSum, add_batch_dims, round_up, row_chunks, take
from ..common.score import softmax_
from .equations import is_hard
from .hard import hard_backward
from .problem import ROWS, Beta, CellMemories, MemoryProblem, RowProducts, mask_union
from .trajectory import (
    CellExactRows,
    MemorySums,
    Trajectory,
    add_memory_gradients,
    gradient_results,
    gradient_totals,
    pad_rows,
    saves_weights,
)


def _backward(
    grad: Tensor, p: MemoryProblem, steps: int, step: float, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, update_mask, log_weights); empty where not needed."""
    totals, grad = gradient_totals(p, needs), add_batch_dims(grad, len(p.batch), 2)
    if is_hard(p.beta):
        return _hard_backward(grad, p, steps, step, totals)
    saved = p.padded_features + (p.padded_memories if saves_weights(p, steps) else 0)
    for cell, memories, limit in p.cells_with_memories(steps * saved):
        trajectory = Trajectory(p, cell, memories, limit, steps, step, needs[2])
        exact = CellExactRows(p, cell, memories, step)
        for rows in row_chunks(p.rows, limit):
            trajectory.forward(rows)
            g = trajectory.backward(grad, totals[3])
            if trajectory.doubt is not None:
                exact.backward(rows, trajectory.doubt, grad, g, steps, totals[3])
            if totals[0] is not None:
                totals[0].add(cell, g, rows)
        add_memory_gradients(p, totals, cell, trajectory.sums.gradients(memories))
        exact.add_to(totals)
    return gradient_results(p, totals)


def _hard_backward(
    grad: Tensor, p: MemoryProblem, steps: int, step: float, totals: list[GradientSum | None]
) -> tuple[Tensor, ...]:
    """Gradients at beta = inf; those of beta and log_weights are 0."""
    v, rho, _, mask, log_weights = p.operands
    if any(total is not None for total in totals):
        parts = hard_backward(grad.reshape(p.shape), v, rho, steps, step, mask, log_weights)
        for total, part in zip((totals[0], totals[1], totals[3]), parts, strict=True):
            if total is not None:
                batched = add_batch_dims(part, len(p.batch), 2)
                total.total += batched.sum_to_size(total.total.shape)
    return gradient_results(p, totals)


def am_recursion_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    steps: int,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, update_mask, log_weights). The states of each chunk are computed
    again.
    """
    return _backward(
        grad, MemoryProblem(v, rho, beta, update_mask, log_weights), steps, step, needs
    )


def am_step_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    lse: Tensor,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, update_mask, log_weights) of one step.

    Only GPU kernels use the saved lse: on a CPU exp(z - lse) is slower than a softmax.
    """
    return _backward(grad, MemoryProblem(v, rho, beta, update_mask, log_weights), 1, step, needs)


def am_energy_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    log_weights: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, log_weights).

    The weights are computed again. Instead exp(z + beta E) would use the saved energy E, but it has
    too few digits where beta E is large.
    """
    p = MemoryProblem(v, rho, beta, log_weights=log_weights)
    dims, (need_v, need_rho, need_beta, need_weights) = len(p.batch), needs
    totals = gradient_totals(p, (need_v, need_rho, need_beta, False, need_weights))
    grad = add_batch_dims(grad[..., None], dims, 2)
    for cell, memories, limit in p.cells_with_memories():
        chunk = _EnergyChunk(p, cell, memories, limit, need_beta)
        exact = CellExactRows(p, cell, memories, 1.0)
        for rows in row_chunks(p.rows, limit):
            grad_x, doubt = chunk.backward(rows, grad)
            if doubt is not None:
                exact.energy_backward(rows, doubt, grad, grad_x)
            if totals[0] is not None:
                totals[0].add(cell, grad_x, rows)
            chunk.sums.fold()
        add_memory_gradients(p, totals, cell, chunk.gradients())
        exact.add_to(totals)
    return tuple(t for i, t in enumerate(gradient_results(p, totals)) if i != 3)


class _EnergyChunk:
    """The gradients of the energy, chunk by chunk of one cell.

    With the gradient g_n of the energy and the weights p, `sums` has sum_n g_n p_nk x_n, sum_n g_n
    p_nk, and sum_n g_n s_nk with s_nk = p_nk (log w_k - log p_nk).
    """

    def __init__(
        self,
        p: MemoryProblem,
        cell: BatchCell,
        memories: CellMemories,
        limit: int,
        needs_beta: bool,
    ) -> None:
        self.p, self.cell, self.memories, self.needs_beta = p, cell, memories, needs_beta
        self.sums, self.products = MemorySums(p, cell), RowProducts(p, cell, limit)
        widths = (p.padded_features, p.padded_features, p.padded_memories)
        self.tiles = [p.tile(cell, limit, width) for width in widths]

    def backward(self, rows: slice, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradient of the chunk's rows, `2 g (x - sum_k p_k rho_k)`, and the rows in doubt."""
        p, memories, n = self.p, self.memories, rows.stop - rows.start
        x, recalled, weights = (tile[:, : round_up(n, ROWS)] for tile in self.tiles)
        _, x_sum, weight_sum, entropy_sum = self.sums.chunk
        p.load(self.cell, rows, memories, x)
        top = memories.logits(x, weights)[:, :n].amax(-1, keepdim=True)
        softmax_(weights, memories.underflows)
        doubt = self._rows_in_doubt(rows, (x, recalled, weights), top)
        g = take(grad, self.cell, rows).to(p.dtype)
        g = pad_rows(g, self.cell.size, x.shape[1])
        g = g if memories.any_active is None else g * memories.any_active
        if doubt is not None:
            for tile in (x, recalled, weights, g):
                tile[:, :n].masked_fill_(doubt[..., None], 0.0)
        if self.needs_beta:
            entropy = torch.special.entr(weights)
            if memories.log_weights is not None:
                finite = memories.log_weights.clamp(min=torch.finfo(p.dtype).min)
                entropy.addcmul_(weights, finite)
            entropy_sum.baddbmm_(g.mT, entropy)
        weights.mul_(g)
        x_sum.baddbmm_(x.mT, weights)
        weight_sum.add_(weights.sum(1, keepdim=True))
        return x.sub_(recalled).mul_(g).mul_(2)[:, :n, : p.features], doubt

    def _rows_in_doubt(
        self, rows: slice, tiles: tuple[Tensor, Tensor, Tensor], top: Tensor
    ) -> Tensor | None:
        """The rows in doubt of (x, recalled, weights), with the largest logits top [b, n, 1]; also
        computes recalled.
        """
        (x, recalled, weights), memories, n = tiles, self.memories, top.shape[1]
        rule, norms = memories.rule, self.products.norms(x, n)
        near_memory = rule.rows_near_memory(norms, top, memories.log_weights)
        torch.bmm(weights, memories.rho, out=recalled)
        size_and_product = self.products(x, recalled, n)
        doubt = mask_union(
            rule.rows_in_doubt(*size_and_product, weights[:, :n]),
            rule.rows_near_recall(*size_and_product),
        )
        doubt = mask_union(doubt, near_memory)
        return self.p.finite_rows_in_doubt(self.cell, rows, memories, doubt)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rho [b, K, D], beta [b, K], log_weights [b, K]):

        rho_k: 2 sum_n g_n p_nk (rho_k - x_n); beta_k: sum_n g_n s_nk / beta^2; log w_k: -sum_n g_n
        p_nk / beta.
        """
        _, x_sum, weight_sum, entropy_sum = self.sums.total
        beta = self.memories.beta.double()
        rho = 2 * (weight_sum * self.memories.flipped - x_sum).mT
        return rho, (entropy_sum / beta.square())[:, 0], (weight_sum / -beta)[:, 0]
