# SPDX-License-Identifier: Apache-2.0
"""`clam_kernels/kernels/am/cuda.py` with the bodies of csrc/ in place of the compiled library."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from _csrc_host import (
    SCENES,
    compiled_library,
    differences,
    errors_of,
    needs_gxx,
    recursion,
    recursion_backward,
    scene,
)
from torch import Tensor

from python_fallback import am

pytest.importorskip("triton", reason="triton is missing")
from clam_kernels.kernels.am import cuda

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def library() -> Any:
    return compiled_library()


class HostOps:
    """A stand-in for `torch.ops.clam_cuda` as in csrc/register.cpp, with float32 bodies."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.calls: list[tuple[Any, ...]] = []

    def problem(self, cell: tuple[int, int], operands: Sequence[Tensor | None]) -> list[Any]:
        return [None if x is None else x[cell].float().contiguous() for x in operands]

    def recursion_small(self, *a: Any) -> Tensor:
        self.calls.append(a)
        v, rho, beta, number, weights, mask, steps, step, flag = a
        out = v.new_empty(v.shape)
        for cell in itertools.product(*map(range, v.shape[:2])):
            x, y, b, w, u = self.problem(cell, (v, rho, beta, weights, mask))
            w = None if w is None else w.expand(len(y)).contiguous()
            b = number if b is None else b
            out[cell] = recursion(self.library, x, y, b, steps, step, u, w, flag=flag[cell])
        return out

    def recursion_small_backward(self, *a: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(a)
        grad, v, rho, beta, number, weights, mask, steps, step, wide, memory, of_mask, flag = a
        grad_v = torch.empty(v.shape, dtype=torch.float32 if wide else v.dtype)
        grad_mask = torch.empty(v.shape)
        partials = torch.zeros(*v.shape[:2], 2, rho.shape[2], rho.shape[3] + 2)
        for cell in itertools.product(*map(range, v.shape[:2])):
            g, x, y, b, w, u = self.problem(cell, (grad, v, rho, beta, weights, mask))
            w = None if w is None else w.expand(len(y)).contiguous()
            b = number if b is None else b
            for i in range(2):  # two slices of rows
                part = slice(i, None, 2)
                left = torch.empty(len(x[part]), dtype=torch.uint8)
                gradients = recursion_backward(
                    self.library, g[part].contiguous(), x[part].contiguous(), y, b, steps, step,
                    None if u is None else u[part], w, left,
                )  # fmt: skip
                flag[cell][part] = left
                grad_v[cell][part], grad_mask[cell][part] = gradients[0], gradients[3]
                partials[cell][i] = torch.cat(
                    [gradients[1], gradients[4][:, None], gradients[2][:, None]], -1
                )
        empty = torch.empty(0)
        return grad_v, partials if memory else empty, grad_mask if of_mask else empty


@pytest.fixture
def host_ops(library: Any, monkeypatch: pytest.MonkeyPatch) -> HostOps:
    """The first launch runs on the CPU; Triton's interpreter runs the second."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1 in this process")
    ops = HostOps(library)
    monkeypatch.setattr(torch.ops, "clam_cuda", ops, raising=False)
    return ops


# v, rho, beta, update_mask, log_weights
SHAPES: list[tuple[Any, ...]] = [
    ((7, 3), (5, 3), (), None, None),
    ((7, 3), (5, 3), (5,), (7, 3), (5,)),
    ((7, 1), (1, 1), (1,), (1, 1), (1,)),
    ((7, 3), (4, 5, 3), (4, 1), (7, 1), None),
    ((4, 7, 3), (5, 3), (5,), (3,), (4, 1)),
    ((2, 1, 7, 3), (4, 5, 3), (2, 1, 5), (4, 1, 3), (4, 5)),
    ((3, 1, 2, 7, 3), (4, 1, 5, 3), (1,), None, (2, 5)),
    ((7, 3), (5, 3), None, (7, 3), (4, 5)),
    ((0, 3), (5, 3), (5,), None, None),
    ((0, 7, 3), (5, 3), (5,), (7, 3), None),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("steps", "step"), [(2, 0.7), (1, 1.0), (0, 1.0), (2, 0.0)])
def test_the_python_side(
    host_ops: HostOps, shapes: tuple[Any, ...], dtype: torch.dtype, steps: int, step: float
) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho, beta, mask, weights = (
        None if shape is None else torch.rand(shape, generator=g).to(dtype).requires_grad_()
        for shape in shapes
    )
    assert v is not None
    assert rho is not None
    beta = 2.0 if beta is None else beta
    args = (v, rho, beta, steps, step, mask, weights)
    wide = [x.detach().double() if isinstance(x, Tensor) else x for x in args]
    leaves = [x.requires_grad_() if isinstance(x, Tensor) else x for x in wide]
    truth = am.am_recursion(*leaves)
    close = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    out = cuda.am_recursion(*[x.detach() if isinstance(x, Tensor) else x for x in args], "high")
    assert out.is_contiguous()
    torch.testing.assert_close(out, truth.to(dtype), **close)

    grad = torch.rand(1, generator=g).to(dtype).expand(out.shape)  # strides of 0
    places = (0, 1, 2, 5, 6)
    needs = [isinstance(args[i], Tensor) for i in places]
    tracked = [leaves[i] for i, need in zip(places, needs, strict=True) if need]
    exact = iter(torch.autograd.grad(truth, tracked, grad.double(), materialize_grads=True))
    gradients = cuda.am_recursion_backward(grad, *[
        x.detach() if isinstance(x, Tensor) else x for x in args
    ], needs, "high")  # fmt: skip
    for i, need, value in zip(places, needs, gradients, strict=True):
        if not need:
            assert value.shape == (0,)
            continue
        like = args[i]
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
        assert value.is_contiguous()
        torch.testing.assert_close(value, next(exact).to(dtype), **close)
    none = cuda.am_recursion_backward(
        grad, *[x.detach() if isinstance(x, Tensor) else x for x in args], [False] * 5, "high"
    )
    assert all(x.shape == (0,) for x in none)


def test_one_step_and_its_gradient(host_ops: HostOps) -> None:
    v, rho, grad = torch.randn(6, 2), torch.randn(3, 2), torch.randn(6, 2)
    out, lse = cuda.am_step_saved(v, rho, 2.0, 0.5, None, None, "highest")
    assert torch.equal(out, cuda.am_recursion(v, rho, 2.0, 1, 0.5, None, None, "highest"))
    assert (lse.shape, lse.dtype) == ((6,), torch.float32)
    needs = [True, True, False, False, False]
    a = cuda.am_step_backward(grad, v, rho, 2.0, 0.5, None, None, lse, needs, "highest")
    b = cuda.am_recursion_backward(grad, v, rho, 2.0, 1, 0.5, None, None, needs, "highest")
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_a_shared_operand_is_not_copied(host_ops: HostOps) -> None:
    v, rho = torch.randn(7, 3), torch.randn(4, 5, 3)
    cuda.am_recursion(v, rho, 2.0, 1, 1.0, torch.ones(7, 1) > 0, None, "highest")
    call = host_ops.calls[-1]
    assert call[0].data_ptr() == v.data_ptr()
    assert call[0].stride()[:2] == (0, 0)
    assert call[1].data_ptr() == rho.data_ptr()
    assert call[5].stride() == (0, 0, 1, 0)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", [name for name in SCENES if name != "sharp"])
def test_far_rows_are_computed_again(host_ops: HostOps, name: str, batched: bool) -> None:
    """Both launches together: no row and no gradient is worse than differences in float32."""
    v, rho, beta = scene(name, 4, 1)
    v = v[::4]
    operands = (v, rho[None], beta) if batched else (v, rho, beta)
    out = cuda.am_recursion(*operands, 2, 1.0, None, None, "highest").view_as(v)
    error, allowed = errors_of(out, v, rho, beta, 2)
    assert (error <= allowed).all(), (error, allowed)

    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    needs = [True, True, True, False, False]
    grad = upstream[None] if batched else upstream
    gradients = cuda.am_recursion_backward(grad, *operands, 2, 1.0, None, None, needs, "highest")
    exact, plain = (_slopes(upstream, v, rho, beta, dtype) for dtype in (torch.double, torch.float))
    for name, result, expected, near in zip(
        ("v", "rho", "beta"), gradients, exact, plain, strict=False
    ):
        result = result.view_as(expected)
        assert torch.equal(result.isfinite(), expected.float().isfinite())
        if not result.isfinite().all():  # beyond float32
            continue
        error, allowed = ((x - expected).abs().max() for x in (result, near))
        allowed = allowed.nan_to_num(nan=0.0)  # float32 differences may overflow
        size = (
            expected.abs().max().clamp(min=float(upstream.abs().max()) if name != "beta" else 0.0)
        )
        assert error <= 2 * allowed + 32 * torch.finfo(torch.float32).eps * size, name


def _slopes(
    upstream: Tensor, v: Tensor, rho: Tensor, beta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Autograd's gradients of two steps from differences."""
    leaves = [x.to(dtype).requires_grad_() for x in (v, rho, beta)]
    return torch.autograd.grad(differences(*leaves, 2), leaves, upstream.to(dtype))


def test_rows_in_doubt_with_every_argument(host_ops: HostOps) -> None:
    """A mask, log-weights and a crossed batch; all rows are in doubt."""
    v, rho, beta = scene("sentinel", 3, 0)
    g = torch.Generator().manual_seed(0)
    v, rho = v[:14].view(2, 1, 7, 3), torch.stack([rho, rho + 0.1, rho - 0.1])
    mask, weights = torch.rand(7, 3, generator=g), torch.randn(3, 6, generator=g)
    weights[1, 2] = -torch.inf
    args = (v, rho, beta, 2, 0.7, mask, weights)
    wide = [x.double().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    truth = am.am_recursion(*wide)
    grad = torch.randn(truth.shape, generator=g)
    leaves = [x for x in wide if isinstance(x, Tensor)]
    exact = torch.autograd.grad(truth, leaves, grad.double())
    out = cuda.am_recursion(*args, "highest")
    assert host_ops.calls[-1][-1].all()
    gradients = cuda.am_recursion_backward(grad, *args, [True] * 5, "highest")
    assert host_ops.calls[-1][-1].all()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, truth.detach().float(), **close)
    for result, expected in zip(gradients, exact, strict=True):
        torch.testing.assert_close(result, expected.float(), **close)
    none = cuda.am_recursion_backward(grad, *args, [True, False, False, True, False], "highest")
    assert torch.equal(none[0], gradients[0])
    assert torch.equal(none[3], gradients[3])


def test_reasons_of_refusals() -> None:
    v, rho = torch.randn(7, 16), torch.randn(5, 16)
    assert cuda.why_not(v, rho, 1.0, 3, 1.0, None, None, "high") is None
    assert cuda.why_not(v, rho, torch.tensor(torch.inf)) is None
    assert cuda.why_not(v, rho, torch.inf) == "beta = inf"
    reason = "float64 is computed by the reference"
    assert cuda.why_not(v.double(), rho.double(), 1.0) == reason
    assert cuda.why_not(torch.randn(7, 17), torch.randn(5, 17), 1.0) == "D = 17 > 16"
    most = cuda.backward_memories(16)
    assert cuda.why_not(v, torch.randn(most, 16), 1.0) is None
    reason = f"K = {most + 1} > {most} for D = 16"
    assert cuda.why_not(v, torch.randn(most + 1, 16), 1.0) == reason
