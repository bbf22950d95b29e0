# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` under torch.compile, torch.export, autocast and torch.func, and numpy's integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from _compiling import Counting
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from clam_kernels import sinkhorn, swav_codes

K, D = 5, 4


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _scores(n: int, k: int = K, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def _pair(n: int, k: int = K) -> tuple[Tensor, Tensor]:
    return _scores(n, D), _scores(k, D, 1)


def _even(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((n,), 1 / n, dtype=dtype)


def _learnt() -> Tensor:
    return torch.tensor(0.3, requires_grad=True)


def _loss(result: Any) -> Tensor:
    return result.codes().square().sum() + result.plan().square().sum() + result.value().square()


# ---- torch.compile and torch.export --------------------------------------------------------------

# A call, and its arguments for a size.
Case = tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]


def _reading_features(name: str, *rest: int) -> Case:
    return lambda z, c: getattr(sinkhorn((z, c)), name)(*rest), _pair


def _in_autocast(z: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        result = sinkhorn((z, c), precision="highest")
        return result.codes(), result.labels(), result.value()


# Sizes other than the number of rows, which tests/contract/test_compile_sizes.py varies.
COMPILED: dict[str, Case] = {
    "bias": (
        lambda x, b: sinkhorn(x, bias=b).codes(), lambda n: (_scores(7, n), torch.arange(n) / n),
    ),
    "bias of features": (
        lambda z, c, b: sinkhorn((z, c), bias=b).codes(),
        lambda n: (*_pair(7, n), torch.arange(n) / n),
    ),
    "assign": (lambda x, y: sinkhorn(x).assign(y), lambda n: (_scores(30), _scores(n, K, 1))),
    "assign, another K": (
        lambda x, y: sinkhorn(x).assign(y), lambda n: (_scores(30, n), _scores(9, n, 1)),
    ),
    **{f"{name} of features": _reading_features(name) for name in ("labels", "entropy")},
    "topk, another k": (lambda x, k: sinkhorn(x).topk(k), lambda n: (_scores(6, 20), n)),
    "labels, another K": (lambda x: sinkhorn(x).labels(), lambda n: (_scores(6, n),)),
    "counts of a batch": (
        lambda x: sinkhorn(x).counts(), lambda n: (torch.stack([_scores(6)] * n),),
    ),
    "row_marginal, half": (
        lambda x, a: sinkhorn(x, row_marginal=a).codes(),
        lambda n: (_scores(n), _even(n, torch.bfloat16)),
    ),
    "col_marginal": (
        lambda x, b: sinkhorn(x, col_marginal=b).codes(), lambda n: (_scores(7, n), _even(n)),
    ),
    "init": (lambda x, g: sinkhorn(x, init=g).codes(), lambda n: (_scores(7, n), torch.zeros(n))),
    "n_iter": (lambda x, n: sinkhorn(x, n_iter=n).codes(), lambda n: (_scores(7), n)),
    "epsilon as a tensor": (
        lambda x, e: sinkhorn(x, epsilon=e).codes(), lambda n: (_scores(n), torch.tensor(n / 9)),
    ),
    "epsilon that learns": (
        lambda x, e: _loss(sinkhorn(x, epsilon=e, gradient="unrolled")),
        lambda n: (_scores(n), _learnt()),
    ),
    "epsilon that learns, features": (
        lambda z, c, e: _loss(sinkhorn((z, c), epsilon=e, gradient="unrolled")),
        lambda n: (*_pair(n), _learnt()),
    ),
    "inside autocast": (_in_autocast, _pair),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_one_dynamic_graph_serves_every_size(name):
    """A first batch, others, and a last partial batch; the first graph has fixed sizes."""
    call, arguments = COMPILED[name]
    counting = Counting()
    compiled = torch.compile(call, backend=counting, fullgraph=True)
    for n in (8, 9, 11, 6):
        args = arguments(n)
        result, expected = compiled(*args), call(*args)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
        leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        if leaves:
            grads = (torch.autograd.grad(y, leaves) for y in (result, expected))
            torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert counting.compiled <= 2


class _Codes(torch.nn.Module):
    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        return swav_codes(scores, row_mask=mask)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_symbolic_number_of_rows(strict):
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows})
    args = _scores(8), torch.arange(8) != 1
    program = torch.export.export(_Codes(), args, dynamic_shapes=shapes, strict=strict)
    more = _scores(19), torch.arange(19) != 1
    torch.testing.assert_close(program.module()(*more), _Codes()(*more), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x: swav_codes(x, row_mask=torch.arange(len(x) + 1) > 0),
            "row_mask: expected shape [..., {n}], got [{more}]",
        ),
        (
            lambda x: sinkhorn(x + 1).assign(torch.cat([x, x], 1)),
            "scores: expected shape [..., M, 5] to match the result, got [{n}, 10]",
        ),
        (
            lambda x: sinkhorn(x, bias=torch.zeros(len(x))).codes(),
            "bias: expected shape [..., 5], got [{n}]",
        ),
    ],
    ids=["row_mask", "assign", "bias"],
)
def test_error_messages_are_the_same_in_compiled_code(call, text):
    """The sizes of the call, at the first size and at a later one."""
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for n in (8, 9, 11):
        with pytest.raises(Exception, match=r"expected shape") as caught:
            compiled(_scores(n))
        assert text.format(n=n, more=n + 1) in str(caught.value)


