# SPDX-License-Identifier: Apache-2.0
"""Backends, the contract cases of every op, and the count of those that really ran."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when @triton.jit runs: before any import of triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import clam_kernels
from clam_kernels import testing
from clam_kernels._core import backend as choice

CONTRACT = Path(__file__).parent / "contract"
# Fewest contract cases of one op that a whole run must execute; a skip does not count.
MINIMUM = 100


@dataclass(frozen=True)
class Backend:
    """One way to run an op: what `clam_kernels.backend` calls it, and where its tensors lie."""

    id: str
    name: str
    device: str
    interpreted: bool = False

    def why_not(self, spec: Any) -> str | None:
        """None if this process can run the op so, else the reason."""
        interpreting = os.environ.get("TRITON_INTERPRET") == "1"
        if self.name == "triton" and "triton" in spec.kernels and self.interpreted != interpreting:
            return "TRITON_INTERPRET is " + ("1" if interpreting else "not 1") + " in this process"
        reason = choice.why_not(spec, self.name, self.device)
        if reason is None and self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return reason

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What its kernels take: float64 belongs to the reference. The interpreter turns bfloat16
        into float32, so float16 stands for the narrow ones there.
        """
        if self.interpreted:
            return (torch.float32, torch.float16)
        return testing.DTYPES if self.name == "reference" else testing.DTYPES[1:]

    def sum_eps(self, output: torch.Tensor, dtype: torch.dtype) -> float | None:
        """What a float64 result of narrower rows is held to where kernels add them in float32."""
        wide = output.dtype == torch.float64 != dtype
        return torch.finfo(torch.float32).eps if wide and self.name != "reference" else None


