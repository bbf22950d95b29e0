# SPDX-License-Identifier: Apache-2.0
"""The recursion of rows too wide for registers: the states lie in strips of scratch, and each step
sweeps the memories twice. The kernel of narrower rows is in `am/recursion.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import contest_fold, contest_init, decision, finite, inverse, lse_fold, lse_init
from ..common.halves import reach_of
from ..common.score import (
    LN2,
    dot,
    load_checked_rows,
    load_rows,
    load_sides,
    logits,
    wide_inner,
)
from ..common.sweep import UNSPECIALISED, of_problem, rows_of, sweep
from ..kmeans.nearest import slack
from .doubt import final_flags, loses_digits, step_flag
from .memories import rows_and_memories_of
from .recursion import POISONED, gain_of, limits_of, next_state, poison_of, take_out


@triton.jit
def store_starts(
    V, CENTRE, PATH, at, valid, local,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the centred rows as the first states; returns NaN for rows that are not finite, and for
    all where the centre is not, else 0.
    """
    poison = tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        x, _norm, bad = load_checked_rows(V, CENTRE, at, valid, d0, D, DIM)  # x [ROWS, DIM]
        poison += bad
        tl.store(PATH + local[:, None] * STRIDE + d[None, :], x, mask=(d < STRIDE)[None, :])
    tl.debug_barrier()
    return poison


@triton.jit
def norms_of(
    PATH, slot, every, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr
):
    """|x|^2 [ROWS] of states in scratch."""
    norm = tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, D, DIM):
        x = load_rows(PATH, slot, every, d0, D, STRIDE, DIM)  # [ROWS, DIM]
        norm += tl.sum(x * x, 1)
    return norm


