# SPDX-License-Identifier: Apache-2.0
"""Gradients of the associative-memory family on a GPU; equations (8) and (9) of docs/ops/am.md.

A cell of blocks of rows at a time: the recursion keeps its states, what they recall and the
normalisers in scratch; one kernel walks the rows back and leaves h = gain g and its mean under the
weights; another sweeps all rows of all steps for each tile of memories. Sums over rows are partials
in a fixed order, added in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, am_exact_backward, am_fused
from ._call import Call, Cell, Totals
from ._doubt import MOST
from ._fold import finite, normalised
from ._memories import LOG2E
from ._score import dot, held_inner, load_memories, load_rows, load_sides, logits, wide_inner
from ._sweep import offset, rows_of, sweep
from .am import flags_of, gain_of, recursion_kernel, recursion_wide_kernel, unit_of

# Programs that share the rows of one tile of memories: enough for any GPU, and a function of the
# shape alone, so that sums have the same order on all.
PROGRAMS = 512
# Problems of a cell are the third dim of a grid, which has a limit.
MOST_PROBLEMS = 65535
# Wider rows leave no registers for a whole tile's weights and slopes at once.
RESIDENT_FEATURES = 32
_LOG2E = tl.constexpr(LOG2E)


# ---- the rows' side ------------------------------------------------------------------------------


@triton.jit
def inverse_of(TOTAL, at, live):
    """1 / the sum of a row's weights; 0 where no memory takes part."""
    total = tl.load(TOTAL + at, mask=live, other=0.0)
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def delta_fold(state, s, tile, PREC: tl.constexpr):
    """Sums of w and of w (h rho_k), with w the weights relative to the largest logit.

    The mean delta must come from the very weights and products that it is taken from: where one
    memory has all the weight their difference is then exactly 0, and a large beta has nothing to
    blow up. A sum of weights that another kernel stored is off by a rounding of its logits.
    """
    mass, delta, h, top = state
    w = tl.exp2(s - top[:, None])
    delta += tl.sum(w * dot(h, tl.trans(tile[1]), PREC), 1)
    return mass + tl.sum(w, 1), delta, h, top


@triton.jit
def slopes_fold(state, s, tile, PREC: tl.constexpr):
    """Sums over memories of gz rho and of gz, with gz = 2 beta log2(e) p (h rho - delta)."""
    acc, lean, h, delta, top, inverse = state
    w = tl.exp2(s - top[:, None]) * inverse[:, None]
    gz = w * (dot(h, tl.trans(tile[1]), PREC) - delta[:, None]) * tile[2][None, :]
    return acc + dot(gz, tile[1], PREC), lean + tl.sum(gz, 1), h, delta, top, inverse


@triton.jit
def pulled(
    x, h, top, table, count,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """(what one step adds to g beside -h, delta)."""
    held = (x, 0.5 * tl.sum(x * x, 1))
    acc, lean = tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32)
    delta = lean
    if RESIDENT:
        tile = load_memories(table, 0, count, D, STRIDE, DIM, PROTOS)
        inner = held_inner(held, tile, count, D, STRIDE, DIM, PREC)
        w = tl.exp2(logits(inner, held[1], tile[2], tile[3], PER_MEMORY) - top[:, None])
        slope = dot(h, tl.trans(tile[1]), PREC)
        inverse, delta = normalised(tl.sum(w, 1), tl.sum(w * slope, 1))
        gz = w * inverse[:, None] * (slope - delta[:, None]) * tile[2][None, :]
        acc, lean = dot(gz, tile[1], PREC), tl.sum(gz, 1)
    else:
        seen = sweep(
            (delta, delta, h, top), held, table, count, load_memories, held_inner, delta_fold,
            D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
        )  # fmt: skip
        inverse, delta = normalised(seen[0], seen[1])
        state = sweep(
            (acc, lean, h, delta, top, inverse), held, table, count, load_memories, held_inner,
            slopes_fold, D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
        )  # fmt: skip
        acc, lean = state[0], state[1]
    if PER_MEMORY:
        acc -= lean[:, None] * x
    return acc / _LOG2E, delta


