# SPDX-License-Identifier: Apache-2.0
"""How a kernel is launched: its row of the table, what the interpreter needs, the device."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TABLE = Path(__file__).parents[1] / "configs.json"
# Rows up to this many features are held in registers; wider ones are read in pieces.
WIDEST = 128
# Rows of one problem are counted in 32 bits, blocks of them included.
MOST_ROWS = (1 << 31) - (1 << 20)
# What a backward, or a wide forward, may keep of the rows under way, in float32 numbers (256 MB).
SCRATCH = 1 << 26


def why_not(v: Tensor, *_: Any) -> str | None:
    """Why these arguments are not for Triton, or None."""
    if v.dtype == torch.float64:
        return "float64 is computed by the reference"
    if v.ndim > 1 and v.shape[-2] > MOST_ROWS:
        return f"N = {v.shape[-2]} > {MOST_ROWS}"
    if v.is_cuda and torch.cuda.get_device_capability(v.device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or more"
    return None


def dim(d: int) -> int:
    """Features of a tile: the next power of two that tl.dot takes."""
    return max(16, triton.next_power_of_2(d))


def rows(x: Tensor) -> Tensor:
    """The last two dims dense, batches whole rows apart and the first on a boundary of 16 bytes, as
    the kernels read them: the order of a row's sums follows from how its loads are aligned. The
    interpreter has no bfloat16.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    n, d = x.shape[-2:]
    dense = (x.stride(-1) == 1 or d == 1) and (x.stride(-2) == d or n == 1)
    even = all(step % d == 0 for step in x.stride()[:-2]) if d else True
    return aligned(x) if dense and even else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """Itself, or a copy that begins on a boundary of 16 bytes."""
    return x.clone() if x.data_ptr() % 16 else x


def plain(x: Tensor) -> Tensor:
    """Any strides, but no bfloat16 under the interpreter."""
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a kernel writes to: every output and all scratch comes from here."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """Table: kernel -> "arch/mode/DIM" -> options of the launch."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


@functools.cache
def arch_of(device: torch.device) -> str:
    """The row of the table that serves a device: the H200's own, or a safe one."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")


@functools.cache
def settings(kernel: str, device: torch.device, mode: str, d: int) -> dict[str, Any]:
    """Constants and options of a launch over rows of `d` features.

    With DIM where rows are too wide for registers and are read DIM features at a time: beyond
    `WIDEST`, or where no tile of that width fits. Empty where a kernel has no such form.
    """
    here = f"{arch_of(device)}/{mode}"
    narrow = table()[kernel].get(f"{here}/{dim(d)}") if d <= WIDEST else None
    found = dict(narrow or table().get(f"{kernel}_wide", {}).get(f"{here}/{WIDEST}", {}))
    if INTERPRETED and found:  # its cost is by the operation, not by the entry
        found["ROWS"] = 256
        if not found["PREC"].startswith("f16"):  # it has no bfloat16, nor any but whole products
            found["PREC"] = "ieee"
    return found


def launch(
    kernel: Any, grid: Sequence[int], device: torch.device, *args: Any, **options: Any
) -> None:
    """One launch on the device's current stream; an empty grid is none."""
    if 0 in grid:
        return
    if device.type != "cuda":
        kernel[tuple(grid)](*args, enable_fp_fusion=True, **options)
        return
    with torch.cuda.device(device):
        kernel[tuple(grid)](*args, enable_fp_fusion=True, **options)
