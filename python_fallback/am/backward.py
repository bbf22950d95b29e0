# SPDX-License-Identifier: Apache-2.0
"""The gradients of an associative memory on a CPU, written by hand: row chunks, in place, never
N x K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.chunk import Cell, GradientSum, lift, padded, row_chunks, take
from ..common.score import softmax_
from .equations import is_hard
from .hard import hard_backward
from .problem import ROWS, Beta, Gauge, Problem, Side, either
from .trajectory import (
    ExactParts,
    Sums,
    Trajectory,
    extended,
    keeps_weights,
    results,
    spread,
    totals_of,
)


def _backward(
    grad: Tensor, p: Problem, steps: int, step: float, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, update_mask, log_weights); empty where not needed."""
    totals, grad = totals_of(p, needs), lift(grad, len(p.batch), 2)
    if is_hard(p.beta):
        return _hard_backward(grad, p, steps, step, totals)
    kept = p.narrow + (p.wide if keeps_weights(p, steps) else 0)
    for cell, side, limit in p.parts(steps * kept):
        path = Trajectory(p, cell, side, limit, steps, step, needs[2])
        exact = ExactParts(p, cell, side, step)
        for rows in row_chunks(p.rows, limit):
            path.run(rows)
            g = path.back(grad, totals[3])
            if path.doubt is not None:
                exact.back(rows, path.doubt, grad, g, steps, totals[3])
            if totals[0] is not None:
                totals[0].add(cell, g, rows)
        spread(p, totals, cell, path.sums.gradients(side))
        exact.spread(totals)
    return results(p, totals)


def _hard_backward(
    grad: Tensor, p: Problem, steps: int, step: float, totals: list[GradientSum | None]
) -> tuple[Tensor, ...]:
    v, rho, _, mask, log_weights = p.operands
    if any(total is not None for total in totals):
        parts = hard_backward(grad.reshape(p.shape), v, rho, steps, step, mask, log_weights)
        for total, part in zip((totals[0], totals[1], totals[3]), parts, strict=True):
            if total is not None:
                wide = lift(part, len(p.batch), 2)
                total.total += wide.sum_to_size(total.total.shape)
    return results(p, totals)


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
    """Gradients of (v, rho, beta, update_mask, log_weights), each chunk's states computed again."""
    return _backward(grad, Problem(v, rho, beta, update_mask, log_weights), steps, step, needs)


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

    The saved lse is for GPU kernels: on a CPU exp(z - lse) is slower than the softmax it would
    spare.
    """
    return _backward(grad, Problem(v, rho, beta, update_mask, log_weights), 1, step, needs)


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

    The weights are computed again: exp(z + beta E) of a saved energy lacks the digits that beta E
    has before the point.
    """
    p = Problem(v, rho, beta, log_weights=log_weights)
    dims, (need_v, need_rho, need_beta, need_weights) = len(p.batch), needs
    totals = totals_of(p, (need_v, need_rho, need_beta, False, need_weights))
    grad = lift(grad[..., None], dims, 2)
    for cell, side, limit in p.parts():
        sums, exact, gauge = Sums(p, cell), ExactParts(p, cell, side, 1.0), Gauge(p, cell, limit)
        tiles = [p.tile(cell, limit, width) for width in (p.narrow, p.narrow, p.wide)]
        for rows in row_chunks(p.rows, limit):
            x, xb, q = (tile[:, : padded(rows.stop - rows.start, ROWS)] for tile in tiles)
            gx, doubt = _energy_back(p, cell, side, rows, grad, (x, xb, q), sums, gauge, needs[2])
            if doubt is not None:
                exact.energy_back(rows, doubt, grad, gx)
            if totals[0] is not None:
                totals[0].add(cell, gx, rows)
            sums.fold()
        _, cross, mass, heat = sums.total
        scale = side.beta.double()
        pulled = 2 * (mass * side.flipped - cross).mT
        spread(p, totals, cell, (pulled, (heat / scale.square())[:, 0], (mass / -scale)[:, 0]))
        exact.spread(totals)
    return tuple(t for i, t in enumerate(results(p, totals)) if i != 3)


def _energy_back(
    p: Problem,
    cell: Cell,
    side: Side,
    rows: slice,
    grad: Tensor,
    tiles: tuple[Tensor, Tensor, Tensor],
    sums: Sums,
    gauge: Gauge,
    warms: bool,
) -> tuple[Tensor, Tensor | None]:
    """One chunk: the gradient of its rows, and which of them must be computed from differences."""
    (x, xb, q), n = tiles, rows.stop - rows.start
    _, cross, mass, heat = sums.chunk
    p.load(cell, rows, side, x)
    top = side.logits(x, q)[:, :n].amax(-1, keepdim=True)
    beside = side.watch.beside(gauge.norms(x, n), top, side.shift)
    torch.bmm(softmax_(q, side.sharp), side.rho, out=xb)
    measures = gauge(x, xb, n)
    doubt = either(side.watch.doubts(*measures, q[:, :n]), side.watch.lost(*measures))
    doubt = either(doubt, beside)
    doubt = None if doubt is None else p.regular(cell, rows, side, doubt)
    g = extended(take(grad, cell, rows).to(p.dtype), cell.size, x.shape[1], 0.0)
    g = g if side.alive is None else g * side.alive
    if doubt is not None:
        for tile in (x, xb, q, g):
            tile[:, :n].masked_fill_(doubt[..., None], 0.0)
    if warms:
        surprise = torch.special.entr(q)
        if side.shift is not None:
            surprise.addcmul_(q, side.shift.clamp(min=torch.finfo(p.dtype).min))
        heat.baddbmm_(g.mT, surprise)
    q.mul_(g)
    cross.baddbmm_(x.mT, q)
    mass.add_(q.sum(1, keepdim=True))
    return x.sub_(xb).mul_(g).mul_(2)[:, :n, : p.features], doubt
