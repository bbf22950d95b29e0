# SPDX-License-Identifier: Apache-2.0
"""Stage tests: run the test suite on the device in several processes, and every sample again with a
new seed. A process stops after five failures; the others continue, so one run on a GPU reports
most of them. A run without a device case has not passed. CPU files that do not finish in time are
counted; machines without a GPU run them.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import clam_kernels

from .pool import Job, cores, run_jobs
from .setting import ROOT, Setting

MARKS = "not (build or slow or aot)"
ON_DEVICE = "triton or cuda"
# tests of the repository instead of results, and the test of gpu_check.py itself
LEFT_OUT = (
    "tests/architecture", "tests/packaging", "tests/contract/test_count.py",
    "tests/contract/test_docs.py", "tests/test_gpu_check.py", "tests/test_readme.py",
)  # fmt: skip
# the processes of these files start first
FIRST = ("test_layout", "test_equivalence", "test_gradients", "test_opcheck")
# Seconds of a device case by its id, measured on the host of an H200 with no kernel compiled
# before: Triton compiles again for other strides and sizes, the CUDA library never compiles.
SECONDS = (
    (r"-triton-interpreted\b", 0.0),
    (r"test_layout.*::test_inputs\[.*-triton\b", 2.5),
    (r"test_(opcheck|am_only).*-triton\b", 0.25),
    (r"-triton\b", 0.9),
    (r"", 0.15),
)
# ops with fewer kernels take this part of those seconds
PART = {"am_energy": 0.6, "am_assign": 0.5, "kmeans_update": 0.2}
# seconds of cases in one process, without its start
LONGEST = 30.0
MOST_PROCESSES = 16
COLLECTED = re.compile(r"^(\d+)(?:/\d+)? tests? collected", re.MULTILINE)
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")
EXECUTED = re.compile(r"^contract cases executed: (.*)$", re.MULTILINE)
# exit code of pytest if it collected no test, which is no failure of a selection
EMPTY = 5
UNFINISHED = ("not started", "stopped at the time limit")
# characters of each process in the log
LOGGED = 300_000
# words of a command in the log
SHOWN = 24
SPARE = 5.0
OPTIONS = ["--maxfail=5", "-q", "-p", "no:cacheprovider"]


@dataclass
class Shard(Job):
    """One process of the suite."""

    device: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def close(self) -> str:
        """As for any job; pytest prints its counts in the last line."""
        text = super().close()
        last = [line for line in text.splitlines() if COUNTS.search(line)][-1:]
        self.counts = {word: int(n) for n, word in COUNTS.findall(last[0])} if last else {}
        return text

    @property
    def outcome(self) -> str:
        if self.code is None:
            return UNFINISHED[self.process is not None]
        return "pass" if self.code in (0, EMPTY) else f"exit code {self.code}"


def pytest(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *OPTIONS, "-p", "bench.gpu.poison", "-m", MARKS, *words]


def files() -> list[str]:
    """The test files, without LEFT_OUT."""
    names = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("test_*.py"))]
    return [f for f in names if not f.startswith(LEFT_OUT)]


def listing(dry_run: bool) -> list[str]:
    """The command with which pytest lists the device cases; in a dry run those of one file."""
    chosen = [f for f in files() if not dry_run or f.endswith("contract/test_equivalence.py")]
    return pytest(*chosen, "-k", ON_DEVICE, "--collect-only")


def listed_cases(text: str) -> list[str]:
    """The cases in pytest's listing; none if their number is not the one that it prints."""
    cases = [line for line in text.splitlines() if line.startswith("tests/") and "::" in line]
    count = COLLECTED.search(text)
    return cases if count and int(count[1]) == len(set(cases)) == len(cases) else []


def seconds(case: str) -> float:
    usual = next(value for pattern, value in SECONDS if re.search(pattern, case))
    return usual * PART.get(op_in(case), 1.0)


def op_in(case: str) -> str:
    """The op in the id of a case; "" if there is none."""
    words = re.split(r"[\[\]-]", case)
    return next((s.name for s in clam_kernels.all_ops() if s.name in words), "")


def pieces(cases: list[str], longest: float = LONGEST) -> list[list[str]]:
    """Split the cases of a file into the fewest parts of about equal time, each under `longest`
    seconds. The cases of an op stay together: they share kernels.
    """
    ordered = sorted(cases, key=op_in)
    total = sum(map(seconds, ordered))
    count = max(1, math.ceil(total / longest))
    parts: list[list[str]] = [[] for _ in range(count)]
    spent = 0.0
    for case in ordered:
        parts[min(int(count * spent / total), count - 1) if total else 0].append(case)
        spent += seconds(case)
    return [part for part in parts if part]


