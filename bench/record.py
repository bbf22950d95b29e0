# SPDX-License-Identifier: Apache-2.0
"""Where and with what figures were measured: every file in bench/results/ says it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from clam_kernels import info

ROOT = Path(__file__).resolve().parents[1]


def facts(device: str = "cpu") -> dict[str, Any]:
    """The name of the GPU or the processor, and the versions of what ran on it."""
    known = info.collect()
    gpus = known["gpus"] if device == "cuda" else []
    packages = {name: v for name, v in known["packages"].items() if v != "absent"}
    versions = {
        "clam_kernels": known["clam_kernels"],
        "torch": known["torch"],
        **packages,
        **({"cuda": known["cuda"]} if gpus else {}),
        "python": known["python"],
        "git": commit(),
    }
    return {"machine": gpus[0]["name"] if gpus else known["processor"], "versions": versions}


def commit() -> str:
    """The commit of this checkout."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    return head.stdout.strip() or "unknown"
