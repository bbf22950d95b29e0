# SPDX-License-Identifier: Apache-2.0
"""The energy of the associative memory on a GPU, and the nearest memory, by the kernels of k-means.

Equations: docs/ops/am.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.fold import lse_first_fold, lse_first_init
from ..common.score import (
    LOG2E,
    load_centred_rows,
    load_checked_rows,
    load_memories,
    load_sides,
    own_inner,
    raw_inner,
)
from ..common.sweep import UNSPECIALISED, rows_of, sweep
from ..kmeans import assign
from ..kmeans.nearest import squared_distances
from . import exact, exact_backward
from .backward import cells, fit, sweep_memories, whole
from .call import Call
from .doubt import NEAR_LIMIT_OF_ENERGY, final_flags, is_in_doubt, sharpest
from .memories import rows_and_memories_of


@triton.jit(do_not_specialize=UNSPECIALISED)
def energy_kernel(
    V, RHO, SIDE, CENTRE, RAW, OUT, FLAG,
    rows, count, inner, blocks, v_o, v_i, m_o, m_i,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PROTOS: tl.constexpr, PREC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Energy of ROWS rows: |x - rho_j|^2 - (lift_j + log2(total)) / (beta log2(e)), where j is the
    memory of the largest logit and total = sum_k 2^(s_k - s_j). The distance to j comes from a
    difference with RAW, the memories that are not centred. Only `total` comes from expanded
    distances, and FLAG takes the rows where it may be wrong. The table has scale = 2 beta log2(e).
    """
    problem, row = rows_of(tl.program_id(0), 0, blocks, ROWS)
    m, V, RHO, SIDE, CENTRE = rows_and_memories_of(
        V, RHO, SIDE, CENTRE, problem, inner, v_o, v_i, m_o, m_i, count, D, STRIDE
    )
    RAW += m * count * D
    valid, at = row < rows, row.to(tl.int64)
    norm, poison = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, D, DIM):
        _x, more, bad = load_checked_rows(V, CENTRE, at, valid, d0, D, DIM)
        norm += more
        poison += bad
    table = (RHO, SIDE)
    if WIDE:
        own = ((V, CENTRE, at, valid), norm)
        state = sweep(
            lse_first_init(ROWS), own, table, count, load_sides, raw_inner, lse_first_fold,
            D, STRIDE, DIM, PROTOS, PREC, False,
        )  # fmt: skip
    else:
        own = (load_centred_rows(V, CENTRE, at, valid, 0, D, DIM), norm)  # ([ROWS, DIM], [ROWS])
        state = sweep(
            lse_first_init(ROWS), own, table, count, load_memories, own_inner, lse_first_fold,
            D, STRIDE, DIM, PROTOS, PREC, False,
        )  # fmt: skip
    _, index, total = state
    first = tl.maximum(index, 0).to(tl.int64)
    far = squared_distances(
        V, RAW, at, first, valid & (index >= 0), D, DIM if DIM < 32 else 32, tl.float32
    )
    lift = tl.load(SIDE + 2 * count + first)
    energy = far - (lift + tl.log2(total)) / (0.5 * tl.load(SIDE))
    energy = tl.where(total == 0.0, float("inf"), energy) + poison

    sharp, ratio, _ = sharpest(SIDE, count, PROTOS, False)
    doubt = is_in_doubt(
        norm + tl.load(SIDE + 3 * count + first),
        far,
        total,
        sharp,
        ratio,
        0.0,
        NEAR_LIMIT_OF_ENERGY,
    )
    flag = final_flags(doubt.to(tl.int32), total, SIDE, count, PROTOS)
    p = problem.to(tl.int64) * rows + at
    tl.store(OUT + p, energy, mask=valid)
    tl.store(FLAG + p, tl.where(poison == 0.0, flag, 0).to(tl.uint8), mask=valid)


def am_energy(
    v: Tensor, rho: Tensor, beta: float | Tensor, log_weights: Tensor | None, precision: str
) -> Tensor:
    """Energy of every row: one launch for the memories, one for the rows, one for rows in doubt."""
    call = Call(v, rho, beta, None, log_weights, precision)
    out, flag = call.new(*call.shape[:-1]), call.new(*call.shape[:-1], dtype=torch.uint8)
    batch = call.memories.table.shape[:-2]
    raw = launch.rows(rho).expand(*batch, *rho.shape[-2:]).contiguous()
    settings = call.settings("am_energy")
    blocks = triton.cdiv(call.rows, settings["ROWS"])
    views = call.views
    launch.launch(
        energy_kernel, (call.outer * call.inner * blocks,), call.device,
        **views.rows(), **views.memories(), CENTRE=views.centre, RAW=raw, OUT=out, FLAG=flag,
        rows=call.rows, count=call.memories.size, inner=call.inner, blocks=blocks,
        **call.tile(settings), WIDE="DIM" in settings,
    )  # fmt: skip
    exact.energy(call.operands(), flag, out)
    return out


def am_energy_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    log_weights: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, log_weights)."""
    call = Call(v, rho, beta, None, log_weights, precision)
    totals, out = call.totals(), call.new(*call.shape)
    flag = call.new(*call.shape[:-1], dtype=torch.uint8)
    grad = whole(grad, call.shape[:-1]).float().view(call.outer, call.inner, call.rows)
    outs = out.view(call.outer, call.inner, call.rows, call.features)
    for cell in cells(call, 1, 1.0, flag, keep=3):
        rows = slice(cell.first * cell.block, (cell.first + cell.blocks) * cell.block)
        g = grad[cell.o, cell.problems, rows]
        n = g.shape[1]
        cell.delta.zero_().view(cell.size, cell.rows)[:, :n] = g
        x, xb = (t.view(cell.size, cell.rows, -1)[:, :n] for t in (cell.path, cell.pull))
        here = (2 * g[..., None] * (x - xb))[..., : call.features]
        outs[cell.o, cell.problems, rows] = here
        sweep_memories(call, cell, totals, 1, energy=True)
    exact_rho, exact_mass, exact_beta = exact_backward.energy_backward(
        call.operands(), grad, flag, out
    ).of_batch()
    acc, mass, beta_sum = totals.of_batch()
    sharp = beta.double() if isinstance(beta, Tensor) else beta
    pull = call.memories.table[..., : call.features].double() * mass[..., None]
    grad_rho = 2 * (pull - acc) + exact_rho
    grad_beta = beta_sum / LOG2E.value / sharp**2 + exact_beta / sharp
    grad_weights = -(mass + exact_mass) / sharp
    gradients, arguments = (out, grad_rho, grad_beta, grad_weights), (v, rho, beta, log_weights)
    return tuple(fit(x, a, n, v) for x, a, n in zip(gradients, arguments, needs, strict=True))


def am_assign(
    v: Tensor, rho: Tensor, log_weights: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """Nearest memory of every row and its squared distance, from `kmeans_assign`."""
    mask = None
    if log_weights is not None:
        mask = torch.atleast_1d(log_weights) == float("-inf")
        mask = mask.expand(*mask.shape[:-1], rho.shape[-2])
    return assign.kmeans_assign(v, rho, None, mask, True, precision, strict=True)
