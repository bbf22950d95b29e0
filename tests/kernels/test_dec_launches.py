# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of deep embedded clustering through the interpreter: the exact cases of
tests/test_dec.py in float32, launches, scratch, bits, and rows that need differences. Every buffer
lies between guard bands.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _interpreted import INTERPRETED_BACKEND, NEEDS_INTERPRETER, random
from torch import Tensor

import clam_kernels as ck
from clam_kernels.kernels.common import launch
from clam_kernels.kernels.dec.call import why_not
from clam_kernels.ops.dec import dec_losses
from python_fallback import dec as truth

pytestmark = [NEEDS_INTERPRETER, INTERPRETED_BACKEND]


def exact(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(a: Tensor, b: Any, bound: float = 3e-7) -> None:
    b = b if isinstance(b, Tensor) else torch.tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound)


def graded(function: Any, z: Tensor, mu: Tensor, alpha: Any = 1.0, **rest: Any) -> list[Tensor]:
    """The losses, and the gradients of z, mu and alpha (if it is a tensor) of their sum."""
    leaves = [x.detach().clone().requires_grad_() for x in (z, mu)]
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().clone().requires_grad_()
        leaves.append(alpha)
    losses = function(leaves[0], leaves[1], alpha=alpha, **rest)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


def in_float64(function: Any, z: Tensor, mu: Tensor, alpha: Any = 1.0, **rest: Any) -> list[Tensor]:
    alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
    rest = {k: x.double() if isinstance(x, Tensor) else x for k, x in rest.items()}
    return graded(function, z.double(), mu.double(), alpha, **rest)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that a call launches, in order."""
    names: list[str] = []
    real = launch.launch

    def note(kernel: Any, *rest: Any, **arguments: Any) -> None:
        names.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        real(kernel, *rest, **arguments)

    monkeypatch.setattr(launch, "launch", note)
    return names


# ---- exact cases, numbers of tests/test_dec.py ---------------------------------------------------

T3 = [[0.0], [3.0], [1.0]], [[0.0], [2.0]]
T5 = [[0, 0], [1, 2], [3, 0], [0.5, 0.5]], [[0, 0], [2, 0], [0, 2]]


def test_one_row_is_its_own_target(backend):
    z, mu = exact([[0.0, 0.0]]), exact([[0.0, 0.0], [1.0, 0.0]])
    lse, labels, counts, bad = ck.student_t_stats(z, mu)
    close(lse, [0.405465108108])
    close(counts, [2 / 3, 1 / 3])
    assert (labels.tolist(), int(bad)) == ([0], 0)
    for part in graded(dec_losses, z, mu, exact(1.0)):
        close(part, torch.zeros_like(part))


def test_two_rows_on_two_centroids(backend):
    z = exact([[0.0], [1.0]])
    want = [0.0436921206819] * 2, [[2 / 15], [-2 / 15]], [[2 / 15], [-2 / 15]], 0.0409137092587
    for got, number in zip(graded(dec_losses, z, z, exact(1.0)), want, strict=True):
        close(got, number)
    for got, number in zip(graded(dec_losses, z, z), want, strict=False):
        close(got, number)


@pytest.mark.parametrize("alpha", [math.inf, 1e12, 1e32])
def test_a_gaussian_is_the_limit(backend, alpha):
    z = exact([[0.0], [1.0]])
    losses, dz, dmu = graded(dec_losses, z, z, alpha)
    close(losses.sum(), 0.0526891719538)
    close(dz, [[0.108599247428], [-0.108599247428]])
    close(dmu, [[0.108599247428], [-0.108599247428]])


def test_distances_are_squared(backend):
    z, mu = map(exact, T3)
    lse, labels, counts, _ = ck.student_t_stats(z, mu)
    close(lse, [0.182321556794, -0.510825623766, 0.0])
    close(counts, [1.5, 1.5])
    assert labels.tolist() == [0, 1, 0]
    losses, dz, dmu, dalpha = graded(dec_losses, z, mu, exact(1.0))
    close(losses.sum(), 0.16239877094)
    close(dz, [[0.102564102564], [0.0512820512821], [0.0]])
    close(dmu, [[0.0769230769231], [-0.230769230769]])
    close(dalpha, -0.0524920400557)


@pytest.mark.parametrize("store", ["dense", "recompute"])
def test_a_frozen_target(backend, store):
    z, mu = exact([[0.5, 0], [2, 1], [-1, 3]]), exact([[0, 0], [2, 2], [-1, 1]])
    target = ck.dec_target(exact([[0, 0], [2, 2], [-1, 2]]), mu, alpha=2.0, store=store)
    frozen = {"p": target.p, "log_norm": target.log_norm}
    if store == "recompute":
        logs = {"log_counts": target.log_counts, "z0": target.z0, "mu0": target.mu0}
        frozen |= logs | {"alpha0": target.alpha0}
    losses, dz, dmu, dalpha = graded(dec_losses, z, mu, exact(2.0), **frozen)
    close(losses.mean(), 0.231410853358)
    close(dz[2] / 3, [0.0583258415606, 0.0583258415606])
    close(dmu[2] / 3, [0.0519199708080, -0.124535379301])
    close(dalpha / 3, -0.0479676953567)


def test_another_alpha(backend):
    z, mu = map(exact, T5)
    losses, dz, dmu, dalpha = graded(dec_losses, z, mu, exact(3.0))
    close(losses.sum(), 0.447574324933, 6e-7)
    close(dz[1], [0.246192881357, -0.248633371322])
    close(dmu[2], [-0.19124750227, -0.190195349265])
    close(dalpha, -0.0683515602117)
    _, _, counts, _ = ck.student_t_stats(z, mu, alpha=3.0)
    close(counts, [1.54519592199, 1.37681032303, 1.07799375498])


@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_a_centroid_that_no_row_reaches(backend, alpha):
    z, mu = exact([[0.0, 0.0], [1.0, 0.0]]), exact([[0.0, 0.0], [1e4, 0.0]])
    counts = ck.student_t_stats(z, mu, alpha=alpha)[2]
    close(counts, [2.0, 0.0])
    for part in graded(dec_losses, z, mu, alpha):
        close(part, torch.zeros_like(part))


@pytest.mark.parametrize("features", [2, 100])
def test_rows_far_from_the_origin(backend, features):
    """Centred rows keep the digits of their gradients; over 64 features distances are products."""
    rest = [0.37 * random(n, features - 2, seed=n) for n in (4, 3)]
    near = [torch.cat([0.37 * exact(x), y], 1) for x, y in zip(T5, rest, strict=True)]
    z, mu = (x + 1000.123 for x in near)
    got, want = graded(dec_losses, z, mu, 3.0), in_float64(truth.dec_losses, z, mu, 3.0)
    for a, b in zip(got, want, strict=True):
        close(a, b, 5e-8 if features == 2 else 1e-6)


@pytest.mark.parametrize("d", [3, 100])
@pytest.mark.parametrize("alpha", [1.0, 2.5, math.inf])
def test_one_centroid(backend, alpha, d):
    z, mu = random(7, d), random(1, d, seed=1)
    for part in graded(dec_losses, z, mu, alpha):
        assert part.eq(0).all()
    assert ck.student_t_stats(z, mu, alpha=alpha)[2].tolist() == [7.0]


# ---- launches and scratch ------------------------------------------------------------------------

COUNTED = ["dec_totals_kernel", "dec_counts_kernel", "dec_merge_kernel"]
FUSED = ["dec_fused_backward_kernel", "dec_merge_kernel"]
SPLIT = ["dec_rows_backward_kernel", "dec_columns_backward_kernel", "dec_merge_kernel"]


@pytest.mark.parametrize(
    ("k", "own", "backward"), [(10, False, FUSED), (70, False, SPLIT), (10, True, FUSED)]
)
def test_launches_of_a_step(backend, launched, k, own, backward):
    """A batch of 256 with a frozen target takes three launches, forward and backward together."""
    z, mu, z0 = random(256, 10), random(k, 10, seed=1), random(256, 10, seed=2)
    frozen = {} if own else {"log_counts": random(k), "z0": z0, "mu0": mu}
    graded(dec_losses, z, mu, **frozen)
    first = COUNTED if own else []
    assert launched == [*first, "dec_losses_kernel", *first, *backward]


def test_launches_of_the_statistics(backend, launched):
    ck.student_t_stats(random(300, 10), random(10, 10, seed=1))
    assert [name for name in launched if name.startswith("dec")] == COUNTED


def test_scratch_is_far_below_one_n_by_k_array(backend, monkeypatch):
    """A million rows and a thousand centroids; every buffer of every launch, results included."""
    n, k, d = 1_000_000, 1000, 10
    z, mu, sizes = torch.zeros(n, d), torch.zeros(k, d), []

    def empty(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        out = torch.zeros(tuple(shape), dtype=dtype, device=device)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(launch, "empty", empty)
    monkeypatch.setattr(launch, "launch", lambda *args, **kwargs: None)
    ck.student_t_stats(z, mu)
    assert sum(sizes) < 60e6
    sizes.clear()
    graded(dec_losses, z, mu, log_counts=torch.zeros(k), z0=z, mu0=mu)
    assert sum(sizes) < 100e6


def test_float64_is_for_the_reference(backend):
    z = torch.zeros(3, 2)
    assert why_not(z, z, 1.0, None, None, z, z) is None
    assert why_not(z, z, 1.0, None, None, z.double(), z) == why_not(z.double(), z.double())
    assert "float64" in str(why_not(z.double(), z.double()))


# ---- digits and bits -----------------------------------------------------------------------------


def _frozen(n: int, k: int, d: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    z, mu = random(n, d), random(k, d, seed=1)
    moved = {"z0": z + 0.1 * random(n, d, seed=2), "mu0": mu + 0.1}
    return z, mu, {"log_counts": random(k, seed=3), **moved}


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_both_kernels_of_the_gradients_agree(backend, monkeypatch, launched, alpha):
    z, mu, frozen = _frozen(300, 40, 10)
    alpha = alpha if alpha == 1.0 else exact(alpha)
    fused = graded(dec_losses, z, mu, alpha, **frozen)
    assert launched[1:] == FUSED
    tiles = {**launch.table(), "dec_fused_backward": {}}
    rows = launch.table()["dec_fused_backward"]
    tiles["dec_fused_backward"] = {name: {**row, "PROTOS": 32} for name, row in rows.items()}
    monkeypatch.setattr(launch, "table", lambda: tiles)
    launch.settings.cache_clear()
    launched.clear()
    split = graded(dec_losses, z, mu, alpha, **frozen)
    launch.settings.cache_clear()
    assert launched[1:] == SPLIT
    for a, b in zip(fused, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [10, 70])
def test_rows_of_weight_zero_at_the_end_change_no_bit(backend, k):
    z, mu, weight = random(1500, 3), random(k, 3, seed=1), random(1500, seed=2).abs()
    more = torch.cat([z, random(700, 3, seed=4)]), torch.cat([weight, torch.zeros(700)])
    lse, labels, counts, _ = ck.student_t_stats(z, mu, weight=weight)
    long_lse, long_labels, long_counts, _ = ck.student_t_stats(more[0], mu, weight=more[1])
    assert torch.equal(lse, long_lse[:1500])
    assert torch.equal(labels, long_labels[:1500])
    assert torch.equal(counts, long_counts)
    some, all_rows = dec_losses(z, mu, weight=weight), dec_losses(more[0], mu, weight=more[1])
    assert torch.equal(some, all_rows[:1500])


def test_soft_counts_of_many_rows(backend):
    """The sums of chunks are float64: the error does not grow with the number of rows."""
    z, mu = random(20_000, 2), random(3, 2, seed=1)
    counts = ck.student_t_stats(z, mu)[2]
    want = truth.student_t_stats(z.double(), mu.double())[2]
    torch.testing.assert_close(counts, want, rtol=3e-7, atol=0)


@pytest.mark.parametrize("alpha", [1e2, 1e4, 1e6, 1e8])
def test_large_alpha_keeps_its_digits(backend, alpha):
    """log(1 + x) without log1p is off by .01 at 1e6, and its slope needs a series."""
    z, mu, frozen = _frozen(200, 8, 10)
    alpha = exact(alpha)
    got = graded(dec_losses, z, mu, alpha, alpha0=float(alpha), **frozen)
    want = in_float64(truth.dec_losses, z, mu, alpha, alpha0=float(alpha), **frozen)
    for a, b, bound in zip(got, want, (1e-5, 1e-5, 1e-5, 2e-4), strict=True):
        assert float((a.double() - b).abs().max()) <= bound * float(b.abs().max())


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_wide_rows_beside_a_far_centroid_come_from_differences(backend, size, alpha):
    """One of three centroids is far: the centre lies between, and products lose all digits."""
    z, mu = 0.1 * random(50, 70), 0.1 * random(3, 70, seed=1)
    mu[2, 0] += size
    z[40:, 0] += size
    got, want = ck.student_t_stats(z, mu, alpha=alpha), truth.student_t_stats(z, mu, alpha)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2], want[2], rtol=1e-6, atol=1e-6)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(("alpha", "bound"), [(1.0, 1e-6), (50.0, 1e-5), (math.inf, 1e-5)])
def test_a_loss_of_equal_distributions(backend, alpha, bound):
    """With f = q the target is q: the loss is a rounding error, perhaps below 0."""
    z, mu = random(1, 10).expand(3, 10), random(8, 10, seed=1)
    losses = dec_losses(z.contiguous(), mu, alpha=alpha)
    assert float(losses.abs().max()) <= bound
