# SPDX-License-Identifier: Apache-2.0
"""Backward of the recursion for few features and few memories, in one launch: every gradient of a
block of rows while it is in registers. Equations (8) and (9) of docs/ops/am.md.

A program runs the recursion of a block of rows and stores its states in a strip of scratch of its
own. It then goes back through the steps and computes all weights of a row again. The gradients of
the memories stay in registers from the first block to the last. Wider problems: `am/backward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.fold import finite, normalise
from ..common.score import (
    LOG2E,
    dot,
    load_checked_rows,
    load_memories,
    load_rows,
    logits,
    own_inner,
)
from ..common.sweep import UNSPECIALISED, of_problem
from .call import Call
from .doubt import MOST, doubt_flag, final_flags, sharpest
from .memories import rows_and_memories_of
from .recursion import gain_of, next_state, recall
from .totals import MemoryTotals


@triton.jit
def store_memories(
    PART, SUMS, slot, exists, d0, piece, acc, mass, beta_sum,
    STRIDE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Store the sums of one tile of memories: acc [PROTOS, DIM], the others [PROTOS]."""
    d = d0 + tl.arange(0, DIM)
    where = exists[:, None] & (d < STRIDE)[None, :]  # [PROTOS, DIM], as acc
    tl.store(PART + slot[:, None] * STRIDE + d[None, :], acc, mask=where)
    if piece == 0:
        tl.store(SUMS + slot * 2, mass, mask=exists)
        tl.store(SUMS + slot * 2 + 1, beta_sum, mask=exists)


