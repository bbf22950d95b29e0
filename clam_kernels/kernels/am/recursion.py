# SPDX-License-Identifier: Apache-2.0
"""The kernel of the recursion: all steps of a tile of rows, whose states stay in float32 registers
from the first step to the last. Equations: docs/ops/am.md. Rows of more features than registers
hold are in `am/recursion_wide.py`, the launches in `am/forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import (
    LIFT,
    contest_fold,
    contest_init,
    decided,
    inverse,
    lse_init,
    softmax_fold,
    softmax_halves_fold,
    softmax_init,
)
from ..common.halves import halves, held_halves, load_memory_halves, power, reach_of, unpower
from ..common.score import centred, held_inner, load_memories, load_rows, logits
from ..common.sweep import NUMBERS, offset, rows_of, sweep
from ..kmeans.nearest import slack
from .doubt import (
    SHARED_SCALE,
    doubted,
    energy_lost,
    hard_doubted,
    heaviest,
    lost,
    settled,
    sharpest,
)

LN2 = tl.constexpr(0.6931471805599453)
# The flag of a row that is not finite, or meets a memory that is not.
POISONED = tl.constexpr(2)


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
def poison_of(flag):
    """NaN where the flag says so, else 0."""
    return tl.where(flag >= POISONED, float("nan"), 0.0)


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
    base-2 logit (or the index) and the sum relative to it, in strips of `strip` rows a step; 3: as
    2, for the gradient of the energy.
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
    flag = tl.where(poison == 0.0, 0, POISONED)  # a number of its own would take a register
    IN_HALVES: tl.constexpr = PREC == "f16x3"
    table, parts, scale, reach, floor = (RHO, SIDE), (HALVES, SIDE, size), 1.0, 1.0, 0.0
    if HARD:
        reach, sharp = reach_of(SIDE, count, PROTOS), 0.0
    else:
        sharp, ratio, calm = sharpest(SIDE, count, PROTOS, PER_MEMORY)
        if KEEP == 3:
            lift = heaviest(SIDE, count, PROTOS)
    tile = load_memories(table, 0, count, D, STRIDE, DIM, PROTOS)
    if IN_HALVES:
        scale, reach = tl.load(SIDE), reach_of(SIDE, count, PROTOS)
        floor = reach * SHARED_SCALE
        floor = floor * floor
        parts = (HALVES + 2 * m * size * DIM, SIDE, size)
        tile = (tile[0], halves(tile[1] * power(reach)), tile[0], tile[3])
    top, total = lse_init(ROWS)
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
            # one sum of both squares: |x|^2 would take a register through the sweep
            norms, far = tl.sum(x * x + xb * xb, 1), tl.sum(gap * gap, 1)
            flag |= doubted(norms, far, total, sharp, ratio, floor, calm).to(tl.int32)
            if KEEP == 3:
                flag |= energy_lost(norm, norms, far, top, lift, sharp).to(tl.int32)
        if KEEP >= 2:
            here = tl.cast(t, tl.int64) * strip + local
            keep = here[:, None] * STRIDE + d[None, :]
            tl.store(PATH + keep, x, mask=(d < STRIDE)[None, :])
            tl.store(PULL + keep, xb, mask=(d < STRIDE)[None, :])
            tl.store(TOP + here, top + poison_of(flag))
            tl.store(TOTAL + here, total)
        x = moved(x, xb, gain_of(U, u_row, u_feature, row, d, inside, step, MASK))

    poison = poison_of(flag)
    flag = settled(flag, total, SIDE, count, PROTOS)
    p = problem.to(tl.int64) * rows + at
    if KEEP >= 2:
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
            tl.store(TOP + p, (top + tl.log2(total)) * LN2 + poison, mask=live)
    tl.store(FLAG + p, flag.to(tl.uint8), mask=live)
