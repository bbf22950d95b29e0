# SPDX-License-Identifier: Apache-2.0
"""Stage sanitizer: run compute-sanitizer's four tools over bench/gpu/sanitize.py, one process for
each op. If the machine does not allow the tools, the stage is "unavailable", which is not a pass.
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
from .pool import Job, cores, run_jobs
from .setting import Setting

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ELSEWHERE = "/usr/local/cuda/bin"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
WHERE = re.compile(r"=========\s+at (.+?)\+0x")
DONE = re.compile(r"sanitize: (\d+) calls done, (\d+) refused")
SUMS = ("errors", "calls", "refused")
REFUSALS = ("Device not supported", "error 999", "not supported on this", "Failed to initialize")
# seconds at the end of the stage for reading the logs
SPARE = 4.0
# kernels of torch, which this project does not check
FOREIGN = ("at::", "cub::", "cutlass", "cublas", "thrust::", "at_cuda")


def parts(setting: Setting) -> dict[str, list[str]]:
    """The ops of each process by its label. One op a process, because compiling takes the time; in
    a dry run two processes, because importing takes it.
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
    """Each tensor gets its own allocation, so that the tools see a write beside it."""
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def tool_verdict(text: str, code: int | None) -> dict[str, Any]:
    """The verdict of one tool in one process, from its output and exit code."""
    refusal = next((line for line in text.splitlines() if any(r in line for r in REFUSALS)), None)
    summary, counts = SUMMARY.findall(text), call_counts(text)
    if refusal is not None:
        return {"status": "unavailable", "reason": refusal.strip()[:300]}
    if code is None:
        return {"status": "fail", "reason": "not ended within the time limit"}
    where = WHERE.findall(text)
    ours = [w for w in where if not any(f in w for f in FOREIGN)]
    count = int(summary[-1]) if summary else 0
    counts |= {"errors": count, "kernels": sorted(set(where))}
    if not summary or not counts["calls"] or code:
        reason = f"no summary, no calls or calls that failed, exit code {code}, {count} errors"
        return {"status": "fail", **counts, "reason": reason}
    clean = count == 0 or (where and not ours)
    reason = None if clean else f"{count} errors"
    return {"status": "pass" if clean else "fail", **counts, "reason": reason}


def call_counts(text: str) -> dict[str, Any]:
    """Number of calls that the script ran and that backends refused, from its last line."""
    done = DONE.search(text)
    return {"calls": int(done[1]) if done else 0, "refused": int(done[2]) if done else 0}


def combined_verdict(verdicts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The verdicts of several processes, by label, as one: it passes if all of them pass."""
    states = [verdict["status"] for verdict in verdicts.values()]
    reasons = [
        f"{label}: {verdict['reason']}" for label, verdict in verdicts.items() if verdict["reason"]
    ]
    sums = {name: sum(verdict.get(name, 0) for verdict in verdicts.values()) for name in SUMS}
    kernels = sorted(
        {kernel for verdict in verdicts.values() for kernel in verdict.get("kernels", [])}
    )
    status = next((s for s in ("fail", "unavailable") if s in states), "pass")
    return {"status": status, **sums, "kernels": kernels[:20], "reason": "; ".join(reasons) or None}


def outputs_of(
    setting: Setting, commands: dict[str, list[str]], around: dict[str, str] | None = None
) -> dict[str, tuple[str, int | None]]:
    """(output, exit code) by label; as many processes at once as there are cores."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            Job(label, words, Path(folder) / f"{i}.log", around)
            for i, (label, words) in enumerate(commands.items())
        ]
        try:
            run_jobs(setting, jobs, cores(), SPARE)
        finally:
            outputs = {job.name: job.close() for job in jobs}
        return {job.name: (outputs[job.name], job.code) for job in jobs}


def plain_run(setting: Setting) -> tuple[str | None, str]:
    """(reason of a failure, output) of the script without tools; it also compiles the kernels."""
    outputs = outputs_of(
        setting, {name: script(setting, ops) for name, ops in parts(setting).items()}
    )
    text = "\n".join(output for output, _ in outputs.values())
    if any(code is None for _, code in outputs.values()):
        return "the script without tools takes too long", text
    failures = [
        f"{label}: exit code {code}"
        for label, (output, code) in outputs.items()
        if code or not call_counts(output)["calls"]
    ]
    return (f"the script without tools fails: {'; '.join(failures)}" if failures else None), text


def watch(binary: str, setting: Setting) -> dict[str, tuple[str, int | None]]:
    """All tools over all parts at once: they mostly wait for the host."""
    commands = {
        f"{tool} {label}": command(binary, tool, script(setting, ops))
        for label, ops in parts(setting).items()
        for tool in TOOLS
    }
    return outputs_of(setting, commands, environment())


def dry(setting: Setting) -> dict[str, Any]:
    """Check that the command lines pass through a shell unchanged, and that the script runs."""
    for tool in TOOLS:
        for ops in parts(setting).values():
            words = command("compute-sanitizer", tool, script(setting, ops))
            assert shlex.split(shlex.join(words)) == words
    reason, text = plain_run(setting)
    (setting.out / "sanitizer.log").write_text(text, encoding="utf-8")
    calls = sum(int(count) for count, _ in DONE.findall(text))
    return {"status": "fail" if reason else "pass", "reason": reason, "tools": {}, "calls": calls,
            "stand_in": True}  # fmt: skip


def run(setting: Setting) -> dict[str, Any]:
    if setting.dry_run:
        return dry(setting)
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=ELSEWHERE)
    if binary is None:
        return {"status": "unavailable", "reason": "compute-sanitizer was not found"}
    reason, text = plain_run(setting)
    if reason is not None:
        (setting.out / "sanitizer.log").write_text(text, encoding="utf-8")
        return {"status": "fail", "reason": reason, "plain": text[-2000:]}
    outputs = watch(binary, setting)
    log = "\n".join(f"==== {label}\n{text}" for label, (text, _) in outputs.items())
    (setting.out / "sanitizer.log").write_text(log[-(8 << 20) :], encoding="utf-8")
    tools = {
        tool: combined_verdict({o: tool_verdict(*outputs[f"{tool} {o}"]) for o in parts(setting)})
        for tool in TOOLS
    }
    for status in ("fail", "unavailable"):
        reasons = [f"{t}: {r['reason']}" for t, r in tools.items() if r["status"] == status]
        if reasons:
            return {"status": status, "reason": "; ".join(reasons), "tools": tools}
    return {"status": "pass", "tools": tools, "plain": text[-2000:]}
