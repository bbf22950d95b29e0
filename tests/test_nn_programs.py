# SPDX-License-Identifier: Apache-2.0
"""A layer compiled, exported, under transforms and autocast, and sharded over processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _compiling import Counting
from _layer import F64, close, draw, equal, full
from torch import Tensor, nn

from clam_kernels.nn import AssociativeMemory


def _model(dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3, dtype=dtype), full(dtype=dtype),
                         nn.Linear(3, 2, dtype=dtype))  # fmt: skip


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_is_one_graph_for_all_row_counts():
    counting = Counting()
    model = _model()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for rows in (5, 6, 7, 8, 19):
        x = draw(rows, rows, 5)
        result = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for a, b in zip(result, expected, strict=True):
            close(a, b)
    assert counting.compiled <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("method", ["energy", "assign", "weights"])
def test_methods_compile(method):
    layer, v = full(), draw(5, 6, 3)
    compiled = torch.compile(lambda x: getattr(layer, method)(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(v), getattr(layer, method)(v))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_beta_that_is_set_does_not_recompile():
    counting, layer, v = Counting(), full(), draw(5, 6, 3)
    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    for beta in (0.5, 1.0, 2.0):
        layer.beta = beta
        close(compiled(v), layer(v))
    assert counting.compiled == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_error_messages_are_the_same_in_compiled_code():
    compiled = torch.compile(full(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"v: expected shape \[\.\.\., N, 3\] to match memories"):
        compiled(draw(0, 6, 2))


@pytest.mark.usefixtures("fresh_compiler")
def test_export_with_a_symbolic_row_count():
    layer = full()
    shapes = ({0: torch.export.Dim("n", min=2)},)
    program = torch.export.export(layer, (draw(0, 4, 3),), dynamic_shapes=shapes, strict=False)
    equal(program.module()(draw(1, 9, 3)), layer(draw(1, 9, 3)))


def test_stacked_layers_run_under_vmap():
    layers = [full(seed) for seed in (0, 10, 20)]
    parameters, buffers = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")

    def call(p: Any, b: Any, v: Tensor) -> Tensor:
        return torch.func.functional_call(base, (p, b), (v,))

    v = draw(5, 6, 3)
    result = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, v)
    for a, layer in zip(result, layers, strict=True):
        close(a, layer(v))


def test_per_sample_gradients():
    layer, v = full(), draw(5, 6, 3)
    parameters = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(p: Any, row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (row[None],)).square().sum()

    result = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, v)
    layer(v).square().sum().backward()
    for name, p in layer.named_parameters():
        close(result[name].sum(0), p.grad)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(compiled):
    """Half-precision rows meet float32 memories; the state is never rounded to half."""
    model = _model(torch.float32)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = draw(0, 6, 5, dtype=torch.float32)
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
    layer = full(dtype=torch.float32)
    v = draw(0, 6, 3, dtype=torch.float32)
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
    layer, v = copy.deepcopy(plain), draw(0, 6, 3, dtype=torch.float32)
    fully_shard(layer, mesh=mesh)
    for _ in range(2):
        for one in (layer, plain):
            one.zero_grad()
            one(v).square().sum().backward()
        for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
            equal(a.grad.full_tensor(), b.grad)
        layer.beta = plain.beta = 2.0
        equal(layer.log_beta.full_tensor(), plain.log_beta)
    layer.beta = plain.beta = torch.full((len(plain.log_beta),), 3.0)
    equal(layer.log_beta.full_tensor(), plain.log_beta)


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
