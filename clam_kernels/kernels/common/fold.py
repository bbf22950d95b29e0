# SPDX-License-Identifier: Apache-2.0
"""Folds: how a row takes in one tile of memories. A state is a tuple of registers, one entry or one
row of features for each row.

NaN: triton's max and maximum skip it, the sums keep it; -inf is never subtracted from -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .halves import halved_onto, halves
from .score import dot

LIFT_BITS = tl.constexpr(10.0)
LIFT = tl.constexpr(2.0**10)


@triton.jit
def finite(m):
    """A maximum that may be subtracted: 0 where no memory has taken part yet."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def lse_init(ROWS: tl.constexpr):
    """(maximum, sum of weights relative to it) before the first tile."""
    return tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def lse_fold(state, s, tile, PREC: tl.constexpr):
    """Logsumexp alone."""
    m, total = state
    top = tl.maximum(m, tl.max(s, 1))
    safe = finite(top)
    return top, total * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)


@triton.jit
def lse_first_init(ROWS: tl.constexpr):
    """(maximum, its index, sum of weights relative to it) before the first tile."""
    m, total = lse_init(ROWS)
    return m, tl.full((ROWS,), -1, tl.int32), total


@triton.jit
def lse_first_fold(state, s, tile, PREC: tl.constexpr):
    """Logsumexp, and the first memory that has the largest logit."""
    m, index, total = state
    here = tl.max(s, 1)
    k = tl.min(tl.where(s == here[:, None], tile[0][None, :], 2147483647), 1)
    index = tl.where(here > m, k, index)
    top = tl.maximum(m, here)
    safe = finite(top)
    return top, index, total * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)


@triton.jit
def softmax_init(ROWS: tl.constexpr, DIM: tl.constexpr):
    """(maximum, sum of weights, weighted sum of memories) before the first tile."""
    m, total = lse_init(ROWS)
    return m, total, tl.zeros((ROWS, DIM), tl.float32)


@triton.jit
def softmax_fold(state, s, tile, PREC: tl.constexpr):
    """The online softmax, and the memories it weighs."""
    m, total, acc = state
    top = tl.maximum(m, tl.max(s, 1))
    safe = finite(top)
    p, shrink = tl.exp2(s - safe[:, None]), tl.exp2(m - safe)
    return top, total * shrink + tl.sum(p, 1), acc * shrink[:, None] + dot(p, tile[1], PREC)


@triton.jit
def softmax_halves_fold(state, s, tile, PREC: tl.constexpr):
    """As `softmax_fold` with memories in halves; weights and their sum are LIFT times as large, so
    that half precision keeps the small ones.
    """
    m, total, acc = state
    top = tl.maximum(m, tl.max(s, 1))
    safe = finite(top)
    p, shrink = tl.exp2(s - (safe - LIFT_BITS)[:, None]), tl.exp2(m - safe)
    acc = halved_onto(halves(p), tile[1], acc * shrink[:, None], PREC)
    return top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def contest_init(ROWS: tl.constexpr):
    """(best, its index or -1, second best) before the first tile."""
    none = tl.full((ROWS,), float("-inf"), tl.float32)
    return none, tl.full((ROWS,), -1, tl.int32), none


@triton.jit
def contest_fold(state, s, tile, PREC: tl.constexpr):
    """The highest score, the lowest index on ties; and the highest of the others."""
    best, index, second = state
    top = tl.max(s, 1)
    k = tl.min(tl.where(s == top[:, None], tile[0][None, :], 2147483647), 1)
    runner = tl.max(tl.where(tile[0][None, :] == k[:, None], float("-inf"), s), 1)
    better = top > best
    second = tl.maximum(tl.maximum(second, runner), tl.where(better, best, top))
    return tl.where(better, top, best), tl.where(better, k, index), second


@triton.jit
def decided(state, width):
    """(index of the nearest, whether one takes part, 1 where the second best is further than
    `width`, 2 where it is not, 0 where no memory takes part).
    """
    best, index, second = state
    some = index >= 0
    apart = (second == float("-inf")) | (best - second > width)  # NaN decides nothing
    return index, some, tl.where(some, tl.where(apart, 1.0, 2.0), 0.0)


@triton.jit
def inverse(total):
    """The quotient 1 / total to its last bit or two, 0 for 0. An exact division is a call, and
    beside a call in a loop matrix instructions wait for each other.
    """
    known = tl.where(total == 0.0, 1.0, total)
    guess = 1.0 / known
    return tl.where(total == 0.0, 0.0, guess + guess * (1.0 - known * guess))


@triton.jit
def normalised(mass, delta):
    """(1 / mass, delta / mass), 0 where no memory takes part."""
    inverse = tl.where(mass == 0.0, 0.0, 1.0 / tl.where(mass == 0.0, 1.0, mass))
    return inverse, tl.where(mass == 0.0, 0.0, delta / tl.where(mass == 0.0, 1.0, mass))
