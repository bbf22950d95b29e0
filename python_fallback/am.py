# SPDX-License-Identifier: Apache-2.0
"""Associative memory: the recursion, its energy, the nearest memory; docs/ops/am.md has the
equations.

First the truth (any device, twice differentiable, N x K memory), then the chunked CPU backend,
whose gradients are written by hand. Shapes: v [..., N, D], rho [..., K, D], beta and log_weights
broadcastable to [..., K], update_mask to [..., N, D]; leading dims broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import kmeans
from ._chunk import Cell, GradientSum, lift, padded, row_chunks, take
from ._doubt import CALM_OF_ENERGY
from ._hard import assign, hard_backward, hard_forward, nearest
from ._recall import ROWS, Beta, Gauge, Problem, Side, advance, either, result_shape
from ._score import alive_memories, compute_dtype, first_max_, softmax_
from ._trajectory import (
    ExactParts,
    Sums,
    Trajectory,
    extended,
    keeps_weights,
    results,
    spread,
    totals_of,
)

# ---- the truth -----------------------------------------------------------------------------------


def _differences(x: Tensor, rho: Tensor, log_weights: Tensor | None) -> Tensor:
    """`rho_k - x_n`, [..., N, K, D]; 0 for a memory that takes no part, which may hold NaN."""
    gap = rho[..., None, :, :] - x[..., :, None, :]
    alive = alive_memories(log_weights)
    return gap if alive is None else torch.where(alive[..., None, :, None], gap, 0.0)


def _logits(far: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    """`log w_k - beta_k |x_n - rho_k|^2`, [..., N, K]; 0 where no memory takes part."""
    z = far * -(beta[..., None, :] if isinstance(beta, Tensor) and beta.ndim else beta)
    if log_weights is None:
        return z
    some = alive_memories(log_weights).any(-1, keepdim=True)[..., None]  # type: ignore[union-attr]
    return torch.where(some, z + torch.atleast_1d(log_weights)[..., None, :], 0.0)


def _is_hard(beta: Beta) -> bool:
    """Whether each row goes to its nearest memory."""
    return isinstance(beta, float) and math.isinf(beta)


def am_weights(x: Tensor, rho: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    """`softmax_k(log w_k - beta_k |x_n - rho_k|^2)`, [..., N, K]; one-hot at the nearest memory for
    beta = inf, 0 where no memory takes part. In float64, as the exact rows of the recursion: logits
    of finite rows and memories leave the range of float32.
    """
    wide, memories = x.double(), rho.double()
    beta = beta.double() if isinstance(beta, Tensor) else beta
    log_weights = None if log_weights is None else log_weights.double()
    gap = _differences(wide, memories, log_weights)
    return _weights(wide, memories, gap, beta, log_weights).to(x.dtype)


def _weights(x: Tensor, rho: Tensor, gap: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    if _is_hard(beta):
        labels = nearest(x.detach(), rho.detach(), log_weights)[..., None]
        index = torch.arange(rho.shape[-2], dtype=torch.int64, device=x.device)
        p = (index == labels).to(x.dtype)
        return p + (gap.detach() * 0).sum(-1)  # what is not finite stays visible
    p = torch.softmax(_logits(gap.square().sum(-1), beta, log_weights), -1)
    alive = alive_memories(log_weights)
    return p if alive is None else torch.where(alive[..., None, :], p, 0.0)


def am_recursion(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    steps: int,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`steps` times `v + step * update_mask * (softmax_k(log w_k - beta_k |v - rho_k|^2) @ rho -
    v)`.
    """
    dtype = compute_dtype(v)
    rho, beta = rho.to(dtype), beta.to(dtype) if isinstance(beta, Tensor) else float(beta)
    log_weights = None if log_weights is None else log_weights.to(dtype)
    gain = step if update_mask is None else step * update_mask.to(dtype)
    x = v.to(dtype).expand(result_shape(v, rho, beta, update_mask, log_weights)).clone()
    for _ in range(steps):
        gap = _differences(x, rho, log_weights)
        p = _weights(x, rho, gap, beta, log_weights)
        x = x + gain * (p[..., None, :] @ gap)[..., 0, :]
    return x.to(v.dtype)


def am_step(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """One step of `am_recursion`."""
    return am_recursion(v, rho, beta, 1, step, update_mask, log_weights, precision)


def am_energy(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`-(1/beta) logsumexp_k(log w_k - beta |v - rho_k|^2)`, [..., N]; +inf where no memory takes
    part.
    """
    dtype = compute_dtype(v)
    beta = beta.to(dtype) if isinstance(beta, Tensor) else float(beta)
    log_weights = None if log_weights is None else log_weights.to(dtype)
    far = _differences(v.to(dtype), rho.to(dtype), log_weights).square().sum(-1)
    energy = -torch.logsumexp(_logits(far, beta, log_weights), -1) / beta
    alive = alive_memories(log_weights)
    return energy if alive is None else torch.where(alive.any(-1, keepdim=True), energy, torch.inf)


def am_assign(
    v: Tensor, rho: Tensor, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """Nearest memory with log_weight > -inf, lowest index on ties, and its squared distance; -1
    for none. Labels are those of `kmeans_assign`.
    """
    return assign(kmeans.kmeans_assign, v.detach(), rho.detach(), log_weights)


# ---- the CPU backend: row chunks, in place -----------------------------------------------------


def _forward(p: Problem, steps: int, step: float, lse: Tensor | None = None) -> Tensor:
    if steps == 0 or step == 0:
        return p.v.new_empty(p.shape).copy_(p.v.reshape(p.v.shape[-len(p.shape) :]))
    if _is_hard(p.beta):
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


def _backward(
    grad: Tensor, p: Problem, steps: int, step: float, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, update_mask, log_weights); empty where not needed."""
    totals, grad = totals_of(p, needs), lift(grad, len(p.batch), 2)
    if _is_hard(p.beta):
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


def am_assign_forward(
    v: Tensor, rho: Tensor, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """`am_assign` in row chunks."""
    return assign(kmeans.kmeans_assign_forward, v, rho, log_weights)