# ---- autocast ------------------------------------------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "highest": {"precision": "highest"},
    "tolerance": {"tol": 1e-4},
    "envelope": {"tol": 1e-4, "gradient": "envelope"},
    "implicit": {"tol": 1e-4, "gradient": "implicit"},
    "unrolled": {"gradient": "unrolled"},
}


def _unit() -> tuple[Tensor, Tensor]:
    normal = torch.nn.functional.normalize
    return normal(_scores(300, 16), dim=1), normal(_scores(9, 16, 1), dim=1)


def _read(result: Any) -> list[Tensor]:
    z, c = _unit()
    labels = (
        result.labels(),
        result.labels(strict=True),
        result.counts(),
        result.counts(strict=True),
    )
    sums = result.entropy(), result.value(), *result.topk(3)
    return [result.codes(), result.plan(), result.assign((z[:20], c)), *labels, *sums]


@pytest.mark.parametrize("name", RULES)
def test_a_result_is_the_same_inside_an_autocast_block(name):
    z, c = (x.requires_grad_() for x in _unit())
    result = sinkhorn((z, c), epsilon=0.05, **RULES[name])
    expected = _read(result)
    with torch.autocast("cpu", torch.bfloat16):
        inside = _read(result)
        again = _read(sinkhorn((z, c), epsilon=0.05, precision="highest", **{
            n: x for n, x in RULES[name].items() if n != "precision"}))  # fmt: skip
    for one, two, three in zip(inside, expected, again, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(three, two)


@pytest.mark.parametrize("form", ["scores", "features"])
@pytest.mark.parametrize("name", ["implicit", "unrolled"])
def test_a_gradient_is_the_same_inside_an_autocast_block(name, form):
    leaves = [x.requires_grad_() for x in _unit()]
    if form == "scores":
        leaves = [(leaves[0] @ leaves[1].T).detach().requires_grad_()]
    epsilon = torch.tensor(0.1, requires_grad=True)

    def gradients(inside: bool) -> tuple[Tensor, ...]:
        scores = leaves[0] if form == "scores" else (leaves[0], leaves[1])
        result = sinkhorn(scores, epsilon=epsilon, precision="highest", **RULES[name])
        loss = result.codes().square().sum() + result.plan().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.autograd.grad(loss, [*leaves, epsilon])

    for one, two in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, two)


def test_features_of_two_dtypes_are_promoted_where_sinkhorn_is_called():
    z, c = _unit()
    with torch.autocast("cpu", torch.bfloat16):
        result = sinkhorn((z.bfloat16(), c), tol=1e-3, gradient="envelope")
    expected = sinkhorn((z.bfloat16().float(), c), tol=1e-3, gradient="envelope")
    assert torch.equal(result.codes(), expected.codes())
    assert torch.equal(result.value(), expected.value())


