# SPDX-License-Identifier: Apache-2.0
"""vmap, torch.func, forward AD, batched gradients, double backward, autocast: the results of the
truth.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from clam_kernels import testing
from clam_kernels._core.spec import tensor_names

M = 3  # examples of a mapped argument


def _same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def _tensor_places(sample: Any) -> list[int]:
    return [i for i, a in enumerate(sample.args) if isinstance(a, Tensor)]


# ---- vmap
# ------------------------------------------------------------------------------------------


@pytest.mark.contract(samples="mapped")
def test_vmap_over_every_combination_of_arguments(spec, sample, ran):
    """Each non-empty subset of the tensors mapped, over the first or the last dim, against
    a loop.
    """
    examples = [_named(spec.name, sample.name, seed) for seed in range(M)]
    places = _tensor_places(sample)
    for count in range(1, len(places) + 1):
        for turn, subset in enumerate(itertools.combinations(places, count)):
            dim = -1 if turn % 2 else 0
            args, in_dims = list(sample.args), [None] * len(sample.args)
            for i in subset:
                args[i] = torch.stack([e.args[i] for e in examples], dim)
                in_dims[i] = args[i].ndim - 1 if dim else 0
            result = torch.vmap(spec.packet, in_dims=tuple(in_dims))(*args)
            loop = [
                spec.packet(*(e.args[i] if i in subset else a for i, a in enumerate(sample.args)))
                for e in examples
            ]
            is_tuple = isinstance(result, tuple)
            pairs = (
                zip(result, zip(*loop, strict=True), strict=True) if is_tuple else [(result, loop)]
            )
            for one, many in pairs:
                _same(one, torch.stack(list(many)))
    assert {(spec.name, "reference")} == set(ran)  # the op itself, not the truth, which is N x K


def _named(op: str, name: str, seed: int) -> Any:
    return next(s for s in testing.samples(op, seed) if s.name == name)


@pytest.mark.contract(samples="nested")
def test_nested_vmap(spec, sample):
    v, *rest = sample.args
    many = torch.stack([torch.stack([v + i + 2 * j for i in range(2)]) for j in range(3)])
    result = torch.vmap(torch.vmap(lambda x: spec.packet(x, *rest)))(many)
    expected = [[spec.packet(x, *rest) for x in row] for row in many]
    if not isinstance(result, tuple):
        result, expected = (result,), [[(w,) for w in row] for row in expected]
    for i, one in enumerate(result):
        _same(one, torch.stack([torch.stack([w[i] for w in row]) for row in expected]))


PLANTED = """
import torch
from clam_kernels import testing
from clam_kernels._core import install, spec as specs
spec = next(s for s in specs.all_ops() if s.gradient is None)
fields = {f: getattr(spec, f) for f in ("arguments", "returns", "check", "fake", "truth")}
first, *rest = testing.problem(spec.name, 3, 4, 2).args
install.op(**fields, name="planted", reference=spec.reference, function=spec.function)
try:
    torch.vmap(lambda x: torch.ops.clam.planted(x, *rest))(torch.stack([first, first]))
except NotImplementedError as error:
    print(error)
