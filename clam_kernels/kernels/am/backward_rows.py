# SPDX-License-Identifier: Apache-2.0
"""The kernels that walk rows back through the recursion; equation (8) of docs/ops/am.md. They leave
h = gain g and its mean under the weights for the sweep of the memories (`am/backward.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import finite, normalised
from ..common.score import dot, held_inner, load_memories, load_rows, load_sides, logits, wide_inner
from ..common.sweep import offset, rows_of, sweep
from .memories import LOG2E
from .recursion import gain_of

_LOG2E = tl.constexpr(LOG2E)


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
