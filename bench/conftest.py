# SPDX-License-Identifier: Apache-2.0
"""Measure a row: our call and its rivals run in alternation in one process, timed in CPU seconds of
one thread, and each gets its error against float64 beside its time.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import record
import torch

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 7


def folder_name(model: str) -> str:
    """A folder name for this machine: its processor and its number of threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {capability} 1 thread".lower()).strip("-")


def file_name(name: str, mode: str) -> str:
    """A file name for a row, without spaces and other characters that a shell would read."""
    return f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', f'{name}.{mode}')}.json"


@dataclass
class Race:
    """One row of results: our call and its rivals on the same data."""

    benchmark: Any
    name: str
    mode: str
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, ours: Callable[[], object], rivals: dict[str, Callable[[], object]]) -> None:
        """Time all in alternation: the rivals run in the setup of each of our rounds."""
        times: dict[str, list[float]] = {rival: [] for rival in rivals}

        def setup() -> None:
            for rival, call in rivals.items():
                start = time.process_time()
                call()
                times[rival].append(time.process_time() - start)

        self.benchmark.pedantic(ours, setup=setup, rounds=ROUNDS, warmup_rounds=1)
        data = self.benchmark.stats.stats.data
        times = {rival: seconds[-len(data) :] for rival, seconds in times.items()}
        self.facts["ms"] = _summary(data)
        self.facts["rivals"] = {
            rival: {
                **_summary(seconds),
                "ratio": statistics.median(b / a for a, b in zip(data, seconds, strict=True)),
            }
            for rival, seconds in times.items()
        }
        self.write()

    def write(self) -> None:
        """Write the row to its file, and to the report of pytest-benchmark."""
        where = record.facts()
        machine = folder_name(where["machine"])
        row = {
            "name": self.name,
            "mode": self.mode,
            **self.facts,
            "machine": machine,
            "threads": torch.get_num_threads(),
            "versions": where["versions"],
        }
        self.benchmark.extra_info.update(row)
        folder = RESULTS / machine
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / file_name(self.name.replace("/", "."), self.mode)
        file.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1e3 * s for s in seconds)
    return {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1]}


@pytest.fixture
def race(benchmark: Any) -> Callable[..., Race]:
    return lambda name, mode, **facts: Race(benchmark, name, mode, facts)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Use one thread: the gain of a chunked form must not come from more cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
