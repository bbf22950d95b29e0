# SPDX-License-Identifier: Apache-2.0
"""The numerical rules of the associative memory: values that are not finite, dtypes, digits. Each
case runs through the op and through the truth.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _points import F64, close, draw
from torch import Tensor

import python_fallback.am


def test_nan_rows_and_no_rows(am):
    v, rho = draw(23, (9, 3), (4, 3))
    clean = am.am_recursion(v, rho, 1.0, 3)
    v[4, 1] = math.nan
    dirty = am.am_recursion(v, rho, 1.0, 3)
    others = torch.arange(9) != 4
    assert torch.equal(dirty[others], clean[others])
    assert bool(dirty[4].isnan().all())
    assert bool(am.am_energy(v, rho, 1.0)[4].isnan())
    assert int(am.am_assign(v, rho)[0][4]) == -1
    none = torch.zeros(0, 3, dtype=F64, requires_grad=True)
    rho.requires_grad_()
    out = am.am_recursion(none, rho, 1.0, 3)
    assert out.shape == (0, 3)
    grads = torch.autograd.grad(out.sum(), (none, rho))
    assert grads[0].shape == (0, 3)
    assert torch.equal(grads[1], torch.zeros(4, 3, dtype=F64))
    assert am.am_energy(none, rho, 1.0).shape == (0,)
    assert am.am_assign(none, rho)[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_states_are_float32_between_the_steps(am, dtype):
    """They are rounded once, at the end: rounding after each step costs .5 % in bfloat16."""
    v, rho = draw(24, (50, 6), (5, 6), dtype=dtype)
    out = am.am_recursion(v, rho, 0.8, 10, step=0.1)
    assert out.dtype == dtype
    assert torch.equal(out, am.am_recursion(v.float(), rho.float(), 0.8, 10, step=0.1).to(dtype))
    assert am.am_energy(v, rho, 0.8).dtype == torch.float32


# ---- numerical rules ----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.22, 1.0, 1e4, 1e6, 1e30])
def test_sharp_beta_far_from_all_memories(am, beta):
    """exp(-beta d) underflows float32 beyond 104: without the row maximum this is 0/0."""
    v, rho = draw(25, (30, 1024), (6, 1024), dtype=torch.float32)
    assert float(torch.cdist(v, rho).square().amin()) > 480
    out = am.am_step(v, rho, beta)
    assert bool(out.isfinite().all())
    nearest = rho[torch.cdist(v.double(), rho.double()).argmin(1)]
    if beta >= 1e4:
        torch.testing.assert_close(out, nearest, rtol=1e-5, atol=1e-5)
    grads_of = v.clone().requires_grad_()
    (grad,) = torch.autograd.grad(am.am_step(grads_of, rho, beta).sum(), grads_of)
    assert bool(grad.isfinite().all())


def test_twin_memories_in_float32(am):
    """Equal memories get equal weights, at any beta and any position."""
    for offset in (0.0, 1000.0, 1e5):
        for beta in (1.0, 1e6):
            rho = torch.tensor([[1.0, 2.0], [1.0, 2.0], [9.0, 9.0]]) + offset
            v = (rho + torch.tensor([[0.5, 0.0], [-0.25, 0.0], [0.0, 0.25]])).requires_grad_()
            leaf = rho.clone().requires_grad_()
            out = am.am_step(v, leaf, beta)
            (grad,) = torch.autograd.grad(out[:2].sum(), leaf)
            assert torch.equal(grad[0], grad[1])
            torch.testing.assert_close(
                out[:2].detach(), rho[:2], rtol=0, atol=2e-6 * max(offset, 1)
            )


def test_an_outlier_does_not_blur_the_others(am):
    """A row and a memory at distance 1e6: the other rows stay as without them, to float32 of
    centred data.
    """
    v, rho = draw(26, (50, 4), (6, 4), dtype=torch.float32)
    plain = am.am_step(v, rho, 0.7)
    far = torch.full((1, 4), 1e6)
    assert torch.equal(am.am_step(torch.cat([v, far]), rho, 0.7)[:50], plain)
    # a far memory moves the centre: inputs are rounded relative to its distance / K
    dragged = am.am_step(v, torch.cat([rho, far / 1e3]), 0.7)
    torch.testing.assert_close(dragged, plain, rtol=0, atol=1e-2)
    out_of_play = torch.tensor([0.0] * 6 + [-math.inf])
    torch.testing.assert_close(
        am.am_step(v, torch.cat([rho, far]), 0.7, log_weights=out_of_play), plain,
        rtol=0, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, 1000.0, 1e5])
def test_the_distance_of_a_point_to_itself(am, offset):
    (rho,) = draw(27, (40, 16), dtype=torch.float32)
    rho = rho + offset
    labels, sqdist = am.am_assign(rho, rho)
    assert labels.tolist() == list(range(40))
    assert torch.equal(sqdist, torch.zeros(40))
    v = rho + 0.01 * torch.sign(draw(28, (40, 16), dtype=torch.float32)[0])
    direct = (v.double() - rho.double()).square().sum(-1)
    torch.testing.assert_close(am.am_assign(v, rho)[1].double(), direct, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("offset", [1000.0, 1e5])
def test_energy_far_from_the_origin(am, offset):
    """An offset of float32 data changes the energy by its rounding only."""
    v, rho = draw(29, (100, 16), (12, 16), dtype=torch.float32)
    v, rho = v + offset, rho + offset
    exact = am.am_energy(v.double(), rho.double(), 0.5)
    torch.testing.assert_close(am.am_energy(v, rho, 0.5).double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("k", [3, 8, 16, 40])
@pytest.mark.parametrize("beta", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_weights_that_underflow(am, k, beta, dtype):
    """Soft to hard memories: most exponentials underflow; each row is alone."""
    v, rho = (3 * x for x in draw(33, (60, 8), (k, 8)))
    v, rho, up = v.to(dtype), rho.to(dtype), draw(34, (60, 8))[0]

    def call(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (v, rho)]
        out = function(*leaves, torch.tensor(beta, dtype=dtype), 3)
        return [out, *torch.autograd.grad((out * up.to(dtype)).sum(), leaves)]

    result = call(am.am_recursion, dtype)
    exact = call(python_fallback.am.am_recursion, F64)
    bound = 1e-12 if dtype == F64 else 2e-6 * max(1.0, beta)
    for ours, theirs in zip(result, exact, strict=True):
        gap = (ours.detach().double() - theirs.detach()).abs() / (1 + theirs.detach().abs())
        assert float(gap.max()) <= 20 * bound
    energy = am.am_energy(v, rho, beta).double()
    truth = python_fallback.am.am_energy(v.double(), rho.double(), beta)
    torch.testing.assert_close(energy, truth, rtol=1e-5, atol=1e-4)
    op = torch.ops.clam.am_recursion
    parts = [op(x, rho, beta, 3) for x in (v[:7], v[7:40], v[40:])]
    assert torch.equal(torch.cat(parts), op(v, rho, beta, 3))


def test_energy_is_never_below_its_bound(am):
    """No distance is below 0, so E >= -logsumexp(log w)/beta, also for a state at a memory."""
    (rho,) = draw(30, (20, 64), dtype=torch.float32)
    for beta in (1e-2, 1.0, 1e4):
        floor = -math.log(20) / beta
        assert float(am.am_energy(rho, rho, beta).min()) >= floor - 1e-6 * abs(floor)


def test_large_batches_of_small_problems(am):
    """[B, N, D] with B in the thousands: every problem has its own result."""
    v, rho = draw(31, (3000, 4, 2), (3000, 3, 2))
    out = am.am_recursion(v, rho, 1.0, 2)
    for i in (0, 1, 1499, 2999):
        close(out[i], am.am_recursion(v[i], rho[i], 1.0, 2))
