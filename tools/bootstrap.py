# SPDX-License-Identifier: Apache-2.0
"""Create .venv with torch, this package and its tools: `make setup`.

The torch is the first of: that of the base interpreter; with an NVIDIA driver the default build;
the CPU build of constraints-cpu.txt if pip can get it; that of the index TORCH_INDEX; pip's
default. A torch that .venv has already stays. If nothing changed, nothing happens.
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
LARGE_MB = 10  # downloads from this size on are printed
WATCHED = ("pyproject.toml", "setup.py", CONSTRAINTS, "tools/bootstrap.py")
# Environment variables of setup.py: another value needs another build.
VARIABLES = ("CLAM_CUDA", "CLAM_CUDA_ARCHS", "CUDA_HOME")
SEVERAL_GB = (
    "torch: no CPU build is offered here; taking pip's default, which with CUDA is several GB "
    "(TORCH_INDEX=<index with PyTorch's CPU wheels> avoids that)"
)


SIZE = (
    "a first setup downloads about 1 GB and takes 3.5 GB of disk, more with CUDA; 2 to 10 minutes"
)


class SetupError(Exception):
    """One line for the user, perhaps with the end of a tool's output."""


# ---- the decision --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One way to call `pip install`, and the line to print before it."""

    arguments: tuple[str, ...]
    says: str
    constraints: bool = False  # the rest of the installation uses constraints-cpu.txt too


@dataclass(frozen=True)
class TorchPlan:
    """Where torch comes from: the base interpreter, or the first attempt that succeeds."""

    system_site: bool
    says: str
    attempts: tuple[Attempt, ...] = field(default=())


def new_enough(version: str | None) -> bool:
    """Whether a version of torch is at least TORCH_FLOOR."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and tuple(map(int, numbers.groups())) >= TORCH_FLOOR


def decide(base_torch: str | None, driver: bool, index: str | None) -> TorchPlan:
    """Choose the plan from the results of the probes; it has every attempt that may succeed."""
    if new_enough(base_torch):
        return TorchPlan(True, f"torch: {base_torch} of the base interpreter")
    cpu = Attempt(("-c", CONSTRAINTS, "torch"), "torch: the CPU build", constraints=True)
    plain = Attempt((TORCH,), "torch: what pip finds" if driver else SEVERAL_GB)
    named: tuple[Attempt, ...] = ()
    if index:
        says = "torch: from the index that TORCH_INDEX names"
        # First the index alone, so that pip takes its build whatever other indexes offer; then
        # beside pip's own, for an index without the packages that torch depends on.
        named = (
            Attempt(("--index-url", index, TORCH), says),
            Attempt(("--extra-index-url", index, TORCH), f"{says}, beside pip's own"),
        )
    if driver:
        return TorchPlan(False, "torch: for the NVIDIA driver", (plain, *named, cpu))
    return TorchPlan(False, "torch: for a machine without an NVIDIA driver", (cpu, *named, plain))


# ---- the probes ----------------------------------------------------------------------------------


def base_interpreter() -> str:
    """The interpreter below an activated virtual environment, whose own torch does not count."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return getattr(sys, "_base_executable", None) or sys.executable


