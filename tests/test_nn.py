# SPDX-License-Identifier: Apache-2.0
"""The layers: values against the ops, gradients, parameters and files, documentation."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import math
import pickle

import pytest
import torch
from _layer import F64, HALVES, Shifted, close, draw, equal, full
from torch import Tensor, nn

import clam_kernels
import clam_kernels.nn.am
from clam_kernels.nn import AssociativeMemory

# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_a_masked_memory_gets_no_weight(value):
    rho = torch.cat([torch.randn(5, 4), torch.full((1, 4), value)])
    out = torch.tensor([0.0] * 5 + [-torch.inf])
    v = torch.randn(7, 4)
    layer = AssociativeMemory.from_patterns(rho, log_weights=out)
    rest = AssociativeMemory.from_patterns(rho[:5])
    close(layer.weights(v)[:, :5], rest.weights(v), 1e-6)
    assert (layer.weights(v)[:, 5] == 0).all()
    nothing = AssociativeMemory.from_patterns(rho, log_weights=torch.full((6,), -torch.inf))
    assert (nothing.weights(v) == 0).all()


def test_forward_is_the_recursion():
    layer, v = full(), draw(5, 6, 3)
    mask = draw(6, 6, 3) > 0
    call = {"step": 0.7, "log_weights": layer.log_weights, "precision": "highest"}
    rho, beta = layer.memories, layer.beta
    equal(layer(v), clam_kernels.am_recursion(v, rho, beta, 3, **call))
    equal(layer(v, mask), clam_kernels.am_recursion(v, rho, beta, 3, update_mask=mask, **call))
    equal(layer(v, steps=1), clam_kernels.am_step(v, rho, beta, **call))
    equal(layer(v, mask, 0), v)
    assert torch.equal(layer(v, mask)[~mask], v[~mask])


def test_energy_assign_and_weights_are_those_of_the_ops():
    layer, v = full(), draw(5, 6, 3)
    rho, lam = layer.memories, layer.log_weights
    equal(layer.energy(v), clam_kernels.am_energy(v, rho, layer.beta, log_weights=lam))
    equal(layer.assign(v), clam_kernels.am_assign(v, rho, log_weights=lam))
    close(layer(v, steps=1), v + 0.7 * (layer.weights(v) @ rho - v))
    close(layer.weights(v).sum(-1), torch.ones(6, dtype=F64))
    assert (layer.energy(layer(v)) <= layer.energy(v)).all()


def test_weights_follow_their_equation():
    """With a beta and a log-weight for each memory, leading dims, and far from the origin."""
    rho, beta, lam = draw(0, 2, 4, 3), 0.3 + draw(1, 4).square(), draw(2, 2, 4)
    lam[1, 2] = -math.inf
    layer = AssociativeMemory.from_patterns(rho, beta=beta, log_weights=lam)
    v = draw(3, 5, 3)
    sqdist = (v[:, None] - rho[:, None]).square().sum(-1)
    expected = (lam[:, None] - beta * sqdist).softmax(-1)
    close(layer.weights(v), expected)
    assert (layer.weights(v)[1, :, 2] == 0).all()
    far = AssociativeMemory.from_patterns((rho + 1e5).float(), beta=beta, log_weights=lam)
    near = AssociativeMemory.from_patterns((rho + 1e5).float().double(), beta=beta, log_weights=lam)
    x = (v + 1e5).float()
    close(far.weights(x), near.weights(x.double()).float(), 1e-5)


@pytest.mark.parametrize(
    ("scale", "beta"), [(1e10, 1e38), (1e20, 1e-37), (1e19, 1e-37), (1e-25, 1e38), (1e-30, 1.0)]
)
def test_weights_are_right_at_the_ends_of_float32(scale, beta):
    """Squared distances and their products with beta overflow."""
    rho, v = draw(0, 4, 4).float() * scale, draw(1, 3, 4).float() * scale
    layer = AssociativeMemory.from_patterns(rho, beta=beta, learn_memories=True, learn_beta=True)
    sqdist = (v.double()[:, None] - rho.double()).square().sum(-1)
    expected = (-layer.beta.double() * sqdist).softmax(-1)
    weights = layer.weights(v)
    close(weights.double(), expected, 1e-6)
    torch.testing.assert_close(layer(v), weights @ rho, rtol=0, atol=2e-6 * scale)
    weights[:, 0].sum().backward()
    assert not any(x.grad.isnan().any() for x in (layer.memories, layer.log_beta))


def test_weights_in_half_precision_are_float32():
    layer = AssociativeMemory.from_patterns(draw(0, 4, 3, dtype=torch.bfloat16))
    v = draw(1, 5, 3, dtype=torch.bfloat16)
    weights = layer.weights(v)
    assert weights.dtype == torch.float32
    close(weights.sum(-1), torch.ones(5), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        equal(layer.weights(v), weights)


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_damaged_patterns_are_recalled(beta):
    """Case 12 of the specification: half of the entries hidden, the others masked."""
    patterns = draw(0, 5, 64)
    order = draw(1, 5, 64).argsort(-1)
    hidden = order < 32
    layer = AssociativeMemory.from_patterns(patterns, steps=5, beta=beta)
    recalled = layer(patterns.masked_fill(hidden, 0.0), hidden)
    assert (recalled - patterns).abs().max() < 1e-9
    assert torch.equal(recalled[~hidden], patterns[~hidden])


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_stored_patterns_return_themselves(beta):
    patterns = draw(0, 5, 64)
    layer = AssociativeMemory.from_patterns(patterns, steps=5, beta=beta)
    close(layer(patterns), patterns, 1e-9)
    equal(layer.assign(patterns)[0], torch.arange(5))


def test_a_masked_memory_is_not_recalled():
    patterns = torch.eye(3, dtype=F64)
    lam = torch.tensor([0.0, -math.inf, 0.0])
    layer = AssociativeMemory.from_patterns(patterns, steps=5, beta=30.0, log_weights=lam)
    query = torch.tensor([[0.1, 1.0, 0.0]], dtype=F64)
    close(layer(query), patterns[:1], 1e-4)
    assert layer.assign(query)[0].tolist() == [0]


def test_leading_dims_are_separate_memories():
    rho, v = draw(0, 2, 4, 3), draw(1, 2, 6, 3)
    beta = torch.tensor([[0.5], [2.0]])
    layer = AssociativeMemory.from_patterns(rho, steps=2, beta=beta)
    assert (layer.n_memories, layer.n_features) == (4, 3)
    for i in range(2):
        one = AssociativeMemory.from_patterns(rho[i], steps=2, beta=beta[i])
        close(layer(v)[i], one(v[i]))
        close(layer(v[0])[i], one(v[0]))
        close(layer.energy(v)[i], one.energy(v[i]))
        close(layer.weights(v)[i], one.weights(v[i]))


def test_no_rows():
    layer = full()
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
    equal(layer.beta, torch.ones(1))
    layer = AssociativeMemory(4, 3, beta=torch.tensor([1.0, 2.0, 3.0, 4.0]), learn_beta=False,
                              log_weights=True)  # fmt: skip
    assert not layer.log_beta.requires_grad
    torch.testing.assert_close(layer.beta, torch.arange(1.0, 5.0))
    assert layer.log_weights is not None
    equal(layer.log_weights, nn.Parameter(torch.zeros(4)))
    with torch.no_grad():
        v = torch.randn(6, 3)
        assert layer(v).shape == (6, 3)


def test_patterns_are_copied_and_frozen_unless_asked():
    patterns, lam = draw(0, 4, 3), draw(1, 4)
    state = torch.get_rng_state()
    layer = AssociativeMemory.from_patterns(patterns, log_weights=lam)
    assert torch.equal(torch.get_rng_state(), state), "storing patterns drew random numbers"
    before = patterns.clone(), lam.clone()
    patterns.zero_()
    lam.zero_()
    equal(layer.memories.data, before[0])
    equal(layer.log_weights.data, before[1])
    assert not layer.memories.requires_grad
    assert not layer.log_beta.requires_grad
    learning = AssociativeMemory.from_patterns(patterns, learn_memories=True, learn_beta=True)
    assert learning.memories.requires_grad
    assert learning.log_beta.requires_grad
    assert AssociativeMemory.from_patterns(patterns, log_weights=True).log_weights.shape == (4,)
    # patterns with a gradient do not connect the layer to their graph
    grown = AssociativeMemory.from_patterns(draw(0, 4, 3).requires_grad_() * 2)
    assert grown.memories.is_leaf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtype(dtype):
    layer = AssociativeMemory(4, 3, dtype=dtype, log_weights=True, device="cpu")
    assert layer.memories.dtype == layer.log_weights.dtype == dtype
    assert layer(torch.randn(5, 3).to(dtype)).dtype == dtype
    stored = AssociativeMemory.from_patterns(draw(0, 4, 3, dtype=dtype))
    assert stored.memories.dtype == dtype
    wide = F64 if dtype == F64 else torch.float32
    assert layer.log_beta.dtype == stored.log_beta.dtype == wide


def test_default_dtype_and_conversion():
    torch.set_default_dtype(F64)
    try:
        assert AssociativeMemory(4, 3).memories.dtype == F64
    finally:
        torch.set_default_dtype(torch.float32)
    layer = full().to(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    v = draw(5, 6, 3)
    torch.testing.assert_close(layer(v.float()), full()(v).float())


def test_meta_and_deferred_initialisation():
    layer = AssociativeMemory(4, 3, beta=2.0, log_weights=True, device="meta")
    assert layer(torch.empty(5, 3, device="meta")).shape == (5, 3)
    layer.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(0))
    plain = AssociativeMemory(4, 3, beta=2.0, log_weights=True)
    plain.reset_parameters(torch.Generator().manual_seed(0))
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        equal(a, b)


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
    equal(dict(layer.state_dict()), first)
    torch.manual_seed(7)
    one = AssociativeMemory(4, 3)
    torch.manual_seed(7)
    equal(one.memories, AssociativeMemory(4, 3).memories)


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
    layer = AssociativeMemory.from_patterns(draw(0, 4, 3), learn_beta=True)
    optimiser = torch.optim.SGD(layer.parameters(), 50.0)
    v = draw(1, 20, 3)
    for _ in range(5):
        optimiser.zero_grad()
        (layer(v) - v).square().sum().backward()
        optimiser.step()
        assert layer.beta > 0


# ---- gradients ---------------------------------------------------------------------------------


def test_gradients_are_those_of_the_op():
    layer, v = full(), draw(5, 6, 3).requires_grad_()
    weight = draw(7, 6, 3)
    (layer(v) * weight).sum().backward()
    rho, beta, lam = (
        x.detach().clone().requires_grad_() for x in (layer.memories, layer.beta, layer.log_weights)
    )
    x = v.detach().clone().requires_grad_()
    out = clam_kernels.am_recursion(x, rho, beta, 3, step=0.7, log_weights=lam)
    (out * weight).sum().backward()
    close(v.grad, x.grad)
    close(layer.memories.grad, rho.grad)
    close(layer.log_weights.grad, lam.grad)
    close(layer.log_beta.grad, beta.grad * beta.detach())


@pytest.mark.parametrize("method", ["forward", "energy", "weights"])
def test_gradcheck(method):
    layer, v = full(), draw(5, 5, 3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    mask = draw(6, 5, 3) > 0

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
    layer = AssociativeMemory.from_patterns(draw(0, 4, 3), steps=2)
    v = draw(1, 5, 3).requires_grad_()
    layer(v).sum().backward()
    assert v.grad is not None
    assert all(p.grad is None for p in layer.parameters())
    assert not layer(v.detach()).requires_grad


def test_training_finds_the_blobs():
    """The memories of three blobs whose rows have hidden entries."""
    centers = 4 * torch.eye(3, dtype=F64)
    x = (centers[:, None] + 0.1 * draw(0, 3, 30, 3)).reshape(-1, 3)
    layer = AssociativeMemory.from_patterns(x[[0, 30, 60]], beta=0.5, learn_memories=True)
    optimiser = torch.optim.Adam([layer.memories], 0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        hidden = torch.rand(x.shape, generator=generator) < 0.3
        out = layer(x.masked_fill(hidden, x.mean()), hidden)
        optimiser.zero_grad()
        (out - x).square().mean().backward()
        optimiser.step()
    close(layer.memories.data, centers, 0.2)
    equal(layer.assign(x)[0], torch.arange(3).repeat_interleave(30))


# ---- storage -----------------------------------------------------------------------------------


def _same(a: AssociativeMemory, b: AssociativeMemory) -> None:
    v = draw(5, 6, 3)
    equal(a(v), b(v))
    equal(dict(a.state_dict()), dict(b.state_dict()))
    assert (a.steps, a.step, a.precision) == (b.steps, b.step, b.precision)
    flags = [p.requires_grad for p in a.parameters()]
    assert flags == [p.requires_grad for p in b.parameters()]


def test_state_dict_round_trip():
    layer, file = full(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = full(seed=10)
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
    layer = AssociativeMemory.from_patterns(draw(0, 4, 3), log_weights=torch.zeros(1, dtype=F64))
    old = {"memories": draw(1, 4, 3), "log_beta": torch.tensor(2.0, dtype=F64).log(),
           "log_weights": torch.tensor(-0.5, dtype=F64)}  # fmt: skip
    state = {f"1.{name}": x for name, x in old.items()} if nested else old
    module = nn.Sequential(nn.Identity(), layer) if nested else layer
    module.load_state_dict(state, assign=assign)
    assert layer.log_beta.shape == layer.log_weights.shape == (1,)
    torch.testing.assert_close(layer.beta.detach(), torch.tensor([2.0], dtype=F64))
    equal(layer.log_weights.detach(), torch.tensor([-0.5], dtype=F64))
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
        nn.utils.parametrize.register_parametrization(model[0], "log_beta", Shifted())
    state = {name: x.to(dtype) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert model[0].log_beta.dtype == torch.float32
    model[0].beta = 1e5
    torch.testing.assert_close(model[0].beta.detach(), torch.tensor([1e5]), rtol=2e-6, atol=0)
    assert all(x.dtype == dtype for x in state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_are_equal_and_separate(copied):
    layer = full()
    other = copied(layer)
    _same(layer, other)
    with torch.no_grad():
        other.memories.zero_()
    assert bool(layer.memories.detach().any())
    other.reset_parameters()
    torch.testing.assert_close(other.beta.detach(), torch.tensor([0.8], dtype=F64))


def test_repr_says_what_the_layer_is():
    assert repr(AssociativeMemory(4, 3)) == "AssociativeMemory(4, 3, steps=1, step=1)"
    assert repr(full()) == (
        "AssociativeMemory(4, 3, steps=3, step=0.7, log_weights=True, precision='highest')"
    )
    stored = AssociativeMemory.from_patterns(torch.zeros(2, 4, 3))
    assert repr(stored) == (
        "AssociativeMemory(4, 3, steps=1, step=1, batch=[2], learn_memories=False,"
        " learn_beta=False)"
    )
    repr(AssociativeMemory(4, 3, device="meta"))


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
