# SPDX-License-Identifier: Apache-2.0
"""Backends, the contract cases of every op, and the count of the cases that ran."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _children
import _interpreter
import hypothesis
import pytest

# also for the processes that tests start: a second thread only spins on a shared machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

# @triton.jit reads it, so it must be set before any import of triton
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import _slow
from _points import BOTH

import clam_kernels
from clam_kernels import testing
from clam_kernels._core import backend as choice

CONTRACT = Path(__file__).parent / "contract"
# Fewest contract cases of one op that a whole run must execute; a skip does not count.
MINIMUM = 100


@dataclass(frozen=True)
class Backend:
    """One way to run an op: its name in `clam_kernels.backend`, and the device of its tensors."""

    id: str
    name: str
    device: str
    interpreted: bool = False

    def why_not(self, spec: Any) -> str | None:
        """None if this process can run the op so, else the reason why not."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        interpreting = os.environ.get("TRITON_INTERPRET") == "1"
        if self.name == "triton" and self.interpreted != interpreting:
            return "TRITON_INTERPRET is " + ("1" if interpreting else "not 1") + " in this process"
        return choice.why_not(spec, self.name, self.device)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that its kernels accept; float64 is for the reference only. The interpreter
        turns bfloat16 into float32, so float16 stands for half precision there.
        """
        if self.interpreted:
            return (torch.float32, torch.float16)
        return testing.DTYPES if self.name == "reference" else testing.DTYPES[1:]

    def sum_eps(self, output: torch.Tensor, dtype: torch.dtype) -> float | None:
        """The eps that bounds the error of a float64 result of narrower rows, where kernels add in
        float32.
        """
        wide = output.dtype == torch.float64 != dtype
        return torch.finfo(torch.float32).eps if wide and self.name != "reference" else None


BACKENDS = (
    Backend("reference", "reference", "cpu"),
    Backend("triton-interpreted", "triton", "cpu", interpreted=True),
    Backend("triton", "triton", "cuda"),
    Backend("cuda", "cuda", "cuda"),
)


def pytest_configure(config: pytest.Config) -> None:
    _children.adopt_orphans()
    # examples are the same in every run, and a slow machine fails none of them
    hypothesis.settings.register_profile(
        "suite",
        deadline=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("suite")
    torch.set_num_threads(1)
    for line in (
        "contract(gradient, rowwise, samples, ops): only ops with a gradient, ops whose results "
        "have an entry for each row, these samples (or a family's selection by name), these ops",
    ):
        config.addinivalue_line("markers", line)
    for line in (
        # triton's interpreter computes padding lanes and NaN rows with numpy
        "ignore:.*encountered in.*:RuntimeWarning:triton.runtime.interpreter",
        "ignore:All-NaN slice encountered:RuntimeWarning",
        "ignore:overflow encountered in reduce:RuntimeWarning",
        "ignore:.*enable_fp_fusion.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


# ---- contract cases: parameters `spec`, `sample`, `backend`, `dtype` of tests

PARAMETERS = ("spec", "backend", "sample", "dtype")


def _cases(names: list[str], only: dict[str, Any]) -> Iterator[Any]:
    """One param for each combination that exists. Combinations that this process cannot run give
    one skip; a backend for which an op declares no kernel gives no case.
    """
    chosen, ops = only.get("samples"), only.get("ops")
    for spec in clam_kernels.all_ops():
        if (only.get("gradient") and spec.gradient is None) or (ops and spec.name not in ops):
            continue
        if only.get("rowwise") and not testing.is_rowwise(spec.name):
            continue
        named = testing.selection(spec.name, chosen) if isinstance(chosen, str) else chosen
        rows = [s for s in testing.samples(spec.name) if named is None or s.name in named]
        for one in BACKENDS if "backend" in names else BACKENDS[:1]:
            if one.name not in ("reference", *spec.kernels):
                continue
            reason = one.why_not(spec)
            labels = [spec.name, *([one.id] if "backend" in names else [])]
            if reason is not None:
                skip = pytest.mark.skip(reason=f"{one.id} on {one.device}: {reason}")
                values = [{"spec": spec, "backend": one}.get(n) for n in names]
                yield pytest.param(*values, id="-".join(labels), marks=skip)
                continue
            for row in rows if "sample" in names else [None]:
                dtypes = [t for t in one.dtypes if row is None or t in row.dtypes]
                for dtype in dtypes if "dtype" in names else [None]:
                    values_by_name = {"spec": spec, "backend": one, "sample": row, "dtype": dtype}
                    words = [row.name] if row is not None else []
                    words += [str(dtype).removeprefix("torch.")] if dtype is not None else []
                    yield pytest.param(
                        *(values_by_name[n] for n in names), id="-".join([*labels, *words])
                    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [n for n in PARAMETERS if n in metafunc.fixturenames]
    if "spec" not in names:
        return
    mark = metafunc.definition.get_closest_marker("contract")
    cases = list(_cases(names, mark.kwargs if mark else {}))
    metafunc.parametrize(names, cases, indirect=["backend"] if "backend" in names else False)


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton.runtime.interpreter" in sys.modules:
        _interpreter.make_quick()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        one = callspec.params.get("backend") if callspec else None
        if isinstance(one, Backend) and one.interpreted:
            test = getattr(item, "originalname", item.name)
            if _slow.is_slow(test, callspec.params):
                item.add_marker(pytest.mark.slow)


class Guard:
    """Outputs and scratch memory of kernels are NaN at first and lie between guard bands."""

    BAND = 64

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def empty(self, shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = math.prod(shape)
        fill = math.nan if dtype.is_floating_point else -77
        buffer = torch.full((size + 2 * self.BAND,), fill, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[self.BAND : self.BAND + size].view(tuple(shape))

    def check(self) -> None:
        for buffer in self.buffers:
            bands = torch.cat([buffer[: self.BAND], buffer[-self.BAND :]])
            assert bool((bands.isnan() | (bands == -77)).all()), "a kernel wrote past its buffer"


def skip_calls_beyond_the_limits(one: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test whose call exceeds the declared limits of the backend under test, with their
    reason. Other errors of the call still fail the test.
    """
    real = choice.why_not

    def why_not(spec: Any, name: str, device: str, arguments: tuple[Any, ...] = ()) -> str | None:
        reason = real(spec, name, device, arguments)
        if reason is not None and name == one.name and real(spec, name, device) is None:
            pytest.skip(f"{one.id}: {reason}")
        return reason

    monkeypatch.setattr(choice, "why_not", why_not)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed torch's global generator, so that a test that uses it draws the same numbers in every
    run.
    """
    torch.manual_seed(0)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend under test, forced for every op that the test calls."""
    guard = Guard()
    skip_calls_beyond_the_limits(request.param, monkeypatch)
    if request.param.interpreted:
        _interpreter.make_quick()
    # opcheck tests the storage of an output, which a guarded buffer would change
    guarded = request.node.path.name != "test_opcheck.py"
    if request.param.name == "triton" and guarded:
        launch = importlib.import_module("clam_kernels.kernels.common.launch")
        monkeypatch.setattr(launch, "empty", guard.empty)
    with clam_kernels.backend(request.param.name):
        yield request.param
    guard.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Any:
    """Fail a test that leaves a process behind, and kill the process."""
    outcome = yield
    if processes := _children.left():
        for pid, _ in processes:
            _children.end(pid)
        commands = "; ".join(command[:200] for _, command in processes)
        pytest.fail(f"the test left processes behind: {commands}", pytrace=False)
    return outcome


