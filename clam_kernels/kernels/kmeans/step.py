# SPDX-License-Identifier: Apache-2.0
"""A Lloyd iteration on a GPU in one pass over the rows: labels, and sums by label while a row is in
registers. For few centroids and features; wider problems take the two ops of `assign.py`, one after
another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.operands import batch_of, by_name
from ..common.score import load_rows
from ..common.sweep import UNSPECIALISED, of_problem, offset
from .assign import (
    candidates,
    exact_labels,
    in_two,
    kmeans_assign,
    kmeans_update,
    minus_shift,
    nearest_arguments,
)

# The most centroids and features whose sums fit in registers. Fewer centroids are padded to as
# many: a matrix instruction multiplies 64 rows at once.
MOST, FEATURES = 64, 32
# The largest value that bfloat16 represents, about.
LARGEST = tl.constexpr(3.38e38)
# Tiles whose sums are added in float32 before they are in float64.
TILES = tl.constexpr(16)


@triton.jit
def label_sums(chosen, x, PREC: tl.constexpr):
    """The product chosen^T x: sums [LABELS, DIM] of the rows that have a 1 in a column of `chosen`
    [ROWS, LABELS]. Three parts of bfloat16 have every bit of x, and a product with 0 or 1 rounds
    nothing.
    """
    if PREC == "float64":
        # [LABELS, DIM]
        sums = tl.dot(tl.trans(chosen).to(tl.float64), x.to(tl.float64), out_dtype=tl.float64)
        sums = sums.to(tl.float32)  # [LABELS, DIM]
    else:
        one = tl.trans(chosen.to(tl.bfloat16))  # [LABELS, ROWS]
        high = x.to(tl.bfloat16)  # [ROWS, DIM]
        rest = x - high.to(tl.float32)  # [ROWS, DIM]
        middle = rest.to(tl.bfloat16)  # [ROWS, DIM]
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)  # [ROWS, DIM]
        sums = tl.dot(one, high, tl.dot(one, middle, tl.dot(one, low)))  # [LABELS, DIM]
    return sums


@triton.jit(do_not_specialize=UNSPECIALISED)
def kmeans_step_kernel(
    X, C, HALVES, SIDE, ORIGIN, REACH, SHIFT, LABEL, PART, COUNT,
    rows, count, inner, splits, share, size, keep, unit, grain,
    x_o, x_i, c_o, c_i, m_o, m_i, s_o, s_i,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, WIDE: tl.constexpr, LABELS: tl.constexpr,
    SHIFTED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (split, problem): `share` rows of one problem. PART [problems, splits, count, D]
    takes the sums of x - shift over the rows of each label, COUNT their number. `error` carries the
    rounding error of a total (Kahan). The kernel reads SHIFT if SHIFTED.
    """
    pid = tl.program_id(0)
    problem, split = pid // splits, pid % splits
    m = offset(problem, inner, m_o, m_i)
    X += offset(problem, inner, x_o, x_i) * D
    C += offset(problem, inner, c_o, c_i) * D
    SHIFT = of_problem(SHIFT, problem, inner, s_o, s_i, SHIFTED)
    parts, side = HALVES + 2 * m * size * STRIDE, SIDE + 2 * m * size
    table = (parts, side, size, keep)
    reach = tl.load(REACH + m)
    k, d = tl.arange(0, LABELS), tl.arange(0, DIM)
    COUNT += pid.to(tl.int64) * count + k
    PART += (pid.to(tl.int64) * count + k)[:, None] * D + d[None, :]  # [LABELS, DIM]
    known = k < count
    inside = known[:, None] & (d < D)[None, :]  # [LABELS, DIM]
    begin = split * share
    end = begin + tl.minimum(share, rows - begin)
    for g0 in range(begin, end, ROWS * TILES):
        # [LABELS, DIM] twice
        total, error = tl.zeros((LABELS, DIM), tl.float32), tl.zeros((LABELS, DIM), tl.float32)
        number = tl.zeros((LABELS,), tl.float32)
        for n0 in range(g0, g0 + tl.minimum(end - g0, ROWS * TILES), ROWS):
            row = n0 + tl.arange(0, ROWS)
            valid, at = row < rows, row.to(tl.int64)
            label, runner, pair, more, _ = candidates(
                X, table, ORIGIN + m * D, row, valid, count, reach, unit, grain,
                D, STRIDE, DIM, ROWS, PROTOS, PREC, WIDE,
            )  # fmt: skip
            label = exact_labels(X, C, side + size, row, label, runner, pair, more, count, D)
            tl.store(LABEL + problem.to(tl.int64) * rows + at, label.to(tl.int64), mask=valid)
            x = load_rows(X, at, valid, 0, D, D, DIM)  # [ROWS, DIM]
            if SHIFTED:
                x = minus_shift(x, SHIFT, d, D)  # [ROWS, DIM]
            # 0 * inf would make the sums of other labels NaN: no part may be inf
            x = tl.where((label >= 0)[:, None], tl.clamp(x, -LARGEST, LARGEST), 0.0)  # [ROWS, DIM]
            chosen = tl.where(label[:, None] == k[None, :], 1.0, 0.0)  # [ROWS, LABELS]
            number += tl.sum(chosen, 0)
            more = label_sums(chosen, x, SUM) - error  # [LABELS, DIM]
            grown = total + more  # [LABELS, DIM]
            error = (grown - total) - more  # [LABELS, DIM]
            total = grown
        # each entry belongs to one thread: threads exchange nothing through memory
        later = g0 + tl.zeros((1,), tl.int32) > begin
        before = tl.load(PART, mask=inside & later[None, :], other=0.0)  # [LABELS, DIM]
        tl.store(PART, before + (total.to(tl.float64) - error.to(tl.float64)), mask=inside)
        counted = tl.load(COUNT, mask=known & later, other=0)
        tl.store(COUNT, counted + number.to(tl.int64), mask=known)


