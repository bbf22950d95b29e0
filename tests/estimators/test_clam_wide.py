# SPDX-License-Identifier: Apache-2.0
"""Training on many features: the losses and gradients of the op in fewer passes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from clam_kernels import ClAM
from clam_kernels.estimators.clam import completion as _completion
from clam_kernels.estimators.clam.completion import Batch, CompletionPlan

R, N, K, D = 3, 9, 4, 7
RANDOM = np.random.default_rng(0)
PLAN = CompletionPlan(
    beta=torch.tensor([[0.3], [1.0], [4.0]], dtype=torch.float64), steps=1, step=1.0,
    mask_ratio=0.3, clamp=True, learning_rate=0.1, batch_size=N, epochs=1, length=1.0,
    is_published=False, precision=None, seed=0,
)  # fmt: skip


def _batch(gaps: bool, weighted: bool, masked: bool, dtype: torch.dtype) -> Batch:
    observed = torch.from_numpy(RANDOM.random((N, D)) < 0.8) if gaps else None
    x = torch.from_numpy(RANDOM.normal(size=(N, D))).to(dtype)
    masks = torch.from_numpy(RANDOM.random((N, D)) < 0.3) & masked
    if observed is not None:
        x, masks = x * observed, masks & observed
    weight = torch.from_numpy(RANDOM.random(N)) if weighted else None
    return Batch(x, masks, observed, weight)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_losses_and_gradients_are_those_of_the_op(
    monkeypatch, gaps, weighted, masked, clamp, dtype, close
) -> None:
    batch = _batch(gaps, weighted, masked, dtype)
    plan = dataclasses.replace(PLAN, clamp=clamp, beta=PLAN.beta.to(dtype))
    start, results = torch.from_numpy(RANDOM.normal(size=(R, K, D))).to(dtype), []
    for features in (1, D + 1):
        monkeypatch.setattr(_completion, "FEATURES", features)
        memories = start.clone().requires_grad_()
        loss = batch.backward(memories, plan, 2.0)
        assert loss.dtype == dtype
        results.append((loss, memories.grad))
    for ours, ops in zip(*results, strict=True):
        torch.testing.assert_close(ours, ops, atol=close, rtol=close)


def test_a_far_row_costs_no_digits(monkeypatch) -> None:
    """Weights of float32 rows come from distances in float64."""
    batch = _batch(False, False, True, torch.float32)
    batch.x[0] = 1e4
    plan, results = dataclasses.replace(PLAN, beta=PLAN.beta.float()), []
    start = torch.from_numpy(RANDOM.normal(size=(R, K, D))).float()
    start[:, 0] = 1e4
    for features in (1, D + 1):
        monkeypatch.setattr(_completion, "FEATURES", features)
        memories = start.clone().requires_grad_()
        batch.backward(memories, plan, 2.0)
        results.append(memories.grad[:, 1:])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_a_fit_of_many_features_finds_the_groups(monkeypatch) -> None:
    truth = np.arange(60) % 3
    x = RANDOM.normal(size=(60, 1100)) + 0.3 * RANDOM.normal(size=(3, 1100))[truth]
    calls = []
    whole = _completion.squared_errors
    monkeypatch.setattr(_completion, "squared_errors", lambda *a: calls.append(len(a)) or whole(*a))
    model = ClAM(3, n_init=4, max_iter=10, random_state=0).fit(x)
    assert len(calls) == 10
    assert adjusted_rand_score(truth, model.labels_) == 1
    again = ClAM(3, n_init=4, max_iter=10, random_state=0).fit(x)
    np.testing.assert_array_equal(again.cluster_centers_, model.cluster_centers_)
