# SPDX-License-Identifier: Apache-2.0
"""An associative memory on a CPU: row chunks, in place, never N x K."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kmeans
from ..common.chunk import add_batch_dims, round_up, row_chunks, take
from ..common.score import first_max_
from .doubt import NEAR_LIMIT_OF_ENERGY
from .equations import is_hard
from .hard import assign, hard_forward
from .problem import ROWS, Beta, MemoryProblem, RowProducts, advance, mask_union
from .trajectory import CellExactRows


def _forward(p: MemoryProblem, steps: int, step: float, lse: Tensor | None = None) -> Tensor:
    """`am_recursion`; with lse [*batch, N, 1], also writes the logsumexp of the first logits."""
    if steps == 0 or step == 0:
        return p.v.new_empty(p.shape).copy_(p.v.reshape(p.v.shape[-len(p.shape) :]))
    if is_hard(p.beta):
        v, rho, _, mask, log_weights = p.operands
        return hard_forward(v, rho, p.shape, steps, step, mask, log_weights)
    out = p.v.new_empty(p.shape)
    batched = add_batch_dims(out, len(p.batch), 2)
    for cell, memories, limit in p.cells_with_memories():
        widths = (p.padded_features, p.padded_features, p.padded_memories)
        tiles = [p.tile(cell, limit, width) for width in widths]
        exact, products = CellExactRows(p, cell, memories, step), RowProducts(p, cell, limit)
        for rows in row_chunks(p.rows, limit):
            n = rows.stop - rows.start
            x, recalled, weights = (tile[:, : round_up(n, ROWS)] for tile in tiles)
            values = p.load(cell, rows, memories, x)
            gain = p.gain(cell, rows, memories, step)
            if lse is not None:
                z = memories.logits(x, weights)[:, :n]
                take(lse, cell, rows).copy_(torch.logsumexp(z, -1, keepdim=True))
            doubt, no_doubt = None, memories.rule.is_free_of_doubt(x, step)
            for _ in range(steps):
                torch.bmm(memories.weights(x, weights), memories.rho, out=recalled)
                if not no_doubt:
                    more = products.rows_in_doubt(memories, x, recalled, weights, n)
                    doubt = mask_union(doubt, more)
                if gain is None and step == 1:
                    x, recalled = recalled, x
                else:
                    advance(x, recalled, x, n, step, gain)
            result = x[:, :n, : p.features] + memories.centre
            doubt = p.finite_rows_in_doubt(cell, rows, memories, doubt)
            if doubt is not None:
                exact.forward(rows, doubt, result, steps)
            if gain is not None:  # an entry that the mask does not update keeps its bits
                masked = gain[..., : p.features] == 0
                result = torch.where(masked, values.to(p.dtype), result)
            take(batched, cell, rows).copy_(result)
    return out


def am_recursion_forward(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    steps: int,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`am_recursion` in row chunks, all steps of a chunk before the next chunk."""
    return _forward(MemoryProblem(v, rho, beta, update_mask, log_weights), steps, step)


def am_step_forward(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`am_step` in row chunks."""
    return _forward(MemoryProblem(v, rho, beta, update_mask, log_weights), 1, step)


def am_step_saved(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`am_step`, and the logsumexp [..., N] of its centred logits. Where all memories share beta,
    these logits have no -beta |x|^2.
    """
    p = MemoryProblem(v, rho, beta, update_mask, log_weights)
    lse = p.v.new_zeros((*p.shape[:-1], 1), dtype=p.dtype)
    return _forward(p, 1, step, add_batch_dims(lse, len(p.batch), 2)), lse[..., 0]


def am_energy_forward(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`am_energy` in row chunks: the distance of the likeliest memory k comes from a difference,
    |v - rho_k|^2 + log(p_k) / beta - log(w_k) / beta.
    """
    p = MemoryProblem(v, rho, beta, log_weights=log_weights)
    out = p.v.new_empty((*p.shape[:-1], 1), dtype=p.dtype)
    batched = add_batch_dims(out, len(p.batch), 2)
    for cell, memories, limit in p.cells_with_memories():
        tiles = p.tile(cell, limit, p.padded_features), p.tile(cell, limit, p.padded_memories)
        exact, products = CellExactRows(p, cell, memories, 1.0), RowProducts(p, cell, limit)
        norms = memories.norms.expand(cell.size, -1, -1).mT
        for rows in row_chunks(p.rows, limit):
            n = rows.stop - rows.start
            x, weights = (tile[:, : round_up(n, ROWS)] for tile in tiles)
            values = p.load(cell, rows, memories, x).to(p.dtype)
            top, index = (part[:, :n] for part in first_max_(memories.weights(x, weights)))
            place = index.clamp(max=p.size - 1)  # a row that is not finite has the index K
            sqdist = p.distances(cell, values, place)
            size = products.norms(x, n) + norms.gather(1, place)
            doubt = memories.rule.rows_in_doubt(
                size, (size - sqdist) / 2, top, near_limit=NEAR_LIMIT_OF_ENERGY
            )
            energy = sqdist + top.log_() / memories.beta
            if memories.log_weights is not None and memories.any_active is not None:
                own = memories.log_weights.expand(cell.size, -1, -1).mT.gather(1, place)
                energy = energy - own / memories.beta
                energy = torch.where(memories.any_active > 0, energy, torch.inf)
            doubt = p.finite_rows_in_doubt(cell, rows, memories, doubt)
            if doubt is not None:
                exact.energy(rows, doubt, energy)
            take(batched, cell, rows).copy_(energy)
    return out[..., 0]


def am_assign_forward(
    v: Tensor, rho: Tensor, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """`am_assign` in row chunks."""
    return assign(kmeans.kmeans_assign_forward, v, rho, log_weights)
