# SPDX-License-Identifier: Apache-2.0
"""Every backend against float64 of the same inputs: no worse than twice plain torch, bit for
bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import clam_kernels as ck
from clam_kernels import testing


def _check(spec: Any, calls: list[Any], wanted: tuple[str, ...]) -> None:
    """Outputs and gradients of several draws of a call; the upstream gradients are of order 1."""
    values = []
    for call in calls:
        exact = call.cast(torch.float64, call.args[0].device.type)
        functions = ((spec.packet, call), (spec.truth, exact), (spec.truth, call))
        # the upstream gradients as the dtype under test has them: the same for all three
        grads = testing.upstream(testing.evaluate(spec.packet, call).outputs)
        values.append([testing.evaluate(f, c, wanted, grads) for f, c in functions])
    for i in range(len(values[0][0].outputs)):
        triples = [tuple(one.outputs[i] for one in row) for row in values]
        testing.assert_close_on_average(triples, what=f"output {i}")
    for name in wanted:
        triples = [tuple(one.gradients[name] for one in row) for row in values]
        testing.assert_close_on_average(triples, what=f"gradient of {name}", scale=1.0)


def test_samples(spec, sample, backend, dtype):
    """In a dozen entries one rounding error decides: a miss is judged again by six draws."""

    def draw(seed: int) -> Any:
        rows = testing.samples(spec.name, seed)
        return next(s for s in rows if s.name == sample.name).cast(dtype, backend.device)

    wanted = sample.differentiable + sample.kinks
    try:
        _check(spec, [draw(0)], wanted)
    except AssertionError:
        _check(spec, [draw(seed) for seed in range(6)], wanted)


def _large(
    spec: Any,
    dtype: torch.dtype,
    device: str,
    offset: float = 0.0,
    d: int = 16,
    k: int = 64,
    seed: int = 0,
) -> Any:
    """1000 points around 64 memories."""
    generator = torch.Generator().manual_seed(seed)
    rho = torch.randn(k, d, generator=generator, dtype=torch.float64)
    near = torch.randint(k, (1000,), generator=generator)
    noise = torch.randn(1000, d, generator=generator, dtype=torch.float64)
    given = {
        "v": rho[near] + 0.6 * noise + offset,
        "rho": rho + offset,
        "beta": 3.0 / d * torch.ones((), dtype=torch.float64),
        "steps": 5,
        "step": 0.5,
        "log_weights": None,
        "update_mask": None,
    }
    names = testing.argument_names(spec.name)[:-1]
    tensors = tuple(n for n in names if isinstance(given[n], Tensor)) if spec.gradient else ()
    sample = testing.Sample(spec.name, "large", tuple(given[n] for n in names), tensors)
    return sample.cast(dtype, device)


def test_large(spec, backend, dtype):
    calls = [_large(spec, dtype, backend.device, seed=seed) for seed in range(6)]
    _check(spec, calls, calls[0].differentiable)


@pytest.mark.parametrize("d", [3, 100])
def test_narrow_and_wide(spec, backend, d):
    dtype = torch.float32
    calls = [_large(spec, dtype, backend.device, d=d, seed=seed) for seed in range(6)]
    _check(spec, calls, calls[0].differentiable)


@pytest.mark.parametrize("offset", [1000.0, 1e5])
def test_far_from_the_origin(spec, backend, offset):
    """Centring keeps float32 at the accuracy of its rounded inputs."""
    calls = [_large(spec, torch.float32, backend.device, offset, seed=seed) for seed in range(6)]
    _check(spec, calls, calls[0].differentiable)


@pytest.mark.contract(gradient=True)
def test_offset_does_not_reach_energy_and_gradients(spec, backend):
    """Sharper than the rule, whose scale would let errors of 4 eps x 1e5 pass: everything that a
    shift leaves alone is as accurate at 1e5 as it is at 0 (inputs on a grid that both hold
    exactly).
    """
    here = _large(spec, torch.float32, backend.device)
    grid = tuple(
        (a * 32).round() / 32 if n in ("v", "rho") else a
        for n, a in zip(testing.argument_names(spec.name), here.args, strict=False)
    )
    far = tuple(
        a + 65536.0 if n in ("v", "rho") else a
        for n, a in zip(testing.argument_names(spec.name), grid, strict=False)
    )
    near, away = (
        testing.evaluate(spec.packet, testing.Sample(spec.name, "grid", args), here.differentiable)
        for args in (grid, far)
    )
    for name in here.differentiable:
        a, b = near.gradients[name], away.gradients[name]
        assert float((a - b).abs().max()) <= 1e-3 * float(a.abs().max()), name
    if spec.name == "am_energy":
        torch.testing.assert_close(near.outputs, away.outputs, rtol=1e-5, atol=1e-4)
    else:  # the state itself is rounded to the grid of float32 at 65536
        shifted = away.outputs[0] - 65536.0
        assert float((shifted - near.outputs[0]).abs().max()) <= 2 * 65536.0 * 2**-24 + 1e-3


def test_repeats_bit_for_bit(spec, backend, dtype):
    call = _large(spec, dtype, backend.device)
    first, second = (testing.evaluate(spec.packet, call, call.differentiable) for _ in range(2))
    for a, b in zip(first.outputs, second.outputs, strict=True):
        assert torch.equal(a, b)
    for name in call.differentiable:
        assert torch.equal(first.gradients[name], second.gradients[name]), name


@pytest.mark.contract(ops=("am_assign",))
def test_labels_are_exact_far_from_the_origin(spec, backend):
    """Labels of float32 rows + 1e5 are float64's labels of the same rounded values."""
    generator = torch.Generator().manual_seed(5)
    rho = torch.randn(50, 12, generator=generator) + 1e5
    v = torch.randn(3000, 12, generator=generator) + 1e5
    labels, sqdist = ck.am_assign(v.to(backend.device), rho.to(backend.device))
    exact = torch.cdist(v.double(), rho.double(), compute_mode="donot_use_mm_for_euclid_dist")
    # a point of this coarse grid (2^-7) may lie exactly between two memories: the distance decides
    best = exact.square().amin(-1)
    chosen = exact.square().gather(1, labels.cpu()[:, None])[:, 0]
    assert float((chosen - best).max()) <= 1e-5 * float(best.max())
    assert bool((sqdist >= 0).all())
    torch.testing.assert_close(sqdist.cpu().double(), chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.contract(gradient=True)
def test_precision_modes(spec, backend):
    """None of the three is further from the truth than its name allows; "highest" keeps the
    rule.
    """
    call = _large(spec, torch.float32, backend.device)
    wide = call.cast(torch.float64, backend.device)
    truth, eager = spec.truth(*wide.args), spec.truth(*call.args)
    scale = float(truth.abs().max())
    for mode, bound in (("high", 2e-3), ("medium", 2e-2)):
        error = float((spec.packet(*call.args, mode).double() - truth).abs().max())
        assert error <= bound * scale, mode
    testing.assert_close(spec.packet(*call.args, "highest"), truth, eager)


@pytest.mark.contract(gradient=True)
def test_highest_means_float32_whatever_torch_is_set_to(spec, backend):
    call = _large(spec, torch.float32, backend.device)
    want = spec.packet(*call.args, "highest")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = spec.packet(*call.args, "highest")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, want)


def test_assert_close_can_fail():
    """The rule itself: a factor of 3, a NaN, an inf, a shape, a dtype, a label."""
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
