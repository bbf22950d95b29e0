# SPDX-License-Identifier: Apache-2.0
"""tools/bootstrap.py: the torch that it installs on each machine, its messages, and that a second
run does nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
INDEX = "https://wheels.example/cpu"


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, working in a temporary folder."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bootstrap", module)
    spec.loader.exec_module(module)
    for name in module.WATCHED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "am.h").write_text("// one\n", encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "clam-setup")
    for name in (*module.VARIABLES, "TORCH_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return module


# ---- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("2.10.0", True),
        ("2.13.0+cpu", True),
        ("3.0.1", True),
        ("2.10.0a0+git12", True),
        ("2.9.1", False),
        ("1.13.1", False),
        ("", False),
        (None, False),
        ("unknown", False),
    ],
)
def test_new_enough(bootstrap: ModuleType, version: str | None, good: bool) -> None:
    assert bootstrap.new_enough(version) is good


@pytest.mark.parametrize("driver", [False, True])
@pytest.mark.parametrize("index", [None, INDEX])
def test_torch_of_the_base_interpreter_wins(
    bootstrap: ModuleType, driver: bool, index: str | None
) -> None:
    plan = bootstrap.decide("2.11.0+cu130", driver, index)
    assert plan.system_site
    assert plan.attempts == ()
    assert "2.11.0+cu130" in plan.says


@pytest.mark.parametrize("old", [None, "2.9.1"])
def test_every_way_in_the_order_of_the_machine(bootstrap: ModuleType, old: str | None) -> None:
    """A torch that is too old counts as none, and every attempt that may succeed is in the plan."""
    cpu, plain = ("-c", "constraints-cpu.txt", "torch"), ("torch>=2.10",)
    named = [("--index-url", INDEX, *plain), ("--extra-index-url", INDEX, *plain)]

    def ways(driver: bool, index: str | None) -> list[tuple[str, ...]]:
        plan = bootstrap.decide(old, driver, index)
        assert not plan.system_site
        return [attempt.arguments for attempt in plan.attempts]

    assert ways(False, None) == [cpu, plain]
    assert ways(False, INDEX) == [cpu, *named, plain]
    assert ways(False, "") == [cpu, plain]
    assert ways(True, None) == [plain, cpu]
    assert ways(True, INDEX) == [plain, *named, cpu]


def test_a_build_of_several_gigabytes_is_announced(bootstrap: ModuleType) -> None:
    *others, last = bootstrap.decide(None, False, INDEX).attempts
    assert "several GB" in last.says
    assert "TORCH_INDEX" in last.says
    assert "\n" not in last.says
    assert not any("GB" in attempt.says for attempt in others)
    assert not any("GB" in a.says for a in bootstrap.decide(None, True, None).attempts)
    assert not any(INDEX in attempt.says for attempt in others), "an address may hold a password"


def test_constraints_name_the_cpu_build_and_follow_it_alone(bootstrap: ModuleType) -> None:
    text = (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8")
    assert "torch==2.13.0+cpu\n" in text
    for driver in (False, True):
        for attempt in bootstrap.decide(None, driver, INDEX).attempts:
            assert attempt.constraints == ("constraints-cpu.txt" in attempt.arguments)


# ---- the probes ----------------------------------------------------------------------------------


def test_torch_of_an_activated_environment_does_not_count(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", "env")
    monkeypatch.setattr(sys, "base_prefix", "base")
    monkeypatch.setattr(sys, "_base_executable", "base/python3", raising=False)
    monkeypatch.setattr(sys, "executable", "env/python")
    assert bootstrap.base_interpreter() == "base/python3"
    monkeypatch.setattr(sys, "prefix", "base")
    assert bootstrap.base_interpreter() == "env/python"


def test_ask(bootstrap: ModuleType, tmp_path: Path) -> None:
    assert bootstrap.ask(sys.executable, "print(6 * 7)") == "42"
    assert bootstrap.ask(sys.executable, "import no_such_module_at_all") is None
    assert bootstrap.ask(tmp_path / "python", "print(1)") is None
    assert bootstrap.ask(sys.executable, "import time; time.sleep(60)", timeout=0.2) is None


@pytest.mark.parametrize(("code", "expected"), [(0, True), (9, False), (None, False)])
def test_driver(
    bootstrap: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int | None,
    expected: bool,
) -> None:
    """A tool that fails, as in a container without a GPU, counts as no driver."""
    if code is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nexit {code}\n", encoding="utf-8")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.has_driver() is expected


# ---- the steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (
            "Downloading torch-2.13.0+cpu-cp311.whl (190.4 MB)",
            "downloading torch-2.13.0+cpu (190 MB)",
        ),
        ("  Downloading triton-3.9.0-cp311.whl (2.1 GB)", "downloading triton-3.9.0 (2 GB)"),
        ("Using cached scipy-1.17.0-cp311.whl (35.2 MB)", "using cached scipy-1.17.0 (35 MB)"),
        ("Downloading idna-3.10-py3-none-any.whl (70 kB)", None),
        ("Downloading numpy-2.4.0-cp311.whl.metadata (6.6 kB)", None),
        ("Downloading six-1.0.whl (1.5 MB)", None),
        ("Installing collected packages: a, b", "installing 2 packages; this can take minutes"),
        ("Collecting torch", None),
    ],
)
def test_steps_of_pip_that_take_long_are_printed(
    bootstrap: ModuleType, line: str, step: str | None
) -> None:
    assert bootstrap.progress(line) == (None if step is None else f"  {step}")


def test_pip_prints_its_steps_and_returns_its_error(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tool in place of .venv's python: what it prints, and how it ends."""
    tool = bootstrap.venv_python()
    tool.parent.mkdir(parents=True)
    text = "echo 'Downloading torch-2.13.0-cp311.whl (190.4 MB)'; echo 'ERROR: no disk' >&2"
    for code in (0, 1):
        tool.write_text(f"#!/bin/sh\n{text}\nexit {code}\n", encoding="utf-8")
        tool.chmod(0o755)
        failure = bootstrap.pip("install", "torch")
        assert "setup:   downloading torch-2.13.0 (190 MB)" in capsys.readouterr().out
        assert (failure is None) if code == 0 else ("ERROR: no disk" in failure)


