# SPDX-License-Identifier: Apache-2.0
"""Stage sanitizer: compute-sanitizer's four tools over bench/gpu/sanitize.py, an op a process. A
machine that does not let them run makes the stage "unavailable", which is not a pass.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .cases import with_kernels
from .pool import Job, cores, work_off
from .setting import Setting

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ELSEWHERE = "/usr/local/cuda/bin"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
WHERE = re.compile(r"=========\s+at (.+?)\+0x")
DONE = re.compile(r"sanitize: (\d+) calls done, (\d+) refused")
SUMS = ("errors", "calls", "refused")
REFUSALS = ("Device not supported", "error 999", "not supported on this", "Failed to initialize")
# seconds at the end of the stage that its processes leave for what they said
SPARE = 4.0
# kernels that are torch's own business
FOREIGN = ("at::", "cub::", "cutlass", "cublas", "thrust::", "at_cuda")


def parts(setting: Setting) -> dict[str, list[str]]:
    """The ops of each process by its label: one a process, for compiling takes the time; two
    processes in a dry run, for importing does.
    """
    ops = with_kernels()
    if setting.dry_run:
        return {"even": ops[::2], "odd": ops[1::2]}
    return {op: [op] for op in ops}


def script(setting: Setting, ops: list[str]) -> list[str]:
    words = [sys.executable, "-m", "bench.gpu.sanitize", "--seed", str(setting.seed)]
    return [*words, "--device", setting.device, "--ops", *ops]


def command(binary: str, tool: str, words: list[str]) -> list[str]:
    return [binary, "--tool", tool, "--print-limit", "50", *words]


def environment() -> dict[str, str]:
    """Each tensor in memory of its own, so that a write beside it is seen."""
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def judged(text: str, code: int | None) -> dict[str, Any]:
    """What one tool found in one process."""
    refusal = next((line for line in text.splitlines() if any(r in line for r in REFUSALS)), None)
    summary, found = SUMMARY.findall(text), counted(text)
    if refusal is not None:
        return {"status": "unavailable", "reason": refusal.strip()[:300]}
    if code is None:
        return {"status": "fail", "reason": "not ended within the time limit"}
    where = WHERE.findall(text)
    ours = [w for w in where if not any(f in w for f in FOREIGN)]
    count = int(summary[-1]) if summary else 0
    found |= {"errors": count, "kernels": sorted(set(where))}
    if not summary or not found["calls"] or code:
        reason = f"no summary, no calls or calls that failed, exit code {code}, {count} errors"
        return {"status": "fail", **found, "reason": reason}
    clean = count == 0 or (where and not ours)
    reason = None if clean else f"{count} errors"
    return {"status": "pass" if clean else "fail", **found, "reason": reason}


def counted(text: str) -> dict[str, Any]:
    """Calls that the script says it did and those that were refused."""
    done = DONE.search(text)
    return {"calls": int(done[1]) if done else 0, "refused": int(done[2]) if done else 0}


def added(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What several processes found, by their labels, as one: none of them may have failed."""
    states = [one["status"] for one in found.values()]
    said = [f"{label}: {one['reason']}" for label, one in found.items() if one["reason"]]
    sums = {name: sum(one.get(name, 0) for one in found.values()) for name in SUMS}
    kernels = sorted({kernel for one in found.values() for kernel in one.get("kernels", [])})
    status = next((s for s in ("fail", "unavailable") if s in states), "pass")
    return {"status": status, **sums, "kernels": kernels[:20], "reason": "; ".join(said) or None}


def watched(
    setting: Setting, commands: dict[str, list[str]], around: dict[str, str] | None = None
) -> dict[str, tuple[str, int | None]]:
    """(text, exit code) by label; as many at once as there are cores."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            Job(label, words, Path(folder) / f"{i}.log", around)
            for i, (label, words) in enumerate(commands.items())
        ]
        try:
            work_off(setting, jobs, cores(), SPARE)
        finally:
            said = {job.name: job.close() for job in jobs}
        return {job.name: (said[job.name], job.code) for job in jobs}


def plain_run(setting: Setting) -> tuple[str | None, str]:
    """(why it failed, text) of the script alone, which also compiles what the tools will see."""
    found = watched(setting, {name: script(setting, ops) for name, ops in parts(setting).items()})
    text = "\n".join(said for said, _ in found.values())
    if any(code is None for _, code in found.values()):
        return "the script alone takes too long", text
    bad = [
        f"{label}: exit code {code}"
        for label, (said, code) in found.items()
        if code or not counted(said)["calls"]
    ]
    return (f"the script alone fails: {'; '.join(bad)}" if bad else None), text


def watch(binary: str, setting: Setting) -> dict[str, tuple[str, int | None]]:
    """All tools over all parts: they wait on the host more than not."""
    commands = {
        f"{tool} {label}": command(binary, tool, script(setting, ops))
        for label, ops in parts(setting).items()
        for tool in TOOLS
    }
    return watched(setting, commands, environment())


def dry(setting: Setting) -> dict[str, Any]:
    """The command lines survive a shell, and the script runs."""
    for tool in TOOLS:
        for ops in parts(setting).values():
            words = command("compute-sanitizer", tool, script(setting, ops))
            assert shlex.split(shlex.join(words)) == words
    why, text = plain_run(setting)
    (setting.out / "sanitizer.log").write_text(text, encoding="utf-8")
    calls = sum(int(count) for count, _ in DONE.findall(text))
    return {"status": "fail" if why else "pass", "reason": why, "tools": {}, "calls": calls,
            "stand_in": True}  # fmt: skip


def run(setting: Setting) -> dict[str, Any]:
    if setting.dry_run:
        return dry(setting)
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=ELSEWHERE)
    if binary is None:
        return {"status": "unavailable", "reason": "compute-sanitizer was not found"}
    why, text = plain_run(setting)
    if why is not None:
        (setting.out / "sanitizer.log").write_text(text, encoding="utf-8")
        return {"status": "fail", "reason": why, "plain": text[-2000:]}
    said = watch(binary, setting)
    log = "\n".join(f"==== {label}\n{text}" for label, (text, _) in said.items())
    (setting.out / "sanitizer.log").write_text(log[-(8 << 20) :], encoding="utf-8")
    tools = {
        tool: added({o: judged(*said[f"{tool} {o}"]) for o in parts(setting)}) for tool in TOOLS
    }
    for status in ("fail", "unavailable"):
        bad = [f"{t}: {r['reason']}" for t, r in tools.items() if r["status"] == status]
        if bad:
            return {"status": status, "reason": "; ".join(bad), "tools": tools}
    return {"status": "pass", "tools": tools, "plain": text[-2000:]}
