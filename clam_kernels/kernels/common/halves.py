# SPDX-License-Identifier: Apache-2.0
"""Products of float32 tiles on matrix units of half precision, with 22 bits of every factor.

A factor is scaled by a power of two, so that its largest entry is in [128, 256), and written as the
sum of two float16. Three products of such parts ("f16x3") are float32's but for 2^-21 of the norms;
one ("f16") is good to 2^-10. Rows are scaled each by itself; the other side as a whole, so that its
scale falls out of comparisons.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .score import centred_rows

# What memories are whose squared norms are 0 in float32.
TINY = tl.constexpr(2.0**-74)


@triton.jit
def _exponent(top):
    """Biased exponent of a magnitude, kept where both powers below are normal numbers."""
    return tl.maximum((top.to(tl.int32, bitcast=True) >> 23) & 255, 8)


@triton.jit
def power(top):
    """The power of two that takes a magnitude to [128, 256)."""
    return ((261 - _exponent(top)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unpower(top):
    """Its inverse."""
    return ((_exponent(top) - 7) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """A scaled tile in two parts: the nearest float16, and what it drops."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def halved_onto(a, b, c, PREC: tl.constexpr):
    """Product of two tiles in halves, summed onto c: the small parts first."""
    if PREC == "f16x3":
        c = tl.dot(a[1], b[0], c)
        c = tl.dot(a[0], b[1], c)
    return tl.dot(a[0], b[0], c)


@triton.jit
def load_halves(
    table, k0, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr
):
    """One tile of a table (HALVES, BIAS, size, keep): HALVES [2, size, STRIDE] float16, where rows
    past the last and features past D are 0; (code of the tile, its parts, keep, bias).
    """
    HALVES, BIAS, size, keep = table
    k = k0 + tl.arange(0, PROTOS)
    at = HALVES + k.to(tl.int64)[:, None] * STRIDE + tl.arange(0, DIM)[None, :]
    high = tl.load(at)
    low = tl.load(at + tl.cast(size, tl.int64) * STRIDE)
    return 2 * (k0 // PROTOS), (high, low), keep, tl.load(BIAS + k)


@triton.jit
def load_biases(
    table, k0, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr
):
    """As `load_halves` where a row is too wide to be held: where it begins stands for the tile."""
    HALVES, BIAS, size, keep = table
    k = k0 + tl.arange(0, PROTOS)
    parts = (HALVES + tl.cast(k0, tl.int64) * STRIDE, tl.cast(size, tl.int64) * STRIDE)
    return 2 * (k0 // PROTOS), parts, keep, tl.load(BIAS + k)


@triton.jit
def reach_of(SIDE, count, PROTOS: tl.constexpr):
    """Largest norm of the memories of one problem (`am/memories.py`)."""
    top = tl.zeros((1,), tl.float32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        top = tl.maximum(top, tl.max(tl.load(SIDE + 3 * count + k, mask=k < count, other=0.0), 0))
    return tl.maximum(tl.sqrt_rn(top), TINY)


@triton.jit
def load_memory_halves(
    table, k0, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr
):
    """As `load_halves` with the biases of a table of memories."""
    HALVES, SIDE, size = table
    k = k0 + tl.arange(0, PROTOS)
    at = HALVES + k.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    parts = (tl.load(at), tl.load(at + tl.cast(size, tl.int64) * DIM))
    return k, parts, k, tl.load(SIDE + count + k, mask=k < count, other=float("-inf"))


@triton.jit
def held_halves(
    held, tile, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PREC: tl.constexpr
):
    """Products of rows held in halves with a tile; held = ((high, low), what undoes the scales)."""
    high, low = tile[1]
    s = tl.zeros((held[0][0].shape[0], high.shape[0]), tl.float32)
    return halved_onto(held[0], (tl.trans(high), tl.trans(low)), s, PREC)


@triton.jit
def given_halves(
    held, tile, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PREC: tl.constexpr
):
    """As `held_halves` for the caller's own rows, DIM features at a time; held =
    ((V, CENTRE, at, live, scale), ...).
    """
    V, CENTRE, at, live, scale = held[0]
    HIGH, skip = tile[1]
    k = tl.arange(0, tile[3].shape[0])
    s = tl.zeros((at.shape[0], tile[3].shape[0]), tl.float32)
    for d0 in range(0, D, DIM):
        x = halves(centred_rows(V, CENTRE, at, live, d0, D, DIM) * scale[:, None])
        where = HIGH + k.to(tl.int64)[:, None] * STRIDE + (d0 + tl.arange(0, DIM))[None, :]
        c = (tl.trans(tl.load(where)), tl.trans(tl.load(where + skip)))
        s = halved_onto(x, c, s, PREC)
    return s
