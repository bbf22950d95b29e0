# SPDX-License-Identifier: Apache-2.0
"""Folds: how the state of a row changes with one tile of memories. A state is a tuple of registers,
[ROWS] or [ROWS, DIM]; s [ROWS, PROTOS] are the base-2 logits of the tile.

NaN: triton's max and maximum skip it, the sums keep it; -inf is never subtracted from -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .halves import dot_halves_onto, halves
from .score import dot

LIFT_BITS = tl.constexpr(10.0)
LIFT = tl.constexpr(2.0**10)
# The index beside the others in a minimum: above all of them.
NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def finite(m):
    """A maximum to subtract: m, or 0 where it is -inf because all memories so far are masked."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def lse_init(ROWS: tl.constexpr):
    """(m, total) = (-inf, 0) before the first tile."""
    return tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def lse_fold(state, s, tile, PREC: tl.constexpr):
    """Log-sum-exp: m' = max(m, max_k s_k), total' = total 2^(m - m') + sum_k 2^(s_k - m'); the
    result is m + log2(total).
    """
    m, total = state
    top = tl.maximum(m, tl.max(s, 1))
    safe = finite(top)
    return top, total * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)


@triton.jit
def lse_first_init(ROWS: tl.constexpr):
    """(m, index, total) = (-inf, -1, 0) before the first tile."""
    m, total = lse_init(ROWS)
    return m, tl.full((ROWS,), -1, tl.int32), total


@triton.jit
def lse_first_fold(state, s, tile, PREC: tl.constexpr):
    """As `lse_fold`, and index = the lowest k with s_k = m."""
    m, index, total = state
    k, _rho, _scale, _bias = tile
    highest = tl.max(s, 1)
    first = tl.min(tl.where(s == highest[:, None], k[None, :], NO_INDEX), 1)
    index = tl.where(highest > m, first, index)
    top = tl.maximum(m, highest)
    safe = finite(top)
    return top, index, total * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)


@triton.jit
def softmax_init(ROWS: tl.constexpr, DIM: tl.constexpr):
    """(m, total, acc [ROWS, DIM]) = (-inf, 0, 0) before the first tile."""
    m, total = lse_init(ROWS)
    return m, total, tl.zeros((ROWS, DIM), tl.float32)


@triton.jit
def softmax_fold(state, s, tile, PREC: tl.constexpr):
    """The online softmax: as `lse_fold`, and acc' = acc 2^(m - m') + sum_k 2^(s_k - m') rho_k; the
    recall is acc / total.
    """
    m, total, acc = state
    _k, rho, _scale, _bias = tile
    top = tl.maximum(m, tl.max(s, 1))
    safe = finite(top)
    p, shrink = tl.exp2(s - safe[:, None]), tl.exp2(m - safe)  # [ROWS, PROTOS], [ROWS]
    return top, total * shrink + tl.sum(p, 1), acc * shrink[:, None] + dot(p, rho, PREC)


@triton.jit
def softmax_halves_fold(state, s, tile, PREC: tl.constexpr):
    """As `softmax_fold` with memories in halves. Weights 2^(s_k - m' + LIFT_BITS), and so total and
    acc, are LIFT times as large: half precision keeps the small ones.
    """
    m, total, acc = state
    _k, parts, _keep, _bias = tile  # parts: two tiles [PROTOS, DIM]
    top = tl.maximum(m, tl.max(s, 1))
    safe = finite(top)
    # [ROWS, PROTOS], [ROWS]
    p, shrink = tl.exp2(s - (safe - LIFT_BITS)[:, None]), tl.exp2(m - safe)
    acc = dot_halves_onto(halves(p), parts, acc * shrink[:, None], PREC)  # [ROWS, DIM]
    return top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def contest_init(ROWS: tl.constexpr):
    """(best, index, second) = (-inf, -1, -inf) before the first tile."""
    none = tl.full((ROWS,), float("-inf"), tl.float32)
    return none, tl.full((ROWS,), -1, tl.int32), none


@triton.jit
def contest_fold(state, s, tile, PREC: tl.constexpr):
    """State: best = max_k s_k, index = the lowest k with s_k = best, second = the maximum of s over
    all k but index.
    """
    best, index, second = state
    k, _rho, _scale, _bias = tile
    top = tl.max(s, 1)
    first = tl.min(tl.where(s == top[:, None], k[None, :], NO_INDEX), 1)
    runner = tl.max(tl.where(k[None, :] == first[:, None], float("-inf"), s), 1)
    better = top > best
    second = tl.maximum(tl.maximum(second, runner), tl.where(better, best, top))
    return tl.where(better, top, best), tl.where(better, first, index), second


@triton.jit
def decision(state, width):
    """Finish `contest_fold`: (index of the nearest, whether any memory is active, 1 where best -
    second > width, 2 where not, 0 where all memories are masked).
    """
    best, index, second = state
    some = index >= 0
    apart = (second == float("-inf")) | (best - second > width)  # False for NaN
    return index, some, tl.where(some, tl.where(apart, 1.0, 2.0), 0.0)


@triton.jit
def inverse(total):
    """The quotient 1 / total, off by its last bit or two; 0 for 0. An exact division is a function
    call, and a call in a loop makes matrix instructions wait for each other.
    """
    divisor = tl.where(total == 0.0, 1.0, total)
    guess = 1.0 / divisor
    return tl.where(total == 0.0, 0.0, guess + guess * (1.0 - divisor * guess))


@triton.jit
def normalise(mass, delta):
    """(1 / mass, delta / mass); (0, 0) where all memories are masked and mass = 0."""
    inverse = tl.where(mass == 0.0, 0.0, 1.0 / tl.where(mass == 0.0, 1.0, mass))
    return inverse, tl.where(mass == 0.0, 0.0, delta / tl.where(mass == 0.0, 1.0, mass))
