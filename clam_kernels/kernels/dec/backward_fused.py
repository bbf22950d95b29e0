# SPDX-License-Identifier: Apache-2.0
"""Gradients of the losses on a GPU where one tile contains all centroids: one kernel computes dz
and the partial sums of dmu, and reads the rows once. Equations (8) and (9) of docs/ops/dec.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import inverse
from ..common.score import dot
from ..common.sweep import offset
from .call import alpha_of
from .gradients import damped, residuals, slopes, store_part, store_rows
from .losses import peak_of, regular_rows, sources_of, unit_norm
from .scores import UNSPECIALISED, centre_of, load_centred
from .target import numbers_fold, numbers_init, numbers_of, pair_tile


@triton.jit(do_not_specialize=UNSPECIALISED)
def dec_fused_backward_kernel(
    X, MU, ALPHA, COUNTS, Z0, MU0, LOG_NORM, P, GRAD, DZ, PART,
    rows, count, inner, chunks, chunk, unit, alpha, alpha0,
    x_o, x_i, m_o, m_i, a_o, a_i, c_o, c_i, c_k, v_o, v_i, rho_o, rho_i, l_o, l_i, l_n,
    p_o, p_i, p_n, p_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, KIND0: tl.constexpr,
    SOURCE: tl.constexpr, NORM: tl.constexpr, HAS_ALPHA: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """With c_ij = g_i (alpha + 1)(p_ij - P_i q_ij)/(alpha + d_ij) for the rows of one chunk: dz_i =
    sum_j c_ij (z_i - mu_j) to DZ unless it is None, and mu_j sum_i c_ij - sum_i c_ij z_i to PART
    [problems, chunks, count, D + SLOPE], whose last column is as in `dec_columns_backward_kernel`.
    """
    piece = tl.program_id(0)
    problem, share = piece // chunks, piece % chunks
    X += offset(problem, inner, x_o, x_i) * D
    MU += offset(problem, inner, m_o, m_i) * D
    COUNTS, P, Z0, MU0, LOG_NORM = sources_of(
        problem, inner, COUNTS, P, Z0, MU0, LOG_NORM,
        c_o, c_i, p_o, p_i, v_o, v_i, rho_o, rho_i, l_o, l_i, D, SOURCE, NORM,
    )  # fmt: skip
    freedom = alpha_of(ALPHA, problem, inner, a_o, a_i, alpha, HAS_ALPHA)
    source = (COUNTS, c_k, peak_of(COUNTS, c_k, count, PROTOS, SOURCE), P, p_n, p_k)
    k = tl.arange(0, PROTOS)
    centre = centre_of(MU, count, 0, D, DIM)
    several = tl.where(count > 1, 1.0, 0.0)
    mu = load_centred(MU, k.to(tl.int64), k < count, centre, 0, D, DIM)  # [PROTOS, DIM]
    acc = tl.zeros((PROTOS, DIM), tl.float32)  # [PROTOS, DIM]
    weight, slope = tl.zeros((PROTOS,), tl.float32), tl.zeros((PROTOS,), tl.float32)
    begin = share * chunk
    end = tl.minimum(begin + chunk, rows)
    for n0 in range(begin, end, ROWS):
        row = n0 + tl.arange(0, ROWS)
        at, valid = row.to(tl.int64), row < end
        now, then = regular_rows(X, Z0, at, valid, D, DIM, SOURCE)
        own, old = (X, MU, at, now, freedom), (Z0, MU0, at, then, alpha0)
        norm = unit_norm(LOG_NORM, at, then, l_n, source, KIND0, SOURCE, NORM)
        tile = pair_tile(
            own, old, source, 0, count, unit, D, DIM, PROTOS, WIDE, KIND, KIND0, SOURCE, PREC
        )
        state = numbers_init(ROWS, KIND, KIND0)
        state = numbers_fold(state, tile, norm, KIND, KIND0, SOURCE, NORM)
        top, total, a, b, mass, regular = numbers_of(state, norm, now & then, KIND0, SOURCE, NORM)
        numbers = (top, inverse(total), a, b, mass)
        p = problem.to(tl.int64) * rows + at
        upstream = tl.load(GRAD + p, mask=valid, other=0.0)
        g = tl.where(regular, upstream, 0.0)
        gap = residuals(tile, numbers, several, KIND0, SOURCE, KIND) * g[:, None]  # [ROWS, PROTOS]
        c = damped(gap, tile, freedom, KIND)  # [ROWS, PROTOS]
        x = load_centred(X, at, now, centre, 0, D, DIM)  # [ROWS, DIM]
        if DZ is not None:
            dz = tl.sum(c, 1)[:, None] * x - dot(c, mu, PREC)  # [ROWS, DIM]
            void = valid & ~regular & (upstream != 0.0)
            store_rows(DZ, p, valid, void, dz, 0, D, DIM)
        acc += dot(tl.trans(c), x, PREC)
        weight += tl.sum(c, 0)
        if SLOPE:
            far, _e, _u = tile
            slope -= tl.sum(gap * slopes(far, freedom, top), 0)
    PART += piece.to(tl.int64) * count * (D + SLOPE)
    store_part(PART, k, count, weight[:, None] * mu - acc, slope, 0, D, DIM, SLOPE)