@triton.jit
def wide_weights(
    own, table, count, norm, reach, unit,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """(top, total, index): max_k s_k and sum_k 2^(s_k - top), as `recall` returns them; HARD: the
    index of the nearest memory, also as a float in `top`.
    """
    index = tl.full((ROWS,), 0, tl.int32)
    if HARD:
        state = sweep(
            contest_init(ROWS), own, table, count, load_sides, wide_inner, contest_fold,
            D, STRIDE, DIM, PROTOS, PREC, False,
        )  # fmt: skip
        index, some, total = decision(state, slack(norm, reach, unit, 0.0, D))
        top = tl.where(some, index.to(tl.float32), float("-inf"))
    else:
        m, total = sweep(
            lse_init(ROWS), own, table, count, load_sides, wide_inner, lse_fold,
            D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
        )  # fmt: skip
        top = tl.where(total == 0.0, float("-inf"), m + total * 0.0)
    return top, total, index


@triton.jit
def wide_recall(
    own, table, count, d0, top,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr,
):  # fmt: skip
    """Features [d0, d0 + DIM) of sum_k 2^(s_k - top) rho_k."""
    RHO, _SIDE = table
    _states, half = own
    acc = tl.zeros((ROWS, DIM), tl.float32)  # [ROWS, DIM]
    for k0 in range(0, count, PROTOS):
        tile = load_sides(table, k0, count, D, STRIDE, DIM, PROTOS)
        k, _rho, scale, bias = tile  # [PROTOS], pointer, [PROTOS], [PROTOS]
        inner = wide_inner(own, tile, count, D, STRIDE, DIM, PREC)  # [ROWS, PROTOS]
        s = logits(inner, half, scale, bias, PER_MEMORY)  # [ROWS, PROTOS]
        rho = load_rows(RHO, k.to(tl.int64), k < count, d0, D, STRIDE, DIM)  # [PROTOS, DIM]
        acc += dot(tl.exp2(s - top[:, None]), rho, PREC)
    return acc


@triton.jit
def store_step_wide(
    PATH, PULL, U, own, table, count, top, total, index, none, next_slot, row, valid,
    u_row, u_feature, step, more,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    MASK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Store the next states x + gain (xb - x), DIM features at a time; returns |x|^2 + |xb|^2 and
    |xb - x|^2. KEEP >= 2: store the recalls xb too, but no state after the last step (not `more`).
    """
    states, _half = own
    _path, slot, every = states
    RHO, _SIDE = table
    norms, far = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        if HARD:
            nearest = tl.minimum(index, count - 1).to(tl.int64)
            xb = load_rows(RHO, nearest, index >= 0, d0, D, STRIDE, DIM)  # [ROWS, DIM]
        else:
            xb = wide_recall(  # [ROWS, DIM]
                own, table, count, d0, finite(top),
                D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY,
            )  # fmt: skip
            xb = xb * inverse(total)[:, None]  # [ROWS, DIM]
        x = load_rows(PATH, slot, every, d0, D, STRIDE, DIM)  # [ROWS, DIM]
        xb = tl.where(none[:, None], x, xb)  # [ROWS, DIM]
        norms += tl.sum(x * x + xb * xb, 1)
        far += tl.sum((xb - x) * (xb - x), 1)
        if KEEP >= 2:
            keep = slot[:, None] * STRIDE + d[None, :]  # [ROWS, DIM]
            tl.store(PULL + keep, xb, mask=(d < STRIDE)[None, :])
        inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
        gain = gain_of(U, u_row, u_feature, row, d, inside, step, MASK)  # [ROWS, DIM] if MASK
        x = next_state(x, xb, gain)  # [ROWS, DIM]
        if KEEP < 2 or more:
            keep = next_slot[:, None] * STRIDE + d[None, :]  # [ROWS, DIM]
            tl.store(PATH + keep, x, mask=(d < STRIDE)[None, :])
    return norms, far


@triton.jit
def store_results(
    V, CENTRE, U, OUT, PATH, p, at, row, valid, slot, every, none, poison,
    u_row, u_feature, step,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Store the last states in the caller's coordinates; returns 1 for rows that lost digits to the
    centre. A row keeps its bits where `none`, an entry where its gain is 0.
    """
    norm, result = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    start = tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
        c = tl.load(CENTRE + d, mask=d < D, other=0.0)
        x = load_rows(PATH, slot, every, d0, D, STRIDE, DIM)  # [ROWS, DIM]
        out = x + c[None, :] + poison[:, None]  # [ROWS, DIM]
        raw = load_rows(V, at, valid, d0, D, D, DIM)  # [ROWS, DIM]
        norm += tl.sum(x * x, 1)
        result += tl.sum(out * out, 1)
        start += tl.sum(raw * raw, 1)
        if MASK:
            gain = gain_of(U, u_row, u_feature, row, d, inside, step, MASK)  # [ROWS, DIM]
            out = tl.where(gain == 0.0, raw, out)  # [ROWS, DIM]
        out = tl.where(none[:, None], raw, out)  # [ROWS, DIM]
        tl.store(OUT + p[:, None] * D + d[None, :], out.to(OUT.dtype.element_ty), mask=inside)
    return loses_digits(norm, result, start)


@triton.jit(do_not_specialize=UNSPECIALISED)
def recursion_wide_kernel(
    V, RHO, SIDE, CENTRE, U, OUT, FLAG, TOP, TOTAL, PATH, PULL,
    rows, count, inner, steps, step, first, blocks, strip, unit,
    v_o, v_i, m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    MASK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """As `recursion_kernel` for rows too wide for registers. PATH has the states of a program: all
    of them with KEEP >= 2, else two in turn. Each step sweeps once for the sum of the weights and
    once for the recall, DIM features at a time. Threads exchange values through global memory only
    across a barrier.
    """
    pid = tl.program_id(0)
    problem, row = rows_of(pid, first, blocks, ROWS)
    _m, V, RHO, SIDE, CENTRE = rows_and_memories_of(
        V, RHO, SIDE, CENTRE, problem, inner, v_o, v_i, m_o, m_i, count, D, STRIDE
    )
    U = of_problem(U, problem, inner, u_o, u_i, MASK)

    valid, at = row < rows, row.to(tl.int64)
    local = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    every = local >= 0
    poison = store_starts(V, CENTRE, PATH, at, valid, local, D, STRIDE, DIM, ROWS)
    table, reach = (RHO, SIDE), 1.0
    top, total = lse_init(ROWS)
    if HARD:
        reach = reach_of(SIDE, count, PROTOS)
    sharp, ratio, near_limit, lift = limits_of(SIDE, count, PROTOS, PER_MEMORY, HARD, KEEP)
    flag = tl.where(poison == 0.0, 0, POISONED)
    for t in range(0, steps):
        slot = tl.cast(t if KEEP >= 2 else t % 2, tl.int64) * strip + local
        next_slot = tl.cast(t + 1 if KEEP >= 2 else (t + 1) % 2, tl.int64) * strip + local
        norm = norms_of(PATH, slot, every, D, STRIDE, DIM, ROWS)
        own = ((PATH, slot, every), 0.5 * norm)
        top, total, index = wide_weights(
            own, table, count, norm, reach, unit,
            D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY, HARD,
        )  # fmt: skip
        if KEEP >= 2:
            tl.store(TOP + slot, top + poison_of(flag))
            tl.store(TOTAL + slot, total)
        none = top == float("-inf")

        norms, far = store_step_wide(
            PATH, PULL, U, own, table, count, top, total, index, none, next_slot, row, valid,
            u_row, u_feature, step, t + 1 < steps,
            D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY, HARD, MASK, KEEP,
        )  # fmt: skip
        flag |= step_flag(
            norm, norms, far, top, total, sharp, ratio, 0.0, near_limit, lift, HARD, KEEP
        )
        tl.debug_barrier()

    poison = poison_of(flag)
    flag = final_flags(flag, total, SIDE, count, PROTOS)
    p = problem.to(tl.int64) * rows + at
    if KEEP >= 2:
        flag = tl.where(poison == 0.0, flag, 0)
        for d0 in range(0, D, DIM):
            take_out(TOP, PATH, local, flag, steps, strip, d0, STRIDE, DIM, ROWS)
    else:
        slot = tl.cast(steps % 2, tl.int64) * strip + local
        none = (top == float("-inf")) & (poison == 0.0)
        flag |= store_results(
            V, CENTRE, U, OUT, PATH, p, at, row, valid, slot, every, none, poison,
            u_row, u_feature, step, D, STRIDE, DIM, ROWS, MASK,
        )  # fmt: skip
        if KEEP == 1:
            tl.store(TOP + p, (top + tl.log2(total)) * LN2 + poison, mask=valid)
    flag = tl.where(poison == 0.0, flag, 0)
    tl.store(FLAG + p, flag.to(tl.uint8), mask=valid)
