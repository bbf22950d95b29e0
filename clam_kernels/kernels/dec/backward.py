# SPDX-License-Identifier: Apache-2.0
"""Gradients of the losses on a GPU; equations (8) and (9) of docs/ops/dec.md.

One kernel computes dz and stores the numbers of each row. A second sums over the rows of a chunk
for each tile of centroids. A third adds the chunks. Where one tile contains all centroids,
`backward_fused` replaces the first two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.fold import inverse
from ..common.score import dot
from ..common.sweep import offset, rows_of
from .backward_fused import dec_fused_backward_kernel
from .call import alpha_of, merge
from .gradients import (
    damped,
    load_numbers,
    residuals,
    rows_fold,
    slopes,
    store_numbers,
    store_part,
    store_rows,
)
from .losses import DecLossCall, peak_of, regular_rows, sources_of, unit_norm
from .scores import UNSPECIALISED, centre_of, load_centred
from .target import numbers_fold, numbers_init, numbers_of, pair_tile

# How many numbers of a row the kernel over rows stores for the one over centroids.
STORED = 6


@triton.jit(do_not_specialize=UNSPECIALISED)
def dec_rows_backward_kernel(
    X, MU, ALPHA, COUNTS, Z0, MU0, LOG_NORM, P, GRAD, DZ, NUMBERS,
    rows, count, inner, blocks, size, unit, alpha, alpha0,
    x_o, x_i, m_o, m_i, a_o, a_i, c_o, c_i, c_k, v_o, v_i, rho_o, rho_i, l_o, l_i, l_n,
    p_o, p_i, p_n, p_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, KIND0: tl.constexpr,
    SOURCE: tl.constexpr, NORM: tl.constexpr, HAS_ALPHA: tl.constexpr,
):  # fmt: skip
    """dz_i = sum_j c_ij (z_i - mu_j) of ROWS rows, DIM features a program, to DZ unless it is None;
    NaN in a row that is not finite and has a gradient. NUMBERS [STORED, size] takes the numbers of
    the rows for `dec_columns_backward_kernel`.
    """
    problem, row = rows_of(tl.program_id(0), 0, blocks, ROWS)
    d0 = tl.program_id(1) * DIM
    X += offset(problem, inner, x_o, x_i) * D
    MU += offset(problem, inner, m_o, m_i) * D
    COUNTS, P, Z0, MU0, LOG_NORM = sources_of(
        problem, inner, COUNTS, P, Z0, MU0, LOG_NORM,
        c_o, c_i, p_o, p_i, v_o, v_i, rho_o, rho_i, l_o, l_i, D, SOURCE, NORM,
    )  # fmt: skip
    freedom = alpha_of(ALPHA, problem, inner, a_o, a_i, alpha, HAS_ALPHA)
    at, valid = row.to(tl.int64), row < rows
    now, then = regular_rows(X, Z0, at, valid, D, DIM, SOURCE)
    own, old = (X, MU, at, now, freedom), (Z0, MU0, at, then, alpha0)
    source = (COUNTS, c_k, peak_of(COUNTS, c_k, count, PROTOS, SOURCE), P, p_n, p_k)
    norm = unit_norm(LOG_NORM, at, then, l_n, source, KIND0, SOURCE, NORM)
    state = numbers_init(ROWS, KIND, KIND0)
    BEGIN: tl.constexpr = 0 if WIDE else PROTOS
    if not WIDE:
        first = pair_tile(
            own, old, source, 0, count, unit, D, DIM, PROTOS, WIDE, KIND, KIND0, SOURCE, PREC
        )
        state = numbers_fold(state, first, norm, KIND, KIND0, SOURCE, NORM)
    for k0 in range(BEGIN, count, PROTOS):
        tile = pair_tile(
            own, old, source, k0, count, unit, D, DIM, PROTOS, WIDE, KIND, KIND0, SOURCE, PREC
        )
        state = numbers_fold(state, tile, norm, KIND, KIND0, SOURCE, NORM)
    top, total, a, b, mass, regular = numbers_of(state, norm, now & then, KIND0, SOURCE, NORM)
    numbers = (top, inverse(total), a, b, mass)
    p = problem.to(tl.int64) * rows + at
    upstream = tl.load(GRAD + p, mask=valid, other=0.0)
    g = tl.where(regular, upstream, 0.0)
    store_numbers(NUMBERS, size, p, valid & (row * 0 + d0 == 0), numbers, g, KIND, SOURCE)
    if DZ is not None:
        several = tl.where(count > 1, 1.0, 0.0)
        centre = centre_of(MU, count, d0, D, DIM)
        sums = (tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32))
        if not WIDE:
            sums = rows_fold(
                sums, first, numbers, g, several, freedom, MU, centre, 0, d0, count,
                D, DIM, PROTOS, PREC, KIND, KIND0, SOURCE,
            )  # fmt: skip
        for k0 in range(BEGIN, count, PROTOS):
            tile = pair_tile(
                own, old, source, k0, count, unit, D, DIM, PROTOS, WIDE, KIND, KIND0, SOURCE, PREC
            )
            sums = rows_fold(
                sums, tile, numbers, g, several, freedom, MU, centre, k0, d0, count,
                D, DIM, PROTOS, PREC, KIND, KIND0, SOURCE,
            )  # fmt: skip
        acc, lean = sums
        x = load_centred(X, at, now, centre, d0, D, DIM)  # [ROWS, DIM]
        void = valid & ~regular & (upstream != 0.0)
        store_rows(DZ, p, valid, void, lean[:, None] * x - acc, d0, D, DIM)


@triton.jit(do_not_specialize=UNSPECIALISED)
def dec_columns_backward_kernel(
    X, MU, ALPHA, COUNTS, Z0, MU0, LOG_NORM, P, NUMBERS, PART,
    rows, count, inner, chunks, chunk, size, unit, alpha, alpha0,
    x_o, x_i, m_o, m_i, a_o, a_i, c_o, c_i, c_k, v_o, v_i, rho_o, rho_i, l_o, l_i, l_n,
    p_o, p_i, p_n, p_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, KIND0: tl.constexpr,
    SOURCE: tl.constexpr, NORM: tl.constexpr, HAS_ALPHA: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """dmu_j = mu_j sum_i c_ij - sum_i c_ij z_i of PROTOS centroids over the rows of one chunk, DIM
    features a program, to PART [problems, chunks, count, D + SLOPE]. With SLOPE the last column
    takes sum_i g_i (P_i q_ij - p_ij) ds_ij/dalpha.
    """
    tiles = tl.cdiv(count, PROTOS)
    here, piece = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    problem, share, d0 = piece // chunks, piece % chunks, tl.program_id(1) * DIM
    X += offset(problem, inner, x_o, x_i) * D
    MU += offset(problem, inner, m_o, m_i) * D
    COUNTS, P, Z0, MU0, LOG_NORM = sources_of(
        problem, inner, COUNTS, P, Z0, MU0, LOG_NORM,
        c_o, c_i, p_o, p_i, v_o, v_i, rho_o, rho_i, l_o, l_i, D, SOURCE, NORM,
    )  # fmt: skip
    freedom = alpha_of(ALPHA, problem, inner, a_o, a_i, alpha, HAS_ALPHA)
    source = (COUNTS, c_k, peak_of(COUNTS, c_k, count, PROTOS, SOURCE), P, p_n, p_k)
    k = here * PROTOS + tl.arange(0, PROTOS)
    centre = centre_of(MU, count, d0, D, DIM)
    several = tl.where(count > 1, 1.0, 0.0)
    acc = tl.zeros((PROTOS, DIM), tl.float32)  # [PROTOS, DIM]
    weight, slope = tl.zeros((PROTOS,), tl.float32), tl.zeros((PROTOS,), tl.float32)
    begin = share * chunk
    end = tl.minimum(begin + chunk, rows)
    for n0 in range(begin, end, ROWS):
        row = n0 + tl.arange(0, ROWS)
        at, valid = row.to(tl.int64), row < end
        p = problem.to(tl.int64) * rows + at
        numbers, g = load_numbers(NUMBERS, size, p, valid, KIND, SOURCE)
        now, then = regular_rows(X, Z0, at, valid, D, DIM, SOURCE)
        own, old = (X, MU, at, now, freedom), (Z0, MU0, at, then, alpha0)
        tile = pair_tile(
            own, old, source, here * PROTOS, count, unit,
            D, DIM, PROTOS, WIDE, KIND, KIND0, SOURCE, PREC,
        )  # fmt: skip
        gap = residuals(tile, numbers, several, KIND0, SOURCE, KIND) * g[:, None]  # [ROWS, PROTOS]
        c = damped(gap, tile, freedom, KIND)  # [ROWS, PROTOS]
        x = load_centred(X, at, now, centre, d0, D, DIM)  # [ROWS, DIM]
        acc += dot(tl.trans(c), x, PREC)
        weight += tl.sum(c, 0)
        if SLOPE:
            far, _e, _u = tile
            top, _unity, _a, _b, _mass = numbers
            slope -= tl.sum(gap * slopes(far, freedom, top), 0)
    mu = load_centred(MU, k.to(tl.int64), k < count, centre, d0, D, DIM)  # [PROTOS, DIM]
    PART += piece.to(tl.int64) * count * (D + SLOPE)
    store_part(PART, k, count, weight[:, None] * mu - acc, slope, d0, D, DIM, SLOPE)


def _row_gradients(call: DecLossCall, grad: Tensor, dz: Tensor | None) -> Tensor:
    """Write dz unless it is None; return the numbers of the rows. One launch."""
    size = call.problems * call.rows
    numbers = call.new(STORED, size)
    tile = call.tile("dec_rows_backward")
    blocks = triton.cdiv(call.rows, tile["ROWS"])
    pieces = 1 if dz is None else triton.cdiv(call.features, tile["DIM"])
    launch.launch(
        dec_rows_backward_kernel, (call.problems * blocks, pieces), call.device,
        **call.operands(), **call.target(), GRAD=grad, DZ=dz, NUMBERS=numbers,
        size=size, blocks=blocks, **tile,
    )  # fmt: skip
    return numbers


def _column_parts(call: DecLossCall, numbers: Tensor, slope: bool) -> Tensor:
    """The sums of each chunk, [problems, chunks, K, D + slope]. One launch."""
    part = call.new(call.problems, call.chunks, call.count, call.features + slope)
    tile = call.tile("dec_columns_backward")
    tiles = triton.cdiv(call.count, tile["PROTOS"])
    launch.launch(
        dec_columns_backward_kernel,
        (tiles * call.chunks * call.problems, triton.cdiv(call.features, tile["DIM"])),
        call.device, **call.operands(), **call.target(), NUMBERS=numbers, PART=part,
        chunks=call.chunks, chunk=call.chunk, size=call.problems * call.rows, SLOPE=slope, **tile,
    )  # fmt: skip
    return part


def _parts_at_once(call: DecLossCall, grad: Tensor, dz: Tensor | None, slope: bool) -> Tensor:
    """Write dz unless it is None; return the sums of each chunk. One launch."""
    part = call.new(call.problems, call.chunks, call.count, call.features + slope)
    launch.launch(
        dec_fused_backward_kernel, (call.chunks * call.problems,), call.device,
        **call.operands(), **call.target(), GRAD=grad, DZ=dz, PART=part,
        chunks=call.chunks, chunk=call.chunk, SLOPE=slope, **call.tile("dec_fused_backward"),
    )  # fmt: skip
    return part


def _column_gradients(
    call: DecLossCall, grad: Tensor, dz: Tensor | None, slope: bool
) -> tuple[Tensor, Tensor]:
    """(dmu [*batch, K, D], dalpha [*batch, 1] if `slope`), float64; dz is written too."""
    width = call.features + slope
    if not call.wide and call.count <= call.tile("dec_fused_backward")["PROTOS"]:
        part = _parts_at_once(call, grad, dz, slope)
    else:
        part = _column_parts(call, _row_gradients(call, grad, dz), slope)
    total = merge(call, part, call.count * width, "sums").view(*call.batch, call.count, width)
    return total[..., : call.features], total[..., call.features :].sum(-2)


def dec_losses_backward(
    grad: Tensor,
    z: Tensor,
    mu: Tensor,
    alpha: float | Tensor,
    weight: Tensor | None,
    log_counts: Tensor | None,
    z0: Tensor | None,
    mu0: Tensor | None,
    alpha0: float,
    log_norm: Tensor | None,
    p: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, mu, alpha, weight, log_counts, z0, mu0, log_norm, p): two launches where one
    tile contains all centroids, else three, after three for soft counts of these rows. Only the
    first three gradients are not zero.
    """
    arguments: tuple[Any, ...] = (z, mu, alpha, weight, log_counts, z0, mu0, log_norm, p)
    call = DecLossCall(z, mu, alpha, weight, log_counts, z0, mu0, alpha0, log_norm, p, precision)
    wants = [need and isinstance(x, Tensor) for need, x in zip(needs, arguments, strict=True)]
    gradients: list[Tensor | None] = [None] * len(arguments)
    if any(wants[:3]):
        grad = launch.plain(grad).float().expand(*call.batch, call.rows).contiguous()
        grad, dz = launch.align(grad), None
        if wants[0]:
            dz = gradients[0] = call.new(*call.batch, call.rows, call.features)
        if wants[1] or wants[2]:
            gradients[1], gradients[2] = _column_gradients(call, grad, dz, wants[2])
        else:
            _row_gradients(call, grad, dz)
    return tuple(
        _fit(gradient, x, want, z)
        for gradient, x, want in zip(gradients, arguments, wants, strict=True)
    )


def _fit(gradient: Tensor | None, argument: Any, wanted: bool, z: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its argument, zeros for None; empty unless the caller
    wants it.
    """
    if not wanted:
        return z.new_empty(0)
    if gradient is None:
        return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
    return gradient.sum_to_size(argument.shape).to(argument.dtype).contiguous()
