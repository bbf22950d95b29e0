# SPDX-License-Identifier: Apache-2.0
"""Makes .venv with torch, this package and its tools: `make setup`.

Which torch, in this order: the one that the base interpreter has; with an NVIDIA driver the plain
one; the CPU build of constraints-cpu.txt if pip can get it; the one of the index TORCH_INDEX; what
pip finds. A torch that .venv has already stays. If nothing changed, nothing happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "clam-setup"
PYTHON_FLOOR = (3, 10)
TORCH_FLOOR = (2, 10)
TORCH = "torch>=" + ".".join(map(str, TORCH_FLOOR))
CONSTRAINTS = "constraints-cpu.txt"
SECOND_TRITON = "3.6.0"
WATCHED = ("pyproject.toml", "setup.py", CONSTRAINTS, "tools/bootstrap.py")
# What setup.py reads: another wish is another build.
WISHES = ("CLAM_CUDA", "CLAM_CUDA_ARCHS", "CUDA_HOME")
SEVERAL_GB = (
    "torch: no CPU build is offered here; taking pip's default, which with CUDA is several GB "
    "(TORCH_INDEX=<index with PyTorch's CPU wheels> avoids that)"
)


class SetupError(Exception):
    """One line for the user, perhaps with the end of a tool's output."""


# ---- the decision --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One way to call `pip install`, and what to say before it."""

    arguments: tuple[str, ...]
    says: str
    constraints: bool = False  # the rest of the installation keeps to constraints-cpu.txt too


@dataclass(frozen=True)
class Plan:
    """Where torch comes from: the base interpreter, or the first attempt that succeeds."""

    system_site: bool
    says: str
    attempts: tuple[Attempt, ...] = field(default=())


def new_enough(version: str | None) -> bool:
    """Whether a version of torch serves."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and tuple(map(int, numbers.groups())) >= TORCH_FLOOR


def decide(base_torch: str | None, driver: bool, index: str | None) -> Plan:
    """Choose from what the probes found; every way that pip may succeed with is in the list."""
    if new_enough(base_torch):
        return Plan(True, f"torch: {base_torch} of the base interpreter")
    cpu = Attempt(("-c", CONSTRAINTS, "torch"), "torch: the CPU build", constraints=True)
    plain = Attempt((TORCH,), "torch: what pip finds" if driver else SEVERAL_GB)
    named: tuple[Attempt, ...] = ()
    if index:
        says = "torch: from the index that TORCH_INDEX names"
        # The index first as the only one, so that its build is taken whatever another one offers;
        # then beside pip's own, for an index that lacks what torch depends on.
        named = (
            Attempt(("--index-url", index, TORCH), says),
            Attempt(("--extra-index-url", index, TORCH), f"{says}, beside pip's own"),
        )
    if driver:
        return Plan(False, "torch: for the NVIDIA driver found", (plain, *named, cpu))
    return Plan(False, "torch: for a machine without an NVIDIA driver", (cpu, *named, plain))


# ---- the probes ----------------------------------------------------------------------------------


def base_interpreter() -> str:
    """The interpreter under an activated virtual environment: that one's torch does not count."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return getattr(sys, "_base_executable", None) or sys.executable


