# SPDX-License-Identifier: Apache-2.0
"""The kernels that take the gradient of the rows from the last step to the first; equation (8) of
docs/ops/am.md. They store h = gain g and its mean under the weights for the sweep of the memories
(`am/backward.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import finite, normalise
from ..common.score import (
    LOG2E,
    dot,
    load_memories,
    load_rows,
    load_sides,
    logits,
    own_inner,
    wide_inner,
)
from ..common.sweep import SIZES, of_problem, rows_of, sweep
from .memories import memories_of
from .recursion import gain_of


@triton.jit
def delta_fold(state, s, tile, PREC: tl.constexpr):
    """State: mass' = mass + sum_k w_k, delta' = delta + sum_k w_k (h rho_k), w_k = 2^(s_k - top).
    Both start at 0; the mean is delta / mass.

    The mean must come from the weights and products that `slopes_fold` subtracts it from. Where one
    memory has all the weight, their difference is then exactly 0, and a large beta cannot multiply
    an error. The sum of weights that another kernel stored has other roundings of the logits.
    """
    mass, delta, h, top = state
    _k, rho, _scale, _bias = tile
    w = tl.exp2(s - top[:, None])  # [ROWS, PROTOS]
    delta += tl.sum(w * dot(h, tl.trans(rho), PREC), 1)
    return mass + tl.sum(w, 1), delta, h, top


@triton.jit
def slopes_fold(state, s, tile, PREC: tl.constexpr):
    """State: acc' = acc + sum_k gz_k rho_k, total' = total + sum_k gz_k, both from 0, with gz_k =
    scale_k p_k (h rho_k - delta), scale = 2 beta log2(e) and p_k = 2^(s_k - top) / mass.
    """
    acc, total, h, delta, top, inverse = state
    _k, rho, scale, _bias = tile
    w = tl.exp2(s - top[:, None]) * inverse[:, None]  # [ROWS, PROTOS]
    gz = w * (dot(h, tl.trans(rho), PREC) - delta[:, None]) * scale[None, :]  # [ROWS, PROTOS]
    return acc + dot(gz, rho, PREC), total + tl.sum(gz, 1), h, delta, top, inverse


@triton.jit
def step_gradient(
    x, h, top, table, count,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """(sum_k 2 beta p_k (h rho_k - delta) (rho_k - x), delta): what one step adds to g beside -h.
    The term with x is 0 unless each memory has a beta.
    """
    half = 0.5 * tl.sum(x * x, 1)
    own = (x, half)
    # [ROWS, DIM], [ROWS]
    acc, total = tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32)
    delta = total
    if RESIDENT:
        tile = load_memories(table, 0, count, D, STRIDE, DIM, PROTOS)
        _k, rho, scale, bias = tile  # [PROTOS], [PROTOS, DIM], [PROTOS], [PROTOS]
        inner = own_inner(own, tile, count, D, STRIDE, DIM, PREC)  # [ROWS, PROTOS]
        w = tl.exp2(logits(inner, half, scale, bias, PER_MEMORY) - top[:, None])  # [ROWS, PROTOS]
        slope = dot(h, tl.trans(rho), PREC)  # [ROWS, PROTOS]
        inverse, delta = normalise(tl.sum(w, 1), tl.sum(w * slope, 1))
        gz = w * inverse[:, None] * (slope - delta[:, None]) * scale[None, :]  # [ROWS, PROTOS]
        acc, total = dot(gz, rho, PREC), tl.sum(gz, 1)  # [ROWS, DIM], [ROWS]
    else:
        mass, delta, _, _ = sweep(
            (delta, delta, h, top), own, table, count, load_memories, own_inner, delta_fold,
            D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
        )  # fmt: skip
        inverse, delta = normalise(mass, delta)
        acc, total, _, _, _, _ = sweep(  # [ROWS, DIM], [ROWS]
            (acc, total, h, delta, top, inverse), own, table, count, load_memories, own_inner,
            slopes_fold, D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY,
        )  # fmt: skip
    if PER_MEMORY:
        acc -= total[:, None] * x  # [ROWS, DIM]
    return acc / LOG2E, delta


@triton.jit(do_not_specialize=SIZES)
def rows_backward_kernel(
    GRAD, RHO, SIDE, U, OUT, MASKED, TOP, DELTA, PATH, PULL,
    rows, count, inner, steps, step, first, blocks, strip,
    m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    RESIDENT: tl.constexpr, MASK: tl.constexpr, MASK_GRAD: tl.constexpr,
):  # fmt: skip
    """Gradient g of ROWS rows from the last step to the first: g <- g - h + `step_gradient`, with
    h = gain g. PULL takes h in place of the recall, MASKED takes sum_t step g (xb - x). Rows in
    doubt, whose TOP is inf, have g = 0 and add 0 to every sum.
    """
    pid = tl.program_id(0)
    problem, row = rows_of(pid, first, blocks, ROWS)
    _m, RHO, SIDE = memories_of(RHO, SIDE, problem, inner, m_o, m_i, count, STRIDE)
    U = of_problem(U, problem, inner, u_o, u_i, MASK)
    d = tl.arange(0, DIM)
    valid, at = row < rows, row.to(tl.int64)
    inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
    stored = (d < STRIDE)[None, :]  # [1, DIM]
    p = problem.to(tl.int64) * rows + at
    whole = p[:, None] * D + d[None, :]  # [ROWS, DIM]
    g = tl.load(GRAD + whole, mask=inside, other=0.0).to(tl.float32)  # [ROWS, DIM]
    local = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    every = local >= 0
    for back in range(0, steps):
        here = tl.cast(steps - 1 - back, tl.int64) * strip + local
        x = load_rows(PATH, here, every, 0, D, STRIDE, DIM)  # [ROWS, DIM]
        top = tl.load(TOP + here)
        g = tl.where((top == float("inf"))[:, None], 0.0, g)  # [ROWS, DIM]
        moves = tl.where(top == float("-inf"), 0.0, 1.0)[:, None]  # [ROWS, 1]
        if MASK_GRAD:
            xb = load_rows(PULL, here, every, 0, D, STRIDE, DIM)  # [ROWS, DIM]
            sum_so_far = tl.load(MASKED + whole, mask=inside, other=0.0)  # [ROWS, DIM]
            tl.store(MASKED + whole, sum_so_far + moves * step * g * (xb - x), mask=inside)
        h = moves * gain_of(U, u_row, u_feature, row, d, inside, step, MASK) * g  # [ROWS, DIM]
        if MASK_GRAD:  # all threads read the recall before h takes its place
            tl.debug_barrier()
        tl.store(PULL + here[:, None] * STRIDE + d[None, :], h, mask=stored)
        g -= h
        if not HARD:
            more, delta = step_gradient(  # [ROWS, DIM], [ROWS]
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
    own, hs, table, k0, count, top,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, PER_MEMORY: tl.constexpr,
):  # fmt: skip
    """(weights [ROWS, PROTOS], h rho [ROWS, PROTOS], scale [PROTOS]) of one tile of memories, for
    rows too wide for registers.
    """
    tile = load_sides(table, k0, count, D, STRIDE, DIM, PROTOS)
    _k, _rho, scale, bias = tile  # [PROTOS], pointer, [PROTOS], [PROTOS]
    _rows, half = own
    inner = wide_inner(own, tile, count, D, STRIDE, DIM, PREC)  # [ROWS, PROTOS]
    s = logits(inner, half, scale, bias, PER_MEMORY)  # [ROWS, PROTOS]
    w = tl.exp2(s - top[:, None])  # [ROWS, PROTOS]
    return w, wide_inner(hs, tile, count, D, STRIDE, DIM, PREC), scale


@triton.jit
def wide_h(
    OUT, MASKED, PATH, PULL, U, p, here, row, valid, every, top, u_row, u_feature, step,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    MASK: tl.constexpr, MASK_GRAD: tl.constexpr,
):  # fmt: skip
    """Replace g in OUT by g - h and the recall in PULL by h; returns |x|^2 of the rows."""
    doubt = (top == float("inf"))[:, None]  # [ROWS, 1]
    moves = tl.where(top == float("-inf"), 0.0, 1.0)[:, None]  # [ROWS, 1]
    norm = tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
        whole = p[:, None] * D + d[None, :]  # [ROWS, DIM]
        g = tl.where(doubt, 0.0, tl.load(OUT + whole, mask=inside, other=0.0))  # [ROWS, DIM]
        x = load_rows(PATH, here, every, d0, D, STRIDE, DIM)  # [ROWS, DIM]
        if MASK_GRAD:
            xb = load_rows(PULL, here, every, d0, D, STRIDE, DIM)  # [ROWS, DIM]
            sum_so_far = tl.load(MASKED + whole, mask=inside, other=0.0)  # [ROWS, DIM]
            tl.store(MASKED + whole, sum_so_far + moves * step * g * (xb - x), mask=inside)
        h = moves * gain_of(U, u_row, u_feature, row, d, inside, step, MASK) * g  # [ROWS, DIM]
        norm += tl.sum(x * x, 1)
        if MASK_GRAD:
            tl.debug_barrier()
        tl.store(PULL + here[:, None] * STRIDE + d[None, :], h, mask=(d < STRIDE)[None, :])
        tl.store(OUT + whole, g - h, mask=inside)
    return norm


@triton.jit
def add_step_gradient(
    OUT, DELTA, PATH, PULL, table, p, here, valid, every, norm, top, count,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr,
):  # fmt: skip
    """As `step_gradient` for rows too wide for registers: add the first result to g in OUT, DIM
    features at a time, and store delta.
    """
    RHO, _SIDE = table
    own, hs = ((PATH, here, every), 0.5 * norm), ((PULL, here, every), norm)
    safe = finite(top)
    mass, delta = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for k0 in range(0, count, PROTOS):
        w, slope, scale = wide_slopes(  # [ROWS, PROTOS] twice, [PROTOS]
            own, hs, table, k0, count, safe, D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY
        )  # fmt: skip
        mass += tl.sum(w, 1)
        delta += tl.sum(w * slope, 1)
    inverse, delta = normalise(mass, delta)
    tl.store(DELTA + here, delta)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        # [ROWS, DIM], [ROWS]
        acc, total = tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32)
        for k0 in range(0, count, PROTOS):
            w, slope, scale = wide_slopes(  # [ROWS, PROTOS] twice, [PROTOS]
                own, hs, table, k0, count, safe, D, STRIDE, DIM, PROTOS, PREC, PER_MEMORY
            )  # fmt: skip
            gz = w * inverse[:, None] * (slope - delta[:, None]) * scale[None, :]  # [ROWS, PROTOS]
            k = k0 + tl.arange(0, PROTOS)
            rho = load_rows(RHO, k.to(tl.int64), k < count, d0, D, STRIDE, DIM)  # [PROTOS, DIM]
            acc += dot(gz, rho, PREC)
            total += tl.sum(gz, 1)
        if PER_MEMORY:
            # [ROWS, DIM]
            acc -= total[:, None] * load_rows(PATH, here, every, d0, D, STRIDE, DIM)
        inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
        whole = p[:, None] * D + d[None, :]  # [ROWS, DIM]
        g = tl.load(OUT + whole, mask=inside, other=0.0)  # [ROWS, DIM]
        tl.store(OUT + whole, g + acc / LOG2E, mask=inside)


# The narrow kernel has g, x and h of a step in registers. Here they lie in memory, behind barriers
# and loops over features: as one kernel the two would share the first lines alone.
@triton.jit(do_not_specialize=SIZES)
def rows_backward_wide_kernel(
    GRAD, RHO, SIDE, U, OUT, MASKED, TOP, DELTA, PATH, PULL,
    rows, count, inner, steps, step, first, blocks, strip,
    m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    MASK: tl.constexpr, MASK_GRAD: tl.constexpr,
):  # fmt: skip
    """Gradient g of ROWS rows, in OUT (float32), DIM features at a time: g <- g - h + sum_k 2
    beta_k p_k (h rho_k - delta) (rho_k - x), with h = gain g, delta = sum_k p_k (h rho_k). It
    takes the arguments of `rows_backward_kernel`.
    """
    pid = tl.program_id(0)
    problem, row = rows_of(pid, first, blocks, ROWS)
    _m, RHO, SIDE = memories_of(RHO, SIDE, problem, inner, m_o, m_i, count, STRIDE)
    U = of_problem(U, problem, inner, u_o, u_i, MASK)
    valid, at = row < rows, row.to(tl.int64)
    p = problem.to(tl.int64) * rows + at
    local = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    every = local >= 0
    table = (RHO, SIDE)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
        whole = p[:, None] * D + d[None, :]  # [ROWS, DIM]
        g = tl.load(GRAD + whole, mask=inside, other=0.0).to(tl.float32)  # [ROWS, DIM]
        tl.store(OUT + whole, g, mask=inside)
    tl.debug_barrier()
    for back in range(0, steps):
        here = tl.cast(steps - 1 - back, tl.int64) * strip + local
        top = tl.load(TOP + here)
        norm = wide_h(
            OUT, MASKED, PATH, PULL, U, p, here, row, valid, every, top, u_row, u_feature, step,
            D, STRIDE, DIM, ROWS, MASK, MASK_GRAD,
        )  # fmt: skip
        tl.debug_barrier()
        if not HARD:
            add_step_gradient(
                OUT, DELTA, PATH, PULL, table, p, here, valid, every, norm, top, count,
                D, STRIDE, DIM, ROWS, PROTOS, PREC, PER_MEMORY,
            )  # fmt: skip
        tl.debug_barrier()
