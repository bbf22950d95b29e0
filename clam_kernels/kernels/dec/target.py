# SPDX-License-Identifier: Apache-2.0
"""The target p of a tile [ROWS, PROTOS], and the numbers of a row from which it and q follow.

SOURCE says where p comes from: "own" rows, "frozen" rows, or "dense", p itself. With e0 the weights
of these rows (`scores.py`), f the soft counts and F the largest of them, the raw target u of a pair
is

    "one"         u = e0 sqrt(F / f)                 p = (u a)^2 b
    other KIND0   u = 2 e0 - log2(f / F)             p = 2^(u - a) b
    "dense"       u = p as stored                    p = u a

and (a, b) are numbers of the row. Without NORM they make the row sum to 1, or are 1 for "dense".
With it they follow from its log-normaliser R. A state of a row is (top, total, top0, total0, mass),
each [ROWS]: of q as in `total_fold`, of u, and the sum of p where (a, b) are known before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import finite, inverse
from .scores import distances, total_fold, total_init, weights

# The logarithm to the base 2 of the largest factor sqrt(F / f).
MOST_LIFT = tl.constexpr(115.0)


@triton.jit
def largest_log(COUNTS, c_k, count, PROTOS: tl.constexpr):
    """The largest log count: log F = max_j log f_j of one problem, float64."""
    top = tl.full((1,), float("-inf"), tl.float64)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        logs = tl.load(COUNTS + k.to(tl.int64) * c_k, mask=k < count, other=float("-inf"))
        top = tl.maximum(top, tl.max(logs.to(tl.float64), 0))
    return top


@triton.jit
def raw_target(
    e, old, source, k, known, count, unit,
    D: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, KIND0: tl.constexpr,
    SOURCE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The tile u [ROWS, PROTOS]; e are the weights of the rows z."""
    COUNTS, c_k, peak, P, p_n, p_k = source
    _Z0, _MU0, at, inside, alpha0 = old
    columns = k.to(tl.int64)
    if SOURCE == "dense":
        mask = inside[:, None] & known[None, :]  # [ROWS, PROTOS]
        where = P + at[:, None] * p_n + columns[None, :] * p_k  # [ROWS, PROTOS]
        u = tl.load(where, mask=mask, other=0.0).to(tl.float32)  # [ROWS, PROTOS]
    else:
        if SOURCE == "frozen":
            far = distances(old, k, known, count, unit, D, DIM, WIDE, KIND0, PREC)
            e = weights(far, alpha0, known, KIND0)  # [ROWS, PROTOS]
        logs = tl.load(COUNTS + columns * c_k, mask=known, other=0.0).to(tl.float64)
        lower = tl.where(known, (logs - peak) * 1.4426950408889634, 0.0).to(tl.float32)
        if KIND0 == "one":
            u = e * tl.exp2(tl.minimum(-0.5 * lower, MOST_LIFT))[None, :]  # [ROWS, PROTOS]
        else:
            u = 2.0 * e - lower[None, :]  # [ROWS, PROTOS]
    return u


@triton.jit
def targets(u, a, b, KIND0: tl.constexpr, SOURCE: tl.constexpr):
    """The target p [ROWS, PROTOS] from u and the numbers of the rows; 0 in rows of a = 0."""
    if SOURCE == "dense":
        p = tl.where(a[:, None] == 0.0, 0.0, u * a[:, None])  # [ROWS, PROTOS]
    else:
        if KIND0 == "one":
            v = u * a[:, None]  # [ROWS, PROTOS]
            p = v * v * b[:, None]  # [ROWS, PROTOS]
        else:
            p = tl.exp2(u - a[:, None]) * b[:, None]  # [ROWS, PROTOS]
    return p


