# SPDX-License-Identifier: Apache-2.0
"""torch.compile and export: one graph, no recompilation, symbolic and unbacked sizes."""

from __future__ import annotations

import inspect
import re
import shutil
from typing import Any

import pytest
import torch
from _compiling import Counting
from torch import Tensor

from clam_kernels import testing

HAS_COMPILER = shutil.which("g++") is not None or shutil.which("clang++") is not None


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _between_ops(spec: Any) -> Any:
    """The op between two others, so that there is a graph to capture."""

    def call(v: Tensor, *rest: Any) -> Any:
        out = spec.packet(v * 2.0, *rest)
        return tuple(o + 1 for o in out) if isinstance(out, tuple) else out + 1

    return call


@pytest.mark.contract(samples="compiled")
def test_fullgraph(spec, sample):
    call = _between_ops(spec)
    result = torch.compile(call, backend="aot_eager", fullgraph=True)(*sample.args)
    torch.testing.assert_close(result, call(*sample.args), rtol=0, atol=0)


@pytest.mark.contract(gradient=True, samples="compiled")
def test_fullgraph_backward(spec, sample):
    call = _between_ops(spec)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    result = testing.evaluate(compiled, sample, sample.differentiable)
    inputs = testing.evaluate(call, sample, sample.differentiable)
    torch.testing.assert_close(result.outputs, inputs.outputs, rtol=0, atol=0)
    for name in sample.differentiable:
        torch.testing.assert_close(result.gradients[name], inputs.gradients[name], rtol=0, atol=0)


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
@pytest.mark.contract(samples=("plain",))
def test_inductor(spec, sample):
    call = _between_ops(spec)
    inputs = sample.differentiable
    # the probe for vector instructions takes a dozen compilations
    with torch._inductor.config.patch("cpp.vec_isa_ok", False):
        result = testing.evaluate(torch.compile(call, fullgraph=True), sample, inputs)
    expected = testing.evaluate(call, sample, inputs)
    torch.testing.assert_close(result.outputs, expected.outputs, rtol=1e-12, atol=1e-12)
    for name in inputs:
        torch.testing.assert_close(
            result.gradients[name], expected.gradients[name], rtol=1e-12, atol=1e-12
        )


ROW_COUNTS = (5, 6, 7, 8, 19)


def test_third_row_count_does_not_recompile(spec):
    counting = Counting()
    compiled = torch.compile(_between_ops(spec), backend=counting, fullgraph=True)
    for rows in ROW_COUNTS:
        args = testing.problem(spec.name, rows, 4, 3, torch.float64).args
        torch.testing.assert_close(compiled(*args), _between_ops(spec)(*args))
    assert counting.compiled <= 2


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_third_row_count_does_not_recompile_backward(spec, sample):
    counting = Counting()
    compiled = torch.compile(_between_ops(spec), backend=counting, fullgraph=True)
    for rows in ROW_COUNTS:
        v, *rest = testing.problem(spec.name, rows, 4, 3, torch.float64).args
        v.requires_grad_()
        result, expected = (
            torch.autograd.grad(call(v, *rest).sum(), v)[0]
            for call in (testing.single(spec.name, f) for f in (compiled, _between_ops(spec)))
        )
        torch.testing.assert_close(result, expected)
    assert counting.compiled <= 2


def test_third_value_of_an_integer_does_not_recompile(spec):
    """A number of steps or of labels, in torch.ops and through the checks of the functions."""
    schema = getattr(spec.packet, next(iter(spec.overloads)) or "default")._schema.arguments
    large = testing.large(spec.name, torch.float32, n=5, k=4, d=3)
    for place in (i for i, a in enumerate(schema) if str(a.type) in ("int", "SymInt")):
        for call in (spec.packet, spec.function):
            counting = Counting()

            def run(value: int, *rest: Any, call: Any = call, place: int = place) -> Any:
                return call(*rest[:place], value, *rest[place:])

            required = [a for a in schema if not a.has_default_value()]
            rest = [a for i, a in enumerate(large.args[: len(required)]) if i != place]
            compiled = torch.compile(run, backend=counting, fullgraph=True)
            for value in (2, 3, 4, 5, 9):
                torch.testing.assert_close(compiled(value, *rest), run(value, *rest))
            assert counting.compiled <= 2


