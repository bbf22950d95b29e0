# SPDX-License-Identifier: Apache-2.0
"""Products of float32 tiles on matrix units of half precision, with 22 bits of every factor.

A factor is scaled by a power of two, so that its largest entry is in [128, 256), and written as the
sum of two float16. Three products of such parts ("f16x3") differ from float32's by 2^-21 of the
norms, one ("f16") by 2^-10. Each row has a scale of its own. The memories share one scale, so that
comparisons between them do not depend on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .score import load_centred_rows

# The norm of memories whose squared norms are 0 in float32.
TINY = tl.constexpr(2.0**-74)


@triton.jit
def _exponent(top):
    """Biased exponent of a magnitude, 8 or more: both powers below are then normal numbers."""
    return tl.maximum((top.to(tl.int32, bitcast=True) >> 23) & 255, 8)


@triton.jit
def power(top):
    """The power of two whose product with the magnitude `top` is in [128, 256)."""
    return ((261 - _exponent(top)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unpower(top):
    """The inverse of `power`."""
    return ((_exponent(top) - 7) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """A scaled tile in two parts: the nearest float16, and the rounding error as float16."""
    high = x.to(tl.float16)  # the shape of x
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dot_halves_onto(a, b, c, PREC: tl.constexpr):
    """The sum c + a @ b of tiles in halves: a_low b_high, then a_high b_low (both only with
    "f16x3"), then a_high b_high.
    """
    a_high, a_low = a
    b_high, b_low = b
    if PREC == "f16x3":
        c = tl.dot(a_low, b_high, c)
        c = tl.dot(a_high, b_low, c)
    return tl.dot(a_high, b_high, c)


@triton.jit
def load_halves(
    table, k0, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr
):
    """(code, parts, keep, bias) of one tile of a table (HALVES, BIAS, size, keep): its number times
    2, its two parts, the table's `keep`, its biases. HALVES [2, size, STRIDE] is float16, 0 in rows
    past the last and features past D.
    """
    HALVES, BIAS, size, keep = table
    k = k0 + tl.arange(0, PROTOS)
    at = HALVES + k.to(tl.int64)[:, None] * STRIDE + tl.arange(0, DIM)[None, :]  # [PROTOS, DIM]
    high = tl.load(at)  # [PROTOS, DIM]
    low = tl.load(at + tl.cast(size, tl.int64) * STRIDE)  # [PROTOS, DIM]
    return 2 * (k0 // PROTOS), (high, low), keep, tl.load(BIAS + k)


@triton.jit
def load_biases(
    table, k0, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr
):
    """As `load_halves` for rows too wide for registers: (pointer to the tile, distance from its
    first part to its second) replace the parts.
    """
    HALVES, BIAS, size, keep = table
    k = k0 + tl.arange(0, PROTOS)
    parts = (HALVES + tl.cast(k0, tl.int64) * STRIDE, tl.cast(size, tl.int64) * STRIDE)
    return 2 * (k0 // PROTOS), parts, keep, tl.load(BIAS + k)


@triton.jit
def reach_of(SIDE, count, PROTOS: tl.constexpr):
    """max_k |rho_k| over the memories of one problem (`am/memories.py`), at least TINY."""
    top = tl.zeros((1,), tl.float32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        top = tl.maximum(top, tl.max(tl.load(SIDE + 3 * count + k, mask=k < count, other=0.0), 0))
    return tl.maximum(tl.sqrt_rn(top), TINY)


@triton.jit
def load_memory_halves(
    table, k0, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr
):
    """As `load_halves` with the biases of a table of memories: (k, parts, k, bias)."""
    HALVES, SIDE, size = table
    k = k0 + tl.arange(0, PROTOS)
    at = HALVES + k.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]  # [PROTOS, DIM]
    parts = (tl.load(at), tl.load(at + tl.cast(size, tl.int64) * DIM))  # two of [PROTOS, DIM]
    return k, parts, k, tl.load(SIDE + count + k, mask=k < count, other=float("-inf"))


@triton.jit
def own_halves(
    own, tile, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PREC: tl.constexpr
):
    """Products [ROWS, PROTOS] of rows in registers with a tile; own = ((high, low) of the rows, the
    inverse of both scales).
    """
    x, _undo = own
    x_high, _x_low = x  # two of [ROWS, DIM]
    _code, parts, _keep, _bias = tile
    high, low = parts
    s = tl.zeros((x_high.shape[0], high.shape[0]), tl.float32)  # [ROWS, PROTOS]
    return dot_halves_onto(x, (tl.trans(high), tl.trans(low)), s, PREC)


@triton.jit
def raw_halves(
    own, tile, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PREC: tl.constexpr
):
    """As `own_halves` for the caller's rows, centred and scaled here, DIM features at a time; own =
    ((V, CENTRE, at, valid, scale), the inverse of both scales).
    """
    rows, _undo = own
    V, CENTRE, at, valid, scale = rows
    _code, parts, _keep, bias = tile
    HIGH, skip = parts
    k = tl.arange(0, bias.shape[0])
    s = tl.zeros((at.shape[0], bias.shape[0]), tl.float32)  # [ROWS, PROTOS]
    for d0 in range(0, D, DIM):
        # two of [ROWS, DIM]
        x = halves(load_centred_rows(V, CENTRE, at, valid, d0, D, DIM) * scale[:, None])
        # [PROTOS, DIM]
        where = HIGH + k.to(tl.int64)[:, None] * STRIDE + (d0 + tl.arange(0, DIM))[None, :]
        c = (tl.trans(tl.load(where)), tl.trans(tl.load(where + skip)))  # two of [DIM, PROTOS]
        s = dot_halves_onto(x, c, s, PREC)
    return s
