# SPDX-License-Identifier: Apache-2.0
"""Soft assignment on a GPU: log-sum-exp and label of each row, soft counts, the same bits at every
call. Equations (1) to (3) of docs/ops/dec.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.fold import inverse
from ..common.sweep import offset, rows_of
from ..kmeans.assign import kmeans_assign
from .call import Call, alpha_of, merge
from .scores import (
    UNSPECIALISED,
    assignments,
    distances,
    is_regular,
    log_total,
    total_fold,
    total_init,
    weights,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def dec_totals_kernel(
    X, MU, ALPHA, NEAREST, LABEL, LSE, NUMBERS,
    rows, count, inner, blocks, size, unit, alpha, x_o, x_i, m_o, m_i, a_o, a_i, l_o, l_i,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, HAS_ALPHA: tl.constexpr,
    LABELS: tl.constexpr,
):  # fmt: skip
    """L = log sum_j exp(s_j) of ROWS rows to LSE, and their labels from NEAREST to LABEL if LABELS;
    NaN and -1 where a row or the problem is not finite. NUMBERS [2, size] takes (top, 1 / total) of
    `total_fold` for the soft counts; top = inf marks a row that is not finite.
    """
    problem, row = rows_of(tl.program_id(0), 0, blocks, ROWS)
    X += offset(problem, inner, x_o, x_i) * D
    MU += offset(problem, inner, m_o, m_i) * D
    freedom = alpha_of(ALPHA, problem, inner, a_o, a_i, alpha, HAS_ALPHA)
    at, valid = row.to(tl.int64), row < rows
    regular = is_regular(X, at, valid, D, DIM)
    own = (X, MU, at, regular, freedom)
    top, total = total_init(ROWS, KIND)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        known = k < count
        far = distances(own, k, known, count, unit, D, DIM, WIDE, KIND, PREC)  # [ROWS, PROTOS]
        e = weights(far, freedom, known, KIND)  # [ROWS, PROTOS]
        top, total = total_fold((top, total), e, KIND)
    p = problem.to(tl.int64) * rows + at
    if LABELS:
        lse = tl.where(regular, log_total(top, total), float("nan"))
        tl.store(LSE + p, lse, mask=valid)
        label = tl.load(NEAREST + offset(problem, inner, l_o, l_i) + at, mask=valid, other=-1)
        tl.store(LABEL + p, tl.where(lse == lse, label, -1), mask=valid)
    tl.store(NUMBERS + p, tl.where(regular, top, float("inf")), mask=valid)
    tl.store(NUMBERS + tl.cast(size, tl.int64) + p, inverse(total), mask=valid)


@triton.jit(do_not_specialize=UNSPECIALISED)
def dec_counts_kernel(
    X, MU, ALPHA, WEIGHT, NUMBERS, PART,
    rows, count, inner, chunks, chunk, size, unit, alpha,
    x_o, x_i, m_o, m_i, a_o, a_i, w_o, w_i, w_n,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, HAS_ALPHA: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """sum_n w_n q_nj of PROTOS centroids over the finite rows of one chunk, to PART [problems,
    chunks, count + 1] float64; its last column takes the number of rows that are not finite.
    """
    tiles = tl.cdiv(count, PROTOS)
    here, piece = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    problem, share = piece // chunks, piece % chunks
    X += offset(problem, inner, x_o, x_i) * D
    MU += offset(problem, inner, m_o, m_i) * D
    freedom = alpha_of(ALPHA, problem, inner, a_o, a_i, alpha, HAS_ALPHA)
    if WEIGHTED:
        WEIGHT += offset(problem, inner, w_o, w_i)
    NUMBERS += problem.to(tl.int64) * rows
    k = here * PROTOS + tl.arange(0, PROTOS)
    known = k < count
    total, bad = tl.zeros((PROTOS,), tl.float64), tl.zeros((1,), tl.int32)
    begin = share * chunk
    end = tl.minimum(begin + chunk, rows)
    for n0 in range(begin, end, ROWS):
        row = n0 + tl.arange(0, ROWS)
        at, valid = row.to(tl.int64), row < end
        top = tl.load(NUMBERS + at, mask=valid, other=0.0)
        regular = valid & (top != float("inf"))
        bad += tl.sum((valid & (top == float("inf"))).to(tl.int32), 0)
        unity = tl.load(NUMBERS + tl.cast(size, tl.int64) + at, mask=valid, other=0.0)
        own = (X, MU, at, regular, freedom)
        far = distances(own, k, known, count, unit, D, DIM, WIDE, KIND, PREC)  # [ROWS, PROTOS]
        e = weights(far, freedom, known, KIND)  # [ROWS, PROTOS]
        q = assignments(e, top, unity, KIND)  # [ROWS, PROTOS]
        w = regular.to(tl.float32)
        if WEIGHTED:
            w = tl.load(WEIGHT + at * w_n, mask=regular, other=0.0).to(tl.float32)
        total += tl.sum(q * w[:, None], 0).to(tl.float64)
    PART += piece.to(tl.int64) * (count + 1)
    tl.store(PART + k, total, mask=known)
    last = count + tl.arange(0, 1)
    tl.store(PART + last, bad.to(tl.float64), mask=(last * 0 + here) == 0)


def row_totals(call: Call, nearest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(NUMBERS of the rows, their log-sum-exp, their labels); the latter two are empty without the
    nearest centroids, an operand of the call. One launch.
    """
    size = call.problems * call.rows
    numbers = call.new(2, size)
    some = nearest is not None
    lse = call.new(*call.batch, call.rows if some else 0)
    labels = call.new(*call.batch, call.rows if some else 0, dtype=torch.int64)
    tile = call.tile("dec_totals")
    blocks = triton.cdiv(call.rows, tile["ROWS"])
    launch.launch(
        dec_totals_kernel, (call.problems * blocks,), call.device, **call.operands(),
        **call.strides("NEAREST", ("l_o", "l_i")), LABEL=labels if some else None,
        LSE=lse if some else None, NUMBERS=numbers, LABELS=some, size=size, blocks=blocks, **tile,
    )  # fmt: skip
    return numbers, lse, labels


