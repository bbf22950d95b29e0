# SPDX-License-Identifier: Apache-2.0
"""Every backend against float64 of the same inputs: the error is at most twice that of plain torch,
and calls repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _accuracy import assert_accurate

from clam_kernels import testing


def _assert_close_to_float64(
    spec: Any, calls: list[Any], inputs: tuple[str, ...], backend: Any
) -> None:
    """Compare outputs and gradients of several draws of a call; the upstream gradients are of order
    1.
    """
    values = []
    for call in calls:
        exact = call.cast(torch.float64, call.args[0].device.type)
        functions = ((spec.packet, call), (spec.truth, exact), (testing.eager(spec.name), call))
        # upstream gradients in the dtype under test, the same for all three
        grads = testing.upstream(testing.evaluate(spec.truth, call).outputs)
        values.append([testing.evaluate(f, c, inputs, grads) for f, c in functions])
    dtype = calls[0].args[0].dtype
    assert_accurate(
        values,
        output_scale=lambda i: testing.result_scale(spec.name, i),
        output_eps=lambda output: backend.sum_eps(output, dtype),
    )


def _assert_close_or_check_again(
    spec: Any, draw: Any, inputs: tuple[str, ...], backend: Any
) -> None:
    """Check one draw; if it misses the bound, check the average of six."""
    try:
        _assert_close_to_float64(spec, [draw(0)], inputs, backend)
    except AssertionError:
        _assert_close_to_float64(spec, [draw(seed) for seed in range(6)], inputs, backend)


def test_samples(spec, sample, backend, dtype):
    """In a dozen entries one rounding error decides, so a miss is checked again."""

    def draw(seed: int) -> Any:
        rows = testing.samples(spec.name, seed)
        return next(s for s in rows if s.name == sample.name).cast(dtype, backend.device)

    _assert_close_or_check_again(spec, draw, sample.differentiable + sample.kinks, backend)


def test_large(spec, backend, dtype):
    def draw(seed: int) -> Any:
        return testing.large(spec.name, dtype, backend.device, seed=seed)

    inputs = draw(0).differentiable
    if backend.interpreted:  # six draws take a minute
        _assert_close_or_check_again(spec, draw, inputs, backend)
    else:
        _assert_close_to_float64(spec, [draw(seed) for seed in range(6)], inputs, backend)


@pytest.mark.parametrize("d", [3, 100])
def test_narrow_and_wide(spec, backend, d):
    dtype = torch.float32
    calls = [testing.large(spec.name, dtype, backend.device, d=d, seed=seed) for seed in range(6)]
    _assert_close_to_float64(spec, calls, calls[0].differentiable, backend)


@pytest.mark.parametrize("offset", [1000.0, 1e5])
def test_far_from_the_origin(spec, backend, offset):
    """Centring keeps the accuracy of float32 inputs."""
    calls = [
        testing.large(spec.name, torch.float32, backend.device, offset=offset, seed=seed)
        for seed in range(6)
    ]
    _assert_close_to_float64(spec, calls, calls[0].differentiable, backend)


def test_repeats_bit_for_bit(spec, backend, dtype):
    call = testing.large(spec.name, dtype, backend.device)
    first, second = (testing.evaluate(spec.packet, call, call.differentiable) for _ in range(2))
    for a, b in zip(first.outputs, second.outputs, strict=True):
        assert torch.equal(a, b)
    for name in call.differentiable:
        assert torch.equal(first.gradients[name], second.gradients[name]), name


@pytest.mark.contract(gradient=True)
def test_precision_modes(spec, backend):
    """The error of each mode is below its bound; "highest" follows the rule of float32."""
    call = testing.large(spec.name, torch.float32, backend.device)
    wide = call.cast(torch.float64, backend.device)
    functions = (spec.packet, spec.truth, testing.eager(spec.name))
    ours, exact, plain = (testing.single(spec.name, f) for f in functions)
    truth, eager = exact(*wide.args), plain(*call.args)
    scale = float(truth.abs().max())
    for mode, bound in (("high", 2e-3), ("medium", 2e-2)):
        error = float((ours(*call.args, mode).double() - truth).abs().max())
        assert error <= bound * scale, mode
    testing.assert_close(ours(*call.args, "highest"), truth, eager)


@pytest.mark.contract(gradient=True)
def test_highest_means_float32_whatever_torch_is_set_to(spec, backend):
    call = testing.large(spec.name, torch.float32, backend.device)
    ours = testing.single(spec.name, spec.packet)
    expected = ours(*call.args, "highest")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        result = ours(*call.args, "highest")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(result, expected)


def test_assert_close_can_fail():
    """The rule rejects a factor of 3, a NaN, an inf, a shape, a dtype, a label."""
    truth = torch.linspace(1, 2, 9, dtype=torch.float64)
    eager = truth.float() + 1e-5
    testing.assert_close(truth.float() - 1.9e-5, truth, eager)
    bad = [
        (truth.float() - 3e-5, truth, eager),
        (truth + 1e-11, truth, truth),
        (torch.where(truth == 1, torch.nan, truth).float(), truth, eager),
        (truth.float(), torch.where(truth == 1, torch.nan, truth), eager),
        (truth.float(), torch.where(truth == 1, torch.inf, truth), eager),
        (truth.float()[1:], truth, eager),
        (truth.bfloat16(), truth, eager),
        (torch.tensor([1]), torch.tensor([2]), torch.tensor([1])),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), torch.tensor([0.0])),
    ]
    for triple in bad:
        with pytest.raises(AssertionError):
            testing.assert_close(*triple)
