# SPDX-License-Identifier: Apache-2.0
"""Deep embedded clustering: exact cases, invariances, limits, and the mistakes of other code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import clam_kernels as ck
from clam_kernels import testing
from clam_kernels.ops.dec import dec_losses
from python_fallback import dec as truth

INF = math.inf
MODES = ("frozen", "minibatch", "self")


def wide(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(a: Tensor, b: Any, bound: float = 1e-9) -> None:
    b = b if isinstance(b, Tensor) else wide(b)
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound)


def graded(z: Tensor, mu: Tensor, alpha: Any = 1.0, **rest: Any) -> tuple[Tensor, ...]:
    """The loss, dz, dmu, and dalpha where alpha is a tensor."""
    leaves = [x.detach().clone().requires_grad_() for x in (z, mu)]
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().clone().requires_grad_()
        leaves.append(alpha)
    loss = ck.dec_loss(leaves[0], leaves[1], rest.pop("target", None), alpha=alpha, **rest)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


# ---- exact cases: numbers of shared/spec/dec.md, section 9 ---------------------------------------

T2 = wide([[0.0], [1.0]])
T3 = wide([[0.0], [3.0], [1.0]]), wide([[0.0], [2.0]])
T4 = (
    wide([[0.5, 0], [2, 1], [-1, 3]]),
    wide([[0, 0], [2, 2], [-1, 1]]),
    wide([[0, 0], [2, 2], [-1, 2]]),
)
T5 = wide([[0, 0], [1, 2], [3, 0], [0.5, 0.5]]), wide([[0, 0], [2, 0], [0, 2]])


def test_one_row_is_its_own_target():
    z, mu = wide([[0.0, 0.0]]), wide([[0.0, 0.0], [1.0, 0.0]])
    lse, labels, counts, bad = ck.student_t_stats(z, mu)
    close(lse, [0.405465108108], 1e-11)
    close(counts, [2 / 3, 1 / 3])
    assert (labels.tolist(), int(bad)) == ([0], 0)
    for part in graded(z, mu, wide(1.0), mode="minibatch"):
        close(part, torch.zeros_like(part), 1e-15)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("mean", 0.5)])
def test_two_rows_on_two_centroids(reduction, share):
    _lse, _, counts, _ = ck.student_t_stats(T2, T2)
    close(counts, [1.0, 1.0])
    target = ck.dec_target(T2, T2, store="recompute")
    close(target.log_norm, [0.223143551314] * 2)
    close(target.shares(), [[0.8, 0.2], [0.2, 0.8]])
    results = graded(T2, T2, wide(1.0), mode="minibatch", reduction=reduction)
    exact = 0.0873842413639, [[2 / 15], [-2 / 15]], [[2 / 15], [-2 / 15]], 0.0409137092587
    for got, want in zip(results, exact, strict=True):
        close(got, share * wide(want))


def test_a_gaussian_is_the_limit():
    loss, dz, dmu = graded(T2, T2, INF, mode="minibatch", reduction="sum")
    close(loss, 0.0526891719538)
    close(dz, [[0.108599247428], [-0.108599247428]])
    close(ck.dec_target(T2, T2, alpha=INF).shares()[0, 1], 0.268941421370)
    results = graded(T2, T2, wide(1e12), mode="minibatch", reduction="sum")
    for got, want in zip(results, (loss, dz, dmu, wide(0.0)), strict=True):
        close(got, want)
    results = graded(T2, T2, wide(INF), mode="minibatch")
    assert all(bool(part.isnan().all()) for part in results)


def test_distances_are_squared():
    """The norm in place of its square gives q_00 = .75 (a mistake that labels do not show)."""
    z, mu = T3
    lse, labels, counts, _ = ck.student_t_stats(z, mu)
    close(lse, [0.182321556794, -0.510825623766, 0.0])
    close(counts, [1.5, 1.5])
    assert labels.tolist() == [0, 1, 0]
    target = ck.dec_target(z, mu, store="recompute")
    close(target.log_norm, [-0.366244394955, -1.75253875607, -1.09861228867])
    close(target.shares(), [[25 / 26, 1 / 26], [1 / 26, 25 / 26], [0.5, 0.5]])
    loss, dz, dmu, dalpha = graded(z, mu, wide(1.0), mode="minibatch", reduction="sum")
    close(loss, 0.16239877094)
    close(dz, [[0.102564102564], [0.0512820512821], [0.0]])
    close(dmu, [[0.0769230769231], [-0.230769230769]])
    close(dalpha, -0.0524920400557)


@pytest.mark.parametrize("store", ["dense", "recompute"])
def test_a_frozen_target(store):
    z, mu, z0 = T4
    target = ck.dec_target(z0, mu, alpha=2.0, store=store)
    close(target.log_counts, wide([0.967441960611, 1.02601664567, 1.00654139372]).log())
    close(target.shares()[0], [0.886770399602, 0.00668916160470, 0.106540438793])
    close(
        ck.student_t_stats(z, mu, alpha=2.0)[0], [0.176087868864, -0.255435239813, -1.11311843626]
    )
    loss, dz, dmu, dalpha = graded(z, mu, wide(2.0), target=target)
    close(loss, 0.231410853358)
    close(dz, [[0.0319836512905, 0.0399046071322], [-0.0799675809199, -0.12171176804],
               [0.0583258415606, 0.0583258415606]])  # fmt: skip
    close(dmu, [[0.00198131260131, 0.0601640893166], [-0.0642431953404, 0.0878526093310],
                [0.0519199708080, -0.124535379301]])  # fmt: skip
    close(dalpha, -0.0479676953567)


def test_another_alpha():
    """An exponent of -1 for every alpha is another mistake."""
    z, mu = T5
    lse, _, counts, _ = ck.student_t_stats(z, mu, alpha=3.0)
    close(lse, [0.31287232128, -0.169899036795, -0.415278729556, 0.284979824565])
    close(counts, [1.54519592199, 1.37681032303, 1.07799375498])
    shares = ck.dec_target(z, mu, alpha=3.0).shares()
    close(shares[0], [0.920624677679, 0.0348565910118, 0.0445187313089])
    loss, dz, dmu, dalpha = graded(z, mu, wide(3.0), mode="minibatch", reduction="sum")
    close(loss, 0.447574324933)
    close(dz, [[0.113682019654, 0.1026395736], [0.246192881357, -0.248633371322],
               [0.0120859759272, 0.0241719518544], [0.168419479555, 0.116128170659]])  # fmt: skip
    close(dmu, [[0.0602808233088, 0.0398120602821], [-0.409413677532, 0.15607696419],
                [-0.19124750227, -0.190195349265]])  # fmt: skip
    close(dalpha, -0.0683515602117)


def test_a_centroid_that_no_row_reaches():
    """Other code divides 0 by 0 here."""
    z, mu = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1e4, 0.0]])
    assert ck.student_t_stats(z, mu, alpha=100.0)[2].tolist() == [2.0, 0.0]
    target = ck.dec_target(z, mu, alpha=100.0)
    tiny = torch.finfo(torch.float32).tiny
    close(target.log_counts, [math.log(2), math.log(tiny)])
    assert target.shares().tolist() == [[1.0, 0.0], [1.0, 0.0]]
    for mode in MODES:
        results = graded(z, mu, torch.tensor(100.0), target=target, mode=mode)
        assert all(bool((part == 0).all()) for part in results)


@pytest.mark.parametrize("features", [1, 50])
def test_rows_far_from_the_origin(features):
    """float32 at an offset that is no whole number; the expanded distance is off by .027 there."""
    z, mu = ((0.37 * x + 1000.123).float().repeat(1, features) for x in T5)
    z, mu = (x / features**0.5 for x in (z, mu))
    exact = [x.double() for x in (z, mu)]
    got = graded(z, mu, torch.tensor(3.0), mode="minibatch", reduction="sum")
    want = graded(*exact, wide(3.0), mode="minibatch", reduction="sum")
    assert float(want[1].abs().max()) > 0.01
    for a, b in zip(got[:3], want[:3], strict=True):
        close(a, b, 5e-8)
    counts = [ck.student_t_stats(*pair, alpha=3.0)[2] for pair in ((z, mu), exact)]
    close(*counts, 5e-8)


# ---- edges (table 2.6) ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [0.5, 1.0, INF])
@pytest.mark.parametrize("mode", MODES)
def test_one_centroid(mode, alpha, dtype):
    z, mu = normal(7, 3, dtype=dtype), normal(1, 3, dtype=dtype)
    for store in ("dense", "recompute"):
        target = ck.dec_target(z + 0.1, mu, alpha=alpha, store=store)
        results = graded(z, mu, alpha, target=target, mode=mode)
        assert all(bool((part == 0).all()) for part in results)
    _, labels, counts, _ = ck.student_t_stats(z, mu, alpha=alpha)
    assert labels.tolist() == [0] * 7
    close(counts, [7.0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    z, mu = normal(0, 3), normal(4, 3)
    lse, labels, counts, bad = ck.student_t_stats(z, mu)
    assert (lse.shape, labels.shape, int(bad)) == ((0,), (0,), 0)
    assert counts.tolist() == [0.0] * 4
    loss, dz, dmu = graded(z, mu, mode="minibatch", reduction=reduction)
    assert bool((loss == 0).all())
    assert loss.ndim == (reduction == "none")
    assert dz.shape == (0, 3)
    assert bool((dmu == 0).all())
    with pytest.raises(ValueError, match=r"z: expected N >= 1, got \[0, 3\]"):
        ck.dec_target(z, mu)


@pytest.mark.parametrize("mode", MODES)
def test_rows_on_centroids_and_equal_centroids(mode):
    mu = normal(3, 2)[[0, 1, 0, 2]]
    z = torch.cat([mu, normal(5, 2)])
    target = ck.dec_target(z + 0.1, mu)
    assert ck.student_t_stats(z, mu)[1][:4].tolist() == [0, 1, 0, 3]
    _, dz, dmu = graded(z, mu, target=target, mode=mode)
    assert bool(dz.isfinite().all())
    close(dmu[0], dmu[2], 1e-15)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_finite(mode, dtype, bad):
    z, mu = normal(9, 3, dtype=dtype), normal(4, 3, dtype=dtype)
    others = torch.arange(9) != 5
    target = ck.dec_target(z + 0.1, mu, store="recompute")
    some = target.rows(others.nonzero()[:, 0])
    irregular = z.clone()
    irregular[5, 1] = bad
    lse, labels, counts, count = ck.student_t_stats(irregular, mu)
    assert math.isnan(lse[5])
    assert int(labels[5]) == -1
    assert int(count) == 1
    close(counts, ck.student_t_stats(z[others], mu)[2], 1e-12)
    loss, dz, dmu = graded(irregular, mu, target=target, mode=mode)
    assert math.isnan(loss)
    assert bool(dz[5].isnan().all())
    want = graded(z[others], mu, target=some, mode=mode, reduction="sum")
    close(dz[others] * 9, want[1], 1e-6 if dtype == torch.float32 else 1e-14)
    close(dmu * 9, want[2], 1e-6 if dtype == torch.float32 else 1e-14)
    # weight 0: no influence, whatever the row contains
    weight = others.to(dtype)
    loss, dz, dmu = graded(irregular, mu, target=target, mode=mode, weight=weight, reduction="sum")
    close(loss, want[0], 1e-6)
    assert bool((dz[5] == 0).all())
    close(dmu, want[2], 1e-6 if dtype == torch.float32 else 1e-14)


def test_a_target_of_a_row_that_is_not_finite():
    z, mu = normal(6, 3), normal(4, 3)
    for store in ("dense", "recompute"):
        irregular = z.clone()
        irregular[2] = math.nan
        losses, dz, dmu = graded(
            z, mu, target=ck.dec_target(irregular, mu, store=store), reduction="none"
        )
        assert losses.isnan().tolist() == [False, False, True, False, False, False]
        assert bool(dz[2].isnan().all())
        assert bool(dmu.isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_centroid_that_is_not_finite(bad):
    z, mu = normal(6, 3), normal(4, 3)
    mu[1, 0] = bad
    lse, labels, counts, count = ck.student_t_stats(z, mu)
    assert bool(lse.isnan().all())
    assert bool(counts.isnan().all())
    assert int(count) == 0
    assert labels.tolist() == [-1] * 6
    for part in graded(z, mu, wide(1.0), mode="minibatch"):
        assert bool(part.isnan().all())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1e15, 1e19, 3e37])
def test_rows_whose_distances_leave_float32(scale, alpha):
    z, mu = normal(8, 3, dtype=torch.float32), normal(4, 3, dtype=torch.float32)
    z[3:] *= scale
    near = [z[:3], mu]
    args = z, mu, alpha, None, normal(4, dtype=torch.float32)
    got, want = dec_losses(*args[:2], alpha=alpha, log_counts=args[4]), truth.dec_losses(*args)
    close(got, want, 1e-5)
    assert torch.equal(got[:3], dec_losses(*near, alpha=alpha, log_counts=args[4]))
    sample = testing.Sample("dec_losses", "", args)
    results, exact = (
        testing.evaluate(f, sample, ("z", "mu")).gradients
        for f in (torch.ops.clam.dec_losses, truth.dec_losses)
    )
    # dz of a far row is what terms of the size (alpha + 1) / |z| leave
    terms = 1e-6 * (alpha + 1) / float(z[3:].double().norm(dim=1).amin())
    close(results["z"][3:], exact["z"][3:], terms)
    for a, b in ((results["z"][:3], exact["z"][:3]), (results["mu"], exact["mu"])):
        close(a, b, 1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("d", [3, 100])
def test_far_rows_are_computed_from_differences(d):
    """Tight clusters far from each other: the product alone loses their distances."""
    base = 1e7 * normal(4, d, dtype=torch.float32)
    mu = base + normal(4, d, seed=1, dtype=torch.float32)
    mu = torch.cat([mu, mu + 2])
    z = mu.repeat(4, 1) + 2 * normal(32, d, dtype=torch.float32)
    got, want = (ck.student_t_stats(x, m) for x, m in ((z, mu), (z.double(), mu.double())))
    close(got[2], want[2], 1e-6)
    args = z, mu, 1.0, None, torch.zeros(8)
    got, want = torch.ops.clam.dec_losses(*args), truth.dec_losses(*args)
    close(got, want, 1e-6)


def test_weights_of_zero():
    z, mu = normal(5, 3), normal(4, 3)
    for part in graded(z, mu, mode="minibatch", weight=torch.zeros(5)):
        assert bool((part == 0).all())


@pytest.mark.parametrize("k", [2, 3, 5, 7, 33, 257, 1000])
@pytest.mark.parametrize("d", [1, 10, 100])
def test_strides_and_odd_sizes(k, d):
    z, mu = normal(2 * 45, d, dtype=torch.float32)[::2], normal(d, k, dtype=torch.float32).T
    assert not mu.is_contiguous() or min(k, d) == 1
    logs = normal(k, dtype=torch.float32)
    got, want = (
        torch.ops.clam.dec_losses(z, mu, 1.0, None, logs),
        truth.dec_losses(z.double(), mu.double(), 1.0, None, logs),
    )
    close(got, want, 2e-6)


def test_an_index_outside():
    z, mu = normal(5, 3), normal(4, 3)
    target = ck.dec_target(z, mu)
    for index in ([0, 5], [-1, 0]):
        with pytest.raises(IndexError) as caught:
            ck.dec_loss(z[:2], mu, target, torch.tensor(index))
        wrong = next(i for i in index if not 0 <= i < 5)
        assert str(caught.value) == f"index: expected values in [0, 5), got {wrong}"


# ---- invariances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 50.0, 1e4, INF])
@pytest.mark.parametrize("size", [(50, 7, 5), (40, 12, 10), (64, 5, 2)])
def test_translation_and_rotation(size, alpha, mode):
    n, k, d = size
    z, mu = normal(n, d), normal(k, d)
    target = ck.dec_target(z + 0.3 * normal(n, d, seed=1), mu, alpha=alpha)
    _, dz, dmu = graded(z, mu, alpha, target=target, mode=mode)
    close(dz.sum(0) + dmu.sum(0), torch.zeros(d), 1e-15)
    turn = z.T @ dz + mu.T @ dmu
    close(turn, turn.T, 1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_orders_of_rows_and_centroids(mode):
    z, mu, alpha = normal(12, 3), normal(5, 3), wide(1.5)
    target = ck.dec_target(z + 0.2, mu, alpha=1.5)
    rows, centres = torch.randperm(12), torch.randperm(5)
    index = rows if mode == "frozen" else None
    want = graded(z, mu, alpha, target=target, mode=mode)
    got = graded(z[rows], mu, alpha, target=target, index=index, mode=mode)
    for a, b in zip(got, (want[0], want[1][rows], *want[2:]), strict=True):
        close(a, b, 1e-14)
    target = ck.dec_target(z + 0.2, mu[centres], alpha=1.5)
    got = graded(z, mu[centres], alpha, target=target, mode=mode)
    for a, b in zip(got, (*want[:2], want[2][centres], want[3]), strict=True):
        close(a, b, 1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_rows_twice_and_weights_of_two(mode):
    """Also: a loss that is a sum, with a gradient that is a mean, differs here."""
    z, mu = normal(12, 3), normal(5, 3)
    twice, target = torch.cat([z, z]), ck.dec_target(z, mu)
    both = ck.dec_target(twice, mu)
    loss, dz, dmu = graded(z, mu, target=target, mode=mode)
    again = graded(twice, mu, target=both, mode=mode)
    for a, b in zip(again, (loss, torch.cat([dz, dz]) / 2, dmu), strict=True):
        close(a, b, 1e-14)
    weight = 1.0 + (torch.arange(12) % 3 == 0)
    more = torch.cat([z, z[::3]])
    index = torch.cat([torch.arange(12), torch.arange(0, 12, 3)])
    heavy = ck.dec_target(z, mu, weight=weight)
    close(heavy.log_counts, ck.dec_target(more, mu).log_counts, 1e-14)
    a = graded(z, mu, target=heavy, mode=mode, weight=weight)
    b = graded(more, mu, target=heavy, index=index if mode == "frozen" else None, mode=mode)
    close(a[0], b[0], 1e-14)
    close(a[2], b[2], 1e-14)


@pytest.mark.parametrize("alpha", [1.0, 3.0, INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("store", ["dense", "recompute"])
def test_three_modes_are_equal_at_the_moment_of_freezing(store, dtype, alpha):
    z, mu = normal(60, 4, dtype=dtype), normal(6, 4, dtype=dtype)
    weight = 0.5 + normal(60, dtype=dtype).abs()
    target = ck.dec_target(z, mu, alpha=alpha, weight=weight, store=store)
    results = [graded(z, mu, alpha, target=target, mode=m, weight=weight) for m in MODES]
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    for parts in zip(*results, strict=True):
        close(parts[1], parts[0], bound)
        close(parts[2], parts[0], bound)


def test_soft_counts_of_another_scale():
    z, mu = normal(9, 3), normal(4, 3)
    logs = normal(4)
    a, b = (dec_losses(z, mu, log_counts=x) for x in (logs, logs + 5))
    close(a, b, 1e-14)


def test_scaling_leaves_the_kernel():
    z, mu = normal(9, 3), normal(4, 3)
    s = [truth.equations.student_t_scores(c * z, c * mu, c * c) / (c * c + 1) for c in (1.0, 3.0)]
    close(s[0], s[1], 1e-14)


def test_an_update_in_place_changes_no_target():
    """An optimiser updates z and mu in place: the target does not change."""
    z, mu = normal(9, 3), normal(4, 3)
    for store in ("dense", "recompute"):
        target = ck.dec_target(z, mu, store=store)
        before = target.shares().clone()
        a, b = z.clone(), mu.clone()
        target = ck.dec_target(a, b, store=store)
        a += 1.0
        b -= 1.0
        assert torch.equal(target.shares(), before)
        moved = ck.dec_loss(z, mu, target)
        close(moved, ck.dec_loss(z, mu, mode="minibatch"), 1e-14)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 50.0])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_with_a_constant_target(mode, alpha, d, k):
    z, mu, free = normal(11, d), normal(k, d), wide(alpha)
    target = ck.dec_target(z + 0.2, mu, alpha=alpha, store="recompute")
    p = target.shares()
    if mode == "self":
        s = truth.equations.student_t_scores(z, mu, alpha)
        p = (2 * s - target.log_counts).softmax(1)
    elif mode == "minibatch":
        p = ck.dec_target(z, mu, alpha=alpha).shares()
    leaves = [x.clone().requires_grad_() for x in (z, mu, free)]

    def loss(z: Tensor, mu: Tensor, alpha: Tensor) -> Tensor:
        return dec_losses(z, mu, alpha=alpha, p=p).mean()

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-8)
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = graded(z, mu, free, target=target, mode=mode)
    for a, b in zip(got[1:], want, strict=True):
        close(a, b, 1e-13)


def test_the_target_has_no_gradient():
    """A gradient through p points the other way on random data."""
    z, mu = normal(256, 10), normal(10, 10)
    _, dz, _ = graded(z, mu, mode="minibatch")
    leaf = z.clone().requires_grad_()
    q = truth.equations.student_t_scores(leaf, mu, 1.0).softmax(1)
    p = q.square() / q.sum(0)
    p = p / p.sum(1, keepdim=True)
    (through,) = torch.autograd.grad((p * (p / q).log()).sum(1).mean(), leaf)
    assert float(torch.cosine_similarity(dz.flatten(), through.flatten(), 0)) < -0.5
    p = p.detach()
    q = truth.equations.student_t_scores(leaf, mu, 1.0).softmax(1)
    (fixed,) = torch.autograd.grad((p * (p / q).log()).sum(1).mean(), leaf)
    close(dz, fixed, 1e-15)
    weight = normal(256).exp().requires_grad_()
    loss = torch.ops.clam.dec_losses(z.clone().requires_grad_(), mu, 1.0, weight)
    assert bool((torch.autograd.grad(loss.sum(), weight)[0] == 0).all())


@pytest.mark.parametrize("alpha", [1e2, 1e4, 1e6, 1e8])
def test_large_alpha_keeps_its_digits(alpha):
    """A power of 1 + d/alpha in float32 is off by .012 at 1e6 and by .8 at 1e8."""
    z, mu = normal(200, 10, dtype=torch.float32), normal(8, 10, dtype=torch.float32)
    q = torch.cat([ck.student_t_stats(row[None], mu, alpha=alpha)[2][None] for row in z])
    exact = truth.equations.student_t_scores(z, mu, alpha).softmax(1)
    close(q, exact, 1e-6)
    target = ck.dec_target(z + 0.1, mu, alpha=alpha)
    got = graded(z, mu, torch.tensor(alpha), target=target)
    wider = ck.dec_target((z + 0.1).double(), mu.double(), alpha=alpha)
    want = graded(z.double(), mu.double(), wide(alpha), target=wider)
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize(("alpha", "bound"), [(1.0, 1e-6), (50.0, 1e-5)])
def test_a_loss_of_equal_distributions(alpha, bound):
    z, mu = 3 * normal(500, 10, dtype=torch.float32), 3 * normal(20, 10, dtype=torch.float32)
    q = truth.equations.student_t_scores(z, mu, alpha).softmax(1).float()
    assert float(dec_losses(z, mu, alpha=alpha, p=q).abs().max()) <= bound