class ProductDtypes(TorchDispatchMode):
    """Records the dtypes of the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_highest_is_no_lower_than_float32_where_torch_multiplies_lower(precision):
    """The result is then computed in float64: torch's own precision is that of the whole
    process.
    """
    result = sinkhorn(_unit(), precision="highest")
    expected = result.codes()
    torch.set_float32_matmul_precision(precision)
    try:
        with ProductDtypes() as log:
            codes = result.codes()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert log.seen == [torch.float64]
    torch.testing.assert_close(codes, expected, atol=1e-6, rtol=1e-5)


# ---- torch.func ----------------------------------------------------------------------------------


def _batch() -> Tensor:
    return torch.stack([_scores(7, 4, seed) for seed in range(3)])


@pytest.mark.parametrize("name", ["codes", "plan", "labels", "counts", "entropy", "value", "topk"])
def test_vmap_is_a_batch(name):
    rest = (2,) if name == "topk" else ()

    def read(x: Tensor) -> Any:
        return getattr(sinkhorn(x), name)(*rest)

    torch.testing.assert_close(torch.vmap(read)(_batch()), read(_batch()))


def test_vmap_of_marginals_masks_and_epsilon():
    x, masses = _batch(), _batch()[..., 0].softmax(-1)
    result = torch.vmap(lambda x, a: sinkhorn(x, row_marginal=a).codes())(x, masses)
    torch.testing.assert_close(result, sinkhorn(x, row_marginal=masses).codes())
    result = torch.vmap(lambda x, m: sinkhorn(x, row_mask=m).codes())(x, masses > 0.1)
    torch.testing.assert_close(result, sinkhorn(x, row_mask=masses > 0.1).codes())
    each = torch.tensor([0.1, 0.2, 0.4])
    result = torch.vmap(lambda x, e: sinkhorn(x, epsilon=e).codes())(x, each)
    alone = [sinkhorn(x[i], epsilon=float(each[i])).codes() for i in range(3)]
    torch.testing.assert_close(result, torch.stack(alone))


def test_forward_derivatives_are_finite_differences():
    z, c = (x.double() for x in _pair(7))
    start = z, c, torch.tensor(0.5, dtype=torch.float64)
    along = torch.randn_like(z), torch.randn_like(c), torch.tensor(0.3, dtype=torch.float64)

    def codes(z: Tensor, c: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        options = {"epsilon": epsilon, "gradient": "unrolled"}
        return sinkhorn((z, c), **options).codes(), sinkhorn(z @ c.T, **options).plan()

    _, result = torch.func.jvp(codes, start, along)
    step = 1e-6
    near, far = (codes(*(x + s * y for x, y in zip(start, along, strict=True)))
        for s in (step, -step))  # fmt: skip
    for one, a, b in zip(result, near, far, strict=True):
        torch.testing.assert_close(one, (a - b) / (2 * step), atol=1e-6, rtol=1e-6)


def _implicit(x: Tensor) -> Tensor:
    return sinkhorn(x, epsilon=0.5, tol=1e-5, gradient="implicit").codes().square().sum()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_an_implicit_gradient_refuses_transforms(transform):
    text = "gradient: 'implicit' is not implemented under torch.func; call torch.autograd.grad"
    with pytest.raises(NotImplementedError, match=text):
        transform(_implicit)(_scores(7))


def test_an_implicit_gradient_refuses_forward_mode():
    text = "gradient: 'implicit' is not implemented in forward mode; call torch.autograd.grad"
    scores = _scores(7)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=text):
        _implicit(forward_ad.make_dual(scores, torch.ones_like(scores)))


def test_a_tolerance_refuses_vmap():
    text = r"tol: expected None under torch.func.vmap, .* pass the problems as leading dims"
    batch, one, masses = _batch(), _scores(7, 4), _batch()[..., 0].softmax(-1)
    calls = [
        lambda: torch.vmap(lambda x: sinkhorn(x, tol=1e-3).codes())(batch),
        lambda: torch.vmap(lambda a: sinkhorn(one, row_marginal=a, tol=1e-3).f)(masses),
        lambda: torch.vmap(torch.func.grad(_implicit))(batch),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=text):
            call()
    result = torch.vmap(lambda x: x + sinkhorn(one, tol=1e-3).codes())(batch)  # not a mapped tensor
    torch.testing.assert_close(result, batch + sinkhorn(one, tol=1e-3).codes())


def test_strict_labels_refuse_vmap():
    with pytest.raises(NotImplementedError, match=r"strict: expected False under torch.func.vmap"):
        torch.vmap(lambda x: sinkhorn(x).labels(strict=True))(_batch())


# ---- numpy's integers, masses in half precision --------------------------------------------------


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_ints(kind):
    x = _scores(40)
    result = sinkhorn(x, n_iter=kind(4))
    assert type(result.n_iter) is int
    assert torch.equal(result.codes(), sinkhorn(x, n_iter=4).codes())
    assert torch.equal(result.topk(kind(2))[1], result.topk(2)[1])
    late = sinkhorn(x, tol=1e-9, max_iter=kind(5), warn=False)
    assert late.n_iter == 5
    assert torch.equal(swav_codes(x, n_iter=kind(4)), result.codes())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(7, 3), (1000, 11), (60_000, 7)])
def test_equal_masses_in_half_precision_are_equal(n, k, dtype):
    """Each mass is rounded: their total is off, and its logarithm would be wrong by hundredths."""
    scores = _scores(n, k)
    result = sinkhorn(
        scores, epsilon=0.5, row_marginal=_even(n, dtype), col_marginal=_even(k, dtype), tol=1e-5
    )
    expected = sinkhorn(scores, epsilon=0.5, tol=1e-5)
    assert bool(result.converged)
    torch.testing.assert_close(result.codes(), expected.codes(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masses_in_half_precision_are_not_rounded_again(dtype):
    masses = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=dtype)
    result = sinkhorn(_scores(50, 4).double(), epsilon=0.5, col_marginal=masses, tol=1e-9)
    torch.testing.assert_close(result.plan().sum(0), masses.double(), atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match=r"col_marginal: expected masses of total 1, got 1\.5"):
        sinkhorn(_scores(50, 3), col_marginal=torch.tensor([0.5, 0.5, 0.5], dtype=dtype))


def test_the_value_of_no_rows_is_zero():
    assert float(sinkhorn(torch.zeros(0, 3)).value()) == 0
    assert sinkhorn(torch.zeros(2, 0, 3)).value().tolist() == [0, 0]
    masked = sinkhorn(_scores(4), row_mask=torch.zeros(4, dtype=torch.bool))
    assert float(masked.value()) == 0


@pytest.mark.parametrize("epsilon", [1e-40, 1e300])
def test_an_epsilon_without_an_inverse_in_float32_is_refused(epsilon):
    with pytest.raises(ValueError, match=r"epsilon: expected a number from 2\.9e-39 to 8\.5e\+37"):
        sinkhorn(_scores(4), epsilon=epsilon)
    sinkhorn(_scores(4).double(), epsilon=epsilon)
