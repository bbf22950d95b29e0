# SPDX-License-Identifier: Apache-2.0
"""Gradients of the associative-memory family on a GPU; equations (8) and (9) of docs/ops/am.md.

A cell of blocks of rows at a time: the recursion keeps its states, what they recall and the
normalisers in scratch; one kernel walks the rows back (`am/backward_rows.py`) and leaves h = gain g
and its mean under the weights; another sweeps all rows of all steps for each tile of memories. Sums
over rows are partials in a fixed order, added in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.fold import finite
from ..common.score import dot, held_inner, load_memories, load_rows, load_sides, logits, wide_inner
from ..common.sweep import offset
from . import backward_fused, exact_backward
from .backward_rows import rows_backward_kernel, rows_backward_wide_kernel
from .call import Call, Cell, Totals
from .doubt import MOST
from .forward import flags_of, unit_of
from .memories import LOG2E
from .recursion import recursion_kernel
from .recursion_wide import recursion_wide_kernel

# Programs that share the rows of one tile of memories: enough for any GPU, and a function of the
# shape alone, so that sums have the same order on all.
PROGRAMS = 512
# Problems of a cell are the third dim of a grid, which has a limit.
MOST_PROBLEMS = 65535
# Wider rows leave no registers for a whole tile's weights and slopes at once.
RESIDENT_FEATURES = 32
_LOG2E = tl.constexpr(LOG2E)


# ---- the memories' side --------------------------------------------------------------------------


@triton.jit
def inverse_of(TOTAL, at, live):
    """1 / the sum of a row's weights; 0 where no memory takes part."""
    total = tl.load(TOTAL + at, mask=live, other=0.0)
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit(do_not_specialize=["count", "inner", "steps", "strip", "rows", "share"])
def memories_backward_kernel(
    RHO, SIDE, TOP, TOTAL, DELTA, PATH, PULL, PART, SUMS,
    count, inner, steps, strip, rows, share,
    m_o, m_i,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    ENERGY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sweep with the roles swapped: a tile of memories is held, and meets `share` rows of one
    problem in every step. PART takes sum_n (p h + 2 beta gz x), SUMS sum_n gz and sum_n gz |x -
    rho|^2; for the energy sum_n q x, sum_n q and sum_n q (log2 w - log2 p) with q = p g.
    """
    tiles = tl.cdiv(count, PROTOS)
    here, piece = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    split, problem = tl.program_id(1), tl.program_id(2)
    m = offset(problem, inner, m_o, m_i)
    RHO += m * count * STRIDE
    SIDE += m * 4 * count
    d0 = piece * DIM
    if WIDE:
        tile = load_sides((RHO, SIDE), here * PROTOS, count, D, STRIDE, DIM, PROTOS)
    else:
        tile = load_memories((RHO, SIDE), here * PROTOS, count, D, STRIDE, DIM, PROTOS)
    k = tile[0]
    known = k < count
    lift = tl.load(SIDE + 2 * count + k, mask=known, other=0.0)
    own = tl.load(SIDE + 3 * count + k, mask=known, other=0.0)
    acc = tl.zeros((PROTOS, DIM), tl.float32)
    mass, heat = tl.zeros((PROTOS,), tl.float32), tl.zeros((PROTOS,), tl.float32)
    begin = split * share
    end = tl.minimum(begin + share, rows)
    for t in range(0, steps):
        first = tl.cast(t, tl.int64) * strip + problem.to(tl.int64) * rows
        for n0 in range(begin, end, ROWS):
            n = n0 + tl.arange(0, ROWS)
            live = n < end
            at = first + n
            # rows past the end weigh exp2(-inf), whatever the biases are
            top = tl.load(TOP + at, mask=live, other=float("inf"))
            sure = top != float("inf")
            inverse = tl.where(sure, inverse_of(TOTAL, at, live), 0.0)
            delta = tl.load(DELTA + at, mask=live, other=0.0)
            x = load_rows(PATH, at, live, d0, D, STRIDE, DIM)
            norm = tl.sum(x * x, 1)
            if WIDE:
                norm = tl.zeros((ROWS,), tl.float32)
                for e0 in range(0, D, DIM):
                    part = load_rows(PATH, at, live, e0, D, STRIDE, DIM)
                    norm += tl.sum(part * part, 1)
                inside = wide_inner(((PATH, at, live), norm), tile, count, D, STRIDE, DIM, PREC)
            else:
                inside = held_inner((x, norm), tile, count, D, STRIDE, DIM, PREC)
            s = logits(inside, 0.5 * norm, tile[2], tile[3], PER_MEMORY)
            w = tl.exp2(s - finite(top)[:, None]) * inverse[:, None]
            if ENERGY:
                q = w * delta[:, None]
                acc += dot(tl.trans(q), x, PREC)
                mass += tl.sum(q, 0)
                surprise = lift[None, :] - (s - top[:, None]) - tl.log2(inverse)[:, None]
                heat += tl.sum(tl.where(w == 0.0, 0.0, q * surprise), 0)
            else:
                h = load_rows(PULL, at, live, d0, D, STRIDE, DIM)
                if HARD:
                    w = tl.where(k.to(tl.float32)[None, :] == top[:, None], 1.0, 0.0)
                    acc += dot(tl.trans(w), h, PREC)
                else:
                    if WIDE:
                        held = ((PULL, at, live), norm)
                        slope = wide_inner(held, tile, count, D, STRIDE, DIM, PREC)
                    else:
                        slope = dot(h, tl.trans(tile[1]), PREC)
                    gz = w * (slope - delta[:, None])
                    acc += dot(tl.trans(w), h, PREC)
                    acc += dot(tl.trans(gz * (tile[2] / _LOG2E)[None, :]), x, PREC)
                    mass += tl.sum(gz, 0)
                    far = own[None, :] + norm[:, None] - 2.0 * inside
                    heat += tl.sum(gz * tl.minimum(tl.maximum(far, 0.0), MOST), 0)
    d = d0 + tl.arange(0, DIM)
    slot = (problem * tl.num_programs(1) + split).to(tl.int64) * count + k
    where = known[:, None] & (d < STRIDE)[None, :]
    tl.store(PART + slot[:, None] * STRIDE + d[None, :], acc, mask=where)
    if piece == 0:
        tl.store(SUMS + slot * 2, mass, mask=known)
        tl.store(SUMS + slot * 2 + 1, heat, mask=known)


# ---- launches ------------------------------------------------------------------------------------


def cells(call: Call, steps: int, step: float, flag: Tensor, keep: int = 2) -> Iterator[Cell]:
    """Run the recursion cell by cell, everything kept; yields the cells. `flag` takes which rows
    are in doubt; `keep` is 3 for the energy.
    """
    chosen, stride = call.recursion(keep), call.memories.stride
    block = max(chosen["ROWS"], call.settings("am_rows_backward")["ROWS"])
    blocks = triton.cdiv(call.rows, block)
    limit = max(1, launch.SCRATCH // (steps * (2 * stride + 3) * block))
    most = max(1, min(MOST_PROBLEMS, launch.SCRATCH // (call.memories.size * stride)))
    kernel = recursion_wide_kernel if "DIM" in chosen else recursion_kernel
    flags = flags_of(call, chosen, keep)
    parts = list(call.cells(blocks, limit, most))
    rows = max((block * count * (p.stop - p.start) for _, p, _, count in parts), default=0)
    flag = flag.view(call.outer, call.inner, call.rows)
    wide = call.new(2, steps * rows * stride)
    thin = call.new(3, steps * rows)
    for o, problems, first, count in parts:
        strip = (problems.stop - problems.start) * count * block
        path, pull = wide[:, : steps * strip * stride].view(2, steps, strip, stride)
        top, total, delta = thin[:, : steps * strip].view(3, steps, strip)
        cell = Cell(o, problems, first, count, block, path, pull, top, total, delta)
        grid, at, share = cell.grid(chosen["ROWS"])
        operands, strides, u = call.at(o, problems)
        launch.launch(
            kernel, grid, call.device, *operands, path, flag[o, problems],
            top, total, path, pull, path,
            call.rows, call.memories.size, cell.size, steps, step, at, share, strip, 0,
            unit_of(call, flags), *strides, *u, **flags,
        )  # fmt: skip
        yield cell


def sweep_memories(call: Call, cell: Cell, totals: Totals, steps: int, energy: bool) -> None:
    """The memories' side of one cell."""
    chosen = call.settings("am_memories_backward")
    memories, wide = call.memories, "DIM" in chosen
    tiles = triton.cdiv(memories.size, chosen["PROTOS"])
    pieces = triton.cdiv(memories.stride, chosen["DIM"]) if wide else 1
    splits = max(1, min(cell.blocks, PROGRAMS // (tiles * pieces * cell.size)))
    share = triton.cdiv(cell.blocks, splits) * cell.block
    part = call.new(cell.size, splits, memories.size, memories.stride)
    sums = call.new(cell.size, splits, memories.size, 2)
    (_, table, side, _, _), strides, _ = call.at(cell.o, cell.problems)
    launch.launch(
        memories_backward_kernel, (tiles * pieces, splits, cell.size), call.device,
        table, side, cell.top, cell.total, cell.delta, cell.path, cell.pull, part, sums,
        memories.size, cell.size, steps, cell.size * cell.rows, cell.rows, share, *strides[2:],
        **call.tile(chosen), PER_MEMORY=memories.per_memory, HARD=memories.hard,
        ENERGY=energy, WIDE=wide,
    )  # fmt: skip
    totals.add(cell.o, cell.problems, part, sums)


def _walk_back(
    call: Call, cell: Cell, grad: Tensor, out: Tensor, masked: Tensor, step: float, wants: bool
) -> None:
    """The rows' side of one cell; `masked` takes the gradient of the mask if `wants`."""
    chosen = call.settings("am_rows_backward")
    grid, first, share = cell.grid(chosen["ROWS"])
    operands, strides, u = call.at(cell.o, cell.problems)
    _, table, side, _, mask = operands
    views = (x.view(call.outer, call.inner, call.rows, -1) for x in (grad, out, masked))
    grads, outs, masks = (x[cell.o, cell.problems] for x in views)
    launch.launch(
        rows_backward_wide_kernel if "DIM" in chosen else rows_backward_kernel,
        grid, call.device, grads, table, side, mask, outs, masks,
        cell.top, cell.delta, cell.path, cell.pull,
        call.rows, call.memories.size, cell.size, len(cell.path), step, first, share,
        cell.size * cell.rows, *strides[2:], *u, **call.tile(chosen),
        PER_MEMORY=call.memories.per_memory, HARD=call.memories.hard, MASK=call.masked,
        MASK_GRAD=wants,
        RESIDENT=call.memories.size <= chosen["PROTOS"] and call.features <= RESIDENT_FEATURES,
    )  # fmt: skip


def fit(found: Tensor, argument: Any, needed: bool, v: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its argument; empty where it is not asked for."""
    if not (needed and isinstance(argument, Tensor)):
        return v.new_empty(0)
    return found.sum_to_size(argument.shape).to(argument.dtype).contiguous()


def whole(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The upstream gradient, dense."""
    return launch.aligned(launch.plain(grad).expand(tuple(shape)).contiguous())


def am_recursion_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, update_mask, log_weights).

    Scratch: 256 MB, or T steps of one block of rows if that is more, and partial sums of at most
    as much.
    """
    call = Call(v, rho, beta, update_mask, log_weights, precision)
    given = (v, rho, beta, update_mask, log_weights)
    grad, totals = whole(grad, call.shape), Totals(call)
    out = call.new(*call.shape)
    wants = needs[3] and update_mask is not None
    flag = call.new(*call.shape[:-1], dtype=torch.uint8)
    masked = torch.zeros_like(out) if wants else out
    sums = needs[1] or needs[2] or needs[4]
    again = None
    if steps == 0 or step == 0:
        out.copy_(grad)
    else:
        if backward_fused.serves(call, wants):
            backward_fused.backward(call, grad, out, flag, steps, step, totals if sums else None)
        else:
            for cell in cells(call, steps, step, flag):
                _walk_back(call, cell, grad, out, masked, step, wants)
                if sums:
                    sweep_memories(call, cell, totals, steps, energy=False)
        again = exact_backward.recursion_backward(
            call.given(), grad, steps, step, flag, out, masked if wants else None, sums
        )
    if not sums:
        found = (out, out, out, masked, out)
        return tuple(fit(x, a, n, v) for x, a, n in zip(found, given, needs, strict=True))
    acc, mass, heat = totals.of_batch()
    if not call.memories.hard:
        sharp = beta.double()[..., None] if isinstance(beta, Tensor) and beta.ndim else beta
        pull = call.memories.table[..., : call.features].double() * mass[..., None]
        acc = acc - 2 * (sharp * pull)
    if again is not None:
        acc, mass, heat = (x + y for x, y in zip((acc, mass, heat), again.of_batch(), strict=True))
    found = (out, acc, -heat, masked, mass)
    return tuple(fit(x, a, n, v) for x, a, n in zip(found, given, needs, strict=True))


def am_step_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    saved: Tensor,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Of one step; what the memories recall is computed again, and the normaliser with it."""
    return am_recursion_backward(
        grad, v, rho, beta, 1, step, update_mask, log_weights, needs, precision
    )
