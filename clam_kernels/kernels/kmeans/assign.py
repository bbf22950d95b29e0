# SPDX-License-Identifier: Apache-2.0
"""k-means on a GPU: the nearest centroid of every row, with float64's label in every precision, and
sums of rows by label, the same bits at every call. Equations: docs/ops/kmeans.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.halves import (
    halves,
    load_biases,
    load_halves,
    own_halves,
    power,
    raw_halves,
    unpower,
)
from ..common.operands import arrange, batch_of, by_name, in_rows
from ..common.score import load_rows, subtract_centre
from ..common.sweep import UNSPECIALISED, of_problem, offset, rows_of, sweep
from .centroids import centroids as prepare
from .nearest import (
    best_three,
    grain_of,
    nearer,
    nearest,
    ranks_fold,
    ranks_init,
    slack,
    squared_distances,
    unit,
)

# Rows of a label that one program adds, and rows of a tile, which it adds in float32.
PIECE, TILE = 1024, 64
# Rows of a program of `settle_kernel`.
SETTLED = 128
OTHER = tl.constexpr(1 << 32)


# ---- assignment ----------------------------------------------------------------------------------


@triton.jit
def candidates(
    X, table, ORIGIN, row, valid, count, reach, unit, grain,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(label or -1, the runner-up, whether the scores of these two are too close, whether the third
    is too close as well, NaN where a row is not finite else 0), each [ROWS]. A score is s_k = x c_k
    - |c_k|^2 / 2, and the label the index of the largest; two scores are too close where they
    differ by at most `slack`.
    """
    at = row.to(tl.int64)
    raw = load_rows(X, at, valid, 0, D, D, DIM)  # [ROWS, DIM]
    poison = tl.sum(raw * 0.0, 1) + tl.where(reach == reach, 0.0, float("nan"))
    x = subtract_centre(raw, ORIGIN, valid, 0, D, DIM)  # [ROWS, DIM]
    norm, largest = tl.sum(x * x, 1), tl.max(tl.abs(x), 1)
    if WIDE:
        for d0 in range(DIM, D, DIM):
            raw = load_rows(X, at, valid, d0, D, D, DIM)  # [ROWS, DIM]
            poison += tl.sum(raw * 0.0, 1)
            part = subtract_centre(raw, ORIGIN, valid, d0, D, DIM)  # [ROWS, DIM]
            norm += tl.sum(part * part, 1)
            largest = tl.maximum(largest, tl.max(tl.abs(part), 1))
    undo = unpower(largest) * unpower(reach)
    if WIDE:
        own = ((X, ORIGIN, at, valid, power(largest)), undo)
        state = sweep(
            ranks_init(ROWS, PROTOS // 2), own, table, count, load_biases, raw_halves,
            ranks_fold, D, STRIDE, DIM, PROTOS, PREC, "rows",
        )  # fmt: skip
    else:
        own = (halves(x * power(largest)[:, None]), undo)  # (two of [ROWS, DIM], [ROWS])
        state = sweep(
            ranks_init(ROWS, PROTOS // 2), own, table, count, load_halves, own_halves,
            ranks_fold, D, STRIDE, DIM, PROTOS, PREC, "rows",
        )  # fmt: skip
    _halves, _bias, _size, keep = table
    best, label, second, runner, third = best_three(state, keep, PROTOS)
    width = slack(norm, reach, unit, grain, D)
    # poison is NaN where the row is not finite, reach -1 where all centroids are masked
    regular = valid & (poison + reach >= 0.0)
    # not "<=": with a NaN the two are too close
    more = regular & ~(best - third > width)
    pair = regular & ~more & ~(best - second > width)
    return tl.where(regular, label, -1), runner, pair, more, poison


@triton.jit
def exact_labels(X, C, NORM, row, label, runner, pair, more, count, D: tl.constexpr):
    """Labels of all rows: of two candidates (`pair`) the nearer in float64, for all such rows at
    once; of `more` candidates the nearest of all centroids in float64, row by row.
    """
    if tl.max(pair.to(tl.int32), 0) > 0:
        label = tl.where(pair, nearer(X, C, row.to(tl.int64), label, runner, pair, D), label)
    open_rows = tl.where(more, row, -1)
    for _ in range(0, tl.sum(more.to(tl.int32), 0)):
        one = tl.max(open_rows, 0)
        index = nearest(X, C, NORM, one.to(tl.int64), count, D)
        label = tl.where(row == one, index, label)
        open_rows = tl.where(row == one, -1, open_rows)
    return label


@triton.jit
def distance(X, C, at, label, poison, D: tl.constexpr, DIM: tl.constexpr):
    """|x - c|^2 for the labelled centroid; inf without a label, NaN where a row is not finite."""
    some = label >= 0
    k = tl.where(some, label, 0).to(tl.int64)
    sqdist = squared_distances(X, C, at, k, some, D, DIM if DIM < 32 else 32, tl.float32)
    return tl.where(some, sqdist, tl.where(poison == 0.0, float("inf"), float("nan")))


@triton.jit(do_not_specialize=UNSPECIALISED)
def kmeans_assign_kernel(
    X, C, HALVES, SIDE, ORIGIN, REACH, LABEL, SQDIST,
    rows, count, inner, blocks, size, keep, unit, grain, x_o, x_i, c_o, c_i, m_o, m_i,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, WIDE: tl.constexpr, DISTANCES: tl.constexpr,
):  # fmt: skip
    """Label argmax_k (x c_k - |c_k|^2 / 2) of ROWS rows x, the nearest centroid (`candidates`).
    Where two scores are too close the label is -2 - (label + 2^32 (runner-up + 1)), where three are
    it is -2, for `settle_kernel`: here float64 would take the registers of another block. SQDIST
    takes |x - c|^2 of the label if DISTANCES.
    """
    problem, row = rows_of(tl.program_id(0), 0, blocks, ROWS)
    m = offset(problem, inner, m_o, m_i)
    X += offset(problem, inner, x_o, x_i) * D
    valid, at = row < rows, row.to(tl.int64)
    table = (HALVES + 2 * m * size * STRIDE, SIDE + 2 * m * size, size, keep)
    label, runner, pair, more, poison = candidates(
        X, table, ORIGIN + m * D, row, valid, count, tl.load(REACH + m), unit, grain,
        D, STRIDE, DIM, ROWS, PROTOS, PREC, WIDE,
    )  # fmt: skip
    p = problem.to(tl.int64) * rows + at
    both = label.to(tl.int64) + (runner.to(tl.int64) + 1) * OTHER
    code = tl.where(more, -2, tl.where(pair, -2 - both, label.to(tl.int64)))
    tl.store(LABEL + p, code, mask=valid)
    if DISTANCES:
        C += offset(problem, inner, c_o, c_i) * D
        tl.store(SQDIST + p, distance(X, C, at, label, poison, D, DIM), mask=valid)


@triton.jit(do_not_specialize=UNSPECIALISED)
def settle_kernel(
    X, C, SIDE, LABEL, SQDIST,
    rows, count, inner, blocks, size, x_o, x_i, c_o, c_i, m_o, m_i,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, DISTANCES: tl.constexpr,
):  # fmt: skip
    """Label argmin_k |x - c_k|^2 in float64, over two candidates or all centroids, of each of ROWS
    rows to which `kmeans_assign_kernel` gave a code below -1; SQDIST takes |x - c|^2 of the label.
    """
    problem, row = rows_of(tl.program_id(0), 0, blocks, ROWS)
    X += offset(problem, inner, x_o, x_i) * D
    C += offset(problem, inner, c_o, c_i) * D
    NORM = SIDE + 2 * offset(problem, inner, m_o, m_i) * size + size
    p = problem.to(tl.int64) * rows + row
    code = tl.load(LABEL + p, mask=row < rows, other=0)
    left = code < -1
    if tl.max(left.to(tl.int32), 0) > 0:
        both = tl.where(left, -2 - code, 0)
        more = left & (both == 0)
        runner = (both // OTHER).to(tl.int32) - 1
        label = (both % OTHER).to(tl.int32)
        label = exact_labels(X, C, NORM, row, label, runner, left & ~more, more, count, D)
        tl.store(LABEL + p, label.to(tl.int64), mask=left)
        if DISTANCES:
            far = distance(X, C, row.to(tl.int64), label, label * 0.0, D, DIM)
            tl.store(SQDIST + p, far, mask=left)


class Nearest(NamedTuple):
    """The arguments of a kernel that assigns, except its outputs and its grid."""

    batch: tuple[int, ...]
    problems: tuple[int, int]  # [O, I]
    rows: int
    operands: dict[str, Any]  # with their strides, by name
    numbers: dict[str, Any]  # of the table of centroids and of the bound on a score
    chosen: dict[str, Any]  # tile and options
    shift: Tensor | None  # view [O, I, 2, D]


def nearest_arguments(
    kernel: str,
    x: Tensor,
    centroids: Tensor,
    shift: Tensor | None,
    mask: Tensor | None,
    precision: str,
    apart: bool = False,
    shift_parts: Tensor | None = None,
    strict: bool = False,
) -> Nearest:
    """Prepare the centroids and choose the tile. `apart`: the kernel needs the problems of a batch
    as they are, and else may take all rows as one; `shift_parts` is a shift in two parts for such a
    kernel.
    """
    d, count = centroids.shape[-1], centroids.shape[-2]
    tile = launch.settings(kernel, x.device, precision, d)
    chosen: dict[str, Any] = {"DIM": launch.dim(d), **tile, "WIDE": "DIM" in tile}
    chosen["PROTOS"] = min(chosen["PROTOS"], launch.dim(count))
    tables = prepare(centroids, shift, mask, chosen["DIM"], strict)
    operands = [(launch.rows(x), 2), (tables.rows, 2), (tables.halves, 3), (tables.side, 2)]
    operands += [(tables.origin, 1), (tables.reach, 1)]
    operands += [] if shift_parts is None else [(shift_parts, 2)]
    batch = batch_of(operands)
    one = None if apart else _as_one_problem(batch, operands)
    views = one or arrange(batch, operands)
    rows, c, parts, side, origin, reach = views[:6]
    keep, grain = grain_of(triton.cdiv(count, chosen["PROTOS"]))
    named = {
        "X": rows, **by_name(("x_o", "x_i"), in_rows(rows, d)),
        "C": c, **by_name(("c_o", "c_i"), in_rows(c, d)),
        "SIDE": side, **by_name(("m_o", "m_i"), reach.stride()[:2]),
        "HALVES": parts, "ORIGIN": origin, "REACH": reach,
        "rows": rows.shape[2], "count": count, "inner": rows.shape[1], "size": tables.size,
    }  # fmt: skip
    numbers = {"keep": keep, "unit": unit(chosen["PREC"], d), "grain": grain}
    chosen |= {"D": d, "STRIDE": tables.halves.shape[-1]}
    shape = (rows.shape[0], rows.shape[1])
    parts_of_shift = None if shift_parts is None else views[-1]
    return Nearest(batch, shape, rows.shape[2], named, numbers, chosen, parts_of_shift)


def kmeans_assign(
    x: Tensor,
    centroids: Tensor,
    shift: Tensor | None,
    mask: Tensor | None,
    distances: bool,
    precision: str,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Labels, and squared distances or an empty tensor: two launches after those of `prepare`."""
    a = nearest_arguments("kmeans_assign", x, centroids, shift, mask, precision, strict=strict)
    (outer, inner), n = a.problems, x.shape[-2]
    labels = launch.empty((*a.batch, n), torch.int64, x.device)
    sqdist = launch.empty((*a.batch, n if distances else 0), torch.float32, x.device)
    outs = {"LABEL": labels, "SQDIST": sqdist if distances else None, "DISTANCES": distances}
    blocks = triton.cdiv(a.rows, a.chosen["ROWS"])
    launch.launch(
        kmeans_assign_kernel, (outer * inner * blocks,), x.device,
        **a.operands, **outs, blocks=blocks, **a.numbers, **a.chosen,
    )  # fmt: skip
    unread = ("HALVES", "ORIGIN", "REACH")
    operands = {name: value for name, value in a.operands.items() if name not in unread}
    blocks = triton.cdiv(a.rows, SETTLED)
    launch.launch(
        settle_kernel, (outer * inner * blocks,), x.device, **operands, **outs, blocks=blocks,
        D=x.shape[-1], DIM=a.chosen["DIM"], ROWS=SETTLED, num_warps=4, num_stages=1, maxnreg=255,
    )  # fmt: skip
    return labels, sqdist


def _as_one_problem(
    batch: tuple[int, ...], operands: list[tuple[Tensor, int]]
) -> list[Tensor] | None:
    """Views of all rows as one problem, where the centroids have no batch and strides allow it."""
    (x, _), *others = operands
    if any(tensor.shape[: tensor.ndim - core].numel() != 1 for tensor, core in others):
        return None
    (flat,) = arrange((*batch, x.shape[-2]), [(x, 1)])
    if flat.shape[0] != 1 or flat.stride(1) != x.shape[-1]:
        return None
    shared = [t.reshape(1, 1, *t.shape[t.ndim - core :]) for t, core in others]
    return [flat[None], *shared]


# ---- sums by label -------------------------------------------------------------------------------


class Segments(NamedTuple):
    """The rows of each label in order, cut into pieces; for every problem of the labels' batch."""

    order: Tensor  # [*, N] int64: rows sorted by label, rows without a label last
    starts: Tensor  # [*, k + 1] int64: where each label begins in `order`
    before: Tensor  # [*, k + 1] int64: how many pieces the labels before it have
    owner: Tensor  # [*, pieces] int64: label of each piece, k past the last


def segments(labels: Tensor, k: int, piece: int) -> Segments:
    """Sort and cut the rows. No size depends on the values of the labels."""
    (n,) = labels.shape[-1:]
    batch, device = labels.shape[:-1], labels.device
    # a radix sort makes one pass for each byte of its keys
    narrow = torch.uint8 if k < 255 else torch.int16 if k < 32767 else torch.int32
    keys = torch.where((labels >= 0) & (labels < k), labels, k).to(narrow).contiguous()
    keys, order = torch.sort(keys, dim=-1, stable=True)

    def each(size: int, dtype: torch.dtype) -> Tensor:
        return torch.arange(size, device=device, dtype=dtype).expand(*batch, size).contiguous()

    starts = torch.searchsorted(keys, each(k + 1, narrow))
    pieces = (starts.diff(dim=-1) + (piece - 1)).div(piece, rounding_mode="floor")
    before = torch.nn.functional.pad(pieces.cumsum(-1), (1, 0))
    most = n // piece + min(k, n)
    owner = torch.searchsorted(before[..., 1:].contiguous(), each(most, torch.int64), right=True)
    return Segments(order, starts, before, owner)


@triton.jit
def minus_shift(x, SHIFT, d, D: tl.constexpr):
    """Features d of rows [rows, DIM] minus a shift in two parts, as `in_two` makes them."""
    high = tl.load(SHIFT + d, mask=d < D, other=0.0)[None, :]  # [1, DIM]
    low = tl.load(SHIFT + D + d, mask=d < D, other=0.0)[None, :]  # [1, DIM]
    return (x - high) - low


@triton.jit(do_not_specialize=UNSPECIALISED)
def pieces_kernel(
    X, ORDER, STARTS, BEFORE, OWNER, WEIGHT, SHIFT, PART,
    rows, k, pieces, inner, x_o, x_i, l_o, l_i, w_o, w_i, w_n, s_o, s_i,
    D: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr,
    WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """The sums over the rows n of one piece, DIM features a program: PART [problems, pieces, D +
    WEIGHTED] float64 takes sum_n w_n (x_n - shift), and after the last feature sum_n w_n; w_n = 1
    unless WEIGHTED, shift = 0 unless SHIFTED, and then the kernel reads neither.
    """
    pid, d0 = tl.program_id(0), tl.program_id(1) * DIM
    problem, piece = pid // pieces, pid % pieces
    own = offset(problem, inner, l_o, l_i)
    X += offset(problem, inner, x_o, x_i) * D
    WEIGHT = of_problem(WEIGHT, problem, inner, w_o, w_i, WEIGHTED)
    SHIFT = of_problem(SHIFT, problem, inner, s_o, s_i, SHIFTED)
    ORDER += own * rows
    STARTS += own * (k + 1)
    label = tl.load(OWNER + own * pieces + piece)
    if label < k:
        begin = tl.load(STARTS + label)
        begin += (piece - tl.load(BEFORE + own * (k + 1) + label)) * PIECE
        size = tl.minimum(tl.load(STARTS + label + 1) - begin, PIECE).to(tl.int32)
        d = d0 + tl.arange(0, DIM)
        total, mass = tl.zeros((DIM,), tl.float64), tl.zeros((1,), tl.float64)
        for n0 in range(0, size, TILE):
            n = n0 + tl.arange(0, TILE)
            valid = n < size
            at = tl.load(ORDER + begin + n, mask=valid, other=0)
            gap = load_rows(X, at, valid, d0, D, D, DIM)  # [TILE, DIM]
            if SHIFTED:
                gap = tl.where(valid[:, None], minus_shift(gap, SHIFT, d, D), 0.0)  # [TILE, DIM]
            if WEIGHTED:
                w = tl.load(WEIGHT + at * w_n, mask=valid, other=0.0)
                if w.dtype != tl.float64:
                    w = w.to(tl.float32)
                gap = gap * w[:, None]  # [TILE, DIM]
                mass += tl.sum(w.to(tl.float64), 0)
            total += tl.sum(gap, 0).to(tl.float64)
        PART += pid.to(tl.int64) * (D + WEIGHTED)
        tl.store(PART + d, total, mask=d < D)
        if WEIGHTED:
            end = D + tl.arange(0, 1)
            tl.store(PART + end, mass, mask=(end + d0) == D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def sums_kernel(
    BEFORE, PART, SUMS, COUNTS, k, pieces, inner, l_o, l_i,
    D: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """SUMS_k = sum_p PART_p over the pieces p of one label k, in order; if WEIGHTED, COUNTS_k takes
    the sum of the last column.
    """
    pid, d = tl.program_id(0), tl.program_id(1) * DIM + tl.arange(0, DIM)
    problem, label = pid // k, pid % k
    BEFORE += offset(problem, inner, l_o, l_i) * (k + 1) + label
    begin = tl.load(BEFORE)
    size = (tl.load(BEFORE + 1) - begin).to(tl.int32)
    PART += (problem.to(tl.int64) * pieces + begin) * (D + WEIGHTED)
    total = tl.zeros((DIM,), tl.float64)
    for p0 in range(0, size, TILE):
        p = p0 + tl.arange(0, TILE)
        inside = (p < size)[:, None] & (d < D + WEIGHTED)[None, :]  # [TILE, DIM]
        at = PART + p.to(tl.int64)[:, None] * (D + WEIGHTED) + d[None, :]  # [TILE, DIM]
        total += tl.sum(tl.load(at, mask=inside, other=0.0), 0)  # of [TILE, DIM]
    tl.store(SUMS + pid.to(tl.int64) * D + d, total, mask=d < D)
    if WEIGHTED:
        tl.store(COUNTS + pid + d * 0, total, mask=d == D)


def kmeans_update(
    x: Tensor, labels: Tensor, k: int, weight: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums and counts: a sort of the labels, the sums of each piece, and their sums by label."""
    k, (n, d) = int(k), x.shape[-2:]
    rows = launch.rows(x)
    split = segments(labels, k, PIECE)
    operands = [(rows, 2), *((part, 1) for part in split)]
    operands += [] if weight is None else [(launch.plain(weight), 1)]
    operands += [] if shift is None else [(in_two(shift), 2)]
    batch = batch_of(operands)
    x_view, order, starts, before, owner, *rest = arrange(batch, operands)
    w = None if weight is None else rest[0]
    s = None if shift is None else rest[-1]
    outer, inner = x_view.shape[:2]
    pieces, problems = owner.shape[-1], outer * inner
    own = tuple(step // (k + 1) for step in starts.stride()[:2])
    sums = launch.empty((*batch, k, d), torch.float64, x.device)
    counted = torch.int64 if weight is None else torch.float64
    counts = launch.empty((*batch, k), counted, x.device)
    if weight is None:
        counts.copy_(split.starts.diff(dim=-1))
    part = launch.empty((problems * pieces, d + (weight is not None)), torch.float64, x.device)
    options = {"D": d, "DIM": min(64, triton.next_power_of_2(d)), "WEIGHTED": weight is not None}
    options |= {"num_warps": 4, "num_stages": 1}
    split_arguments = {
        "BEFORE": before, "k": k, "pieces": pieces, "inner": inner, **by_name(("l_o", "l_i"), own)
    }  # fmt: skip
    launch.launch(
        pieces_kernel, (problems * pieces, triton.cdiv(d, options["DIM"])), x.device,
        X=x_view, **by_name(("x_o", "x_i"), in_rows(x_view, d)),
        WEIGHT=w, **by_name(("w_o", "w_i", "w_n"), None if w is None else w.stride()[:3]),
        SHIFT=s, **by_name(("s_o", "s_i"), None if s is None else s.stride()[:2]),
        ORDER=order, STARTS=starts, OWNER=owner, PART=part, rows=n, **split_arguments,
        **options, PIECE=PIECE, TILE=TILE, SHIFTED=s is not None, maxnreg=255,
    )  # fmt: skip
    tiles = triton.cdiv(d + (weight is not None), options["DIM"])
    launch.launch(
        sums_kernel, (problems * k, tiles), x.device, PART=part, SUMS=sums,
        COUNTS=None if w is None else counts, **split_arguments, **options, TILE=32,
    )  # fmt: skip
    return sums, counts


def in_two(shift: Tensor) -> Tensor:
    """A shift [..., D] as [..., 2, D] float32: its value, and the rounding error of that."""
    high = shift.float()
    return torch.stack([high, (shift.double() - high.double()).float()], -2).contiguous()
