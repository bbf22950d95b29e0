# SPDX-License-Identifier: Apache-2.0
"""Tiles of memories, and the inner products of rows with them, in one numeric recipe.

One-letter tiles: x [ROWS, DIM] centred states, s [ROWS, PROTOS] base-2 logits, k [PROTOS] and d
[DIM] the indices of memories and features. A table of memories (`am/memories.py`) is the tuple
(RHO, SIDE) of pointers to one problem: centred rows of STRIDE floats, and SIDE [4, K] = scale,
bias, lift, norm. A tile of memories is the tuple (k, rho, scale, bias) = ([PROTOS], [PROTOS, DIM],
[PROTOS], [PROTOS]). The rows of a program are the tuple `own` = (the rows, half): the second [ROWS]
is |x|^2 / 2, or the factor of each row in `logits`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, PREC: tl.constexpr):
    """Product a @ b, summed in float32; "bf16" rounds the factors, the other modes are triton's."""
    return dot_onto(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32), PREC)


@triton.jit
def dot_onto(a, b, c, PREC: tl.constexpr):
    """The sum c + a @ b: with "ieee" a product in pieces has the bits of the whole product."""
    if PREC == "bf16":
        c = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), c)
    else:
        c = tl.dot(a, b, c, input_precision=PREC)
    return c


@triton.jit
def load_rows(X, at, valid, d0, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of rows `at` (int64) as float32; 0 beyond the edges."""
    d = d0 + tl.arange(0, DIM)
    where = X + at[:, None] * STRIDE + d[None, :]  # [rows, DIM]
    # [rows, DIM]
    return tl.load(where, mask=valid[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_memories(
    table, k0, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr
):
    """One tile of a table: (k, rho, scale, bias); memories past `count` have a bias of -inf."""
    RHO, SIDE = table
    k = k0 + tl.arange(0, PROTOS)
    rho = load_rows(RHO, k.to(tl.int64), k < count, 0, D, STRIDE, DIM)  # [PROTOS, DIM]
    scale = tl.load(SIDE + k, mask=k < count, other=0.0)
    bias = tl.load(SIDE + count + k, mask=k < count, other=float("-inf"))
    return k, rho, scale, bias


@triton.jit
def load_sides(
    table, k0, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr
):
    """As `load_memories` for rows too wide for registers: the pointer RHO replaces rho."""
    RHO, SIDE = table
    k = k0 + tl.arange(0, PROTOS)
    scale = tl.load(SIDE + k, mask=k < count, other=0.0)
    bias = tl.load(SIDE + count + k, mask=k < count, other=float("-inf"))
    return k, RHO, scale, bias


@triton.jit
def own_inner(
    own, tile, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PREC: tl.constexpr
):
    """Products x @ rho^T [ROWS, PROTOS] of rows in registers; own = (x, |x|^2 / 2)."""
    x, _half = own
    _k, rho, _scale, _bias = tile
    return dot(x, tl.trans(rho), PREC)


@triton.jit
def wide_inner(
    own, tile, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PREC: tl.constexpr
):
    """Products x @ rho^T [ROWS, PROTOS] of centred rows in memory, DIM features at a time; own =
    ((X, at, valid), |x|^2 / 2).
    """
    rows, _half = own
    X, at, valid = rows
    k, RHO, _scale, _bias = tile
    s = tl.zeros((at.shape[0], k.shape[0]), tl.float32)  # [ROWS, PROTOS]
    for d0 in range(0, D, DIM):
        x = load_rows(X, at, valid, d0, D, STRIDE, DIM)  # [ROWS, DIM]
        rho = load_rows(RHO, k.to(tl.int64), k < count, d0, D, STRIDE, DIM)  # [PROTOS, DIM]
        s = dot_onto(x, tl.trans(rho), s, PREC)
    return s


@triton.jit
def raw_inner(
    own, tile, count, D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PREC: tl.constexpr
):
    """As `wide_inner`, but centres the caller's rows; own = ((V, CENTRE, at, valid), ...)."""
    rows, _half = own
    V, CENTRE, at, valid = rows
    k, RHO, _scale, _bias = tile
    s = tl.zeros((at.shape[0], k.shape[0]), tl.float32)  # [ROWS, PROTOS]
    for d0 in range(0, D, DIM):
        x = load_centred_rows(V, CENTRE, at, valid, d0, D, DIM)  # [ROWS, DIM]
        rho = load_rows(RHO, k.to(tl.int64), k < count, d0, D, STRIDE, DIM)  # [PROTOS, DIM]
        s = dot_onto(x, tl.trans(rho), s, PREC)
    return s


@triton.jit
def load_centred_rows(V, CENTRE, at, valid, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of the caller's rows minus the centre; 0 beyond the edges."""
    return subtract_centre(load_rows(V, at, valid, d0, D, D, DIM), CENTRE, valid, d0, D, DIM)


@triton.jit
def load_checked_rows(V, CENTRE, at, valid, d0, D: tl.constexpr, DIM: tl.constexpr):
    """(x, norm, poison): x as `load_centred_rows`, norm [ROWS] = |x|^2, and poison [ROWS], NaN for
    rows with a feature that is not finite, and for all rows where the centre has one, else 0.
    """
    d = d0 + tl.arange(0, DIM)
    raw = load_rows(V, at, valid, d0, D, D, DIM)  # [ROWS, DIM]
    x = subtract_centre(raw, CENTRE, valid, d0, D, DIM)  # [ROWS, DIM]
    norm = tl.sum(x * x, 1)
    c = tl.load(CENTRE + d, mask=d < D, other=0.0)
    return x, norm, tl.sum(raw * 0.0, 1) + tl.sum(c * 0.0, 0)


@triton.jit
def subtract_centre(raw, CENTRE, valid, d0, D: tl.constexpr, DIM: tl.constexpr):
    """A tile [ROWS, DIM] of rows minus the centre; 0 beyond the edges."""
    d = d0 + tl.arange(0, DIM)
    c = tl.load(CENTRE + d, mask=d < D, other=0.0)
    return tl.where(valid[:, None], raw - c[None, :], 0.0)


@triton.jit
def logits(inner, half, scale, bias, PER_MEMORY: tl.constexpr):
    """Base-2 logits s = scale * inner + bias; with a beta per memory scale * (inner - |x|^2 / 2) +
    bias. One beta multiplies |x|^2 alike for all memories, and the softmax does not depend on it.
    "rows": s = half * inner + bias, where `half` is a factor of each row.
    """
    if PER_MEMORY == "rows":
        s = inner * half[:, None] + bias[None, :]  # [ROWS, PROTOS]
    else:
        if PER_MEMORY:
            inner = inner - half[:, None]  # [ROWS, PROTOS]
        s = inner * scale[None, :] + bias[None, :]  # [ROWS, PROTOS]
    return s
