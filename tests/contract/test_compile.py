# SPDX-License-Identifier: Apache-2.0
"""torch.compile and export: one graph, no recompiling, symbolic and unbacked sizes."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels import testing

COMPILED = ("plain", "beta-batch-weights", "everything")
HAS_COMPILER = shutil.which("g++") is not None or shutil.which("clang++") is not None


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Counting:
    """aot_eager, and how often it was asked to compile."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.compiled += 1
        return aot_eager(graph, inputs)


def _around(spec: Any) -> Any:
    """The op between two others, so that there is something to capture."""

    def call(v: Tensor, *rest: Any) -> Any:
        out = spec.packet(v * 2.0, *rest)
        return tuple(o + 1 for o in out) if isinstance(out, tuple) else out + 1

    return call


@pytest.mark.contract(samples=COMPILED)
def test_fullgraph(spec, sample):
    call = _around(spec)
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(*sample.args)
    torch.testing.assert_close(got, call(*sample.args), rtol=0, atol=0)


@pytest.mark.contract(gradient=True, samples=COMPILED)
def test_fullgraph_backward(spec, sample):
    call = _around(spec)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    got = testing.evaluate(compiled, sample, sample.differentiable)
    want = testing.evaluate(call, sample, sample.differentiable)
    torch.testing.assert_close(got.outputs, want.outputs, rtol=0, atol=0)
    for name in sample.differentiable:
        torch.testing.assert_close(got.gradients[name], want.gradients[name], rtol=0, atol=0)


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
@pytest.mark.contract(samples=("plain",))
def test_inductor(spec, sample):
    call = _around(spec)
    wanted = sample.differentiable
    got = testing.evaluate(torch.compile(call, fullgraph=True), sample, wanted)
    want = testing.evaluate(call, sample, wanted)
    torch.testing.assert_close(got.outputs, want.outputs, rtol=1e-12, atol=1e-12)
    for name in wanted:
        torch.testing.assert_close(
            got.gradients[name], want.gradients[name], rtol=1e-12, atol=1e-12
        )


ROW_COUNTS = (5, 6, 7, 8, 19)


@pytest.mark.contract(samples=("plain",))
def test_third_row_count_does_not_recompile(spec, sample):
    counting = _Counting()
    compiled = torch.compile(_around(spec), backend=counting, fullgraph=True)
    for rows in ROW_COUNTS:
        v = torch.randn(rows, 3, dtype=torch.float64)
        got, want = compiled(v, *sample.args[1:]), _around(spec)(v, *sample.args[1:])
        torch.testing.assert_close(got, want)
    assert counting.compiled <= 2


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_third_row_count_does_not_recompile_backward(spec, sample):
    counting = _Counting()
    compiled = torch.compile(_around(spec), backend=counting, fullgraph=True)
    for rows in ROW_COUNTS:
        v = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(compiled(v, *sample.args[1:]).sum(), v)
        (want,) = torch.autograd.grad(_around(spec)(v, *sample.args[1:]).sum(), v)
        torch.testing.assert_close(got, want)
    assert counting.compiled <= 2


def test_third_step_count_does_not_recompile():
    counting = _Counting()

    def call(v: Tensor, rho: Tensor, beta: Tensor, steps: int) -> Tensor:
        return torch.ops.clam.am_recursion(v, rho, beta, steps)

    compiled = torch.compile(call, backend=counting, fullgraph=True)
    v, rho = torch.randn(5, 3), torch.randn(4, 3)
    for steps in (2, 3, 4, 5, 9):
        got = compiled(v, rho, torch.tensor(0.5), steps)
        torch.testing.assert_close(got, call(v, rho, torch.tensor(0.5), steps))
    assert counting.compiled <= 2


