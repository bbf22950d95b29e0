# SPDX-License-Identifier: Apache-2.0
"""Time the tiles of tools/tiles.py on this GPU and write the fastest into the table.

    tools/tune.py [--mode high] [--dim 16,64] [--kernel am_recursion] [--rows 262144] [--dry-run]
                  [--json FILE]

It times tiles without spills only, on random data, in rounds that alternate between them, and
replaces a row of the table if another tile is faster by more than 3 %. --json writes every time
with the error of its tile against float64. Without a GPU it prints one line and exits with code 3.
A dry run does the same on the CPU through Triton's interpreter, on few rows, and changes no table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clam_kernels  # noqa: E402
from bench import record  # noqa: E402
from clam_kernels.kernels.am import backward, energy, forward  # noqa: E402
from clam_kernels.kernels.common import launch  # noqa: E402
from clam_kernels.kernels.kmeans import assign  # noqa: E402

# tools/resources.py, which tiles imports, switches the interpreter off
tiles = importlib.import_module("tiles")
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
ROUNDS, GAIN = 15, 0.97
KERNELS = "am_recursion,am_fused_backward,am_rows_backward,am_memories_backward,kmeans_assign"
STEPS = 10
WHAT = f"one run of a launcher, the queue empty before and after, median of {ROUNDS}"


def operands(kernel: str, mode: str, d: int, rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Random rows and memories."""
    k = 256 if d > 16 or kernel in ("am_rows_backward", "am_memories_backward") else 64
    if kernel in tiles.WHOLE:
        where = torch.device(device, 0) if device == "cuda" else torch.device(device)
        k = launch.settings(kernel, where, mode, d).get("PROTOS", k)
    make = torch.Generator().manual_seed(0)
    v, rho = (torch.randn(n, d, generator=make).to(device) for n in (rows, k))
    return v, rho


def calls(kernel: str, mode: str, v: Tensor, rho: Tensor) -> Callable[[], Any]:
    """The call that is timed for the tile of a kernel."""
    d = v.shape[-1]
    if kernel == "am_energy":
        return partial(energy.am_energy, v, rho, 1.0 / d, None, mode)
    if kernel == "kmeans_assign":
        return partial(assign.kmeans_assign, v, rho, None, None, True, mode)
    if kernel == "am_recursion":
        return partial(forward.am_recursion, v, rho, 1.0 / d, STEPS, 1.0, None, None, mode)
    needs = [True, True, False, False, False]
    rest = (1.0 / d, STEPS, 1.0, None, None, needs, mode)
    return partial(backward.am_recursion_backward, v, v, rho, *rest)


def exact(kernel: str, v: Tensor, rho: Tensor) -> Any:
    """The result of the call by the reference in float64."""
    d = v.shape[-1]
    v, rho = (x.double() for x in (v, rho))
    with clam_kernels.backend("reference"):
        if kernel == "am_energy":
            return torch.ops.clam.am_energy(v, rho, 1.0 / d)
        if kernel == "am_assign":
            return torch.ops.clam.am_assign(v, rho)
        if kernel == "kmeans_assign":
            return torch.ops.clam.kmeans_assign(v, rho)
        if kernel == "am_recursion":
            return torch.ops.clam.am_recursion(v, rho, 1.0 / d, STEPS)
        leaves = v.clone().requires_grad_(), rho.clone().requires_grad_()
        return torch.autograd.grad(torch.ops.clam.am_recursion(*leaves, 1.0 / d, STEPS), leaves, v)


def errors(result: Any, truth: Any) -> dict[str, float]:
    """max |out - truth| / max |truth|, the largest over the results; the share of wrong labels."""
    is_single = isinstance(truth, Tensor)
    pairs = [(result, truth)] if is_single else list(zip(result, truth, strict=False))
    figures: dict[str, float] = {}
    for a, b in pairs:
        if b.is_floating_point():
            error = float((a.double() - b).abs().max() / b.abs().max())
            figures["err_vs_f64"] = max(error, figures.get("err_vs_f64", 0.0))
        else:
            figures["wrong_labels"] = float((a != b).double().mean())
    return figures


