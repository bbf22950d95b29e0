# SPDX-License-Identifier: Apache-2.0
"""Processes of a stage: so many at a time, what each says in a file of its own."""

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
    """One process, started when there is room for it."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] | None = None
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None  # None for one that was never started or had to be stopped

    def start(self) -> None:
        with self.log.open("wb") as said:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def finished(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def close(self) -> str:
        """Stop it if it still runs; what it said."""
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


def work_off(setting: Setting, jobs: Iterable[Job], most: int, spare: float) -> None:
    """Run jobs, so many at a time, until only the spare seconds of the stage are left."""
    waiting, running = list(jobs), list[Job]()
    while (waiting or running) and setting.left() > spare:
        running = [job for job in running if not job.finished()]
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
            running[-1].start()
        time.sleep(0.1)
