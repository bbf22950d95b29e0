# SPDX-License-Identifier: Apache-2.0
"""The recursion of rows that no register tile holds: the states lie in strips of scratch, and each
step sweeps the memories twice. The kernel of narrower rows is in `am/recursion.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import contest_fold, contest_init, decided, finite, inverse, lse_fold, lse_init
from ..common.halves import reach_of
from ..common.score import centred, dot, load_rows, load_sides, logits, wide_inner
from ..common.sweep import NUMBERS, offset, rows_of, sweep
from ..kmeans.nearest import slack
from .doubt import doubted, energy_lost, hard_doubted, heaviest, lost, settled, sharpest
from .recursion import LN2, POISONED, gain_of, moved, poison_of, take_out


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
        sharp, ratio, calm = sharpest(SIDE, count, PROTOS, PER_MEMORY)
        if KEEP == 3:
            lift = heaviest(SIDE, count, PROTOS)
    flag = tl.where(poison == 0.0, 0, POISONED)
    for t in range(0, steps):
        slot = tl.cast(t if KEEP >= 2 else t % 2, tl.int64) * strip + local
        following = tl.cast(t + 1 if KEEP >= 2 else (t + 1) % 2, tl.int64) * strip + local
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
        if KEEP >= 2:
            tl.store(TOP + slot, top + poison_of(flag))
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
            recall += tl.sum(x * x + xb * xb, 1)
            far += tl.sum((xb - x) * (xb - x), 1)
            if KEEP >= 2:
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
            flag |= doubted(recall, far, total, sharp, ratio, 0.0, calm).to(tl.int32)
            if KEEP == 3:
                flag |= energy_lost(norm, recall, far, top, lift, sharp).to(tl.int32)
        tl.debug_barrier()

    poison = poison_of(flag)
    flag = settled(flag, total, SIDE, count, PROTOS)
    p = problem.to(tl.int64) * rows + at
    if KEEP >= 2:
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
            tl.store(TOP + p, (top + tl.log2(total)) * LN2 + poison, mask=live)
    flag = tl.where(poison == 0.0, flag, 0)
    tl.store(FLAG + p, flag.to(tl.uint8), mask=live)