def seconds(call: Callable[[], object], device: str) -> float:
    """Seconds of one run, with an empty queue before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spills(kernel: str, tile: dict[str, Any], call: Callable[[], object], device: str) -> bool:
    """Whether a kernel that this call launches spills, from the driver; this also compiles it."""
    kernels: list[Any] = []
    real = launch.launch

    def note(one: Any, grid: Any, where: Any, **arguments: Any) -> None:
        if device == "cuda" and 0 not in grid:
            with torch.cuda.device(where):
                kernels.append(one[tuple(grid)](enable_fp_fusion=True, **arguments))
        else:
            real(one, grid, where, **arguments)

    launch.launch = note
    try:
        with_tile(kernel, tile, call)()
    finally:
        launch.launch = real
    return any(getattr(one, "n_spills", 0) for one in kernels)


def with_tile(kernel: str, tile: dict[str, Any], call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with a tile in place of the table's; RuntimeError if it does not launch the
    kernel.
    """

    def run() -> Any:
        real, launched = launch.settings, []

        def settings(name: str, *rest: Any) -> dict[str, Any]:
            if name != kernel:
                return real(name, *rest)
            launched.append(name)
            return dict(tile)

        launch.settings = settings  # type: ignore[assignment]
        try:
            result = call()
        finally:
            launch.settings = real
        if not launched:
            raise RuntimeError(f"this call does not launch {kernel}")
        return result

    return run


def race(kernel: str, mode: str, d: int, rows: int, device: str) -> Iterator[dict[str, Any]]:
    """Time and error of every tile without spills; the table's tile is first."""
    v, rho = operands(kernel, mode, d, rows, device)
    call = calls(kernel, mode, v, rho)
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    arch = int(launch.arch_of(where).removeprefix("sm_"))
    own = launch.settings(kernel, where, mode, d)
    others = tiles.candidates(kernel, mode, launch.dim(d), max(arch, 80), wide=False)
    if "DIM" in own or not own:
        return  # every register tile of this width spills: the wide kernel runs
    if kernel in tiles.WHOLE:  # all memories in one tile, or another kernel serves
        others = (t for t in others if t["PROTOS"] >= own["PROTOS"])
    rivals = [own, *(t for t in others if t != own)][: 3 if DRY else None]
    if DRY:
        whole = [t["PREC"] if t["PREC"].startswith("f16") else "ieee" for t in rivals]
        rivals = [{**t, "PREC": kind, "ROWS": 32} for t, kind in zip(rivals, whole, strict=True)]
    clean = [tile for tile in rivals if not spills(kernel, tile, call, device)]
    times: list[list[float]] = [[] for _ in clean]
    for _ in range(2 if DRY else ROUNDS):
        for tile, own_times in zip(clean, times, strict=True):
            own_times.append(seconds(with_tile(kernel, tile, call), device))
    truth = exact(kernel, v, rho)
    for tile, own_times in zip(clean, times, strict=True):
        yield {
            "kernel": kernel, "mode": mode, "n": rows, "d": d, "k": len(rho), "dtype": "float32",
            "steps": STEPS if "assign" not in kernel and kernel != "am_energy" else 0,
            "tile": tile, "ms_median": 1e3 * statistics.median(own_times),
            **errors(with_tile(kernel, tile, call)(), truth),
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", default="highest,high,medium")
    parser.add_argument("--dim", default="16,32,64,128")
    parser.add_argument("--kernel", default=KERNELS)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device: tiles are timed on a GPU (tools/tiles.py chooses by compiling)")
        return 3
    if not DRY and torch.cuda.get_device_capability()[0] not in (9, 10):
        print("rows of sm_80 serve GPUs of less shared memory too: they stay as compiled")
        return 3
    device, rows = ("cpu", 64) if DRY else ("cuda", arguments.rows)
    measured: list[dict[str, Any]] = []
    for kernel in arguments.kernel.split(","):
        for mode in arguments.mode.split(","):
            for d in map(int, arguments.dim.split(",")):
                if kernel in tiles.WHOLE and d > 16:
                    continue
                results = list(race(kernel, mode, d, rows, device))
                if not results:
                    print(f"{kernel} {mode} {d}: the wide kernel runs, nothing is timed")
                    continue
                measured += results
                own, best = results[0], min(results, key=lambda row: row["ms_median"])
                before, after = own["ms_median"], best["ms_median"]
                print(f"{kernel} {mode} {d}: {before:.3f} ms, best {after:.3f} ms {best['tile']}")
                if not DRY and best["tile"] != own["tile"] and after < GAIN * before:
                    arch = int(launch.arch_of(torch.device("cuda", 0)).removeprefix("sm_"))
                    tiles.write_row(kernel, arch, f"{mode}/{launch.dim(d)}", best["tile"])
    if arguments.json:
        report = {**record.facts(device), "what": WHAT, "dry_run": DRY, "rows": measured}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
