# SPDX-License-Identifier: Apache-2.0
"""Squared distances of a tile of rows to a tile of centroids, and the weights that follow from
them. Tiles are [ROWS, PROTOS]. Equations: docs/ops/dec.md.

The rows of a program are the tuple `own` = (X, MU, at, regular, alpha): the pointers to one
problem, the indices of the rows (int64), which of them are finite, and the degrees of freedom. KIND
says what the weight e of a pair is, with d its squared distance:

    "one"  e = 1 / (1 + d)                                 alpha = 1; no logarithm, no exponential
    "any"  e = -(alpha + 1)/2 log2(1 + d / alpha)          a score to the base 2
    "inf"  e = -d/2 log2(e)                                 alpha = inf
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import sweep
from ..common.fold import finite
from ..common.score import LN2, LOG2E, dot_onto, load_rows

# Runtime scalars on which triton does not specialise, the strides of these kernels included.
UNSPECIALISED = [
    *sweep.UNSPECIALISED, "chunks", "chunk", "width", "alpha", "alpha0", "a_o", "a_i", "w_o", "w_i",
    "w_n", "p_o", "p_i", "p_n", "p_k", "c_k", "l_n",
]  # fmt: skip
# Up to this many features the kernels compute distances from differences.
NARROW = 64
# Distances above this count as this: such an assignment is below 1e-30 of the largest.
FARTHEST = tl.constexpr(1e30)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to 2 units in the last place at every size of x.

    1 + x = 2^k m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh(t) with t = (m - 1)/(m + 1).
    The rounding error of 1 + x enters m - 1; the logarithm of the hardware is off by 2^-22 there.
    """
    u = 1.0 + x
    lost = tl.where(x < 1.0, x - (u - 1.0), 1.0 - (u - x))
    bits = u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    k = (bits >> 23) - 127
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    shrink = ((127 - k) << 23).to(tl.float32, bitcast=True)  # 2^-k
    f = (m - 1.0) + lost * shrink
    t = f / (2.0 + f)
    z = t * t
    tail = z * (0.66666667 + z * (0.4 + z * (0.28571427 + z * (0.22222222 + z * 0.18181819))))
    # log m = 2 t + t tail = f - f t + t tail
    wide = k.to(tl.float32)
    return wide * 0.693359375 + (f - t * (f - tail) + wide * -2.12194440e-4)


@triton.jit
def is_regular(X, at, valid, D: tl.constexpr, DIM: tl.constexpr):
    """Which rows have finite values only."""
    poison = tl.zeros((at.shape[0],), tl.float32)
    for d0 in range(0, D, DIM):
        poison += tl.sum(load_rows(X, at, valid, d0, D, D, DIM) * 0.0, 1)  # of [ROWS, DIM]
    return valid & (poison == 0.0)


@triton.jit
def from_differences(X, MU, at, regular, k, known, D: tl.constexpr):
    """sum_d (z_id - mu_jd)^2, feature by feature; NaN for a centroid that is not finite."""
    far = tl.zeros((at.shape[0], k.shape[0]), tl.float32)  # [ROWS, PROTOS]
    poison = tl.zeros((k.shape[0],), tl.float32)
    rows, centroids = X + at * D, MU + k.to(tl.int64) * D
    for d in range(0, D):
        z = tl.load(rows + d, mask=regular, other=0.0).to(tl.float32)
        mu = tl.load(centroids + d, mask=known, other=0.0).to(tl.float32)
        poison += mu * 0.0
        gap = z[:, None] - mu[None, :]  # [ROWS, PROTOS]
        far += gap * gap
    return tl.minimum(far, FARTHEST) + poison[None, :]


@triton.jit
def centre_of(MU, count, d0, D: tl.constexpr, DIM: tl.constexpr):
    """The mean of the first 16 centroids, features [d0, d0 + DIM): a point near the data."""
    k = tl.arange(0, 16)
    c = load_rows(MU, k.to(tl.int64), k < count, d0, D, D, DIM)  # [16, DIM]
    mean = tl.sum(c, 0) / tl.minimum(count, 16).to(tl.float32)
    return tl.where(mean * 0.0 == 0.0, mean, 0.0)


