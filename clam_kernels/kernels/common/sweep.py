# SPDX-License-Identifier: Apache-2.0
"""The sweep: a program folds every tile of memories or centroids into its rows in registers, in
order; and where the problems of a batch begin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .score import logits

# Scalars of a kernel on which triton does not specialise, where it may specialise on the batch
# strides of the memories.
SIZES = ["rows", "count", "inner", "blocks", "first", "steps", "step", "strip", "share"]
# Runtime scalars on which triton does not specialise: no value of them compiles a kernel anew.
# Batch strides are among them, so that the same code computes a row in every batch.
UNSPECIALISED = [
    *SIZES, "splits", "size", "problems", "first_problem", "f_count", "g_count", "keep", "unit",
    "grain", "k", "pieces", "every", "beta", "beta_bits", "step_bits",
    "v_o", "v_i", "m_o", "m_i", "x_o", "x_i", "c_o", "c_i", "l_o", "l_i", "rho_o", "rho_i",
]  # fmt: skip


@triton.jit
def sweep(
    state,
    own,
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
    """Fold rows over `count` memories: state <- FOLD(state, logits of a tile, tile), tile by tile.
    LOAD makes the tile (k, rho, scale, bias); INNER its products with the rows.
    """
    _, half = own
    for k0 in range(0, count, PROTOS):
        tile = LOAD(table, k0, count, D, STRIDE, DIM, PROTOS)
        _k, _rho, scale, bias = tile  # [PROTOS], [PROTOS, DIM], [PROTOS], [PROTOS]
        inner = INNER(own, tile, count, D, STRIDE, DIM, PREC)  # [ROWS, PROTOS]
        state = FOLD(state, logits(inner, half, scale, bias, PER_MEMORY), tile, PREC)
    return state


@triton.jit
def rows_of(pid, first, blocks, ROWS: tl.constexpr):
    """(problem, its rows [ROWS]) of a program; `blocks` programs serve a problem, the first of them
    from block `first` on.
    """
    return pid // blocks, (first + pid % blocks) * ROWS + tl.arange(0, ROWS)


@triton.jit
def offset(problem, inner, outer_stride, inner_stride):
    """Where a problem (o, i) of [O, inner] begins, int64: o * outer_stride + i * inner_stride."""
    o, i = problem // inner, problem % inner
    return o.to(tl.int64) * outer_stride + i.to(tl.int64) * inner_stride


@triton.jit
def of_problem(X, problem, inner, outer_stride, inner_stride, HAS: tl.constexpr):
    """Where an optional operand of a problem begins; 0, which no kernel reads, without one."""
    return X + offset(problem, inner, outer_stride, inner_stride) if HAS else 0
