# SPDX-License-Identifier: Apache-2.0
"""Data and checks for the tests and benches of all ops: samples, workloads, the accuracy rule, peak
memory.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._core.checks import FLOAT_NAMES
from .._core.spec import OpSpec, all_ops

# What an error says that it expected where a dtype is wrong.
FLOATS = f"dtype {FLOAT_NAMES}"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """The arguments of one call, in schema order; trailing defaults, such as precision, may be
    missing.

    `differentiable` names the tensors whose gradient finite differences confirm; `kinks` those at
    the border of the domain (beta = 0, E = +inf), where finite differences do not exist. `dtypes`
    are the dtypes in which the values of the floating tensors make sense.
    """

    op: str
    name: str
    args: tuple[Any, ...]
    differentiable: tuple[str, ...] = ()
    kinks: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> Sample:
        """The same call with every floating tensor in a dtype, on a device."""
        return replace(self, args=tuple(_cast(a, dtype, device) for a in self.args))


@dataclass(frozen=True)
class Workload:
    """A call that benches time; `bytes` and `flops` are the least that it needs."""

    name: str
    op: str
    make: Callable[[int], tuple[Any, ...]]
    bytes: int
    flops: int


@dataclass(frozen=True)
class BadCall:
    """A call that must raise: its arguments, the error, and the exact text.

    `where` says what raises: "op" in every mode, "values" where values are readable (on a CPU),
    "function" only the documented function, for types that the dispatcher refuses first.
    """

    op: str
    name: str
    error: type[Exception]
    text: str
    make: Callable[[], tuple[Any, ...]]
    where: str = "op"


# Name, ops, error, text, and the arguments that differ from the plain ones.
BadRow = tuple[str, tuple[str, ...], type[Exception], str, Mapping[str, Callable[[], Any]]]


@dataclass(frozen=True)
class Values:
    """The results of a call, and its gradients for one fixed upstream gradient."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


def _cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def spec_of(op: str) -> OpSpec:
    """The declaration of an op by name."""
    return next(spec for spec in all_ops() if spec.name == op)


def argument_names(op: str) -> tuple[str, ...]:
    """Names of an op's arguments in schema order."""
    spec = spec_of(op)
    overload = next(iter(spec.overloads)) or "default"
    return tuple(a.name for a in getattr(spec.packet, overload)._schema.arguments)


def _family(op: str) -> Any:
    return importlib.import_module(f"{__name__}.{spec_of(op).family}")


def _on_cpu(make: Callable[P, T]) -> Callable[P, T]:
    """Run a function with the CPU as torch's default device."""

    @functools.wraps(make)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return wrapped


@_on_cpu
def samples(op: str, seed: int = 0) -> list[Sample]:
    """Calls of an op that together reach every branch; new float64 tensors on the CPU. Another seed
    draws other numbers for the same calls.
    """
    result: list[Sample] = _family(op).samples(op, seed)
    return result


def workloads(op: str | None = None) -> list[Workload]:
    """Calls that benches time, of one op or of all."""
    families = {spec.family: _family(spec.name) for spec in all_ops()}
    result: list[Workload] = [w for family in families.values() for w in family.workloads()]
    return [w for w in result if op in (None, w.op)]


def eager(op: str) -> Callable[..., Any]:
    """Plain torch as users write it, for the accuracy rule; the truth where a family has no
    other.
    """
    plain: Callable[..., Any] = getattr(_family(op), "EAGER", {}).get(op, spec_of(op).truth)
    return plain


# ---- what the contract tests read from a family --------------------------------------------------


