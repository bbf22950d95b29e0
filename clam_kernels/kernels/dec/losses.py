# SPDX-License-Identifier: Apache-2.0
"""Losses KL(p || q) of rows on a GPU; equations (4) to (6) of docs/ops/dec.md."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.score import LN2
from ..common.sweep import offset, rows_of
from .call import DecCall, alpha_of, kind_of, merge
from .scores import UNSPECIALISED, is_regular
from .stats import count_parts, row_totals
from .target import (
    largest_log,
    norm_of,
    numbers_fold,
    numbers_init,
    numbers_of,
    pair_tile,
    surprise,
    targets,
)


@triton.jit
def sources_of(
    problem, inner, COUNTS, P, Z0, MU0, LOG_NORM,
    c_o, c_i, p_o, p_i, v_o, v_i, rho_o, rho_i, l_o, l_i,
    D: tl.constexpr, SOURCE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Where the operands of the target of a problem begin; 0, which no kernel reads, for others."""
    COUNTS = COUNTS + offset(problem, inner, c_o, c_i) if SOURCE != "dense" else 0
    P = P + offset(problem, inner, p_o, p_i) if SOURCE == "dense" else 0
    Z0 = Z0 + offset(problem, inner, v_o, v_i) * D if SOURCE == "frozen" else 0
    MU0 = MU0 + offset(problem, inner, rho_o, rho_i) * D if SOURCE == "frozen" else 0
    LOG_NORM = LOG_NORM + offset(problem, inner, l_o, l_i) if NORM else 0
    return COUNTS, P, Z0, MU0, LOG_NORM


@triton.jit
def peak_of(COUNTS, c_k, count, PROTOS: tl.constexpr, SOURCE: tl.constexpr):
    """The largest log count of a problem [1]; 0 for a dense target."""
    if SOURCE == "dense":
        peak = tl.zeros((1,), tl.float64)
    else:
        peak = largest_log(COUNTS, c_k, count, PROTOS)
    return peak


@triton.jit
def regular_rows(X, Z0, at, valid, D: tl.constexpr, DIM: tl.constexpr, SOURCE: tl.constexpr):
    """(which rows z are finite, which rows of the target are: of a dense target all)."""
    now = is_regular(X, at, valid, D, DIM)
    if SOURCE == "frozen":
        then = is_regular(Z0, at, valid, D, DIM)
    else:
        then = valid if SOURCE == "dense" else now
    return now, then


@triton.jit
def unit_norm(LOG_NORM, at, inside, l_n, source, KIND0: tl.constexpr, SOURCE: tl.constexpr,
              NORM: tl.constexpr):  # fmt: skip
    """The numbers (a, b) of rows whose normaliser is known, else ones."""
    if NORM:
        a, b = norm_of(LOG_NORM, at, inside, l_n, source, KIND0, SOURCE)
    else:
        a = tl.full((at.shape[0],), 1.0, tl.float32)
        b = a
    return a, b


@triton.jit
def loss_fold(loss, tile, numbers, KIND: tl.constexpr, KIND0: tl.constexpr, SOURCE: tl.constexpr):
    """The loss of a row: loss' = loss + sum_j p_j (log2 p_j - log2 q_j)."""
    far, e, u = tile
    top, total, a, b, _mass, _regular = numbers
    p = targets(u, a, b, KIND0, SOURCE)  # [ROWS, PROTOS]
    gap = surprise(p, far, e, top, total, u, a, b, KIND, KIND0, SOURCE)  # [ROWS, PROTOS]
    return loss + tl.sum(p * gap, 1)


