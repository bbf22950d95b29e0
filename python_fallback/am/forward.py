# SPDX-License-Identifier: Apache-2.0
"""An associative memory on a CPU: row chunks, in place, never N x K."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kmeans
from ..common.chunk import lift, padded, row_chunks, take
from ..common.score import first_max_
from .doubt import CALM_OF_ENERGY
from .equations import is_hard
from .hard import assign, hard_forward
from .problem import ROWS, Beta, Gauge, Problem, advance, either
from .trajectory import ExactParts


def _forward(p: Problem, steps: int, step: float, lse: Tensor | None = None) -> Tensor:
    if steps == 0 or step == 0:
        return p.v.new_empty(p.shape).copy_(p.v.reshape(p.v.shape[-len(p.shape) :]))
    if is_hard(p.beta):
        v, rho, _, mask, log_weights = p.operands
        return hard_forward(v, rho, p.shape, steps, step, mask, log_weights)
    out = p.v.new_empty(p.shape)
    lifted = lift(out, len(p.batch), 2)
    for cell, side, limit in p.parts():
        wide = [p.tile(cell, limit, width) for width in (p.narrow, p.narrow, p.wide)]
        exact, gauge = ExactParts(p, cell, side, step), Gauge(p, cell, limit)
        for rows in row_chunks(p.rows, limit):
            n = rows.stop - rows.start
            x, xb, weights = (tile[:, : padded(n, ROWS)] for tile in wide)
            block = p.load(cell, rows, side, x)
            gain = p.gain(cell, rows, side, step)
            if lse is not None:
                z = side.logits(x, weights)[:, :n]
                take(lse, cell, rows).copy_(torch.logsumexp(z, -1, keepdim=True))
            doubt, sleeps = None, side.watch.sleeps(x, step)
            for _ in range(steps):
                torch.bmm(side.weights(x, weights), side.rho, out=xb)
                if not sleeps:
                    warmth = gauge.warmth(side, x, weights, n)
                    tiles = weights[:, :n], xb[:, :n]
                    found = side.watch.doubts(*gauge(x, xb, n), *tiles, warmth)
                    doubt = either(doubt, found)
                if gain is None and step == 1:
                    x, xb = xb, x
                else:
                    advance(x, xb, x, n, step, gain)
            result = x[:, :n, : p.features] + side.centre
            if doubt is not None:
                doubt = p.regular(cell, rows, side, doubt)
            if doubt is not None:
                exact.forward(rows, doubt, result, steps)
            if gain is not None:  # what is held keeps its bits
                held = gain[..., : p.features] == 0
                result = torch.where(held, block.to(p.dtype), result)
            take(lifted, cell, rows).copy_(result)
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
    return _forward(Problem(v, rho, beta, update_mask, log_weights), steps, step)


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
    return _forward(Problem(v, rho, beta, update_mask, log_weights), 1, step)


def am_step_saved(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`am_step`, and the [..., N] logsumexp of its centred logits (less |x|^2 where beta is
    shared).
    """
    p = Problem(v, rho, beta, update_mask, log_weights)
    lse = p.v.new_zeros((*p.shape[:-1], 1), dtype=p.dtype)
    return _forward(p, 1, step, lift(lse, len(p.batch), 2)), lse[..., 0]


def am_energy_forward(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`am_energy` in row chunks: the distance of the likeliest memory from differences, and beside
    it what the others add.
    """
    p = Problem(v, rho, beta, log_weights=log_weights)
    out = p.v.new_empty((*p.shape[:-1], 1), dtype=p.dtype)
    lifted = lift(out, len(p.batch), 2)
    for cell, side, limit in p.parts():
        tiles = p.tile(cell, limit, p.narrow), p.tile(cell, limit, p.wide)
        exact, gauge = ExactParts(p, cell, side, 1.0), Gauge(p, cell, limit)
        for rows in row_chunks(p.rows, limit):
            n = rows.stop - rows.start
            x, q = (tile[:, : padded(n, ROWS)] for tile in tiles)
            block = p.load(cell, rows, side, x).to(p.dtype)
            top, index = (part[:, :n] for part in first_max_(side.weights(x, q)))
            place = index.clamp(max=p.size - 1)  # a row that is not finite has none
            far = p.distances(cell, block, place)
            size = gauge.norms(x, n) + side.norms.expand(cell.size, -1, -1).mT.gather(1, place)
            doubt = side.watch.doubts(size, (size - far) / 2, top, calm=CALM_OF_ENERGY)
            energy = far + top.log_() / side.beta
            if side.shift is not None and side.alive is not None:
                shift = side.shift.expand(cell.size, -1, -1).mT.gather(1, place)
                energy = torch.where(side.alive > 0, energy - shift / side.beta, torch.inf)
            if doubt is not None:
                doubt = p.regular(cell, rows, side, doubt)
            if doubt is not None:
                exact.energy(rows, doubt, energy)
            take(lifted, cell, rows).copy_(energy)
    return out[..., 0]


def am_assign_forward(
    v: Tensor, rho: Tensor, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """`am_assign` in row chunks."""
    return assign(kmeans.kmeans_assign_forward, v, rho, log_weights)