@triton.jit(
    do_not_specialize=["rows", "count", "inner", "steps", "step", "first", "blocks", "strip"]
)
def rows_backward_kernel(
    GRAD, RHO, SIDE, U, OUT, MASKED, TOP, DELTA, PATH, PULL,
    rows, count, inner, steps, step, first, blocks, strip,
    m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr, MASK: tl.constexpr, MASK_GRAD: tl.constexpr,
):  # fmt: skip
    """Gradient g of ROWS rows from the last step to the first; h = gain g takes the place of what
    was recalled. Rows in doubt, whose TOP is inf, have a g of 0 and give nothing to any sum.
    """
    pid = tl.program_id(0)
    problem, row = rows_of(pid, first, blocks, ROWS)
    m = offset(problem, inner, m_o, m_i)
    RHO += m * count * STRIDE
    SIDE += m * 4 * count
    U += offset(problem, inner, u_o, u_i)
    d = tl.arange(0, DIM)
    live, at = row < rows, row.to(tl.int64)
    inside = live[:, None] & (d < D)[None, :]
    stored = (d < STRIDE)[None, :]
    p = problem.to(tl.int64) * rows + at
    whole = p[:, None] * D + d[None, :]
    g = tl.load(GRAD + whole, mask=inside, other=0.0).to(tl.float32)
    local = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    every = local >= 0
    for back in range(0, steps):
        here = tl.cast(steps - 1 - back, tl.int64) * strip + local
        x = load_rows(PATH, here, every, 0, D, STRIDE, DIM)
        top = tl.load(TOP + here)
        g = tl.where((top == float("inf"))[:, None], 0.0, g)
        moves = tl.where(top == float("-inf"), 0.0, 1.0)[:, None]
        if MASK_GRAD:
            xb = load_rows(PULL, here, every, 0, D, STRIDE, DIM)
            seen = tl.load(MASKED + whole, mask=inside, other=0.0)
            tl.store(MASKED + whole, seen + moves * step * g * (xb - x), mask=inside)
        h = moves * gain_of(U, u_row, u_feature, row, d, inside, step, MASK) * g
        if MASK_GRAD:  # what was recalled has been read by all before h takes its place
            tl.debug_barrier()
        tl.store(PULL + here[:, None] * STRIDE + d[None, :], h, mask=stored)
        g -= h
        if not HARD:
            more, delta = pulled(
                x, h, finite(top), (RHO, SIDE), count,
                D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY, RESIDENT,
            )  # fmt: skip
            tl.store(DELTA + here, delta)
            g += more
        if MASK_GRAD:  # the next step reads MASKED in another layout
            tl.debug_barrier()
    tl.store(OUT + whole, g.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def wide_slopes(
    held, hs, table, k0, count, top,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, PER_MEMORY: tl.constexpr,
):  # fmt: skip
    """(weights, h rho, scale) of one tile of memories, for rows that no register tile holds."""
    tile = load_sides(table, k0, count, D, STRIDE, DIM, PROTOS)
    inner = wide_inner(held, tile, count, D, STRIDE, DIM, PREC)
    s = logits(inner, held[1], tile[2], tile[3], PER_MEMORY)
    w = tl.exp2(s - top[:, None])
    return w, wide_inner(hs, tile, count, D, STRIDE, DIM, PREC), tile[2]


@triton.jit(
    do_not_specialize=["rows", "count", "inner", "steps", "step", "first", "blocks", "strip"]
)
def rows_backward_wide_kernel(
    GRAD, RHO, SIDE, U, OUT, MASKED, TOP, DELTA, PATH, PULL,
    rows, count, inner, steps, step, first, blocks, strip,
    m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr, MASK: tl.constexpr, MASK_GRAD: tl.constexpr,
):  # fmt: skip
    """As `rows_backward_kernel`; g lives in OUT (float32), DIM features at a time."""
    pid = tl.program_id(0)
    problem, row = rows_of(pid, first, blocks, ROWS)
    m = offset(problem, inner, m_o, m_i)
    RHO += m * count * STRIDE
    SIDE += m * 4 * count
    U += offset(problem, inner, u_o, u_i)
    live, at = row < rows, row.to(tl.int64)
    p = problem.to(tl.int64) * rows + at
    local = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    every = local >= 0
    table = (RHO, SIDE)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        inside = live[:, None] & (d < D)[None, :]
        whole = p[:, None] * D + d[None, :]
        g = tl.load(GRAD + whole, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + whole, g, mask=inside)
    tl.debug_barrier()
    for back in range(0, steps):
        here = tl.cast(steps - 1 - back, tl.int64) * strip + local
        top = tl.load(TOP + here)
        doubt = (top == float("inf"))[:, None]
        moves = tl.where(top == float("-inf"), 0.0, 1.0)[:, None]
        norm = tl.zeros((ROWS,), tl.float32)
        for d0 in range(0, D, DIM):
            d = d0 + tl.arange(0, DIM)
            inside = live[:, None] & (d < D)[None, :]
            whole = p[:, None] * D + d[None, :]
            g = tl.where(doubt, 0.0, tl.load(OUT + whole, mask=inside, other=0.0))
            x = load_rows(PATH, here, every, d0, D, STRIDE, DIM)
            if MASK_GRAD:
                xb = load_rows(PULL, here, every, d0, D, STRIDE, DIM)
                seen = tl.load(MASKED + whole, mask=inside, other=0.0)
                tl.store(MASKED + whole, seen + moves * step * g * (xb - x), mask=inside)
            h = moves * gain_of(U, u_row, u_feature, row, d, inside, step, MASK) * g
            norm += tl.sum(x * x, 1)
            if MASK_GRAD:
                tl.debug_barrier()
            tl.store(PULL + here[:, None] * STRIDE + d[None, :], h, mask=(d < STRIDE)[None, :])
            tl.store(OUT + whole, g - h, mask=inside)
        tl.debug_barrier()
        if not HARD:
            held, hs = ((PATH, here, every), 0.5 * norm), ((PULL, here, every), norm)
            safe = finite(top)
            mass, delta = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
            for k0 in range(0, count, PROTOS):
                w, slope, scale = wide_slopes(
                    held, hs, table, k0, count, safe,
                    D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
                )  # fmt: skip
                mass += tl.sum(w, 1)
                delta += tl.sum(w * slope, 1)
            inverse, delta = normalised(mass, delta)
            tl.store(DELTA + here, delta)
            for d0 in range(0, D, DIM):
                d = d0 + tl.arange(0, DIM)
                acc, lean = tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32)
                for k0 in range(0, count, PROTOS):
                    w, slope, scale = wide_slopes(
                        held, hs, table, k0, count, safe,
                        D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
                    )  # fmt: skip
                    gz = w * inverse[:, None] * (slope - delta[:, None]) * scale[None, :]
                    k = k0 + tl.arange(0, PROTOS)
                    rho = load_rows(RHO, k.to(tl.int64), k < count, d0, D, STRIDE, DIM)
                    acc += dot(gz, rho, PREC)
                    lean += tl.sum(gz, 1)
                if PER_MEMORY:
                    acc -= lean[:, None] * load_rows(PATH, here, every, d0, D, STRIDE, DIM)
                inside = live[:, None] & (d < D)[None, :]
                whole = p[:, None] * D + d[None, :]
                g = tl.load(OUT + whole, mask=inside, other=0.0)
                tl.store(OUT + whole, g + acc / _LOG2E, mask=inside)
        tl.debug_barrier()


