# SPDX-License-Identifier: Apache-2.0
"""The kernel of the recursion: all steps of a tile of rows, whose states stay in float32 registers
from the first step to the last. Equations: docs/ops/am.md. `am/recursion_wide.py` has the kernel
for rows of more features than registers can contain, `am/forward.py` the launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import (
    LIFT,
    contest_fold,
    contest_init,
    decision,
    inverse,
    lse_init,
    softmax_fold,
    softmax_halves_fold,
    softmax_init,
)
from ..common.halves import halves, load_memory_halves, own_halves, power, reach_of, unpower
from ..common.score import LN2, load_checked_rows, load_memories, load_rows, logits, own_inner
from ..common.sweep import UNSPECIALISED, of_problem, rows_of, sweep
from ..kmeans.nearest import slack
from .doubt import (
    SHARED_SCALE,
    final_flags,
    heaviest,
    loses_digits,
    sharpest,
    step_flag,
)
from .memories import rows_and_memories_of

# The flag of a row that is not finite, and of all rows where a memory is not.
POISONED = tl.constexpr(2)


@triton.jit
def gain_of(U, u_row, u_feature, row, d, inside, step, MASK: tl.constexpr):
    """The product step * update_mask of a tile; the number `step` itself where there is no mask."""
    if MASK:
        at = row.to(tl.int64)[:, None] * u_row + d.to(tl.int64)[None, :] * u_feature  # [ROWS, DIM]
        gain = step * tl.load(U + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, DIM]
    else:
        gain = step
    return gain


@triton.jit
def poison_of(flag):
    """NaN for the rows of flag POISONED, else 0."""
    return tl.where(flag >= POISONED, float("nan"), 0.0)


@triton.jit
def next_state(x, xb, gain):
    """The state x + gain (xb - x), exactly xb at gain 1 and x at gain 0."""
    return gain * xb + (x - gain * x)


@triton.jit
def recall(
    x, half, first_tile, table, count, width,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """(recall, top, total): sum_k 2^(s_k - top) rho_k / total, top = max_k s_k, total = sum_k
    2^(s_k - top). HARD: the nearest memory, its index, and 1, or 2 where the second is not behind
    it by more than `width`. Where all memories are masked: x itself, -inf and 0.
    """
    own = (x, half)
    if HARD:
        state = sweep(
            contest_init(ROWS), own, table, count, load_memories, own_inner, contest_fold,
            D, STRIDE, DIM, PROTOS, PREC, False,
        )  # fmt: skip
        RHO, _SIDE = table
        index, some, total = decision(state, width)
        nearest = tl.minimum(index, count - 1).to(tl.int64)
        xb = load_rows(RHO, nearest, some, 0, D, STRIDE, DIM)  # [ROWS, DIM]
        top = tl.where(some, index.to(tl.float32), float("-inf"))
        return tl.where(some[:, None], xb, x), top, total
    if RESIDENT:
        _k, _rho, scale, bias = first_tile
        inner = own_inner(own, first_tile, count, D, STRIDE, DIM, PREC)  # [ROWS, PROTOS]
        s = logits(inner, half, scale, bias, PER_MEMORY)  # [ROWS, PROTOS]
        state = softmax_fold(softmax_init(ROWS, DIM), s, first_tile, PREC)
    else:
        state = sweep(
            softmax_init(ROWS, DIM), own, table, count, load_memories, own_inner, softmax_fold,
            D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
        )  # fmt: skip
    top, total, acc = state  # [ROWS], [ROWS], [ROWS, DIM]
    none = total == 0.0
    xb = tl.where(none[:, None], x, acc * inverse(total)[:, None])  # [ROWS, DIM]
    return xb, tl.where(none, float("-inf"), top + total * 0.0), total


@triton.jit
def recall_in_halves(
    x, first_tile, table, count, sharp, reach,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """As `recall` with products of halves; `sharp` is the scale of all logits."""
    largest = tl.max(tl.abs(x), 1)
    undo = sharp * (unpower(largest) * unpower(reach))
    own = (halves(x * power(largest)[:, None]), undo)  # (two of [ROWS, DIM], [ROWS])
    if RESIDENT:
        _code, _parts, _keep, bias = first_tile
        inner = own_halves(own, first_tile, count, D, STRIDE, DIM, PREC)  # [ROWS, PROTOS]
        s = logits(inner, undo, undo, bias, "rows")  # [ROWS, PROTOS]
        state = softmax_halves_fold(softmax_init(ROWS, DIM), s, first_tile, PREC)
    else:
        state = sweep(
            softmax_init(ROWS, DIM), own, table, count, load_memory_halves, own_halves,
            softmax_halves_fold, D, STRIDE, DIM, PROTOS, PREC, "rows",
        )  # fmt: skip
    top, total, acc = state  # [ROWS], [ROWS], [ROWS, DIM]
    none = total == 0.0
    xb = tl.where(none[:, None], x, acc * (unpower(reach) * inverse(total))[:, None])  # [ROWS, DIM]
    return xb, tl.where(none, float("-inf"), top + total * 0.0), total / LIFT


@triton.jit
def step_recall(
    x, norm, tile, table, parts, count, scale, reach, unit,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """(recall, top, total) of one step, by `recall_in_halves` for "f16x3" and else by `recall`."""
    if PREC == "f16x3":
        xb, top, total = recall_in_halves(  # xb [ROWS, DIM]
            x, tile, parts, count, scale, reach, D, STRIDE, DIM, ROWS, PROTOS, PREC, RESIDENT
        )  # fmt: skip
    else:
        width = slack(norm, reach, unit, 0.0, D) if HARD else norm
        xb, top, total = recall(  # xb [ROWS, DIM]
            x, 0.5 * norm, tile, table, count, width,
            D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY, HARD, RESIDENT,
        )  # fmt: skip
    return xb, top, total


@triton.jit
def take_out(
    TOP, PATH, local, flag, steps, strip, d0,
    STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mark the rows in doubt for the kernels of the backward: a TOP of inf and states of 0."""
    d = d0 + tl.arange(0, DIM)
    doubt = flag > 0
    for t in range(0, steps):
        here = tl.cast(t, tl.int64) * strip + local
        tl.store(TOP + here, tl.full((ROWS,), float("inf"), tl.float32), mask=doubt)
        at = PATH + here[:, None] * STRIDE + d[None, :]  # [ROWS, DIM]
        tl.store(at, tl.zeros((ROWS, DIM), tl.float32), mask=doubt[:, None] & (d < STRIDE)[None, :])


