# SPDX-License-Identifier: Apache-2.0
"""Run the processes of a stage, a limited number at a time; each writes to its own log file."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .setting import ROOT, Setting


@dataclass
class Job:
    """One process and its log."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] | None = None
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None  # None if the process never started or was stopped

    def start(self) -> None:
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def finished(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def close(self) -> str:
        """Stop the process if it still runs; return its output."""
        if self.process is None:
            return ""
        if self.finished():
            self.code = self.process.returncode
        else:
            self.process.kill()
            self.process.wait()
        return self.log.read_text(encoding="utf-8", errors="replace")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def run_jobs(setting: Setting, jobs: Iterable[Job], most: int, spare: float) -> None:
    """Run jobs, at most `most` at a time, until only `spare` seconds of the stage are left."""
    waiting, running = list(jobs), list[Job]()
    while (waiting or running) and setting.left() > spare:
        running = [job for job in running if not job.finished()]
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
            running[-1].start()
        time.sleep(0.1)