"""


def test_vmap_refuses_an_op_without_a_rule():
    """`core` None says that not all tensors take leading dims: vmap must refuse such an op, not
    loop slowly. The test runs in its own process, because an op cannot be unregistered.
    """
    done = subprocess.run(
        [sys.executable, "-c", PLANTED], capture_output=True, text=True, check=True
    )
    assert "clam::planted: vmap is not supported" in done.stdout


# ---- torch.func, forward AD
# ------------------------------------------------------------------------


def _each_argument(spec: Any, sample: Any, function: Any) -> list[tuple[str, Any, Tensor]]:
    names = testing.argument_names(spec.name)

    def call(place: int, x: Tensor) -> Tensor:
        args = list(sample.args)
        args[place] = x
        return function(*args)

    return [
        (n, functools.partial(call, names.index(n)), sample.args[names.index(n)])
        for n in sample.differentiable
    ]


def _pairs(spec: Any, sample: Any) -> Any:
    ours, truth = (testing.single(spec.name, f) for f in (spec.packet, spec.truth))
    return zip(_each_argument(spec, sample, ours), _each_argument(spec, sample, truth), strict=True)


@pytest.mark.contract(gradient=True, samples="differentiated")
def test_func_grad_and_jacrev(spec, sample):
    for (_, ours, x), (_, truth, _) in _pairs(spec, sample):
        _same(
            torch.func.grad(lambda t, f=ours: f(t).sin().sum())(x),
            torch.func.grad(lambda t, f=truth: f(t).sin().sum())(x),
        )
        _same(torch.func.jacrev(ours)(x), torch.func.jacrev(truth)(x))


@pytest.mark.contract(gradient=True, samples="differentiated")
def test_func_jvp_and_forward_ad(spec, sample):
    for (_, ours, x), (_, truth, _) in _pairs(spec, sample):
        tangent = testing.upstream([x], seed=3)[0]
        result, expected = (torch.func.jvp(f, (x,), (tangent,)) for f in (ours, truth))
        _same(result, expected)
        assert bool((expected[1] != 0).any())
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent)))
        _same(dual.tangent, expected[1])


@pytest.mark.contract(gradient=True, samples="hessian")
def test_func_hessian(spec, sample):
    for (_, ours, x), (_, truth, _) in _pairs(spec, sample):
        result = torch.func.hessian(lambda t, f=ours: f(t).square().sum())(x)
        expected = torch.func.hessian(lambda t, f=truth: f(t).square().sum())(x)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.contract(gradient=True, samples=("plain", "everything"))
def test_vmap_of_grad_and_grad_of_vmap(spec, sample):
    def loss(x: Tensor) -> Tensor:
        return testing.single(spec.name, spec.packet)(x, *sample.args[1:]).square().sum()

    many = torch.stack([_named(spec.name, sample.name, s).args[0] for s in range(M)])
    expected = torch.stack([torch.func.grad(loss)(x) for x in many])
    _same(torch.vmap(torch.func.grad(loss))(many), expected)
    _same(torch.func.grad(lambda m: torch.vmap(loss)(m).sum())(many), expected)
    leaf = many.clone().requires_grad_()
    torch.vmap(loss)(leaf).sum().backward()
    _same(leaf.grad, expected)


# ---- batched gradients, double backward
# ----------------------------------------------------------------


@pytest.mark.contract(gradient=True, samples="batched gradients")
def test_batched_grads(spec, sample):
    """A whole Jacobian in one backward, through the vmap rule of the backward op."""
    names = testing.argument_names(spec.name)
    leaves = {
        n: sample.args[names.index(n)].clone().requires_grad_() for n in sample.differentiable
    }
    args = [leaves.get(n, a) for n, a in zip(names, sample.args, strict=False)]
    out = testing.single(spec.name, spec.packet)(*args)
    basis = torch.eye(out.numel(), dtype=out.dtype).reshape(-1, *out.shape)[::2]
    result = torch.autograd.grad(
        out, list(leaves.values()), basis, is_grads_batched=True, retain_graph=True
    )
    for i, row in enumerate(basis):
        one = torch.autograd.grad(out, list(leaves.values()), row, retain_graph=True)
        for name, a, b in zip(leaves, result, one, strict=True):
            assert a.shape[1:] == leaves[name].shape, name
            _same(a[i], b)


@pytest.mark.contract(gradient=True, samples="twice")
def test_double_backward_raises(spec, sample):
    names = testing.argument_names(spec.name)
    text = (
        f"clam::{spec.name}_backward: double backward is not implemented; call "
        f"python_fallback.{spec.family}.{spec.name}, which is twice differentiable"
    )
    for name in sample.differentiable:
        leaf = sample.args[names.index(name)].clone().requires_grad_()
        args = [leaf if n == name else a for n, a in zip(names, sample.args, strict=False)]
        out = testing.single(spec.name, spec.packet)(*args)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError) as caught:
            torch.autograd.grad(first.sum(), leaf)
        assert str(caught.value) == text


def test_double_backward_of_the_truth_works(spec):
    """The error names the truth as the alternative; it works."""
    if spec.gradient is None:
        assert not torch.is_tensor(spec.truth(*testing.samples(spec.name)[0].args))
        return
    sample = _named(spec.name, "plain", 0)
    v = sample.args[0].clone().requires_grad_()
    truth = testing.single(spec.name, spec.truth)
    assert torch.autograd.gradgradcheck(lambda x: truth(x, *sample.args[1:]), (v,))


@pytest.mark.contract(gradient=True, samples=("plain",))
def test_saving_forward_is_internal(spec, sample):
    if not isinstance(spec.gradient.saved, tuple):
        assert not hasattr(torch.ops.clam, f"_{spec.name}_forward")
        return
    op = getattr(torch.ops.clam, f"_{spec.name}_forward")
    v, *rest = sample.args
    if spec.gradient.saved_for_needs:
        missing = len(testing.argument_names(spec.name)) - len(sample.args)
        rest += [None] * missing + [[False] * len(tensor_names(spec))]
    out = op(v.clone().requires_grad_(), *rest)[0]
    with pytest.raises(NotImplementedError) as caught:
        out.sum().backward()
    name = f"clam::_{spec.name}_forward"
    assert str(caught.value) == f"{name}: _{spec.name}_forward is internal; call {spec.name}"


# ---- autocast
# --------------------------------------------------------------------------------------


class _Arguments(TorchDispatchMode):
    """Records the arguments of every clam op below autograd and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "clam":
            schema = func._schema.arguments
            self.seen.append(args + tuple(a.default_value for a in schema[len(args) :]))
        return func(*args, **(kwargs or {}))


