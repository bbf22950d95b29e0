# SPDX-License-Identifier: Apache-2.0
"""Choose the tile of every kernel, GPU, mode and width by compiling: the first of a list, best
first, that spills in no variant under any triton tried so far. Writes
clam_kernels/kernels/configs.json.

    tools/tiles.py --arch 90 [--kernel am_recursion] [--cache FILE]

Run it once for each triton (PYTHONPATH decides which); the runs share the cache of verdicts. Repeat
them until the table no longer changes. On a GPU `bench/gpu_check.py` measures the chosen tiles.
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
from clam_kernels.kernels.dec import scores as dec_scores

KERNELS = {
    "am_recursion": ("recursion_kernel", "recursion_wide_kernel"),
    "am_recursion_full": ("recursion_kernel", "recursion_wide_kernel"),
    "am_rows_backward": ("rows_backward_kernel", "rows_backward_wide_kernel"),
    "am_memories_backward": ("memories_backward_kernel", "memories_backward_kernel"),
    "am_fused_backward": ("fused_backward_kernel", "fused_backward_kernel"),
    "am_energy": ("energy_kernel", "energy_kernel"),
    "kmeans_assign": ("kmeans_assign_kernel", "kmeans_assign_kernel"),
    "kmeans_step": ("kmeans_step_kernel", "kmeans_step_kernel"),
    "dec_totals": ("dec_totals_kernel",),
    "dec_counts": ("dec_counts_kernel",),
    "dec_losses": ("dec_losses_kernel",),
    "dec_rows_backward": ("dec_rows_backward_kernel",),
    "dec_fused_backward": ("dec_fused_backward_kernel",),
    "dec_columns_backward": ("dec_columns_backward_kernel",),
    "sinkhorn": ("rows_kernel", "columns_kernel", "weigh_kernel"),
    "sinkhorn_slopes": ("slopes_kernel",),
}
# Bytes of shared memory for a block, without the driver's part.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Tiles (ROWS, PROTOS, num_warps), best first; SAFE for GPUs on which they were not timed.
TILES = [
    (128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 32, 4), (64, 32, 8),
    (32, 32, 4), (32, 32, 8), (32, 16, 4), (16, 16, 4),
]  # fmt: skip
SAFE = {80: [(64, 32, 4), *TILES[4:]], 100: [(128, 64, 8), *TILES[3:]]}
# Kernels that load all memories in one tile, for rows of few features.
WHOLE = {
    "am_fused_backward": [
        (64, 64, 8), (32, 64, 8), (32, 64, 4), (16, 64, 4),
        (64, 32, 8), (64, 32, 4), (32, 32, 8), (32, 32, 4), (32, 16, 4), (16, 16, 4),
    ],
}  # fmt: skip
# For deep embedded clustering (ROWS, PROTOS, num_warps): a pair takes many registers. Wider rows
# come DIM = 32 features at a time.
PAIRS = [(64, 32, 4), (32, 32, 4), (32, 16, 4), (16, 16, 4)]
PAIRS_OF = {
    "dec_fused_backward": [(32, 64, 8), (16, 64, 4), (16, 32, 4)],
    "dec_rows_backward": PAIRS[1:],
    "dec_columns_backward": PAIRS[1:],
}  # fmt: skip
# For k-means: few registers a row, so that four blocks share a multiprocessor, as timed on an H200
# (bench/NOTES.md). Other GPUs use the registers that ptxas chooses.
NEAREST = {"ROWS": 64, "PROTOS": 64, "num_warps": 4, "num_stages": 2}
CROWDED = [NEAREST | {"maxnreg": 128}]
STEP = [
    {"ROWS": rows, "PROTOS": 64, "num_warps": warps, "num_stages": 1}
    for rows, warps in ((64, 4), (128, 8))
]
# ptxas may spill a few registers for occupancy; an explicit limit on registers prevents that.
SMALL, MOST = 64, 255
# Largest number of float32 values in a thread: every tile with more has spilled.
LARGEST = {"bf16": 100}
LARGEST_SPLIT = 82


def sweep_values(kernel: str, rows: int, protos: int, width: int) -> int:
    """Number of values in the tiles that a sweep keeps in registers."""
    if kernel == "am_memories_backward":
        return rows * (2 * width + 2 * protos) + 2 * protos * width
    if kernel == "am_rows_backward":
        return rows * (3 * width + 2 * protos)
    return rows * (2 * width + protos) if kernel.startswith("am_recursion") else 0


# The logits and slopes of these kernels must agree bit for bit: their difference is 0 where one
# memory has all the weight, and 2 beta would multiply a rounding error.
ALIKE = ("am_recursion_full", "am_rows_backward", "am_memories_backward")


def precisions(kernel: str, mode: str, width: int, arch: int) -> list[str]:
    """Kinds of product that a mode may use, best first; one kind for kernels that must agree."""
    if kernel.startswith("kmeans"):  # labels are exact with each; cheaper ones decide fewer rows
        return ["f16" if mode == "medium" else "f16x3"]
    if mode == "medium":
        return ["bf16"]
    if kernel in ALIKE:
        lower = "bf16x3" if arch >= 90 else "tf32"
        return ["ieee" if mode == "highest" else lower]
    if mode == "high":  # halves lose digits of memories far below the largest: not for "highest"
        halves = ["f16x3"] if kernel == "am_recursion" and arch == 90 and width <= 64 else []
        return [*halves, "bf16x3", "tf32"]
    return ["ieee"] if width <= 16 or arch < 90 else ["bf16x6", "ieee"]


def candidates(
    kernel: str, mode: str, width: int, arch: int, wide: bool
) -> Iterator[dict[str, Any]]:
    """Launch options, best first."""
    if kernel.startswith("dec"):
        yield from of_dec(kernel, mode, width, arch, wide)
        return
    if kernel.startswith("kmeans"):
        (precision,) = precisions(kernel, mode, width, arch)
        yield from ({**tile, "PREC": precision} for tile in of_kmeans(kernel, width, arch, wide))
        return
    for precision in precisions(kernel, mode, width, arch):
        for rows, protos, warps in WHOLE.get(kernel) or SAFE.get(arch, TILES):
            if precision == "ieee" and rows * max(protos, min(width, 64)) > 4096 * 2:
                continue
            for piece in (64, 32) if wide else (0,):
                need = sweep_values(kernel, rows, protos, piece or width) / (32 * warps)
                if need > LARGEST.get(precision, LARGEST_SPLIT):
                    continue
                tile: dict[str, Any] = {"ROWS": rows, "PROTOS": protos, "PREC": precision}
                tile |= {"DIM": piece} if wide else {}
                tile |= {"num_warps": warps, "num_stages": 1}
                yield tile
                yield tile | {"maxnreg": MOST}


def of_dec(kernel: str, mode: str, width: int, arch: int, wide: bool) -> Iterator[dict[str, Any]]:
    """Launch options of a kernel of deep embedded clustering, best first. Narrow rows have no
    products of distances, and products in float32 for the gradients.
    """
    narrow = PAIRS_OF.get(kernel, PAIRS)
    for precision in precisions(kernel, mode, width, arch) if wide else ["ieee"]:
        for rows, protos, warps in PAIRS[2:] if wide else narrow:
            tile: dict[str, Any] = {"ROWS": rows, "PROTOS": protos, "PREC": precision}
            tile |= {"DIM": 32} if wide else {}
            tile |= {"num_warps": warps, "num_stages": 1}
            yield tile
            yield tile | {"maxnreg": MOST}


def of_kmeans(kernel: str, width: int, arch: int, wide: bool) -> list[dict[str, Any]]:
    """Tiles of a k-means kernel, best first."""
    if kernel == "kmeans_step":  # on other GPUs it spills, or the compiler crashes
        return STEP if arch == 90 else []
    small = NEAREST | {"PROTOS": 32, "num_warps": 8}
    if wide:
        return [one | {"DIM": dim, "num_stages": 1} for one, dim in ((NEAREST, 64), (small, 32))]
    return [*(CROWDED if arch == 90 else []), NEAREST, NEAREST | {"maxnreg": MOST}, small]


def launches(kernel: str, mode: str, d: int, arch: int, tile: dict[str, Any]) -> Iterator[Any]:
    """The variants of a kernel that need most, with a tile in place of the table's."""
    names, variants = KERNELS[kernel], {}
    real = launch.settings
    launch.settings = lambda name, device, wanted, width: (  # type: ignore[assignment]
        {**tile, "chosen": True} if name == kernel else real(name, device, wanted, width)
    )
    launch.settings.cache_clear = real.cache_clear  # type: ignore[attr-defined]
    try:
        for label, call in resources.calls(mode, d):
            for one in resources.record(resources.ARCHS[arch], call):
                if one.name in names and "chosen" in one.options:
                    variants[repr((resources.signature(one), one.options))] = (label, one)
    finally:
        launch.settings = real
    yield from (one for label, one in variants.values() if "full" in label or label == "energy")
    yield from (
        one for label, one in variants.values() if "full" not in label and label != "energy"
    )


