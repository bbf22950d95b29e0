# SPDX-License-Identifier: Apache-2.0
"""Associative memory on a GPU: the launches of the recursion.

Equations: docs/ops/am.md. The kernels are in `recursion.py`, and for rows too wide for registers in
`recursion_wide.py`. `exact.py` computes rows in doubt again; `backward.py` has the gradients,
`energy.py` the energy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common import launch
from ..kmeans.nearest import MATRIX_STEPS
from . import exact
from .call import Call
from .doubt import PRODUCTS
from .memories import memory_halves
from .recursion import recursion_kernel
from .recursion_wide import recursion_wide_kernel


def run(
    call: Call, steps: int, step: float, out: Tensor, flag: Tensor, lse: Tensor | None = None
) -> None:
    """Launch the recursion over all rows; those too wide for registers in cells of scratch. `flag`
    takes which rows are in doubt.
    """
    keep = 0 if lse is None else 1
    chosen = call.recursion(keep)
    block, wide = chosen["ROWS"], "DIM" in chosen
    blocks = triton.cdiv(call.rows, block)
    out = out.view(call.outer, call.inner, call.rows, call.features)
    flags = flags_of(call, chosen, keep)
    if not wide:
        operands, strides, u = call.at()
        grid, parts = (call.outer * call.inner * blocks,), out
        if flags["PREC"] == "f16x3" and not flags["RESIDENT"]:
            parts = memory_halves(call.memories, call.features)
        launch.launch(
            recursion_kernel, grid, call.device, *operands, out, flag,
            out if lse is None else lse, out, out, out, parts,
            call.rows, call.memories.size, call.inner, steps, step, 0, blocks, 0,
            parts.shape[-2], unit_of(call, flags), *strides, *u, **flags,
        )  # fmt: skip
        return
    limit = max(1, launch.SCRATCH // (2 * block * call.memories.stride))
    rows = min(limit, call.outer * call.inner * blocks) * block
    path = call.new(2, rows, call.memories.stride)
    for o, problems, first, count in call.cells(blocks, limit):
        operands, strides, u = call.at(o, problems)
        cell, flag_cell = out[o, problems], flag.view(*out.shape[:3])[o, problems]
        lse_cell = cell if lse is None else lse.view(*out.shape[:3])[o, problems]
        launch.launch(
            recursion_wide_kernel, (len(cell) * count,), call.device, *operands, cell, flag_cell,
            lse_cell, path, path, path, path,
            call.rows, call.memories.size, len(cell), steps, step, first, count, rows, 0,
            unit_of(call, flags), *strides, *u, **flags,
        )  # fmt: skip


def unit_of(call: Call, flags: dict[str, Any]) -> float:
    """Bound on the error of a score, relative to the norms, as `nearest.slack` takes it."""
    return PRODUCTS[flags["PREC"]] + (MATRIX_STEPS * call.features + 6) * 2.0**-24


def flags_of(call: Call, chosen: dict[str, Any], keep: int) -> dict[str, Any]:
    """Constants of a recursion kernel."""
    memories = call.memories
    return {
        **call.tile(chosen),
        "PER_MEMORY": memories.per_memory,
        "HARD": memories.hard,
        "RESIDENT": memories.size <= chosen["PROTOS"] and "DIM" not in chosen,
        "MASK": call.masked,
        "KEEP": keep,
    }


class Result(NamedTuple):
    """What the saving forward returns."""

    out: Tensor
    lse: Tensor


def _recursion(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
    saves: bool = False,
) -> Result:
    call = Call(v, rho, beta, update_mask, log_weights, precision)
    out = launch.empty(call.shape, v.dtype, v.device)
    if steps == 0 or step == 0:  # no lse is read where nothing moves
        return Result(out.copy_(v), call.new(*call.shape[:-1]).zero_() if saves else out)
    raw = out.float() if launch.INTERPRETED and v.dtype == torch.bfloat16 else out
    lse = call.new(*call.shape[:-1]) if saves else None
    flag = call.new(*call.shape[:-1], dtype=torch.uint8)
    run(call, steps, step, raw, flag, lse)
    exact.recursion(call.given(), steps, step, flag, raw)
    return Result(out.copy_(raw) if raw is not out else out, out if lse is None else lse)


def am_recursion(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> Tensor:
    """All steps in one launch, after one for the memories and before one for rows in doubt."""
    return _recursion(v, rho, beta, steps, step, update_mask, log_weights, precision).out


def am_step(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> Tensor:
    """`am_recursion` with one step."""
    return _recursion(v, rho, beta, 1, step, update_mask, log_weights, precision).out


def am_step_saved(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> Result:
    """`am_step`, and the [..., N] logsumexp of its centred logits (less |x|^2 where beta is
    shared).
    """
    return _recursion(v, rho, beta, 1, step, update_mask, log_weights, precision, saves=True)
