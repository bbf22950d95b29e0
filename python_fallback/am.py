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

from ._chunk import lift, row_chunks, take
from ._recall import (
    ROWS,
    Beta,
    Problem,
    Sums,
    Trajectory,
    advance,
    extended,
    keeps_weights,
    padded,
    result_shape,
    results,
    spread,
    totals_of,
)
from ._score import alive_memories, centred, compute_dtype, first_max_, softmax_, sqdist

# ---- the truth -----------------------------------------------------------------------------------


def _logits(x: Tensor, memories: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    """`log w_k - beta_k |x_n - rho_k|^2`; the distance itself, negated, at beta = inf."""
    z = sqdist(x, memories) * -(
        beta[..., None, :] if isinstance(beta, Tensor) and beta.ndim else beta
    )
    if log_weights is None:
        return z
    some = alive_memories(log_weights).any(-1, keepdim=True)[..., None]  # type: ignore[union-attr]
    return torch.where(some, z + torch.atleast_1d(log_weights)[..., None, :], 0.0)


def _posterior(x: Tensor, memories: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    """`softmax_k(log w_k - beta_k |x - rho_k|^2)`; one-hot at the nearest memory for beta = inf."""
    if not (isinstance(beta, float) and math.isinf(beta)):
        return torch.softmax(_logits(x, memories, beta, log_weights), -1)
    only = None if log_weights is None else torch.where(log_weights == -torch.inf, -torch.inf, 0.0)
    top = _logits(x.detach(), memories.detach(), 1.0, only).max(-1, keepdim=True)
    hits = torch.arange(memories.shape[-2], device=x.device) == top.indices
    return hits.to(x.dtype) + 0.0 * top.values  # a row that is not finite stays visible


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
    beta = beta.to(dtype) if isinstance(beta, Tensor) else float(beta)
    log_weights = None if log_weights is None else log_weights.to(dtype)
    alive = alive_memories(log_weights)
    memories, c = centred(rho.to(dtype), alive)
    gain = step if update_mask is None else step * update_mask.to(dtype)
    if alive is not None:
        gain = gain * alive.any(-1, keepdim=True)[..., None].to(dtype)
    x = v.to(dtype).expand(result_shape(v, rho, beta, update_mask, log_weights)).clone()
    for _ in range(steps):
        xb = _posterior(x - c, memories, beta, log_weights) @ memories
        x = x + gain * (xb - (x - c))
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
    alive = alive_memories(log_weights)
    memories, c = centred(rho.to(dtype), alive)
    energy = -torch.logsumexp(_logits(v.to(dtype) - c, memories, beta, log_weights), -1) / beta
    return energy if alive is None else torch.where(alive.any(-1, keepdim=True), energy, torch.inf)


def am_assign(
    v: Tensor, rho: Tensor, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """Nearest memory with log_weight > -inf, lowest index on ties, and its squared distance; -1
    for none.
    """
    v, rho = v.detach(), rho.detach()
    dtype = compute_dtype(v)
    alive = alive_memories(log_weights)
    memories, c = centred(rho.to(dtype), alive)
    z = -sqdist(v.to(dtype) - c, memories)
    top = (z if alive is None else z.masked_fill(~alive[..., None, :], -torch.inf)).max(-1)
    wide = memories.expand(*top.indices.shape[:-1], *memories.shape[-2:])
    nearest = torch.take_along_dim(wide, top.indices[..., None], -2)
    regular = v.isfinite().all(-1)
    found = regular & ~top.values.isnan()
    pair = torch.where(regular, (v.to(dtype) - c - nearest).square().sum(-1), torch.nan)
    if alive is not None:
        some = alive.any(-1, keepdim=True)
        found, pair = found & some, torch.where(some, pair, torch.inf)
    return torch.where(found, top.indices, -1), pair


# ---- the CPU backend: row chunks, in place -----------------------------------------------------


def _forward(p: Problem, steps: int, step: float, lse: Tensor | None = None) -> Tensor:
    out = p.v.new_empty(p.shape)
    if steps == 0 or step == 0:
        return out.copy_(p.v.reshape(p.v.shape[-len(p.shape) :]))
    lifted, d = lift(out, len(p.batch), 2), p.features
    for cell, side, limit in p.parts():
        tiles = [p.tile(cell, limit, width) for width in (p.narrow, p.narrow, p.wide)]
        for rows in row_chunks(p.rows, limit):
            n = rows.stop - rows.start
            x, xb, weights = (tile[:, : padded(n, ROWS)] for tile in tiles)
            block = p.load(cell, rows, side, x)
            gain = p.gain(cell, rows, side, step)
            if lse is not None and side.beta is not None:
                z = side.logits(x, weights)[:, :n]
                take(lse, cell, rows).copy_(torch.logsumexp(z, -1, keepdim=True))
            for _ in range(steps):
                advance(x, x, n, side, side.weights(x, weights), step, gain, xb)
            result = x[:, :n, :d] + side.centre
            if gain is not None:  # what is held keeps its bits
                result = torch.where(gain[..., :d] == 0, block.to(p.dtype), result)
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
    kept = p.narrow + (p.wide if keeps_weights(p, steps) else 0)
    for cell, side, limit in p.parts(steps * kept):
        path = Trajectory(p, cell, side, limit, steps, step, needs[2])
        for rows in row_chunks(p.rows, limit):
            path.run(rows)
            g = path.back(grad, totals[3])
            if totals[0] is not None:
                totals[0].add(cell, g, rows)
        spread(p, totals, cell, path.sums.gradients(side))
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
    """`am_energy` in row chunks; |x|^2 is added last, and no distance is below 0."""
    p = Problem(v, rho, beta, log_weights=log_weights)
    out = p.v.new_empty((*p.shape[:-1], 1), dtype=p.dtype)
    lifted = lift(out, len(p.batch), 2)
    for cell, side, limit in p.parts():
        assert side.beta is not None, "the check of am_energy refuses an infinite beta"
        shift = side.norms.new_zeros((1, 1, p.size)) if side.shift is None else side.shift
        lowest = torch.logsumexp(shift, -1, keepdim=True) / -side.beta
        tiles = p.tile(cell, limit, p.narrow), p.tile(cell, limit, p.wide)
        for rows in row_chunks(p.rows, limit):
            n = rows.stop - rows.start
            x, z = (tile[:, : padded(n, ROWS)] for tile in tiles)
            p.load(cell, rows, side, x)
            top = side.logits(x, z).amax(-1, keepdim=True)
            lse = top - softmax_(z, side.sharp).amax(-1, keepdim=True).log_()
            energy = x.square().sum(-1, keepdim=True) - lse / side.beta
            take(lifted, cell, rows).copy_(torch.maximum(energy, lowest)[:, :n])
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
        assert side.beta is not None, "the check of am_energy refuses an infinite beta"
        sums, tiles = Sums(p, cell), (p.tile(cell, limit, p.narrow), p.tile(cell, limit, p.wide))
        _, cross, mass, heat = sums.chunk
        for rows in row_chunks(p.rows, limit):
            x, q = (tile[:, : padded(rows.stop - rows.start, ROWS)] for tile in tiles)
            p.load(cell, rows, side, x)
            side.weights(x, q)
            g = extended(take(grad, cell, rows).to(p.dtype), cell.size, x.shape[1], 0.0)
            g = g if side.alive is None else g * side.alive
            if totals[2] is not None:
                surprise = torch.special.entr(q)
                if side.shift is not None:
                    surprise.addcmul_(q, side.shift.clamp(min=torch.finfo(p.dtype).min))
                heat.baddbmm_(g.mT, surprise)
            q.mul_(g)
            cross.baddbmm_(x.mT, q)
            mass.add_(q.sum(1, keepdim=True))
            if totals[0] is not None:
                gx = (g * x).baddbmm_(q, side.rho, alpha=-1).mul_(2)
                totals[0].add(cell, gx[:, : rows.stop - rows.start, : p.features], rows)
            sums.fold()
        _, cross, mass, heat = sums.total
        scale = side.beta.double()
        pulled = 2 * (mass * side.flipped - cross).mT
        spread(p, totals, cell, (pulled, (heat / scale.square())[:, 0], (mass / -scale)[:, 0]))
    return tuple(t for i, t in enumerate(results(p, totals)) if i != 3)


def am_assign_forward(
    v: Tensor, rho: Tensor, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """`am_assign` in row chunks."""
    p = Problem(v, rho, math.inf, log_weights=log_weights)
    labels = p.v.new_empty((*p.shape[:-1], 1), dtype=torch.int64)
    sqdist = p.v.new_empty((*p.shape[:-1], 1), dtype=p.dtype)
    outs = [lift(out, len(p.batch), 2) for out in (labels, sqdist)]
    for cell, side, limit in p.parts():
        tiles = p.tile(cell, limit, p.narrow), p.tile(cell, limit, p.wide)
        for rows in row_chunks(p.rows, limit):
            x, scores = (tile[:, : padded(rows.stop - rows.start, ROWS)] for tile in tiles)
            p.load(cell, rows, side, x)
            top, index = first_max_(side.logits(x, scores))
            # 0 x is NaN for what is not finite; `all` over a short last dim is slower than the rest
            found = ((x * 0).sum(-1, keepdim=True) == 0) & ~top.isnan()
            nearest = side.rho.gather(1, torch.where(found, index, 0).expand(-1, -1, x.shape[-1]))
            pair = (x - nearest).square_().sum(-1, keepdim=True).masked_fill_(~found, torch.nan)
            if side.alive is not None:
                found = found & (side.alive > 0)
                pair = torch.where(side.alive > 0, pair, torch.inf)
            for out, value in zip(outs, (torch.where(found, index, -1), pair), strict=True):
                take(out, cell, rows).copy_(value[:, : rows.stop - rows.start])
    return labels[..., 0], sqdist[..., 0]
