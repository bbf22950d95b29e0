# SPDX-License-Identifier: Apache-2.0
"""The contract of the associative memory alone: beta, log-weights, centring, energies."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import clam_kernels as ck
from clam_kernels import testing

AM = ("am_step", "am_recursion", "am_energy", "am_assign")
WITH_BETA = AM[:3]


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _with(sample: Any, args: list[Any]) -> Any:
    return testing.Sample(sample.op, sample.name, tuple(args), sample.differentiable)


# ---- samples, workloads, options ----------------------------------------------------------------


def test_samples_reach_every_kind_of_argument():
    """The samples contain every kind of argument that the contract promises to test."""
    rows = testing.samples("am_recursion")
    arguments = [
        dict(zip(testing.argument_names("am_recursion"), r.args, strict=False)) for r in rows
    ]
    betas = {tuple(g["beta"].shape) for g in arguments if isinstance(g["beta"], Tensor)}
    assert {(), (1,), (4,), (2, 1), (2, 4)} <= betas
    numbers = {g["beta"] for g in arguments if not isinstance(g["beta"], Tensor)}
    assert {0.0, float("inf")} <= numbers
    masks = [g["update_mask"] for g in arguments if g["update_mask"] is not None]
    assert any(m.dtype == torch.bool for m in masks)
    assert any(((m > 0) & (m < 1)).any() for m in masks if m.dtype != torch.bool)
    assert {0, 1, 2, 3} <= {m.ndim for m in masks}
    weights = [g["log_weights"] for g in arguments if g["log_weights"] is not None]
    masked = [w == -torch.inf for w in weights]
    assert any(d.all() for d in masked)
    assert any(d.any() and not d.all() for d in masked)
    assert any(d.ndim == 2 and d.all(-1).any() and not d.all() for d in masked)
    assert {0, 1, 3} <= {g["steps"] for g in arguments}
    assert {0, 1} <= {g["v"].shape[-2] for g in arguments}
    assert 1 in {g["rho"].shape[-2] for g in arguments}
    assert {1, 3, 17} <= {g["v"].shape[-1] for g in arguments}
    leads = {(g["v"].ndim - 2, g["rho"].ndim - 2) for g in arguments}
    assert {(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 0)} <= leads


NAMED = {
    "am_recursion/100k-16-64-T10-fp32": (100_000, 16, 64),
    "am_recursion/50k-16-1000-T3-fp32": (50_000, 16, 1000),
    "am_recursion/200k-2-8-T10-fp32": (200_000, 2, 8),
    "am_step/1m-16-1000-fp32": (1_000_000, 16, 1000),
    "am_step/100k-16-64-fp32": (100_000, 16, 64),
    "am_energy/100k-16-64-fp32": (100_000, 16, 64),
    "am_assign/100k-16-64-fp32": (100_000, 16, 64),
}


@pytest.mark.contract(ops=AM)
def test_named_workloads(spec):
    """Shapes, steps and the counted work of every named workload."""
    rows = testing.workloads(spec.name)
    assert rows
    for row in rows:
        assert row.op == spec.name
        assert row.name.startswith(f"{spec.name}/")
        args = row.make(0)
        n, d, k = NAMED[row.name]
        assert args[0].shape == (n, d)
        assert args[1].shape == (k, d)
        assert args[0].dtype == args[1].dtype == torch.float32
        assert args[3:] == (
            (int(row.name.split("-T")[1].split("-")[0]),) if "-T" in row.name else ()
        )
        assert torch.equal(args[0], row.make(0)[0])
        assert not torch.equal(args[0], row.make(1)[0])
        assert row.bytes >= 4 * (n * d + k * d + n)
        steps = args[3] if len(args) > 3 else 1
        assert row.flops in (2 * n * k * d * steps, 4 * n * k * d * steps)


def test_workload_names_are_complete():
    assert {r.name for r in testing.workloads() if r.op in AM} == set(NAMED)


@pytest.mark.parametrize("name", ["step", "update_mask", "log_weights", "precision"])
def test_options_are_keywords(name):
    for op in AM:
        kinds = {p.name: p.kind for p in inspect.signature(getattr(ck, op)).parameters.values()}
        if name in kinds:
            assert kinds[name] is inspect.Parameter.KEYWORD_ONLY


def test_explain():
    """Numbers between the tensors, and a precision at the end."""
    v, rho = torch.zeros(5, 3), torch.ones(4, 3)
    assert ck.explain(ck.am_energy, v, rho, 1.0) == (
        "clam::am_energy: reference at highest precision (the tensors are on cpu)"
    )
    assert ck.explain(torch.ops.clam.am_assign, v, rho, None, "medium") == (
        "clam::am_assign: reference at medium (float32 on a CPU) precision (the tensors are on cpu)"
    )


def test_legal_limits():
    """0 and inf are betas of a step; a tensor with inf gives NaN, not an error; step may be 0."""
    v, rho = torch.randn(5, 3), torch.randn(4, 3)
    assert ck.am_step(v, rho, 0).isfinite().all()
    assert ck.am_step(v, rho, math.inf).isfinite().all()
    assert ck.am_step(v, rho, torch.tensor(math.inf)).isnan().all()
    assert torch.equal(ck.am_step(v, rho, 1.0, step=0.0), v)
    assert torch.equal(ck.am_recursion(v, rho, 1.0, 0), v)


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", ["am_step", "am_recursion", "am_energy"])
@pytest.mark.parametrize(
    ("beta", "overload"),
    [
        (1.5, "default"),
        (2, "default"),
        (torch.tensor(1.5), "beta_tensor"),
        (torch.tensor([1.5]), "beta_tensor"),
        (torch.tensor(1.5, requires_grad=True), "beta_tensor"),
    ],
    ids=["float", "int", "0-d", "1-d", "0-d leaf"],
)
def test_overload_choice(op, beta, overload):
    """No tensor becomes a number: its gradient would be lost without an error."""
    tail = (2,) if op == "am_recursion" else ()
    with _Log() as log:
        getattr(torch.ops.clam, op)(torch.zeros(2, 2), torch.eye(2), beta, *tail)
    assert next(s for s in log.seen if s.startswith("clam.")).endswith(f".{overload}")


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.contract(ops=AM, gradient=True)
def test_offset_does_not_reach_energy_and_gradients(spec, backend):
    """Stricter than the rule, whose scale would allow errors of 4 eps x 1e5: every value that a
    shift does not change is as accurate at 1e5 as at 0 (the inputs are on a grid that float32
    represents exactly at both).
    """
    here = testing.large(spec.name, torch.float32, backend.device)
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


@pytest.mark.contract(ops=("am_assign",))
def test_labels_are_exact_far_from_the_origin(spec, backend):
    """Labels of float32 rows + 1e5 are float64's labels of the same rounded values."""
    generator = torch.Generator().manual_seed(5)
    rho = torch.randn(50, 12, generator=generator) + 1e5
    v = torch.randn(3000, 12, generator=generator) + 1e5
    labels, sqdist = spec.packet(v.to(backend.device), rho.to(backend.device))
    exact = torch.cdist(v.double(), rho.double(), compute_mode="donot_use_mm_for_euclid_dist")
    # a point of this coarse grid (2^-7) may lie exactly between two memories: the distance decides
    best = exact.square().amin(-1)
    chosen = exact.square().gather(1, labels.cpu()[:, None])[:, 0]
    assert float((chosen - best).max()) <= 1e-5 * float(best.max())
    assert bool((sqdist >= 0).all())
    torch.testing.assert_close(sqdist.cpu().double(), chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.contract(ops=AM)
def test_a_nan_memory_makes_every_row_nan(spec, backend):
    v, rho, *rest = testing.problem(spec.name, 20, 6, 5, device=backend.device).args
    rho = rho.clone()
    rho[3, 1] = math.nan
    for a in _tuple(spec.packet(v, rho, *rest)):
        marked = a.isnan() if a.is_floating_point() else a == -1
        assert bool(marked.all())


@pytest.mark.contract(ops=AM, samples=("one-masked",))
def test_a_masked_memory_of_any_value_does_not_change_others(spec, sample, backend):
    """A masked memory may have any values: padding is made of such memories."""
    names = testing.argument_names(spec.name)
    call = sample.cast(backend.dtypes[0], backend.device)
    masked = call.args[names.index("log_weights")] == -math.inf
    clean = testing.evaluate(spec.packet, call, call.differentiable)
    for bad in (math.nan, math.inf, 1e30):
        args = list(call.args)
        args[1] = args[1].clone()
        args[1][masked] = bad
        result = testing.evaluate(spec.packet, _with(call, args), call.differentiable)
        for a, b in zip(result.outputs, clean.outputs, strict=True):
            assert torch.equal(a, b)
        for name in call.differentiable:
            assert torch.equal(result.gradients[name], clean.gradients[name]), name


SCALES = [1e-18, 1e-6, 1e3, 1e6, 1e9]


@pytest.mark.contract(ops=AM)
@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("sharp", [1e-6, 1.0, 1e6])
def test_huge_and_tiny_scores(spec, backend, size, sharp):
    """Coordinates of any size, with beta that makes the scores tiny, of order 1 and huge."""
    v, rho, *rest = testing.problem(spec.name, 25, 6, 3, device=backend.device).args
    v, rho = (size * x for x in (v, rho))
    names = testing.argument_names(spec.name)
    if "beta" in names:
        rest[0] = sharp / size**2
        if rest[0] > torch.finfo(torch.float32).max:
            rest[0] = 1e38
    exact = (v.double(), rho.double(), *rest)
    outs = [
        _tuple(f(*a))
        for f, a in (
            (spec.packet, (v, rho, *rest)),
            (spec.truth, exact),
            (testing.eager(spec.name), (v, rho, *rest)),
        )
    ]
    for result, expected, eager in zip(*outs, strict=True):
        assert not result.is_floating_point() or bool(result.isfinite().all())
        testing.assert_close(result, expected, eager)


@pytest.mark.contract(ops=AM, gradient=True, samples=("beta-0d", "everything"))
def test_memory_side_may_be_wider_than_the_states(spec, sample, backend):
    """bfloat16 states and memories with float32 beta, mask and log-weights."""
    names = testing.argument_names(spec.name)
    call = sample.cast(torch.bfloat16, backend.device)
    args = [
        a.float() if isinstance(a, Tensor) and n not in ("v", "rho") else a
        for n, a in zip(names, call.args, strict=False)
    ]
    mixed = testing.evaluate(spec.packet, _with(call, args), call.differentiable)
    same = testing.evaluate(spec.packet, call, call.differentiable)
    for a, b in zip(mixed.outputs, same.outputs, strict=True):
        assert torch.equal(a, b)  # the same values, and all arithmetic is float32 either way
    for name, grad in mixed.gradients.items():
        assert grad.dtype == (torch.bfloat16 if name in ("v", "rho") else torch.float32)
        assert torch.equal(grad.bfloat16(), same.gradients[name]), name


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.contract(ops=AM, gradient=True, samples=("beta-0d", "beta-1", "beta-batch", "beta-k"))
def test_beta_alone_has_a_gradient(spec, sample, recwarn):
    place = testing.argument_names(spec.name).index("beta")
    beta = sample.args[place].clone().requires_grad_()
    out = spec.packet(*sample.args[:place], beta, *sample.args[place + 1 :])
    assert out.grad_fn is not None
    out.square().sum().backward()
    assert beta.grad is not None
    assert beta.grad.shape == beta.shape
    assert bool(beta.grad.abs().min() > 0)
    assert not recwarn.list


@pytest.mark.contract(ops=AM, gradient=True, samples=("one-masked", "beta-k-weights"))
def test_a_masked_memory_gets_no_gradient(spec, sample):
    result = testing.evaluate(spec.packet, sample, sample.differentiable)
    weights = sample.args[testing.argument_names(spec.name).index("log_weights")]
    masked = weights == -math.inf
    assert bool((result.gradients["rho"][..., masked, :] == 0).all())
    assert bool((result.gradients["log_weights"][..., masked] == 0).all())
    if result.gradients.get("beta") is not None and result.gradients["beta"].shape == weights.shape:
        assert bool((result.gradients["beta"][masked] == 0).all())


@pytest.mark.contract(ops=AM, gradient=True, samples=("all-masked",))
def test_without_active_memories_gradients_are_zero(spec, sample):
    inputs = sample.differentiable + sample.kinks
    result = testing.evaluate(spec.packet, sample, inputs)
    upstream = testing.upstream(result.outputs)[0]
    for name in inputs:
        moved = (
            name == "v" and result.outputs[0].shape == upstream.shape and spec.name != "am_energy"
        )
        expected = upstream if moved else torch.zeros_like(result.gradients[name])
        assert torch.equal(result.gradients[name], expected), name


@pytest.mark.contract(ops=AM, gradient=True)
def test_a_nan_row_makes_gradients_of_memories_nan_and_of_other_rows_not(spec, backend):
    """Its NaN must reach the gradient of the memories, and must not reach those of other rows."""
    v, rho, *rest = testing.problem(spec.name, 40, 20, 5, device=backend.device).args

    def grads(x: Tensor) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), rho.clone().requires_grad_()
        return torch.autograd.grad(spec.packet(*leaves, *rest).sum(), leaves)

    clean = grads(v)
    bad = v.clone()
    bad[7, 1] = math.nan
    dirty = grads(bad)
    others = torch.arange(40, device=v.device) != 7
    assert torch.equal(dirty[0][others], clean[0][others])
    assert bool(dirty[0][7].isnan().all())
    assert bool(dirty[1].isnan().all())


@pytest.mark.contract(ops=AM, gradient=True)
def test_scratch_is_bounded_in_steps_and_batch(spec):
    """No array of T states and no copy of a broadcast operand is ever made."""
    n, k, d = 20_000, 64, 4
    names = testing.argument_names(spec.name)
    args = list(testing.large(spec.name, torch.float32, n=n, k=k, d=d).args)
    if "steps" in names:
        args[names.index("steps")] = 40
        args[0].requires_grad_()
        peak = testing.peak_bytes(lambda: torch.autograd.grad(spec.packet(*args).sum(), args[0]))
        assert peak < 0.5 * 40 * n * (d + k) * 4
    args = [*testing.large(spec.name, torch.float32, n=1, k=8, d=d).args[2:]]
    batch = [torch.randn(1, n, d), torch.randn(50, 8, d), *args]
    result = 50 * n * (1 if spec.name == "am_energy" else d) * 4
    assert testing.peak_bytes(lambda: spec.packet(*batch)) < result + 12e6
