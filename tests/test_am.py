# SPDX-License-Identifier: Apache-2.0
"""The mathematics of associative memory: exact cases, invariances, limits. Each case runs through
the op and through the truth, in float64 with a bound of 1e-12 unless it says otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _points import BOTH, F64, close, draw
from torch import Tensor

import clam_kernels
import python_fallback.am


def _t(*rows: Any, grad: bool = False) -> Tensor:
    return torch.tensor(rows, dtype=F64, requires_grad=grad)


# ---- 1 one memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1e-3, 1.0, 1e6, math.inf])
@pytest.mark.parametrize("a", [0.1, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_one_memory(am, beta, a, steps):
    """The distance to it shrinks by the factor 1 - a in each step, for any beta."""
    v, rho = draw(0, (6, 3), (1, 3))
    close(am.am_recursion(v, rho, beta, steps, step=a) - rho, (1 - a) ** steps * (v - rho))


def test_one_memory_is_reached_exactly_and_gives_exact_zeros(am):
    v, rho = draw(1, (6, 3), (1, 3))
    close(am.am_step(v, rho, 2.0), rho.expand(6, 3))
    beta, weights = _t(2.0, grad=True), _t(0.3, grad=True)
    for out in (
        am.am_step(v, rho, beta, step=0.4, log_weights=weights),
        am.am_recursion(v, rho, beta, 3, step=0.4, log_weights=weights),
    ):
        g_beta, g_weights = torch.autograd.grad(out.square().sum(), (beta, weights))
        assert torch.equal(g_beta, torch.zeros(1, dtype=F64))
        assert torch.equal(g_weights, torch.zeros(1, dtype=F64))
    close(am.am_energy(v, rho, 0.7), (v - rho).square().sum(-1))


# ---- 2 two memories -----------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.3, 1.0])
def test_two_opposite_memories_are_a_tanh(am, a):
    m = _t(1.5, 0.5)
    (x,) = draw(2, (50, 2))
    for beta in (0.01, 0.2, 3.0):
        expected = (1 - a) * x + a * m * torch.tanh(2 * beta * (x @ m))[:, None]
        close(am.am_step(x, torch.stack([m, -m]), beta, step=a), expected)
    zero = torch.zeros(1, 2, dtype=F64)
    close(am.am_step(zero, torch.stack([m, -m]), 5.0, step=a), zero)


@pytest.mark.parametrize(("beta", "share"), [(0.19, 0.0), (0.21, 0.37070573257)])
def test_the_midpoint_is_stable_below_the_critical_beta(beta, share):
    """The critical beta is 2 beta |m|^2 = 1; above it the limit is s m with s = tanh(2 beta |m|^2
    s).
    """
    m = _t(1.5, 0.5)
    end = clam_kernels.am_recursion(1e-3 * m[None], torch.stack([m, -m]), beta, 20_000)
    close(end[0], share * m, atol=1e-11)
    assert share == 0 or abs(math.tanh(2 * beta * 2.5 * share) - share) < 1e-11


# ---- 3, 4 numbers -------------------------------------------------------------------------------


def test_one_step_in_numbers(am):
    rho = _t([0.0, 0.0], [1.0, 0.0], grad=True)
    v, beta, lam = _t([0.25, 0.0], grad=True), torch.tensor(4.0, dtype=F64), _t(0.0, 0.0, grad=True)
    beta.requires_grad_()
    out = am.am_step(v, rho, beta, step=0.5, log_weights=lam)
    close(out.detach(), _t([0.1846014610110588, 0.0]))
    # p is the step of one-hot memories: x' = p @ rho at a = 1
    p = am.am_step(v, rho, beta, log_weights=lam).detach()[0, 0]
    close(p, 0.11920292202212, atol=1e-14)
    gradients = torch.autograd.grad(out[0, 0], (v, rho, beta, lam))
    close(gradients[0], _t([0.919974341614026, 0.0]))
    close(gradients[1], _t([0.33540495358543465, 0.0], [-0.25537929519946073, 0.0]))
    close(gradients[2], -0.026248396350876627)
    close(gradients[3], _t(-0.052496792701753246, 0.05249679270175325))


def test_one_energy_in_numbers(am):
    rho = _t([0.0, 0.0], [1.0, 0.0], grad=True)
    v, lam = _t([0.25, 0.0], grad=True), _t(0.0, 0.0, grad=True)
    beta = torch.tensor(4.0, dtype=F64, requires_grad=True)
    energy = am.am_energy(v, rho, beta, log_weights=lam)
    close(energy.detach(), _t(0.03076799723925685))
    gradients = torch.autograd.grad(energy.sum(), (v, rho, beta, lam))
    close(gradients[0], _t([0.26159415595576485, 0.0]))
    close(gradients[1], _t([-0.44039853898894116, 0.0], [0.1788043830331763, 0.0]))
    close(gradients[2], 0.022833365942950476)
    close(gradients[3], _t(-0.22019926949447058, -0.029800730505529383))
    # the step is descent of this energy: v' = v - (a/2) dE/dv
    step = am.am_step(v, rho, beta, step=0.5).detach()
    close(step, v.detach() - 0.25 * gradients[0])


def test_three_steps_in_numbers(am):
    rho, lam = _t([0.0, 0.0], [2.0, 0.0], [0.0, 1.0]), _t(0.0, 0.5, -0.5)
    v = _t([0.5, 0.5], [1.5, -0.5])
    end = am.am_recursion(v, rho, 1.0, 3, step=0.5, log_weights=lam)
    expected = _t([0.190338987092, 0.330726981176], [1.864921755616, -0.058167614966])
    close(end, expected, atol=6e-13)
    energy = am.am_energy(v, rho, 1.0, log_weights=lam)
    close(energy, _t(-0.104130605337, -0.085097246364), atol=6e-13)


# ---- 5, 6 limits of beta ------------------------------------------------------------------------


def test_beta_zero_is_the_weighted_mean(am):
    v, rho = draw(5, (7, 4), (3, 4))
    lam = _t(1.0, 2.0, 3.0).log()
    mean = (_t(1.0, 2.0, 3.0)[:, None] * rho).sum(0) / 6
    for beta in (0.0, torch.zeros((), dtype=F64), torch.zeros(3, dtype=F64)):
        close(am.am_step(v, rho, beta, log_weights=lam), mean.expand(7, 4))
        close(am.am_step(v, rho, beta), rho.mean(0).expand(7, 4))
    near = am.am_step(v, rho, 1e-9, log_weights=lam)
    assert float((near - mean).abs().max()) < 1e-7


def test_beta_to_infinity_is_the_nearest_memory(am):
    v, rho = draw(6, (40, 3), (8, 3))
    distance = torch.cdist(v, rho).square()
    nearest = rho[distance.argmin(1)]
    two = distance.topk(2, largest=False).values
    smallest_gap = float((two[:, 1] - two[:, 0]).min())
    close(am.am_step(v, rho, 1e4 / smallest_gap), nearest)
    close(am.am_step(v, rho, math.inf), nearest)
    labels, sqdist = am.am_assign(v, rho)
    assert torch.equal(labels, distance.argmin(1))
    close(sqdist, distance.amin(1))


def test_ties_take_the_lowest_index(am):
    m = _t(1.5, 0.5)
    rho, zero = torch.stack([m, -m, m]), torch.zeros(1, 2, dtype=F64)
    close(am.am_step(zero, rho, math.inf), m[None])
    assert am.am_assign(zero, rho)[0].tolist() == [0]
    close(am.am_step(zero, rho.flip(0)[1:], math.inf), -m[None])
    assert am.am_assign(m[None], rho)[0].tolist() == [0]
    first = _t(-math.inf, 0.0, 0.0)
    assert am.am_assign(m[None], rho, log_weights=first)[0].tolist() == [2]
    close(am.am_step(zero, rho, math.inf, log_weights=first), -m[None])
    grid = torch.zeros(9, 5, dtype=torch.float32)  # all equal: every label 0
    assert am.am_assign(grid, grid)[0].tolist() == [0] * 9


def test_hard_assignment_has_its_own_gradient(am):
    """Gx = G - H, Grho = onehot^T H; log-weights get 0."""
    v, rho, g = draw(7, (6, 3), (4, 3), (6, 3))
    v.requires_grad_(), rho.requires_grad_()
    lam = torch.zeros(4, dtype=F64, requires_grad=True)
    out = am.am_step(v, rho, math.inf, step=0.3, log_weights=lam)
    gradients = torch.autograd.grad(out, (v, rho, lam), g, allow_unused=True)
    hot = torch.nn.functional.one_hot(torch.cdist(v, rho).argmin(1), 4).to(F64)
    close(gradients[0], 0.7 * g)
    close(gradients[1], hot.T @ (0.3 * g))
    assert gradients[2] is None or not gradients[2].any()


# ---- 7 energy -----------------------------------------------------------------------------------


def test_no_step_raises_the_energy_by_more_than_it_must_fall(am):
    generator = torch.Generator().manual_seed(7)

    def share(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=F64)

    for trial in range(60):
        v, rho, lam = draw(100 + trial, (20, 3), (5, 3), (5,))
        a, u = 2 * float(share(1)), share(20, 3)
        beta = 10 ** (4 * float(share(1)) - 2)
        fall = am.am_energy(v, rho, beta, log_weights=lam)
        moved = am.am_step(v, rho, beta, step=a, update_mask=u, log_weights=lam)
        fall = fall - am.am_energy(moved, rho, beta, log_weights=lam)
        xb = am.am_step(v, rho, beta, log_weights=lam)
        bound = (a * u * (2 - a * u) * (xb - v).square()).sum(-1)
        assert bool((fall >= bound - 1e-12).all())


def test_the_energy_falls_all_along_a_recursion(am):
    v, rho, lam = draw(8, (50, 4), (6, 4), (6,))
    for a in (0.1, 0.5, 1.0):
        energy = [
            am.am_energy(
                am.am_recursion(v, rho, 1.3, t, step=a, log_weights=lam), rho, 1.3, log_weights=lam
            )
            for t in range(11)
        ]
        steps = torch.stack(energy).diff(dim=0)
        assert float(steps.max()) <= 1e-12
        assert float(steps.min()) < -1e-3


def test_a_step_beyond_two_may_raise_the_energy(am):
    """With a = 2.2 the energy rises, so the tests above can fail."""
    v, rho = draw(9, (200, 3), (5, 3))
    rise = am.am_energy(am.am_step(v, rho, 5.0, step=2.2), rho, 5.0) - am.am_energy(v, rho, 5.0)
    assert float(rise.max()) > 0.1


# ---- 8 masked entries ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_entries_keep_their_bits(am, dtype):
    v, rho = draw(10, (70, 5), (6, 5), dtype=dtype)
    rho = rho + 1000  # here v - c + c differs from v
    nothing = torch.zeros(70, 5, dtype=torch.bool)
    half = torch.arange(350).reshape(70, 5) % 2 == 0
    for steps in (1, 4):
        assert torch.equal(am.am_recursion(v, rho, 1.0, steps, update_mask=nothing), v)
        out = am.am_recursion(v, rho, 1.0, steps, update_mask=half)
        assert torch.equal(out[~half], v[~half])
        assert not torch.equal(out[half], v[half])
        every = am.am_recursion(v, rho, 1.0, steps, update_mask=~nothing)
        plain = am.am_recursion(v, rho, 1.0, steps)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        torch.testing.assert_close(every, plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(am.am_recursion(v, rho, 1.0, 0), v)
    assert torch.equal(am.am_recursion(v, rho, 1.0, 3, step=0.0), v)
    assert torch.equal(am.am_step(v, rho, 1.0, step=0.0), v)


# ---- 9 equivariance -----------------------------------------------------------------------------


def test_rotation_and_translation(am):
    v, rho, t = draw(11, (30, 4), (6, 4), (4,))
    q, _ = torch.linalg.qr(draw(12, (4, 4))[0])
    out = am.am_recursion(v, rho, 0.8, 3, step=0.5)
    close(am.am_recursion(v @ q.T + t, rho @ q.T + t, 0.8, 3, step=0.5), out @ q.T + t)
    close(am.am_energy(v @ q.T + t, rho @ q.T + t, 0.8), am.am_energy(v, rho, 0.8))


def test_scaling(am):
    v, rho = draw(13, (30, 4), (6, 4))
    out = am.am_recursion(v, rho, 0.8, 3, step=0.5)
    close(am.am_recursion(7 * v, 7 * rho, 0.8 / 49, 3, step=0.5), 7 * out, atol=1e-11)
    close(am.am_energy(7 * v, 7 * rho, 0.8 / 49), 49 * am.am_energy(v, rho, 0.8), atol=1e-11)


def test_permuted_memories(am):
    v, rho, lam = draw(14, (30, 4), (6, 4), (6,))
    rho.requires_grad_()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    beta = torch.linspace(0.5, 1.5, 6, dtype=F64)
    out = am.am_recursion(v, rho, beta, 2, log_weights=lam)
    moved = am.am_recursion(v, rho[order], beta[order], 2, log_weights=lam[order])
    close(moved.detach(), out.detach())
    (grad,) = torch.autograd.grad(out.square().sum(), rho)
    leaf = rho.detach()[order].requires_grad_()
    again = am.am_recursion(v, leaf, beta[order], 2, log_weights=lam[order])
    close(torch.autograd.grad(again.square().sum(), leaf)[0], grad[order], atol=1e-11)


def test_float32_a_thousand_from_the_origin():
    """Measured 6e-4 with centring (input rounding, amplified between memories), 2.7 without."""
    v, rho = draw(15, (200, 16), (8, 16), dtype=torch.float32)
    here = clam_kernels.am_recursion(v, rho, 0.3, 5, step=0.5)
    there = clam_kernels.am_recursion(v + 1000, rho + 1000, 0.3, 5, step=0.5)
    assert float((there - 1000 - here).abs().max()) < 3e-3


def test_twins_and_shares(am):
    """Two equal memories equal one with log-weight + log 2; a constant added to all log-weights
    changes nothing.
    """
    v, rho, lam = draw(16, (30, 4), (5, 4), (5,))
    twins, wide = torch.cat([rho, rho[:1]]), torch.cat([lam, lam[:1]])
    heavier = lam + _t(math.log(2), 0, 0, 0, 0)
    for function, tail in ((am.am_step, ()), (am.am_recursion, (3,))):
        one = function(v, rho, 0.9, *tail, log_weights=heavier)
        close(function(v, twins, 0.9, *tail, log_weights=wide), one)
        close(function(v, rho, 0.9, *tail, log_weights=heavier + 5.0), one)
        close(function(v, rho, 0.9, *tail, log_weights=_t(3.0)), function(v, rho, 0.9, *tail))
    one = am.am_energy(v, rho, 0.9, log_weights=heavier)
    close(am.am_energy(v, twins, 0.9, log_weights=wide), one)
    close(am.am_energy(v, rho, 0.9, log_weights=heavier + 5.0), one - 5 / 0.9)


# ---- 10 composition -----------------------------------------------------------------------------


def test_a_recursion_is_its_steps(am):
    """Bit for bit in the truth. The chunked form keeps the centred state between steps, where
    single steps round c + (x - c) each time: 1e-13.
    """
    v, rho, lam, beta = draw(17, (40, 5), (7, 5), (7,), (7,))
    mask = torch.rand(40, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    options = {"step": 0.6, "update_mask": mask, "log_weights": lam}
    x = v
    for _ in range(6):
        x = am.am_step(x, rho, beta.square(), **options)
    whole = am.am_recursion(v, rho, beta.square(), 6, **options)
    if am is python_fallback.am:
        assert torch.equal(whole, x)
    else:
        close(whole, x, atol=1e-13)
        v, rho, lam, beta = (a.float() for a in (v, rho, lam, beta))
        options["log_weights"] = lam
        x = v
        for _ in range(6):
            x = am.am_step(x, rho, beta.square(), **options)
        whole = am.am_recursion(v, rho, beta.square(), 6, **options)
        assert float((whole - x).abs().max()) < 1e-6 * float(x.abs().max()) * 6


def test_replicas_are_a_loop(am):
    v, rho, beta = draw(18, (30, 4), (3, 6, 4), (3, 6))
    together = am.am_recursion(v, rho, beta.square(), 4, step=0.7)
    for r in range(3):
        close(together[r], am.am_recursion(v, rho[r], beta[r].square(), 4, step=0.7), atol=1e-13)


def test_chunks_of_rows_add_up(am):
    v, rho, g = draw(19, (57, 4), (6, 4), (57, 4))
    rho.requires_grad_()
    whole = am.am_recursion(v, rho, 0.9, 3)
    (grad,) = torch.autograd.grad(whole, rho, g)
    parts = torch.zeros_like(rho)
    for rows in (slice(0, 20), slice(20, 21), slice(21, 57)):
        part = am.am_recursion(v[rows], rho, 0.9, 3)
        close(part.detach(), whole[rows].detach())
        parts += torch.autograd.grad(part, rho, g[rows])[0]
    close(parts, grad, atol=1e-11)


def test_many_chunks_are_one():
    """More rows than one chunk has: the op against the truth, forward and backward."""
    v, rho = draw(20, (9000, 3), (300, 3))
    results = []
    for am in BOTH.values():
        leaves = v.clone().requires_grad_(), rho.clone().requires_grad_()
        beta = torch.tensor(0.7, dtype=F64, requires_grad=True)
        out = am.am_recursion(*leaves, beta, 2, step=0.5)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (*leaves, beta))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-10)


# ---- 11 gradients at the edges (finite differences are in contract/test_gradients.py) -----------


def test_states_on_their_memories_have_finite_gradients(am):
    for beta in (0.0, 1.0, 1e6):
        v, rho = (torch.eye(3, dtype=F64).requires_grad_() for _ in range(2))
        out = am.am_recursion(v, rho, beta, 3, step=0.5)
        grads = torch.autograd.grad(out.square().sum(), (v, rho))
        assert all(bool(g.isfinite().all()) for g in grads)
    v, rho = (torch.eye(3, dtype=F64).requires_grad_() for _ in range(2))
    (grad,) = torch.autograd.grad(am.am_energy(v, rho, 1e6).sum(), v)
    close(grad, 0.0)


def test_a_masked_memory_has_no_influence(am):
    v, rho, lam = draw(21, (20, 3), (5, 3), (5,))
    lam[2] = -math.inf
    keep = torch.tensor([0, 1, 3, 4])
    without = am.am_recursion(v, rho[keep], 1.1, 3, log_weights=lam[keep])
    close(am.am_recursion(v, rho, 1.1, 3, log_weights=lam), without)
    rho[2] = math.nan  # and it may have any values
    rho.requires_grad_()
    out = am.am_recursion(v, rho, 1.1, 3, log_weights=lam)
    close(out.detach(), without)
    if am is clam_kernels:
        (grad,) = torch.autograd.grad(out.sum(), rho)
        assert torch.equal(grad[2], torch.zeros(3, dtype=F64))
        assert bool(grad.isfinite().all())


def test_without_active_memories_rows_stay(am):
    """x' = x, E = +inf, no label; and only where every memory is masked."""
    v, rho = draw(22, (2, 6, 3), (4, 3))
    v.requires_grad_(), rho.requires_grad_()
    lam = torch.zeros(2, 4, dtype=F64)
    lam[0] = -math.inf
    lam.requires_grad_()
    out = am.am_recursion(v, rho, 1.1, 3, log_weights=lam)
    assert torch.equal(out[0], v[0])
    close(out[1].detach(), am.am_recursion(v[1], rho, 1.1, 3).detach())
    gradients = torch.autograd.grad(out[0].sum(), (v, rho, lam), retain_graph=True)
    assert torch.equal(gradients[0][0], torch.ones(6, 3, dtype=F64))
    assert not any(bool(g.any()) for g in (gradients[0][1], gradients[1], gradients[2]))
    for result in (out.sum(), am.am_energy(v, rho, 1.1, log_weights=lam)[1].sum()):
        grads = torch.autograd.grad(result, (v, rho, lam))
        assert all(bool(g.isfinite().all()) for g in grads)
        assert not grads[2][0].any()
    energy = am.am_energy(v, rho, 1.1, log_weights=lam)
    assert bool((energy[0] == math.inf).all())
    assert bool(energy[1].isfinite().all())
    labels, sqdist = am.am_assign(v, rho, log_weights=lam)
    assert labels[0].tolist() == [-1] * 6
    assert bool((sqdist[0] == math.inf).all())
    assert bool((labels[1] >= 0).all())
    assert torch.equal(am.am_step(v, rho, math.inf, log_weights=lam)[0], v[0])


