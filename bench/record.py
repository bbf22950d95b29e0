# SPDX-License-Identifier: Apache-2.0
"""What the scripts of bench/ share: the machine and the versions that every file in bench/results/
names, and how a report is written.
"""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path
from typing import Any

from clam_kernels import info

ROOT = Path(__file__).resolve().parents[1]


def facts(device: str = "cpu") -> dict[str, Any]:
    """The name of the GPU or the processor, and the versions of the packages."""
    machine = info.collect()
    gpus = machine["gpus"] if device == "cuda" else []
    packages = {name: v for name, v in machine["packages"].items() if v != "absent"}
    versions = {
        "clam_kernels": machine["clam_kernels"],
        "torch": machine["torch"],
        **packages,
        **({"cuda": machine["cuda"]} if gpus else {}),
        "python": machine["python"],
        "git": commit(),
    }
    return {"machine": gpus[0]["name"] if gpus else machine["processor"], "versions": versions}


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON; make its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def resident_bytes() -> float:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return float(pages * resource.getpagesize())


def commit() -> str:
    """The commit of this checkout."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    return head.stdout.strip() or "unknown"
