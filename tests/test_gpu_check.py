# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_check.py on a machine without a GPU: it says so, its dry run runs every stage, and a
stage that fails or hangs does not stop the others.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clam_kernels import info, testing

ROOT = Path(__file__).parents[1]
STAGES = (
    "env", "build", "ceilings", "tests", "sanitizer", "determinism", "targets", "memory", "graphs",
)  # fmt: skip
ROWS = {
    "1", "2", "3", "4", "5", "6", "7", "7s", "8", "9", "10", "11", "12", "12g", "15", "16", "17a",
    "17b",
}  # fmt: skip
FIGURES = {
    "id", "shape", "dtype", "mode", "backend", "ms_median", "ms_p10", "ms_p90", "floor_ms",
    "bound_by", "share", "peers", "err_vs_f64", "err_ratio_to_eager", "peak_bytes", "pass",
    "target",
}  # fmt: skip


SCRIPT = str(ROOT / "bench" / "gpu_check.py")
# Seconds for a dry run: so many that no time limit decides.
ENOUGH = ("--budget", "1000000")
# Give the stage env one second.
IMPATIENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from bench import gpu_check
whole = gpu_check.seconds_for
gpu_check.seconds_for = lambda stage, *rest: 1.0 if stage.name == "env" else whole(stage, *rest)
sys.exit(gpu_check.main())
"""


def gpu_check(
    *words: str, start: tuple[str, ...] = (SCRIPT,), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does; a GPU, if any, is hidden."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CLAM_BACKEND")}
    return subprocess.run(
        [sys.executable, *start, *words],
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True, text=True, check=False, cwd=ROOT / "docs",
    )  # fmt: skip


def report_in(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


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
    done = gpu_check("--dry-run", "--out", str(out), "--seed", "5", *ENOUGH)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return SimpleNamespace(out=out, said=done.stdout.splitlines(), report=report_in(out))


def test_a_dry_run_runs_every_stage(dry):
    assert dry.report["dry_run"] is True
    assert dry.report["seed"] == 5
    assert dry.report["exit_code"] == 0
    assert tuple(dry.report["stages"]) == STAGES
    for name, stage in dry.report["stages"].items():
        assert stage["status"] in ("pass", "skipped") if name == "build" else "pass", (name, stage)


def test_a_dry_run_measures_every_target(dry):
    assert {row["id"] for row in dry.report["rows"]} == ROWS
    for row in dry.report["rows"]:
        assert set(row) >= FIGURES
        assert row["stand_in"] is True
        assert row["ms_median"] > 0, row
        peers = row["peers"].values()
        assert any(peer["ms"] for peer in peers) or not peers
        for peer in peers:  # a missing package is named, and is no miss
            assert peer["ms"] or peer["absent"].startswith("ModuleNotFoundError"), peer
        assert row["target"]["error"] == "curve" or row["err_vs_f64"] < 1e-4, row
    targets = json.loads((dry.out / "targets.json").read_text())
    assert targets["rows"] == dry.report["rows"]


def test_reports_name_the_machine_and_every_error(dry):
    for name in ("report.json", "targets.json"):
        report = json.loads((dry.out / name).read_text())
        assert report["machine"] == info.collect()["processor"]
        assert report["versions"]["torch"] == torch.__version__
    for row in dry.report["rows"]:
        assert row["errors"], row
        assert all(peer["errors"] for peer in row["peers"].values() if peer["ms"]), row


def test_a_dry_run_ends_with_the_table(dry):
    last = dry.said[-40:]
    assert last[-2:] == ["* dry run on a CPU: every figure is a stand-in", "exit 0"]
    header = next(i for i, line in enumerate(last) if line.startswith("row "))
    assert {line.split()[0] for line in last[header + 1 : -2]} == ROWS | set(STAGES)


def test_a_run_writes_few_files(dry):
    files = [p for p in dry.out.rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"report.json", "targets.json", "tests.log"}
    assert len(files) <= 6
    assert all(p.parent == dry.out and p.stat().st_size < 16 << 20 for p in files)


def test_a_stage_that_hangs_or_fails_stops_no_other(tmp_path):
    done = gpu_check(
        "--dry-run", "--out", str(tmp_path), "--only", "env,build,sanitizer", *ENOUGH,
        start=("-c", IMPATIENT), CLAM_GPU_CHECK_PLANT="env=hang,sanitizer=fail",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    stages = report_in(tmp_path)["stages"]
    assert stages["env"]["status"] == "timeout"
    assert stages["build"]["status"] in ("pass", "skipped")
    assert stages["sanitizer"]["status"] == "fail"
    assert "planted failure" in stages["sanitizer"]["reason"]
    assert "planted failure" in stages["sanitizer"]["output_tail"]
    assert stages["graphs"]["status"] == "not run"
    assert "exit 1: env timeout, sanitizer fail" in done.stdout.splitlines()[-1]


def test_stages_share_the_budget(part):
    """In proportion to their caps; time that one leaves goes to the later ones, and none gets more
    than is left.
    """
    script = part("gpu_check")
    for budget in (24.0, 540.0, 5000.0):
        seconds_left, waiting = budget, list(script.STAGES)
        while waiting:
            stage, *waiting = waiting
            seconds = script.seconds_for(stage, waiting, seconds_left)
            assert 0 < seconds <= seconds_left
            assert seconds >= seconds_left * stage.cap / sum(s.cap for s in (stage, *waiting))
            seconds_left -= seconds
        assert seconds_left == 0


# ---- parts that run on a GPU only, tested without one


@pytest.fixture
def part(monkeypatch):
    """A module of bench/gpu by name, or the script itself."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(
        f"bench.{name}" if name == "gpu_check" else f"bench.gpu.{name}"
    )