# ---- 12 recall ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_recall_of_hidden_entries(am, beta):
    """Five patterns in R^64, half of the entries hidden. Recall returns them up to the weight of
    the other patterns, K exp(-beta d^2): 7e-11 here at beta .3, below 1e-14 at 1 and 3.
    """
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(5, 64, generator=generator, dtype=F64)
    hidden = torch.rand(5, 64, generator=generator).argsort(1) < 32
    start = patterns.masked_fill(hidden, 0.0)
    result = am.am_recursion(start, patterns, beta, 5, update_mask=hidden)
    apart = float(torch.pdist(patterns).min()) ** 2
    leak = 5 * math.exp(-beta * apart) * float((patterns[:, None] - patterns[None]).abs().max())
    assert leak < 1e-8
    assert float((result - patterns).abs().max()) < leak + 1e-12
    assert torch.equal(result[~hidden], patterns[~hidden])


@pytest.mark.parametrize(("beta", "share"), [(0.3, 0.985), (1.0, 0.975), (3.0, 0.97)])
def test_recall_among_a_thousand(beta, share):
    """Recall returns 98 to 99 %; the other rows go to another pattern, which is no bug."""
    generator = torch.Generator().manual_seed(4)
    patterns = torch.randn(1000, 64, generator=generator, dtype=F64)
    hidden = torch.rand(1000, 64, generator=generator).argsort(1) < 32
    start = patterns.masked_fill(hidden, 0.0)
    result = clam_kernels.am_recursion(start, patterns, beta, 5, update_mask=hidden)
    right = ((result - patterns).abs().amax(1) < 1e-6).double().mean()
    assert share <= float(right) < 1.0


