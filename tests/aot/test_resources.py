# SPDX-License-Identifier: Apache-2.0
"""Every kernel as it ships, compiled for GPUs that are not here: no spills, no atomics, the
expected matrix instruction, and the registers and shared memory of the committed table.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("resources.json")
AMD = Path(__file__).with_name("gfx942.json")
# Shared memory of a block in bytes. Consumer Ampere and Ada use the rows of sm_80 too.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}
CONFIGS = ROOT / "clam_kernels/kernels/configs.json"
SECOND = ROOT / ".venv/triton36"
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing"),
]


def compiles(tmp_path: Path, *arguments: str, path: Path | None = None) -> dict[str, Any]:
    """The table that tools/resources.py writes. It runs in its own process: the interpreter must be
    off.
    """
    out = tmp_path / "resources.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, str(ROOT / "tools/resources.py"), *arguments, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert table, "nothing was compiled"
    return table


@functools.cache
def committed(triton: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))[triton]
    return table


def assert_clean(name: str, usage: dict[str, Any]) -> None:
    assert "error" not in usage, f"{name}: {usage['error']}"
    arch = name.partition("/")[0]
    assert usage["spills"] == 0, name
    assert usage["atomics"] == 0, name
    assert usage["shared"] <= SHARED[arch], name


TABLES: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
COVERED = sorted({(v, name.partition("/")[0]) for v, table in TABLES.items() for name in table})


def test_every_gpu_is_covered_by_both_compilers():
    """The installed triton, and the triton of the GPU machine."""
    assert {v for v, _ in COVERED} == {"3.9.0", "3.6.0"}
    for version in ("3.9.0", "3.6.0"):
        assert {arch for v, arch in COVERED if v == version} == set(SHARED)
        assert committed(version).keys() == committed("3.9.0").keys()


def test_every_kernel_compiles_for_amd():
    """Every kernel was compiled for gfx942 with the tiles of sm_90; no bound applies."""
    (table,) = json.loads(AMD.read_text(encoding="utf-8")).values()
    mine = {n for n in committed("3.9.0") if n.startswith("sm_90/")}
    kernels = [{n.split("/")[1].removesuffix("-saved") for n in names} for names in (table, mine)]
    assert kernels[0] == kernels[1]


@pytest.mark.parametrize(("triton", "arch"), COVERED)
def test_the_committed_table_is_clean(triton, arch):
    """No spill and no atomic in any mode and width."""
    table = {n: row for n, row in committed(triton).items() if n.startswith(f"{arch}/")}
    for name, row in table.items():
        assert_clean(name, row)
    for mode in ("highest", "high", "medium"):
        for width in ("16", "32", "64", "128", "200"):
            assert [n for n in table if "/recursion" in n and f"/{mode}/{width}/" in n], (
                mode,
                width,
            )


# Kernels that other kernels replace where no tile is clean.
OPTIONAL = ("kmeans_step",)


def test_consumer_gpus_take_the_rows_of_sm_80():
    for kernel, rows in json.loads(CONFIGS.read_text(encoding="utf-8")).items():
        mine = {n.partition("/")[2]: r for n, r in rows.items() if n.startswith("sm_86/")}
        assert mine == {n.partition("/")[2]: r for n, r in rows.items() if n.startswith("sm_80/")}
        assert mine or kernel in OPTIONAL


@pytest.mark.parametrize("arch", [arch for triton, arch in COVERED if triton == "3.9.0"])
def test_lower_modes_multiply_on_matrix_units(arch):
    """wgmma and tcgen05 need 64 rows a warpgroup; below them the older instruction serves."""
    table = committed("3.9.0")
    mine = {n: f for n, f in table.items() if n.startswith(f"{arch}/") and "/any/" not in n}
    for name, row in mine.items():
        if "/medium/" in name or "/high/" in name:
            assert row["product"] != "fma" or "hard" in name, name
    wide = [f["product"] for n, f in mine.items() if n.startswith(f"{arch}/recursion/medium/16")]
    assert PRODUCTS[arch] in wide


SAMPLE = ("--arch", "90", "--mode", "highest", "--dim", "16", "--base")


def test_a_sample_compiles_to_the_table(tmp_path):
    import triton

    table = TABLES.get(triton.__version__)
    for name, row in compiles(tmp_path, *SAMPLE).items():
        assert_clean(name, row)
        assert table is None or row == table[name], name


@pytest.mark.skipif(not SECOND.is_dir(), reason=".venv/triton36 is missing: make setup")
def test_a_sample_compiles_with_the_gpu_machines_triton(tmp_path):
    for name, row in compiles(tmp_path, *SAMPLE, "--kernel", "recursion", path=SECOND).items():
        assert_clean(name, row)
        assert row == committed("3.6.0")[name], name


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("triton", "arch"), COVERED)
def test_everything_compiles_to_the_table(tmp_path, triton, arch):
    second = SECOND if triton == "3.6.0" else None
    result = compiles(tmp_path, "--arch", arch.removeprefix("sm_"), path=second)
    table = {n: one for n, one in committed(triton).items() if n.startswith(f"{arch}/")}
    assert result.keys() == table.keys()
    assert not {n: (table[n], result[n]) for n in table if result[n] != table[n]}