def verdict(kernel: str, mode: str, d: int, arch: int, tile: dict[str, Any]) -> str:
    """ "" if every variant fits, else the reason why one does not."""
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
                    if kernel.startswith("dec") and not serves_dec(kernel, mode, d):
                        continue
                    choose(kernel, mode, d, arch, version, arguments.cache)


def serves_dec(kernel: str, mode: str, d: int) -> bool:
    """Whether the kernels of deep embedded clustering have a row for this mode and width."""
    if d > dec_scores.NARROW:
        return d > launch.WIDEST and kernel != "dec_fused_backward"
    return mode == resources.MODES[0]


def choose(kernel: str, mode: str, d: int, arch: int, version: str, cache: Path) -> None:
    """Choose one row of the table and write it."""
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
        verdicts = known.setdefault(key, {})
        last = next((reason for reason in verdicts.values() if reason), "")
        if last:
            continue
        if version not in verdicts:
            verdicts[version] = verdict(kernel, mode, d, arch, tile)
            cache.parent.mkdir(parents=True, exist_ok=True)
            fresh = json.loads(cache.read_text()) if cache.exists() else {}
            fresh.setdefault(key, {})[version] = verdicts[version]
            cache.write_text(json.dumps(fresh, indent=0))
            outcome = verdicts[version] or "chosen"
            print(f"sm_{arch} {name} {mode} {width} {tile}: {outcome}", flush=True)
        last = verdicts[version]
        if not last:
            write_row(name, arch, f"{mode}/{width}", tile)
            return
    write_row(name, arch, f"{mode}/{width}", None)
    print(f"sm_{arch} {name} {mode} {width}: none, the wide form serves", flush=True)


def write_row(name: str, arch: int, row: str, tile: dict[str, Any] | None) -> None:
    """Set or remove a row; a compilation for sm_80 serves both GPUs of capability 8."""
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
