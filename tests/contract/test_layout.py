# SPDX-License-Identifier: Apache-2.0
"""Layouts, sizes and values at the edges: the result equals that of plain contiguous tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels import testing


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else _strided(x)


def _strided(x: Tensor) -> Tensor:
    """Every second entry of a larger tensor along each dim; the entries between are NaN."""
    big = x.new_full([2 * s for s in x.shape], math.nan if x.is_floating_point() else 1)
    part = big[tuple(slice(None, None, 2) for _ in x.shape)]
    return part.copy_(x)


def _offset(x: Tensor) -> Tensor:
    """At an odd offset of a larger storage, with NaN before and behind."""
    big = x.new_full((x.numel() + 11,), math.nan if x.is_floating_point() else 1)
    return big[7 : 7 + x.numel()].view(x.shape).copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """Stride 0 along the first dim."""
    return x[:1].expand_as(x) if x.ndim and x.shape[0] else x


def _batch_last(x: Tensor) -> Tensor:
    """The first dim innermost in memory."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim > 1 else _strided(x)


LAYOUTS = {
    "transposed": _transposed,
    "strided": _strided,
    "offset": _offset,
    "expanded": _expanded,
    "batch-last": _batch_last,
}
SAME_VALUES = set(LAYOUTS) - {"expanded"}


