# SPDX-License-Identifier: Apache-2.0
"""The arguments of every stage, and how a stage saves its figures while it runs."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPORT, RUNNING = "report.json", "running.json"


@dataclass(frozen=True)
class Stage:
    """A stage and its seconds of the whole budget; a gate decides the exit code."""

    name: str
    cap: float
    gate: bool = False


STAGES = (
    Stage("env", 10),
    Stage("build", 60),
    Stage("ceilings", 10),
    Stage("tests", 190, gate=True),
    Stage("sanitizer", 60, gate=True),
    Stage("determinism", 30, gate=True),
    Stage("targets", 130),
    Stage("memory", 25),
    Stage("graphs", 20),
)


@dataclass(frozen=True)
class Setting:
    """Where a stage writes, the device that it runs on, and the seconds that it may take."""

    out: Path
    seed: int
    seconds: float
    dry_run: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def left(self) -> float:
        """Seconds until the stage is killed."""
        return self.seconds - (time.monotonic() - self.started)

    def save(self, partial: dict[str, Any]) -> None:
        """Write the figures so far: they survive if the stage is killed later."""
        write_json(self.out / RUNNING, partial)

    def earlier(self, stage: str) -> dict[str, Any]:
        """The result of an earlier stage of this run; {} if it did not run."""
        try:
            report = json.loads((self.out / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        result: dict[str, Any] = report["stages"].get(stage, {})
        return result


def write_json(path: Path, value: Any) -> None:
    """Write a whole file or none; NaN and inf become strings, which every JSON reader accepts."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_plain(value), indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
