# SPDX-License-Identifier: Apache-2.0
"""Layouts, sizes and values at the edges: the answer is that of plain contiguous tensors."""

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
    """Every second entry of a larger tensor along each dim; what lies between is NaN."""
    big = x.new_full([2 * s for s in x.shape], 1 if x.dtype == torch.bool else math.nan)
    part = big[tuple(slice(None, None, 2) for _ in x.shape)]
    return part.copy_(x)


def _offset(x: Tensor) -> Tensor:
    """At an odd place of a larger storage, NaN before and behind."""
    big = x.new_full((x.numel() + 11,), 1 if x.dtype == torch.bool else math.nan)
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
LAID = (
    "plain", "batch", "batch-crossed", "one-dead", "beta-batch-k", "mask-bool", "mask-batch",
    "everything", "wide",
)  # fmt: skip


def _same(a: Tensor, b: Tensor) -> None:
    """Equal but for the order in which a mean or a product may have been summed."""
    bound = 1e-12 if a.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(a, b, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.contract(samples=LAID)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs(spec, sample, backend, layout):
    """Each tensor argument by itself, then all at once: values and gradients."""
    call = sample.cast(backend.dtypes[0], backend.device)
    lay = LAYOUTS[layout]
    places = [i for i, a in enumerate(call.args) if isinstance(a, Tensor)]
    for chosen in [[i] for i in places] + [places]:
        args = [lay(a) if i in chosen else a for i, a in enumerate(call.args)]
        plain = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        got, want = (_run(spec, call, x) for x in (args, plain))
        for a, b in zip(got, want, strict=True):
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
    grads = torch.autograd.grad(outs, leaves, testing.upstream(outs))
    return [o.detach() for o in outs] + list(grads)


@pytest.mark.contract(gradient=True, samples=LAID)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients(spec, sample, backend, layout):
    """gradcheck only ever hands in contiguous ones; cat, sum and expand do not."""
    call = sample.cast(backend.dtypes[0], backend.device)
    names = testing.argument_names(spec.name)
    leaves = {n: call.args[names.index(n)].clone().requires_grad_() for n in call.differentiable}
    args = [leaves.get(n, a) for n, a in zip(names, call.args, strict=False)]
    out = spec.packet(*args)
    grad = LAYOUTS[layout](testing.upstream([out])[0])
    got = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
    want = torch.autograd.grad(out, list(leaves.values()), grad.contiguous())
    for name, a, b in zip(leaves, got, want, strict=True):
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
        out = spec.packet(*[leaves.get(n, a) for n, a in zip(names, sample.args, strict=False)])
        return list(torch.autograd.grad(finish(out), list(leaves.values())))

    ones = run(lambda o: (o * torch.ones_like(o)).sum())
    for a, b in zip(run(lambda o: o.sum()), ones, strict=True):  # stride 0 in every dim
        _same(a, b)
    weights = run(lambda o: (o * torch.stack([torch.ones_like(o), 2 * torch.ones_like(o)])).sum())
    cat = run(lambda o: (torch.cat([o, 2 * o], -1)).sum())
    for a, b in zip(cat, weights, strict=True):
        _same(a, b)


# ---- sizes
# -------------------------------------------------------------------------------------------


@pytest.mark.contract(samples=("no-rows", "no-batch"))
def test_no_rows(spec, sample, backend):
    for dtype in backend.dtypes:
        call = sample.cast(dtype, backend.device)
        out = testing.evaluate(spec.packet, call, call.differentiable)
        want = testing.evaluate(spec.truth, call)
        for a, b in zip(out.outputs, want.outputs, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert a.numel() == 0
        for name, grad in out.gradients.items():
            assert grad.shape == call.args[testing.argument_names(spec.name).index(name)].shape
            assert bool((grad == 0).all())


SIZES = [(1, 1, 1), (1, 33, 2), (2, 1, 17), (15, 2, 3), (17, 31, 16), (3, 1000, 15), (40, 3, 127)]


def _problem(spec: Any, n: int, k: int, d: int, dtype: torch.dtype, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    rho = torch.randn(k, d, generator=generator)
    v = torch.randn(n, d, generator=generator)
    rest: dict[str, Any] = {"beta": 1.5 / d, "steps": 3}
    names = testing.argument_names(spec.name)
    return [v.to(dtype), rho.to(dtype), *(rest[n] for n in names if n in rest)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_sizes(spec, backend, size):
    args = [
        a.to(backend.device) if isinstance(a, Tensor) else a
        for a in _problem(spec, *size, torch.float32)
    ]
    exact = [a.double() if isinstance(a, Tensor) else a for a in args]
    outs = [f(*a) for f, a in ((spec.packet, args), (spec.truth, exact), (spec.truth, args))]
    triples = [outs] if isinstance(outs[0], Tensor) else zip(*outs, strict=True)
    for got, want, eager in triples:
        testing.assert_close(got, want, eager, scale=1.0)


# widths that a BLAS handles in its remainder loops, products too small for it, and plain ones
BIT_SIZES = [
    (70, 5, 3), (150, 2, 4), (150, 9, 17), (150, 20, 5), (150, 33, 15), (300, 64, 16),
    (33, 1000, 17), (2100, 9, 2), (40, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("size", BIT_SIZES, ids=lambda s: "x".join(map(str, s)))
def test_a_row_has_the_same_bits_wherever_it_stands(spec, backend, size):
    """Alone, in a slice, in another order, in a batch of problems."""
    n = size[0]
    for dtype in (torch.float32, torch.bfloat16):
        v, *rest = (
            a.to(backend.device) if isinstance(a, Tensor) else a
            for a in _problem(spec, *size, dtype)
        )
        whole = _outputs(spec, v, *rest)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        for rows in (slice(0, 1), slice(n - 1, n), slice(16, 17), slice(5, 24), order):
            for a, b in zip(_outputs(spec, v[rows], *rest), whole, strict=True):
                assert torch.equal(a, b[rows]), (dtype, rows)
        for a, b in zip(_outputs(spec, torch.stack([v, v]), *rest), whole, strict=True):
            assert torch.equal(a[1], b), dtype


def test_rows_are_not_coupled(spec, backend):
    """All other rows replaced: the bits of this one stay."""
    for size in ((70, 5, 3), (300, 20, 5), (300, 64, 16)):
        v, *rest = (
            a.to(backend.device) if isinstance(a, Tensor) else a
            for a in _problem(spec, *size, torch.float32)
        )
        other = 100 * _problem(spec, *size, torch.float32, seed=1)[0].to(backend.device)
        for row in (0, 17, size[0] - 1):
            mixed = other.clone()
            mixed[row] = v[row]
            for a, b in zip(_outputs(spec, mixed, *rest), _outputs(spec, v, *rest), strict=True):
                assert torch.equal(a[row], b[row])


def _outputs(spec: Any, *args: Any) -> tuple[Tensor, ...]:
    out = spec.packet(*args)
    return out if isinstance(out, tuple) else (out,)


def test_batch_equals_a_loop(spec, backend):
    problems = [_problem(spec, 23, 9, 5, torch.float32, seed) for seed in range(4)]
    rest = problems[0][2:]
    v, rho = (torch.stack([p[i] for p in problems]).to(backend.device) for i in (0, 1))
    together = _outputs(spec, v, rho, *rest)
    for i in range(4):
        for a, b in zip(_outputs(spec, v[i], rho[i], *rest), together, strict=True):
            torch.testing.assert_close(a, b[i], rtol=1e-6, atol=1e-6)


# ---- values
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["entry", "row"])
def test_a_bad_row_touches_no_other(spec, backend, bad, where):
    n = 70
    for dtype in (torch.float32, torch.bfloat16):
        v, *rest = (
            a.to(backend.device) if isinstance(a, Tensor) else a
            for a in _problem(spec, n, 20, 5, dtype)
        )
        clean = _outputs(spec, v, *rest)
        v = v.clone()
        v[37, 2 if where == "entry" else slice(None)] = bad
        others = torch.arange(n, device=v.device) != 37
        for a, b in zip(_outputs(spec, v, *rest), clean, strict=True):
            assert torch.equal(a[others], b[others])
            marked = a[37].isnan() if a.is_floating_point() else a[37] == -1
            assert bool(marked.all()), a[37]


@pytest.mark.contract(gradient=True)
def test_a_bad_row_keeps_the_other_rows_gradients_and_marks_the_memories(spec, backend):
    """It must not vanish from the memories' gradient, nor leak into other rows'."""
    v, rho, *rest = (
        a.to(backend.device) if isinstance(a, Tensor) else a
        for a in _problem(spec, 40, 20, 5, torch.float32)
    )

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


def test_a_bad_memory_marks_every_row(spec, backend):
    v, rho, *rest = (
        a.to(backend.device) if isinstance(a, Tensor) else a
        for a in _problem(spec, 20, 6, 5, torch.float32)
    )
    rho = rho.clone()
    rho[3, 1] = math.nan
    for a in _outputs(spec, v, rho, *rest):
        marked = a.isnan() if a.is_floating_point() else a == -1
        assert bool(marked.all())


@pytest.mark.contract(samples=("one-dead",))
def test_a_bad_memory_that_takes_no_part_harms_nobody(spec, sample, backend):
    """A dead memory may hold anything: it is what padding is made of."""
    names = testing.argument_names(spec.name)
    call = sample.cast(backend.dtypes[0], backend.device)
    dead = call.args[names.index("log_weights")] == -math.inf
    clean = testing.evaluate(spec.packet, call, call.differentiable)
    for bad in (math.nan, math.inf, 1e30):
        args = list(call.args)
        args[1] = args[1].clone()
        args[1][dead] = bad
        got = testing.evaluate(spec.packet, _with(call, args), call.differentiable)
        for a, b in zip(got.outputs, clean.outputs, strict=True):
            assert torch.equal(a, b)
        for name in call.differentiable:
            assert torch.equal(got.gradients[name], clean.gradients[name]), name


def _with(sample: Any, args: list[Any]) -> Any:
    return testing.Sample(sample.op, sample.name, tuple(args), sample.differentiable)


SCALES = [1e-18, 1e-6, 1e3, 1e6, 1e9]


@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("sharp", [1e-6, 1.0, 1e6])
def test_huge_and_tiny_scores(spec, backend, size, sharp):
    """Coordinates of any size, with beta that makes the scores tiny, of order 1 and huge."""
    v, rho, *rest = _problem(spec, 25, 6, 3, torch.float32)
    v, rho = (size * x.to(backend.device) for x in (v, rho))
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
            (spec.truth, (v, rho, *rest)),
        )
    ]
    for got, want, eager in zip(*outs, strict=True):
        assert not got.is_floating_point() or bool(got.isfinite().all())
        testing.assert_close(got, want, eager)


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def test_result_dtypes(spec, backend):
    wide = {torch.float64: torch.float64}
    for dtype in backend.dtypes:
        args = [
            a.to(backend.device) if isinstance(a, Tensor) else a
            for a in _problem(spec, 9, 4, 3, dtype)
        ]
        found = [o.dtype for o in _outputs(spec, *args)]
        score = wide.get(dtype, torch.float32)
        expected = {"am_energy": [score], "am_assign": [torch.int64, score]}
        assert found == expected.get(spec.name, [dtype])


@pytest.mark.contract(gradient=True, samples=("everything", "beta-batch"))
def test_gradients_have_the_dtype_of_their_leaf(spec, sample, backend):
    for dtype in backend.dtypes:
        call = sample.cast(dtype, backend.device)
        for name, grad in testing.evaluate(
            spec.packet, call, call.differentiable
        ).gradients.items():
            assert grad.dtype == dtype, name


@pytest.mark.contract(gradient=True, samples=("beta-0d", "everything"))
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
