# SPDX-License-Identifier: Apache-2.0
"""Tiles of logits, loaded or computed from features, and vectors of potentials.

Tiles x [OWN, SWEPT] are logits, the scores times the scale of their problem: a program owns some
rows and sweeps the columns, or owns columns and sweeps the rows. A vector of potentials is
[2, size] float32, two parts of each number: large potentials cancel large logits, and the rounding
error of one would be a common factor of a whole row or column. A row or column whose potential is
-inf is masked, and its logits may be NaN.

FORM: "scores" [N, K] in memory, rows `step` UNITs apart; "narrow" features, which fit in registers;
"wide" features, read DIM at a time. Columns and the strides of scores are counted in UNITs, so that
the compiler can derive the alignment of addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.score import dot, dot_onto, load_rows
from ..common.sweep import offset


@triton.jit
def parts_of(P, at, size, exists):
    """Both parts of the potentials `at`; -inf past the end."""
    low = tl.load(P + size + at, mask=exists, other=0.0)
    return tl.load(P + at, mask=exists, other=float("-inf")), low


@triton.jit
def store_parts(P, at, size, exists, value):
    """Store float64 values as potentials in two parts."""
    high = value.to(tl.float32)
    whole = high.to(tl.float64)
    low = tl.where(whole * 0.0 == 0.0, value - whole, 0.0).to(tl.float32)
    tl.store(P + at, high, mask=exists)
    tl.store(P + size + at, low, mask=exists)


@triton.jit
def whole_of(P, at, size, exists):
    """The potentials `at` in float64."""
    high, low = parts_of(P, at, size, exists)
    return high.to(tl.float64) + low.to(tl.float64)


@triton.jit
def side_of(MINE, at, exists, D: tl.constexpr, DIM: tl.constexpr, FORM: tl.constexpr):
    """The features [OWN, DIM] of a program's own rows or columns if "narrow", else `at`."""
    return load_rows(MINE, at, exists, 0, D, D, DIM) if FORM == "narrow" else at


@triton.jit
def tile_of(
    MINE, OTHER, mine, scale, step, at, exists, w, valid,
    BY_ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr,
    FORM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Logits [OWN, SWEPT], the scores times the scale, of the program's own side (`at`, rows if
    BY_ROWS) and the swept side (`w`).
    """
    if FORM == "scores":
        far = tl.cast(step, tl.int64) * UNIT
        # [OWN, SWEPT]
        where = at[:, None] * far + w[None, :] if BY_ROWS else at[:, None] + w[None, :] * far
        # [OWN, SWEPT]
        x = tl.load(MINE + where, mask=exists[:, None] & valid[None, :], other=0.0).to(tl.float32)
    elif FORM == "narrow":
        x = dot(mine, tl.trans(load_rows(OTHER, w, valid, 0, D, D, DIM)), PREC)  # [OWN, SWEPT]
    else:
        x = tl.zeros((at.shape[0], w.shape[0]), tl.float32)  # [OWN, SWEPT]
        for d0 in range(0, D, DIM):
            one = load_rows(MINE, at, exists, d0, D, D, DIM)  # [OWN, DIM]
            # [OWN, SWEPT]
            x = dot_onto(one, tl.trans(load_rows(OTHER, w, valid, d0, D, D, DIM)), x, PREC)
    return x * scale


@triton.jit
def scale_of(SCALE, problem, HAS_SCALE: tl.constexpr):
    """The factor of the scores of a problem, 1 without SCALE."""
    return tl.load(SCALE + problem) if HAS_SCALE else tl.full((), 1.0, tl.float32)


@triton.jit
def begin_of(
    X, C, problem, inner, x_o, x_i, c_o, c_i,
    BY_ROWS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """(pointer to the own side, pointer to the swept side) of a problem."""
    if FORM == "scores":
        X += offset(problem, inner, x_o, x_i) * UNIT
        mine, other = X, X
    else:
        X += offset(problem, inner, x_o, x_i) * D
        C += offset(problem, inner, c_o, c_i) * D
        if BY_ROWS:
            mine, other = X, C
        else:
            mine, other = C, X
    return mine, other
