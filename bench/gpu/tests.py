# SPDX-License-Identifier: Apache-2.0
"""Stage tests: the suite on the device, in several processes, and every sample again with a fresh
seed. Each process stops after five failures and no other does, so one run on a GPU tells most. A
run in which no device case ran has not passed; cases on the CPU that time does not suffice for are
counted and left to the machines without a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import clam_kernels

from .setting import ROOT, Setting

MARKS = "not (build or slow or aot)"
ON_DEVICE = "triton or cuda"
# what judges the repository and not results, and this script's own test
LEFT_OUT = (
    "tests/architecture", "tests/packaging", "tests/contract/test_count.py",
    "tests/contract/test_docs.py", "tests/test_gpu_check.py", "tests/test_readme.py",
)  # fmt: skip
# files with the most device cases: started first, one process an op
FIRST = ("test_equivalence", "test_gradients", "test_layout")
MOST_PROCESSES = 14
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")
# of pytest: nothing was collected, which a selection may come to
EMPTY = 5
UNFINISHED = ("not started", "stopped at the time limit")
# of each process, in characters
LOGGED = 300_000
OPTIONS = ["--maxfail=5", "-q", "-p", "no:cacheprovider"]


@dataclass
class Shard:
    """One process of the suite."""

    name: str
    command: list[str]
    device: bool
    log: Path
    process: subprocess.Popen[bytes] | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def start(self) -> None:
        with self.log.open("wb") as said:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def finished(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def close(self) -> str:
        """Stop it if it still runs; its text, and its counts from the last line."""
        if self.process is None:
            return ""
        if not self.finished():
            self.process.kill()
            self.process.wait()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        last = [line for line in text.splitlines() if COUNTS.search(line)][-1:]
        self.counts = {word: int(n) for n, word in COUNTS.findall(last[0])} if last else {}
        return text

    @property
    def outcome(self) -> str:
        if self.process is None:
            return UNFINISHED[0]
        code = self.process.returncode
        if code in (0, EMPTY):
            return "pass"
        return UNFINISHED[1] if code < 0 else f"exit code {code}"


def pytest(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *OPTIONS, "-p", "bench.gpu.poison", "-m", MARKS, *words]


def shards(setting: Setting, folder: Path) -> list[Shard]:
    """Device cases first, then the fresh run, then what needs no device."""
    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("test_*.py"))]
    files = [f for f in files if not f.startswith(LEFT_OUT)]
    files.sort(key=lambda f: (Path(f).stem not in FIRST, "contract" not in f))
    ops = [spec.name for spec in clam_kernels.all_ops()]
    plan = []
    for file in files:
        parts = [*ops, f"not ({' or '.join(ops)})"] if Path(file).stem in FIRST else [""]
        for part in parts:
            chosen = f"({ON_DEVICE}) and {part}" if part else ON_DEVICE
            plan.append((f"{file} {part} (device)", pytest(file, "-k", chosen), True))
    fresh = [sys.executable, "-m", "bench.gpu.fresh", "--seed", str(setting.seed)]
    plan.insert(len(ops), ("fresh seed", fresh, True))
    plan += [(f, pytest(f, "-k", f"not ({ON_DEVICE})"), False) for f in files]
    return numbered(plan, folder)


def numbered(plan: list[tuple[str, list[str], bool]], folder: Path) -> list[Shard]:
    return [
        Shard(name, words, device, folder / f"{i}.log")
        for i, (name, words, device) in enumerate(plan)
    ]


def stand_ins(setting: Setting, folder: Path) -> list[Shard]:
    """That everything is found and can be imported, and a few fresh cases."""
    collect = pytest("tests", "--collect-only", *(f"--ignore={f}" for f in LEFT_OUT))
    fresh = [sys.executable, "-m", "bench.gpu.fresh", "--seed", str(setting.seed)]
    fresh += ["--device", "cpu", "--most", "12"]
    return numbered([("collection", collect, False), ("fresh seed", fresh, False)], folder)


def work_off(setting: Setting, waiting: list[Shard], most: int) -> None:
    """Run the shards, so many at a time, until the time is spent."""
    running: list[Shard] = []
    while (waiting or running) and setting.left() > 5:
        running = [s for s in running if not s.finished()]
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
            running[-1].start()
        time.sleep(0.1)


def collect(plan: list[Shard], log: TextIO) -> list[dict[str, Any]]:
    """What each shard came to; the whole text goes to the log."""
    found = []
    for shard in plan:
        text = shard.close()
        log.write(
            f"==== {shard.name}: {shard.outcome}\n$ {' '.join(shard.command)}\n{text[-LOGGED:]}\n"
        )
        entry = {"name": shard.name, "outcome": shard.outcome, **shard.counts}
        if shard.outcome.startswith("exit"):
            entry["tail"] = text[-2500:]
        found.append(entry)
    return found


def run(setting: Setting) -> dict[str, Any]:
    most = 1 if setting.dry_run else min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:  # few files come back from the output folder
        plan = (stand_ins if setting.dry_run else shards)(setting, Path(folder))
        try:
            work_off(setting, list(plan), most)
        finally:
            with (setting.out / "tests.log").open("w", encoding="utf-8") as log:
                found = collect(plan, log)
    result = {"seed": setting.seed, "shards": found, "stand_in": setting.dry_run}
    ran = sum(s.counts.get("passed", 0) for s in plan if s.device)
    failed = [s for s in plan if s.outcome.startswith("exit code")]
    unfinished = [s for s in plan if s.outcome in UNFINISHED]
    said = [f"{s.name}: {s.outcome}" for s in [*failed, *(s for s in unfinished if s.device)]]
    if not ran and not setting.dry_run:
        said.append("not one case ran on the device")
    if said:
        return {**result, "status": "fail", "reason": "; ".join(said)[:1000], "passed": ran}
    reason = f"{ran} device cases passed, {len(unfinished)} files on the CPU unfinished"
    return {**result, "status": "pass", "reason": reason, "passed": ran}
