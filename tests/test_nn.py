# SPDX-License-Identifier: Apache-2.0
"""The layers: values against the ops, gradients, parameters and files, compilation, autocast,
errors.
"""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import math
import pickle
from typing import Any

import pytest
import torch
from _compiling import Counting
from torch import Tensor, nn
from torch.nn.utils import prune

import clam_kernels
import clam_kernels.nn.am
from clam_kernels.nn import AssociativeMemory

F64 = torch.float64
HALVES = [torch.float16, torch.bfloat16]


def _draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def _full(seed: int = 0, dtype: torch.dtype = F64) -> AssociativeMemory:
    """A layer with every option: four memories of three features, nothing frozen."""
    layer = AssociativeMemory.from_patterns(
        _draw(seed, 4, 3, dtype=dtype), steps=3, step=0.7, beta=0.8, learn_memories=True,
        learn_beta=True, log_weights=0.3 * _draw(seed + 1, 4, dtype=dtype), precision="highest",
    )  # fmt: skip
    assert all(p.requires_grad for p in layer.parameters())
    return layer


def _close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def _equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_a_masked_memory_gets_no_weight(value):
    rho = torch.cat([torch.randn(5, 4), torch.full((1, 4), value)])
    out = torch.tensor([0.0] * 5 + [-torch.inf])
    v = torch.randn(7, 4)
    layer = AssociativeMemory.from_patterns(rho, log_weights=out)
    rest = AssociativeMemory.from_patterns(rho[:5])
    _close(layer.weights(v)[:, :5], rest.weights(v), 1e-6)
    assert (layer.weights(v)[:, 5] == 0).all()
    nothing = AssociativeMemory.from_patterns(rho, log_weights=torch.full((6,), -torch.inf))
    assert (nothing.weights(v) == 0).all()


def test_forward_is_the_recursion():
    layer, v = _full(), _draw(5, 6, 3)
    mask = _draw(6, 6, 3) > 0
    call = {"step": 0.7, "log_weights": layer.log_weights, "precision": "highest"}
    rho, beta = layer.memories, layer.beta
    _equal(layer(v), clam_kernels.am_recursion(v, rho, beta, 3, **call))
    _equal(layer(v, mask), clam_kernels.am_recursion(v, rho, beta, 3, update_mask=mask, **call))
    _equal(layer(v, steps=1), clam_kernels.am_step(v, rho, beta, **call))
    _equal(layer(v, mask, 0), v)
    assert torch.equal(layer(v, mask)[~mask], v[~mask])


def test_energy_assign_and_weights_are_those_of_the_ops():
    layer, v = _full(), _draw(5, 6, 3)
    rho, lam = layer.memories, layer.log_weights
    _equal(layer.energy(v), clam_kernels.am_energy(v, rho, layer.beta, log_weights=lam))
    _equal(layer.assign(v), clam_kernels.am_assign(v, rho, log_weights=lam))
    _close(layer(v, steps=1), v + 0.7 * (layer.weights(v) @ rho - v))
    _close(layer.weights(v).sum(-1), torch.ones(6, dtype=F64))
    assert (layer.energy(layer(v)) <= layer.energy(v)).all()


def test_weights_follow_their_equation():
    """With a beta and a log-weight for each memory, leading dims, and far from the origin."""
    rho, beta, lam = _draw(0, 2, 4, 3), 0.3 + _draw(1, 4).square(), _draw(2, 2, 4)
    lam[1, 2] = -math.inf
    layer = AssociativeMemory.from_patterns(rho, beta=beta, log_weights=lam)
    v = _draw(3, 5, 3)
    sqdist = (v[:, None] - rho[:, None]).square().sum(-1)
    expected = (lam[:, None] - beta * sqdist).softmax(-1)
    _close(layer.weights(v), expected)
    assert (layer.weights(v)[1, :, 2] == 0).all()
    far = AssociativeMemory.from_patterns((rho + 1e5).float(), beta=beta, log_weights=lam)
    near = AssociativeMemory.from_patterns((rho + 1e5).float().double(), beta=beta, log_weights=lam)
    x = (v + 1e5).float()
    _close(far.weights(x), near.weights(x.double()).float(), 1e-5)


