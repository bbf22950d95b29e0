# SPDX-License-Identifier: Apache-2.0
"""Every error message, verbatim: in eager mode, under FakeTensorMode and on meta; then the errors
that Python itself raises.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import clam_kernels as ck
from clam_kernels import testing


def _rows(*where: str) -> Any:
    """The bad calls of these ops, as parameters (op, bad)."""
    rows = [bad for bad in testing.bad_calls() if bad.where in where]
    ids = [f"{bad.op}-{bad.name}" for bad in rows]
    return pytest.mark.parametrize(
        ("case", "bad"), [(testing.spec_of(bad.op), bad) for bad in rows], ids=ids
    )


@contextlib.contextmanager
def _mode(name: str) -> Any:
    context = {"eager": contextlib.nullcontext, "fake": FakeTensorMode}.get(name)
    with torch.device("meta") if context is None else context():
        yield


def _as_leaves(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def _call_function(spec: Any, args: tuple[Any, ...]) -> Any:
    """Call the documented function, its options by keyword."""
    by_name = dict(zip(testing.argument_names(spec.name), args, strict=True))
    options = [
        name
        for name, p in inspect.signature(spec.function).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    keywords = {name: by_name.pop(name) for name in options}
    return spec.function(*by_name.values(), **keywords)


@pytest.mark.parametrize("mode", ["eager", "inference", "grad", "fake", "meta"])
@_rows("op")
def test_torch_ops(case, bad, mode):
    with contextlib.ExitStack() as stack:
        stack.enter_context(_mode(mode if mode in ("fake", "meta") else "eager"))
        if mode == "inference":
            stack.enter_context(torch.inference_mode())
        args = _as_leaves(bad.make()) if mode == "grad" else bad.make()
        with pytest.raises(bad.error) as caught:
            case.packet(*args)
    assert type(caught.value) is bad.error
    assert str(caught.value) == bad.text


@_rows("op", "values")
def test_the_function_says_the_same(case, bad):
    with pytest.raises(bad.error) as caught:
        _call_function(case, bad.make())
    assert str(caught.value) == bad.text


@_rows("function")
def test_types(case, bad):
    """Types that the dispatcher would refuse in its own words, or convert."""
    with pytest.raises(TypeError) as caught:
        _call_function(case, bad.make())
    assert str(caught.value) == bad.text


@_rows("op")
def test_transforms_say_the_same(case, bad):
    """Where the truth runs in place of the op, the check still comes first."""
    first, *rest = bad.make()
    if not first.is_floating_point():
        with pytest.raises(bad.error, match=_start(bad.text)):
            case.packet(first, *rest)
        return
    with pytest.raises(bad.error) as caught:
        torch.func.grad(lambda x: case.packet(x, *rest).sum())(first)
    assert str(caught.value) == bad.text


@_rows("op")
def test_a_bad_call_is_refused_after_a_good_one(case, bad):
    """The cache of checked calls has everything of the arguments that the checks read."""
    case.packet(*testing.samples(case.name)[0].args)
    args = bad.make()
    with contextlib.suppress(Exception):  # new tensors of the same shapes and dtypes
        case.packet(*(torch.ones_like(a) if isinstance(a, Tensor) else a for a in args))
    for _ in range(2):
        with pytest.raises(bad.error) as caught:
            case.packet(*args)
        assert bad.text in str(caught.value)


def _start(text: str) -> str:
    return re.escape(text)


def test_every_op_has_rows_in_the_table():
    """The table has a refusal of each kind for each op: types, shapes, batch dims, values."""
    for spec in ck.all_ops():
        rows = [bad for bad in testing.bad_calls(spec.name) if bad.where == "op"]
        assert len(rows) >= 15, spec.name
        assert {bad.error for bad in rows} == {TypeError, ValueError}
        assert len({bad.name for bad in rows}) == len(rows), spec.name
        assert all(any(word in bad.text for bad in rows) for word in ("leading dims", "shape"))
        assert any(bad.where == "function" for bad in testing.bad_calls(spec.name))


# ---- values: read on the CPU only
# -----------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@_rows("values")
def test_values(case, bad, grad):
    args = _as_leaves(bad.make()) if grad else bad.make()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared whole
        case.packet(*args)
    assert str(caught.value) == bad.text
    for mode in ("fake", "meta"):  # fake and meta tensors have no values to check
        with _mode(mode):
            out = case.packet(*bad.make())
            assert (out[0] if isinstance(out, tuple) else out).shape[-1] > 0


# ---- devices
# --------------------------------------------------------------------------------------------


def test_devices(spec):
    """Each tensor after the first in turn on another device, in an otherwise correct call."""
    names = testing.argument_names(spec.name)
    others = {name for name in spec.core if name != names[0]}
    for sample in testing.samples(spec.name):
        for i, (name, a) in enumerate(zip(names, sample.args, strict=False)):
            if name not in others or not isinstance(a, Tensor):
                continue
            args = [*sample.args[:i], a.to("meta"), *sample.args[i + 1 :]]
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                spec.packet(*args)
            assert str(caught.value) == f"{name}: expected device cpu to match {names[0]}, got meta"
            others.remove(name)
    assert not others & set(names), "no sample has these"


def test_sparse_and_other_devices_have_no_kernel(spec):
    first, *rest = testing.problem(spec.name, 5, 4, 3).args
    with pytest.raises(NotImplementedError, match=f"clam::{spec.name}"):
        spec.packet(first.to_sparse(), *rest)


# ---- errors of the Python functions
# -------------------------------------------------------------------


def test_options_are_keywords(spec):
    """Python itself refuses a mask in the place of the step."""
    op = getattr(spec.packet, [*spec.overloads][-1] or "default")
    parameters = inspect.signature(spec.function).parameters
    for argument in op._schema.arguments:
        kind = parameters[argument.name].kind
        assert (kind is inspect.Parameter.KEYWORD_ONLY) == argument.has_default_value()


# ---- backends
# -------------------------------------------------------------------------------------------


def test_backend_names(spec, monkeypatch):
    with pytest.raises(ValueError) as caught, ck.backend("gpu"):  # noqa: PT011
        pass
    assert str(caught.value) == "backend: expected 'reference', 'triton', 'cuda' or None, got 'gpu'"
    monkeypatch.setenv("CLAM_BACKEND", "fast")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        spec.packet(*testing.problem(spec.name, 5, 4, 3).args)
    assert (
        str(caught.value)
        == "CLAM_BACKEND: expected 'reference', 'triton', 'cuda' or None, got 'fast'"
    )


def test_a_forced_backend_never_falls_back(spec, monkeypatch):
    """An op without kernels, in any build."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("triton", "cuda"):
        for table in (spec.kernels, *([spec.gradient.saved_kernels] if spec.gradient else [])):
            monkeypatch.delitem(table, name, raising=False)
        text = f"backend '{name}' cannot run clam::{spec.name}: the op has no {name} kernel"
        args = testing.samples(spec.name)[0].args
        with ck.backend(name):
            v = args[0].clone().requires_grad_()
            for call in (
                lambda args=args: spec.packet(*args),
                lambda v=v, args=args: spec.packet(v, *args[1:]),
                lambda: ck.explain(spec.name),
            ):
                with pytest.raises(RuntimeError) as caught:
                    call()
                assert str(caught.value) == text
        monkeypatch.setenv("CLAM_BACKEND", name)
        with pytest.raises(RuntimeError, match=_start(text)):
            spec.packet(*args)
        with ck.backend("reference"):  # the block overrides the environment
            spec.packet(*args)
        monkeypatch.delenv("CLAM_BACKEND")