def ask(python: str | Path, code: str, timeout: float = 300) -> str | None:
    """The output of a line of Python; None if it fails."""
    command = [str(python), "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def torch_of(python: str | Path) -> str | None:
    """Version of the torch that an interpreter imports; None if the import fails."""
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
    """Hash of everything that the environment depends on; the folder too, as the install is
    editable.
    """
    files = [ROOT / name for name in WATCHED]
    files += sorted(path for path in (ROOT / "csrc").glob("*") if path.is_file())
    digest = hashlib.sha256(str(ROOT).encode())
    for name in VARIABLES:
        digest.update(f"{name}={os.environ.get(name, '')}\n".encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def up_to_date() -> bool:
    """Whether nothing has changed since the last setup."""
    try:
        return venv_python().exists() and STAMP.read_text(encoding="utf-8") == stamp()
    except OSError:
        return False


def venv_python() -> Path:
    return VENV / "bin" / "python"


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def progress(line: str) -> str | None:
    """What to print for a line of pip's output: a large download, or a step that takes long."""
    download = re.match(r"\s*(Downloading|Using cached) (\S+) \((\d+)(?:\.\d+)? (MB|GB)\)", line)
    if download:
        verb, name, size, unit = download.groups()
        project = "-".join(name.rpartition("/")[2].split("-")[:2])
        large = unit == "GB" or int(size) >= LARGE_MB
        return f"  {verb.lower()} {project} ({size} {unit})" if large else None
    if line.startswith("Installing collected packages"):
        count = line.count(",") + 1
        return f"  installing {count} package{'s' if count > 1 else ''}; this can take minutes"
    return "  building clam_kernels" if line.startswith("Building editable") else None


def pip(*arguments: str) -> str | None:
    """Run pip in the environment and print its progress. Returns None if pip succeeds, else the
    end of its output.
    """
    environment = dict(
        os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0",
        PIP_PROGRESS_BAR="off", PIP_QUIET="0", PYTHONUNBUFFERED="1",
    )  # fmt: skip
    command = [str(venv_python()), "-m", "pip", *arguments]
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line)
            step = progress(line)
            if step is not None:
                say(step)
    return None if running.returncode == 0 else tail("".join(lines))


def make_venv(base: str, system_site: bool) -> None:
    """Create .venv. One that works stays: an interrupted setup leaves such a one."""
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


def install_torch(plan: TorchPlan) -> bool:
    """Install torch by the first attempt that succeeds; returns whether the rest of the
    installation uses constraints-cpu.txt.
    """
    failure = "no attempt was made"
    for attempt in plan.attempts:
        say(attempt.says)
        result = pip("install", *attempt.arguments)
        if result is None:
            return attempt.constraints
        failure = result
    raise SetupError(f"no torch could be installed:\n{failure}")


def cpu_constrained() -> bool:
    """Whether the torch in .venv is the one of constraints-cpu.txt."""
    wanted = re.search(r"^torch==(\S+)", (ROOT / CONSTRAINTS).read_text("utf-8"), re.MULTILINE)
    return wanted is not None and torch_of(venv_python()) == wanted.group(1)


def second_triton() -> None:
    """Install the triton of GPU machines beside the newer one that interprets: tests compile
    kernels ahead of time with both. Only tests need it, so without it setup prints a line and goes
    on.
    """
    target = VENV / "triton36"
    if (target / "triton").is_dir():
        return
    say(f"triton {SECOND_TRITON}, to compile for GPUs")
    wanted = f"triton=={SECOND_TRITON}"
    failure = pip("install", "--no-deps", "--target", str(target), wanted)
    if failure is not None:
        say(f"triton {SECOND_TRITON} could not be installed: its tests will be skipped")


def cuda_line() -> str:
    """A line about the CUDA library, from the build record."""
    try:
        record = json.loads((ROOT / "clam_kernels" / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "CUDA library: no build record"
    if record.get("cuda"):
        targets = ", ".join(f"sm_{arch}" for arch in record["archs"])
        return f"CUDA library: {targets} (nvcc {record['nvcc']})"
    return f"CUDA library: none, {record.get('reason')}"


def setup() -> None:
    """Run all steps; each prints one line, and pip prints its large downloads."""
    say(SIZE)
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
    # Without build isolation the build uses the setuptools of .venv; the bundled one is too old for
    # a licence as an SPDX expression, and missing from Python 3.12 on.
    say("setuptools")
    failure = pip("install", "setuptools>=77")
    if failure is not None:
        raise SetupError(f"setuptools could not be installed:\n{failure}")
    say("clam_kernels and its tools")
    extra = ["-c", CONSTRAINTS] if constrained else []
    failure = pip("install", *extra, "--no-build-isolation", "-e", ".[dev]")
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
