# SPDX-License-Identifier: Apache-2.0
"""Gradients of the associative-memory family on a GPU; equations (8) and (9) of docs/ops/am.md.

Each cell of scratch takes three launches. The recursion stores its states, their recalls and the
sums of their weights. One kernel computes the gradient of the rows from the last step to the first
(`am/backward_rows.py`) and stores h = gain g and its mean under the weights. Another sweeps all
rows of all steps for each tile of memories. Its partial sums have a fixed order, and are added in
float64.
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
from ..common.sweep import SIZES
from . import backward_fused, exact_backward
from .backward_fused import distance_sums, store_memories
from .backward_rows import rows_backward_kernel, rows_backward_wide_kernel
from .call import Call, ScratchCell, Totals
from .forward import flags_of, launch_recursion
from .memories import memories_of

# Problems of a cell are the third dim of a grid, which has a limit.
MOST_PROBLEMS = 65535
# With wider rows, registers cannot contain the weights and slopes of a whole tile.
RESIDENT_FEATURES = 32


# ---- the memories' side --------------------------------------------------------------------------


@triton.jit
def inverse_of(TOTAL, at, valid):
    """1 / total [ROWS] of the weights; 0 where all memories are masked."""
    total = tl.load(TOTAL + at, mask=valid, other=0.0)
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def norms_in(PATH, at, valid, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """|x|^2 [ROWS] of states in scratch, DIM features at a time."""
    norm = tl.zeros((at.shape[0],), tl.float32)
    for d0 in range(0, D, DIM):
        part = load_rows(PATH, at, valid, d0, D, STRIDE, DIM)  # [ROWS, DIM]
        norm += tl.sum(part * part, 1)
    return norm


@triton.jit
def load_tile(
    table, k0, count,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of memories: `load_sides` for rows too wide for registers, else `load_memories`."""
    if WIDE:
        tile = load_sides(table, k0, count, D, STRIDE, DIM, PROTOS)
    else:
        tile = load_memories(table, k0, count, D, STRIDE, DIM, PROTOS)
    return tile


@triton.jit
def tile_inner(
    x, half, X, at, valid, tile, count,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PREC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, PROTOS] of rows with a tile of memories: `own_inner` of the tile x, or WIDE
    `wide_inner` of the rows `at` of X.
    """
    if WIDE:
        inner = wide_inner(((X, at, valid), half), tile, count, D, STRIDE, DIM, PREC)
    else:
        inner = own_inner((x, half), tile, count, D, STRIDE, DIM, PREC)
    return inner


@triton.jit(do_not_specialize=SIZES)
def memories_backward_kernel(
    RHO, SIDE, TOP, TOTAL, DELTA, PATH, PULL, PART, SUMS,
    count, inner, steps, strip, rows, share,
    m_o, m_i,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, PER_MEMORY: tl.constexpr, HARD: tl.constexpr,
    ENERGY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sweep with the roles swapped: a tile of memories stays in registers, and the kernel reads
    `share` rows of one problem in every step. PART takes sum_n (p h + 2 beta gz x) of each memory,
    SUMS take sum_n gz and sum_n gz |x - rho|^2, with weights p and gz = p (h rho - delta). ENERGY,
    with q = p g: sum_n q x, sum_n q and sum_n q (log2 w - log2 p). HARD: sum_n p h, with p = 1 for
    the nearest memory.
    """
    tiles = tl.cdiv(count, PROTOS)
    here, piece = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    split, problem = tl.program_id(1), tl.program_id(2)
    _m, RHO, SIDE = memories_of(RHO, SIDE, problem, inner, m_o, m_i, count, STRIDE)
    d0 = piece * DIM
    tile = load_tile((RHO, SIDE), here * PROTOS, count, D, STRIDE, DIM, PROTOS, WIDE)
    k, _rho, scale, bias = tile  # [PROTOS], [PROTOS, DIM] or a pointer, [PROTOS], [PROTOS]
    known = k < count
    lift = tl.load(SIDE + 2 * count + k, mask=known, other=0.0)
    own = tl.load(SIDE + 3 * count + k, mask=known, other=0.0)
    acc = tl.zeros((PROTOS, DIM), tl.float32)  # [PROTOS, DIM]
    mass, beta_sum = tl.zeros((PROTOS,), tl.float32), tl.zeros((PROTOS,), tl.float32)
    begin = split * share
    end = tl.minimum(begin + share, rows)
    for t in range(0, steps):
        first = tl.cast(t, tl.int64) * strip + problem.to(tl.int64) * rows
        for n0 in range(begin, end, ROWS):
            n = n0 + tl.arange(0, ROWS)
            valid = n < end
            at = first + n
            # top = inf: rows past the end have the weight exp2(-inf), whatever the biases are
            top = tl.load(TOP + at, mask=valid, other=float("inf"))
            sure = top != float("inf")
            inverse = tl.where(sure, inverse_of(TOTAL, at, valid), 0.0)
            delta = tl.load(DELTA + at, mask=valid, other=0.0)
            x = load_rows(PATH, at, valid, d0, D, STRIDE, DIM)  # [ROWS, DIM]
            norm = norms_in(PATH, at, valid, D, STRIDE, DIM) if WIDE else tl.sum(x * x, 1)
            # [ROWS, PROTOS]
            inside = tile_inner(x, norm, PATH, at, valid, tile, count, D, STRIDE, DIM, PREC, WIDE)
            s = logits(inside, 0.5 * norm, scale, bias, PER_MEMORY)  # [ROWS, PROTOS]
            w = tl.exp2(s - finite(top)[:, None]) * inverse[:, None]  # [ROWS, PROTOS]
            if ENERGY:
                q = w * delta[:, None]  # [ROWS, PROTOS]
                acc += dot(tl.trans(q), x, PREC)
                mass += tl.sum(q, 0)
                # [ROWS, PROTOS]
                surprise = lift[None, :] - (s - top[:, None]) - tl.log2(inverse)[:, None]
                beta_sum += tl.sum(tl.where(w == 0.0, 0.0, q * surprise), 0)
            elif HARD:
                h = load_rows(PULL, at, valid, d0, D, STRIDE, DIM)  # [ROWS, DIM]
                # [ROWS, PROTOS]
                w = tl.where(k.to(tl.float32)[None, :] == top[:, None], 1.0, 0.0)
                acc += dot(tl.trans(w), h, PREC)
            else:
                h = load_rows(PULL, at, valid, d0, D, STRIDE, DIM)  # [ROWS, DIM]
                slope = tile_inner(  # [ROWS, PROTOS]
                    h, norm, PULL, at, valid, tile, count, D, STRIDE, DIM, PREC, WIDE
                )
                gz = w * (slope - delta[:, None])  # [ROWS, PROTOS]
                acc += dot(tl.trans(w), h, PREC)
                acc += dot(tl.trans(gz * (scale / LOG2E)[None, :]), x, PREC)
                mass += tl.sum(gz, 0)
                beta_sum += distance_sums(gz, norm, own, inside)
    slot = (problem * tl.num_programs(1) + split).to(tl.int64) * count + k
    store_memories(PART, SUMS, slot, known, d0, piece, acc, mass, beta_sum, STRIDE, DIM)