def count_parts(call: Call, numbers: Tensor) -> Tensor:
    """The soft counts of each chunk, [problems, chunks, K + 1]. One launch."""
    part = call.new(call.problems, call.chunks, call.count + 1, dtype=torch.float64)
    tile = call.tile("dec_counts")
    tiles = triton.cdiv(call.count, tile["PROTOS"])
    launch.launch(
        dec_counts_kernel, (tiles * call.chunks * call.problems,), call.device,
        **call.operands(), **call.strides("WEIGHT", ("w_o", "w_i", "w_n")),
        WEIGHTED="WEIGHT" in call.views, NUMBERS=numbers, PART=part,
        chunks=call.chunks, chunk=call.chunk, size=call.problems * call.rows, **tile,
    )  # fmt: skip
    return part


def student_t_stats(
    z: Tensor, mu: Tensor, alpha: float | Tensor, weight: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp, labels, soft counts, and how many rows are not finite: three launches after
    those of `kmeans_assign`.
    """
    nearest, _ = kmeans_assign(z, mu, None, None, False, precision)
    return soft_assignment(z, mu, alpha, weight, nearest, precision)


def soft_assignment(
    z: Tensor,
    mu: Tensor,
    alpha: float | Tensor,
    weight: Tensor | None,
    nearest: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`student_t_stats` with the labels of the finite rows. Three launches."""
    call = Call(z, mu, alpha, precision, {"NEAREST": (nearest, 1), "WEIGHT": (weight, 1)})
    numbers, lse, labels = row_totals(call, nearest)
    part = count_parts(call, numbers)
    bad = call.new(*call.batch, dtype=torch.int64)
    counts = merge(call, part, call.count, "counts", bad)
    return lse, labels, counts.view(*call.batch, call.count), bad
