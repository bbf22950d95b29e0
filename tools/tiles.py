# SPDX-License-Identifier: Apache-2.0
"""Chooses the tile of every kernel, GPU, mode and width by compiling: the first of a list, best
first, that needs no spill in any variant under every triton asked so far. Writes
clam_kernels/kernels/configs.json.

    tools/tiles.py --arch 90 [--kernel am_recursion] [--cache FILE]

Each triton is a run of its own (PYTHONPATH decides which); runs share the cache of verdicts and are
repeated until the table no longer changes. On a GPU `bench/gpu_check.py` measures what was chosen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resources
import triton

from clam_kernels.kernels.common import launch

KERNELS = {
    "am_recursion": ("recursion_kernel", "recursion_wide_kernel"),
    "am_recursion_full": ("recursion_kernel", "recursion_wide_kernel"),
    "am_rows_backward": ("rows_backward_kernel", "rows_backward_wide_kernel"),
    "am_memories_backward": ("memories_backward_kernel", "memories_backward_kernel"),
    "am_fused_backward": ("fused_backward_kernel", "fused_backward_kernel"),
    "am_energy": ("energy_kernel", "energy_kernel"),
    "kmeans_assign": ("kmeans_assign_kernel", "kmeans_assign_kernel"),
    "kmeans_step": ("kmeans_step_kernel", "kmeans_step_kernel"),
    "sinkhorn": ("rows_kernel", "columns_kernel", "weigh_kernel"),
    "sinkhorn_slopes": ("slopes_kernel",),
}
# What a block may have of shared memory, less what a driver keeps.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Tiles (ROWS, PROTOS, num_warps), best first: where timings count, and elsewhere.
TILES = [
    (128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 32, 4), (64, 32, 8),
    (32, 32, 4), (32, 32, 8), (32, 16, 4), (16, 16, 4),
]  # fmt: skip
SAFE = {80: [(64, 32, 4), *TILES[4:]], 100: [(128, 64, 8), *TILES[3:]]}
# A kernel that holds all memories in one tile, for rows of few features.
WHOLE = {
    "am_fused_backward": [
        (64, 64, 8), (32, 64, 8), (32, 64, 4), (16, 64, 4),
        (64, 32, 8), (64, 32, 4), (32, 32, 8), (32, 32, 4), (32, 16, 4), (16, 16, 4),
    ],
}  # fmt: skip
# Of k-means: rows of few registers, so that four blocks share a multiprocessor, as timed
# on an H200 (bench/NOTES.md). Elsewhere what ptxas makes of them.
NEAREST = {"ROWS": 64, "PROTOS": 64, "num_warps": 4, "num_stages": 2}
CROWDED = [NEAREST | {"maxnreg": 128}]
STEP = [
    {"ROWS": rows, "PROTOS": 64, "num_warps": warps, "num_stages": 1}
    for rows, warps in ((64, 4), (128, 8))
]
# A spill of a few registers may be ptxas's wish for occupancy, which a limit of its own overrules.
SMALL, MOST = 64, 255
# Float32 values a thread would hold at least; beyond these no tile tried was without spills.
HELD = {"bf16": 100}
HELD_SPLIT = 82


def held(kernel: str, rows: int, protos: int, width: int) -> int:
    """Values of the tiles that live through a sweep."""
    if kernel == "am_memories_backward":
        return rows * (2 * width + 2 * protos) + 2 * protos * width
    if kernel == "am_rows_backward":
        return rows * (3 * width + 2 * protos)
    return rows * (2 * width + protos) if kernel.startswith("am_recursion") else 0


# Kernels whose logits and slopes must agree bit for bit: a difference of two of them is 0 where one
# memory has all the weight, and 2 beta multiplies whatever rounding is left of it.
ALIKE = ("am_recursion_full", "am_rows_backward", "am_memories_backward")


def precisions(kernel: str, mode: str, width: int, arch: int) -> list[str]:
    """Kinds of product that a mode may use, best first; one alone for kernels that must agree."""
    if kernel.startswith("kmeans"):  # labels are exact in all: what is cheap decides fewer rows
        return ["f16" if mode == "medium" else "f16x3"]
    if mode == "medium":
        return ["bf16"]
    if kernel in ALIKE:
        lower = "bf16x3" if arch >= 90 else "tf32"
        return ["ieee" if mode == "highest" else lower]
    if mode == "high":  # halves keep less of memories far below the largest: not for "highest"
        halves = ["f16x3"] if kernel == "am_recursion" and arch == 90 and width <= 64 else []
        return [*halves, "bf16x3", "tf32"]
    return ["ieee"] if width <= 16 or arch < 90 else ["bf16x6", "ieee"]


def candidates(
    kernel: str, mode: str, width: int, arch: int, wide: bool
) -> Iterator[dict[str, Any]]:
    """Launch options, best first."""
    if kernel.startswith("kmeans"):
        (precision,) = precisions(kernel, mode, width, arch)
        yield from ({**tile, "PREC": precision} for tile in of_kmeans(kernel, width, arch, wide))
        return
    for precision in precisions(kernel, mode, width, arch):
        for rows, protos, warps in WHOLE.get(kernel) or SAFE.get(arch, TILES):
            if precision == "ieee" and rows * max(protos, min(width, 64)) > 4096 * 2:
                continue
            for piece in (64, 32) if wide else (0,):
                need = held(kernel, rows, protos, piece or width) / (32 * warps)
                if need > HELD.get(precision, HELD_SPLIT):
                    continue
                tile: dict[str, Any] = {"ROWS": rows, "PROTOS": protos, "PREC": precision}
                tile |= {"DIM": piece} if wide else {}
                tile |= {"num_warps": warps, "num_stages": 1}
                yield tile
                yield tile | {"maxnreg": MOST}


def of_kmeans(kernel: str, width: int, arch: int, wide: bool) -> list[dict[str, Any]]:
    """Tiles of a kernel that assigns, best first."""
    if kernel == "kmeans_step":  # elsewhere it spills, or the compiler dies of it
        return STEP if arch == 90 else []
    small = NEAREST | {"PROTOS": 32, "num_warps": 8}
    if wide:
        return [one | {"DIM": dim, "num_stages": 1} for one, dim in ((NEAREST, 64), (small, 32))]
    return [*(CROWDED if arch == 90 else []), NEAREST, NEAREST | {"maxnreg": MOST}, small]


def launches(kernel: str, mode: str, d: int, arch: int, tile: dict[str, Any]) -> Iterator[Any]:
    """The variants of a kernel that need most, with a tile in place of the table's."""
    names, found = KERNELS[kernel], {}
    real = launch.settings
    launch.settings = lambda name, device, wanted, width: (  # type: ignore[assignment]
        {**tile, "chosen": True} if name == kernel else real(name, device, wanted, width)
    )
    launch.settings.cache_clear = real.cache_clear  # type: ignore[attr-defined]
    try:
        for label, call in resources.calls(mode, d):
            for one in resources.record(resources.ARCHS[arch], call):
                if one.name in names and "chosen" in one.options:
                    found[repr((resources.signature(one), one.options))] = (label, one)
    finally:
        launch.settings = real
    yield from (one for label, one in found.values() if "full" in label or label == "energy")
    yield from (one for label, one in found.values() if "full" not in label and label != "energy")


