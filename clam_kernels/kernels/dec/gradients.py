# SPDX-License-Identifier: Apache-2.0
"""What the kernels of the gradients compute for a tile [ROWS, PROTOS], and what they store.
Equations (8) and (9) of docs/ops/dec.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.score import LN2, LOG2E, dot_onto
from .scores import assignments, load_centred, log1p, reciprocal
from .target import targets

# Below SMALL the kernel computes log(1 + x) - x / (1 + x) as a series.
SMALL = tl.constexpr(0.1)


@triton.jit
def residuals(
    tile, numbers, several, KIND0: tl.constexpr, SOURCE: tl.constexpr, KIND: tl.constexpr
):
    """p_ij - P_i q_ij [ROWS, PROTOS] with P_i = sum_j p_ij; exactly 0 for one centroid."""
    _far, e, u = tile
    top, unity, a, b, mass = numbers
    p = targets(u, a, b, KIND0, SOURCE)  # [ROWS, PROTOS]
    q = assignments(e, top, unity, KIND)  # [ROWS, PROTOS]
    return (p - mass[:, None] * q) * several


@triton.jit
def damped(gap, tile, alpha, KIND: tl.constexpr):
    """The product gap (alpha + 1) / (alpha + d); the gap itself for alpha = inf."""
    far, e, _u = tile
    if KIND == "one":
        c = gap * (2.0 * e)  # [ROWS, PROTOS]
    else:
        c = gap  # [ROWS, PROTOS]
        if KIND == "any":
            c = gap * ((alpha + 1.0) / alpha * reciprocal(1.0 + far / alpha))  # [ROWS, PROTOS]
    return c


@triton.jit
def slopes(far, alpha, top):
    """ds/dalpha = -(log(1 + x) - x/(1 + x))/2 + x/(1 + x)/(2 alpha), x = d / alpha, less that of
    the nearest centroid, whose score is `top`. The factors of a row sum to 0 but for rounding, and
    a large slope multiplies that.
    """
    x = far / alpha  # [ROWS, PROTOS]
    share = x * reciprocal(1.0 + x)  # [ROWS, PROTOS]
    series = x * 0.0 + 0.9
    for i in tl.static_range(8):  # sum_n (-1)^n (n - 1)/n x^n for n = 2 ... 10
        n = 9 - i
        series = series * x + (n - 1) / n * (1 - 2 * (n % 2))
    excess = tl.where(x < SMALL, series * x * x, log1p(x) - share)  # [ROWS, PROTOS]
    log = top * (-2.0 * LN2) / (alpha + 1.0)  # log(1 + x) of the nearest
    # log - (1 - exp(-log)), the excess of the nearest
    tail = 0.5 * log * log * (1.0 - log / 3.0 * (1.0 - log / 4.0 * (1.0 - log / 5.0)))
    low = tl.where(log < SMALL, tail, log - 1.0 + tl.exp2(-log * LOG2E))
    nearest = (log - low) / (2.0 * alpha) - 0.5 * low
    return share / (2.0 * alpha) - 0.5 * excess - nearest[:, None]


@triton.jit
def rows_fold(
    state, tile, numbers, g, several, alpha, MU, centre, k0, d0, count,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, PREC: tl.constexpr,
    KIND: tl.constexpr, KIND0: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """State (acc [ROWS, DIM], lean [ROWS]): acc' = acc + sum_j c_j mu_j, lean' = lean + sum_j c_j
    with c_j = g (alpha + 1)(p_j - P q_j)/(alpha + d_j).
    """
    acc, lean = state
    k = k0 + tl.arange(0, PROTOS)
    gap = residuals(tile, numbers, several, KIND0, SOURCE, KIND) * g[:, None]  # [ROWS, PROTOS]
    c = damped(gap, tile, alpha, KIND)  # [ROWS, PROTOS]
    mu = load_centred(MU, k.to(tl.int64), k < count, centre, d0, D, DIM)  # [PROTOS, DIM]
    return dot_onto(c, mu, acc, PREC), lean + tl.sum(c, 1)


@triton.jit
def store_numbers(NUMBERS, size, p, valid, numbers, g, KIND: tl.constexpr, SOURCE: tl.constexpr):
    """Store the upstream gradients of rows and their (1 / total, a, P, b, top), without those that
    no tile needs.
    """
    top, unity, a, b, mass = numbers
    step = tl.cast(size, tl.int64)
    tl.store(NUMBERS + p, g, mask=valid)
    tl.store(NUMBERS + step + p, unity, mask=valid)
    tl.store(NUMBERS + 2 * step + p, a, mask=valid)
    tl.store(NUMBERS + 3 * step + p, mass, mask=valid)
    if SOURCE != "dense":
        tl.store(NUMBERS + 4 * step + p, b, mask=valid)
    if KIND != "one":
        tl.store(NUMBERS + 5 * step + p, top, mask=valid)


@triton.jit
def load_numbers(NUMBERS, size, p, valid, KIND: tl.constexpr, SOURCE: tl.constexpr):
    """((top, 1 / total, a, b, P), upstream gradients) of rows as `store_numbers` stored them."""
    step = tl.cast(size, tl.int64)
    g = tl.load(NUMBERS + p, mask=valid, other=0.0)
    unity = tl.load(NUMBERS + step + p, mask=valid, other=0.0)
    a = tl.load(NUMBERS + 2 * step + p, mask=valid, other=0.0)
    mass = tl.load(NUMBERS + 3 * step + p, mask=valid, other=0.0)
    b, top = g * 0.0, g * 0.0
    if SOURCE != "dense":
        b = tl.load(NUMBERS + 4 * step + p, mask=valid, other=0.0)
    if KIND != "one":
        top = tl.load(NUMBERS + 5 * step + p, mask=valid, other=0.0)
    return (top, unity, a, b, mass), g


@triton.jit
def store_rows(DZ, p, valid, void, dz, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Store features [d0, d0 + DIM) of dz [ROWS, DIM]; NaN in the `void` rows."""
    d = d0 + tl.arange(0, DIM)
    inside = valid[:, None] & (d < D)[None, :]  # [ROWS, DIM]
    dz = tl.where(void[:, None], float("nan"), dz)  # [ROWS, DIM]
    tl.store(DZ + p[:, None] * D + d[None, :], dz, mask=inside)


@triton.jit
def store_part(
    PART, k, count, dmu, slope, d0, D: tl.constexpr, DIM: tl.constexpr, SLOPE: tl.constexpr
):
    """Store features [d0, d0 + DIM) of dmu [PROTOS, DIM], and slope [PROTOS] after the last one."""
    d = d0 + tl.arange(0, DIM)
    where = PART + k.to(tl.int64)[:, None] * (D + SLOPE)  # [PROTOS, 1]
    inside = (k < count)[:, None] & (d < D)[None, :]  # [PROTOS, DIM]
    tl.store(where + d[None, :], dmu, mask=inside)
    if SLOPE:
        last = D + tl.arange(0, 1)[None, :]  # [1, 1]
        tl.store(where + last, slope[:, None], mask=((k < count) & (k * 0 + d0 == 0))[:, None])