class Machine:
    """A machine whose interpreters and pip are lists; `calls` records what the setup ran."""

    def __init__(self, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bootstrap = bootstrap
        self.base_torch: str | None = None
        self.venv_torch: str | None = None
        self.driver = False
        self.ensurepip = True
        self.offers: Callable[[tuple[str, ...]], bool] = lambda arguments: True
        self.installs = "2.13.0+cpu"
        self.calls: list[str] = []
        monkeypatch.setattr(bootstrap, "base_interpreter", lambda: "base")
        monkeypatch.setattr(bootstrap, "has_driver", lambda: self.driver)
        monkeypatch.setattr(bootstrap, "ask", self.ask)
        monkeypatch.setattr(bootstrap, "pip", self.pip)
        monkeypatch.setattr(bootstrap.subprocess, "run", self.run)

    def ask(self, python: Any, code: str, timeout: float = 0) -> str | None:
        if "ensurepip" in code:
            return "" if self.ensurepip else None
        if "import torch" in code:
            return self.base_torch if python == "base" else self.venv_torch
        assert "import pip" in code
        return "" if Path(python).exists() else None

    def run(self, command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "venv"]
        self.make_venv()
        if "--system-site-packages" in command:
            self.venv_torch = self.base_torch
        self.calls.append(" ".join(["venv", *command[5:]]))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    def make_venv(self) -> None:
        self.bootstrap.venv_python().parent.mkdir(parents=True, exist_ok=True)
        self.bootstrap.venv_python().touch()

    def pip(self, *arguments: str) -> str | None:
        self.calls.append(" ".join(arguments))
        if not self.offers(arguments):
            return "ERROR: No matching distribution found"
        if any(a == "torch" or a.startswith("torch>") for a in arguments):
            self.venv_torch = self.installs
        return None


@pytest.fixture
def machine(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(bootstrap, monkeypatch)


SETUPTOOLS = "install setuptools>=77"
PROJECT = "install --no-build-isolation -e .[dev]"
CONSTRAINED = "install -c constraints-cpu.txt --no-build-isolation -e .[dev]"


def second_triton(machine: Machine) -> str:
    target = machine.bootstrap.VENV / "triton36"
    return f"install --no-deps --target {target} triton==3.6.0"


def test_base_torch_is_left_alone(machine: Machine) -> None:
    machine.base_torch, machine.driver = "2.11.0+cu130", True
    assert machine.bootstrap.main() == 0
    assert machine.calls == ["venv --system-site-packages", SETUPTOOLS, PROJECT]


def test_driver_takes_the_plain_build(machine: Machine) -> None:
    machine.driver, machine.installs = True, "2.12.0"
    assert machine.bootstrap.main() == 0
    assert machine.calls == ["venv", "install torch>=2.10", SETUPTOOLS, PROJECT]


def test_no_driver_takes_the_cpu_build(machine: Machine) -> None:
    assert machine.bootstrap.main() == 0
    torch = "install -c constraints-cpu.txt torch"
    assert machine.calls == ["venv", torch, SETUPTOOLS, CONSTRAINED, second_triton(machine)]


def test_without_the_second_triton_setup_succeeds(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.offers = lambda arguments: "triton==3.6.0" not in arguments
    assert machine.bootstrap.main() == 0
    assert "triton 3.6.0 could not be installed" in capsys.readouterr().out


def test_named_index_where_no_cpu_build_is_offered(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_INDEX", INDEX)
    machine.offers = lambda arguments: "constraints-cpu.txt" not in arguments
    machine.installs = "2.12.0+cpu"
    assert machine.bootstrap.main() == 0
    assert machine.calls[2] == f"install --index-url {INDEX} torch>=2.10"
    assert machine.calls[3:] == [SETUPTOOLS, PROJECT]
    assert "several GB" not in capsys.readouterr().out


def test_plain_build_where_nothing_else_is_offered(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.offers = lambda arguments: "constraints-cpu.txt" not in arguments
    machine.installs = "2.12.0"
    assert machine.bootstrap.main() == 0
    assert machine.calls[2:] == ["install torch>=2.10", SETUPTOOLS, PROJECT]
    assert capsys.readouterr().out.count("several GB") == 1


def test_driver_without_a_plain_build_tries_the_next(machine: Machine) -> None:
    machine.driver = True
    machine.offers = lambda arguments: "torch>=2.10" not in arguments
    assert machine.bootstrap.main() == 0
    assert machine.calls[2:] == [
        "install -c constraints-cpu.txt torch", SETUPTOOLS, CONSTRAINED, second_triton(machine)
    ]  # fmt: skip


def test_torch_in_the_environment_stays(machine: Machine) -> None:
    machine.make_venv()
    machine.venv_torch, machine.base_torch, machine.driver = "2.12.1", "2.11.0", True
    assert machine.bootstrap.main() == 0
    assert machine.calls == [SETUPTOOLS, PROJECT]


def test_cpu_build_in_the_environment_keeps_its_constraints(machine: Machine) -> None:
    machine.make_venv()
    machine.venv_torch = "2.13.0+cpu"
    assert machine.bootstrap.main() == 0
    assert machine.calls == [SETUPTOOLS, CONSTRAINED, second_triton(machine)]


@pytest.mark.parametrize("version", [None, "2.9.1"])
def test_an_interrupted_setup_goes_on(machine: Machine, version: str | None) -> None:
    """The environment exists without torch: setup does not create it again."""
    machine.make_venv()
    machine.venv_torch = version
    assert machine.bootstrap.main() == 0
    assert machine.calls[0] == "install -c constraints-cpu.txt torch"


def test_second_run_does_nothing_until_something_changes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bootstrap = machine.bootstrap

    def calls() -> int:
        machine.calls.clear()
        assert bootstrap.main() == 0
        return len(machine.calls)

    assert calls() > 0
    capsys.readouterr()
    assert calls() == 0
    assert capsys.readouterr().out == ""
    for name in (*bootstrap.WATCHED, "csrc/am.h", "csrc/new.cu"):
        with (bootstrap.ROOT / name).open("a", encoding="utf-8") as file:
            file.write("\n# changed\n")
        assert calls() > 0, name
        assert calls() == 0, name
    for name in bootstrap.VARIABLES:
        monkeypatch.setenv(name, "0")
        assert calls() > 0, name
        assert calls() == 0, name
    bootstrap.venv_python().unlink()
    machine.venv_torch = None
    assert calls() > 0


def test_failures_are_one_line_and_leave_no_stamp(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.ensurepip = False
    assert machine.bootstrap.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "python3-venv" in error
    assert machine.calls == []

    machine.ensurepip = True
    for failing, named in (
        ("torch", "no torch could be installed"),
        ("setuptools", "setuptools could not be installed"),
        (".[dev]", "clam_kernels could not be installed"),
    ):
        machine.offers = lambda arguments, name=failing: (
            not any(a.split(">")[0] == name for a in arguments)
        )
        assert machine.bootstrap.main() == 1
        error = capsys.readouterr().err
        assert named in error
        assert "No matching distribution found" in error
        assert not machine.bootstrap.up_to_date()
    machine.offers = lambda arguments: True
    assert machine.bootstrap.main() == 0


def test_a_failure_after_a_good_setup_is_not_forgotten(machine: Machine) -> None:
    assert machine.bootstrap.main() == 0
    watched = machine.bootstrap.ROOT / "setup.py"
    before = watched.read_bytes()
    watched.write_bytes(before + b"\n")
    machine.offers = lambda arguments: ".[dev]" not in arguments
    assert machine.bootstrap.main() == 1
    watched.write_bytes(before)
    assert not machine.bootstrap.up_to_date()


def test_interrupt(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: tuple[str, ...]) -> bool:
        raise KeyboardInterrupt

    machine.offers = interrupted
    assert machine.bootstrap.main() == 130
    assert "interrupted" in capsys.readouterr().err


def test_old_python_is_named(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert bootstrap.main() == 1
    output = capsys.readouterr().out
    assert "3.10" in output
    assert "3.9" in output


def test_what_the_build_says_about_cuda(bootstrap: ModuleType) -> None:
    record = bootstrap.ROOT / "clam_kernels" / "_build.json"
    assert bootstrap.cuda_line() == "CUDA library: no build record"
    record.parent.mkdir()
    record.write_text('{"cuda": false, "reason": "nvcc was not found"}', encoding="utf-8")
    assert bootstrap.cuda_line() == "CUDA library: none, nvcc was not found"
    record.write_text('{"cuda": true, "archs": ["80", "90a"], "nvcc": "13.0"}', encoding="utf-8")
    assert bootstrap.cuda_line() == "CUDA library: sm_80, sm_90a (nvcc 13.0)"