# ---- 14 the amplitude of trained memories -------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "steps", "ratio", "slack"), [(0.1, 10, 1.535, 0.02), (1.0, 1, 1.0, 0.03)]
)
def test_masked_training_inflates_memories_if_the_recursion_is_short(a, steps, ratio, slack):
    """Blobs at +-c, a fifth of the entries hidden: |rho| = |c| / (1 - (1 - a)^T)."""
    generator = torch.Generator().manual_seed(0)
    c = torch.tensor([3.0, -2.0, 4.0, 3.0, -3.0, 2.0])
    x = torch.cat([c + 0.1 * torch.randn(60, 6, generator=generator),
                   -c + 0.1 * torch.randn(60, 6, generator=generator)])  # fmt: skip
    x = x - x.mean(0)
    means = torch.stack([x[:60].mean(0), x[60:].mean(0)])
    rho = (0.8 * means).requires_grad_()
    optimizer = torch.optim.Adam([rho], lr=0.05)
    for i in range(160):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / 160)
        hidden = torch.rand(x.shape, generator=generator) < 0.2
        end = clam_kernels.am_recursion(
            x.masked_fill(hidden, 0.0), rho, 1.0, steps, step=a, update_mask=hidden
        )
        loss = (hidden * (x - end)).square().sum() / hidden.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    growth = rho.detach().norm(dim=1) / means.norm(dim=1)
    assert float((growth - ratio).abs().max()) <= slack, growth
    assert abs(1 / (1 - (1 - a) ** steps) - ratio) < 1e-3