@_on_cpu
def problem(
    op: str,
    n: int,
    k: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Sample:
    """A plain call of n rows, k prototypes and d features, with numbers where an argument may be
    one.
    """
    result: Sample = _family(op).problem(op, n, k, d, seed)
    return result.cast(dtype, device)


@_on_cpu
def large(
    op: str,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    n: int = 1000,
    k: int = 64,
    d: int = 16,
    offset: float = 0.0,
    seed: int = 0,
) -> Sample:
    """Rows around k prototypes, shifted by `offset`, with tensors where an argument may be one."""
    result: Sample = _family(op).large(op, n, k, d, offset, seed)
    return result.cast(dtype, device)


def bad_calls(op: str | None = None) -> list[BadCall]:
    """Calls that must raise, of one op or of all."""
    families = {spec.family: _family(spec.name) for spec in all_ops()}
    result = [
        bad for family in families.values() for bad in _bad_calls_of(family.PLAIN, family.BAD_CALLS)
    ]
    return [bad for bad in result if op in (None, bad.op)]


def _bad_calls_of(
    plain: Mapping[str, Callable[[], Any]], tables: Mapping[str, Sequence[BadRow]]
) -> list[BadCall]:
    """The bad calls of a family's tables: each row for each of its ops. The keys of `tables` are
    values of `BadCall.where`.
    """
    result = []
    for where, rows in tables.items():
        for name, ops, error, text, changed in rows:
            for op in ops:

                def make(op: str = op, changed: Any = changed) -> tuple[Any, ...]:
                    return tuple({**plain, **changed}[x]() for x in argument_names(op))

                result.append(BadCall(op, name, error, text, make, where))
    return result


def constants(**values: Any) -> dict[str, Callable[[], Any]]:
    """Arguments of a row that are constants."""
    return {name: partial(_return, value) for name, value in values.items()}


def _return(value: Any) -> Any:
    return value


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """An argument of zeros, created when the test runs, perhaps on meta."""
    return lambda: torch.zeros(shape, dtype=dtype)


def selection(op: str, kind: str) -> tuple[str, ...]:
    """Names of the samples for a check that takes too long for all of them."""
    result: tuple[str, ...] = _family(op).SELECTIONS.get(kind, ())
    return result


def row_dims(op: str) -> dict[str, int]:
    """The arguments with a dim of rows, and that dim, counted from the end: the first without batch
    dims, unless a family says another.
    """
    core, rows = spec_of(op).core or {}, _family(op).ROW_ARGUMENTS
    dims = rows if isinstance(rows, Mapping) else {name: -core.get(name, 0) for name in rows}
    return {name: dim for name, dim in dims.items() if name in argument_names(op)}


def is_rowwise(op: str) -> bool:
    """Whether each row of the results depends on one row of the first argument only."""
    return op not in _family(op).COUPLED


def result_dtypes(op: str, dtype: torch.dtype) -> list[torch.dtype]:
    """The dtypes of the results for rows of a dtype."""
    result: list[torch.dtype] = _family(op).result_dtypes(op, dtype)
    return result


def result_scale(op: str, index: int) -> float:
    """The size of the terms of a result that is a small difference; 0 if the result's own size is
    the scale.
    """
    scales: tuple[float, ...] = getattr(_family(op), "SCALES", ())
    return scales[index] if scales else 0.0


def schemas() -> str:
    """The schemas of all public ops, one a line: the text of docs/schemas.txt."""
    lines = [
        str(getattr(spec.packet, overload or "default")._schema)
        for spec in all_ops()
        for overload in spec.overloads
    ]
    return "\n".join(lines) + "\n"


@_on_cpu
def upstream(outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """A gradient for each output, the same for equal shapes, dtypes and seeds."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)
        for o in outputs
    ]


def _with_gradient(op: str) -> int:
    """How many of an op's results have a gradient, the first ones."""
    gradient = spec_of(op).gradient
    return 0 if gradient is None else len(gradient.outputs)


def leaves_of(args: Sequence[Any]) -> list[Any]:
    """The arguments, with a copy that requires a gradient for each floating tensor."""
    return [
        a.detach().clone().requires_grad_()
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]


def single(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """An op, or its truth, with one result: all results that have a gradient, concatenated."""
    count = _with_gradient(op)
    if count < 2:
        return function
    return lambda *args: torch.cat(function(*args)[:count], -1)


def evaluate(
    function: Callable[..., Any],
    sample: Sample,
    wanted: Sequence[str] = (),
    grads: Sequence[Tensor] | None = None,
) -> Values:
    """Call a function on a sample, and differentiate it by the arguments in `wanted`."""
    names = argument_names(sample.op)
    args = [
        a.detach().clone().requires_grad_() if name in wanted else a
        for name, a in zip(names, sample.args, strict=False)
    ]
    out = function(*args)
    outputs: tuple[Tensor, ...] = out if isinstance(out, tuple) else (out,)
    if not wanted:
        return Values(outputs, {})
    leaves = [args[names.index(name)] for name in wanted]
    smooth = outputs[: _with_gradient(sample.op)]
    grads = upstream(smooth) if grads is None else grads
    # the truth of one result may be a constant
    pairs = [(o, g.to(o)) for o, g in zip(smooth, grads, strict=False) if o.requires_grad]
    # dot products, because `grad` imports sympy at its first call with upstream gradients
    weighted = [torch.dot(o.flatten(), g.flatten()) for o, g in pairs]
    result = torch.autograd.grad(weighted, leaves, allow_unused=True)
    # the truth may not depend on an argument (beta for T = 0): its gradient is 0
    filled = [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(result, leaves, strict=True)
    ]
    return Values(tuple(o.detach() for o in outputs), dict(zip(wanted, filled, strict=True)))


def _compare(actual: Tensor, truth64: Tensor, eager: Tensor) -> tuple[float, float, float]:
    """(largest error, largest error of eager, largest value); AssertionError if shapes, dtypes,
    integers, NaN or inf differ.
    """
    if actual.shape != truth64.shape:
        raise AssertionError(f"shape {list(actual.shape)}, truth {list(truth64.shape)}")
    if actual.dtype != eager.dtype:
        raise AssertionError(f"dtype {actual.dtype}, eager {eager.dtype}")
    if not actual.is_floating_point():
        if not torch.equal(actual, truth64):
            raise AssertionError(f"{int((actual != truth64).sum())} entries differ")
        return 0.0, 0.0, 0.0
    exact, result, plain = truth64.double(), actual.double(), eager.double()
    regular = exact.isfinite()
    for kind, here, there in (
        ("NaN", result.isnan(), exact.isnan()),
        ("+inf", result == torch.inf, exact == torch.inf),
        ("-inf", result == -torch.inf, exact == -torch.inf),
    ):
        if not torch.equal(here, there):
            raise AssertionError(f"{kind} at {int(here.sum())} entries, not {int(there.sum())}")
    if not bool(regular.any()):
        return 0.0, 0.0, 0.0
    exact, result, plain = exact[regular], result[regular], plain[regular]
    error, eager_error = (float((x - exact).abs().max()) for x in (result, plain))
    return error, eager_error, float(exact.abs().max())


def _unit(actual: Tensor, eps: float | None) -> float:
    if eps is not None:
        return eps
    return torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0


def assert_close(
    actual: Tensor,
    truth64: Tensor,
    eager: Tensor,
    *,
    what: str = "",
    scale: float = 0.0,
    eps: float | None = None,
) -> None:
    """Assert that a result is as accurate as plain torch in the same dtype.

    The largest error against `truth64`, the float64 result of the same inputs, may be twice that of
    `eager`, the centred truth in the dtype of `actual`, plus 4 eps times the scale: the largest
    entry of the truth, or `scale` if that is larger (a sum whose terms cancel). For float64 the
    bound is 1e-12 of the scale, unless `eps` is that of the arithmetic. NaN and inf must be at the
    same entries as in the truth; integers must be equal.
    """
    assert_close_on_average([(actual, truth64, eager)], what=what, scale=scale, eps=eps)


def assert_close_on_average(
    triples: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    what: str = "",
    scale: float = 0.0,
    eps: float | None = None,
) -> None:
    """`assert_close` of several draws of one call: the geometric mean of error / allowed is <= 1.

    One rounding error is random, in plain torch too: for two orders of summation the largest of a
    few errors differ by factors of 0.3 to 3. No draw may exceed 8 times the allowed error.
    """
    prefix = f"{what}: " if what else ""
    shares, message = [], ""
    for triple in triples:
        try:
            error, eager, size = _compare(*triple)
        except AssertionError as mismatch:
            raise AssertionError(f"{prefix}{mismatch}") from None
        size = max(scale, size)
        double = eps is None and triple[0].dtype in (torch.float64, torch.int64)
        allowed = 1e-12 * size if double else 2 * eager + 4 * _unit(triple[0], eps) * size
        shares.append(max(error, 1e-3 * allowed) / allowed if error > 0 else 1e-3)
        if shares[-1] == max(shares):
            message = f"error {error:.3g} > {allowed:.3g} (eager {eager:.3g}, scale {size:.3g})"
    mean = math.exp(sum(map(math.log, shares)) / len(shares))
    if not (mean <= 1 and max(shares) <= 8):
        raise AssertionError(
            f"{prefix}{message}, {len(shares)} draws: mean {mean:.3g} of the allowed"
        )


def peak_bytes(call: Callable[[], object]) -> int:
    """The peak of the bytes that a call allocates on the CPU.

    torch.profiler reads them from the allocator: a dispatch mode and tracemalloc do not see the
    allocations inside an op.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with warnings.catch_warnings():
        # torch 2.10 and 2.11 warn about cycles even for a single one; acc_events avoids the
        # warning, but builds a tree of all events, which takes ten times as long as the call
        warnings.filterwarnings("ignore", ".*acc_events", UserWarning)
        profile = torch.profiler.profile(activities=activities, profile_memory=True)
        with profile:
            result = call()
    del result
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if re.fullmatch(r"\[memory\]", e.name())]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