def ask(python: str | Path, code: str, timeout: float = 300) -> str | None:
    """What a line of Python prints, None if it fails."""
    command = [str(python), "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def torch_of(python: str | Path) -> str | None:
    """Version of the torch that an interpreter imports: one that is broken is none."""
    return ask(python, "import torch; print(torch.__version__)")


def has_driver() -> bool:
    """Whether an NVIDIA driver answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        return (
            subprocess.run([tool, "-L"], capture_output=True, timeout=60, check=False).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


# ---- the steps -----------------------------------------------------------------------------------


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


def stamp() -> str:
    """Of everything the environment depends on; the folder too, since the install is editable."""
    files = [ROOT / name for name in WATCHED]
    files += sorted(path for path in (ROOT / "csrc").glob("*") if path.is_file())
    digest = hashlib.sha256(str(ROOT).encode())
    for name in WISHES:
        digest.update(f"{name}={os.environ.get(name, '')}\n".encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def up_to_date() -> bool:
    """Whether the last setup still holds."""
    try:
        return venv_python().exists() and STAMP.read_text(encoding="utf-8") == stamp()
    except OSError:
        return False


def venv_python() -> Path:
    return VENV / "bin" / "python"


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def pip(*arguments: str) -> str | None:
    """Run pip in the environment; None if it succeeds, else the end of what it said."""
    environment = dict(
        os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0"
    )
    command = [str(venv_python()), "-m", "pip", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else tail(done.stdout + done.stderr)


def make_venv(base: str, system_site: bool) -> None:
    """Create .venv; one that works is kept, since an interrupted setup leaves such a one."""
    if not system_site and ask(venv_python(), "import pip") is not None:
        say(".venv stays")
        return
    if ask(base, "import venv, ensurepip") is None:
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise SetupError(
            f"{base} cannot make virtual environments; on Debian install {name} or python3-venv"
        )
    say(f".venv with {base}")
    command = [base, "-m", "venv", "--clear", str(VENV)]
    command += ["--system-site-packages"] if system_site else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"python -m venv failed:\n{tail(done.stdout + done.stderr)}")


def install_torch(plan: Plan) -> bool:
    """The first attempt that succeeds; returns whether constraints-cpu.txt holds from here on."""
    failure = "no attempt was made"
    for attempt in plan.attempts:
        say(attempt.says)
        result = pip("install", "-q", *attempt.arguments)
        if result is None:
            return attempt.constraints
        failure = result
    raise SetupError(f"no torch could be installed:\n{failure}")


def cpu_constrained() -> bool:
    """Whether the torch in .venv is the one of constraints-cpu.txt."""
    wanted = re.search(r"^torch==(\S+)", (ROOT / CONSTRAINTS).read_text("utf-8"), re.MULTILINE)
    return wanted is not None and torch_of(venv_python()) == wanted.group(1)


def second_triton() -> None:
    """The triton that GPU machines run, beside the newer one that interprets: kernels are compiled
    ahead of time with both. Only tests want it, so its absence is a line and no failure.
    """
    target = VENV / "triton36"
    if (target / "triton").is_dir():
        return
    say(f"triton {SECOND_TRITON}, to compile for GPUs")
    wanted = f"triton=={SECOND_TRITON}"
    failure = pip("install", "-q", "--no-deps", "--target", str(target), wanted)
    if failure is not None:
        say(f"triton {SECOND_TRITON} is not to be had: its tests will be skipped")


def cuda_line() -> str:
    """What the build did about the CUDA library."""
    try:
        record = json.loads((ROOT / "clam_kernels" / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "CUDA library: no build record"
    if record.get("cuda"):
        targets = ", ".join(f"sm_{arch}" for arch in record["archs"])
        return f"CUDA library: {targets} (nvcc {record['nvcc']})"
    return f"CUDA library: none, {record.get('reason')}"


def setup() -> None:
    """All steps; each says one line."""
    STAMP.unlink(missing_ok=True)
    present = torch_of(venv_python()) if venv_python().exists() else None
    if new_enough(present):
        say(f"torch: {present} in .venv stays")
        constrained = cpu_constrained()
    else:
        base = base_interpreter()
        plan = decide(torch_of(base), has_driver(), os.environ.get("TORCH_INDEX"))
        make_venv(base, plan.system_site)
        say(plan.says)
        constrained = not plan.system_site and install_torch(plan)
    # Without build isolation the build runs on the setuptools of .venv; the bundled one is too old
    # for a licence given as an SPDX expression, and missing from Python 3.12 on.
    say("setuptools")
    failure = pip("install", "-q", "setuptools>=77")
    if failure is not None:
        raise SetupError(f"setuptools could not be installed:\n{failure}")
    say("clam_kernels and its tools")
    extra = ["-c", CONSTRAINTS] if constrained else []
    failure = pip("install", "-q", *extra, "--no-build-isolation", "-e", ".[dev]")
    if failure is not None:
        raise SetupError(f"clam_kernels could not be installed:\n{failure}")
    if constrained:
        second_triton()
    say(cuda_line())
    STAMP.write_text(stamp(), encoding="utf-8")


def main() -> int:
    if sys.version_info < PYTHON_FLOOR:
        floor, own = (".".join(map(str, v[:2])) for v in (PYTHON_FLOOR, sys.version_info))
        print(f"setup: Python {floor} or newer is needed, this is {own}; name one: make PYTHON=...")
        return 1
    if up_to_date():
        return 0
    started = time.monotonic()
    try:
        setup()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; `make setup` goes on from here", file=sys.stderr)
        return 130
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