def test_the_cuda_library_needs_triton(monkeypatch):
    """Triton computes the rows that the library leaves; without it the reference runs."""
    from clam_kernels._core import backend as choice

    monkeypatch.setattr(choice.library, "why_unavailable", lambda: None)
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    spec = testing.spec_of("am_recursion")
    reason = "triton is not installed"
    assert choice.why_not(spec, "cuda", "cuda") == reason
    assert choice.choose(spec, "cuda") == ("reference", f"cuda: {reason}; triton: {reason}")


def test_backend_is_restored():
    from clam_kernels._core import backend as choice

    with ck.backend("reference"):
        with ck.backend("cuda"):
            assert choice.requested() == "cuda"
            with ck.backend(None):
                assert choice.requested() == "auto"
        assert choice.requested() == "reference"
        with contextlib.suppress(KeyError), ck.backend("triton"):
            raise KeyError
        assert choice.requested() == "reference"
    assert choice.requested() == "auto"


def test_a_backend_of_gpus_is_refused_on_a_cpu(spec, monkeypatch):
    from clam_kernels._core import backend as choice

    monkeypatch.setattr(choice, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = "the device is cpu, not a GPU" if spec.kernels else "the op has no triton kernel"
    with ck.backend("triton"), pytest.raises(RuntimeError) as caught:
        ck.explain(spec.name)
    assert str(caught.value) == f"backend 'triton' cannot run clam::{spec.name}: {why}"


def test_explain(spec):
    args = testing.problem(spec.name, 5, 4, 3).args
    line = f"clam::{spec.name}: reference at highest precision (the tensors are on cpu)"
    assert ck.explain(spec.name) == line.replace(
        "the tensors are on cpu", "no tensors: the choice for a CPU"
    )
    assert ck.explain(spec.function, *args) == line
    assert ck.explain(spec.packet, *args) == line
    with ck.backend("reference"):
        assert ck.choice(spec.name).reason == "forced"
    if spec.precise:
        low = "medium (float32 on a CPU)"
        assert ck.explain(spec.packet, *args, "medium") == line.replace("highest", low)
        with pytest.raises(ValueError, match="precision: expected"):
            ck.explain(spec.name, *args, "best")
    names = ", ".join(ck.list_ops())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ck.explain(f"{spec.name}p")
    assert str(caught.value) == f"op: expected one of {names}, got {spec.name}p"
