# SPDX-License-Identifier: Apache-2.0
"""Associative memory on a GPU: the recursion with its T loop inside.

Equations: docs/ops/am.md. States stay in float32 registers from the first step to the last (rows of
more than `WIDEST` features in two strips of scratch). Rows in doubt are computed again by
`am_exact.py`; backward is in `am_backward.py`, the energy in `am_energy.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, am_exact
from ._call import Call
from ._doubt import PRODUCTS, SHARED_SCALE, doubted, hard_doubted, lost, settled, sharpest
from ._fold import (
    LIFT,
    contest_fold,
    contest_init,
    decided,
    finite,
    inverse,
    lse_fold,
    lse_init,
    softmax_fold,
    softmax_halves_fold,
    softmax_init,
)
from ._halves import halves, held_halves, load_memory_halves, power, reach_of, unpower
from ._memories import memory_halves
from ._nearest import MATRIX_STEPS, slack
from ._score import (
    centred,
    dot,
    held_inner,
    load_memories,
    load_rows,
    load_sides,
    logits,
    wide_inner,
)
from ._sweep import NUMBERS, offset, rows_of, sweep

_LN2 = tl.constexpr(0.6931471805599453)


# ---- the recursion -------------------------------------------------------------------------------


@triton.jit
def gain_of(U, u_row, u_feature, row, d, inside, step, MASK: tl.constexpr):
    """The product step * update_mask of a tile; the number itself where there is no mask."""
    if MASK:
        at = row.to(tl.int64)[:, None] * u_row + d.to(tl.int64)[None, :] * u_feature
        gain = step * tl.load(U + at, mask=inside, other=0.0).to(tl.float32)
    else:
        gain = step
    return gain


@triton.jit
def moved(x, xb, gain):
    """The state x + gain (xb - x), exactly xb at gain 1 and x at gain 0."""
    return gain * xb + (x - gain * x)


@triton.jit
def recalled(
    x, half, first_tile, table, count, width,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """(what the memories recall for x, the largest base-2 logit or the index of the nearest, the
    sum of weights relative to it); x itself, -inf and 0 where no memory takes part. The sum of a
    hard assignment is 2 where the nearest is not further than `width` ahead.
    """
    held = (x, half)
    if HARD:
        state = sweep(
            contest_init(ROWS), held, table, count, load_memories, held_inner, contest_fold,
            D, STRIDE, DIM, PROTOS, PREC, False,
        )  # fmt: skip
        index, some, total = decided(state, width)
        nearest = tl.minimum(index, count - 1).to(tl.int64)
        xb = load_rows(table[0], nearest, some, 0, D, STRIDE, DIM)
        top = tl.where(some, index.to(tl.float32), float("-inf"))
        return tl.where(some[:, None], xb, x), top, total
    if RESIDENT:
        inner = held_inner(held, first_tile, count, D, STRIDE, DIM, PREC)
        s = logits(inner, half, first_tile[2], first_tile[3], PER_MEMORY)
        state = softmax_fold(softmax_init(ROWS, DIM), s, first_tile, PREC)
    else:
        state = sweep(
            softmax_init(ROWS, DIM), held, table, count, load_memories, held_inner, softmax_fold,
            D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
        )  # fmt: skip
    top, total, acc = state
    none = total == 0.0
    xb = tl.where(none[:, None], x, acc * inverse(total)[:, None])
    return xb, tl.where(none, float("-inf"), top + total * 0.0), total


@triton.jit
def recalled_in_halves(
    x, first_tile, table, count, sharp, reach,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """As `recalled` with products of halves; `sharp` is the scale of all logits."""
    largest = tl.max(tl.abs(x), 1)
    undo = sharp * (unpower(largest) * unpower(reach))
    held = (halves(x * power(largest)[:, None]), undo)
    if RESIDENT:
        inner = held_halves(held, first_tile, count, D, STRIDE, DIM, PREC)
        s = logits(inner, undo, undo, first_tile[3], "rows")
        state = softmax_halves_fold(softmax_init(ROWS, DIM), s, first_tile, PREC)
    else:
        state = sweep(
            softmax_init(ROWS, DIM), held, table, count, load_memory_halves, held_halves,
            softmax_halves_fold, D, STRIDE, DIM, PROTOS, PREC, "rows",
        )  # fmt: skip
    top, total, acc = state
    none = total == 0.0
    xb = tl.where(none[:, None], x, acc * (unpower(reach) * inverse(total))[:, None])
    return xb, tl.where(none, float("-inf"), top + total * 0.0), total / LIFT


@triton.jit
def take_out(
    TOP, PATH, local, flag, steps, strip, d0,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows in doubt, as the kernels of the backward know them: a TOP of inf and states of 0."""
    d = d0 + tl.arange(0, DIM)
    lost = flag > 0
    for t in range(0, steps):
        here = tl.cast(t, tl.int64) * strip + local
        tl.store(TOP + here, tl.full((ROWS,), float("inf"), tl.float32), mask=lost)
        at = PATH + here[:, None] * STRIDE + d[None, :]
        tl.store(at, tl.zeros((ROWS, DIM), tl.float32), mask=lost[:, None] & (d < STRIDE)[None, :])


