# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels ahead of time for other GPUs, and reads the resources that they need.

    tools/resources.py [--arch 80,90] [--mode highest] [--dim 64] [--kernel recursion]
                       [--base] [--amd] [--out FILE] [--table FILE]

It records the calls of the launchers, with arguments and options and with the table's row for each
GPU, and compiles these. Nothing runs, and no driver is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clam_kernels.kernels.am import backward as am_backward
from clam_kernels.kernels.am import energy as am_energy
from clam_kernels.kernels.am import forward
from clam_kernels.kernels.common import launch
from clam_kernels.kernels.dec import backward as dec_backward
from clam_kernels.kernels.dec import losses as dec_losses
from clam_kernels.kernels.dec import scores as dec_scores
from clam_kernels.kernels.dec import stats as dec_stats
from clam_kernels.kernels.kmeans import assign, step
from clam_kernels.kernels.sinkhorn import backward as sinkhorn_backward
from clam_kernels.kernels.sinkhorn import solver

# Compute capability to compile for -> row of the table that serves it; sm_86's rows are sm_80's.
ARCHS = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
MODES = ("highest", "high", "medium")
DIMS = (16, 32, 64, 128, 200)
OPTIONS = ("num_warps", "num_stages", "maxnreg")
POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
# Kernels without a matrix product are the same in all modes.
PLAIN = (
    "memories_kernel", "memory_halves_kernel", "exact_recursion_kernel", "exact_energy_kernel",
    "exact_backward_kernel", "exact_energy_backward_kernel", "exact_sums_kernel",
    "origin_kernel", "norms_kernel", "halves_kernel",
    "settle_kernel", "pieces_kernel", "sums_kernel", "pass_kernel", "merge_kernel", "rescue_kernel",
    "finish_kernel", "dec_merge_kernel",
)  # fmt: skip
# Variants of a kernel within one call: constant, its value, the word in the name.
WORDS = {
    "KEEP": (2, "saved"), "STARTED": (True, "started"), "BY_ROWS": (True, "rows"),
    "USED": (True, "used"), "FUSED": (True, "fused"), "COVERED": (False, "pass"),
}  # fmt: skip
# Launches of one kernel and label differ in these constants: where one is True, its word follows
# the label.
VARIANTS = {"PER_MEMORY": "betas", "HAS_BETA": "betas", "STRICT": "strict"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    name: str
    kernel: Any
    args: dict[str, Any]  # runtime arguments by name; None where the kernel reads none
    options: dict[str, Any]  # constants of the kernel, and triton's options


def record(arch: str, call: Callable[[], object]) -> list[Launch]:
    """The launches of a call, as a GPU of `arch` would get them."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: Any, device: Any, **arguments: Any) -> None:
        runtime = {p.name for p in kernel.params if not p.is_constexpr}
        args = {n: value for n, value in arguments.items() if n in runtime}
        options = {n: value for n, value in arguments.items() if n not in runtime}
        missing = runtime - args.keys()
        assert not missing, f"{kernel.fn.__name__} is launched without {sorted(missing)}"
        launches.append(Launch(kernel.fn.__name__, kernel, args, options))

    before = launch.launch, launch.arch_of
    launch.launch, launch.arch_of = note, lambda device: arch  # type: ignore[assignment]
    launch.settings.cache_clear()
    try:
        call()
    finally:
        launch.launch, launch.arch_of = before
        launch.settings.cache_clear()
    return launches


def calls(mode: str, d: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What ships for a mode and a width: plain and with every option, K in one tile and in many."""
    yield from of_recursion("resident", 16, mode, d)
    if d <= 16:  # what one program may hold of the memories differs by mode
        yield from of_recursion("resident32", 32, mode, d)
        yield from of_recursion("resident64", 64, mode, d)
    yield from of_recursion("streamed", 1000, mode, d)
    v, rho = torch.zeros(4096, d), torch.zeros(1000, d)
    energy = (v[:, 0], v, rho, 1.0, None, [True] * 4, mode)
    yield "streamed", partial(am_energy.am_energy, v, rho, 1.0, None, mode)
    yield "streamed", partial(am_energy.am_assign, v, rho, None, mode)
    yield "energy", partial(am_energy.am_energy_backward, *energy)
    yield "hard", partial(forward.am_recursion, v, rho, math.inf, 10, 1.0, None, None, mode)
    yield from of_kmeans(mode, v, rho)
    yield from of_features(mode, v, rho)
    if d > launch.WIDEST or (mode == MODES[0] and d in (DIMS[0], dec_scores.NARROW)):
        yield from of_dec(mode, v, rho)
    if mode == MODES[0] and d == DIMS[0]:  # scores have neither a mode nor a width
        yield from of_scores()


def of_kmeans(
    mode: str, x: torch.Tensor, centroids: torch.Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    labels, weight, half = torch.zeros(len(x), dtype=torch.int64), x[:, 0].double(), x.bfloat16()
    mask, shift = torch.zeros(len(centroids), dtype=torch.bool), x[0]
    yield "streamed", partial(assign.kmeans_assign, x, centroids, None, None, True, mode)
    yield "streamed-full", partial(assign.kmeans_assign, half, centroids, None, mask, True, mode)
    if x.shape[1] <= step.FEATURES:
        few = centroids[: step.MOST]
        yield "few", partial(step.kmeans_step, x, few, None, None, None, mode)
        yield (
            "few-full",
            partial(step.kmeans_step, half, few[:10], None, shift, mask[:10], mode),
        )
    yield "segments", partial(assign.kmeans_update, x, labels, 1000, None, None)
    yield "segments-full", partial(assign.kmeans_update, half, labels, 1000, weight, shift)


def of_dec(
    mode: str, z: torch.Tensor, mu: torch.Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """alpha = 1 with a dense target; and any alpha with a frozen target, its log-normaliser, and
    weights; K in one tile and in many. Narrow rows are the same in all modes, and all wide rows
    have one tile: the narrowest, the widest narrow, and the widest rows stand for all.
    """
    p, needs, alpha = torch.zeros(1, len(mu)), [True] * 9, torch.ones(())
    weight, counts = z[:, 0].double(), mu[:, 0].double()
    nearest = torch.zeros(len(z), dtype=torch.int64)
    plain = (z, mu, 1.0, None, None, None, None, 1.0, None, p)
    frozen = (z, mu, alpha, None, counts, z, mu, 2.0, z[:, 0], None)
    few = (z, mu[:10], 1.0, None, None, None, None, 1.0, None, p[:, :10])
    some = (z, mu[:64], alpha, None, counts[:64], z, mu[:64], 2.0, z[:, 0], None)
    if z.shape[1] <= dec_scores.NARROW:
        yield "dec", partial(dec_stats.soft_assignment, z, mu, 1.0, None, nearest, mode)
        yield "dec", partial(dec_losses.dec_losses, *plain, mode)
        yield "dec", partial(dec_backward.dec_losses_backward, z[:, 0], *few, needs, mode)
        yield "dec-full", partial(dec_backward.dec_losses_backward, z[:, 0], *some, needs, mode)
    yield "dec-full", partial(dec_stats.soft_assignment, z, mu, alpha, weight, nearest, mode)
    yield "dec-full", partial(dec_losses.dec_losses, *frozen, mode)
    yield "dec-full", partial(dec_backward.dec_losses_backward, z[:, 0], *frozen, needs, mode)


def of_features(
    mode: str, z: torch.Tensor, c: torch.Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    none, g, needs = (None, None, None, None), c[:, 0], [True] * 7
    scale = torch.ones(())
    half, full = (z.bfloat16(), c.bfloat16()), (g, z[:, 0], g, g)
    few = torch.zeros(64, z.shape[1])  # so that no product of torch is worth mentioning
    backward = partial(
        sinkhorn_backward.sinkhorn_potentials_features_backward, few[:, 0], g, few, c
    )
    yield "features", partial(solver.sinkhorn_potentials_features, z, c, 1, *none, True, None, mode)
    yield (
        "features-full",
        partial(solver.sinkhorn_potentials_features, *half, 2, *full, False, scale, mode),
    )
    yield "features-backward", partial(backward, 1, *none, True, scale, needs, mode)


def of_scores() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every width of a row that registers hold, and beyond; how K divides decides the loads."""
    plain, needs, scale = (None, None, None, True, None), [True] * 6, torch.ones(())
    for label, k in (("", 3000), *((f"-{k}", k) for k in (16, 32, 64, 128, 256, 512, 1000, 2048))):
        yield (
            f"scores{label}",
            partial(solver.sinkhorn_potentials, torch.zeros(4096, k), 2, *plain, None, "high"),
        )
    yield (
        "scores-5000",
        partial(solver.sinkhorn_potentials, torch.zeros(64, 5000), 2, *plain, None, "high"),
    )
    x, odd = torch.zeros(256, 3000), torch.zeros(256, 3001).half()
    row, column = odd[:, 0], odd[0]
    backward = partial(sinkhorn_backward.sinkhorn_potentials_backward, x[:, 0], x[0])
    full = (row, column, column, False, column, scale)
    yield "scores-full", partial(solver.sinkhorn_potentials, odd, 2, *full, "high")
    yield "scores-full", partial(solver.sinkhorn_pass, odd, column, row, column, scale, "high")
    yield "scores-backward", partial(backward, x, 1, *plain, scale, needs, "high")


def of_recursion(
    label: str, k: int, mode: str, d: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    v, rho, needs = torch.zeros(4096, d), torch.zeros(k, d), [True] * 5
    plain = (1.0, 10, 1.0, None, None)
    full = (torch.ones(k), 10, 0.5, torch.ones(4096, d), torch.zeros(k))
    backward = am_backward.am_recursion_backward
    yield label, partial(forward.am_recursion, v, rho, *plain, mode)
    yield label, partial(backward, v, v, rho, *plain, [True, True, False, False, False], mode)
    yield f"{label}-full", partial(forward.am_step_saved, v, rho, full[0], *full[2:], mode)
    yield f"{label}-full", partial(backward, v, v, rho, *full, needs, mode)
    if label.startswith("resident"):
        needs = [True, True, True, False, True]
        yield f"{label}-full", partial(backward, v, v, rho, 1.0, *full[1:], needs, mode)


def signature(one: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """(types, constants, attributes) of a launch as triton's own launcher would specialise it."""
    names = one.kernel.arg_names
    free = {names[i] if isinstance(i, int) else i for i in one.kernel.do_not_specialize or ()}
    types = dict.fromkeys(names, "constexpr")
    constants = {(names.index(n),): v for n, v in one.options.items() if n in names}
    attributes = {}
    for i, name in enumerate(names):
        if name not in one.args:
            continue
        value = one.args[name]
        if value is None:
            constants[(i,)] = None
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1 and name not in free:
            constants[(i,)] = 1
        else:
            types[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and name not in free:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compiled(one: Launch, arch: int) -> Any:
    types, constants, attributes = signature(one)
    source = ASTSource(fn=one.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {n: one.options[n] for n in OPTIONS if n in one.options} | {"enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def on_amd(one: Launch) -> dict[str, Any]:
    """What a launch needs on gfx942, with the tile of the GPU it was recorded for."""
    types, constants, attributes = signature(one)
    source = ASTSource(fn=one.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {n: one.options[n] for n in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    built: Any = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
    text = built.asm["amdgcn"]

    def count(word: str) -> int:
        return max(map(int, re.findall(rf"\.{word}:\s*(\d+)", text)))

    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count"),
        "shared": built.metadata.shared,
        "product": "mfma" if "v_mfma" in text else "fma",
        "atomics": len(re.findall(r"\b(?:global|flat|ds)_(?:atomic_)?add_\w*f(?:16|32|64)", text)),
    }


def resources(built: Any) -> dict[str, Any]:
    """Registers, spills, shared memory, matrix instruction, and what must not be there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(TOOLS / "cuobjdump"), flag, file.name],
                capture_output=True, text=True, check=True,
            ).stdout
            for flag in ("-res-usage", "-sass")
        )  # fmt: skip
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    registers, stack, local = map(int, numbers.groups())
    ptx = built.asm["ptx"]
    return {
        "registers": registers,
        "spills": max(stack, local, len(re.findall(r"\b(?:LDL|STL)\b", sass))),
        "shared": built.metadata.shared,
        "product": next((m for m in ("tcgen05", "wgmma", "mma.sync") if m in ptx), "fma"),
        "atomics": len(re.findall(r"\b(?:ATOMG?|RED)\.", sass)),
    }


def cases(
    archs: list[int], modes: list[str], dims: list[int], kernel: str = "", full: bool = True
) -> Iterator[tuple[str, int, Launch]]:
    """(name, arch, launch), each different one once; no two have the same name."""
    names: set[str] = set()
    for arch in archs:
        seen: set[str] = set()
        for mode in modes:
            for d in dims:
                launches = []
                for label, call in calls(mode, d):
                    for one in record(ARCHS[arch], call):
                        key = repr((one.name, signature(one), one.options))
                        if key in seen or kernel not in one.name or not (full or "-" not in label):
                            continue
                        seen.add(key)
                        launches.append((name_of(one, arch, mode, d, label), one))
                for name, one in distinct(launches):
                    # the tile of a mode may decide a constant of a kernel without a mode
                    own = f"{name}-{mode}" if name in names else name
                    if own in names:
                        raise ValueError(f"two launches have the name {own}: add to VARIANTS")
                    names.add(own)
                    yield own, arch, one


def name_of(one: Launch, arch: int, mode: str, d: int, label: str) -> str:
    """The name of a launch; several variants may have the same."""
    kernel = one.name.removesuffix("_kernel")
    kernel += "".join(f"-{w}" for n, (v, w) in WORDS.items() if one.options.get(n) == v)
    return "/".join([f"sm_{arch}", kernel, "any" if one.name in PLAIN else mode, str(d), label])


def distinct(launches: list[tuple[str, Launch]]) -> Iterator[tuple[str, Launch]]:
    """The launches with the words of VARIANTS after each name that several launches have."""
    counts = Counter(name for name, _ in launches)
    for name, one in launches:
        words = (word for constant, word in VARIANTS.items() if one.options.get(constant) is True)
        yield "-".join([name, *(words if counts[name] > 1 else ())]), one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="80,90,100")
    parser.add_argument("--mode", default=",".join(MODES))
    parser.add_argument("--dim", default=",".join(map(str, DIMS)))
    parser.add_argument("--kernel", default="")
    parser.add_argument("--base", action="store_true", help="without the variants of all options")
    parser.add_argument("--amd", action="store_true", help="compile for gfx942, as information")
    parser.add_argument("--out", type=Path, help="write the resources to this file")
    parser.add_argument("--table", type=Path, help="put all of it under this triton's version here")
    arguments = parser.parse_args()
    numbers = [[int(x) for x in text.split(",")] for text in (arguments.arch, arguments.dim)]
    table: dict[str, Any] = {}
    for name, arch, one in cases(
        numbers[0], arguments.mode.split(","), numbers[1], arguments.kernel, not arguments.base
    ):
        start = time.monotonic()
        try:
            table[name] = on_amd(one) if arguments.amd else resources(compiled(one, arch))
        except Exception as error:
            table[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[-1][:200]}"}
        tile = {n: one.options[n] for n in ("ROWS", "PROTOS", "PREC", *OPTIONS) if n in one.options}
        print(f"{name:60s} {table[name]} {tile} {time.monotonic() - start:.1f}s", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if arguments.table:
        whole = json.loads(arguments.table.read_text("utf-8")) if arguments.table.exists() else {}
        heading = f"{triton.__version__} gfx942" if arguments.amd else triton.__version__
        whole[heading] = dict(sorted(table.items()))
        arguments.table.write_text(spelled(whole), encoding="utf-8")


def spelled(table: dict[str, dict[str, Any]]) -> str:
    """A table of tables as JSON, one line a row."""
    blocks = []
    for name in sorted(table):
        rows = (
            f"  {json.dumps(row)}: {json.dumps(table[name][row])}" for row in sorted(table[name])
        )
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    main()