def on_device(cases: list[str]) -> list[tuple[str, list[str], bool]]:
    """(name, command, True) of the processes for the device cases, the longest first."""
    parts = []
    for file in dict.fromkeys(case.partition("::")[0] for case in cases):
        cut = pieces([case for case in cases if case.startswith(f"{file}::")])
        parts += [(f"{file} {i + 1}/{len(cut)} (device)", part) for i, part in enumerate(cut)]

    def rank(part: tuple[str, list[str]]) -> tuple[bool, float]:
        return Path(part[0].split()[0]).stem not in FIRST, -sum(map(seconds, part[1]))

    return [(name, pytest(*part), True) for name, part in sorted(parts, key=rank)]


def fresh(setting: Setting, *words: str) -> list[str]:
    head = [sys.executable, "-m", "bench.gpu.fresh", "--seed", str(setting.seed)]
    return [*head, "--device", setting.device, *words]


def shards(setting: Setting, folder: Path, cases: list[str]) -> list[Shard]:
    """The fresh runs, then the device cases, then the files that need no device."""
    plan = [
        (f"fresh seed {spec.name}", fresh(setting, "--ops", spec.name), True)
        for spec in clam_kernels.all_ops()
    ]
    plan += on_device(cases)
    chosen = sorted(files(), key=lambda f: "contract" not in f)
    plan += [(f, pytest(f, "-k", f"not ({ON_DEVICE})"), False) for f in chosen]
    return numbered_shards(plan, folder)


def numbered_shards(plan: list[tuple[str, list[str], bool]], folder: Path) -> list[Shard]:
    return [
        Shard(name, words, folder / f"{i}.log", device=device)
        for i, (name, words, device) in enumerate(plan)
    ]


def stand_ins(setting: Setting, folder: Path) -> list[Shard]:
    """A few fresh cases, to test that every module can be imported."""
    plan = [("fresh seed", fresh(setting, "--most", "12"), False)]
    return numbered_shards(plan, folder)


def case_counts(text: str) -> dict[str, int]:
    """Number of executed contract cases of each op, as tests/conftest.py prints it."""
    line = EXECUTED.search(text)
    parts = (part.split() for part in line[1].split(", ")) if line else ()
    return {op: int(count) for op, count in parts}


def collect(plan: list[Shard], log: TextIO) -> list[dict[str, Any]]:
    """The outcome of each shard; its output goes to the log."""
    entries = []
    for shard in plan:
        text = shard.close()
        words = " ".join(shard.command[:SHOWN])
        log.write(f"==== {shard.name}: {shard.outcome}\n$ {words}\n{text[-LOGGED:]}\n")
        entry = {"name": shard.name, "outcome": shard.outcome, **shard.counts}
        entry |= {"cases": case_counts(text)} if shard.device else {}
        if shard.outcome.startswith("exit"):
            entry["tail"] = text[-2500:]
        entries.append(entry)
    return entries


def run(setting: Setting) -> dict[str, Any]:
    most = 1 if setting.dry_run else min(MOST_PROCESSES, cores())
    with tempfile.TemporaryDirectory() as folder:  # few files come back from the output folder
        first = Shard("collection", listing(setting.dry_run), Path(folder) / "collection.log")
        plan, cases = [first], list[str]()
        try:
            run_jobs(setting, plan, most, SPARE)
            cases = listed_cases(first.close())
            plan += (
                stand_ins(setting, Path(folder))
                if setting.dry_run
                else shards(setting, Path(folder), cases)
            )
            run_jobs(setting, plan[1:], most, SPARE)
        finally:
            with (setting.out / "tests.log").open("w", encoding="utf-8") as log:
                entries = collect(plan, log)
    result = {
        "seed": setting.seed, "shards": entries, "listed": len(cases), "stand_in": setting.dry_run,
    }  # fmt: skip
    result["cases"] = dict(sum((Counter(entry.get("cases", {})) for entry in entries), Counter()))
    ran = sum(s.counts.get("passed", 0) for s in plan if s.device)
    failed = [s for s in plan if s.outcome.startswith("exit code")]
    unfinished = [s for s in plan if s.outcome in UNFINISHED]
    reasons = [f"{s.name}: {s.outcome}" for s in [*failed, *(s for s in unfinished if s.device)]]
    if not cases:
        reasons.insert(0, "pytest does not list the device cases")
    if not ran and not setting.dry_run:
        reasons.append("not one case ran on the device")
    if reasons:
        return {**result, "status": "fail", "reason": "; ".join(reasons)[:1000], "passed": ran}
    reason = f"{ran} device cases passed, {len(unfinished)} files on the CPU unfinished"
    return {**result, "status": "pass", "reason": reason, "passed": ran}
