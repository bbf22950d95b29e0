# SPDX-License-Identifier: Apache-2.0
"""What tests and benches need of every op: samples, workloads, the accuracy rule, peak memory."""

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

from .._core.spec import OpSpec, all_ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, in schema order; trailing defaults, precision among them, may lack.

    `differentiable` names the tensors whose gradient the truth has and finite differences confirm;
    `kinks` those whose gradient exists at the border of the domain only (beta = 0, E = +inf).
    `dtypes` are the dtypes that hold the floating tensors.
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
    """A call of a size that is worth timing; `bytes` and `flops` are the least it can do."""

    name: str
    op: str
    make: Callable[[int], tuple[Any, ...]]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Bad:
    """A call that must be refused: what it is given, the error and its text, verbatim.

    `where` says who refuses it: "op" in every mode, "values" where a tensor's values are read (on a
    CPU), "function" the documented function alone, for types that the dispatcher words itself.
    """

    op: str
    name: str
    error: type[Exception]
    text: str
    make: Callable[[], tuple[Any, ...]]
    where: str = "op"


# Name, ops, error, text, and what is not plain.
Row = tuple[str, tuple[str, ...], type[Exception], str, Mapping[str, Callable[[], Any]]]


@dataclass(frozen=True)
class Values:
    """What a call returned, and the gradients for one fixed upstream gradient."""

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
    """What a family makes lies on the CPU, whatever torch's default device is."""

    @functools.wraps(make)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return wrapped


@_on_cpu
def samples(op: str, seed: int = 0) -> list[Sample]:
    """Calls of an op that between them reach every branch; float64, on the CPU, new at every call.

    Another seed draws other numbers for the same calls.
    """
    found: list[Sample] = _family(op).samples(op, seed)
    return found


def workloads(op: str | None = None) -> list[Workload]:
    """Calls worth timing, of one op or of all."""
    families = {spec.family: _family(spec.name) for spec in all_ops()}
    found: list[Workload] = [w for family in families.values() for w in family.workloads()]
    return [w for w in found if op in (None, w.op)]


def eager(op: str) -> Callable[..., Any]:
    """Plain torch as users write it, which the accuracy rule compares with; mostly the truth."""
    plain: Callable[..., Any] = getattr(_family(op), "EAGER", {}).get(op, spec_of(op).truth)
    return plain


# ---- what the contract asks a family for ---------------------------------------------------------


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
    """A plain call of n rows, k prototypes and d features; what can be a number is one."""
    found: Sample = _family(op).problem(op, n, k, d, seed)
    return found.cast(dtype, device)


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
    """Rows around k prototypes, all `offset` from the origin; what can be a tensor is one."""
    found: Sample = _family(op).large(op, n, k, d, offset, seed)
    return found.cast(dtype, device)


def bad_calls(op: str | None = None) -> list[Bad]:
    """Calls that must be refused, of one op or of all."""
    families = {spec.family: _family(spec.name) for spec in all_ops()}
    found: list[Bad] = [bad for family in families.values() for bad in family.bad_calls()]
    return [bad for bad in found if op in (None, bad.op)]


def refusals(
    plain: Mapping[str, Callable[[], Any]], tables: Mapping[str, Sequence[Row]]
) -> list[Bad]:
    """Each row of a family's tables for each of its ops; `tables` are named as `Bad.where`."""
    found = []
    for where, rows in tables.items():
        for name, ops, error, text, changed in rows:
            for op in ops:

                def make(op: str = op, changed: Any = changed) -> tuple[Any, ...]:
                    return tuple({**plain, **changed}[x]() for x in argument_names(op))

                found.append(Bad(op, name, error, text, make, where))
    return found


def given(**values: Any) -> dict[str, Callable[[], Any]]:
    """Arguments of a row that are not made anew."""
    return {name: partial(_same, value) for name, value in values.items()}


def _same(value: Any) -> Any:
    return value


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """A tensor of a row; made where the test runs, which may be on meta."""
    return lambda: torch.zeros(shape, dtype=dtype)


def selection(op: str, kind: str) -> tuple[str, ...]:
    """Names of the samples that a dear check is run on, where all of them would take too long."""
    found: tuple[str, ...] = _family(op).SELECTIONS.get(kind, ())
    return found


def row_dims(op: str) -> dict[str, int]:
    """The arguments that have the dim of the rows, and which it is, counted from the end."""
    core = spec_of(op).core or {}
    return {name: -core[name] for name in _family(op).ROW_ARGUMENTS if name in argument_names(op)}