@pytest.fixture(params=BOTH.values(), ids=BOTH.keys())
def am(request: pytest.FixtureRequest) -> Any:
    """The public functions of the associative memory, or the equations."""
    return request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile starts without the graphs of other tests, and leaves none."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ran() -> Iterator[list[tuple[str, str]]]:
    """(op, backend) of every call since the test began."""
    calls: list[tuple[str, str]] = []

    def observe(op: str, name: str) -> None:
        calls.append((op, name))

    choice.observers.append(observe)
    yield calls
    choice.observers.remove(observe)


# ---- a suite that skips everything must fail -----------------------------------------------------

_executed: Counter[str] = Counter()
_skipped: Counter[str] = Counter()


def shortfall(executed: Counter[str], minimum: int = MINIMUM) -> list[str]:
    """One line for each op with fewer executed contract cases than `minimum`."""
    return [
        f"{spec.name}: {executed[spec.name]} contract cases ran, expected at least {minimum}"
        for spec in clam_kernels.all_ops()
        if executed[spec.name] < minimum
    ]


def is_whole(config: pytest.Config) -> bool:
    """Whether this run covers all of tests/contract."""
    narrowed = config.option.keyword or config.option.deselect or config.option.collectonly
    marks = re.split(r"\s+and\s+", config.option.markexpr) if config.option.markexpr else []
    roots = [Path(str(a).partition("::")[0]).resolve() for a in config.args if "::" not in str(a)]
    left_out = [Path(p).resolve() for p in getattr(config.option, "ignore", None) or ()]
    covered = any(CONTRACT.is_relative_to(root) for root in roots) and CONTRACT not in left_out
    return bool(not narrowed and covered and all(mark.startswith("not ") for mark in marks))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    spec = getattr(item, "callspec", None) and item.callspec.params.get("spec")
    if spec and CONTRACT in item.path.parents and report.when == "call" and not report.skipped:
        _executed[spec.name] += 1
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
    return report


def skips(skipped: Counter[str]) -> list[str]:
    """One line for each reason with the number of its cases."""
    counts = sorted(skipped.items(), key=lambda pair: (-pair[1], pair[0]))
    return [f"skipped: {n} case{'s' * (n > 1)}: {reason}" for reason, n in counts]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if is_whole(session.config) and exitstatus == 0 and shortfall(_executed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in skips(_skipped):
        terminalreporter.write_line(line)
    if _executed:
        ran_cases = ", ".join(f"{op} {count}" for op, count in sorted(_executed.items()))
        terminalreporter.write_line(f"contract cases executed: {ran_cases}")
    if is_whole(config):
        for line in shortfall(_executed):
            terminalreporter.write_line(f"ERROR: {line}", red=True)
