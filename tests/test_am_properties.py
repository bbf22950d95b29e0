# SPDX-License-Identifier: Apache-2.0
"""Properties of the associative memory, for random problems."""

from __future__ import annotations

import math

import torch
from _points import BOTH, close, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clam_kernels

PROBLEM = {
    "seed": st.integers(0, 10**6),
    "n": st.integers(1, 20),
    "k": st.integers(1, 12),
    "d": st.integers(1, 8),
    "log_beta": st.floats(-2, 2),
}
PROPERTY = settings(max_examples=25)


def _problem(
    seed: int, n: int, k: int, d: int, log_beta: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    v, rho, lam = draw(seed, (n, d), (k, d), (k,))
    return v, rho, lam, 10**log_beta


@PROPERTY
@given(**PROBLEM, steps=st.integers(0, 5), a=st.floats(0, 2))
def test_the_op_equals_the_truth(steps, a, **size):
    v, rho, lam, beta = _problem(**size)
    options = {"step": a, "log_weights": lam}
    result, expected = (am.am_recursion(v, rho, beta, steps, **options) for am in BOTH.values())
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-9)
    result, expected = (am.am_energy(v, rho, beta, log_weights=lam) for am in BOTH.values())
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    result, expected = (am.am_assign(v, rho) for am in BOTH.values())
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], rtol=1e-12, atol=1e-12)


@PROPERTY
@given(**PROBLEM, a=st.floats(0, 2))
def test_descent(a, **size):
    v, rho, lam, beta = _problem(**size)
    before = clam_kernels.am_energy(v, rho, beta, log_weights=lam)
    moved = clam_kernels.am_step(v, rho, beta, step=a, log_weights=lam)
    after = clam_kernels.am_energy(moved, rho, beta, log_weights=lam)
    assert bool((after <= before + 1e-11 * (1 + before.abs())).all())


@PROPERTY
@given(**PROBLEM)
def test_a_full_step_stays_in_the_convex_hull(**size):
    """A convex combination of the memories: inside their box, and fixed where all are equal."""
    v, rho, lam, beta = _problem(**size)
    out = clam_kernels.am_step(v, rho, beta, log_weights=lam)
    assert bool((out <= rho.amax(0) + 1e-12).all())
    assert bool((out >= rho.amin(0) - 1e-12).all())
    same = rho[:1].expand_as(rho)
    close(clam_kernels.am_step(v, same, beta, log_weights=lam), same[:1].expand_as(v))


@PROPERTY
@given(**PROBLEM)
def test_energy_bounds(**size):
    """min d - log(K)/beta <= E <= min d."""
    v, rho, _, beta = _problem(**size)
    energy = clam_kernels.am_energy(v, rho, beta)
    nearest = clam_kernels.am_assign(v, rho)[1]
    assert bool((energy <= nearest + 1e-11 * (1 + nearest)).all())
    assert bool((energy >= nearest - math.log(len(rho)) / beta - 1e-11 * (1 + nearest)).all())


@PROPERTY
@given(**PROBLEM, shift=st.floats(-1e3, 1e3), steps=st.integers(1, 4))
def test_a_shift_of_all_points_shifts_the_result(shift, steps, **size):
    v, rho, lam, beta = _problem(**size)
    here = clam_kernels.am_recursion(v, rho, beta, steps, step=0.5, log_weights=lam)
    there = clam_kernels.am_recursion(
        v + shift, rho + shift, beta, steps, step=0.5, log_weights=lam
    )
    # rounding of the inputs at `shift`; a step multiplies it by up to 1/2 + beta delta^2 / 4
    spread = float((rho[:, None] - rho[None]).square().sum(-1).max())
    stretch = (1 + beta * spread / 4) ** steps
    slack = 1e-14 * (1 + abs(shift)) * stretch * (1 + beta)
    assert float((there - shift - here).abs().max()) <= slack + 1e-11


@PROPERTY
@given(**PROBLEM, copies=st.integers(2, 4))
def test_copies_of_all_memories_change_nothing(copies, **size):
    v, rho, lam, beta = _problem(**size)
    one = clam_kernels.am_step(v, rho, beta, log_weights=lam)
    many = clam_kernels.am_step(v, rho.repeat(copies, 1), beta, log_weights=lam.repeat(copies))
    close(many, one, atol=1e-11)


@PROPERTY
@given(**PROBLEM, first=st.integers(0, 3), second=st.integers(0, 3))
def test_steps_add_up(first, second, **size):
    v, rho, lam, beta = _problem(**size)
    options = {"step": 0.5, "log_weights": lam}
    middle = clam_kernels.am_recursion(v, rho, beta, first, **options)
    parts = clam_kernels.am_recursion(middle, rho, beta, second, **options)
    whole = clam_kernels.am_recursion(v, rho, beta, first + second, **options)
    torch.testing.assert_close(parts, whole, rtol=1e-7, atol=1e-8)


@PROPERTY
@given(**PROBLEM)
def test_gradient_of_the_energy_is_the_step(**size):
    """dE/dx = 2 (x - xb)."""
    v, rho, lam, beta = _problem(**size)
    leaf = v.clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        clam_kernels.am_energy(leaf, rho, beta, log_weights=lam).sum(), leaf
    )
    xb = clam_kernels.am_step(v, rho, beta, log_weights=lam)
    close(grad, 2 * (v - xb), atol=1e-10)


@PROPERTY
@given(**PROBLEM, data=st.data())
def test_batches_broadcast_like_torch(data, **size):
    """Any split of leading dims between the arguments equals the call on expanded copies."""
    _, _, _, beta = _problem(**size)
    n, k, d = size["n"], size["k"], size["d"]
    dims = data.draw(st.lists(st.integers(1, 3), min_size=0, max_size=2))

    def lead() -> tuple[int, ...]:
        own = tuple(s if data.draw(st.booleans()) else 1 for s in dims)
        return own[data.draw(st.integers(0, len(own))) :]

    leads = [lead() for _ in range(4)]
    v, rho, mask, lam = draw(
        size["seed"], (*leads[0], n, d), (*leads[1], k, d), (*leads[2], n, d), (*leads[3], k)
    )
    full = torch.broadcast_shapes(*leads)
    result = clam_kernels.am_recursion(
        v, rho, beta, 2, step=0.5, update_mask=mask > 0, log_weights=lam
    )
    expected = clam_kernels.am_recursion(
        v.expand(*full, n, d).contiguous(),
        rho.expand(*full, k, d).contiguous(),
        beta,
        2,
        step=0.5,
        update_mask=(mask > 0).expand(*full, n, d).contiguous(),
        log_weights=lam.expand(*full, k).contiguous(),
    )
    assert result.shape == (*full, n, d)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