@triton.jit
def load_centred(X, at, valid, centre, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of rows less the centre; 0 beyond the edges."""
    raw = load_rows(X, at, valid, d0, D, D, DIM)  # [rows, DIM]
    inside = valid[:, None] & (d0 + tl.arange(0, DIM) < D)[None, :]  # [rows, DIM]
    return tl.where(inside, raw - centre[None, :], 0.0)


@triton.jit
def from_products(
    X, MU, at, regular, k, known, alpha, count, unit,
    D: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """|x|^2 + |c|^2 - 2 x c with x and c less a centre. Where the error of a pair may change its
    score by too much (`DecCall.tile` has the bound `unit`), its distance comes from differences.
    """
    inside = tl.zeros((at.shape[0], k.shape[0]), tl.float32)  # [ROWS, PROTOS]
    x_norm, c_norm = tl.zeros((at.shape[0],), tl.float32), tl.zeros((k.shape[0],), tl.float32)
    for d0 in range(0, D, DIM):
        centre = centre_of(MU, count, d0, D, DIM)
        x = load_centred(X, at, regular, centre, d0, D, DIM)  # [ROWS, DIM]
        c = load_centred(MU, k.to(tl.int64), known, centre, d0, D, DIM)  # [PROTOS, DIM]
        x_norm += tl.sum(x * x, 1)
        c_norm += tl.sum(c * c, 1)
        inside = dot_onto(x, tl.trans(c), inside, PREC)
    far = tl.maximum(x_norm[:, None] + c_norm[None, :] - 2.0 * inside, 0.0)  # [ROWS, PROTOS]
    size = 2.0 * (x_norm[:, None] + c_norm[None, :])  # [ROWS, PROTOS], at least (|x| + |c|)^2
    stiff = far + 1.0 if KIND == "one" else (far + alpha) / (1.0 + alpha)
    if KIND == "inf":
        stiff = far * 0.0 + 1.0
    # not ">": a distance with NaN or inf is in doubt as well
    doubt = (regular[:, None] & known[None, :]) & ~(unit * size <= stiff)
    if tl.sum(tl.sum(doubt.to(tl.int32), 1), 0) > 0:
        far = tl.where(doubt, from_differences(X, MU, at, regular, k, known, D), far)
    return tl.minimum(far, FARTHEST) + (c_norm * 0.0)[None, :]


@triton.jit
def distances(
    own, k, known, count, unit,
    D: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Squared distances of the rows to the centroids k [PROTOS], at most FARTHEST."""
    X, MU, at, regular, alpha = own
    if WIDE:
        far = from_products(X, MU, at, regular, k, known, alpha, count, unit, D, DIM, KIND, PREC)
    else:
        far = from_differences(X, MU, at, regular, k, known, D)
    return far


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, to a unit in the last place; a division alone is off by two."""
    guess = 1.0 / x
    return guess + guess * (1.0 - x * guess)


@triton.jit
def weights(far, alpha, known, KIND: tl.constexpr):
    """The weight e of every pair; 0 or -inf for a centroid past the last."""
    if KIND == "one":
        e = tl.where(known[None, :], reciprocal(1.0 + far), 0.0)  # [ROWS, PROTOS]
    else:
        if KIND == "inf":
            s = far * (-0.5 * LOG2E)  # [ROWS, PROTOS]
        else:
            s = log1p(far / alpha) * (-0.5 * LOG2E * (alpha + 1.0))  # [ROWS, PROTOS]
        e = tl.where(known[None, :], s, float("-inf"))  # [ROWS, PROTOS]
    return e


@triton.jit
def total_init(ROWS: tl.constexpr, KIND: tl.constexpr):
    """(top, total) before the first tile: (0, 0), or (-inf, 0) for scores."""
    if KIND == "one":
        top = tl.zeros((ROWS,), tl.float32)
    else:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
    return top, tl.zeros((ROWS,), tl.float32)


@triton.jit
def total_fold(state, e, KIND: tl.constexpr):
    """The sum of the weights: total' = total + sum_j e_j. Of scores: top' = max(top, max_j e_j),
    total' = total 2^(top - top') + sum_j 2^(e_j - top').
    """
    top, total = state
    if KIND == "one":
        total = total + tl.sum(e, 1)
    else:
        higher = tl.maximum(top, tl.max(e, 1))
        safe = finite(higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(e - safe[:, None]), 1)
        top = higher
    return top, total


@triton.jit
def assignments(e, top, inverse_total, KIND: tl.constexpr):
    """q_ij = e_ij / total_i, or 2^(e_ij - top_i) / total_i of scores."""
    if KIND == "one":
        q = e * inverse_total[:, None]  # [ROWS, PROTOS]
    else:
        q = tl.exp2(e - finite(top)[:, None]) * inverse_total[:, None]  # [ROWS, PROTOS]
    return q


@triton.jit
def log_total(top, total):
    """L = log sum_j exp(s_ij) of the finished state of `total_fold`."""
    return LN2 * (top + tl.log2(total))
