# SPDX-License-Identifier: Apache-2.0
"""The nearest centroid, equal to float64's: a sweep finds the three best scores, a bound on their
error tells for which rows they decide, and float64 decides for the others.

A score is x . c - |c|^2 / 2, the largest for the nearest; x and c are minus the origin. X and C are
the caller's rows and centroids.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import NO_INDEX
from ..common.score import load_rows

# Squared distances this close, relative to the smaller one, are a tie.
TIE = tl.constexpr(2.0**-40)
# Centroids and features of a tile in float64, two registers a value.
CENTROIDS = tl.constexpr(64)
PIECE = tl.constexpr(16)

# A score below NONE is that of no centroid. With a reach beyond FAR a real score may fall below it:
# there every row goes to float64.
NONE = tl.constexpr(-5e37)
FAR = tl.constexpr(1e18)

# Error of a product of rows relative to the product of their norms. The factors lose 2^-11 each and
# the product of both; in two parts they lose 2^-23 each and the product of the second parts;
# entries that are subnormal in half precision add less than 2^-26. Matrix units truncate all
# addends of a sum: a few steps of 2^-24 for each feature.
ROUNDED = {"f16": 2.0**-10 + 2.0**-21, "f16x3": 2.0**-21 + 2.0**-26}
MATRIX_STEPS = 4


def unit(precision: str, d: int) -> float:
    """Bound on the error of a product over `d` features, relative to the norms. It includes the
    rounding of the centred values and of the score.
    """
    return ROUNDED[precision] + (MATRIX_STEPS * d + 6) * 2.0**-24


def grain_of(tiles: int) -> tuple[int, float]:
    """(mask of the bits of a score that the code of its tile does not overwrite, error of the other
    bits relative to the score).
    """
    bits = max(1, (2 * tiles - 1).bit_length())
    return -1 << bits, 2.0 ** (bits - 23)


@triton.jit
def slack(norm, reach, unit, grain, D: tl.constexpr):
    """Twice the error of a score of rows of squared norm `norm`, plus the width of a tie; inf or
    NaN where a score may have overflowed. The terms D * 2^-125 and D * 2^-122 bound the underflow.
    """
    size = tl.sqrt(norm + D * 2.0**-125)
    span = size + reach
    twice = 2.0 * (unit + grain) * (size * reach) + (2.0**-22 + grain) * (reach * reach)
    twice = (twice + TIE * (span * span)) * (1.0 + 2.0**-7) + D * 2.0**-122
    return tl.where(reach > FAR, float("inf"), twice)


@triton.jit
def ranks_init(ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """(best, second, third) = -3e38, each [ROWS, PAIRS], before the first tile of `ranks_fold`."""
    none = tl.full((ROWS, PAIRS), -3e38, tl.float32)  # [ROWS, PAIRS]
    return none, none, none


@triton.jit
def _insert(state, s, keep, code):
    """Fold one more score into each column; the lowest bits of a score become `code`."""
    best, second, third = state
    s = ((s.to(tl.int32, bitcast=True) & keep) | code).to(tl.float32, bitcast=True)  # [ROWS, PAIRS]
    low = tl.minimum(best, s)  # [ROWS, PAIRS]
    next_low = tl.minimum(second, low)  # [ROWS, PAIRS]
    return tl.maximum(best, s), tl.maximum(second, low), tl.maximum(third, next_low)


@triton.jit
def ranks_fold(state, s, tile, PREC: tl.constexpr):
    """Each of the two scores s of a pair of columns 2 j and 2 j + 1, with its code in the lowest
    bits: best' = max(best, s), second' = max(second, min(best, s)), third' = max(third, min(second,
    best, s)). Threads exchange no values before the last tile; `best_three` finishes.
    """
    code, _parts, keep, _bias = tile
    even, odd = tl.split(tl.reshape(s, (s.shape[0], s.shape[1] // 2, 2)))  # [ROWS, PROTOS / 2]
    state = _insert(state, even, keep, code)
    return _insert(state, odd, keep, code + 1)


@triton.jit
def _top(one, place, keep, PROTOS: tl.constexpr):
    """(highest, whether a column is the first that has it, its index among all centroids)."""
    top = tl.max(one, 1)
    at = tl.min(tl.where(one == top[:, None], place, NO_INDEX), 1)
    code = top.to(tl.int32, bitcast=True) & ~keep
    index = (code // 2) * PROTOS + 2 * at + code % 2
    return top, place == at[:, None], tl.where(top > NONE, index, -1)


@triton.jit
def best_three(state, keep, PROTOS: tl.constexpr):
    """Finish `ranks_fold`: (best, its index, second, its index, third) of every row; the index of
    no centroid is -1.
    """
    one, two, three = state  # each [ROWS, PROTOS / 2]
    place = tl.arange(0, PROTOS // 2)[None, :]  # [1, PROTOS / 2]
    best, hit, index = _top(one, place, keep, PROTOS)
    one, two = tl.where(hit, two, one), tl.where(hit, three, two)  # [ROWS, PROTOS / 2] twice
    second, hit, runner = _top(one, place, keep, PROTOS)
    return best, index, second, runner, tl.max(tl.where(hit, two, one), 1)


@triton.jit
def squared_distances(X, C, at, k, valid, D: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr):
    """sum_d (x_d - c_d)^2 of pairs (row `at`, centroid `k`), both int64 [ROWS], in dtype KIND."""
    total = tl.zeros((at.shape[0],), KIND)
    for d0 in range(0, D, DIM):
        c = load_rows(C, k, valid, d0, D, D, DIM).to(KIND)  # [ROWS, DIM]
        gap = load_rows(X, at, valid, d0, D, D, DIM).to(KIND) - c  # [ROWS, DIM]
        total += tl.sum(gap * gap, 1)
    return total


@triton.jit
def nearer(X, C, at, one, other, valid, D: tl.constexpr):
    """The nearer of two centroids of each row in float64, the lower index on a tie."""
    low = tl.minimum(one, other)
    high = tl.maximum(one, other)
    low_far = squared_distances(X, C, at, low.to(tl.int64), valid, D, PIECE, tl.float64)
    high_far = squared_distances(X, C, at, high.to(tl.int64), valid, D, PIECE, tl.float64)
    return tl.where(low_far <= high_far + high_far * TIE, low, high)


@triton.jit
def _distances(X, C, NORM, at, k0, count, D: tl.constexpr):
    """(k [CENTROIDS], squared distances of one row to these centroids); inf for masked ones."""
    k = k0 + tl.arange(0, CENTROIDS)
    active = tl.load(NORM + k, mask=k < count, other=-1.0) >= 0.0
    rows = at + tl.zeros((CENTROIDS,), tl.int64)
    far = squared_distances(X, C, rows, k.to(tl.int64), active, D, PIECE, tl.float64)
    return k, tl.where(active, far, float("inf"))


@triton.jit
def nearest(X, C, NORM, at, count, D: tl.constexpr):
    """Index of the nearest centroid of one row in float64: the lowest k with far_k <= least (1 +
    TIE), least = min_k far_k; -1 if all are masked. The width of a tie is known after the last
    centroid. Only if the second distance is in a tie does a second loop compute the earlier ones
    again.
    """
    best = tl.full((CENTROIDS,), float("inf"), tl.float64)
    second = best
    index = tl.full((CENTROIDS,), -1, tl.int32)
    for k0 in range(0, count, CENTROIDS):
        k, far = _distances(X, C, NORM, at, k0, count, D)
        better = far < best
        second = tl.where(better, best, tl.minimum(second, far))
        index = tl.where(better, k, index)
        best = tl.where(better, far, best)
    least = tl.min(best, 0)
    first = tl.min(tl.where(best == least, index, NO_INDEX), 0)
    limit = least + least * TIE
    tied = tl.min(tl.where(index == first, second, best), 0) <= limit
    for k0 in range(0, tl.where(tied, first, 0), CENTROIDS):
        k, far = _distances(X, C, NORM, at, k0, count, D)
        first = tl.minimum(first, tl.min(tl.where(far <= limit, k, NO_INDEX), 0))
    return first
