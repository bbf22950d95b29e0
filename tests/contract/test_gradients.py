# SPDX-License-Identifier: Apache-2.0
"""Gradients: finite differences, the truth's autograd, frozen inputs, and the backend of
backward.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import clam_kernels
from clam_kernels import testing
from clam_kernels._core import backend as choice

pytestmark = pytest.mark.contract(gradient=True)


def _call(spec: Any, sample: Any, inputs: tuple[str, ...]) -> tuple[Any, list[Tensor]]:
    """The op as a function of the named tensors, and those tensors."""
    names = testing.argument_names(spec.name)
    places = [names.index(n) for n in inputs]

    def call(*leaves: Tensor) -> Tensor:
        args = list(sample.args)
        for place, leaf in zip(places, leaves, strict=True):
            args[place] = leaf
        return testing.single(spec.name, spec.packet)(*args)

    return call, [sample.args[p].clone().requires_grad_() for p in places]


def _first(spec: Any) -> tuple[str, ...]:
    return testing.argument_names(spec.name)[:1]


def test_gradcheck(spec, sample):
    call, leaves = _call(spec, sample, sample.differentiable)
    if not leaves:  # every differentiable point here is a kink, which the next test checks
        assert sample.kinks
        return
    fast = sum(leaf.numel() for leaf in leaves) > 40  # one random direction, not all
    assert torch.autograd.gradcheck(
        call, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=fast, check_batched_grad=False
    )


def test_equals_the_truths_autograd(spec, sample):
    inputs = sample.differentiable + sample.kinks
    result = testing.evaluate(spec.packet, sample, inputs)
    expected = testing.evaluate(spec.truth, sample, inputs)
    for name in inputs:
        g, t = result.gradients[name], expected.gradients[name]
        testing.assert_close(g, t, t, what=name, scale=1.0)


@pytest.mark.contract(gradient=True, samples="frozen")
def test_frozen_inputs(spec, sample):
    """Each subset of leaves has the same gradients, bit for bit; frozen inputs have none."""
    names = sample.differentiable
    full = testing.evaluate(spec.packet, sample, names).gradients
    for count in range(1, len(names)):
        for subset in itertools.combinations(names, count):
            some = testing.evaluate(spec.packet, sample, subset).gradients
            for name in subset:
                assert torch.equal(some[name], full[name]), (subset, name)
    call, leaves = _call(spec, sample, names)
    for leaf in leaves[1:]:
        leaf.requires_grad_(False)
    call(*leaves).sum().backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_no_grad_fn_without_leaves(spec, sample):
    args = testing.leaves_of(sample.args)
    call = testing.single(spec.name, spec.packet)
    assert call(*args).requires_grad
    assert not call(*sample.args).requires_grad
    with torch.no_grad():
        assert not call(*args).requires_grad
    with torch.inference_mode():
        assert call(*args).is_inference()


class _Drop(torch.autograd.Function):
    """Returns its input, and an undefined gradient in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_undefined_upstream(spec, sample, ran):
    call, leaves = _call(spec, sample, sample.differentiable)
    _Drop.apply(call(*leaves)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert f"{spec.name}_backward" not in [op for op, _ in ran]


@pytest.mark.contract(gradient=True, samples="views")
def test_gradient_flows_through_views_and_twice(spec, sample):
    """The gradients of an output used twice add up; a leaf passed as a view gets its gradient."""
    call, leaves = _call(spec, sample, sample.differentiable)
    out = call(*(leaf.clone() for leaf in leaves))
    once = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    both = torch.autograd.grad((out + 2 * out).sum(), leaves)
    for a, b in zip(once, both, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-12, atol=1e-12)


def test_repeats_bit_for_bit(spec, sample, backend):
    call = sample.cast(torch.float32, backend.device)
    inputs = sample.differentiable + sample.kinks
    first = testing.evaluate(spec.packet, call, inputs)
    second = testing.evaluate(spec.packet, call, inputs)
    for a, b in zip(first.outputs, second.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for name in inputs:
        a, b = first.gradients[name], second.gradients[name]
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- which backend runs backward
# ----------------------------------------------------------------------


@pytest.mark.contract(gradient=True, samples=("plain", "everything"))
def test_backward_runs_where_forward_ran(spec, sample, backend, ran):
    call, leaves = _call(spec, sample.cast(backend.dtypes[0], backend.device), _first(spec))
    call(*leaves).sum().backward()
    assert (f"{spec.name}_backward", backend.name) in ran
    assert {name for _, name in ran} == {backend.name}


@pytest.fixture
def backend_calls(monkeypatch):
    """A "triton" for every op: it counts its calls and computes the result of the reference."""
    calls: list[str] = []

    def implementation(where: str) -> Any:
        name, reference = where.partition(":")[2], references[where]

        def run(*args: Any) -> Any:
            calls.append(name)
            return reference(*args)

        return run

    references: dict[str, Any] = {}
    for spec in clam_kernels.all_ops():
        if spec.gradient is None:
            continue
        saved = spec.gradient.saved if isinstance(spec.gradient.saved, tuple) else (None,)
        for table, name, reference in (
            (spec.kernels, spec.name, spec.reference),
            (spec.gradient.kernels, f"{spec.name}_backward", spec.gradient.reference),
            (spec.gradient.saved_kernels, f"_{spec.name}_forward", saved[0]),
        ):
            monkeypatch.setitem(table, "triton", f"planted:{name}")
            references[f"planted:{name}"] = reference
    monkeypatch.setattr(choice, "implementation", implementation)
    monkeypatch.setattr(choice, "why_not", lambda *_: None)
    return calls


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_backward_follows_its_forward_out_of_the_block(spec, sample, backend_calls):
    """Forward stores the choice, so leaving the block or another thread changes nothing."""
    call, leaves = _call(spec, sample, _first(spec))
    with clam_kernels.backend("triton"):
        out = call(*leaves)
    assert len(backend_calls) == 1
    with clam_kernels.backend("reference"):
        out.sum().backward()
    assert backend_calls[1:] == [f"{spec.name}_backward"]
    with clam_kernels.backend("reference"):
        out = call(*leaves)
    with clam_kernels.backend("triton"):
        out.sum().backward()
    assert len(backend_calls) == 2


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_backward_keeps_its_forwards_precision(spec, sample, monkeypatch):
    modes: list[str] = []
    real_run = choice.run

    def run(spec: Any, device: str, precision: str, *rest: Any) -> Any:
        modes.append(precision)
        return real_run(spec, device, precision, *rest)

    monkeypatch.setattr(choice, "run", run)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        call, leaves = _call(spec, sample, _first(spec))
        out = call(*leaves)
        torch.set_float32_matmul_precision("highest")
        out.sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)
    assert modes == ["high", "high"]