@pytest.mark.parametrize(
    ("scale", "beta"), [(1e10, 1e38), (1e20, 1e-37), (1e19, 1e-37), (1e-25, 1e38), (1e-30, 1.0)]
)
def test_weights_are_right_at_the_ends_of_float32(scale, beta):
    """Squared distances and their products with beta overflow."""
    rho, v = _draw(0, 4, 4).float() * scale, _draw(1, 3, 4).float() * scale
    layer = AssociativeMemory.from_patterns(rho, beta=beta, learn_memories=True, learn_beta=True)
    sqdist = (v.double()[:, None] - rho.double()).square().sum(-1)
    expected = (-layer.beta.double() * sqdist).softmax(-1)
    weights = layer.weights(v)
    _close(weights.double(), expected, 1e-6)
    torch.testing.assert_close(layer(v), weights @ rho, rtol=0, atol=2e-6 * scale)
    weights[:, 0].sum().backward()
    assert not any(x.grad.isnan().any() for x in (layer.memories, layer.log_beta))


def test_weights_in_half_precision_are_float32():
    layer = AssociativeMemory.from_patterns(_draw(0, 4, 3, dtype=torch.bfloat16))
    v = _draw(1, 5, 3, dtype=torch.bfloat16)
    weights = layer.weights(v)
    assert weights.dtype == torch.float32
    _close(weights.sum(-1), torch.ones(5), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        _equal(layer.weights(v), weights)


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_damaged_patterns_are_recalled(beta):
    """Case 12 of the specification: half of the entries hidden, the others masked."""
    patterns = _draw(0, 5, 64)
    order = _draw(1, 5, 64).argsort(-1)
    hidden = order < 32
    layer = AssociativeMemory.from_patterns(patterns, steps=5, beta=beta)
    recalled = layer(patterns.masked_fill(hidden, 0.0), hidden)
    assert (recalled - patterns).abs().max() < 1e-9
    assert torch.equal(recalled[~hidden], patterns[~hidden])


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_stored_patterns_return_themselves(beta):
    patterns = _draw(0, 5, 64)
    layer = AssociativeMemory.from_patterns(patterns, steps=5, beta=beta)
    _close(layer(patterns), patterns, 1e-9)
    _equal(layer.assign(patterns)[0], torch.arange(5))


def test_a_masked_memory_is_not_recalled():
    patterns = torch.eye(3, dtype=F64)
    lam = torch.tensor([0.0, -math.inf, 0.0])
    layer = AssociativeMemory.from_patterns(patterns, steps=5, beta=30.0, log_weights=lam)
    query = torch.tensor([[0.1, 1.0, 0.0]], dtype=F64)
    _close(layer(query), patterns[:1], 1e-4)
    assert layer.assign(query)[0].tolist() == [0]


def test_leading_dims_are_separate_memories():
    rho, v = _draw(0, 2, 4, 3), _draw(1, 2, 6, 3)
    beta = torch.tensor([[0.5], [2.0]])
    layer = AssociativeMemory.from_patterns(rho, steps=2, beta=beta)
    assert (layer.n_memories, layer.n_features) == (4, 3)
    for i in range(2):
        one = AssociativeMemory.from_patterns(rho[i], steps=2, beta=beta[i])
        _close(layer(v)[i], one(v[i]))
        _close(layer(v[0])[i], one(v[0]))
        _close(layer.energy(v)[i], one.energy(v[i]))
        _close(layer.weights(v)[i], one.weights(v[i]))


def test_no_rows():
    layer = _full()
    v = torch.empty(0, 3, dtype=F64)
    assert layer(v).shape == (0, 3)
    assert layer.weights(v).shape == (0, 4)
    assert layer.energy(v).shape == layer.assign(v)[0].shape == (0,)


# ---- parameters --------------------------------------------------------------------------------


def test_parameters_of_a_new_layer():
    layer = AssociativeMemory(4, 3)
    names = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert names == {"memories": (4, 3), "log_beta": (1,)}
    assert layer.log_weights is None
    assert all(p.requires_grad and p.dtype == torch.float32 for p in layer.parameters())
    _equal(layer.beta, torch.ones(1))
    layer = AssociativeMemory(4, 3, beta=torch.tensor([1.0, 2.0, 3.0, 4.0]), learn_beta=False,
                              log_weights=True)  # fmt: skip
    assert not layer.log_beta.requires_grad
    torch.testing.assert_close(layer.beta, torch.arange(1.0, 5.0))
    assert layer.log_weights is not None
    _equal(layer.log_weights, nn.Parameter(torch.zeros(4)))
    with torch.no_grad():
        v = torch.randn(6, 3)
        assert layer(v).shape == (6, 3)


def test_patterns_are_copied_and_frozen_unless_asked():
    patterns, lam = _draw(0, 4, 3), _draw(1, 4)
    state = torch.get_rng_state()
    layer = AssociativeMemory.from_patterns(patterns, log_weights=lam)
    assert torch.equal(torch.get_rng_state(), state), "storing patterns drew random numbers"
    before = patterns.clone(), lam.clone()
    patterns.zero_()
    lam.zero_()
    _equal(layer.memories.data, before[0])
    _equal(layer.log_weights.data, before[1])
    assert not layer.memories.requires_grad
    assert not layer.log_beta.requires_grad
    learning = AssociativeMemory.from_patterns(patterns, learn_memories=True, learn_beta=True)
    assert learning.memories.requires_grad
    assert learning.log_beta.requires_grad
    assert AssociativeMemory.from_patterns(patterns, log_weights=True).log_weights.shape == (4,)
    # patterns with a gradient do not connect the layer to their graph
    grown = AssociativeMemory.from_patterns(_draw(0, 4, 3).requires_grad_() * 2)
    assert grown.memories.is_leaf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtype(dtype):
    layer = AssociativeMemory(4, 3, dtype=dtype, log_weights=True, device="cpu")
    assert layer.memories.dtype == layer.log_weights.dtype == dtype
    assert layer(torch.randn(5, 3).to(dtype)).dtype == dtype
    stored = AssociativeMemory.from_patterns(_draw(0, 4, 3, dtype=dtype))
    assert stored.memories.dtype == dtype
    wide = F64 if dtype == F64 else torch.float32
    assert layer.log_beta.dtype == stored.log_beta.dtype == wide


def test_default_dtype_and_conversion():
    torch.set_default_dtype(F64)
    try:
        assert AssociativeMemory(4, 3).memories.dtype == F64
    finally:
        torch.set_default_dtype(torch.float32)
    layer = _full().to(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    v = _draw(5, 6, 3)
    torch.testing.assert_close(layer(v.float()), _full()(v).float())


def test_meta_and_deferred_initialisation():
    layer = AssociativeMemory(4, 3, beta=2.0, log_weights=True, device="meta")
    assert layer(torch.empty(5, 3, device="meta")).shape == (5, 3)
    layer.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(0))
    plain = AssociativeMemory(4, 3, beta=2.0, log_weights=True)
    plain.reset_parameters(torch.Generator().manual_seed(0))
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        _equal(a, b)


def test_reset_parameters_repeats_and_restores():
    layer = AssociativeMemory(400, 30, beta=2.0, log_weights=True)
    layer.reset_parameters(torch.Generator().manual_seed(3))
    first = {k: v.clone() for k, v in layer.state_dict().items()}
    assert abs(float(first["memories"].mean())) < 0.05
    assert abs(float(first["memories"].std()) - 1) < 0.05
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1.0)
    layer.reset_parameters(torch.Generator().manual_seed(3))
    _equal(dict(layer.state_dict()), first)
    torch.manual_seed(7)
    one = AssociativeMemory(4, 3)
    torch.manual_seed(7)
    _equal(one.memories, AssociativeMemory(4, 3).memories)


