# SPDX-License-Identifier: Apache-2.0
"""Which rows the fast kernels of the associative memory may get wrong.

The fast kernels expand distances, |x|^2 + |rho|^2 - 2 x rho, of rows and memories less a centre.
The expansion loses digits where a row and what it recalls lie far from the centre and near each
other. A kernel sets the flag of such a row, and `am/exact.py` computes the row again from
differences in float64. `Watch` of `python_fallback/am/doubt.py` is the same rule in PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A row is near what it recalls where the distance is this many times smaller than the norms.
CANCEL = tl.constexpr(16.0)
# The heat of a row is beta times the norms. Heat times what the largest weight leaves to the others
# may be CALM where the row is near (CALM_OF_MANY with a beta for each memory), and WARM elsewhere.
CALM = tl.constexpr(32.0)
CALM_OF_MANY = tl.constexpr(4.0)
WARM = tl.constexpr(1024.0)
# As CALM for the energy, whose others add to a distance that comes from a difference.
CALM_OF_ENERGY = tl.constexpr(1.0)
# The error of a logit: 8 units of 2^-24 of the heat.
GROWTH = tl.constexpr(8.0 * 2.0**-24)
# A difference has lost digits where its square is this many times smaller than the norms.
CANCEL_OF_ENERGY = tl.constexpr(2.0**12)
# Gradients hold products of three lengths: below this squared length they stay inside float32. So
# do logits and the distances of a hard assignment below LARGE. A beta beyond SHARPEST may meet
# squared distances that are too small for float32.
LONGEST = tl.constexpr(2.0**76)
LARGE = tl.constexpr(2.0**120)
SHARPEST = tl.constexpr(2.0**90)
# The centre costs the digits that it has before those of the result: 2^8 in a norm is too many.
CENTRED = tl.constexpr(2.0**16)
# Memories in halves share one scale. Beyond this share of the largest norm few digits are left.
SHARED_SCALE = tl.constexpr(2.0**-15)
# Error of a product of rows, relative to the product of their norms, of each kind of product.
PRODUCTS = {
    "ieee": 0.0, "bf16x6": 2.0**-21, "tf32x3": 2.0**-19, "f16x3": 2.0**-20, "bf16x3": 2.0**-14,
    "tf32": 2.0**-9, "bf16": 2.0**-7,
}  # fmt: skip
# The largest finite number: in the place of what would be infinite.
MOST = tl.constexpr(3.0e38)
# Scale = 2 beta log2(e), as the tables of memories have it.
_BETA = tl.constexpr(0.34657359027997264)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sharpest(SIDE, count, PROTOS: tl.constexpr, PER_MEMORY: tl.constexpr):
    """(The largest beta of the memories that take part, inf beyond SHARPEST; how many times the
    least it is; what heat times the weight of the others may be where a row is near.)
    """
    if PER_MEMORY:
        scale, least = tl.zeros((1,), tl.float32), tl.full((1,), float("inf"), tl.float32)
        for k0 in range(0, count, PROTOS):
            k = k0 + tl.arange(0, PROTOS)
            alive = tl.load(SIDE + 2 * count + k, mask=k < count, other=float("-inf"))
            dead = alive == float("-inf")
            here = tl.load(SIDE + k, mask=k < count, other=0.0)
            scale = tl.maximum(scale, tl.max(tl.where(dead, 0.0, here), 0))
            least = tl.minimum(least, tl.min(tl.where(dead, float("inf"), here), 0))
    else:
        scale = tl.load(SIDE + tl.arange(0, 1))
    beta, ratio, calm = scale * _BETA, tl.full((1,), 1.0, tl.float32), CALM
    if PER_MEMORY:
        ratio, calm = scale / least, CALM_OF_MANY
    return tl.where(beta < SHARPEST, beta, float("inf")), ratio, calm


@triton.jit
def heaviest(SIDE, count, PROTOS: tl.constexpr):
    """The largest log-weight, base 2; -inf where no memory takes part."""
    lift = tl.full((1,), float("-inf"), tl.float32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        here = tl.load(SIDE + 2 * count + k, mask=k < count, other=float("-inf"))
        lift = tl.maximum(lift, tl.max(here, 0))
    return lift


@triton.jit
def some_take_part(SIDE, count, PROTOS: tl.constexpr):
    """1 if a memory takes part, else 0."""
    some = tl.zeros((1,), tl.int32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        lift = tl.load(SIDE + 2 * count + k, mask=k < count, other=float("-inf"))
        some = tl.maximum(some, tl.max(tl.where(lift == float("-inf"), 0, 1), 0))
    return some


@triton.jit
def fits(size, heat):
    """Whether norms, gradients and logits are far from an overflow; NaN does not fit."""
    return (size < LONGEST) & (heat < LARGE)


@triton.jit
def doubted(size, far, total, sharp, ratio, floor, calm):
    """Whether one step of a row may be wrong: `size` = |x|^2 + |xb|^2 of the state and of what it
    recalls, `far` = |xb - x|^2, `total` the weights relative to the largest, `sharp` the largest
    beta and `ratio` how many times the least it is, `floor` the least size that has all its digits,
    `calm` what heat times the weight of the others may be where the row is near.

    Where betas differ, a row beside a sharp memory may recall a broad one that is far. The sums of
    `Watch` would cost registers here: more rows count as near.
    """
    heat = sharp * size
    # comparisons with what is not a number are false: such a row is near, and not calm
    most = tl.where(far * CANCEL >= size * ratio, WARM, calm)
    exact = (GROWTH * heat < 1.0) & (heat * (total - 1.0) <= most * total)
    return ~(exact & fits(size, heat) & (size >= floor))


@triton.jit
def energy_lost(norm, size, far, top, lift, sharp):
    """Whether the differences of the energy's gradient have lost digits: x - xb, whose square is
    `far`, and x - rho of the likeliest memory, of logit `top` (base 2, less beta |x|^2), which a
    row may stand beside without recalling it alone. `lift` is the largest log-weight.
    """
    beside = norm - (top - lift) / (sharp * _LOG2E)
    return (far * CANCEL_OF_ENERGY < size) | (beside * CANCEL_OF_ENERGY < 2.0 * norm)


@triton.jit
def step_doubted(x, xb, norm, total, sharp):
    """As `doubted` for rows in registers and one beta, 1 or 0; `norm` = |x|^2."""
    gap = xb - x
    size = norm + tl.sum(xb * xb, 1)
    return doubted(size, tl.sum(gap * gap, 1), total, sharp, 1.0, 0.0, CALM).to(tl.int32)


@triton.jit
def hard_doubted(norm, total):
    """As `step_doubted` for a hard assignment: `total` is 2 where it is not decided."""
    return tl.where((total != 2.0) & (norm < LARGE), 0, 1)


@triton.jit
def settled(flag, total, SIDE, count, PROTOS: tl.constexpr):
    """The flags after the last step. A row that no memory weighs did not move: it is in doubt only
    if a memory takes part.
    """
    none = total == 0.0
    if tl.max(none.to(tl.int32), 0) > 0:
        flag = tl.where(none, some_take_part(SIDE, count, PROTOS), flag)
    return flag


@triton.jit
def lost(norm, result, given):
    """1 where the centre had too many digits before those of a result: squared norms of the result
    less the centre, of the result, and of the row that was given.
    """
    kept = norm <= CENTRED * tl.maximum(result, given)
    return tl.where(kept, 0, 1)