@pytest.mark.contract(gradient=True)
def test_a_number_as_a_tensor_does_not_recompile(spec):
    """The docstrings advise a tensor for a number that changes from call to call."""
    names = testing.argument_names(spec.name)
    for word in next(iter(spec.overloads.values())):
        place = names.index(word)
        args = list(testing.large(spec.name, torch.float32, n=5, k=4, d=3).args)
        counting = Counting()
        compiled = torch.compile(spec.packet, backend=counting, fullgraph=True)
        for value in (0.5, 1.0, 1.5):
            args[place] = torch.tensor(value)
            torch.testing.assert_close(compiled(*args), spec.packet(*args))
        assert counting.compiled == 1


@pytest.mark.contract(samples="compiled")
def test_the_documented_functions_compile(spec, sample):
    """The Python functions, whose checks are traced too, and not only torch.ops."""
    parameters = inspect.signature(spec.function).parameters.values()
    count = len([p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY])
    names = testing.argument_names(spec.name)
    keywords = dict(zip(names[count:], sample.args[count:], strict=False))

    def call(*args: Any, **keywords: Any) -> Any:
        return spec.function(*args, **keywords)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    result, expected = (f(*sample.args[:count], **keywords) for f in (compiled, call))
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def _rows_of(spec: Any, sample: Any) -> tuple[dict[int, int], list[Tensor]]:
    """The arguments of a call with a dim of rows: that dim by position, and the values."""
    names, dims = testing.argument_names(spec.name), testing.row_dims(spec.name)
    places = {names.index(n): dim for n, dim in dims.items()}
    places = {i: dim for i, dim in places.items() if isinstance(sample.args[i], Tensor)}
    return places, [sample.args[i] for i in places]


def _replaced(sample: Any, places: dict[int, int], values: Any) -> list[Any]:
    args = list(sample.args)
    for i, value in zip(places, values, strict=True):
        args[i] = value
    return args


class _Module(torch.nn.Module):
    def __init__(self, spec: Any, sample: Any, places: dict[int, int]) -> None:
        super().__init__()
        self.spec, self.sample, self.places = spec, sample, places

    def forward(self, *rows: Tensor) -> Any:
        return self.spec.packet(*_replaced(self.sample, self.places, rows))


@pytest.mark.contract(samples="exported")
def test_export_with_a_symbolic_row_count(spec, sample):
    places, rows = _rows_of(spec, sample)
    module = _Module(spec, sample, places)
    size = torch.export.Dim("n", min=2)
    shapes = tuple({x.ndim + dim: size} for x, dim in zip(rows, places.values(), strict=True))
    program = torch.export.export(module, tuple(rows), dynamic_shapes=(shapes,), strict=False)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [t for t in targets if t.startswith("clam.")] == [
        t for t in targets if t.startswith(f"clam.{spec.name}.")
    ]
    assert len([t for t in targets if t.startswith("clam.")]) == 1
    more = [torch.cat([x, x, x], dim) for x, dim in zip(rows, places.values(), strict=True)]
    torch.testing.assert_close(program.module()(*more), module(*more), rtol=0, atol=0)


@pytest.mark.contract(samples=("plain",))
def test_unbacked_row_count(spec, sample):
    """Rows chosen by their values: no guard may read their number."""
    places, (first, *more) = _rows_of(spec, sample)
    dims = list(places.values())

    def call(*rows: Tensor) -> Any:
        chosen = (rows[0][:, 0] > 0).nonzero()[:, 0]
        parts = [x.index_select(dim, chosen) for x, dim in zip(rows, dims, strict=True)]
        return spec.packet(*_replaced(sample, places, parts))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for x in (first, -first, first.abs() + 1, -first.abs()):  # the last has no rows
            torch.testing.assert_close(compiled(x, *more), call(x, *more), rtol=0, atol=0)


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_compile_of_func_grad(spec, sample):
    v, *rest = sample.args

    def call(x: Tensor) -> Tensor:
        one = testing.single(spec.name, spec.packet)
        return torch.func.grad(lambda t: one(t, *rest).square().sum())(x)

    result = torch.compile(call, backend="aot_eager", fullgraph=True)(v)
    torch.testing.assert_close(result, call(v), rtol=1e-12, atol=1e-12)


@pytest.mark.contract(samples=("plain",))
def test_compile_under_autocast(spec, sample):
    first, *rest = sample.cast(torch.float32).args

    def call(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return spec.packet(x, *rest)

    x = first.bfloat16()
    result = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(result, call(x), rtol=0, atol=0)


def test_error_messages_are_the_same_in_compiled_code(spec):
    bad = next(
        b for b in testing.bad_calls(spec.name) if b.error is ValueError and " to match " in b.text
    )
    compiled = torch.compile(spec.packet, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=re.escape(bad.text)):
        compiled(*bad.make())