@triton.jit
def pair_tile(
    own, old, source, k0, count, unit,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, WIDE: tl.constexpr,
    KIND: tl.constexpr, KIND0: tl.constexpr, SOURCE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(squared distances, weights e, raw targets u) of the rows and PROTOS centroids."""
    k = k0 + tl.arange(0, PROTOS)
    known = k < count
    _X, _MU, _at, _regular, alpha = own
    far = distances(own, k, known, count, unit, D, DIM, WIDE, KIND, PREC)  # [ROWS, PROTOS]
    e = weights(far, alpha, known, KIND)  # [ROWS, PROTOS]
    u = raw_target(e, old, source, k, known, count, unit, D, DIM, WIDE, KIND0, SOURCE, PREC)
    return far, e, u


@triton.jit
def norm_of(LOG_NORM, at, inside, l_n, source, KIND0: tl.constexpr, SOURCE: tl.constexpr):
    """The numbers (a, b) of rows with a log-normaliser R: exp(-R); or exp(-(R + log F)/2) and 1; or
    (R + log F) log2(e) and 1.
    """
    _COUNTS, _c_k, peak, _P, _p_n, _p_k = source
    norm = tl.load(LOG_NORM + at * l_n, mask=inside, other=0.0).to(tl.float64)
    if SOURCE == "dense":
        a = tl.exp2((-norm * 1.4426950408889634).to(tl.float32))
    else:
        whole = ((norm + peak) * 1.4426950408889634).to(tl.float32)
        a = tl.exp2(-0.5 * whole) if KIND0 == "one" else whole
    return a, tl.full((at.shape[0],), 1.0, tl.float32)


@triton.jit
def numbers_init(ROWS: tl.constexpr, KIND: tl.constexpr, KIND0: tl.constexpr):
    """(top, total, top0, total0, mass) before the first tile."""
    top, total = total_init(ROWS, KIND)
    top0, total0 = total_init(ROWS, KIND0)
    return top, total, top0, total0, tl.zeros((ROWS,), tl.float32)


@triton.jit
def numbers_fold(
    state, tile, norm, KIND: tl.constexpr, KIND0: tl.constexpr, SOURCE: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """(top, total) as `total_fold` of e. NORM or "dense": mass' = mass + sum_j p_j. Else of u:
    "one": top0' = max(top0, max_j u_j), total0' = total0 (top0 / top0')^2 + sum_j (u_j / top0')^2;
    scores as `total_fold`.
    """
    top, total, top0, total0, mass = state
    _far, e, u = tile
    top, total = total_fold((top, total), e, KIND)
    if NORM or SOURCE == "dense":
        a, b = norm
        mass += tl.sum(targets(u, a, b, KIND0, SOURCE), 1)
    else:
        if KIND0 == "one":
            higher = tl.maximum(top0, tl.max(u, 1))
            unit = inverse(higher)
            v, shrink = u * unit[:, None], top0 * unit  # [ROWS, PROTOS], [ROWS]
            total0 = total0 * (shrink * shrink) + tl.sum(v * v, 1)
            top0 = higher
        else:
            top0, total0 = total_fold((top0, total0), u, KIND0)
    return top, total, top0, total0, mass


@triton.jit
def numbers_of(state, norm, regular, KIND0: tl.constexpr, SOURCE: tl.constexpr, NORM: tl.constexpr):
    """Finish `numbers_fold`: (top, total, a, b, mass = sum_j p_j, which rows and targets are
    finite). In the others a, b and the mass are 0.
    """
    top, total, top0, total0, mass = state
    a, b = norm
    if SOURCE == "dense":
        regular = regular & (mass * 0.0 == 0.0)
    if not (NORM or SOURCE == "dense"):
        a = inverse(top0) if KIND0 == "one" else finite(top0)
        b = inverse(total0)
        mass = b * 0.0 + 1.0
    zero = tl.zeros((regular.shape[0],), tl.float32)
    a, b = tl.where(regular, a, zero), tl.where(regular, b, zero)
    return top, total, a, b, tl.where(regular, mass, zero), regular


@triton.jit
def surprise(
    p, far, e, top, total, u, a, b, KIND: tl.constexpr, KIND0: tl.constexpr, SOURCE: tl.constexpr
):
    """log2 p - log2 q [ROWS, PROTOS], finite where p is 0."""
    tiny = 1.1754944e-38
    if KIND == "one":  # one logarithm a pair, of p / q
        gap = tl.log2(tl.maximum(p * ((1.0 + far) * total[:, None]), tiny))  # [ROWS, PROTOS]
    else:
        log_q = e - (top + tl.log2(total))[:, None]  # [ROWS, PROTOS]
        if SOURCE == "dense" or KIND0 == "one":
            gap = tl.log2(tl.maximum(p, tiny)) - log_q  # [ROWS, PROTOS]
        else:
            gap = (u - a[:, None]) + tl.log2(b)[:, None] - log_q  # [ROWS, PROTOS]
    return tl.where(p == 0.0, 0.0, gap)