def serves(x: Tensor, count: int, weight: Tensor | None, precision: str) -> bool:
    """Whether the sums fit in the registers of a program. Weights may be too large for float32."""
    d = x.shape[-1]
    few = weight is None and count <= MOST and d <= FEATURES
    return few and bool(launch.settings("kmeans_step", x.device, precision, d))


def kmeans_step(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, sums and counts: one launch after those for the centroids, or the two ops."""
    count = centroids.shape[-2]
    if not serves(x, count, weight, precision):
        labels, _ = kmeans_assign(x, centroids, shift, mask, False, precision)
        if weight is not None:
            batch = batch_of([(labels, 0), (weight, 0)])
            labels = labels.expand(batch).contiguous()
        return labels, *kmeans_update(x, labels, count, weight, shift)
    return _in_one_pass(x, centroids, shift, mask, precision)


def _in_one_pass(
    x: Tensor, centroids: Tensor, shift: Tensor | None, mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    shift_parts = None if shift is None else in_two(shift)
    a = nearest_arguments(
        "kmeans_step", x, centroids, shift, mask, precision, apart=True, shift_parts=shift_parts
    )
    (outer, inner), (n, d), count = a.problems, x.shape[-2:], centroids.shape[-2]
    problems, s = outer * inner, a.shift
    blocks = triton.cdiv(n, a.chosen["ROWS"])
    splits = max(1, min(blocks, launch.PROGRAMS // max(problems, 1)))
    share = triton.cdiv(blocks, splits) * a.chosen["ROWS"]
    splits = triton.cdiv(n, share) if n else 0
    labels = launch.empty((*a.batch, n), torch.int64, x.device)
    part = launch.empty((problems, splits, count, d), torch.float64, x.device)
    number = launch.empty((problems, splits, count), torch.int64, x.device)
    launch.launch(
        kmeans_step_kernel, (problems * splits,), x.device, **a.operands,
        SHIFT=s, **by_name(("s_o", "s_i"), None if s is None else s.stride()[:2]),
        LABEL=labels, PART=part, COUNT=number, splits=splits, share=share,
        **a.numbers, **a.chosen, LABELS=MOST, SHIFTED=s is not None,
        SUM="float64" if launch.INTERPRETED else "bf16",
    )  # fmt: skip
    return labels, part.sum(1).view(*a.batch, count, d), number.sum(1).view(*a.batch, count)