# ---- the memories' side --------------------------------------------------------------------------


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


def cells(call: Call, steps: int, step: float, flag: Tensor) -> Iterator[Cell]:
    """Run the recursion cell by cell, everything kept; yields the cells. `flag` takes which rows
    are in doubt.
    """
    chosen, stride = call.recursion(keep=2), call.memories.stride
    block = max(chosen["ROWS"], call.settings("am_rows_backward")["ROWS"])
    blocks = triton.cdiv(call.rows, block)
    limit = max(1, _launch.SCRATCH // (steps * (2 * stride + 3) * block))
    most = max(1, min(MOST_PROBLEMS, _launch.SCRATCH // (call.memories.size * stride)))
    kernel = recursion_wide_kernel if "DIM" in chosen else recursion_kernel
    flags = flags_of(call, chosen, keep=2)
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
        _launch.launch(
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
    _launch.launch(
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
    _launch.launch(
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
    return _launch.aligned(_launch.plain(grad).expand(tuple(shape)).contiguous())


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
        if am_fused.serves(call, wants):
            am_fused.backward(call, grad, out, flag, steps, step, totals if sums else None)
        else:
            for cell in cells(call, steps, step, flag):
                _walk_back(call, cell, grad, out, masked, step, wants)
                if sums:
                    sweep_memories(call, cell, totals, steps, energy=False)
        again = am_exact_backward.recursion_backward(
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
