# SPDX-License-Identifier: Apache-2.0
"""Which rows the fast kernels of the associative memory may get wrong.

The fast kernels expand distances, |x|^2 + |rho|^2 - 2 x rho, of rows and memories minus a centre.
The expansion loses digits where a row and its recall lie far from the centre and near each other.
A kernel sets the flag of such a row, and `am/exact.py` computes the row again from differences in
float64. `python_fallback/am/doubt.py` has the same rule in PyTorch.

With size = |x|^2 + |xb|^2 of a row and its recall, the *logit size* of the row is beta * size: the
size of the terms that cancel in its logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.score import LOG2E

# A row is near its recall where size is more than NEAR_FACTOR times |xb - x|^2.
NEAR_FACTOR = tl.constexpr(16.0)
# A row is right where logit size * (1 - largest weight) is at most NEAR_LIMIT if the row is near
# (NEAR_LIMIT_OF_MANY with a beta for each memory), and at most FAR_LIMIT if it is not.
NEAR_LIMIT = tl.constexpr(32.0)
NEAR_LIMIT_OF_MANY = tl.constexpr(4.0)
FAR_LIMIT = tl.constexpr(1024.0)
# Replaces NEAR_LIMIT for the energy: the other memories add to a distance from a difference.
NEAR_LIMIT_OF_ENERGY = tl.constexpr(1.0)
# The error of a logit: 8 units of 2^-24 of the logit size.
LOGIT_ERROR = tl.constexpr(8.0 * 2.0**-24)
# A difference has lost digits where size is this many times its square.
NEAR_FACTOR_OF_ENERGY = tl.constexpr(2.0**12)
# Gradients contain products of three lengths: below this squared length they stay inside float32,
# as do logits and the distances of a hard assignment below LARGEST_LOGIT. With a beta beyond
# SHARPEST, squared distances that matter may be too small for float32.
LONGEST = tl.constexpr(2.0**76)
LARGEST_LOGIT = tl.constexpr(2.0**120)
SHARPEST = tl.constexpr(2.0**90)
# A row loses too many digits to the centre where its norm is 2^8 times that of the result.
CENTRED = tl.constexpr(2.0**16)
# Memories in halves share one scale. Beyond this share of the largest norm few digits are left.
SHARED_SCALE = tl.constexpr(2.0**-15)
# Error of a product of rows, relative to the product of their norms, of each kind of product.
PRODUCTS = {
    "ieee": 0.0, "bf16x6": 2.0**-21, "tf32x3": 2.0**-19, "f16x3": 2.0**-20, "bf16x3": 2.0**-14,
    "tf32": 2.0**-9, "bf16": 2.0**-7,
}  # fmt: skip
# Replaces infinity in the tables: 0 times it is 0.
MOST = tl.constexpr(3.0e38)
# The factor from scale = 2 beta log2(e), in the tables of memories, to beta.
_BETA = tl.constexpr(0.34657359027997264)


@triton.jit
def sharpest(SIDE, count, PROTOS: tl.constexpr, PER_MEMORY: tl.constexpr):
    """(the largest beta of the active memories, inf beyond SHARPEST; its quotient by the least; the
    limit of the rule for rows that are near).
    """
    if PER_MEMORY:
        scale, least = tl.zeros((1,), tl.float32), tl.full((1,), float("inf"), tl.float32)
        for k0 in range(0, count, PROTOS):
            k = k0 + tl.arange(0, PROTOS)
            lift = tl.load(SIDE + 2 * count + k, mask=k < count, other=float("-inf"))
            masked = lift == float("-inf")
            here = tl.load(SIDE + k, mask=k < count, other=0.0)
            scale = tl.maximum(scale, tl.max(tl.where(masked, 0.0, here), 0))
            least = tl.minimum(least, tl.min(tl.where(masked, float("inf"), here), 0))
    else:
        scale = tl.load(SIDE + tl.arange(0, 1))
    beta, ratio, near_limit = scale * _BETA, tl.full((1,), 1.0, tl.float32), NEAR_LIMIT
    if PER_MEMORY:
        ratio, near_limit = scale / least, NEAR_LIMIT_OF_MANY
    return tl.where(beta < SHARPEST, beta, float("inf")), ratio, near_limit


@triton.jit
def heaviest(SIDE, count, PROTOS: tl.constexpr):
    """The largest log-weight, base 2; -inf where all memories are masked."""
    lift = tl.full((1,), float("-inf"), tl.float32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        here = tl.load(SIDE + 2 * count + k, mask=k < count, other=float("-inf"))
        lift = tl.maximum(lift, tl.max(here, 0))
    return lift


@triton.jit
def some_active(SIDE, count, PROTOS: tl.constexpr):
    """1 if a memory is active, else 0."""
    some = tl.zeros((1,), tl.int32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        lift = tl.load(SIDE + 2 * count + k, mask=k < count, other=float("-inf"))
        some = tl.maximum(some, tl.max(tl.where(lift == float("-inf"), 0, 1), 0))
    return some


@triton.jit
def fits(size, logit_size):
    """Whether norms, gradients and logits cannot overflow; False for NaN."""
    return (size < LONGEST) & (logit_size < LARGEST_LOGIT)


@triton.jit
def is_in_doubt(size, far, total, sharp, ratio, floor, near_limit):
    """Whether one step of a row may be wrong. With logit_size = sharp * size a row is right if
    logit_size (total - 1) <= limit * total and LOGIT_ERROR logit_size < 1 and size >= floor, and
    nothing overflows. The limit is FAR_LIMIT if far * NEAR_FACTOR >= size * ratio, else near_limit.

    `size` = |x|^2 + |xb|^2 of the state and its recall, `far` = |xb - x|^2, `total` the sum of the
    weights relative to the largest, `sharp` the largest beta and `ratio` its quotient by the least,
    `floor` the least size that has all its digits. Where betas differ, a row beside a memory of
    large beta may recall a distant memory of small beta. The sums of the rule in PyTorch would cost
    registers here: more rows count as near.
    """
    logit_size = sharp * size
    # comparisons with NaN are false: such a row is near, and in doubt
    limit = tl.where(far * NEAR_FACTOR >= size * ratio, FAR_LIMIT, near_limit)
    exact = (LOGIT_ERROR * logit_size < 1.0) & (logit_size * (total - 1.0) <= limit * total)
    return ~(exact & fits(size, logit_size) & (size >= floor))


@triton.jit
def energy_loses_digits(norm, size, far, top, lift, sharp):
    """Whether the differences of the energy's gradient have lost digits: x - xb, whose square is
    `far`, and x - rho of the likeliest memory, of logit `top` (base 2, without -beta |x|^2). A row
    may lie near that memory and still recall others. `lift` is the largest log-weight.
    """
    beside = norm - (top - lift) / (sharp * LOG2E)
    return (far * NEAR_FACTOR_OF_ENERGY < size) | (beside * NEAR_FACTOR_OF_ENERGY < 2.0 * norm)


@triton.jit
def doubt_flag(x, xb, norm, total, sharp):
    """As `is_in_doubt` for rows in registers and one beta, as 1 or 0; `norm` = |x|^2."""
    gap = xb - x  # [ROWS, DIM]
    size = norm + tl.sum(xb * xb, 1)
    return is_in_doubt(size, tl.sum(gap * gap, 1), total, sharp, 1.0, 0.0, NEAR_LIMIT).to(tl.int32)


@triton.jit
def hard_doubt_flag(norm, total):
    """As `doubt_flag` for a hard assignment; its `total` is 2 where the scores do not decide."""
    return tl.where((total != 2.0) & (norm < LARGEST_LOGIT), 0, 1)


@triton.jit
def step_flag(
    norm, size, far, top, total, sharp, ratio, floor, near_limit, lift,
    HARD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """1 for rows whose step may be wrong, else 0: HARD `hard_doubt_flag`, else `is_in_doubt`, and
    if KEEP is 3 also `energy_loses_digits`.
    """
    if HARD:
        flag = hard_doubt_flag(norm, total)
    else:
        flag = is_in_doubt(size, far, total, sharp, ratio, floor, near_limit).to(tl.int32)
        if KEEP == 3:
            flag |= energy_loses_digits(norm, size, far, top, lift, sharp).to(tl.int32)
    return flag


@triton.jit
def final_flags(flag, total, SIDE, count, PROTOS: tl.constexpr):
    """The flags after the last step. A row of total weight 0 did not move: it is in doubt only if a
    memory is active.
    """
    none = total == 0.0
    if tl.max(none.to(tl.int32), 0) > 0:
        flag = tl.where(none, some_active(SIDE, count, PROTOS), flag)
    return flag


@triton.jit
def loses_digits(norm, result, start):
    """1 where a row loses too many digits to the centre: the squared norm of the result minus the
    centre exceeds CENTRED times the squared norm of the result, and of the caller's row.
    """
    few = norm <= CENTRED * tl.maximum(result, start)
    return tl.where(few, 0, 1)
