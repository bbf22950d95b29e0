# SPDX-License-Identifier: Apache-2.0
"""Stage build: compile the CUDA library for this GPU with the code of setup.py, and report what
ptxas prints of each kernel. The folder name is a hash of the sources, the compiler and torch, so a
second call compiles nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools

from .setting import ROOT, Setting, write_json

FUNCTION = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
PROBE = 'extern "C" __global__ void probe(float *x) { x[threadIdx.x] *= 2.0f; }\n'
USED = re.compile(r"Used (\d+) registers")


def load_setup(log: list[str]) -> ModuleType:
    """setup.py as a module that installs nothing; its compiler calls report registers and
    spills.
    """
    setuptools.setup = lambda **_: None
    spec = importlib.util.spec_from_file_location("clam_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = module.subprocess.run

    def reporting(command: list[str], **more: Any) -> Any:
        if "-c" in command:
            command = [command[0], "-Xptxas=-v", *command[1:]]
        done = plain(command, **more)
        log.append(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
        return done

    module.subprocess = type("", (), {"run": staticmethod(reporting)})
    return module


def kernels_in(text: str) -> list[dict[str, Any]]:
    """Registers and spills of every kernel, as ptxas -v reports them."""
    kernels: list[dict[str, Any]] = []
    for line in text.splitlines():
        if match := FUNCTION.search(line):
            kernels.append({"kernel": match[1], "arch": match[2]})
        elif kernels and (match := SPILLS.search(line)):
            keys = ("stack", "spill_stores", "spill_loads")
            kernels[-1] |= dict(zip(keys, map(int, match.groups()), strict=True))
        elif kernels and (match := USED.search(line)):
            kernels[-1]["registers"] = int(match[1])
    return kernels


def use_probe_source(module: ModuleType) -> None:
    """Compile one trivial kernel in place of csrc/, to test the compiler, the linker and this
    stage.
    """
    probe = ROOT / "build" / "gpu_check" / "probe.cu"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text(PROBE, encoding="utf-8")
    module.sources_of = lambda *_: [str(probe.relative_to(ROOT))]


def arch(setting: Setting) -> str:
    """Name of this GPU's compile target; sm_90 needs the letter "a" for its matrix instructions."""
    if setting.dry_run:
        return "90a"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def digest(module: ModuleType, target: str) -> str:
    """Hash of the sources, the compiler and torch, as in setup.py."""
    nvcc, (_, torch_version) = module.find_nvcc(), module.find_torch()
    release = re.search(r"release (\S+),", module.call([nvcc, "--version"], "--version"))
    value: str = module.digest_of([target], torch_version, release.group(1) if release else "")
    return value


def compile_into(module: ModuleType, folder: Path, log: list[str]) -> dict[str, Any]:
    """Compile the library, and write it with its record and kernels to a folder that is complete or
    absent.
    """
    part = folder.with_suffix(f".{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    command = module.build_cuda.__new__(module.build_cuda)
    command.build_lib, command.build_temp = str(part), str(part / "temp")
    record = command.build()
    kernels = kernels_in("\n".join(log))
    write_json(part / module.RECORD, record)
    write_json(part / "kernels.json", kernels)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return {"record": record, "kernels": kernels}


def install(module: ModuleType, folder: Path) -> None:
    """Copy library and record beside the package, each whole or not at all."""
    for name in (module.LIBRARY, module.RECORD):
        part = (ROOT / name).with_suffix(".part")
        shutil.copy2(folder / name, part)
        os.replace(part, ROOT / name)


def run(setting: Setting) -> dict[str, Any]:
    log: list[str] = []
    module = load_setup(log)
    if setting.dry_run:
        use_probe_source(module)
    target = arch(setting)
    os.environ.update(CLAM_CUDA="1", CLAM_CUDA_ARCHS=target)
    try:
        hashed = digest(module, target)
    except module.NotBuilt as error:
        status = "skipped" if setting.dry_run else "fail"
        return {"status": status, "reason": str(error)}
    folder = ROOT / "build" / "gpu_check" / hashed[:16]
    reused = (folder / module.LIBRARY).exists()
    try:
        if reused:
            names = {"record": module.RECORD, "kernels": "kernels.json"}
            library = {k: json.loads((folder / name).read_text()) for k, name in names.items()}
        else:
            library = compile_into(module, folder, log)
    except SystemExit as error:  # setup.py exits so if it cannot build a requested library
        return {"status": "fail", "reason": str(error)}
    finally:
        (setting.out / "build.log").write_text("\n".join(log), encoding="utf-8")
    if not setting.dry_run:  # the probe must not replace the library of this checkout
        install(module, folder)
    spilled = [k for k in library["kernels"] if k.get("spill_stores") or k.get("spill_loads")]
    reason = f"{len(spilled)} of {len(library['kernels'])} kernels spill" if spilled else None
    return {
        "status": "pass", "reason": reason, "reused": reused, "arch": target,
        "spilled": spilled, **library,
    }  # fmt: skip
