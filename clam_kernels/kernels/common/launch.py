# SPDX-License-Identifier: Apache-2.0
"""How a kernel is launched: its row of the table, the interpreter's needs, the device."""

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
# A kernel keeps rows of up to this many features in registers, and reads wider ones in pieces.
WIDEST = 128
# Rows of one problem are counted in 32 bits, blocks of them included.
MOST_ROWS = (1 << 31) - (1 << 20)
# Scratch of a backward, or of a wide forward, in float32 numbers (256 MB).
SCRATCH = 1 << 26
# Programs of a launch whose partial sums are added: enough for any GPU, and the same for each, so
# that sums have the same order on every GPU.
PROGRAMS = 512


def why_not(v: Tensor, *_: Any) -> str | None:
    """Why Triton cannot take these arguments, or None."""
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
    """`x` as the kernels read it: the last two dims dense, batch strides a multiple of D, the first
    entry on a boundary of 16 bytes. The order of a row's sums follows from the alignment of its
    loads. The interpreter has no bfloat16.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    n, d = x.shape[-2:]
    dense = (x.stride(-1) == 1 or d == 1) and (x.stride(-2) == d or n == 1)
    even = all(step % d == 0 for step in x.stride()[:-2]) if d else True
    return align(x) if dense and even else x.contiguous()


def align(x: Tensor) -> Tensor:
    """`x`, or a copy of it that begins on a boundary of 16 bytes."""
    return x.clone() if x.data_ptr() % 16 else x


def plain(x: Tensor) -> Tensor:
    """`x` with any strides; float32 in place of bfloat16 for the interpreter, which has none."""
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor for a kernel to write to: every output and all scratch comes from here."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """Table: kernel -> "arch/mode/DIM" -> options of the launch."""
    rows_of: dict[str, dict[str, dict[str, Any]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return rows_of


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

    They contain DIM where a kernel reads rows DIM features at a time: rows of more than `WIDEST`
    features, and widths for which no tile fits in registers. Empty where a kernel cannot.
    """
    prefix = f"{arch_of(device)}/{mode}"
    narrow = table()[kernel].get(f"{prefix}/{dim(d)}") if d <= WIDEST else None
    options = dict(narrow or table().get(f"{kernel}_wide", {}).get(f"{prefix}/{WIDEST}", {}))
    if INTERPRETED and options:  # the interpreter pays for each operation, not for each entry
        options["ROWS"] = 256
        if not options["PREC"].startswith("f16"):  # it has no bfloat16 and no split products
            options["PREC"] = "ieee"
    return options


def launch(kernel: Any, grid: Sequence[int], device: torch.device, **arguments: Any) -> None:
    """Launch once on the device's current stream, or not at all where the grid is empty.

    `arguments` are the kernel's own, each by its name, and triton's options. A kernel does not read
    an argument that is None: a constexpr (`HAS_...`) guards it, and triton removes it.
    """
    if 0 in grid:
        return
    if device.type != "cuda":
        kernel[tuple(grid)](enable_fp_fusion=True, **arguments)
        return
    with torch.cuda.device(device):
        kernel[tuple(grid)](enable_fp_fusion=True, **arguments)