def test_beta_can_be_set():
    layer = AssociativeMemory(4, 3)
    layer.beta = 5
    torch.testing.assert_close(layer.beta, torch.tensor([5.0]))
    layer.beta = torch.tensor(0.25)
    torch.testing.assert_close(layer.beta, torch.tensor([0.25]))
    assert [name for name, _ in layer.named_parameters()] == ["memories", "log_beta"]
    each = AssociativeMemory(4, 3, beta=torch.ones(4))
    each.beta = 2.0
    torch.testing.assert_close(each.beta, torch.full((4,), 2.0))
    each.beta = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    torch.testing.assert_close(each.beta, torch.arange(1.0, 5.0))


def test_beta_stays_positive():
    """With a rate at which a plain beta would become negative."""
    layer = AssociativeMemory.from_patterns(_draw(0, 4, 3), learn_beta=True)
    optimiser = torch.optim.SGD(layer.parameters(), 50.0)
    v = _draw(1, 20, 3)
    for _ in range(5):
        optimiser.zero_grad()
        (layer(v) - v).square().sum().backward()
        optimiser.step()
        assert layer.beta > 0


# ---- beta: half precision, its limits, parametrizations ----------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", [100.0, 1e5, 1e30])
def test_a_half_layer_has_the_beta_of_its_argument(dtype, beta):
    """1e5 is inf in float16, and 100 is 98.8 in bfloat16 after a logarithm."""
    layer = AssociativeMemory.from_patterns(torch.eye(3, dtype=dtype), beta=beta, learn_beta=True)
    torch.testing.assert_close(layer.beta, torch.tensor([beta]), rtol=1e-5, atol=0)
    v = torch.eye(3, dtype=dtype) * 0.75
    out = layer(v)
    _equal(out, torch.eye(3, dtype=dtype))
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