# ---- launches ------------------------------------------------------------------------------------


def cells(
    call: Call, steps: int, step: float, flag: Tensor, keep: int = 2
) -> Iterator[ScratchCell]:
    """Yield cells after the recursion has stored all their steps. `flag` takes which rows are in
    doubt; `keep` is 3 for the energy.
    """
    chosen, stride = call.recursion(keep), call.memories.stride
    block = max(chosen["ROWS"], call.settings("am_rows_backward")["ROWS"])
    blocks = triton.cdiv(call.rows, block)
    limit = max(1, launch.SCRATCH // (steps * (2 * stride + 3) * block))
    most = max(1, min(MOST_PROBLEMS, launch.SCRATCH // (call.memories.size * stride)))
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
        cell = ScratchCell(o, problems, first, count, block, path, pull, top, total, delta)
        grid, at, share = cell.grid(chosen["ROWS"])
        launch_recursion(
            call, call.at(o, problems), grid, flags,
            OUT=None, FLAG=flag[o, problems], TOP=top, TOTAL=total, PATH=path, PULL=pull,
            steps=steps, step=step, first=at, blocks=share, strip=strip,
        )  # fmt: skip
        yield cell


def sweep_memories(call: Call, cell: ScratchCell, totals: Totals, steps: int, energy: bool) -> None:
    """Add the sums over the rows of one cell to `totals`."""
    chosen = call.settings("am_memories_backward")
    memories, wide = call.memories, "DIM" in chosen
    tiles = triton.cdiv(memories.size, chosen["PROTOS"])
    pieces = triton.cdiv(memories.stride, chosen["DIM"]) if wide else 1
    splits = max(1, min(cell.blocks, launch.PROGRAMS // (tiles * pieces * cell.size)))
    share = triton.cdiv(cell.blocks, splits) * cell.block
    part = call.new(cell.size, splits, memories.size, memories.stride)
    sums = call.new(cell.size, splits, memories.size, 2)
    launch.launch(
        memories_backward_kernel, (tiles * pieces, splits, cell.size), call.device,
        **call.at(cell.o, cell.problems).memories(),
        TOP=cell.top, TOTAL=cell.total, DELTA=cell.delta, PATH=cell.path, PULL=cell.pull,
        PART=part, SUMS=sums, count=memories.size, inner=cell.size, steps=steps,
        strip=cell.size * cell.rows, rows=cell.rows, share=share,
        **call.tile(chosen), PER_MEMORY=memories.per_memory, HARD=memories.hard,
        ENERGY=energy, WIDE=wide,
    )  # fmt: skip
    totals.add(cell.o, cell.problems, part, sums)


def _walk_back(
    call: Call, cell: ScratchCell, grad: Tensor, out: Tensor, mask_grad: Tensor | None, step: float
) -> None:
    """Gradients of the rows of one cell, into `out`, and of the mask, into `mask_grad`."""
    chosen = call.settings("am_rows_backward")
    grid, first, share = cell.grid(chosen["ROWS"])
    views, flags = call.at(cell.o, cell.problems), {}
    grads, outs, masks = (
        None if x is None else x.view(call.outer, call.inner, call.rows, -1)[cell.o, cell.problems]
        for x in (grad, out, mask_grad)
    )
    kernel = rows_backward_wide_kernel
    if "DIM" not in chosen:
        kernel = rows_backward_kernel
        resident = call.memories.size <= chosen["PROTOS"] and call.features <= RESIDENT_FEATURES
        flags = {"RESIDENT": resident}
    launch.launch(
        kernel, grid, call.device, **views.memories(), **views.update_mask(),
        GRAD=grads, OUT=outs, MASKED=masks, MASK_GRAD=masks is not None,
        TOP=cell.top, DELTA=cell.delta, PATH=cell.path, PULL=cell.pull,
        rows=call.rows, count=call.memories.size, inner=cell.size, steps=len(cell.path), step=step,
        first=first, blocks=share, strip=cell.size * cell.rows, **call.tile(chosen),
        PER_MEMORY=call.memories.per_memory, HARD=call.memories.hard, **flags,
    )  # fmt: skip


def fit(gradient: Tensor | None, argument: Any, needed: bool, v: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its argument; empty unless the caller needs it."""
    if gradient is None or not (needed and isinstance(argument, Tensor)):
        return v.new_empty(0)
    return gradient.sum_to_size(argument.shape).to(argument.dtype).contiguous()


def whole(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The upstream gradient, dense."""
    return launch.align(launch.plain(grad).expand(tuple(shape)).contiguous())


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

    Scratch: 256 MB, or T steps of one block of rows if that is more; and partial sums of at most
    the same size.
    """
    call = Call(v, rho, beta, update_mask, log_weights, precision)
    arguments = (v, rho, beta, update_mask, log_weights)
    grad, totals = whole(grad, call.shape), Totals(call)
    out = call.new(*call.shape)
    wants = needs[3] and update_mask is not None
    flag = call.new(*call.shape[:-1], dtype=torch.uint8)
    mask_grad = torch.zeros_like(out) if wants else None
    sums = needs[1] or needs[2] or needs[4]
    again = None
    if steps == 0 or step == 0:
        out.copy_(grad)
    else:
        if backward_fused.serves(call, wants):
            backward_fused.backward(call, grad, out, flag, steps, step, totals if sums else None)
        else:
            for cell in cells(call, steps, step, flag):
                _walk_back(call, cell, grad, out, mask_grad, step)
                if sums:
                    sweep_memories(call, cell, totals, steps, energy=False)
        again = exact_backward.recursion_backward(
            call.operands(), grad, steps, step, flag, out, mask_grad, sums
        )
    if not sums:
        rows_side = (out, None, None, mask_grad, None)
        return tuple(fit(x, a, n, v) for x, a, n in zip(rows_side, arguments, needs, strict=True))
    acc, mass, beta_sum = totals.of_batch()
    if not call.memories.hard:
        sharp = beta.double()[..., None] if isinstance(beta, Tensor) and beta.ndim else beta
        pull = call.memories.table[..., : call.features].double() * mass[..., None]
        acc = acc - 2 * (sharp * pull)
    if again is not None:
        exact_acc, exact_mass, exact_beta = again.of_batch()
        acc, mass, beta_sum = acc + exact_acc, mass + exact_mass, beta_sum + exact_beta
    gradients = (out, acc, -beta_sum, mask_grad, mass)
    return tuple(fit(x, a, n, v) for x, a, n in zip(gradients, arguments, needs, strict=True))


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
    """Gradients of one step; this computes the recall and the sum of the weights again."""
    return am_recursion_backward(
        grad, v, rho, beta, 1, step, update_mask, log_weights, needs, precision
    )
