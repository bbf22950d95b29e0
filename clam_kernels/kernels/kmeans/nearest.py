# SPDX-License-Identifier: Apache-2.0
"""Which centroid is nearest, with float64's answer: the three best scores of a sweep, the bound on
their error that tells which rows they decide, and the float64 that decides the others.

A score is x . c - |c|^2 / 2, the largest for the nearest; x and c are less the origin. X and C are
rows and centroids as given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.score import load_rows

# Squared distances this close, relative to the smaller one, are a tie.
TIE = tl.constexpr(2.0**-40)
# Centroids and features of a tile in float64, two registers a value.
MEETS = tl.constexpr(64)
PIECE = tl.constexpr(16)
_NO_INDEX = tl.constexpr(2147483647)

# Below it a score is that of no centroid; a reach beyond FAR leaves nothing for it to be below.
NONE = tl.constexpr(-5e37)
FAR = tl.constexpr(1e18)

# Error of a product of rows relative to the product of their norms: what is dropped of the factors
# (2^-11 of each and their product; of two parts 2^-23 of each and the product of the second ones;
# entries so small that half precision has fewer digits add less than 2^-26), and steps of 2^-24 a
# feature: matrix units truncate all addends of a sum.
ROUNDED = {"f16": 2.0**-10 + 2.0**-21, "f16x3": 2.0**-21 + 2.0**-26}
MATRIX_STEPS = 4


def unit(precision: str, d: int) -> float:
    """Bound on the error of a product over `d` features, relative to the norms; the centred values
    are rounded too, and so is the score.
    """
    return ROUNDED[precision] + (MATRIX_STEPS * d + 6) * 2.0**-24


def grain_of(tiles: int) -> tuple[int, float]:
    """(mask of the bits that a score keeps beside the code of its tile, what the others may be off
    by, relative to the score).
    """
    bits = max(1, (2 * tiles - 1).bit_length())
    return -1 << bits, 2.0 ** (bits - 23)


@triton.jit
def slack(norm, reach, unit, grain, D: tl.constexpr):
    """Twice the error of a score of rows of squared norm `norm`, and the width of a tie; inf or NaN
    where a score may have overflowed. The powers of two beside D are what underflow may hide.
    """
    size = tl.sqrt(norm + D * 2.0**-125)
    span = size + reach
    twice = 2.0 * (unit + grain) * (size * reach) + (2.0**-22 + grain) * (reach * reach)
    twice = (twice + TIE * (span * span)) * (1.0 + 2.0**-7) + D * 2.0**-122
    return tl.where(reach > FAR, float("inf"), twice)


@triton.jit
def ranks_init(ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """The three highest scores met in each column before the first tile; see `ranks_fold`."""
    none = tl.full((ROWS, PAIRS), -3e38, tl.float32)
    return none, none, none


@triton.jit
def _ranked_in(state, s, keep, code):
    """One more score a column; its lowest bits become the code of where it was met."""
    best, second, third = state
    s = ((s.to(tl.int32, bitcast=True) & keep) | code).to(tl.float32, bitcast=True)
    low = tl.minimum(best, s)
    next_low = tl.minimum(second, low)
    return tl.maximum(best, s), tl.maximum(second, low), tl.maximum(third, next_low)


@triton.jit
def ranks_fold(state, s, tile, PREC: tl.constexpr):
    """Columns 2 j and 2 j + 1 of every tile share a place: nothing crosses between threads, and
    nothing is looked up, until the last tile is in.
    """
    even, odd = tl.split(tl.reshape(s, (s.shape[0], s.shape[1] // 2, 2)))
    state = _ranked_in(state, even, tile[2], tile[0])
    return _ranked_in(state, odd, tile[2], tile[0] + 1)


@triton.jit
def _top(one, place, keep, PROTOS: tl.constexpr):
    """(highest, whether a column is the first that has it, its index among all centroids)."""
    top = tl.max(one, 1)
    at = tl.min(tl.where(one == top[:, None], place, _NO_INDEX), 1)
    code = top.to(tl.int32, bitcast=True) & ~keep
    index = (code // 2) * PROTOS + 2 * at + code % 2
    return top, place == at[:, None], tl.where(top > NONE, index, -1)


@triton.jit
def ranked(state, keep, PROTOS: tl.constexpr):
    """(best, its index, second, its index, third) of every row; an index of -1: there is none."""
    one, two, three = state
    place = tl.arange(0, PROTOS // 2)[None, :]
    best, hit, index = _top(one, place, keep, PROTOS)
    one, two = tl.where(hit, two, one), tl.where(hit, three, two)
    second, hit, runner = _top(one, place, keep, PROTOS)
    return best, index, second, runner, tl.max(tl.where(hit, two, one), 1)


@triton.jit
def squared(X, C, at, k, live, D: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr):
    """|x - c|^2 of pairs (row `at`, centroid `k`), both int64, in KIND from differences."""
    total = tl.zeros((at.shape[0],), KIND)
    for d0 in range(0, D, DIM):
        c = load_rows(C, k, live, d0, D, D, DIM).to(KIND)
        gap = load_rows(X, at, live, d0, D, D, DIM).to(KIND) - c
        total += tl.sum(gap * gap, 1)
    return total


@triton.jit
def nearer(X, C, at, one, other, live, D: tl.constexpr):
    """The nearer of two centroids of each row in float64, the lower index on a tie."""
    low = tl.minimum(one, other)
    high = tl.maximum(one, other)
    low_far = squared(X, C, at, low.to(tl.int64), live, D, PIECE, tl.float64)
    high_far = squared(X, C, at, high.to(tl.int64), live, D, PIECE, tl.float64)
    return tl.where(low_far <= high_far + high_far * TIE, low, high)


@triton.jit
def _met(X, C, NORM, at, k0, count, D: tl.constexpr):
    """(k, squared distances of one row to a tile of centroids); inf for those that are dead."""
    k = k0 + tl.arange(0, MEETS)
    alive = tl.load(NORM + k, mask=k < count, other=-1.0) >= 0.0
    rows = at + tl.zeros((MEETS,), tl.int64)
    far = squared(X, C, rows, k.to(tl.int64), alive, D, PIECE, tl.float64)
    return k, tl.where(alive, far, float("inf"))


@triton.jit
def nearest(X, C, NORM, at, count, D: tl.constexpr):
    """Nearest centroid of one row in float64, the lowest index of a tie; -1 if none lives. Only
    where another is in a tie with the least are those before it met again: how wide a tie is, is
    known after the last.
    """
    best = tl.full((MEETS,), float("inf"), tl.float64)
    second = best
    index = tl.full((MEETS,), -1, tl.int32)
    for k0 in range(0, count, MEETS):
        k, far = _met(X, C, NORM, at, k0, count, D)
        better = far < best
        second = tl.where(better, best, tl.minimum(second, far))
        index = tl.where(better, k, index)
        best = tl.where(better, far, best)
    least = tl.min(best, 0)
    found = tl.min(tl.where(best == least, index, _NO_INDEX), 0)
    limit = least + least * TIE
    tied = tl.min(tl.where(index == found, second, best), 0) <= limit
    for k0 in range(0, tl.where(tied, found, 0), MEETS):
        k, far = _met(X, C, NORM, at, k0, count, D)
        found = tl.minimum(found, tl.min(tl.where(far <= limit, k, _NO_INDEX), 0))
    return found