class _Shifted(nn.Module):
    """A parametrization: the parameter is the stored value plus one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1

    def right_inverse(self, x: Tensor) -> Tensor:
        return x - 1


class _OneWay(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize("beta", [2.0, torch.tensor(2.0), torch.tensor([2.0], dtype=F64)])
def test_a_parametrized_beta_can_be_set(beta):
    layer = AssociativeMemory(4, 3)
    nn.utils.parametrize.register_parametrization(layer, "log_beta", _Shifted())
    layer.beta = beta
    torch.testing.assert_close(layer.beta, torch.tensor([2.0]))
    stored = layer.parametrizations.log_beta.original
    torch.testing.assert_close(stored.detach(), torch.tensor([math.log(2.0) - 1]))
    assert isinstance(stored, nn.Parameter)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_a_converted_layer_keeps_its_parametrized_beta(convert):
    layer = AssociativeMemory(4, 3, beta=100.0)
    nn.utils.parametrize.register_parametrization(layer, "log_beta", _Shifted())
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
        nn.utils.parametrize.register_parametrization(layer, name, _Shifted())
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
    _equal(layer.beta.detach(), torch.ones(4, dtype=F64))


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


# ---- gradients ---------------------------------------------------------------------------------


def test_gradients_are_those_of_the_op():
    layer, v = _full(), _draw(5, 6, 3).requires_grad_()
    weight = _draw(7, 6, 3)
    (layer(v) * weight).sum().backward()
    rho, beta, lam = (
        x.detach().clone().requires_grad_() for x in (layer.memories, layer.beta, layer.log_weights)
    )
    x = v.detach().clone().requires_grad_()
    out = clam_kernels.am_recursion(x, rho, beta, 3, step=0.7, log_weights=lam)
    (out * weight).sum().backward()
    _close(v.grad, x.grad)
    _close(layer.memories.grad, rho.grad)
    _close(layer.log_weights.grad, lam.grad)
    _close(layer.log_beta.grad, beta.grad * beta.detach())


@pytest.mark.parametrize("method", ["forward", "energy", "weights"])
def test_gradcheck(method):
    layer, v = _full(), _draw(5, 5, 3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    mask = _draw(6, 5, 3) > 0

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, v: Tensor) -> Tensor:
            return layer(v, mask) if method == "forward" else getattr(self.layer, method)(v)

    module = Method()

    def call(v: Tensor, *values: Tensor) -> Tensor:
        named = {f"layer.{n}": x for n, x in zip(names, values, strict=True)}
        return torch.func.functional_call(module, named, (v,))

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(call, (v, *values), eps=1e-6, atol=1e-8)


def test_frozen_parameters_receive_nothing():
    layer = AssociativeMemory.from_patterns(_draw(0, 4, 3), steps=2)
    v = _draw(1, 5, 3).requires_grad_()
    layer(v).sum().backward()
    assert v.grad is not None
    assert all(p.grad is None for p in layer.parameters())
    assert not layer(v.detach()).requires_grad


def test_training_finds_the_blobs():
    """The memories of three blobs whose rows have hidden entries."""
    centers = 4 * torch.eye(3, dtype=F64)
    x = (centers[:, None] + 0.1 * _draw(0, 3, 30, 3)).reshape(-1, 3)
    layer = AssociativeMemory.from_patterns(x[[0, 30, 60]], beta=0.5, learn_memories=True)
    optimiser = torch.optim.Adam([layer.memories], 0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        hidden = torch.rand(x.shape, generator=generator) < 0.3
        out = layer(x.masked_fill(hidden, x.mean()), hidden)
        optimiser.zero_grad()
        (out - x).square().mean().backward()
        optimiser.step()
    _close(layer.memories.data, centers, 0.2)
    _equal(layer.assign(x)[0], torch.arange(3).repeat_interleave(30))


# ---- storage -----------------------------------------------------------------------------------


def _same(a: AssociativeMemory, b: AssociativeMemory) -> None:
    v = _draw(5, 6, 3)
    _equal(a(v), b(v))
    _equal(dict(a.state_dict()), dict(b.state_dict()))
    assert (a.steps, a.step, a.precision) == (b.steps, b.step, b.precision)
    flags = [p.requires_grad for p in a.parameters()]
    assert flags == [p.requires_grad for p in b.parameters()]


def test_state_dict_round_trip():
    layer, file = _full(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = _full(seed=10)
    other.load_state_dict(torch.load(file, weights_only=True))
    _same(layer, other)
    # a file of a trained layer in a frozen one, and the reverse
    frozen = AssociativeMemory.from_patterns(torch.zeros(4, 3, dtype=F64))
    frozen.load_state_dict(AssociativeMemory(4, 3, dtype=F64).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        frozen.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_with_a_scalar_beta_loads(assign, nested):
    """Earlier versions stored one beta and one log-weight for all memories, without a dim."""
    layer = AssociativeMemory.from_patterns(_draw(0, 4, 3), log_weights=torch.zeros(1, dtype=F64))
    old = {"memories": _draw(1, 4, 3), "log_beta": torch.tensor(2.0, dtype=F64).log(),
           "log_weights": torch.tensor(-0.5, dtype=F64)}  # fmt: skip
    state = {f"1.{name}": x for name, x in old.items()} if nested else old
    module = nn.Sequential(nn.Identity(), layer) if nested else layer
    module.load_state_dict(state, assign=assign)
    assert layer.log_beta.shape == layer.log_weights.shape == (1,)
    torch.testing.assert_close(layer.beta.detach(), torch.tensor([2.0], dtype=F64))
    _equal(layer.log_weights.detach(), torch.tensor([-0.5], dtype=F64))
    assert all(x.ndim == 0 for name, x in state.items() if "log" in name)


def test_a_file_of_a_half_layer_loads():
    old = {"memories": torch.eye(3, dtype=torch.bfloat16), "log_beta": torch.tensor(1.5).bfloat16()}
    layer = AssociativeMemory.from_patterns(torch.zeros(3, 3, dtype=torch.bfloat16))
    layer.load_state_dict(old)
    assert layer.log_beta.dtype == torch.float32
    torch.testing.assert_close(layer.beta.detach(), torch.tensor([1.5]).exp())
    layer.load_state_dict(old, assign=True)
    torch.testing.assert_close(layer.beta.detach(), torch.tensor([1.5]).exp())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("parametrized", [False, True])
def test_a_half_state_dict_leaves_log_beta_float32(parametrized, assign, dtype):
    model = nn.Sequential(AssociativeMemory(4, 3, beta=2.0, dtype=dtype))
    if parametrized:
        nn.utils.parametrize.register_parametrization(model[0], "log_beta", _Shifted())
    state = {name: x.to(dtype) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert model[0].log_beta.dtype == torch.float32
    model[0].beta = 1e5
    torch.testing.assert_close(model[0].beta.detach(), torch.tensor([1e5]), rtol=2e-6, atol=0)
    assert all(x.dtype == dtype for x in state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_are_equal_and_separate(copied):
    layer = _full()
    other = copied(layer)
    _same(layer, other)
    with torch.no_grad():
        other.memories.zero_()
    assert bool(layer.memories.detach().any())
    other.reset_parameters()
    torch.testing.assert_close(other.beta.detach(), torch.tensor([0.8], dtype=F64))


def test_repr_says_what_the_layer_is():
    assert repr(AssociativeMemory(4, 3)) == "AssociativeMemory(4, 3, steps=1, step=1)"
    assert repr(_full()) == (
        "AssociativeMemory(4, 3, steps=3, step=0.7, log_weights=True, precision='highest')"
    )
    stored = AssociativeMemory.from_patterns(torch.zeros(2, 4, 3))
    assert repr(stored) == (
        "AssociativeMemory(4, 3, steps=1, step=1, batch=[2], learn_memories=False,"
        " learn_beta=False)"
    )
    repr(AssociativeMemory(4, 3, device="meta"))


# ---- compilation, transforms, autocast -----------------------------------------------------------


def _model(dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3, dtype=dtype), _full(dtype=dtype),
                         nn.Linear(3, 2, dtype=dtype))  # fmt: skip


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_is_one_graph_for_all_row_counts():
    counting = Counting()
    model = _model()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for rows in (5, 6, 7, 8, 19):
        x = _draw(rows, rows, 5)
        result = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for a, b in zip(result, expected, strict=True):
            _close(a, b)
    assert counting.compiled <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("method", ["energy", "assign", "weights"])
def test_methods_compile(method):
    layer, v = _full(), _draw(5, 6, 3)
    compiled = torch.compile(lambda x: getattr(layer, method)(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(v), getattr(layer, method)(v))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_beta_that_is_set_does_not_recompile():
    counting, layer, v = Counting(), _full(), _draw(5, 6, 3)
    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    for beta in (0.5, 1.0, 2.0):
        layer.beta = beta
        _close(compiled(v), layer(v))
    assert counting.compiled == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_error_messages_are_the_same_in_compiled_code():
    compiled = torch.compile(_full(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"v: expected shape \[\.\.\., N, 3\] to match memories"):
        compiled(_draw(0, 6, 2))


@pytest.mark.usefixtures("fresh_compiler")
def test_export_with_a_symbolic_row_count():
    layer = _full()
    shapes = ({0: torch.export.Dim("n", min=2)},)
    program = torch.export.export(layer, (_draw(0, 4, 3),), dynamic_shapes=shapes, strict=False)
    _equal(program.module()(_draw(1, 9, 3)), layer(_draw(1, 9, 3)))


def test_stacked_layers_run_under_vmap():
    layers = [_full(seed) for seed in (0, 10, 20)]
    parameters, buffers = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")

    def call(p: Any, b: Any, v: Tensor) -> Tensor:
        return torch.func.functional_call(base, (p, b), (v,))

    v = _draw(5, 6, 3)
    result = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, v)
    for a, layer in zip(result, layers, strict=True):
        _close(a, layer(v))


def test_per_sample_gradients():
    layer, v = _full(), _draw(5, 6, 3)
    parameters = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(p: Any, row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (row[None],)).square().sum()

    result = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, v)
    layer(v).square().sum().backward()
    for name, p in layer.named_parameters():
        _close(result[name].sum(0), p.grad)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(compiled):
    """Half-precision rows meet float32 memories; the state is never rounded to half."""
    model = _model(torch.float32)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = _draw(0, 6, 5, dtype=torch.float32)
    dtypes = []
    handle = model[1].register_forward_hook(lambda m, i, o: dtypes.append((i[0].dtype, o.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    handle.remove()
    assert dtypes == [(torch.bfloat16, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = run(x)
        loss = out.float().square().mean()
    loss.backward()
    assert out.dtype == torch.bfloat16
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert bool(p.grad.isfinite().all())
    torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.05)


def test_autocast_of_the_methods():
    layer = _full(dtype=torch.float32)
    v = _draw(0, 6, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = v.bfloat16()
        torch.testing.assert_close(layer.energy(half), layer.energy(half.float()))
        assert torch.equal(layer.assign(half)[0], layer.assign(half.float())[0])
        torch.testing.assert_close(layer.weights(half), layer.weights(half.float()))


# ---- layers sharded over processes ---------------------------------------------------------------


def test_every_parameter_has_a_dim():
    """fully_shard splits a parameter along its first dim and refuses one without dims."""
    layers = [
        AssociativeMemory(4, 3, beta=beta, log_weights=True)
        for beta in (2, torch.tensor(2.0), torch.ones(1), torch.ones(4))
    ]
    layers.append(AssociativeMemory.from_patterns(torch.eye(3), log_weights=torch.tensor(0.5)))
    layers.append(AssociativeMemory.from_patterns(torch.zeros(2, 3, 3), beta=torch.ones(2, 1)))
    assert all(p.ndim for layer in layers for p in layer.parameters())


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch has no gloo")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("beta", [0.8, torch.tensor([0.5, 1.0, 1.5, 2.0])], ids=["one", "each"])
def test_fully_shard(mesh, beta):
    from torch.distributed.fsdp import fully_shard

    plain = AssociativeMemory(4, 3, steps=3, beta=beta, log_weights=True)
    layer, v = copy.deepcopy(plain), _draw(0, 6, 3, dtype=torch.float32)
    fully_shard(layer, mesh=mesh)
    for _ in range(2):
        for one in (layer, plain):
            one.zero_grad()
            one(v).square().sum().backward()
        for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
            _equal(a.grad.full_tensor(), b.grad)
        layer.beta = plain.beta = 2.0
        _equal(layer.log_beta.full_tensor(), plain.log_beta)
    layer.beta = plain.beta = torch.full((len(plain.log_beta),), 3.0)
    _equal(layer.log_beta.full_tensor(), plain.log_beta)


@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_a_layer_made_on_meta_is_sharded_and_then_filled(mesh):
    from torch.distributed.fsdp import fully_shard

    layer = AssociativeMemory(4, 3, beta=2.0, log_weights=True, device="meta")
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(layer.beta.full_tensor(), torch.tensor([2.0]))
    assert not bool(layer.log_weights.full_tensor().any())
    assert bool(layer(torch.zeros(2, 3)).isfinite().all())


# ---- errors ------------------------------------------------------------------------------------


def _new(**options: Any) -> Any:
    return lambda: AssociativeMemory(**{"n_memories": 3, "n_features": 4, **options})


def _stored(patterns: Any = None, **options: Any) -> Any:
    patterns_or_zeros = torch.zeros(3, 4) if patterns is None else patterns
    return lambda: AssociativeMemory.from_patterns(patterns_or_zeros, **options)


def _called(*args: Any, method: str = "forward", **options: Any) -> Any:
    beta = options.pop("beta", 1.0)
    return lambda: getattr(AssociativeMemory(3, 4, beta=beta), method)(*args, **options)


def _set(value: Any, beta: Any = 1.0) -> Any:
    return lambda: setattr(AssociativeMemory(3, 4, beta=beta), "beta", value)


FLOATS = "float16, bfloat16, float32 or float64"
WORDS = "'highest', 'high', 'medium' or None"
V = torch.zeros(2, 4)
ERRORS = [
    (_new(n_memories=0), ValueError, "n_memories: expected an int >= 1, got 0"),
    (_new(n_memories=True), TypeError, "n_memories: expected an int >= 1, got True"),
    (_new(n_memories="3"), TypeError, "n_memories: expected an int >= 1, got '3'"),
    (_new(n_features=0), ValueError, "n_features: expected an int >= 1, got 0"),
    (_new(n_features=2.0), TypeError, "n_features: expected an int >= 1, got 2.0"),
    (_new(steps=-1), ValueError, "steps: expected an int >= 0, got -1"),
    (_new(steps=1.5), TypeError, "steps: expected an int >= 0, got 1.5"),
    (_new(step=-0.5), ValueError, "step: expected a finite number >= 0, got -0.5"),
    (_new(step=V), TypeError, "step: expected a number, got Tensor"),
    (_new(beta=0.0), ValueError, "beta: expected a finite number > 0, got 0.0"),
    (_new(beta=math.inf), ValueError, "beta: expected a finite number > 0, got inf"),
    (_new(beta=math.nan), ValueError, "beta: expected a finite number > 0, got nan"),
    (_new(beta="1"), TypeError, "beta: expected a number or a Tensor, got str"),
    (_new(beta=torch.tensor([1.0, -1.0, 0.0])), ValueError,
     "beta: expected finite values > 0, got -1.0"),
    (_new(beta=torch.ones(3, dtype=torch.int64)), TypeError,
     f"beta: expected dtype {FLOATS}, got int64"),
    (_new(beta=torch.ones(4)), ValueError,
     "beta: expected shape broadcastable to [..., 3] (K) to match rho [3, 4], got [4]"),
    (_new(learn_beta=1), TypeError, "learn_beta: expected a bool, got int"),
    (_new(log_weights=None), TypeError, "log_weights: expected a bool, got NoneType"),
    (_new(precision="low"), ValueError, f"precision: expected {WORDS}, got 'low'"),
    (_new(precision=32), TypeError, "precision: expected a str or None, got int"),
    (_new(dtype=torch.int64), TypeError, f"dtype: expected {FLOATS}, got int64"),
    (_stored([[1.0]]), TypeError, "patterns: expected a Tensor, got list"),
    (_stored(torch.zeros(3, 4, dtype=torch.int64)), TypeError,
     f"patterns: expected dtype {FLOATS}, got int64"),
    (_stored(torch.zeros(4)), ValueError, "patterns: expected shape [..., K, D], got [4]"),
    (_stored(torch.zeros(0, 4)), ValueError, "patterns: expected K >= 1, got [0, 4]"),
    (_stored(torch.zeros(3, 0)), ValueError, "patterns: expected D >= 1, got [3, 0]"),
    (_stored(learn_memories=1), TypeError, "learn_memories: expected a bool, got int"),
    (_stored(steps=-1), ValueError, "steps: expected an int >= 0, got -1"),
    (_stored(log_weights=torch.zeros(2)), ValueError,
     "log_weights: expected shape broadcastable to [..., 3] (K) to match rho [3, 4], got [2]"),
    (_stored(log_weights=torch.zeros(3, dtype=torch.int64)), TypeError,
     f"log_weights: expected dtype {FLOATS}, got int64"),
    (_set(-1.0), ValueError, "beta: expected a finite number > 0, got -1.0"),
    (_set(torch.tensor(math.nan)), ValueError, "beta: expected finite values > 0, got nan"),
    (_set(torch.ones(3)), ValueError, "beta: expected shape broadcastable to [1], got [3]"),
    (_set(1e39), ValueError, "beta: expected a number from 1e-37 to 1e+38, got 1e+39"),
    (_set(torch.tensor([1e-40])), ValueError,
     f"beta: expected values from 1e-37 to 1e+38, got {torch.tensor(1e-40).item()}"),
    (_new(beta=1e-40), ValueError, "beta: expected a number from 1e-37 to 1e+38, got 1e-40"),
    (_new(beta=1e308, dtype=torch.float16), ValueError,
     "beta: expected a number from 1e-37 to 1e+38, got 1e+308"),
    (_set(torch.ones(2), torch.ones(3)), ValueError,
     "beta: expected shape broadcastable to [3], got [2]"),
    (_called([1.0]), TypeError, "v: expected a Tensor, got list"),
    (_called(V.double()), TypeError, "v: expected dtype float32 to match memories, got float64"),
    (_called(V.to("meta")), ValueError, "v: expected device cpu to match memories, got meta"),
    (_called(V[0]), ValueError,
     "v: expected shape [..., N, 4] to match memories [3, 4], got [4]"),
    (_called(V[:, :3], method="weights"), ValueError,
     "v: expected shape [..., N, 4] to match memories [3, 4], got [2, 3]"),
    (_called(V, V[:, :3]), ValueError,
     "update_mask: expected shape broadcastable to [..., 2, 4] (N, D) to match v [2, 4],"
     " got [2, 3]"),
    (_called(V, [1.0]), TypeError, "update_mask: expected a Tensor or None, got list"),
    (_called(V, steps=-1), ValueError, "steps: expected an int >= 0, got -1"),
    (_called(V, method="energy", beta=torch.ones(3)), ValueError,
     "beta: expected shape [] or [..., 1] (one for all memories), got [3]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_errors_verbatim(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


# ---- documentation -----------------------------------------------------------------------------


def test_examples_run():
    result = doctest.testmod(clam_kernels.nn.am)
    assert not result.failed
    assert result.attempted


def test_docstring_names_every_argument():
    for function, text in (
        (AssociativeMemory.__init__, AssociativeMemory.__doc__),
        (AssociativeMemory.from_patterns, AssociativeMemory.from_patterns.__doc__),
        (AssociativeMemory.forward, AssociativeMemory.forward.__doc__),
    ):
        for name in inspect.signature(function).parameters:
            assert name == "self" or f"\n        {name} : " in text or f"\n    {name} : " in text