@triton.jit
def store_states(
    PATH, x, steps, step, U, u_row, u_feature, row, inside, table, count, sharp, poison,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Store the state before each step; returns 1 for rows in doubt, whose states are 0."""
    _RHO, SIDE = table
    d = tl.arange(0, DIM)
    keep = tl.arange(0, ROWS)[:, None] * STRIDE + d[None, :]  # [ROWS, DIM]
    # [ROWS, DIM] if MASK, else a number
    gain = gain_of(U, u_row, u_feature, row, d, inside, step, MASK)
    flag, total = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.float32)
    for t in range(0, steps):
        tl.store(PATH + tl.cast(t, tl.int64) * ROWS * STRIDE + keep, x, mask=(d < STRIDE)[None, :])
        norm = tl.sum(x * x, 1)
        xb, _, total = recall(  # xb [ROWS, DIM]
            x, 0.5 * norm, table, table, count, norm,
            D, STRIDE, DIM, ROWS, PROTOS, PREC, False, False, False,
        )  # fmt: skip
        flag |= doubt_flag(x, xb, norm, total, sharp)
        x = next_state(x, xb, gain)  # [ROWS, DIM]
    flag = tl.where(poison == 0.0, final_flags(flag, total, SIDE, count, PROTOS), 0)
    tl.debug_barrier()
    doubt = (flag > 0)[:, None] & (d < STRIDE)[None, :]  # [ROWS, DIM]
    for t in range(0, steps):
        at = PATH + tl.cast(t, tl.int64) * ROWS * STRIDE + keep  # [ROWS, DIM]
        tl.store(at, tl.zeros((ROWS, DIM), tl.float32), mask=doubt)
    return flag


@triton.jit
def weights_and_slopes(
    x, norm, g, gain, poison, valid, table, count,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """(h, p, gz, x rho, rho, scale) of one step: h = gain g [ROWS, DIM]; the weights p, 0 where
    `poison` is -inf, and gz = p (h rho - delta) with delta = sum_k p_k (h rho_k), both [ROWS,
    PROTOS]; all memories rho [PROTOS, DIM].
    """
    # loaded in each step and not before the loops: this takes fewer registers
    tile = load_memories(table, 0, count, D, STRIDE, DIM, PROTOS)
    _k, rho, scale, bias = tile  # [PROTOS], [PROTOS, DIM], [PROTOS], [PROTOS]
    inner_x = own_inner((x, norm), tile, count, D, STRIDE, DIM, PREC)  # [ROWS, PROTOS]
    s = logits(inner_x, 0.5 * norm, scale, bias, False)  # [ROWS, PROTOS]
    top = tl.max(s, 1)
    w = tl.exp2(s - finite(top)[:, None] + poison[:, None])  # [ROWS, PROTOS]
    total = tl.sum(w, 1)
    moves = tl.where(total == 0.0, 0.0, 1.0)[:, None]  # [ROWS, 1]
    h = moves * gain * g  # [ROWS, DIM]
    slope = dot(h, tl.trans(rho), PREC)  # [ROWS, PROTOS]
    inverse, delta = normalise(total, tl.sum(w * slope, 1))
    p = tl.where(valid[:, None], w * inverse[:, None], 0.0)  # [ROWS, PROTOS]
    return h, p, p * (slope - delta[:, None]), inner_x, rho, scale


@triton.jit
def distance_sums(gz, norm, memory_norm, inner):
    """sum_n gz_nk |x_n - rho_k|^2 [PROTOS] of a tile gz [ROWS, PROTOS], from the squared norms of
    rows and memories and their products `inner` [ROWS, PROTOS].
    """
    far = memory_norm[None, :] + norm[:, None] - 2.0 * inner  # [ROWS, PROTOS]
    return tl.sum(gz * tl.minimum(tl.maximum(far, 0.0), MOST), 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def fused_backward_kernel(
    V, RHO, SIDE, CENTRE, U, GRAD, OUT, FLAG, PATH, PART, SUMS,
    rows, count, inner, steps, step, first, splits, share,
    v_o, v_i, m_o, m_i, u_o, u_i, u_row, u_feature,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, MASK: tl.constexpr, MEMORIES: tl.constexpr,
):  # fmt: skip
    """Program (split, problem): `share` rows of one problem. OUT takes g before the first step; a
    step is g <- g - h + 2 beta sum_k gz_k rho_k, with h = gain g, gz_k = p_k (h rho_k - delta) and
    delta = sum_k p_k (h rho_k). MEMORIES: PART takes sum_n (p h + 2 beta gz x) of each memory, SUMS
    take sum_n gz and sum_n gz |x - rho|^2, over all rows and steps.
    """
    pid = tl.program_id(0)
    problem, split = pid // splits, pid % splits
    _m, V, RHO, SIDE, CENTRE = rows_and_memories_of(
        V, RHO, SIDE, CENTRE, problem, inner, v_o, v_i, m_o, m_i, count, D, STRIDE
    )
    U = of_problem(U, problem, inner, u_o, u_i, MASK)
    PATH += pid.to(tl.int64) * steps * ROWS * STRIDE

    table = (RHO, SIDE)
    sharp, _, _ = sharpest(SIDE, count, PROTOS, False)
    k = tl.arange(0, PROTOS)
    acc = tl.zeros((PROTOS, DIM), tl.float32)  # [PROTOS, DIM]
    mass, beta_sum = tl.zeros((PROTOS,), tl.float32), tl.zeros((PROTOS,), tl.float32)
    d = tl.arange(0, DIM)
    strip = tl.arange(0, ROWS).to(tl.int64)
    begin = (first + split) * share
    # the sum of both may be past 2^31
    for n0 in range(begin, begin + tl.minimum(share, rows - begin), ROWS):
        row = n0 + tl.arange(0, ROWS)
        valid, at = row < rows, row.to(tl.int64)
        inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
        whole = (problem.to(tl.int64) * rows + at)[:, None] * D + d[None, :]  # [ROWS, DIM]
        x, _norm, poison = load_checked_rows(V, CENTRE, at, valid, 0, D, DIM)  # x [ROWS, DIM]
        flag = store_states(
            PATH, x, steps, step, U, u_row, u_feature, row, inside, table, count, sharp, poison,
            D, STRIDE, DIM, ROWS, PROTOS, PREC, MASK,
        )  # fmt: skip
        tl.store(FLAG + problem.to(tl.int64) * rows + at, flag.to(tl.uint8), mask=valid)
        poison = tl.where(flag > 0, float("-inf"), poison)  # a row in doubt adds 0 to every sum
        tl.debug_barrier()  # the states are read in another layout
        g = tl.load(GRAD + whole, mask=inside, other=0.0).to(tl.float32)  # [ROWS, DIM]
        # [ROWS, DIM] if MASK, else a number
        gain = gain_of(U, u_row, u_feature, row, d, inside, step, MASK)
        for back in range(0, steps):
            here = tl.cast(steps - 1 - back, tl.int64) * ROWS + strip
            x = load_rows(PATH, here, strip >= 0, 0, D, STRIDE, DIM)  # [ROWS, DIM]
            norm = tl.sum(x * x, 1)
            h, p, gz, inner_x, rho, scale = weights_and_slopes(
                x, norm, g, gain, poison, valid, table, count, D, STRIDE, DIM, PROTOS, PREC
            )
            if MEMORIES:
                mass += tl.sum(gz, 0)
                norms = tl.load(SIDE + 3 * count + k, mask=k < count, other=0.0)
                beta_sum += distance_sums(gz, norm, norms, inner_x)
                acc += dot(tl.trans(p), h, PREC)
            gz *= (scale / LOG2E)[None, :]  # [ROWS, PROTOS]
            if MEMORIES:
                acc += dot(tl.trans(gz), x, PREC)
            g += dot(gz, rho, PREC) - h
        tl.store(OUT + whole, g.to(OUT.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next block's states take this one's place
    if MEMORIES:
        slot = pid.to(tl.int64) * count + k
        store_memories(PART, SUMS, slot, k < count, 0, 0, acc, mass, beta_sum, STRIDE, DIM)


def serves(call: Call, mask_grad: bool) -> bool:
    """Whether the registers of a program can contain all memories and their gradient. They cannot
    contain the gradient of the mask as well, nor a beta of each memory.
    """
    most, memories = call.settings("am_fused_backward").get("PROTOS", 0), call.memories
    special = memories.hard or memories.per_memory or mask_grad
    return 0 < memories.size <= most and not special


def backward(
    call: Call,
    grad: Tensor,
    out: Tensor,
    flag: Tensor,
    steps: int,
    step: float,
    totals: MemoryTotals | None,
) -> None:
    """Write `out` and `flag`; add the gradients of the memories to `totals` unless it is None."""
    settings = dict(call.settings("am_fused_backward"))  # the table keeps its row
    count, stride = call.memories.size, call.memories.stride
    settings["PROTOS"] = min(settings["PROTOS"], launch.dim(count))
    blocks = triton.cdiv(call.rows, settings["ROWS"])
    splits = max(1, min(blocks, launch.PROGRAMS // max(call.outer * call.inner, 1)))
    share = triton.cdiv(blocks, splits) * settings["ROWS"]
    splits = triton.cdiv(call.rows, share) if blocks else 0
    strip = steps * settings["ROWS"] * stride
    most = max(1, min(launch.PROGRAMS, launch.SCRATCH // strip))
    path = call.new(min(most, call.outer * call.inner * splits) * strip)
    grads, outs = (x.view(call.outer, call.inner, call.rows, call.features) for x in (grad, out))
    flags = flag.view(call.outer, call.inner, call.rows)
    for o, problems, first, run in call.cells(splits, most):
        views, size = call.at(o, problems), problems.stop - problems.start
        part = None if totals is None else call.new(size, run, count, stride)
        sums = None if totals is None else call.new(size, run, count, 2)
        launch.launch(
            fused_backward_kernel, (size * run,), call.device,
            **views.rows(), **views.memories(), CENTRE=views.centre, **views.update_mask(),
            GRAD=grads[o, problems], OUT=outs[o, problems], FLAG=flags[o, problems],
            PATH=path, PART=part, SUMS=sums, rows=call.rows, count=count, inner=size,
            steps=steps, step=step, first=first, splits=run, share=share,
            **call.tile(settings), MEMORIES=totals is not None,
        )  # fmt: skip
        if totals is not None and part is not None and sums is not None:
            totals.add(o, problems, part, sums)