def is_rowwise(op: str) -> bool:
    """Whether an entry of every result belongs to one row of the first argument."""
    return op not in _family(op).COUPLED


def result_dtypes(op: str, dtype: torch.dtype) -> list[torch.dtype]:
    """The dtypes of the results for rows of a dtype."""
    found: list[torch.dtype] = _family(op).result_dtypes(op, dtype)
    return found


def result_scale(op: str, index: int) -> float:
    """The size of the terms of a result that is what they leave; 0 where the result has its own."""
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


def single(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """An op, or its truth, with one result: those that have a gradient, side by side."""
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
    """Call a function on a sample, and differentiate it by the arguments named."""
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
    # one number for each result, as gradients handed to `grad` import sympy at the first call
    weighted = [torch.dot(o.flatten(), g.flatten()) for o, g in pairs]
    found = torch.autograd.grad(weighted, leaves, allow_unused=True)
    # the truth may not depend on an argument at all (beta where T = 0): its gradient is 0
    filled = [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
    ]
    return Values(tuple(o.detach() for o in outputs), dict(zip(wanted, filled, strict=True)))


def _compare(actual: Tensor, truth64: Tensor, eager: Tensor) -> tuple[float, float, float]:
    """(error, eager's error, scale), each a maximum; AssertionError for what no tolerance
    covers.
    """
    if actual.shape != truth64.shape:
        raise AssertionError(f"shape {list(actual.shape)}, truth {list(truth64.shape)}")
    if actual.dtype != eager.dtype:
        raise AssertionError(f"dtype {actual.dtype}, eager {eager.dtype}")
    if not actual.is_floating_point():
        if not torch.equal(actual, truth64):
            raise AssertionError(f"{int((actual != truth64).sum())} entries differ")
        return 0.0, 0.0, 0.0
    exact, found, plain = truth64.double(), actual.double(), eager.double()
    regular = exact.isfinite()
    for kind, here, there in (
        ("NaN", found.isnan(), exact.isnan()),
        ("+inf", found == torch.inf, exact == torch.inf),
        ("-inf", found == -torch.inf, exact == -torch.inf),
    ):
        if not torch.equal(here, there):
            raise AssertionError(f"{kind} at {int(here.sum())} entries, not {int(there.sum())}")
    if not bool(regular.any()):
        return 0.0, 0.0, 0.0
    exact, found, plain = exact[regular], found[regular], plain[regular]
    error, eager_error = (float((x - exact).abs().max()) for x in (found, plain))
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
    """Hold a result to the accuracy of plain torch in the same dtype.

    The largest error against `truth64`, the float64 result of the same inputs, may be twice that of
    `eager`, the centred truth run in the dtype of `actual`, plus 4 eps of the scale: the largest
    entry of the truth, or `scale` where that is more (a sum whose terms cancel). float64 itself is
    held to 1e-12 of the scale, unless `eps` names the arithmetic it was computed in. NaN and inf
    must stand where the truth's do; integers must be equal.
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

    One rounding error is luck, in plain torch too: between two orders of summation the largest of
    a few errors differ by factors of 0.3 to 3. No draw may exceed what is allowed eight times.
    """
    prefix = f"{what}: " if what else ""
    shares, said = [], ""
    for triple in triples:
        try:
            error, eager, size = _compare(*triple)
        except AssertionError as failed:
            raise AssertionError(f"{prefix}{failed}") from None
        size = max(scale, size)
        double = eps is None and triple[0].dtype in (torch.float64, torch.int64)
        allowed = 1e-12 * size if double else 2 * eager + 4 * _unit(triple[0], eps) * size
        shares.append(max(error, 1e-3 * allowed) / allowed if error > 0 else 1e-3)
        if shares[-1] == max(shares):
            said = f"error {error:.3g} > {allowed:.3g} (eager {eager:.3g}, scale {size:.3g})"
    mean = math.exp(sum(map(math.log, shares)) / len(shares))
    if not (mean <= 1 and max(shares) <= 8):
        raise AssertionError(f"{prefix}{said}, {len(shares)} draws: mean {mean:.3g} of the allowed")


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that a call holds at once beside what lay there before it, on the CPU.

    Read from the allocator through torch.profiler: a dispatch mode and tracemalloc see nothing of
    what an op allocates inside.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with warnings.catch_warnings():
        # torch 2.10 and 2.11 warn of cycles even where there is one; acc_events, which stops that,
        # builds a tree of all events and takes ten times as long as the call
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