HALVES_AND_WIDER = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _mixed(spec: Any, sample: Any, *dtypes: torch.dtype) -> tuple[Any, ...]:
    """The call in float32, except for the first argument and the arguments that must share its
    dtype.
    """
    names = testing.argument_names(spec.name)
    dtype_of = dict(zip([names[0], *[n for n in spec.same_dtype if n != names[0]]], dtypes))  # noqa: B905
    return tuple(
        a.to(dtype_of[n]) if n in dtype_of else a
        for n, a in zip(names, sample.cast(torch.float32).args, strict=False)
    )


@pytest.mark.contract(samples="autocast")
@pytest.mark.parametrize("v", HALVES_AND_WIDER)
@pytest.mark.parametrize("rho", HALVES_AND_WIDER)
def test_autocast_promotes_and_lowers_the_precision_only(spec, sample, v, rho):
    args, names = _mixed(spec, sample, v, rho), testing.argument_names(spec.name)
    shared = [a.dtype for n, a in zip(names, args, strict=False) if n in spec.same_dtype]
    wide = functools.reduce(torch.promote_types, shared) if shared else None
    with torch.autocast("cpu", torch.bfloat16), _Arguments() as log:
        result = spec.packet(*args)
    (precision,) = log.seen
    assert not spec.precise or precision[-1] == "medium"
    for name, before, after in zip(names, args, precision, strict=False):
        if name in spec.same_dtype:
            assert after.dtype == wide
        else:  # the other arguments keep their dtype
            assert before is after or before == after or torch.equal(before, after)
    expected = spec.packet(
        *(a.to(wide) if n in spec.same_dtype else a for n, a in zip(names, args, strict=False))
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.contract(samples=("plain",))
def test_autocast_leaves_an_explicit_precision(spec, sample):
    if not spec.precise:
        return
    other = torch.bfloat16 if spec.same_dtype else torch.float32
    args = _mixed(spec, sample, torch.float32, other)
    args = args + (None,) * (len(testing.argument_names(spec.name)) - 1 - len(args)) + ("highest",)
    with torch.autocast("cpu", torch.bfloat16), _Arguments() as log:
        spec.packet(*args)
    assert log.seen[0][-1] == "highest"
    if not spec.same_dtype:
        return
    first, second = spec.same_dtype
    text = f"{second}: expected dtype float32 to match {first}, got bfloat16"
    with pytest.raises(TypeError, match=text):
        spec.packet(*args)  # outside autocast no argument is promoted


@pytest.mark.contract(gradient=True, samples="autocast")
def test_autocast_gradients_have_the_dtype_of_each_leaf(spec, sample):
    args = _mixed(spec, sample, torch.bfloat16, torch.float32)
    leaves = testing.leaves_of(args)
    with torch.autocast("cpu", torch.bfloat16):
        out = testing.single(spec.name, spec.packet)(*leaves)
    out.sum().backward()
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            assert leaf.grad is not None
            assert leaf.grad.dtype == leaf.dtype


@pytest.mark.contract(gradient=True, samples="autocast")
def test_autocast_does_not_change_a_backward_inside_its_block(spec, sample):
    call = sample.cast(torch.float32)
    count = len(testing.argument_names(spec.name))
    results = []
    for inside in (False, True):
        leaves = [*testing.leaves_of(call.args), *[None] * (count - len(call.args))]
        if spec.precise:
            leaves[-1] = "highest"
        loss = testing.single(spec.name, spec.packet)(*leaves).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        results.append([x.grad for x in leaves if isinstance(x, Tensor) and x.requires_grad])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.contract(samples=("plain",))
def test_no_autocast_means_torchs_precision(spec, sample):
    with _Arguments() as log:
        spec.packet(*sample.cast(torch.float32).args)
    assert not spec.precise or log.seen[0][-1] is None


# ---- direct calls of kernels, and modes that need the dispatcher ---------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_a_dispatch_mode_sees_every_call(spec, grad):
    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    args = testing.samples(spec.name)[0].args
    first = args[0].clone().requires_grad_(grad and spec.gradient is not None)
    plain = spec.packet(first, *args[1:])
    with Seen() as mode:
        output = spec.packet(first, *args[1:])
    assert any(name.startswith(f"clam.{spec.name}") or spec.name in name for name in mode.names)
    _same(output, plain)


def test_lazy_negatives_are_resolved(spec):
    args = testing.samples(spec.name)[0].args
    _same(spec.packet(torch._neg_view(args[0]), *args[1:]), spec.packet(-args[0], *args[1:]))
