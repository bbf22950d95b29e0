# SPDX-License-Identifier: Apache-2.0
"""Which centroid is nearest, with float64's answer: the three best scores of a sweep, the bound on
their error that tells which rows they decide, and the float64 that decides the others.

A score is x . c - |c|^2 / 2, the largest for the nearest; x and c are less the origin. X and C are
rows and centroids as given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._score import load_rows

# Squared distances this close, relative to the smaller one, are a tie.
TIE = tl.constexpr(2.0**-40)
# Centroids and features of a tile in float64, two registers a value.
MEETS = tl.constexpr(64)
PIECE = tl.constexpr(16)
_NO_INDEX = tl.constexpr(2147483647)

# Error of a product of rows relative to the product of their norms: what rounding the factors
# leaves (both to p bits: 2 * 2^-p; truncated: twice that; split: what is dropped and the last
# part's rounding), and steps of 2^-24 a feature: matrix units truncate all addends of a sum.
ROUNDED = {
    "ieee": 0.0, "bf16": 2.0**-7, "tf32": 2.0**-9,
    "bf16x3": 2.0**-15, "tf32x3": 2.0**-20, "bf16x6": 2.0**-23,
}  # fmt: skip
STEPS = {"ieee": 1}
MATRIX_STEPS = 4


def unit(precision: str, d: int) -> float:
    """Bound on the error of a product over `d` features, relative to the norms; the centred values
    are rounded too, and so is the score.
    """
    return ROUNDED[precision] + (STEPS.get(precision, MATRIX_STEPS) * d + 6) * 2.0**-24


@triton.jit
def slack(norm, reach, unit, D: tl.constexpr):
    """Twice the error of a score of rows of squared norm `norm`, and the width of a tie; inf or NaN
    where a score may have overflowed. The powers of two beside D are what underflow may hide.
    """
    size = tl.sqrt(norm + D * 2.0**-125)
    span = size + reach
    twice = 2.0 * unit * (size * reach) + 2.0**-22 * (reach * reach) + TIE * (span * span)
    return twice * (1.0 + 2.0**-7) + D * 2.0**-122


@triton.jit
def three_init(ROWS: tl.constexpr):
    """(best, its index, second, its index, third) before the first tile."""
    none = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.full((ROWS,), -1, tl.int32)
    return none, index, none, index, none


@triton.jit
def _first(s, top, k):
    """Lowest index of the highest score."""
    return tl.min(tl.where(s == top[:, None], k[None, :], _NO_INDEX), 1)


@triton.jit
def three_fold(state, s, tile, PREC: tl.constexpr):
    """The three highest scores; of equal ones the lower index stands first."""
    best, index, second, runner, third = state
    k = tile[0]
    top = tl.max(s, 1)
    top_k = _first(s, top, k)
    s = tl.where(k[None, :] == top_k[:, None], float("-inf"), s)
    next_top = tl.max(s, 1)
    next_k = _first(s, next_top, k)
    s = tl.where(k[None, :] == next_k[:, None], float("-inf"), s)
    last = tl.max(s, 1)

    # what is held came first and wins where scores are equal
    wins, follows, passed = top > best, top > second, next_top > best
    third = tl.where(
        wins,
        tl.where(passed, tl.maximum(best, last), tl.maximum(second, next_top)),
        tl.where(follows, tl.maximum(second, next_top), tl.maximum(third, top)),
    )
    held, held_k = tl.where(passed, next_top, best), tl.where(passed, next_k, index)
    runner = tl.where(wins, held_k, tl.where(follows, top_k, runner))
    second = tl.where(wins, held, tl.where(follows, top, second))
    return tl.where(wins, top, best), tl.where(wins, top_k, index), second, runner, third


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
