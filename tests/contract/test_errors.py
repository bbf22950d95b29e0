# SPDX-License-Identifier: Apache-2.0
"""Every message, verbatim: in eager, under FakeTensorMode and on meta; then what Python refuses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import clam_kernels as ck
from clam_kernels import testing

STEP_LIKE = ("am_step", "am_recursion")
WITH_BETA = (*STEP_LIKE, "am_energy")
EVERY = (*WITH_BETA, "am_assign")
PLAIN: dict[str, Callable[[], Any]] = {
    "v": lambda: torch.zeros(5, 3),
    "rho": lambda: torch.ones(4, 3),
    "beta": lambda: 1.0,
    "steps": lambda: 2,
    "step": lambda: 1.0,
    "update_mask": lambda: None,
    "log_weights": lambda: None,
    "precision": lambda: None,
}


@dataclass(frozen=True)
class Bad:
    """A call that is plain but for some arguments, the ops it holds for, and what they say."""

    name: str
    ops: tuple[str, ...]
    error: type[Exception]
    text: str
    changed: dict[str, Callable[[], Any]]

    def args(self, op: str) -> tuple[Any, ...]:
        return tuple({**PLAIN, **self.changed}[n]() for n in testing.argument_names(op))


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape, dtype=dtype)


FLOATS = "dtype float16, bfloat16, float32 or float64"
TABLE = [
    Bad("v int64", EVERY, TypeError, f"v: expected {FLOATS}, got int64",
        {"v": _zeros(5, 3, dtype=torch.int64)}),
    Bad("rho bool", EVERY, TypeError, f"rho: expected {FLOATS}, got bool",
        {"rho": _zeros(4, 3, dtype=torch.bool)}),
    Bad("v complex", EVERY, TypeError, f"v: expected {FLOATS}, got complex64",
        {"v": _zeros(5, 3, dtype=torch.complex64)}),
    Bad("rho float64", EVERY, TypeError, "rho: expected dtype float32 to match v, got float64",
        {"rho": _zeros(4, 3, dtype=torch.float64)}),
    Bad("v bfloat16", EVERY, TypeError, "rho: expected dtype bfloat16 to match v, got float32",
        {"v": _zeros(5, 3, dtype=torch.bfloat16)}),
    Bad("v 1-d", EVERY, ValueError, "v: expected shape [..., N, D], got [3]", {"v": _zeros(3)}),
    Bad("v 0-d", EVERY, ValueError, "v: expected shape [..., N, D], got []", {"v": _zeros()}),
    Bad("rho 1-d", EVERY, ValueError, "rho: expected shape [..., K, D], got [3]",
        {"rho": _zeros(3)}),
    Bad("D 0", EVERY, ValueError, "v: expected D >= 1, got [5, 0]",
        {"v": _zeros(5, 0), "rho": _zeros(4, 0)}),
    Bad("K 0", EVERY, ValueError, "rho: expected K >= 1, got [0, 3]", {"rho": _zeros(0, 3)}),
    Bad("D differs", EVERY, ValueError,
        "rho: expected shape [..., K, 3] to match v [5, 3], got [4, 8]", {"rho": _zeros(4, 8)}),
    Bad("D differs, batch", EVERY, ValueError,
        "rho: expected shape [..., K, 16] to match v [2, 5, 16], got [4, 8]",
        {"v": _zeros(2, 5, 16), "rho": _zeros(4, 8)}),
    Bad("D 1", EVERY, ValueError,
        "rho: expected shape [..., K, 3] to match v [5, 3], got [4, 1]", {"rho": _zeros(4, 1)}),
    Bad("leading dims", EVERY, ValueError,
        "rho: expected leading dims that broadcast to match v [2, 5, 3], got [7, 4, 3]",
        {"v": _zeros(2, 5, 3), "rho": _zeros(7, 4, 3)}),
    Bad("leading dims of log_weights", EVERY, ValueError,
        "log_weights: expected leading dims that broadcast to match v [2, 5, 3], got [3, 4]",
        {"v": _zeros(2, 5, 3), "log_weights": _zeros(3, 4)}),
    Bad("leading dims of an inner batch", EVERY, ValueError,
        "rho: expected leading dims that broadcast to match v [2, 3, 5, 3], got [2, 4, 3]",
        {"v": _zeros(2, 3, 5, 3), "rho": _zeros(2, 4, 3)}),
    Bad("log_weights shape", EVERY, ValueError,
        "log_weights: expected shape broadcastable to [..., 4] (K) to match rho [4, 3], got [5]",
        {"log_weights": _zeros(5)}),
    Bad("log_weights int", EVERY, TypeError, f"log_weights: expected {FLOATS}, got int32",
        {"log_weights": _zeros(4, dtype=torch.int32)}),
    Bad("precision", EVERY, ValueError,
        "precision: expected 'highest', 'high', 'medium' or None, got 'fast'",
        {"precision": lambda: "fast"}),
    Bad("beta shape", STEP_LIKE, ValueError,
        "beta: expected shape broadcastable to [..., 4] (K) to match rho [4, 3], got [5]",
        {"beta": _zeros(5)}),
    Bad("beta batch without a last dim of 1", STEP_LIKE, ValueError,
        "beta: expected shape broadcastable to [..., 4] (K) to match rho [2, 4, 3], got [2]",
        {"rho": _zeros(2, 4, 3), "beta": _zeros(2)}),
    Bad("beta int", WITH_BETA, TypeError, f"beta: expected {FLOATS}, got int64",
        {"beta": _zeros(1, dtype=torch.int64)}),
    Bad("beta -1", STEP_LIKE, ValueError, "beta: expected a number >= 0, got -1.0",
        {"beta": lambda: -1.0}),
    Bad("beta NaN", STEP_LIKE, ValueError, "beta: expected a number >= 0, got nan",
        {"beta": lambda: math.nan}),
    Bad("beta leading dims", WITH_BETA, ValueError,
        "beta: expected leading dims that broadcast to match v [2, 5, 3], got [3, 1]",
        {"v": _zeros(2, 5, 3), "beta": lambda: torch.ones(3, 1)}),
    Bad("energy at beta 0", ("am_energy",), ValueError,
        "beta: expected a finite number > 0, got 0.0", {"beta": lambda: 0.0}),
    Bad("energy at beta inf", ("am_energy",), ValueError,
        "beta: expected a finite number > 0, got inf", {"beta": lambda: math.inf}),
    Bad("energy at beta NaN", ("am_energy",), ValueError,
        "beta: expected a finite number > 0, got nan", {"beta": lambda: math.nan}),
    Bad("energy with a beta a memory", ("am_energy",), ValueError,
        "beta: expected shape [] or [..., 1] (one for all memories), got [4]",
        {"beta": lambda: torch.ones(4)}),
    Bad("steps", ("am_recursion",), ValueError, "steps: expected an int >= 0, got -1",
        {"steps": lambda: -1}),
    Bad("step < 0", STEP_LIKE, ValueError, "step: expected a finite number >= 0, got -0.5",
        {"step": lambda: -0.5}),
    Bad("step inf", STEP_LIKE, ValueError, "step: expected a finite number >= 0, got inf",
        {"step": lambda: math.inf}),
    Bad("step NaN", STEP_LIKE, ValueError, "step: expected a finite number >= 0, got nan",
        {"step": lambda: math.nan}),
    Bad("update_mask shape", STEP_LIKE, ValueError,
        "update_mask: expected shape broadcastable to [..., 5, 3] (N, D) to match v [5, 3], "
        "got [4, 3]", {"update_mask": _zeros(4, 3)}),
    Bad("update_mask a row too few dims", STEP_LIKE, ValueError,
        "update_mask: expected shape broadcastable to [..., 5, 3] (N, D) to match v [5, 3], "
        "got [5]",
        {"update_mask": _zeros(5)}),
    Bad("update_mask int", STEP_LIKE, TypeError, f"update_mask: expected {FLOATS}, got int64",
        {"update_mask": _zeros(5, 3, dtype=torch.int64)}),
    Bad("update_mask leading dims", STEP_LIKE, ValueError,
        "update_mask: expected leading dims that broadcast to match v [2, 5, 3], got [3, 5, 3]",
        {"v": _zeros(2, 5, 3), "update_mask": _zeros(3, 5, 3)}),
]  # fmt: skip
CASES = [
    pytest.param(testing.spec_of(op), bad, id=f"{op}-{bad.name}") for bad in TABLE for op in bad.ops
]


@contextlib.contextmanager
def _mode(name: str) -> Any:
    context = {"eager": contextlib.nullcontext, "fake": FakeTensorMode}.get(name)
    with torch.device("meta") if context is None else context():
        yield


@pytest.mark.parametrize("mode", ["eager", "inference", "grad", "fake", "meta"])
@pytest.mark.parametrize(("case", "bad"), CASES)
def test_torch_ops(case, bad, mode):
    with contextlib.ExitStack() as stack:
        stack.enter_context(_mode(mode if mode in ("fake", "meta") else "eager"))
        if mode == "inference":
            stack.enter_context(torch.inference_mode())
        args = bad.args(case.name)
        if mode == "grad":
            args = tuple(
                a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in args
            )
        with pytest.raises(bad.error) as caught:
            case.packet(*args)
    assert type(caught.value) is bad.error
    assert str(caught.value) == bad.text


@pytest.mark.parametrize(("case", "bad"), CASES)
def test_the_function_says_the_same(case, bad):
    names = testing.argument_names(case.name)
    given = dict(zip(names, bad.args(case.name), strict=True))
    keywords = {
        n: given.pop(n) for n in ("step", "update_mask", "log_weights", "precision") if n in given
    }
    with pytest.raises(bad.error) as caught:
        case.function(*given.values(), **keywords)
    assert str(caught.value) == bad.text


@pytest.mark.parametrize(("case", "bad"), CASES)
def test_transforms_say_the_same(case, bad):
    """Where the truth runs in place of the op, the check still comes first."""
    v, *rest = bad.args(case.name)
    if not v.is_floating_point() or case.gradient is None:
        with pytest.raises(bad.error, match=_start(bad.text)):
            case.packet(v, *rest)
        return
    with pytest.raises(bad.error) as caught:
        torch.func.grad(lambda x: case.packet(x, *rest).sum())(v)
    assert str(caught.value) == bad.text


def _start(text: str) -> str:
    import re

    return re.escape(text)


def test_every_op_has_rows_in_the_table():
    """Types, shapes, batch dims, values: each op of this suite is refused for each reason."""
    for spec in ck.all_ops():
        rows = [bad for bad in TABLE if spec.name in bad.ops]
        assert len(rows) >= 15, spec.name
        assert {bad.error for bad in rows} == {TypeError, ValueError}


# ---- values: read on the CPU only
# -----------------------------------------------------------------------

VALUES = [
    ("am_step", [-1.0], "beta: expected values >= 0, got -1.0"),
    ("am_recursion", [0.5, -2.0, 1.0, math.nan], "beta: expected values >= 0, got -2.0"),
    ("am_step", [1.0, math.nan, 1.0, 1.0], "beta: expected values >= 0, got nan"),
    ("am_energy", [-1.0], "beta: expected finite values > 0, got -1.0"),
    ("am_energy", [0.0], "beta: expected finite values > 0, got 0.0"),
    ("am_energy", [math.inf], "beta: expected finite values > 0, got inf"),
    ("am_energy", [math.nan], "beta: expected finite values > 0, got nan"),
]


@pytest.mark.parametrize(("op", "beta", "text"), VALUES)
@pytest.mark.parametrize("grad", [False, True])
def test_values(op, beta, text, grad):
    tail = (2,) if op == "am_recursion" else ()
    args = (torch.zeros(5, 3), torch.ones(4, 3), torch.tensor(beta, requires_grad=grad), *tail)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared whole
        getattr(torch.ops.clam, op)(*args)
    assert str(caught.value) == text
    for mode in ("fake", "meta"):  # nothing to read there, and nothing read
        with _mode(mode):
            fakes = (torch.zeros(5, 3), torch.ones(4, 3), torch.tensor(beta), *tail)
            assert getattr(torch.ops.clam, op)(*fakes).shape[0] == 5


def test_legal_limits():
    """0 and inf are betas of a step; a tensor with inf gives NaN, not an error; step may be 0."""
    v, rho = torch.randn(5, 3), torch.randn(4, 3)
    assert ck.am_step(v, rho, 0).isfinite().all()
    assert ck.am_step(v, rho, math.inf).isfinite().all()
    assert ck.am_step(v, rho, torch.tensor(math.inf)).isnan().all()
    assert torch.equal(ck.am_step(v, rho, 1.0, step=0.0), v)
    assert torch.equal(ck.am_recursion(v, rho, 1.0, 0), v)


# ---- devices
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "ops"),
    [
        ("rho", (4, 3), EVERY),
        ("beta", (1,), WITH_BETA),
        ("update_mask", (5, 3), STEP_LIKE),
        ("log_weights", (4,), EVERY),
    ],
)
def test_devices(name, value, ops):
    for op in ops:
        args = [
            torch.zeros(value, device="meta") if n == name else PLAIN[n]()
            for n in testing.argument_names(op)
        ]
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            getattr(torch.ops.clam, op)(*args)
        assert str(caught.value) == f"{name}: expected device cpu to match v, got meta"


def test_sparse_and_other_devices_have_no_kernel():
    with pytest.raises(NotImplementedError, match="clam::am_step"):
        ck.am_step(torch.zeros(5, 3).to_sparse(), torch.ones(4, 3), 1.0)


# ---- what the Python functions refuse
# -------------------------------------------------------------------

V, RHO = torch.zeros(5, 3), torch.ones(4, 3)
TYPES = [
    (lambda: ck.am_step([[0.0]], RHO, 1.0), "v: expected a Tensor, got list"),
    (lambda: ck.am_step(V, None, 1.0), "rho: expected a Tensor, got NoneType"),
    (lambda: ck.am_step(V, RHO, "1"), "beta: expected a number or a Tensor, got str"),
    (lambda: ck.am_step(V, RHO, None), "beta: expected a number or a Tensor, got NoneType"),
    (lambda: ck.am_step(V, RHO, True), "beta: expected a number or a Tensor, got bool"),
    (lambda: ck.am_step(V, RHO, 1.0, update_mask=[1]),
     "update_mask: expected a Tensor or None, got list"),
    (lambda: ck.am_step(V, RHO, 1.0, log_weights=0.5),
     "log_weights: expected a Tensor or None, got float"),
    (lambda: ck.am_recursion(V, RHO, 1.0, 3.0), "steps: expected an int >= 0, got 3.0"),
    (lambda: ck.am_recursion(V, RHO, 1.0, "3"), "steps: expected an int >= 0, got '3'"),
    (lambda: ck.am_recursion(V, RHO, 1.0, True), "steps: expected an int >= 0, got True"),
    (lambda: ck.am_recursion(V.numpy(), RHO, 1.0, 2), "v: expected a Tensor, got ndarray"),
    (lambda: ck.am_energy(V, RHO, []), "beta: expected a number or a Tensor, got list"),
    (lambda: ck.am_energy(V, RHO, 1.0, log_weights=[1]),
     "log_weights: expected a Tensor or None, got list"),
    (lambda: ck.am_assign(V, 3), "rho: expected a Tensor, got int"),
    (lambda: ck.am_assign(V, RHO, log_weights=(0.0,)),
     "log_weights: expected a Tensor or None, got tuple"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), TYPES, ids=[text for _, text in TYPES])
def test_types(call, text):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["step", "update_mask", "log_weights", "precision"])
def test_options_are_keywords(name):
    """A mask in the place of the step is refused by Python itself."""
    import inspect

    for spec in ck.all_ops():
        kinds = {p.name: p.kind for p in inspect.signature(spec.function).parameters.values()}
        if name in kinds:
            assert kinds[name] is inspect.Parameter.KEYWORD_ONLY


# ---- backends
# -------------------------------------------------------------------------------------------


def test_backend_names(monkeypatch):
    with pytest.raises(ValueError) as caught, ck.backend("gpu"):  # noqa: PT011
        pass
    assert str(caught.value) == "backend: expected 'reference', 'triton', 'cuda' or None, got 'gpu'"
    monkeypatch.setenv("CLAM_BACKEND", "fast")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ck.am_assign(V, RHO)
    assert (
        str(caught.value)
        == "CLAM_BACKEND: expected 'reference', 'triton', 'cuda' or None, got 'fast'"
    )


def test_a_forced_backend_never_falls_back(spec, monkeypatch):
    """An op without kernels, whatever this build has."""
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
        with ck.backend("reference"):  # the block overrules the environment
            spec.packet(*args)
        monkeypatch.delenv("CLAM_BACKEND")


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


def test_explain():
    assert ck.explain("am_step") == (
        "clam::am_step: reference at highest precision (the tensors are on cpu)"
    )
    assert ck.explain(ck.am_energy, V, RHO, 1.0) == (
        "clam::am_energy: reference at highest precision (the tensors are on cpu)"
    )
    assert ck.explain(torch.ops.clam.am_assign, V, RHO, None, "medium") == (
        "clam::am_assign: reference at medium (float32 on a CPU) precision (the tensors are on cpu)"
    )
    with ck.backend("reference"):
        assert ck.explain("am_recursion").endswith("(forced)")
    names = ", ".join(ck.list_ops())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ck.explain("am_stepp")
    assert str(caught.value) == f"op: expected one of {names}, got am_stepp"
    with pytest.raises(ValueError, match="precision: expected"):
        ck.explain("am_step", V, RHO, 1.0, "best")
