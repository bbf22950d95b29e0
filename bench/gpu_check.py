# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell, in one command that ends inside ten minutes.

    python3 bench/gpu_check.py --out DIR [--only STAGE,...] [--budget 540] [--strict] [--dry-run]

Nine stages, each in a process of its own with a timeout: env, build, ceilings, tests, sanitizer,
determinism, targets, memory, graphs. DIR/report.json is written anew after each, so that whatever
stops the run leaves what was known; beside it targets.json, tests.log, build.log and sanitizer.log.
A stage that fails or hangs does not stop the next, but nothing runs on a GPU that others use.

Exit code: 0 if tests, sanitizer and determinism pass and no stage failed, 1 otherwise, 2 for wrong
arguments, 3 without a GPU. A missed speed target is reported, and fatal with --strict only.
--dry-run walks every stage on a CPU with stand-ins for all that needs a GPU.
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

# Starting torch and CUDA alone may take longer than the shortest stage.
LEAST_SECONDS = 30.0
WRITTEN = (REPORT, RUNNING, "targets.json", "tests.log", "build.log", "sanitizer.log")
NO_GPU = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", default="", metavar="STAGE,...", help="these stages alone")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all (540)")
    parser.add_argument("--strict", action="store_true", help="a missed target is fatal")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with stand-ins")
    parser.add_argument("--seed", type=int, help="of the data; fresh and printed by default")
    given = parser.parse_args()
    names = [s.name for s in STAGES]
    given.only = [name for name in given.only.split(",") if name] or names
    for name in given.only:
        if name not in names:
            parser.error(f"--only: expected stages among {','.join(names)}, got {name!r}")
    return given


def why_no_gpu() -> str | None:
    """None where CUDA can be used; no context is made here, it would count as another process."""
    try:
        import torch
    except ImportError as error:
        return f"torch does not import ({error})"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no CUDA device"


def seconds_for(stage: Stage, later: list[Stage], left: float) -> float:
    """A stage's part of what is left, by the caps: less if time runs out, more if some is over."""
    waiting = [stage, *later]
    part = left * stage.cap / sum(s.cap for s in waiting)
    return min(left, max(part, min(LEAST_SECONDS, left / len(waiting))))


def command(stage: Stage, given: argparse.Namespace, seconds: float) -> list[str]:
    words = [sys.executable, "-m", "bench.gpu", stage.name, "--out", str(given.out.resolve())]
    words += ["--seed", str(given.seed), "--seconds", f"{seconds:.1f}"]
    return [*words, *(["--dry-run"] if given.dry_run else [])]


def environment(dry_run: bool) -> dict[str, str]:
    """That of a stage: this checkout first, no backend forced, kernels compiled."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CLAM_BACKEND", "TRITON_INTERPRET")}
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    calm = {"OMP_NUM_THREADS": "1"} if dry_run else {}  # threads only wait on a shared machine
    return {**kept, **calm, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a stage with everything it started: its session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(stage: Stage, given: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One stage in its own process; what it had saved is kept if it had to be stopped."""
    running = given.out / RUNNING
    running.unlink(missing_ok=True)
    started, timed_out = time.monotonic(), False
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command(stage, given, seconds), cwd=ROOT, env=environment(given.dry_run),
            stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            stop(process)
        said.seek(0)
        text = said.read().decode(errors="replace")
    result = outcome(running, process.returncode, timed_out)
    result["seconds"] = round(time.monotonic() - started, 1)
    result["allowed_seconds"] = round(seconds, 1)
    if result["status"] not in table.GOOD:
        result["output_tail"] = text[-3000:]
    return result


def outcome(running: Path, code: int, timed_out: bool) -> dict[str, Any]:
    """What the stage left behind, with a status that tells the truth."""
    try:
        found: dict[str, Any] = json.loads(running.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    running.unlink(missing_ok=True)
    if found.pop("done", False):
        return found
    if timed_out:
        return {**found, "status": "timeout", "reason": "stopped at its time limit"}
    return {**found, "status": "fail", "reason": f"the stage died with exit code {code}"}


def check(given: argparse.Namespace) -> dict[str, Any]:
    """Run the stages asked for; the report is on disk after each."""
    blank: dict[str, Any] = {"status": "not run"}
    report: dict[str, Any] = {
        "dry_run": given.dry_run,
        "seed": given.seed,
        "asked": given.only,
        "budget_seconds": given.budget,
        "machine": "not recorded",
        "versions": "not recorded",
        "stages": {stage.name: dict(blank) for stage in STAGES},
        "rows": [],
    }
    ends = time.monotonic() + given.budget
    waiting = [stage for stage in STAGES if stage.name in given.only]
    while waiting:
        stage, *waiting = waiting
        left = ends - time.monotonic()
        if left < 1:
            report["stages"][stage.name] = {**blank, "reason": "no time was left"}
            continue
        result = run(stage, given, seconds_for(stage, waiting, left))
        report["rows"] += result.pop("rows", [])
        report |= result.pop("where", {})  # each stage that comes to its end says it
        report["stages"][stage.name] = result
        write_json(given.out / REPORT, report)
        print(f"{stage.name}: {result['status']} in {result['seconds']} s", flush=True)
        if result.get("refused"):
            for rest in waiting:
                report["stages"][rest.name] = {**blank, "reason": "the GPU is in use"}
            break
    return report


def main() -> int:
    given = arguments()
    missing = None if given.dry_run else why_no_gpu()
    if missing is not None:
        print(f"gpu_check: no GPU, nothing was checked: {missing}")
        return NO_GPU
    given.seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    given.out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:  # of a run before: what stops this one must not leave two mixed
        (given.out / name).unlink(missing_ok=True)
    print(f"gpu_check: seed {given.seed}, {given.budget:.0f} s", flush=True)
    report = check(given)
    report["exit_code"], why = table.verdict(report, given.only, given.strict)
    write_json(given.out / REPORT, report)
    print("\n".join([*table.lines(report), why]))
    return int(report["exit_code"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