def verdict(kernel: str, mode: str, d: int, arch: int, tile: dict[str, Any]) -> str:
    """ "" if every variant fits, else what does not."""
    for one in launches(kernel, mode, d, arch, tile):
        try:
            usage = resources.resources(resources.compiled(one, arch))
        except Exception as error:
            return f"{type(error).__name__}"
        if usage["spills"] or usage["atomics"]:
            return f"{usage['spills']} bytes of spill"
        if usage["shared"] > SHARED[arch]:
            return f"{usage['shared']} bytes of shared memory"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="80,90,100")
    parser.add_argument("--mode", default=",".join(resources.MODES))
    parser.add_argument("--kernel", default=",".join(KERNELS))
    parser.add_argument("--dim", default=",".join(map(str, resources.DIMS)))
    parser.add_argument("--cache", type=Path, default=Path("build/tiles.json"))
    arguments = parser.parse_args()
    version = triton.__version__
    for arch in map(int, arguments.arch.split(",")):
        for mode in arguments.mode.split(","):
            for kernel in arguments.kernel.split(","):
                for d in map(int, arguments.dim.split(",")):
                    if (kernel in WHOLE and d > 16) or (kernel == "kmeans_step" and d > 32):
                        continue
                    choose(kernel, mode, d, arch, version, arguments.cache)


def choose(kernel: str, mode: str, d: int, arch: int, version: str, cache: Path) -> None:
    """Find one row and write it down."""
    wide = d > launch.WIDEST
    name = f"{kernel}_wide" if wide else kernel
    width = launch.WIDEST if wide else launch.dim(d)
    known: dict[str, dict[str, str]] = json.loads(cache.read_text()) if cache.exists() else {}
    last = ""
    for tile in candidates(kernel, mode, width, arch, wide):
        if "maxnreg" in tile and not last.endswith("spill"):
            continue
        if "maxnreg" in tile and int(last.split()[0]) > SMALL:
            continue
        key = f"{kernel}/{arch}/{mode}/{d}/{json.dumps(tile)}"
        seen = known.setdefault(key, {})
        last = next((found for found in seen.values() if found), "")
        if last:
            continue
        if version not in seen:
            seen[version] = verdict(kernel, mode, d, arch, tile)
            cache.parent.mkdir(parents=True, exist_ok=True)
            fresh = json.loads(cache.read_text()) if cache.exists() else {}
            fresh.setdefault(key, {})[version] = seen[version]
            cache.write_text(json.dumps(fresh, indent=0))
            told = seen[version] or "chosen"
            print(f"sm_{arch} {name} {mode} {width} {tile}: {told}", flush=True)
        last = seen[version]
        if not last:
            put(name, arch, f"{mode}/{width}", tile)
            return
    put(name, arch, f"{mode}/{width}", None)
    print(f"sm_{arch} {name} {mode} {width}: none, the wide form serves", flush=True)


def put(name: str, arch: int, row: str, tile: dict[str, Any] | None) -> None:
    """Set or remove a row; one compile stands for both GPUs of capability 8."""
    table = json.loads(launch.TABLE.read_text(encoding="utf-8"))
    for gpu in ["sm_80", "sm_86"] if arch == 80 else [resources.ARCHS[arch]]:
        table.setdefault(name, {}).pop(f"{gpu}/{row}", None)
        if tile is not None:
            table[name][f"{gpu}/{row}"] = tile
    draft = launch.TABLE.with_suffix(".draft")
    draft.write_text(resources.spelled(table), encoding="utf-8")
    draft.replace(launch.TABLE)


if __name__ == "__main__":
    main()