def test_the_device_cases_are_listed(dry):
    assert dry.report["stages"]["tests"]["listed"] > 100


def test_processes_of_the_suite_add_up_to_the_whole(part):
    """Each device case runs in one process, and no process is so long that the others wait
    for it.
    """
    tests = part("tests")
    ids = [
        f"tests/contract/{file}.py::test_{i}[{op}-{backend}-some sample]"
        for file in ("test_layout", "test_equivalence", "test_other")
        for i in range(40)
        for op in ("am_step", "kmeans_assign")
        for backend in ("triton", "cuda", "triton-interpreted")
    ]
    ids.append("tests/test_cli.py::test_which_asks_for_cuda")
    text = "\n".join([*ids, "", f"{len(ids)}/999 tests collected (9 deselected) in 1.00s"])
    assert tests.listed_cases(text) == ids
    assert tests.listed_cases(text.replace(ids[3], "")) == []
    plan = tests.on_device(ids)
    cases_of = [[word for word in words if word.startswith("tests/")] for _, words, _ in plan]
    assert sorted(itertools.chain(*cases_of)) == sorted(ids)
    lengths = [sum(map(tests.seconds, cases)) for cases in cases_of]
    assert len(plan) > 5
    assert max(lengths) <= tests.LONGEST + max(map(tests.seconds, ids))
    assert len({name for name, _, _ in plan}) == len(plan)


@pytest.mark.parametrize(
    ("text", "code", "status", "reason"),
    [
        ("sanitize: 6 calls done, 2 refused, 0 failed\nERROR SUMMARY: 0 errors", 0, "pass", None),
        (
            "sanitize: 0 calls done, 8 refused, 0 failed\nERROR SUMMARY: 0 errors",
            0,
            "fail",
            "b: no",
        ),
        (
            "sanitize: 5 calls done, 2 refused, 1 failed\nERROR SUMMARY: 0 errors",
            1,
            "fail",
            "b: no",
        ),
        ("sanitize: 6 calls done, 2 refused, 0 failed\nERROR SUMMARY: 3 errors", 0, "fail", "b: 3"),
        ("sanitize: 6 calls done, 2 refused, 0 failed", 0, "fail", "b: no summary"),
        ("", None, "fail", "b: not ended"),
        ("Device not supported", 1, "unavailable", "b: Device not"),
    ],
)
def test_verdicts_of_a_tool_add_up_over_its_processes(part, text, code, status, reason):
    sanitizer = part("sanitizer")
    good = "sanitize: 4 calls done, 1 refused, 0 failed\n========= ERROR SUMMARY: 0 errors"
    verdicts = {"a": sanitizer.tool_verdict(good, 0), "b": sanitizer.tool_verdict(text, code)}
    whole = sanitizer.combined_verdict(verdicts)
    assert whole["status"] == status
    assert whole["reason"] is None if reason is None else whole["reason"].startswith(reason)
    assert whole["calls"] == 4 + verdicts["b"].get("calls", 0)
    assert whole["refused"] == 1 + verdicts["b"].get("refused", 0)
    assert whole["errors"] == verdicts["b"].get("errors", 0)


