# SPDX-License-Identifier: Apache-2.0
"""The beta of a layer: half precision, its limits, parametrizations."""

from __future__ import annotations

import math

import pytest
import torch
from _layer import F64, HALVES, Shifted, equal
from torch import Tensor, nn
from torch.nn.utils import prune

from clam_kernels.nn import AssociativeMemory


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", [100.0, 1e5, 1e30])
def test_a_half_layer_has_the_beta_of_its_argument(dtype, beta):
    """1e5 is inf in float16, and 100 is 98.8 in bfloat16 after a logarithm."""
    layer = AssociativeMemory.from_patterns(torch.eye(3, dtype=dtype), beta=beta, learn_beta=True)
    torch.testing.assert_close(layer.beta, torch.tensor([beta]), rtol=1e-5, atol=0)
    v = torch.eye(3, dtype=dtype) * 0.75
    out = layer(v)
    equal(out, torch.eye(3, dtype=dtype))
    out.sum().backward()
    assert layer.log_beta.grad.dtype == torch.float32
    layer.beta = 2 * beta
    torch.testing.assert_close(layer.beta, torch.tensor([2 * beta]), rtol=1e-5, atol=0)
    assert bool(layer(v).isfinite().all())


CONVERSIONS = {
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to": lambda x: x.to(torch.float16),
    "to-like": lambda x: x.to(torch.zeros(1, dtype=torch.bfloat16)),
    "back": lambda x: x.half().float(),
    "in-a-model": lambda x: nn.Sequential(x).bfloat16()[0],
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_converted_layer_keeps_its_beta(convert, dtype):
    layer = AssociativeMemory(4, 3, beta=1e5, dtype=dtype, log_weights=True)
    layer(torch.zeros(2, 3, dtype=dtype)).sum().backward()
    before = layer.beta.detach().float()
    layer = convert(layer)
    assert layer.log_beta.dtype == layer.log_beta.grad.dtype == torch.float32
    assert layer.memories.dtype == layer.log_weights.dtype == layer.memories.grad.dtype
    torch.testing.assert_close(layer.beta, before)
    assert isinstance(layer.log_beta, nn.Parameter)
    assert layer(torch.zeros(2, 3, dtype=layer.memories.dtype)).dtype == layer.memories.dtype
    torch.testing.assert_close(layer.double().beta.float(), before)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 1e38), (torch.float32, 1e38),
                                             (F64, 1e308)])  # fmt: skip
def test_training_keeps_beta_in_its_range(dtype, most):
    """A logarithm whose exponential is 0 or inf gives the limit, and no gradient."""
    layer = AssociativeMemory(4, 3, dtype=dtype)
    for log, limit in ((1e4, most), (-1e4, 10 / most)):
        with torch.no_grad():
            layer.log_beta.fill_(log)
        assert layer.beta.item() == pytest.approx(limit, rel=1e-4)
        layer.beta.sum().backward()
        assert float(layer.log_beta.grad) == 0
    assert bool(layer.energy(torch.zeros(2, 3, dtype=dtype)).isfinite().all())
    assert bool(layer(torch.zeros(2, 3, dtype=dtype)).isfinite().all())


class _OneWay(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize("beta", [2.0, torch.tensor(2.0), torch.tensor([2.0], dtype=F64)])
def test_a_parametrized_beta_can_be_set(beta):
    layer = AssociativeMemory(4, 3)
    nn.utils.parametrize.register_parametrization(layer, "log_beta", Shifted())
    layer.beta = beta
    torch.testing.assert_close(layer.beta, torch.tensor([2.0]))
    stored = layer.parametrizations.log_beta.original
    torch.testing.assert_close(stored.detach(), torch.tensor([math.log(2.0) - 1]))
    assert isinstance(stored, nn.Parameter)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_a_converted_layer_keeps_its_parametrized_beta(convert):
    layer = AssociativeMemory(4, 3, beta=100.0)
    nn.utils.parametrize.register_parametrization(layer, "log_beta", Shifted())
    layer(torch.zeros(2, 3)).sum().backward()
    layer = convert(layer)
    stored = layer.parametrizations.log_beta.original
    assert stored.dtype == stored.grad.dtype == layer.log_beta.dtype == torch.float32
    torch.testing.assert_close(layer.beta, torch.tensor([100.0]), rtol=1e-6, atol=0)
    layer.beta = 1e5
    torch.testing.assert_close(layer.beta, torch.tensor([1e5]), rtol=2e-6, atol=0)


def test_parametrized_parameters_are_reset():
    layer = AssociativeMemory(4, 3, beta=2.0, log_weights=True)
    for name in ("memories", "log_beta", "log_weights"):
        nn.utils.parametrize.register_parametrization(layer, name, Shifted())
    layer.beta = 7.0
    layer.reset_parameters(torch.Generator().manual_seed(3))
    plain = AssociativeMemory(4, 3, beta=2.0, log_weights=True)
    plain.reset_parameters(torch.Generator().manual_seed(3))
    for name in ("memories", "log_beta", "log_weights"):
        torch.testing.assert_close(getattr(layer, name).detach(), getattr(plain, name).detach())


class _Same(_OneWay):
    def forward(self, x: Tensor) -> Tensor:
        return x

    right_inverse = forward


def test_a_parametrized_parameter_has_memory_of_its_own():
    """torch stores the tensor that right_inverse returns, without a copy."""
    layer = AssociativeMemory(4, 3, beta=torch.ones(4), dtype=F64)
    nn.utils.parametrize.register_parametrization(layer, "log_beta", _Same())
    stored = layer.parametrizations.log_beta.original
    for change in (lambda: setattr(layer, "beta", 2.0), layer.reset_parameters):
        change()
        with torch.no_grad():
            stored[0] += 1.0
        assert stored[1] == stored[2] != stored[0]
    layer.reset_parameters()
    equal(layer.beta.detach(), torch.ones(4, dtype=F64))


def test_a_parametrization_without_an_inverse_is_named():
    """A value written to a computed tensor would be lost, so setting it raises."""
    layer = AssociativeMemory(4, 3)
    nn.utils.parametrize.register_parametrization(layer, "log_beta", _OneWay())
    text = "log_beta: expected a parameter, or a parametrization with right_inverse, got "
    for change in (lambda: setattr(layer, "beta", 2.0), layer.reset_parameters):
        with pytest.raises(RuntimeError) as caught:
            change()
        assert str(caught.value) == f"{text}_OneWay"
    pruned = AssociativeMemory(4, 3)
    prune.identity(pruned, "log_beta")
    with pytest.raises(RuntimeError) as caught:
        pruned.beta = 2.0
    assert str(caught.value) == f"{text}a computed tensor"
