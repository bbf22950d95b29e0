# SPDX-License-Identifier: Apache-2.0
"""ClAM on data with missing entries: fit, labels, distances, completion."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import nan_euclidean_distances
from sklearn.preprocessing import StandardScaler

from clam_kernels import ClAM
from clam_kernels.estimators.clam import completion as _completion
from clam_kernels.estimators.clam import points as _points

QUICK = {"n_init": 4, "max_iter": 10, "random_state": 0}


def _scaled(load) -> np.ndarray:
    return StandardScaler().fit_transform(load().data)


def _hidden(x: np.ndarray, share: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.random.default_rng(seed).random(x.shape) < share
    return np.where(hidden, np.nan, x), hidden


@pytest.fixture(scope="module")
def wine() -> np.ndarray:
    return _scaled(load_wine)


@pytest.fixture(scope="module")
def model(wine: np.ndarray) -> ClAM:
    return ClAM(3, **QUICK).fit(_hidden(wine)[0])


# ---- points --------------------------------------------------------------------------------------


def _pair(wine):
    z, hidden = torch.from_numpy(_hidden(wine)[0]), torch.from_numpy(_hidden(wine)[1])
    return z, hidden, _points.points_of(z, None, None)


def test_distances_use_observed_entries_only(wine):
    z, _, points = _pair(wine)
    memories = torch.from_numpy(wine[:6]).view(2, 3, -1)
    labels = points.assign(memories)
    for own, label in zip(memories, labels, strict=True):
        expected = nan_euclidean_distances(z.numpy(), own.numpy()) ** 2
        np.testing.assert_allclose(points.distances(own), expected, atol=1e-9)
        np.testing.assert_array_equal(label, expected.argmin(1))
        np.testing.assert_allclose(points.distances_to(own, label), expected.min(1), atol=1e-9)
    expected = nan_euclidean_distances(z.numpy())
    np.testing.assert_allclose(points.distances_between_rows(), expected, atol=1e-6)


def test_means_use_observed_entries_only(wine):
    z, _, points = _pair(wine)
    labels = torch.arange(len(z))[None] % 3
    means, weights = points.means(labels, torch.zeros(1, 3, z.shape[1], dtype=z.dtype))
    expected = np.stack([np.nanmean(z.numpy()[k::3], axis=0) for k in range(3)])
    np.testing.assert_allclose(means[0], expected, atol=1e-12)
    assert weights[0].tolist() == [60, 59, 59]
    parts = [
        np.nanmean((z.numpy()[k::3] - expected[k]) ** 2, axis=1) * z.shape[1] for k in range(3)
    ]
    inertia = points.inertia(labels, means)
    assert float(inertia[0]) == pytest.approx(sum(part.sum() for part in parts))


def test_lloyd_never_raises_the_inertia(wine):
    _, _, points = _pair(wine)
    memories = torch.from_numpy(wine[[0, 70, 140]])[None]

    def cost(m):
        labels = points.assign(m)
        return float((points.distances_to(m[0], labels[0]) / points.scale).sum())

    costs = [cost(points.lloyd(memories, n)[0]) for n in range(6)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_masks_hide_observed_entries_and_never_all(wine, share):
    observed = ~torch.from_numpy(_hidden(wine, share)[1])
    masks = _completion.draw_masks(*observed.shape, 0.3, torch.Generator().manual_seed(0), observed)
    assert not (masks & ~observed).any()
    several = observed.sum(1) > 1
    assert masks[several].any(1).all()
    assert (observed & ~masks)[several].any(1).all()
    assert not masks[~several].any()
    points = _points.points_of(torch.where(observed, 0.5, torch.nan), None, None)
    drawn = [
        _completion.draw_masks(
            *points.z.shape, 0.3, torch.Generator().manual_seed(s), points.observed
        )
        for s in range(200)
    ]
    average = torch.stack(drawn).double().sum(2).mean()
    assert _completion.mean_mask_count(points, 0.3) == pytest.approx(float(average), rel=0.02)


def test_the_loss_does_not_depend_on_missing_entries(wine):
    """Other values in place of NaN would change nothing: the fit sets them to 0 first."""
    _, hidden, points = _pair(wine)
    assert bool((points.z[hidden] == 0).all())
    masks = torch.zeros_like(hidden)
    masks[:, 0] = ~hidden[:, 0]
    batch = _completion.Batch(points.z, masks, points.observed, None)
    beta = torch.full((1, 1), 0.1, dtype=torch.float64)
    plan = _completion.CompletionPlan(beta, 1, 1.0, 0.2, True, 0.1, 512, 1, 1.0, False, None, 0)
    memories = torch.from_numpy(wine[:3])[None].requires_grad_()
    loss = batch.backward(memories, plan, 1.0)
    states = points.z.masked_fill(masks, 0.0)
    p = torch.softmax(-0.1 * torch.cdist(states, memories[0]).square(), 1)
    error = (p @ memories[0] - points.z)[:, 0][masks[:, 0]].square().sum() / len(points)
    assert loss.item() == pytest.approx(error.item(), rel=1e-9)
    (slope,) = torch.autograd.grad(error, memories)
    torch.testing.assert_close(memories.grad, slope, atol=1e-9, rtol=0)


# ---- estimator -----------------------------------------------------------------------------------


def test_labels_are_near_those_of_the_complete_data(wine, model):
    whole = ClAM(3, **QUICK).fit(wine)
    assert adjusted_rand_score(model.labels_, whole.labels_) > 0.8
    assert np.isfinite(model.cluster_centers_).all()
    gaps = _hidden(wine)[0]
    np.testing.assert_array_equal(model.predict(gaps), model.labels_)
    far = model.transform(gaps)
    expected = nan_euclidean_distances(gaps, model.cluster_centers_)
    np.testing.assert_allclose(far, expected, atol=1e-7)
    np.testing.assert_array_equal(far.argmin(1), model.labels_)
    assert model.inertia_ == pytest.approx((far.min(1) ** 2).sum())
    assert model.score(gaps) == pytest.approx(-model.inertia_)
    p = model.predict_proba(gaps)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_array_equal(p.argmax(1), model.labels_)
    energy = -np.log(np.exp(-model.beta_ * far**2).sum(1)) / model.beta_
    np.testing.assert_allclose(model.energy(gaps), energy, atol=1e-9)


def test_complete_rows_keep_their_bits_beside_others(wine, model):
    gaps = wine.copy()
    gaps[::3, 2] = np.nan
    whole = np.arange(len(wine)) % 3 != 0
    for method in (model.predict, model.transform, model.energy, model.predict_proba):
        np.testing.assert_array_equal(method(gaps)[whole], method(wine)[whole])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_observed_entries_keep_their_bits(wine, dtype):
    x = (wine * 3 + 100).astype(dtype)
    gaps, hidden = _hidden(x)
    model = ClAM(12, **QUICK).fit(gaps)
    completed = model.complete(gaps)
    assert completed.dtype == dtype
    np.testing.assert_array_equal(completed[~hidden], x[~hidden])
    assert np.isfinite(completed).all()
    again = model.complete(torch.from_numpy(gaps))
    np.testing.assert_array_equal(again.numpy(), completed)


@pytest.mark.parametrize(("load", "k"), [(load_wine, 12), (load_digits, 32)])
def test_completion_beats_k_means_on_filled_data(load, k):
    """bench/completion.py has the bars."""
    x = _scaled(load)[:600]
    gaps, hidden = _hidden(x)
    ours = ClAM(k, random_state=0).fit(gaps).complete(gaps)
    filled = KMeans(k, n_init=10, random_state=0).fit(np.where(hidden, 0, x))
    nearest = filled.cluster_centers_[filled.labels_]
    error = [np.sqrt(np.square(f - x)[hidden].mean()) for f in (ours, nearest, 0 * x)]
    assert error[0] < error[1]
    assert error[0] < 0.85 * error[2]


def test_rows_and_columns_without_entries(wine):
    gaps = _hidden(wine)[0]
    gaps[3] = np.nan
    model = ClAM(3, **QUICK).fit(gaps)
    without = ClAM(3, **QUICK).fit(np.delete(gaps, 3, axis=0))
    np.testing.assert_allclose(model.cluster_centers_, without.cluster_centers_)
    assert model.inertia_ == pytest.approx(without.inertia_)
    assert 0 <= model.labels_[3] < 3
    assert np.isfinite(model.complete(gaps)).all()
    gaps[:, 5] = np.nan
    with pytest.raises(ValueError, match=r"every column, got none in \[5\]"):
        ClAM(3, **QUICK).fit(gaps)
    with pytest.raises(ValueError, match="infinity: 1 bad entry, the first at row 1, column 2"):
        ClAM(3, **QUICK).fit(np.where(np.arange(wine.size).reshape(wine.shape) == 15, np.inf, wine))


@pytest.mark.parametrize("features", [1, 2])
def test_few_features(features):
    x = np.random.default_rng(0).normal(size=(60, features)) + 8 * (np.arange(60) % 2)[:, None]
    x[::7, 0] = np.nan
    labels = ClAM(2, random_state=0).fit_predict(x)
    truth = np.arange(60) % 2
    observed = ~np.isnan(x).all(1)
    assert adjusted_rand_score(truth[observed], labels[observed]) == 1.0


def test_tight_groups_far_apart_in_float32():
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.randn(50, 4) * 0.01 + c for c in (0, 0.2, 1000)])
    x[rng.rand(*x.shape) < 0.2] = np.nan
    single, double = (ClAM(3, random_state=0).fit(x.astype(t)) for t in (np.float32, np.float64))
    assert single.inertia_ == pytest.approx(double.inertia_, rel=0.1)
    np.testing.assert_array_equal(single.transform(x.astype("f4")).argmin(1), single.labels_)


def test_settings_of_complete_are_checked(wine, model):
    for wrong, text in (
        ({"beta": -1}, "beta: expected a number > 0, got -1"),
        ({"beta": "x"}, "beta: expected a number > 0, got 'x'"),
        ({"step": 5.0}, r"step: expected a number in \(0, 2\], got 5.0"),
    ):
        with pytest.raises(ValueError, match=text):
            model.complete(wine, **wrong)


def test_the_papers_recipe_takes_missing_entries():
    x = _scaled(load_iris)
    gaps, hidden = _hidden(x, 0.1)
    model = ClAM(3, recipe="paper", n_init=2, max_iter=20, random_state=0).fit(gaps)
    np.testing.assert_array_equal(model.predict(gaps), model.labels_)
    np.testing.assert_array_equal(model.complete(gaps)[~hidden], x[~hidden])