def test_the_sanitizer_runs_every_op(part, tmp_path):
    whole = part("setting").Setting(tmp_path, 1, 60.0)
    for setting in (whole, part("setting").Setting(tmp_path, 1, 60.0, dry_run=True)):
        ops = part("sanitizer").parts(setting).values()
        assert sorted(itertools.chain(*ops)) == sorted(
            spec.name for spec in testing.all_ops() if spec.kernels
        )


def test_same_bits_of_one_entry_with_any_stride(part):
    same_bits = part("cases").same_bits
    one = torch.arange(5.0)[2:].as_strided((1,), (5,))
    assert same_bits(one, torch.tensor([2.0]))
    assert not same_bits(one, torch.tensor([-2.0]))
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert same_bits(torch.full((2, 3), torch.nan).T, torch.full((3, 2), torch.nan))


@pytest.fixture
def limited(part, monkeypatch):
    """bench.gpu.cases with a second backend that accepts up to 20 memories."""
    cases = part("cases")

    def refusal(name, op, *args):
        many = isinstance(args[1], torch.Tensor) and len(args[1]) > 20
        return "K > 20" if name == "few" and many else None

    for module in (cases, part("targets"), part("determinism"), part("memory")):
        for name, stand_in in (
            ("refusal", refusal),
            ("backends", lambda op, device: (["reference", "few"], {})),
            ("forced_backend", lambda name: contextlib.nullcontext),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    return cases


def test_a_backend_gets_the_first_shape_that_it_accepts(part, limited, tmp_path, monkeypatch):
    setting = part("setting").Setting(tmp_path, 1, 60.0)
    monkeypatch.setattr(type(setting), "device", "cpu")
    shapes = ((50, 33, 3), (60, 20, 3), (70, 10, 3))
    calls = dict(limited.calls_by_backend("am_step", shapes, setting))
    assert (calls["reference"].n, calls["few"].n) == (50, 60)
    assert dict(limited.calls_by_backend("am_step", shapes[:1], setting))["few"] == "K > 20"


def test_a_refused_call_is_no_failure(part, limited, tmp_path):
    """The small calls of a dry run have 33 memories."""
    setting = part("setting").Setting(tmp_path, 1, 60.0, dry_run=True)
    checks = dict(part("determinism").cases(setting))
    assert checks["am_step few large"] == "K > 20"
    assert checks["am_step reference large"]() == []
    memory, clock = part("memory"), part("clock").Clock("cpu")
    for stage in (memory.peaks, memory.wide):
        entries = {entry["what"]: entry for entry in stage(setting, clock, "am_assign")}
        refused = [what for what, entry in entries.items() if "refused" in entry]
        assert [what.split()[:2] for what in refused] == [["am_assign", "few"]]
        assert all(entry["ok"] for entry in entries.values())


def test_a_refused_backend_has_no_row(part, limited, tmp_path, monkeypatch):
    targets, setting = part("targets"), part("setting").Setting(tmp_path, 1, 60.0, dry_run=True)
    table, (target, *_) = targets.TargetTable(setting), part("targets_am").TARGETS
    table.run(target, 1.0)  # in a dry run it has 16 memories
    assert [row["backend"] for row in table.rows] == ["reference", "few"]
    monkeypatch.setattr(targets, "refusal", lambda name, *_: "no" if name == "few" else None)
    table.run(target, 1.0)
    assert [row["backend"] for row in table.rows[2:]] == ["reference"]
    assert table.rows[-1]["refusals"] == {"few": "no"}
