# SPDX-License-Identifier: Apache-2.0
"""Associative memory on a GPU: the launches of the recursion.

Equations: docs/ops/am.md. The kernels are in `recursion.py`, and for rows too wide for registers in
`recursion_wide.py`. `exact.py` computes rows in doubt again; `backward.py` computes the gradients,
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
from .call import Call, Views
from .doubt import PRODUCTS
from .memories import memory_halves
from .recursion import recursion_kernel
from .recursion_wide import recursion_wide_kernel


def run(
    call: Call, steps: int, step: float, out: Tensor, flag: Tensor, lse: Tensor | None = None
) -> None:
    """Launch the recursion over all rows, in cells of scratch where registers cannot contain a row.
    `flag` takes which rows are in doubt.
    """
    keep = 0 if lse is None else 1
    settings = call.recursion(keep)
    block, wide = settings["ROWS"], "DIM" in settings
    blocks = triton.cdiv(call.rows, block)
    out = out.view(call.outer, call.inner, call.rows, call.features)
    flags = flags_of(call, settings, keep)
    if not wide:
        launch_recursion(
            call, call.views, (call.outer * call.inner * blocks,), flags,
            OUT=out, FLAG=flag, TOP=lse, TOTAL=None, PATH=None, PULL=None,
            steps=steps, step=step, first=0, blocks=blocks, strip=None,
        )  # fmt: skip
        return
    limit = max(1, launch.SCRATCH // (2 * block * call.memories.stride))
    rows = min(limit, call.outer * call.inner * blocks) * block
    path = call.new(2, rows, call.memories.stride)
    for o, problems, first, count in call.cells(blocks, limit):
        cell, flag_cell = out[o, problems], flag.view(*out.shape[:3])[o, problems]
        lse_cell = None if lse is None else lse.view(*out.shape[:3])[o, problems]
        launch_recursion(
            call, call.at(o, problems), (len(cell) * count,), flags,
            OUT=cell, FLAG=flag_cell, TOP=lse_cell, TOTAL=None, PATH=path, PULL=None,
            steps=steps, step=step, first=first, blocks=count, strip=rows,
        )  # fmt: skip


def launch_recursion(
    call: Call, views: Views, grid: tuple[int], flags: dict[str, Any], **arguments: Any
) -> None:
    """One launch of the recursion over `views`; `arguments` are what differs between callers."""
    if "RESIDENT" in flags:
        split = flags["PREC"] == "f16x3" and not flags["RESIDENT"]
        halves = memory_halves(call.memories, call.features) if split else None
        arguments |= {"HALVES": halves, "size": None if halves is None else halves.shape[-2]}
        kernel = recursion_kernel
    else:
        kernel = recursion_wide_kernel
    launch.launch(
        kernel, grid, call.device,
        **views.rows(), **views.memories(), CENTRE=views.centre, **views.update_mask(),
        rows=call.rows, count=call.memories.size, inner=views.v.shape[1],
        unit=unit_of(call, flags) if call.memories.hard else None, **arguments, **flags,
    )  # fmt: skip


def unit_of(call: Call, flags: dict[str, Any]) -> float:
    """Bound on the error of a score, relative to the norms, as `nearest.slack` takes it."""
    return PRODUCTS[flags["PREC"]] + (MATRIX_STEPS * call.features + 6) * 2.0**-24


def flags_of(call: Call, settings: dict[str, Any], keep: int) -> dict[str, Any]:
    """Constants of a recursion kernel."""
    memories, wide = call.memories, "DIM" in settings
    flags = {"PER_MEMORY": memories.per_memory, "HARD": memories.hard, "KEEP": keep}
    if not wide:
        flags["RESIDENT"] = memories.size <= settings["PROTOS"]
    return {**call.tile(settings), **flags}


class Result(NamedTuple):
    """The outputs of `am_step_saved`."""

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
    if steps == 0 or step == 0:  # nothing moves, and no backward reads the lse
        return Result(out.copy_(v), call.new(*call.shape[:-1]).zero_() if saves else out)
    raw = out.float() if launch.INTERPRETED and v.dtype == torch.bfloat16 else out
    lse = call.new(*call.shape[:-1]) if saves else None
    flag = call.new(*call.shape[:-1], dtype=torch.uint8)
    run(call, steps, step, raw, flag, lse)
    exact.recursion(call.operands(), steps, step, flag, raw)
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
    """All steps: one launch for the memories, one for all rows, one for the rows in doubt."""
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
    """`am_step`, and the [..., N] log-sum-exp of its centred logits (without the term |x|^2 where
    one beta serves all memories).
    """
    return _recursion(v, rho, beta, 1, step, update_mask, log_weights, precision, saves=True)