@triton.jit(do_not_specialize=NUMBERS)
def recursion_kernel(
    V, RHO, SIDE, CENTRE, U, OUT, FLAG, TOP, TOTAL, PATH, PULL, HALVES,
    rows, count, inner, steps, step, first, blocks, strip, size, unit,
    v_o, v_i, m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS rows. KEEP 0: the result; 1: also, in TOP, the natural logsumexp of the
    last step's logits; 2: no result, but of every step the state, what it recalls, the largest
    base-2 logit (or the index) and the sum relative to it, in strips of `strip` rows a step.
    """
    pid = tl.program_id(0)
    problem, row = rows_of(pid, first, blocks, ROWS)
    m = offset(problem, inner, m_o, m_i)
    RHO += m * count * STRIDE
    SIDE += m * 4 * count
    CENTRE += m * STRIDE
    V += offset(problem, inner, v_o, v_i) * D
    U += offset(problem, inner, u_o, u_i)

    d = tl.arange(0, DIM)
    live, at = row < rows, row.to(tl.int64)
    inside = live[:, None] & (d < D)[None, :]
    given = load_rows(V, at, live, 0, D, D, DIM)
    x = centred(given, CENTRE, live, 0, D, DIM)
    # a row that is not finite stays visible, whatever it meets; so do memories
    poison = tl.sum(given * 0.0, 1) + tl.sum(tl.load(CENTRE + d, mask=d < D, other=0.0) * 0.0, 0)
    IN_HALVES: tl.constexpr = PREC == "f16x3"
    table, parts, scale, reach, floor = (RHO, SIDE), (HALVES, SIDE, size), 1.0, 1.0, 0.0
    if HARD:
        reach, sharp = reach_of(SIDE, count, PROTOS), 0.0
    else:
        sharp = sharpest(SIDE, count, PROTOS, PER_MEMORY)
    tile = load_memories(table, 0, count, D, STRIDE, DIM, PROTOS)
    if IN_HALVES:
        scale, reach = tl.load(SIDE), reach_of(SIDE, count, PROTOS)
        floor = reach * SHARED_SCALE
        floor = floor * floor
        parts = (HALVES + 2 * m * size * DIM, SIDE, size)
        tile = (tile[0], halves(tile[1] * power(reach)), tile[0], tile[3])
    top, total = lse_init(ROWS)
    flag = tl.zeros((ROWS,), tl.int32)
    local = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for t in range(0, steps):
        norm = tl.sum(x * x, 1)
        if IN_HALVES:
            xb, top, total = recalled_in_halves(
                x, tile, parts, count, scale, reach,
                D, STRIDE, DIM, ROWS, PROTOS, PREC, RESIDENT,
            )  # fmt: skip
        else:
            width = slack(norm, reach, unit, 0.0, D) if HARD else norm
            xb, top, total = recalled(
                x, 0.5 * norm, tile, table, count, width,
                D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY, HARD, RESIDENT,
            )  # fmt: skip
        if HARD:
            flag |= hard_doubted(norm, total)
        else:
            gap = xb - x
            doubt = doubted(norm + tl.sum(xb * xb, 1), tl.sum(gap * gap, 1), total, sharp, floor)
            flag |= doubt.to(tl.int32)
        if KEEP == 2:
            here = tl.cast(t, tl.int64) * strip + local
            keep = here[:, None] * STRIDE + d[None, :]
            tl.store(PATH + keep, x, mask=(d < STRIDE)[None, :])
            tl.store(PULL + keep, xb, mask=(d < STRIDE)[None, :])
            tl.store(TOP + here, top + poison)
            tl.store(TOTAL + here, total)
        x = moved(x, xb, gain_of(U, u_row, u_feature, row, d, inside, step, MASK))

    flag = settled(flag, total, SIDE, count, PROTOS)
    p = problem.to(tl.int64) * rows + at
    if KEEP == 2:
        flag = tl.where(poison == 0.0, flag, 0)
        tl.debug_barrier()
        take_out(TOP, PATH, local, flag, steps, strip, 0, D, STRIDE, DIM, ROWS)
    else:
        c = tl.load(CENTRE + d, mask=d < D, other=0.0)
        out = x + c[None, :] + poison[:, None]
        given = load_rows(V, at, live, 0, D, D, DIM)
        flag |= lost(tl.sum(x * x, 1), tl.sum(out * out, 1), tl.sum(given * given, 1))
        flag = tl.where(poison == 0.0, flag, 0)
        if MASK:  # what is held keeps its bits
            gain = gain_of(U, u_row, u_feature, row, d, inside, step, MASK)
            out = tl.where(gain == 0.0, given, out)
        none = (top == float("-inf")) & (poison == 0.0)
        out = tl.where(none[:, None], given, out)
        tl.store(OUT + p[:, None] * D + d[None, :], out.to(OUT.dtype.element_ty), mask=inside)
        if KEEP == 1:
            tl.store(TOP + p, (top + tl.log2(total)) * _LN2 + poison, mask=live)
    tl.store(FLAG + p, flag.to(tl.uint8), mask=live)


@triton.jit(do_not_specialize=NUMBERS)
def recursion_wide_kernel(
    V, RHO, SIDE, CENTRE, U, OUT, FLAG, TOP, TOTAL, PATH, PULL, HALVES,
    rows, count, inner, steps, step, first, blocks, strip, size, unit,
    v_o, v_i, m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """As `recursion_kernel` for rows that no register tile holds: the states of a program live in
    PATH, in as many strips as are kept, else in two; each step sweeps once for the normaliser and
    once for what the memories recall, DIM features at a time. Global memory is no exchange between
    threads without a barrier.
    """
    pid = tl.program_id(0)
    problem, row = rows_of(pid, first, blocks, ROWS)
    m = offset(problem, inner, m_o, m_i)
    RHO += m * count * STRIDE
    SIDE += m * 4 * count
    CENTRE += m * STRIDE
    V += offset(problem, inner, v_o, v_i) * D
    U += offset(problem, inner, u_o, u_i)

    live, at = row < rows, row.to(tl.int64)
    local = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    all_rows = local >= 0
    poison = tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        given = load_rows(V, at, live, d0, D, D, DIM)
        x = centred(given, CENTRE, live, d0, D, DIM)
        c = tl.load(CENTRE + d, mask=d < D, other=0.0)
        poison += tl.sum(given * 0.0, 1) + tl.sum(c * 0.0, 0)
        tl.store(PATH + local[:, None] * STRIDE + d[None, :], x, mask=(d < STRIDE)[None, :])
    tl.debug_barrier()

    table = (RHO, SIDE)
    top, total = lse_init(ROWS)
    if HARD:
        reach, sharp = reach_of(SIDE, count, PROTOS), 0.0
    else:
        sharp = sharpest(SIDE, count, PROTOS, PER_MEMORY)
    flag = tl.zeros((ROWS,), tl.int32)
    for t in range(0, steps):
        slot = tl.cast(t if KEEP == 2 else t % 2, tl.int64) * strip + local
        following = tl.cast(t + 1 if KEEP == 2 else (t + 1) % 2, tl.int64) * strip + local
        norm = tl.zeros((ROWS,), tl.float32)
        for d0 in range(0, D, DIM):
            x = load_rows(PATH, slot, all_rows, d0, D, STRIDE, DIM)
            norm += tl.sum(x * x, 1)
        held = ((PATH, slot, all_rows), 0.5 * norm)
        index = tl.full((ROWS,), 0, tl.int32)
        if HARD:
            state = sweep(
                contest_init(ROWS), held, table, count, load_sides, wide_inner, contest_fold,
                D, STRIDE, DIM, PROTOS, PREC, False,
            )  # fmt: skip
            index, some, total = decided(state, slack(norm, reach, unit, 0.0, D))
            top = tl.where(some, index.to(tl.float32), float("-inf"))
        else:
            state = sweep(
                lse_init(ROWS), held, table, count, load_sides, wide_inner, lse_fold,
                D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
            )  # fmt: skip
            total = state[1]
            top = tl.where(total == 0.0, float("-inf"), state[0] + total * 0.0)
        if KEEP == 2:
            tl.store(TOP + slot, top + poison)
            tl.store(TOTAL + slot, total)
        none = top == float("-inf")

        recall, far = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        for d0 in range(0, D, DIM):
            d = d0 + tl.arange(0, DIM)
            if HARD:
                nearest = tl.minimum(index, count - 1).to(tl.int64)
                xb = load_rows(RHO, nearest, index >= 0, d0, D, STRIDE, DIM)
            else:
                xb = wide_recall(
                    held, table, count, d0, finite(top),
                    D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY,
                )  # fmt: skip
                xb = xb * inverse(total)[:, None]
            x = load_rows(PATH, slot, all_rows, d0, D, STRIDE, DIM)
            xb = tl.where(none[:, None], x, xb)
            recall += tl.sum(xb * xb, 1)
            far += tl.sum((xb - x) * (xb - x), 1)
            if KEEP == 2:
                keep = slot[:, None] * STRIDE + d[None, :]
                tl.store(PULL + keep, xb, mask=(d < STRIDE)[None, :])
            inside = live[:, None] & (d < D)[None, :]
            x = moved(x, xb, gain_of(U, u_row, u_feature, row, d, inside, step, MASK))
            if KEEP < 2 or t + 1 < steps:
                keep = following[:, None] * STRIDE + d[None, :]
                tl.store(PATH + keep, x, mask=(d < STRIDE)[None, :])
        if HARD:
            flag |= hard_doubted(norm, total)
        else:
            flag |= doubted(norm + recall, far, total, sharp, 0.0).to(tl.int32)
        tl.debug_barrier()

    flag = settled(flag, total, SIDE, count, PROTOS)
    p = problem.to(tl.int64) * rows + at
    if KEEP == 2:
        flag = tl.where(poison == 0.0, flag, 0)
        for d0 in range(0, D, DIM):
            take_out(TOP, PATH, local, flag, steps, strip, d0, D, STRIDE, DIM, ROWS)
    else:
        slot = tl.cast(steps % 2, tl.int64) * strip + local
        none = (top == float("-inf")) & (poison == 0.0)
        norm, result = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        begun = tl.zeros((ROWS,), tl.float32)
        for d0 in range(0, D, DIM):
            d = d0 + tl.arange(0, DIM)
            inside = live[:, None] & (d < D)[None, :]
            c = tl.load(CENTRE + d, mask=d < D, other=0.0)
            x = load_rows(PATH, slot, all_rows, d0, D, STRIDE, DIM)
            out = x + c[None, :] + poison[:, None]
            given = load_rows(V, at, live, d0, D, D, DIM)
            norm += tl.sum(x * x, 1)
            result += tl.sum(out * out, 1)
            begun += tl.sum(given * given, 1)
            if MASK:
                gain = gain_of(U, u_row, u_feature, row, d, inside, step, MASK)
                out = tl.where(gain == 0.0, given, out)
            out = tl.where(none[:, None], given, out)
            tl.store(OUT + p[:, None] * D + d[None, :], out.to(OUT.dtype.element_ty), mask=inside)
        flag |= lost(norm, result, begun)
        if KEEP == 1:
            tl.store(TOP + p, (top + tl.log2(total)) * _LN2 + poison, mask=live)
    flag = tl.where(poison == 0.0, flag, 0)
    tl.store(FLAG + p, flag.to(tl.uint8), mask=live)


@triton.jit
def wide_recall(
    held, table, count, d0, top,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr,
):  # fmt: skip
    """Features [d0, d0 + DIM) of what the memories recall, relative to the largest logit."""
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for k0 in range(0, count, PROTOS):
        tile = load_sides(table, k0, count, D, STRIDE, DIM, PROTOS)
        inner = wide_inner(held, tile, count, D, STRIDE, DIM, PREC)
        s = logits(inner, held[1], tile[2], tile[3], PER_MEMORY)
        k = tile[0]
        rho = load_rows(table[0], k.to(tl.int64), k < count, d0, D, STRIDE, DIM)
        acc += dot(tl.exp2(s - top[:, None]), rho, PREC)
    return acc


# ---- launches ------------------------------------------------------------------------------------


def run(
    call: Call, steps: int, step: float, out: Tensor, flag: Tensor, lse: Tensor | None = None
) -> None:
    """Launch the recursion over all rows; those too wide for registers in cells of scratch. `flag`
    takes which rows are in doubt.
    """
    keep = 0 if lse is None else 1
    chosen = call.recursion(keep)
    block, wide = chosen["ROWS"], "DIM" in chosen
    blocks = triton.cdiv(call.rows, block)
    out = out.view(call.outer, call.inner, call.rows, call.features)
    flags = flags_of(call, chosen, keep)
    if not wide:
        operands, strides, u = call.at()
        grid, parts = (call.outer * call.inner * blocks,), out
        if flags["PREC"] == "f16x3" and not flags["RESIDENT"]:
            parts = memory_halves(call.memories, call.features)
        _launch.launch(
            recursion_kernel, grid, call.device, *operands, out, flag,
            out if lse is None else lse, out, out, out, parts,
            call.rows, call.memories.size, call.inner, steps, step, 0, blocks, 0,
            parts.shape[-2], unit_of(call, flags), *strides, *u, **flags,
        )  # fmt: skip
        return
    limit = max(1, _launch.SCRATCH // (2 * block * call.memories.stride))
    rows = min(limit, call.outer * call.inner * blocks) * block
    path = call.new(2, rows, call.memories.stride)
    for o, problems, first, count in call.cells(blocks, limit):
        operands, strides, u = call.at(o, problems)
        cell, flag_cell = out[o, problems], flag.view(*out.shape[:3])[o, problems]
        lse_cell = cell if lse is None else lse.view(*out.shape[:3])[o, problems]
        _launch.launch(
            recursion_wide_kernel, (len(cell) * count,), call.device, *operands, cell, flag_cell,
            lse_cell, path, path, path, path,
            call.rows, call.memories.size, len(cell), steps, step, first, count, rows, 0,
            unit_of(call, flags), *strides, *u, **flags,
        )  # fmt: skip


def unit_of(call: Call, flags: dict[str, Any]) -> float:
    """Bound on the error of a score, relative to the norms, as `_nearest.slack` takes it."""
    return PRODUCTS[flags["PREC"]] + (MATRIX_STEPS * call.features + 6) * 2.0**-24


def flags_of(call: Call, chosen: dict[str, Any], keep: int) -> dict[str, Any]:
    """Constants of a recursion kernel."""
    memories = call.memories
    return {
        **call.tile(chosen),
        "PER_MEMORY": memories.per_memory,
        "HARD": memories.hard,
        "RESIDENT": memories.size <= chosen["PROTOS"] and "DIM" not in chosen,
        "MASK": call.masked,
        "KEEP": keep,
    }


class Result(NamedTuple):
    """What the saving forward returns."""

    out: Tensor
    lse: Tensor


def _recursion(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
    saves: bool = False,
) -> Result:
    call = Call(v, rho, beta, update_mask, log_weights, precision)
    out = _launch.empty(call.shape, v.dtype, v.device)
    if steps == 0 or step == 0:  # no lse is read where nothing moves
        return Result(out.copy_(v), call.new(*call.shape[:-1]).zero_() if saves else out)
    raw = out.float() if _launch.INTERPRETED and v.dtype == torch.bfloat16 else out
    lse = call.new(*call.shape[:-1]) if saves else None
    flag = call.new(*call.shape[:-1], dtype=torch.uint8)
    run(call, steps, step, raw, flag, lse)
    am_exact.recursion(call.given(), steps, step, flag, raw)
    return Result(out.copy_(raw) if raw is not out else out, out if lse is None else lse)


def am_recursion(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> Tensor:
    """All steps in one launch, after one for the memories and before one for rows in doubt."""
    return _recursion(v, rho, beta, steps, step, update_mask, log_weights, precision).out


def am_step(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> Tensor:
    """`am_recursion` with one step."""
    return _recursion(v, rho, beta, 1, step, update_mask, log_weights, precision).out


def am_step_saved(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> Result:
    """`am_step`, and the [..., N] logsumexp of its centred logits (less |x|^2 where beta is
    shared).
    """
    return _recursion(v, rho, beta, 1, step, update_mask, log_weights, precision, saves=True)
