# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` of scores that are large beside epsilon, in float32."""

from __future__ import annotations

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from clam_kernels import sinkhorn


def _scores(seed: int = 0, n: int = 120, k: int = 9, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, k, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)


def _outlier(off: float) -> torch.Tensor:
    """Scores are minus squared distances, and one row is far from all others."""
    x, y = _scores(0, 50, 2).float(), _scores(1, 40, 2).float() + 1
    x[0] = off
    return -torch.cdist(x, y).square()


def _raised(rows: float, columns: float) -> torch.Tensor:
    """Normal scores plus a constant for each row, and one for most prototypes."""
    scores = _scores(0, 500, 20).float() + rows * _scores(1, 500, 1).float()
    scores[:, 0] += columns
    scores[:, 5:] -= columns
    return scores


@pytest.mark.parametrize("accelerate", [None, "anderson"])
@pytest.mark.parametrize("off", [1e3, 1e4, 1e6])
def test_the_plan_has_its_row_sums_if_one_row_is_far(off, accelerate):
    scores = _outlier(off)
    result = sinkhorn(scores, epsilon=1.0, tol=1e-4, accelerate=accelerate)
    assert bool(result.converged)
    plan = result.plan().double()
    torch.testing.assert_close(plan.sum(1), torch.full((50,), 0.02).double(), rtol=1e-6, atol=0)
    error = (plan.sum(0) - 1 / 40).abs().sum()
    torch.testing.assert_close(error, result.err.double(), rtol=0.01, atol=1e-7)
    torch.testing.assert_close(plan, result.codes().double() / 50, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("form", ["stop", "unrolled", "implicit", "envelope"])
def test_the_plan_is_the_codes_times_the_masses(form, mask):
    scores = _scores().requires_grad_()
    n = scores.shape[0]
    keep = torch.arange(n) % 3 != 0 if mask else torch.ones(n, dtype=torch.bool)
    rule = {} if form in ("stop", "unrolled") else {"tol": 1e-8}
    result = sinkhorn(scores, epsilon=0.5, gradient=form, row_mask=keep if mask else None, **rule)
    plan, mass = result.plan(), (keep.double() / keep.sum())[:, None]
    torch.testing.assert_close(plan, mass * result.codes(), rtol=1e-12, atol=0)
    whole = torch.exp(scores / 0.5 + result.f[:, None] + result.g)
    torch.testing.assert_close(plan, torch.where(keep[:, None], whole, 0.0), rtol=1e-9, atol=0)
    some = slice(3, 40, 5)
    assert torch.equal(result.plan(some), plan[some])
    if form in ("unrolled", "implicit"):
        weight = _scores(7, *scores.shape)
        of_plan = torch.autograd.grad((plan * weight).sum(), scores, retain_graph=True)[0]
        of_whole = torch.autograd.grad((whole * keep[:, None] * weight).sum(), scores)[0]
        torch.testing.assert_close(of_plan, of_whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("accelerate", [None, "anderson"])
@pytest.mark.parametrize("outlier", [False, True])
def test_a_constant_of_rows_costs_no_iteration(outlier, accelerate):
    scores = _scores(0, 50, 5).float()
    scores[0] = 1e6 if outlier else scores[0] + 1e6
    rule = {"epsilon": 0.5, "tol": 1e-3, "accelerate": accelerate}
    result, expected = sinkhorn(scores, **rule), sinkhorn(scores.double(), **rule)
    assert bool(result.converged)
    assert result.n_iter <= expected.n_iter + 1
    error = (result.plan().double().sum(0) - 0.2).abs().sum()
    torch.testing.assert_close(error, result.err.double(), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns", "bound"), [
    (1e2, 0.0, 1e-4), (1e3, 0.0, 2e-4), (1e4, 0.0, 2e-3), (1e5, 0.0, 2e-2),
    (0.0, 1e3, 4e-4), (0.0, 1e5, 2e-2),
])  # fmt: skip
def test_large_scores_converge_in_float32(rows, columns, bound):
    scores = _raised(rows, columns)
    rule = {"epsilon": 0.05, "accelerate": "anderson"}
    result = sinkhorn(scores, tol=1e-5, **rule)
    assert bool(result.converged)
    assert result.n_iter <= 3 * sinkhorn(scores.double(), tol=1e-5, **rule).n_iter + 5
    error = (result.plan().double().sum(0) - 1 / 20).abs().sum()
    assert float(error) <= 2e-5
    expected = sinkhorn(scores.double(), tol=1e-9, max_iter=5000, **rule)
    assert float((result.codes() - expected.codes()).abs().sum(1).mean()) <= bound
    shifted = sinkhorn(scores, tol=1e-5, bias=torch.full((20,), 1e4), **rule)
    assert float((shifted.plan().double().sum(0) - 1 / 20).abs().sum()) <= 2e-5


def test_rows_first_do_not_claim_a_plan_that_float32_cannot_hold():
    result = sinkhorn(_outlier(1e4), epsilon=1.0, tol=1e-4, prototype_first=False, warn=False)
    assert float((result.plan().sum(1) - 0.02).abs().sum()) > 1e-4
    assert not bool(result.converged)
    with pytest.warns(ConvergenceWarning, match="Large scores / epsilon need float64 scores"):
        sinkhorn(_outlier(1e4), epsilon=1.0, tol=1e-4, prototype_first=False, max_iter=50)
    fixed = sinkhorn(_outlier(1e4), epsilon=1.0, n_iter=50, prototype_first=False)
    assert float(fixed.err) > 0.1
