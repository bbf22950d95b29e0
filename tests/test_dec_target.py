# SPDX-License-Identifier: Apache-2.0
"""Deep embedded clustering: the numbers that a target stores, reductions, heads, errors, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_dec import MODES, close, graded, normal

import clam_kernels as ck
from clam_kernels import testing
from clam_kernels.ops.dec import dec_losses
from python_fallback import dec as truth

# ---- storage and reductions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [None, torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("store", ["dense", "recompute"])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_rows_of_the_target_sum_to_one(alpha, store, dtype):
    """The log-normaliser of rows that were rounded afterwards gives .993 to 1.01."""
    z, mu = 3 * normal(400, 10, dtype=torch.float32), 3 * normal(10, 10, dtype=torch.float32)
    target = ck.dec_target(z, mu, alpha=alpha, store=store, dtype=dtype)
    shares = target.shares()
    close(shares.double().sum(1), torch.ones(400), 2e-6)
    exact = ck.dec_target(z, mu, alpha=alpha, store="dense").shares()
    close(shares, exact, 2e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-6)
    stored = target.p if store == "dense" else target.z0
    assert stored.dtype == (dtype or torch.float32)
    # the op has the same target
    q = truth.equations.student_t_scores(z, mu, alpha).log_softmax(1)
    want = (torch.xlogy(shares.double(), shares.double()) - shares * q).sum(1)
    close(ck.dec_loss(z, mu, target, alpha=alpha, reduction="none"), want, 5e-6)


def test_auto_stores_the_smaller():
    z = normal(20, 4)
    assert ck.dec_target(z, normal(5, 4)).p is not None
    target = ck.dec_target(z, normal(6, 4))
    assert target.p is None
    assert target.z0 is not None
    assert target.n_rows == 20


def test_rows_of_a_target():
    z, mu = normal(20, 4), normal(5, 4)
    index = torch.tensor([3, 3, 19, 0])
    for store in ("dense", "recompute"):
        target = ck.dec_target(z, mu, store=store)
        assert torch.equal(target.rows(index).shares(), target.shares()[index])
        a = ck.dec_loss(z[index] + 0.1, mu, target, index)
        close(a, ck.dec_loss(z[index] + 0.1, mu, target.rows(index)), 0.0)
        assert target.to("cpu").shares().device.type == "cpu"


def test_reductions():
    """The mean is of sums over centroids: a mean over all N x K terms is K times smaller."""
    z, mu, weight = normal(7, 3), normal(4, 3), normal(7).abs()
    losses = dec_losses(z, mu)
    rest = {"mode": "minibatch"}
    close(ck.dec_loss(z, mu, **rest), losses.mean(), 1e-15)
    close(ck.dec_loss(z, mu, reduction="sum", **rest), losses.sum(), 1e-15)
    close(ck.dec_loss(z, mu, reduction="none", **rest), losses, 0.0)
    heavy = dec_losses(z, mu, weight=weight) * weight
    close(ck.dec_loss(z, mu, weight=weight, **rest), heavy.sum() / weight.sum(), 1e-15)
    close(ck.dec_loss(z, mu, weight=weight, reduction="none", **rest), heavy, 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_heads(mode):
    """Each head has its own problem: its loss and its gradients are those of a call of its own."""
    z, mu = normal(9, 3), normal(2, 4, 3)
    target = ck.dec_target(z + 0.1, mu)
    loss, dz, dmu = graded(z, mu, target=target, mode=mode)
    assert loss.shape == (2,)
    one = [
        graded(z, m, target=ck.dec_target(z + 0.1, m), mode=mode) for m in mu
    ]  # fmt: skip
    close(loss, torch.stack([x[0] for x in one]), 1e-15)
    close(dz, one[0][1] + one[1][1], 1e-15)
    close(dmu, torch.stack([x[2] for x in one]), 1e-15)


def test_rows_of_weight_zero_at_the_end_change_no_bit():
    z, mu = normal(301, 5, dtype=torch.float32), normal(9, 5, dtype=torch.float32)
    weight = torch.ones(301)
    padded = torch.cat([z, normal(77, 5, seed=2, dtype=torch.float32)])
    longer = torch.cat([weight, torch.zeros(77)])
    a, b = ck.student_t_stats(z, mu, weight=weight), ck.student_t_stats(padded, mu, weight=longer)
    assert torch.equal(a[2], b[2])
    assert torch.equal(a[0], b[0][:301])
    a, b = (dec_losses(x, mu, weight=w) for x, w in ((z, weight), (padded, longer)))
    assert torch.equal(a, b[:301])


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (TypeError, "target: expected a DecTarget, made by dec_target, or None, got list",
            {"target": []}),
        (ValueError, "target: expected a DecTarget to match mode 'frozen', got None", {}),
        (ValueError, "target: expected a DecTarget to match mode 'self', got None",
            {"mode": "self"}),
        (ValueError, "mode: expected 'frozen', 'minibatch', 'self', got 'batch'",
            {"mode": "batch"}),
        (ValueError, "reduction: expected 'mean', 'sum', 'none', got 'max'",
            {"mode": "minibatch", "reduction": "max"}),
        (TypeError, "reduction: expected a str, got NoneType",
            {"mode": "minibatch", "reduction": None}),
        (TypeError, "index: expected a Tensor or None, got list",
            {"mode": "minibatch", "index": [0]}),
        (TypeError, "alpha: expected a number or a Tensor, got str",
            {"mode": "minibatch", "alpha": "1"}),
    ],
)  # fmt: skip
def test_errors_of_the_loss(error, text, change):
    with pytest.raises(error) as caught:
        ck.dec_loss(normal(5, 3), normal(4, 3), **change)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (ValueError, "store: expected 'auto', 'dense', 'recompute', got 'sparse'",
            {"store": "sparse"}),
        (TypeError, "dtype: expected float16, bfloat16, float32, float64 or None, got torch.int64",
            {"dtype": torch.int64}),
        (ValueError, "alpha: expected a number > 0, got 0.0", {"alpha": 0.0}),
        (ValueError, "weight: expected shape [..., 5] to match z [5, 3], got [4]",
            {"weight": torch.ones(4)}),
    ],
)  # fmt: skip
def test_errors_of_the_target(error, text, change):
    with pytest.raises(error) as caught:
        ck.dec_target(normal(5, 3), normal(4, 3), **change)
    assert str(caught.value) == text


# ---- size ----------------------------------------------------------------------------------------


def test_soft_counts_of_many_rows():
    """One running sum in float32 is off by 3e-4."""
    few, mu = normal(2000, 2, dtype=torch.float32), normal(3, 2, dtype=torch.float32)
    counts = ck.student_t_stats(few.repeat(1000, 1), mu)[2]
    exact = 1000 * ck.student_t_stats(few.double(), mu.double())[2]
    assert float((counts / exact - 1).abs().max()) <= 1e-6


def _iteration(n: int, k: int) -> int:
    """Peak bytes of a refresh, a loss and its gradients beside what they return."""
    z, mu = (normal(size, 10, dtype=torch.float32) for size in (n, k))
    leaf = z.clone().requires_grad_()

    def call() -> Any:
        target = ck.dec_target(z, mu, store="recompute")
        loss = ck.dec_loss(leaf, mu, target)
        return target, torch.autograd.grad(loss, leaf)

    returned = 4 * n * (10 + 1 + 10)
    return testing.peak_bytes(call) - returned


@pytest.mark.parametrize("n", [20_000, 200_000])
def test_memory_does_not_grow_with_the_rows(n):
    """`student_t_stats` also returns N labels and log-sum-exps, which the target does not need."""
    assert _iteration(n, 64) - 12 * n < 32e6


def test_memory_of_many_centroids():
    """An N x K array has 80 MB in float32 and 40 MB in float16."""
    z, mu = (normal(size, 10, dtype=torch.float32) for size in (40_000, 500))

    def call() -> Any:
        target = ck.dec_target(z, mu)
        assert target.p is None
        return target, ck.dec_loss(z, mu, target)

    assert testing.peak_bytes(call) < 32e6