@triton.jit
def store_step(
    PATH, PULL, TOP, TOTAL, here, x, xb, top, total, STRIDE: tl.constexpr, DIM: tl.constexpr
):
    """Store a step for the backward: the state, its recall, the largest logit, the sum."""
    d = tl.arange(0, DIM)
    keep = here[:, None] * STRIDE + d[None, :]  # [ROWS, DIM]
    tl.store(PATH + keep, x, mask=(d < STRIDE)[None, :])
    tl.store(PULL + keep, xb, mask=(d < STRIDE)[None, :])
    tl.store(TOP + here, top)
    tl.store(TOTAL + here, total)


@triton.jit
def store_result(
    V, CENTRE, U, OUT, x, p, at, row, valid, inside, none, poison, u_row, u_feature, step,
    D: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Store the last states in the caller's coordinates; returns 1 for rows that lost digits to the
    centre. A row keeps its bits where `none`, an entry where its gain is 0.
    """
    d = tl.arange(0, DIM)
    c = tl.load(CENTRE + d, mask=d < D, other=0.0)
    out = x + c[None, :] + poison[:, None]  # [ROWS, DIM]
    raw = load_rows(V, at, valid, 0, D, D, DIM)  # [ROWS, DIM]
    flag = loses_digits(tl.sum(x * x, 1), tl.sum(out * out, 1), tl.sum(raw * raw, 1))
    if MASK:
        gain = gain_of(U, u_row, u_feature, row, d, inside, step, MASK)  # [ROWS, DIM]
        out = tl.where(gain == 0.0, raw, out)  # [ROWS, DIM]
    out = tl.where(none[:, None], raw, out)  # [ROWS, DIM]
    tl.store(OUT + p[:, None] * D + d[None, :], out.to(OUT.dtype.element_ty), mask=inside)
    return flag


@triton.jit
def limits_of(
    SIDE, count,
    PROTOS: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """(sharp, ratio, near_limit) of `sharpest`, and the largest log-weight if KEEP is 3, else 0;
    HARD: all 0.
    """
    sharp, ratio, near_limit, lift = 0.0, 0.0, 0.0, 0.0
    if not HARD:
        sharp, ratio, near_limit = sharpest(SIDE, count, PROTOS, PER_MEMORY)
        lift = heaviest(SIDE, count, PROTOS) if KEEP == 3 else 0.0
    return sharp, ratio, near_limit, lift


@triton.jit
def first_tile_of(
    HALVES, table, m, count, size,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, HARD: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """(tile, parts, scale, reach, floor) for all steps: the first tile of memories, and for "f16x3"
    the tile in halves, the table of halves (unless RESIDENT), the scale of all logits, the largest
    norm and the least size for `is_in_doubt`. HARD: the largest norm. The others are 1, 1 and 0.
    """
    RHO, SIDE = table
    parts, scale, reach, floor = (RHO, SIDE, 0), 1.0, 1.0, 0.0
    if HARD:
        reach = reach_of(SIDE, count, PROTOS)
    tile = load_memories(table, 0, count, D, STRIDE, DIM, PROTOS)  # rho [PROTOS, DIM]
    if PREC == "f16x3":
        scale, reach = tl.load(SIDE), reach_of(SIDE, count, PROTOS)
        floor = reach * SHARED_SCALE
        floor = floor * floor
        if not RESIDENT:
            parts = (HALVES + 2 * m * size * DIM, SIDE, size)
        k, rho, _scale, bias = tile  # [PROTOS], [PROTOS, DIM], [PROTOS], [PROTOS]
        tile = (k, halves(rho * power(reach)), k, bias)  # the second: two of [PROTOS, DIM]
    return tile, parts, scale, reach, floor


@triton.jit
def step_in_doubt(
    x, xb, norm, top, total, sharp, ratio, floor, near_limit, lift,
    HARD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """`step_flag` for rows in registers."""
    gap = xb - x  # [ROWS, DIM]
    # one sum of both squares: |x|^2 would take a register through the sweep
    size, far = tl.sum(x * x + xb * xb, 1), tl.sum(gap * gap, 1)
    return step_flag(norm, size, far, top, total, sharp, ratio, floor, near_limit, lift, HARD, KEEP)


# `recursion_wide_kernel` is no branch of this kernel: a state that lies in memory needs loops over
# features and barriers where this one has registers, and they would share the first lines alone.
@triton.jit(do_not_specialize=UNSPECIALISED)
def recursion_kernel(
    V, RHO, SIDE, CENTRE, U, OUT, FLAG, TOP, TOTAL, PATH, PULL, HALVES,
    rows, count, inner, steps, step, first, blocks, strip, size, unit,
    v_o, v_i, m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS rows: x <- x + gain (recall(x) - x). KEEP 0: OUT takes the result; 1: and
    TOP the natural log-sum-exp of the last step's logits; 2: no result, but of every step the state
    (PATH), its recall (PULL), the largest base-2 logit or the index (TOP) and the sum of weights
    relative to it (TOTAL), in strips of `strip` rows a step; 3: as 2, for the gradient of the
    energy. The kernel reads U if MASK, HALVES for products in halves unless RESIDENT.
    """
    pid = tl.program_id(0)
    problem, row = rows_of(pid, first, blocks, ROWS)
    m, V, RHO, SIDE, CENTRE = rows_and_memories_of(
        V, RHO, SIDE, CENTRE, problem, inner, v_o, v_i, m_o, m_i, count, D, STRIDE
    )
    U = of_problem(U, problem, inner, u_o, u_i, MASK)

    d = tl.arange(0, DIM)
    valid, at = row < rows, row.to(tl.int64)
    inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
    # a row that is not finite gives NaN, whatever the memories are, and so does such a memory
    x, _norm, poison = load_checked_rows(V, CENTRE, at, valid, 0, D, DIM)  # x [ROWS, DIM]
    flag = tl.where(poison == 0.0, 0, POISONED)  # a number of its own would take a register
    sharp, ratio, near_limit, lift = limits_of(SIDE, count, PROTOS, PER_MEMORY, HARD, KEEP)
    table = (RHO, SIDE)
    tile, parts, scale, reach, floor = first_tile_of(
        HALVES, table, m, count, size, D, STRIDE, DIM, PROTOS, PREC, HARD, RESIDENT
    )
    top, total = lse_init(ROWS)
    local = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for t in range(0, steps):
        norm = tl.sum(x * x, 1)
        xb, top, total = step_recall(  # xb [ROWS, DIM]
            x, norm, tile, table, parts, count, scale, reach, unit,
            D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY, HARD, RESIDENT,
        )  # fmt: skip
        flag |= step_in_doubt(
            x, xb, norm, top, total, sharp, ratio, floor, near_limit, lift, HARD, KEEP
        )  # fmt: skip
        if KEEP >= 2:
            here = tl.cast(t, tl.int64) * strip + local
            store_step(
                PATH, PULL, TOP, TOTAL, here, x, xb, top + poison_of(flag), total, STRIDE, DIM
            )  # fmt: skip
        gain = gain_of(U, u_row, u_feature, row, d, inside, step, MASK)  # [ROWS, DIM] if MASK
        x = next_state(x, xb, gain)  # [ROWS, DIM]

    poison = poison_of(flag)
    flag = final_flags(flag, total, SIDE, count, PROTOS)
    p = problem.to(tl.int64) * rows + at
    if KEEP >= 2:
        flag = tl.where(poison == 0.0, flag, 0)
        tl.debug_barrier()
        take_out(TOP, PATH, local, flag, steps, strip, 0, STRIDE, DIM, ROWS)
    else:
        none = (top == float("-inf")) & (poison == 0.0)
        flag |= store_result(
            V, CENTRE, U, OUT, x, p, at, row, valid, inside, none, poison, u_row, u_feature, step,
            D, DIM, MASK,
        )  # fmt: skip
        flag = tl.where(poison == 0.0, flag, 0)
        if KEEP == 1:
            tl.store(TOP + p, (top + tl.log2(total)) * LN2 + poison, mask=valid)
    tl.store(FLAG + p, flag.to(tl.uint8), mask=valid)
