# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_check.py where there is no GPU: it says so, its dry run walks every stage, and a stage
that fails or hangs stops no other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STAGES = (
    "env", "build", "ceilings", "tests", "sanitizer", "determinism", "targets", "memory", "graphs",
)  # fmt: skip
ROWS = {"1", "2", "3", "4", "5", "6", "7", "8", "16", "17a", "17b"}
FIGURES = {
    "id", "shape", "dtype", "mode", "backend", "ms_median", "ms_p10", "ms_p90", "floor_ms",
    "bound_by", "share", "peers", "err_vs_f64", "err_ratio_to_eager", "peak_bytes", "pass",
    "target",
}  # fmt: skip


def gpu_check(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as a user calls it, on a machine whose GPU, if any, is hidden."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CLAM_BACKEND")}
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_check.py"), *words],
        env={**kept, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True, text=True, timeout=240, check=False, cwd=ROOT / "docs",
    )  # fmt: skip


def report_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def test_without_a_gpu_it_says_so_and_exits_with_3(tmp_path):
    done = gpu_check("--out", str(tmp_path / "out"))
    assert done.returncode == 3
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith("gpu_check: no GPU, nothing was checked: ")
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_refused(tmp_path):
    done = gpu_check("--out", str(tmp_path), "--only", "env,speed")
    assert done.returncode == 2
    assert f"--only: expected stages among {','.join(STAGES)}, got 'speed'" in done.stderr


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("dry")
    done = gpu_check("--dry-run", "--out", str(out), "--seed", "5")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return SimpleNamespace(out=out, said=done.stdout.splitlines(), report=report_in(out))


def test_a_dry_run_walks_every_stage(dry):
    assert dry.report["dry_run"] is True
    assert dry.report["seed"] == 5
    assert dry.report["exit_code"] == 0
    assert tuple(dry.report["stages"]) == STAGES
    for name, stage in dry.report["stages"].items():
        assert stage["status"] in ("pass", "skipped") if name == "build" else "pass", (name, stage)


def test_a_dry_run_measures_every_row(dry):
    assert {row["id"] for row in dry.report["rows"]} == ROWS
    for row in dry.report["rows"]:
        assert set(row) >= FIGURES
        assert row["stand_in"] is True
        assert row["ms_median"] > 0, row
        peers = row["peers"].values()
        assert any(peer["ms"] for peer in peers) or not peers
        for peer in peers:  # a package that is not installed is named, and no miss
            assert peer["ms"] or peer["absent"].startswith("ModuleNotFoundError"), peer
        assert row["target"]["error"] == "curve" or row["err_vs_f64"] < 1e-4, row
    assert json.loads((dry.out / "targets.json").read_text()) == dry.report["rows"]


def test_a_dry_run_ends_with_the_table(dry):
    last = dry.said[-30:]
    assert last[-2:] == ["* dry run on a CPU: every figure is a stand-in", "exit 0"]
    header = next(i for i, line in enumerate(last) if line.startswith("row "))
    assert {line.split()[0] for line in last[header + 1 : -2]} == ROWS | set(STAGES)


def test_what_comes_back_is_few_files(dry):
    files = [p for p in dry.out.rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"report.json", "targets.json", "tests.log"}
    assert len(files) <= 6
    assert all(p.parent == dry.out and p.stat().st_size < 16 << 20 for p in files)


def test_a_stage_that_hangs_or_fails_stops_no_other(tmp_path):
    started = time.monotonic()
    done = gpu_check(
        "--dry-run", "--out", str(tmp_path), "--only", "env,build,sanitizer", "--budget", "24",
        CLAM_GPU_CHECK_PLANT="env=hang,sanitizer=fail",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - started < 60
    stages = report_in(tmp_path)["stages"]
    assert stages["env"]["status"] == "timeout"
    assert stages["build"]["status"] in ("pass", "skipped")
    assert stages["sanitizer"]["status"] == "fail"
    assert "planted failure" in stages["sanitizer"]["reason"]
    assert "planted failure" in stages["sanitizer"]["output_tail"]
    assert stages["graphs"]["status"] == "not run"
    assert "exit 1: env timeout, sanitizer fail" in done.stdout.splitlines()[-1]
