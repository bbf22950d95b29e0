# SPDX-License-Identifier: Apache-2.0
"""Every check that needs a GPU, in one command that ends within ten minutes.

    python3 bench/gpu_check.py --out DIR [--only STAGE,...] [--budget 540] [--strict] [--dry-run]

Nine stages run, each in its own process with a timeout: env, build, ceilings, tests, sanitizer,
determinism, targets, memory, graphs. The script rewrites DIR/report.json after each stage, so a run
that is stopped keeps the results so far. Beside it are targets.json, tests.log, build.log and
sanitizer.log. A stage that fails or hangs does not stop the next one. Nothing runs on a GPU that
other processes use.

Exit code: 0 if tests, sanitizer and determinism pass and no stage failed, 1 otherwise, 2 for wrong
arguments, 3 without a GPU. A missed speed target is reported; it fails the run with --strict only.
--dry-run runs every stage on a CPU, with small stand-ins for what needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu import table  # noqa: E402
from bench.gpu.setting import REPORT, RUNNING, STAGES, Stage, write_json  # noqa: E402

# To start torch and CUDA may take longer than the shortest stage.
LEAST_SECONDS = 30.0
OUTPUT_FILES = (REPORT, RUNNING, "targets.json", "tests.log", "build.log", "sanitizer.log")
NO_GPU = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", default="", metavar="STAGE,...", help="these stages alone")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all (540)")
    parser.add_argument("--strict", action="store_true", help="a missed target fails the run")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with stand-ins")
    parser.add_argument("--seed", type=int, help="of the data; random and printed by default")
    options = parser.parse_args()
    names = [s.name for s in STAGES]
    options.only = [name for name in options.only.split(",") if name] or names
    for name in options.only:
        if name not in names:
            parser.error(f"--only: expected stages among {','.join(names)}, got {name!r}")
    return options


def reason_for_no_gpu() -> str | None:
    """None if CUDA is usable. This makes no CUDA context: it would count as another process."""
    try:
        import torch
    except ImportError as error:
        return f"torch does not import ({error})"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no CUDA device"


def seconds_for(stage: Stage, later: list[Stage], left: float) -> float:
    """A stage's part of the seconds left: its cap over the sum of the caps of the stages left."""
    waiting = [stage, *later]
    part = left * stage.cap / sum(s.cap for s in waiting)
    return min(left, max(part, min(LEAST_SECONDS, left / len(waiting))))


def command(stage: Stage, options: argparse.Namespace, seconds: float) -> list[str]:
    words = [sys.executable, "-m", "bench.gpu", stage.name, "--out", str(options.out.resolve())]
    words += ["--seed", str(options.seed), "--seconds", f"{seconds:.1f}"]
    return [*words, *(["--dry-run"] if options.dry_run else [])]


def environment(dry_run: bool) -> dict[str, str]:
    """The environment of a stage: this checkout comes first on the path, no backend is forced, and
    kernels are compiled.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CLAM_BACKEND", "TRITON_INTERPRET")
    }
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    threads = {"OMP_NUM_THREADS": "1"} if dry_run else {}  # a shared machine has no free cores
    return {**inherited, **threads, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a stage and every process that it started; they share a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(stage: Stage, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one stage in its own process. A stage that is stopped keeps the figures it saved."""
    running = options.out / RUNNING
    running.unlink(missing_ok=True)
    started, timed_out = time.monotonic(), False
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command(stage, options, seconds), cwd=ROOT, env=environment(options.dry_run),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            stop(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    result = outcome(running, process.returncode, timed_out)
    result["seconds"] = round(time.monotonic() - started, 1)
    result["allowed_seconds"] = round(seconds, 1)
    if result["status"] not in table.GOOD:
        result["output_tail"] = text[-3000:]
    return result


def outcome(running: Path, code: int, timed_out: bool) -> dict[str, Any]:
    """The result that a stage saved; one that did not finish gets the status timeout or fail."""
    try:
        result: dict[str, Any] = json.loads(running.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = {}
    running.unlink(missing_ok=True)
    if result.pop("done", False):
        return result
    if timed_out:
        return {**result, "status": "timeout", "reason": "stopped at its time limit"}
    return {**result, "status": "fail", "reason": f"the stage ended with exit code {code}"}


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Run the stages of --only, and write the report after each."""
    blank: dict[str, Any] = {"status": "not run"}
    report: dict[str, Any] = {
        "dry_run": options.dry_run,
        "seed": options.seed,
        "selected": options.only,
        "budget_seconds": options.budget,
        "machine": "not recorded",
        "versions": "not recorded",
        "stages": {stage.name: dict(blank) for stage in STAGES},
        "rows": [],
    }
    ends = time.monotonic() + options.budget
    waiting = [stage for stage in STAGES if stage.name in options.only]
    while waiting:
        stage, *waiting = waiting
        left = ends - time.monotonic()
        if left < 1:
            report["stages"][stage.name] = {**blank, "reason": "no time was left"}
            continue
        result = run(stage, options, seconds_for(stage, waiting, left))
        report["rows"] += result.pop("rows", [])
        report |= result.pop("where", {})  # every stage that finishes reports machine and versions
        report["stages"][stage.name] = result
        write_json(options.out / REPORT, report)
        print(f"{stage.name}: {result['status']} in {result['seconds']} s", flush=True)
        if result.get("refused"):
            for rest in waiting:
                report["stages"][rest.name] = {**blank, "reason": "the GPU is in use"}
            break
    return report


def main() -> int:
    options = arguments()
    reason = None if options.dry_run else reason_for_no_gpu()
    if reason is not None:
        print(f"gpu_check: no GPU, nothing was checked: {reason}")
        return NO_GPU
    options.seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    options.out.mkdir(parents=True, exist_ok=True)
    for name in OUTPUT_FILES:  # a run that is stopped must not leave files of an earlier one
        (options.out / name).unlink(missing_ok=True)
    print(f"gpu_check: seed {options.seed}, {options.budget:.0f} s", flush=True)
    report = check(options)
    report["exit_code"], summary = table.verdict(report, options.only, options.strict)
    write_json(options.out / REPORT, report)
    print("\n".join([*table.lines(report), summary]))
    return int(report["exit_code"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
