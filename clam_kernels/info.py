# SPDX-License-Identifier: Apache-2.0
"""`python -m clam_kernels.info`: installed packages, and the backends that can run each op."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from ._core import backend, library
from ._core.spec import all_ops
from ._version import __version__

_PACKAGES = ("numpy", "scikit-learn", "safetensors", "triton", "matplotlib", "pyarrow", "tqdm")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        return platform.processor() or "unknown"
    return names[0] if names else "unknown"


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = (
            torch.cuda.get_device_name(index),
            torch.cuda.get_device_capability(index),
        )
        devices.append({"name": name, "capability": capability, "free": free, "total": total})
    return devices


def collect() -> dict[str, Any]:
    """Collect the facts for a report of a problem, without names of users or folders.

    Returns
    -------
    dict
        Values that the json module can write.

    Examples
    --------
    >>> from clam_kernels.info import collect
    >>> collect()["ops"]["am_step"]["reference"]
    'available'
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = {
        spec.name: {
            name: backend.why_not(spec, name, device) or "available" for name in backend.BACKENDS
        }
        for spec in all_ops()
    }
    shown = ("CLAM_", "CUDA_VISIBLE_DEVICES")
    return {
        "clam_kernels": __version__,
        "python": platform.python_version(),
        "system": " ".join((platform.system(), platform.release(), *platform.libc_ver())).strip(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or "none",
        "gpus": _devices(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "build": library.build_record(),
        "default_backend": backend.requested(),
        "precision": backend.default_precision(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(shown)},
        "ops": ops,
    }


def selftest() -> dict[str, float]:
    """Compute the largest error of the default backend of each op, on small float64 samples.

    Returns
    -------
    dict of str to float
        Largest absolute difference from the truth, by op.

    Examples
    --------
    >>> from clam_kernels.info import selftest
    >>> max(selftest().values()) < 1e-10
    True
    """
    from . import testing

    errors = {}
    for spec in all_ops():
        worst = 0.0
        for sample in testing.samples(spec.name):
            result, truth = spec.packet(*sample.args), spec.truth(*sample.args)
            is_tuple = isinstance(result, tuple)
            pairs = zip(result, truth, strict=True) if is_tuple else [(result, truth)]
            for a, b in pairs:
                same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
                gap = (a - b).abs().double().masked_fill(same, 0.0)
                worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
        errors[spec.name] = worst
    return errors


def text(facts: dict[str, Any]) -> str:
    """Format the facts as lines for a report.

    Parameters
    ----------
    facts : dict
        The result of `collect`.

    Returns
    -------
    str

    Examples
    --------
    >>> from clam_kernels.info import collect, text
    >>> text(collect()).splitlines()[0].split()[0]
    'clam_kernels'
    """
    lines = []
    for key, value in facts.items():
        if key == "ops":
            lines.append("ops")
            for op, backends in value.items():
                lines.append(f"  {op}")
                lines += [f"    {name:<10} {state}" for name, state in backends.items()]
        elif isinstance(value, dict):
            inner = ", ".join(f"{k} {v}" for k, v in value.items())
            lines.append(f"{key:<16} {inner or 'none'}")
        else:
            lines.append(f"{key:<16} {value if value != [] else 'none'}")
    return "\n".join(lines)


def show(as_json: bool, with_selftest: bool) -> int:
    """Print the facts; return 1 if the self-test finds a wrong op."""
    facts = collect()
    if with_selftest:
        facts["selftest_error"] = selftest()
    print(json.dumps(facts, indent=2) if as_json else text(facts))
    return int(with_selftest and not max(facts["selftest_error"].values()) < 1e-8)


def main(arguments: list[str] | None = None) -> int:
    """Print the facts with the options of a command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m clam_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--selftest", action="store_true", help="run each op against its truth")
    options = parser.parse_args(arguments)
    return show(options.json, options.selftest)


if __name__ == "__main__":
    raise SystemExit(main())