BACKENDS = (
    Backend("reference", "reference", "cpu"),
    Backend("triton-interpreted", "triton", "cpu", interpreted=True),
    Backend("triton", "triton", "cuda"),
    Backend("cuda", "cuda", "cuda"),
)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # a second thread spins on a shared machine and gains nothing here
    for line in (
        "contract(gradient, rowwise, samples, ops): only ops with a gradient, ops whose results "
        "have an entry for each row, these samples (or a family's selection by name), these ops",
    ):
        config.addinivalue_line("markers", line)
    for line in (
        # triton's interpreter computes padding lanes and rows of NaN with numpy
        "ignore:.*encountered in.*:RuntimeWarning:triton.runtime.interpreter",
        "ignore:All-NaN slice encountered:RuntimeWarning",
        "ignore:overflow encountered in reduce:RuntimeWarning",
        "ignore:.*enable_fp_fusion.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


# ---- contract cases: `spec`, `sample`, `backend`, `dtype` are parameters of the tests that ask ---

PARAMETERS = ("spec", "backend", "sample", "dtype")


def _cases(names: list[str], only: dict[str, Any]) -> Iterator[Any]:
    """One param for each combination that exists; an op that a backend lacks is skipped once."""
    chosen, ops = only.get("samples"), only.get("ops")
    for spec in clam_kernels.all_ops():
        if (only.get("gradient") and spec.gradient is None) or (ops and spec.name not in ops):
            continue
        if only.get("rowwise") and not testing.is_rowwise(spec.name):
            continue
        named = testing.selection(spec.name, chosen) if isinstance(chosen, str) else chosen
        rows = [s for s in testing.samples(spec.name) if named is None or s.name in named]
        for one in BACKENDS if "backend" in names else BACKENDS[:1]:
            why = one.why_not(spec)
            labels = [spec.name, *([one.id] if "backend" in names else [])]
            if why is not None:
                skip = pytest.mark.skip(reason=f"{spec.name} on {one.id}: {why}")
                values = [{"spec": spec, "backend": one}.get(n) for n in names]
                yield pytest.param(*values, id="-".join(labels), marks=skip)
                continue
            for row in rows if "sample" in names else [None]:
                dtypes = [t for t in one.dtypes if row is None or t in row.dtypes]
                for dtype in dtypes if "dtype" in names else [None]:
                    given = {"spec": spec, "backend": one, "sample": row, "dtype": dtype}
                    words = [row.name] if row is not None else []
                    words += [str(dtype).removeprefix("torch.")] if dtype is not None else []
                    yield pytest.param(*(given[n] for n in names), id="-".join([*labels, *words]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [n for n in PARAMETERS if n in metafunc.fixturenames]
    if "spec" not in names:
        return
    mark = metafunc.definition.get_closest_marker("contract")
    cases = list(_cases(names, mark.kwargs if mark else {}))
    metafunc.parametrize(names, cases, indirect=["backend"] if "backend" in names else False)


_patched: list[None] = []


def _patch_once() -> None:
    """Half of the interpreter's time goes into patching triton's language anew for every call of a
    jit function inside another; the first call that saw these modules has done it.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    real, done = interpreter._patch_lang, set()

    class Scope:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            done.clear()
            self.scope.restore()

    def patch(fn: Any) -> Any:
        language = (interpreter.tl, interpreter.tl.core)
        modules = {id(x) for x in fn.__globals__.values() if any(x is one for one in language)}
        if modules <= done:
            return None  # a device function's, which is never restored
        done.update(modules)
        return Scope(real(fn))

    interpreter._patch_lang = patch


# What the interpreter is slow at is `slow`, but for these layouts and samples: `make
# test-interpreted` runs all of it.
SLOW_INTERPRETED = {
    "test_inputs": ("strided", ("plain", "batch-crossed")),
    "test_upstream_gradients": ("transposed", ("everything", "one-dead")),
    "test_a_row_has_the_same_bits_wherever_it_stands": (None, ()),
    "test_op": (None, ("plain", "everything")),
    "test_far_from_the_origin": (None, ()),
    "test_narrow_and_wide": (None, ()),
    "test_huge_and_tiny_scores": (None, ()),
}


# A call of these families is a dozen launches or more, each as long as there are problems: `slow`
# are all but these samples, unless it is to be right once in float32, the longest even then, and
# all but the first in float16, which is one load more.
FEW_INTERPRETED = {"sinkhorn": ("plain", "bias")}
LONG_INTERPRETED = ("batch-crossed", "ten-iterations")


def _is_one_of_many(params: dict[str, Any], test: str) -> bool:
    spec, sample = params.get("spec"), params.get("sample")
    few = FEW_INTERPRETED.get(spec.family) if spec is not None else None
    if few is None:
        return False
    if params.get("dtype") == torch.float16 and getattr(sample, "name", None) != few[0]:
        return True
    if sample is None or sample.name in few:
        return False
    return test != "test_samples" or sample.name in LONG_INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        given = getattr(item, "callspec", None)
        one = given.params.get("backend") if given else None
        kept = SLOW_INTERPRETED.get(getattr(item, "originalname", ""))
        if not isinstance(one, Backend) or not one.interpreted:
            continue
        if _is_one_of_many(given.params, getattr(item, "originalname", "")):
            item.add_marker(pytest.mark.slow)
        if kept is None:
            continue
        layout, samples = given.params.get("layout"), kept[1]
        sample = getattr(given.params.get("sample"), "name", None)
        if sample not in samples or (kept[0] and layout != kept[0]):
            item.add_marker(pytest.mark.slow)


class Guard:
    """Outputs and scratch of kernels begin as NaN and lie between bands that nobody may touch."""

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


def skip_what_the_limits_refuse(one: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that the declared limits of the backend under test exclude skips its test, with their
    reason; nothing else that the call may die of does.
    """
    real = choice.why_not

    def why_not(spec: Any, name: str, device: str, arguments: tuple[Any, ...] = ()) -> str | None:
        reason = real(spec, name, device, arguments)
        if reason is not None and name == one.name and real(spec, name, device) is None:
            pytest.skip(f"{one.id}: {reason}")
        return reason

    monkeypatch.setattr(choice, "why_not", why_not)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend under test, forced for every op that the test calls."""
    guard = Guard()
    skip_what_the_limits_refuse(request.param, monkeypatch)
    if request.param.interpreted and not _patched:
        _patched.append(_patch_once())
    # opcheck and its neighbours ask where in its storage an output lies
    guarded = request.node.path.name != "test_opcheck.py"
    if request.param.name == "triton" and guarded:
        launch = importlib.import_module("clam_kernels.kernels._launch")
        monkeypatch.setattr(launch, "empty", guard.empty)
    with clam_kernels.backend(request.param.name):
        yield request.param
    guard.check()


@pytest.fixture
def ran() -> Iterator[list[tuple[str, str]]]:
    """(op, backend) of everything that ran since the test began."""
    seen: list[tuple[str, str]] = []

    def observe(op: str, name: str) -> None:
        seen.append((op, name))

    choice.observers.append(observe)
    yield seen
    choice.observers.remove(observe)


# ---- a suite that skips everything must not look green
# -----------------------------------------------

_executed: Counter[str] = Counter()


def shortfall(executed: Counter[str], minimum: int = MINIMUM) -> list[str]:
    """One line for each op with fewer executed contract cases than `minimum`."""
    return [
        f"{spec.name}: {executed[spec.name]} contract cases ran, expected at least {minimum}"
        for spec in clam_kernels.all_ops()
        if executed[spec.name] < minimum
    ]


def is_whole(config: pytest.Config) -> bool:
    """Whether this run was meant to cover all of tests/contract."""
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
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if is_whole(session.config) and exitstatus == 0 and shortfall(_executed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _executed:
        ran_cases = ", ".join(f"{op} {count}" for op, count in sorted(_executed.items()))
        terminalreporter.write_line(f"contract cases executed: {ran_cases}")
    if is_whole(config):
        for line in shortfall(_executed):
            terminalreporter.write_line(f"ERROR: {line}", red=True)