@triton.jit(do_not_specialize=UNSPECIALISED)
def dec_losses_kernel(
    X, MU, ALPHA, COUNTS, Z0, MU0, LOG_NORM, P, OUT,
    rows, count, inner, blocks, unit, alpha, alpha0,
    x_o, x_i, m_o, m_i, a_o, a_i, c_o, c_i, c_k, v_o, v_i, rho_o, rho_i, l_o, l_i, l_n,
    p_o, p_i, p_n, p_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    PREC: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, KIND0: tl.constexpr,
    SOURCE: tl.constexpr, NORM: tl.constexpr, HAS_ALPHA: tl.constexpr,
):  # fmt: skip
    """l_i = sum_j p_ij (log p_ij - log q_ij) of ROWS rows: one sweep for the numbers of the rows,
    one for the sum. Unless WIDE the first tile stays in registers for the second sweep.
    """
    problem, row = rows_of(tl.program_id(0), 0, blocks, ROWS)
    X += offset(problem, inner, x_o, x_i) * D
    MU += offset(problem, inner, m_o, m_i) * D
    COUNTS, P, Z0, MU0, LOG_NORM = sources_of(
        problem, inner, COUNTS, P, Z0, MU0, LOG_NORM,
        c_o, c_i, p_o, p_i, v_o, v_i, rho_o, rho_i, l_o, l_i, D, SOURCE, NORM,
    )  # fmt: skip
    freedom = alpha_of(ALPHA, problem, inner, a_o, a_i, alpha, HAS_ALPHA)
    at, valid = row.to(tl.int64), row < rows
    now, then = regular_rows(X, Z0, at, valid, D, DIM, SOURCE)
    own, old = (X, MU, at, now, freedom), (Z0, MU0, at, then, alpha0)
    source = (COUNTS, c_k, peak_of(COUNTS, c_k, count, PROTOS, SOURCE), P, p_n, p_k)
    norm = unit_norm(LOG_NORM, at, then, l_n, source, KIND0, SOURCE, NORM)
    state = numbers_init(ROWS, KIND, KIND0)
    BEGIN: tl.constexpr = 0 if WIDE else PROTOS
    if not WIDE:
        first = pair_tile(
            own, old, source, 0, count, unit, D, DIM, PROTOS, WIDE, KIND, KIND0, SOURCE, PREC
        )
        state = numbers_fold(state, first, norm, KIND, KIND0, SOURCE, NORM)
    for k0 in range(BEGIN, count, PROTOS):
        tile = pair_tile(
            own, old, source, k0, count, unit, D, DIM, PROTOS, WIDE, KIND, KIND0, SOURCE, PREC
        )
        state = numbers_fold(state, tile, norm, KIND, KIND0, SOURCE, NORM)
    numbers = numbers_of(state, norm, now & then, KIND0, SOURCE, NORM)
    loss = tl.zeros((ROWS,), tl.float32)
    if not WIDE:
        loss = loss_fold(loss, first, numbers, KIND, KIND0, SOURCE)
    for k0 in range(BEGIN, count, PROTOS):
        tile = pair_tile(
            own, old, source, k0, count, unit, D, DIM, PROTOS, WIDE, KIND, KIND0, SOURCE, PREC
        )
        loss = loss_fold(loss, tile, numbers, KIND, KIND0, SOURCE)
    _top, _total, _a, _b, _mass, regular = numbers
    loss = loss * tl.where(count > 1, LN2, 0.0)  # one centroid: exactly 0, and NaN stays
    p = problem.to(tl.int64) * rows + at
    tl.store(OUT + p, tl.where(regular, loss, float("nan")), mask=valid)


class DecLossCall(DecCall):
    """The operands of a call of `dec_losses`, with the source of its target."""

    def __init__(
        self,
        z: Tensor,
        mu: Tensor,
        alpha: float | Tensor,
        weight: Tensor | None,
        log_counts: Tensor | None,
        z0: Tensor | None,
        mu0: Tensor | None,
        alpha0: float,
        log_norm: Tensor | None,
        p: Tensor | None,
        precision: str,
    ) -> None:
        self.source = "dense" if p is not None else "own" if z0 is None else "frozen"
        self.has_norm = log_norm is not None and self.source != "own"
        options = {
            "WEIGHT": (weight, 1), "COUNTS": (log_counts, 1), "Z0": (z0, 2), "MU0": (mu0, 2),
            "LOG_NORM": (log_norm, 1), "P": (p, 2),
        }  # fmt: skip
        super().__init__(z, mu, alpha, precision, options)
        if self.source == "dense":  # these have a part in the batch only
            for name in ("COUNTS", "Z0", "MU0"):
                self.views.pop(name, None)
        self.alpha0 = alpha0
        self.kind0 = {"own": self.kind, "dense": "one"}.get(self.source) or kind_of(alpha0)
        if self.source == "own" and log_counts is None:
            self._count_rows()

    def _count_rows(self) -> None:
        """Compute the log counts of these rows. Three launches."""
        numbers, _, _ = row_totals(self)
        logs = merge(self, count_parts(self, numbers), self.count, "logs")
        self.views["COUNTS"] = logs.view(*self.views["X"].shape[:2], self.count)

    def target(self) -> dict[str, Any]:
        """The arguments of a kernel that say where p comes from."""
        return {
            **self.strides("COUNTS", ("c_o", "c_i", "c_k")),
            **self.strides("Z0", ("v_o", "v_i"), rows=True),
            **self.strides("MU0", ("rho_o", "rho_i"), rows=True),
            **self.strides("LOG_NORM", ("l_o", "l_i", "l_n")),
            **self.strides("P", ("p_o", "p_i", "p_n", "p_k")),
            "alpha0": float(self.alpha0) if self.kind0 == "any" else 1.0,
            "KIND0": self.kind0,
            "SOURCE": self.source,
            "NORM": self.has_norm,
        }


def dec_losses(
    z: Tensor,
    mu: Tensor,
    alpha: float | Tensor,
    weight: Tensor | None,
    log_counts: Tensor | None,
    z0: Tensor | None,
    mu0: Tensor | None,
    alpha0: float,
    log_norm: Tensor | None,
    p: Tensor | None,
    precision: str,
) -> Tensor:
    """The loss of each row: one launch, after three for soft counts of these rows."""
    call = DecLossCall(z, mu, alpha, weight, log_counts, z0, mu0, alpha0, log_norm, p, precision)
    out = call.new(*call.batch, call.rows)
    tile = call.tile("dec_losses")
    blocks = triton.cdiv(call.rows, tile["ROWS"])
    launch.launch(
        dec_losses_kernel, (call.problems * blocks,), call.device,
        **call.operands(), **call.target(), OUT=out, blocks=blocks, **tile,
    )  # fmt: skip
    return out
