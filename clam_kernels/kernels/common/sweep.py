# SPDX-License-Identifier: Apache-2.0
"""The sweep: what is held meets every tile of the other side once, in order."""

from __future__ import annotations

import triton
import triton.language as tl

from .score import logits

# Numbers that no kernel is compiled anew for. Batch strides are among them so that a row is
# computed by the same code in every batch.
NUMBERS = [
    "rows", "count", "inner", "blocks", "first", "steps", "step", "strip", "splits", "share",
    "size", "keep", "unit", "grain", "k", "pieces", "every", "beta", "beta_bits", "step_bits",
    "v_o", "v_i", "m_o", "m_i", "x_o", "x_i", "c_o", "c_i", "l_o", "l_i", "rho_o", "rho_i",
]  # fmt: skip


@triton.jit
def sweep(
    state,
    held,
    table,
    count,
    LOAD: tl.constexpr,
    INNER: tl.constexpr,
    FOLD: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    PROTOS: tl.constexpr,
    PREC: tl.constexpr,
    PER_MEMORY: tl.constexpr,
):
    """Fold rows over `count` memories: load a tile, score it, take it in."""
    for k0 in range(0, count, PROTOS):
        tile = LOAD(table, k0, count, D, STRIDE, DIM, PROTOS)
        inner = INNER(held, tile, count, D, STRIDE, DIM, PREC)
        state = FOLD(state, logits(inner, held[1], tile[2], tile[3], PER_MEMORY), tile, PREC)
    return state


@triton.jit
def rows_of(pid, first, blocks, ROWS: tl.constexpr):
    """(problem, rows) of a program: `blocks` programs a problem, the first at block `first`."""
    return pid // blocks, (first + pid % blocks) * ROWS + tl.arange(0, ROWS)


@triton.jit
def offset(problem, inner, outer_stride, inner_stride):
    """Where a problem of the batch [O, inner] begins in an operand of two batch strides, int64."""
    o, i = problem // inner, problem % inner
    return o.to(tl.int64) * outer_stride + i.to(tl.int64) * inner_stride
