# SPDX-License-Identifier: Apache-2.0
"""Stage sanitizer: compute-sanitizer's four tools over bench/gpu/sanitize.py. A machine that does
not let them run makes the stage "unavailable", which is not a pass.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

from .setting import ROOT, Setting

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ELSEWHERE = "/usr/local/cuda/bin"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
WHERE = re.compile(r"=========\s+at (.+?)\+0x")
DONE = re.compile(r"sanitize: (\d+) calls done")
REFUSALS = ("Device not supported", "error 999", "not supported on this", "Failed to initialize")
# kernels that are torch's own business
FOREIGN = ("at::", "cub::", "cutlass", "cublas", "thrust::", "at_cuda")


def script(setting: Setting) -> list[str]:
    words = [sys.executable, "-m", "bench.gpu.sanitize", "--seed", str(setting.seed)]
    return [*words, "--device", setting.device]


def command(binary: str, tool: str, setting: Setting) -> list[str]:
    return [binary, "--tool", tool, "--print-limit", "50", *script(setting)]


def environment() -> dict[str, str]:
    """Each tensor in memory of its own, so that a write beside it is seen."""
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def judged(text: str, code: int | None) -> dict[str, Any]:
    """What one tool found."""
    refusal = next((line for line in text.splitlines() if any(r in line for r in REFUSALS)), None)
    summary, done = SUMMARY.findall(text), DONE.search(text)
    calls = int(done[1]) if done else 0
    if refusal is not None:
        return {"status": "unavailable", "reason": refusal.strip()[:300]}
    if code is None:
        return {"status": "fail", "reason": "stopped at the time limit"}
    if not summary or not calls or code:
        return {"status": "fail", "reason": f"no summary or no calls, exit code {code}"}
    where = WHERE.findall(text)
    ours = [w for w in where if not any(f in w for f in FOREIGN)]
    count = int(summary[-1])
    clean = count == 0 or (where and not ours)
    return {
        "status": "pass" if clean else "fail", "errors": count, "calls": calls,
        "kernels": sorted(set(where))[:20], "reason": None if clean else f"{count} errors",
    }  # fmt: skip


def watch(binary: str, setting: Setting) -> dict[str, tuple[str, int | None]]:
    """(text, exit code) of each tool; all four at once, they wait on the host more than not."""
    with contextlib.ExitStack() as files:
        said = {tool: files.enter_context(tempfile.TemporaryFile()) for tool in TOOLS}
        running = {
            tool: subprocess.Popen(
                command(binary, tool, setting), cwd=ROOT, env=environment(),
                stdin=subprocess.DEVNULL, stdout=said[tool], stderr=subprocess.STDOUT,
            )
            for tool in TOOLS
        }  # fmt: skip
        while setting.left() > 4 and any(p.poll() is None for p in running.values()):
            time.sleep(0.1)
        return {tool: ended(process, said[tool]) for tool, process in running.items()}


def ended(process: subprocess.Popen[bytes], said: IO[bytes]) -> tuple[str, int | None]:
    """Text and exit code of a tool, None for one that had to be stopped."""
    code = process.poll()
    if code is None:
        process.kill()
        process.wait()
    said.seek(0)
    return said.read().decode(errors="replace"), code


def plain_run(setting: Setting) -> tuple[str | None, str]:
    """(why it failed, text) of the script alone, which also compiles what the tools will see."""
    try:
        done = subprocess.run(
            script(setting), cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=max(5.0, setting.left() - 4),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "the script alone takes too long", ""
    text = done.stdout + done.stderr
    count = DONE.search(text)
    fine = done.returncode == 0 and count is not None and int(count[1])
    return (None if fine else f"the script alone fails, exit code {done.returncode}"), text


def dry(setting: Setting) -> dict[str, Any]:
    """The command lines survive a shell, and the script runs."""
    for tool in TOOLS:
        words = command("compute-sanitizer", tool, setting)
        assert shlex.split(shlex.join(words)) == words
    why, text = plain_run(setting)
    (setting.out / "sanitizer.log").write_text(text, encoding="utf-8")
    return {"status": "fail" if why else "pass", "reason": why, "tools": {}, "stand_in": True}


def run(setting: Setting) -> dict[str, Any]:
    if setting.dry_run:
        return dry(setting)
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=ELSEWHERE)
    if binary is None:
        return {"status": "unavailable", "reason": "compute-sanitizer was not found"}
    why, text = plain_run(setting)
    if why is not None:
        return {"status": "fail", "reason": why, "output_tail": text[-2000:]}
    said = watch(binary, setting)
    log = "\n".join(f"==== {tool}\n{text}" for tool, (text, _) in said.items())
    (setting.out / "sanitizer.log").write_text(log[-(8 << 20) :], encoding="utf-8")
    tools = {tool: judged(text, code) for tool, (text, code) in said.items()}
    for status in ("fail", "unavailable"):
        bad = [f"{t}: {r['reason']}" for t, r in tools.items() if r["status"] == status]
        if bad:
            return {"status": status, "reason": "; ".join(bad), "tools": tools}
    return {"status": "pass", "tools": tools, "plain": text[-2000:]}
