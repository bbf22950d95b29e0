# SPDX-License-Identifier: Apache-2.0
"""Stage env: report the machine, the versions and the chosen backends; refuse a GPU in use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

import clam_kernels

from .setting import ROOT, Setting

QUERY = "name,driver_version,memory.total,memory.free,clocks.sm,clocks.max.sm,mig.mode.current"
PEERS = ("flash-kmeans", "cut-cross-entropy", "POT", "geomloss", "faiss", "cuml")


def output_of(*command: str) -> str | None:
    """The output of a tool; None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=False, cwd=ROOT
    )
    return done.stdout.strip() if done.returncode == 0 else None


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def others() -> list[str]:
    """Other processes that use the GPU; none if nvidia-smi cannot list them."""
    listing = (
        output_of("nvidia-smi", "--query-compute-apps=pid,name", "--format=csv,noheader") or ""
    )
    mine = (str(os.getpid()), str(os.getppid()))
    return [
        line for line in listing.splitlines() if line.strip() and line.split(",")[0] not in mine
    ]


def device_facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu": properties.name,
        "sm_count": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability()),
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "bytes_free": free,
        "bytes_total": total,
        "nvidia_smi": output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
    }


def choices(device: str) -> dict[str, dict[str, str]]:
    """The backend, precision and reason of every op on this device."""
    probe = torch.empty(1, device=device)
    return {
        spec.name: clam_kernels.choice(spec.name, probe)._asdict()
        for spec in clam_kernels.all_ops()
    }


def run(setting: Setting) -> dict[str, Any]:
    busy = [] if setting.dry_run else others()
    nvcc = output_of("nvcc", "--version") or output_of("/usr/local/cuda/bin/nvcc", "--version")
    report: dict[str, Any] = {
        "status": "pass",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "clam_kernels": clam_kernels.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {n: version(n) for n in ("triton", "numpy", "pytest", "setuptools", *PEERS)},
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "git": output_of("git", "rev-parse", "--short", "HEAD"),
        "backends": choices(setting.device),
    }
    if busy:
        reason = f"the GPU is used by others: {'; '.join(busy)}"
        return {**report, "status": "fail", "refused": True, "reason": reason}
    return {**report, **({} if setting.dry_run else device_facts())}