def _same(a: Tensor, b: Tensor) -> None:
    """Equal, except for the order in which a mean or a product is summed."""
    bound = 1e-12 if a.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(a, b, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.contract(samples="laid")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs(spec, sample, backend, layout):
    """Each tensor argument alone, then all at once: values and gradients."""
    call = sample.cast(backend.dtypes[0], backend.device)
    lay = LAYOUTS[layout]
    places = [i for i, a in enumerate(call.args) if isinstance(a, Tensor)]
    contiguous = _run(spec, call, list(call.args)) if layout in SAME_VALUES else None
    for chosen in [[i] for i in places] + [places]:
        args = [lay(a) if i in chosen else a for i, a in enumerate(call.args)]
        plain = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        result, expected = _run(spec, call, args), contiguous or _run(spec, call, plain)
        for a, b in zip(result, expected, strict=True):
            _same(a, b)


def _run(spec: Any, sample: Any, args: list[Any]) -> list[Tensor]:
    """Outputs and gradients; the leaves keep their layout."""
    names = testing.argument_names(spec.name)
    leaves = [
        a.detach().requires_grad_()
        for n, a in zip(names, args, strict=False)
        if n in sample.differentiable
    ]
    turned = iter(leaves)
    args = [
        next(turned) if n in sample.differentiable else a for n, a in zip(names, args, strict=False)
    ]
    out = spec.packet(*args)
    outs = list(out) if isinstance(out, tuple) else [out]
    assert all(o.is_contiguous() for o in outs)
    if not leaves:
        return outs
    smooth = [o for o in outs if o.requires_grad]
    grads = torch.autograd.grad(smooth, leaves, testing.upstream(smooth))
    return [o.detach() for o in outs] + list(grads)


@pytest.mark.contract(gradient=True, samples="laid")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients(spec, sample, backend, layout):
    """gradcheck passes contiguous ones only; cat, sum and expand do not."""
    call = sample.cast(backend.dtypes[0], backend.device)
    names = testing.argument_names(spec.name)
    leaves = {n: call.args[names.index(n)].clone().requires_grad_() for n in call.differentiable}
    args = [leaves.get(n, a) for n, a in zip(names, call.args, strict=False)]
    out = testing.single(spec.name, spec.packet)(*args)
    grad = LAYOUTS[layout](testing.upstream([out])[0])
    result = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
    expected = torch.autograd.grad(out, list(leaves.values()), grad.contiguous())
    for name, a, b in zip(leaves, result, expected, strict=True):
        _same(a, b)
        assert a.shape == leaves[name].shape
        assert a.is_contiguous()


@pytest.mark.contract(gradient=True, samples=("plain", "batch-crossed", "everything"))
def test_upstream_gradients_of_sum_and_cat(spec, sample):
    names = testing.argument_names(spec.name)

    def run(finish: Any) -> list[Tensor]:
        leaves = {
            n: sample.args[names.index(n)].clone().requires_grad_() for n in sample.differentiable
        }
        call = testing.single(spec.name, spec.packet)
        out = call(*[leaves.get(n, a) for n, a in zip(names, sample.args, strict=False)])
        return list(torch.autograd.grad(finish(out), list(leaves.values())))

    ones = run(lambda o: (o * torch.ones_like(o)).sum())
    for a, b in zip(run(lambda o: o.sum()), ones, strict=True):  # stride 0 in every dim
        _same(a, b)
    weights = run(lambda o: (o * torch.stack([torch.ones_like(o), 2 * torch.ones_like(o)])).sum())
    cat = run(lambda o: (torch.cat([torch.atleast_1d(o), 2 * torch.atleast_1d(o)], -1)).sum())
    for a, b in zip(cat, weights, strict=True):
        _same(a, b)


# ---- sizes
# -------------------------------------------------------------------------------------------


@pytest.mark.contract(
    samples=("no-rows", "no-batch", "no-rows-restarts", "no-rows-batch", "no-restarts")
)
def test_no_rows(spec, sample, backend):
    for dtype in backend.dtypes:
        call = sample.cast(dtype, backend.device)
        out = testing.evaluate(spec.packet, call, call.differentiable)
        expected = testing.evaluate(spec.truth, call)
        for a, b in zip(out.outputs, expected.outputs, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
            assert a.numel() == 0 or not testing.is_rowwise(spec.name)
        for name, grad in out.gradients.items():
            assert grad.shape == call.args[testing.argument_names(spec.name).index(name)].shape
            assert bool((grad == 0).all())


SIZES = [(1, 1, 1), (1, 33, 2), (2, 1, 17), (15, 2, 3), (17, 31, 16), (3, 1000, 15), (40, 3, 127)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_sizes(spec, backend, size):
    call = testing.problem(spec.name, *size, torch.float32, backend.device)
    args, exact = call.args, call.cast(torch.float64, backend.device).args
    outs = [f(*a) for f, a in ((spec.packet, args), (spec.truth, exact), (spec.truth, args))]
    triples = [outs] if isinstance(outs[0], Tensor) else zip(*outs, strict=True)
    for result, expected, eager in triples:
        eps = backend.sum_eps(result, torch.float32)
        testing.assert_close(result, expected, eager, scale=1.0, eps=eps)


# widths for the remainder loops of a BLAS, products too small for it, and ordinary widths
BIT_SIZES = [
    (70, 5, 3), (150, 2, 4), (150, 9, 17), (150, 20, 5), (150, 33, 15), (300, 64, 16),
    (33, 1000, 17), (2100, 9, 2), (40, 1, 1),
]  # fmt: skip


@pytest.mark.contract(rowwise=True)
@pytest.mark.parametrize("size", BIT_SIZES, ids=lambda s: "x".join(map(str, s)))
def test_a_row_has_the_same_bits_wherever_it_stands(spec, backend, size):
    """Alone, in a slice, in another order, in a batch of problems."""
    n = size[0]
    for dtype in (torch.float32, torch.bfloat16):
        v, *rest = testing.problem(spec.name, *size, dtype, backend.device).args
        whole = _outputs(spec, v, *rest)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        for rows in (slice(0, 1), slice(n - 1, n), slice(16, 17), slice(5, 24), order):
            for a, b in zip(_outputs(spec, v[rows], *rest), whole, strict=True):
                assert torch.equal(a, b[rows]), (dtype, rows)
        for a, b in zip(_outputs(spec, torch.stack([v, v]), *rest), whole, strict=True):
            assert torch.equal(a[1], b), dtype


@pytest.mark.contract(rowwise=True)
def test_rows_are_not_coupled(spec, backend):
    """If all other rows change, the bits of this one stay."""
    for size in ((70, 5, 3), (300, 20, 5), (300, 64, 16)):
        v, *rest = testing.problem(spec.name, *size, device=backend.device).args
        other = 100 * testing.problem(spec.name, *size, device=backend.device, seed=1).args[0]
        for row in (0, 17, size[0] - 1):
            mixed = other.clone()
            mixed[row] = v[row]
            for a, b in zip(_outputs(spec, mixed, *rest), _outputs(spec, v, *rest), strict=True):
                assert torch.equal(a[row], b[row])


def _outputs(spec: Any, *args: Any) -> tuple[Tensor, ...]:
    return _tuple(spec.packet(*args))


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def test_batch_equals_a_loop(spec, backend):
    problems = [
        testing.problem(spec.name, 23, 9, 5, device=backend.device, seed=seed).args
        for seed in range(4)
    ]
    stacked = [
        torch.stack(many) if isinstance(many[0], Tensor) else many[0]
        for many in zip(*problems, strict=True)
    ]
    together = _outputs(spec, *stacked)
    for i, args in enumerate(problems):
        for a, b in zip(_outputs(spec, *args), together, strict=True):
            torch.testing.assert_close(a, b[i], rtol=1e-6, atol=1e-6)


# ---- values
# ------------------------------------------------------------------------------------------


@pytest.mark.contract(rowwise=True)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["entry", "row"])
def test_a_nan_row_does_not_change_others(spec, backend, bad, where):
    n = 70
    for dtype in (torch.float32, torch.bfloat16):
        v, *rest = testing.problem(spec.name, n, 20, 5, dtype, backend.device).args
        clean = _outputs(spec, v, *rest)
        v = v.clone()
        v[37, 2 if where == "entry" else slice(None)] = bad
        others = torch.arange(n, device=v.device) != 37
        for a, b in zip(_outputs(spec, v, *rest), clean, strict=True):
            assert torch.equal(a[others], b[others])
            marked = a[37].isnan() if a.is_floating_point() else a[37] == -1
            assert bool(marked.all()), a[37]


def test_result_dtypes(spec, backend):
    for dtype in backend.dtypes:
        args = testing.problem(spec.name, 9, 4, 3, dtype, backend.device).args
        dtypes = [o.dtype for o in _outputs(spec, *args)]
        assert dtypes == testing.result_dtypes(spec.name, dtype)
        assert dtypes == [o.dtype for o in _tuple(spec.truth(*args))]


@pytest.mark.contract(gradient=True, samples="views")
def test_gradients_have_the_dtype_of_their_leaf(spec, sample, backend):
    for dtype in backend.dtypes:
        call = sample.cast(dtype, backend.device)
        for name, grad in testing.evaluate(
            spec.packet, call, call.differentiable
        ).gradients.items():
            assert grad.dtype == dtype, name