@pytest.mark.parametrize("op", ["am_step", "am_recursion", "am_energy"])
def test_beta_as_a_tensor_does_not_recompile(op):
    """What the docstrings advise where beta changes from call to call."""
    counting = _Counting()
    tail = (2,) if op == "am_recursion" else ()

    def call(v: Tensor, rho: Tensor, beta: Tensor) -> Tensor:
        return getattr(torch.ops.clam, op)(v, rho, beta, *tail)

    compiled = torch.compile(call, backend=counting, fullgraph=True)
    v, rho = torch.randn(5, 3), torch.randn(4, 3)
    for beta in (0.5, 1.0, 1.5):
        got = compiled(v, rho, torch.tensor(beta))
        torch.testing.assert_close(got, call(v, rho, torch.tensor(beta)))
    assert counting.compiled == 1


def test_the_documented_functions_compile():
    """The Python functions, whose checks run under tracing too, not only torch.ops."""
    import clam_kernels as ck

    v, rho = torch.randn(5, 3), torch.randn(4, 3)
    mask = torch.rand(5, 3) < 0.5

    def call(v: Tensor, rho: Tensor, beta: Tensor, steps: int) -> tuple[Tensor, ...]:
        x = ck.am_recursion(v, rho, beta, steps, update_mask=mask)
        x = ck.am_step(x, rho, 2.0)
        return (ck.am_energy(x, rho, beta), *ck.am_assign(x, rho))

    counting = _Counting()
    compiled = torch.compile(call, backend=counting, fullgraph=True)
    for steps in (2, 3, 4):
        got = compiled(v, rho, torch.tensor(0.5), steps)
        torch.testing.assert_close(got, call(v, rho, torch.tensor(0.5), steps))
    assert counting.compiled <= 2


class _Module(torch.nn.Module):
    def __init__(self, spec: Any, rest: tuple[Any, ...]) -> None:
        super().__init__()
        self.spec, self.rest = spec, rest

    def forward(self, v: Tensor) -> Any:
        return self.spec.packet(v, *self.rest)


@pytest.mark.contract(samples=("plain", "beta-batch"))
def test_export_with_a_symbolic_row_count(spec, sample):
    v, *rest = sample.args
    module = _Module(spec, tuple(rest))
    program = torch.export.export(
        module, (v,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},), strict=False
    )
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [t for t in targets if t.startswith("clam.")] == [
        t for t in targets if t.startswith(f"clam.{spec.name}.")
    ]
    assert len([t for t in targets if t.startswith("clam.")]) == 1
    more = torch.cat([v, v, v])
    torch.testing.assert_close(program.module()(more), module(more), rtol=0, atol=0)


@pytest.mark.contract(samples=("plain",))
def test_unbacked_row_count(spec, sample):
    """Rows chosen by their values: a size that no guard may look at."""
    v, *rest = sample.args

    def call(x: Tensor) -> Any:
        return spec.packet(x[x[:, 0] > 0], *rest)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for x in (v, -v, v.abs(), -v.abs()):  # the last has no rows at all
            torch.testing.assert_close(compiled(x), call(x), rtol=0, atol=0)


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_compile_of_func_grad(spec, sample):
    v, *rest = sample.args

    def call(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: spec.packet(t, *rest).square().sum())(x)

    got = torch.compile(call, backend="aot_eager", fullgraph=True)(v)
    torch.testing.assert_close(got, call(v), rtol=1e-12, atol=1e-12)


@pytest.mark.contract(samples=("plain",))
def test_compile_under_autocast(spec, sample):
    v, rho, *rest = sample.cast(torch.float32).args

    def call(v: Tensor, rho: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return spec.packet(v, rho, *rest)

    v = v.bfloat16()
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(v, rho)
    torch.testing.assert_close(got, call(v, rho), rtol=0, atol=0)


def test_our_message_survives_compilation():
    compiled = torch.compile(torch.ops.clam.am_step, backend="aot_eager", fullgraph=True)
    with pytest.raises(
        Exception, match=r"rho: expected shape \[\.\.\., K, 3\] to match v \[5, 3\]"
    ):
        compiled(torch.zeros(5, 3), torch.zeros(4, 8), 1.0)
