# SPDX-License-Identifier: Apache-2.0
"""ClAM on tables whose columns have units of their own. bench/units.py has all tables."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_linnerud, load_wine
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.preprocessing import StandardScaler

from clam_kernels import ClAM
from clam_kernels.estimators.clam.refresh import refresh_frame
from clam_kernels.estimators.clam.sample import StreamSample

QUICK = {"n_init": 4, "max_iter": 10, "random_state": 0}


def _in_random_units(x: np.ndarray) -> np.ndarray:
    return x * 10.0 ** np.random.default_rng(1).uniform(-9, 9, x.shape[1])


def _with_gaps(x: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.random.default_rng(seed).random(x.shape) < 0.1
    return np.where(hidden, np.nan, x), hidden


def _outside(table: np.ndarray, observed: np.ndarray) -> int:
    low, high = np.nanmin(observed, axis=0), np.nanmax(observed, axis=0)
    return int(((table < low) | (table > high)).sum())


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    return load_wine().data


# ---- raw and scaled tables have the same clusters ------------------------------------------------


@pytest.mark.parametrize(("load", "k"), [(load_iris, 3), (load_wine, 3), (load_linnerud, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_units_change_no_partition(load, k, dtype):
    x = _in_random_units(load().data).astype(dtype)
    scaled = StandardScaler().fit_transform(x.astype(np.float64))
    ours, theirs = (ClAM(k, **QUICK).fit(table) for table in (x, scaled))
    score, expected = (silhouette_score(scaled, model.labels_) for model in (ours, theirs))
    assert score >= expected - 0.01
    assert _outside(ours.cluster_centers_, x) == 0
    assert ours.cluster_centers_.dtype == dtype


@pytest.mark.parametrize("load", [load_iris, load_wine, load_breast_cancer])
@pytest.mark.parametrize("standardize", ["auto", False])
@pytest.mark.filterwarnings("ignore:standardize=False")
def test_filled_cells_stay_in_range_and_beat_the_means(load, standardize):
    x = load().data
    gaps, hidden = _with_gaps(x)
    model = ClAM(3, standardize=standardize, **QUICK).fit(gaps)
    filled = model.complete(gaps)
    assert _outside(filled, gaps) == 0
    assert _outside(model.cluster_centers_, gaps) == 0
    np.testing.assert_array_equal(filled[~hidden], x[~hidden])
    means = np.broadcast_to(np.nanmean(gaps, axis=0), x.shape)
    ours, theirs = (np.square((f - x) / x.std(0))[hidden].mean() for f in (filled, means))
    assert ours <= theirs


def test_a_long_step_of_complete_stays_in_range(raw):
    gaps, _ = _with_gaps(raw)
    model = ClAM(3, **QUICK).fit(gaps)
    assert _outside(model.complete(gaps, steps=3, step=2.0), gaps) == 0


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_start_outside_the_range_moves_inside(raw):
    far = raw[[0, 70, 140]] * 100
    for recipe in ("default", "paper"):
        model = ClAM(3, recipe=recipe, init=far, n_init=1, max_iter=2, random_state=0)
        assert _outside(model.fit(raw).cluster_centers_, raw) == 0


@pytest.mark.parametrize("changes", [{"recipe": "paper", "max_iter": 20}, {"search_rows": 100}])
def test_every_way_of_a_fit_standardises(raw, changes):
    x = np.repeat(raw, 3, axis=0) if "search_rows" in changes else raw
    scaled = StandardScaler().fit_transform(x)
    settings = {**QUICK, **changes}
    ours, theirs = (ClAM(3, **settings).fit(table) for table in (x, scaled))
    assert adjusted_rand_score(ours.labels_, theirs.labels_) > 0.9
    assert _outside(ours.cluster_centers_, x) == 0


def test_batches_are_standardised(raw):
    gaps, _ = _with_gaps(raw[np.random.default_rng(0).permutation(len(raw))])
    model = ClAM(3, **QUICK)
    for batch in np.array_split(gaps, 4):
        model.partial_fit(batch)
    scaled = StandardScaler().fit_transform(raw)
    assert silhouette_score(scaled, model.predict(raw)) > 0.26
    assert _outside(model.cluster_centers_, gaps) == 0
    assert _outside(model.complete(gaps), gaps) == 0


def _unlike() -> tuple[np.ndarray, np.ndarray]:
    """Five groups in columns of three units, shuffled, and their labels."""
    rng = np.random.default_rng(0)
    centers, labels = rng.normal(size=(5, 3)) * 10, np.repeat(np.arange(5), 200)
    x = (centers[labels] + rng.normal(size=(1000, 3))) * [1e-3, 1, 1e6]
    order = rng.permutation(1000)
    return x[order], labels[order]


def _first(x: np.ndarray, kind: str) -> np.ndarray:
    """A first batch that does not show the scales of the columns."""
    if kind == "zeros":
        return np.zeros((50, 3), x.dtype)
    if kind == "one column":
        return np.hstack([np.tile(x[:1, :1], (50, 1)), x[:50, 1:]])
    noise = 1e-6 if kind == "nearly" else 0.0
    return (x[:1] * (1 + noise * np.random.default_rng(1).normal(size=(50, 3)))).astype(x.dtype)


@pytest.mark.parametrize("kind", ["one row", "one column", "nearly", "zeros"])
@pytest.mark.parametrize("standardize", ["auto", True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_scale_recovers_from_a_constant_first_batch(kind, standardize, dtype):
    x, labels = _unlike()
    x = x.astype(dtype)
    models = []
    for _ in range(2):
        model = ClAM(5, random_state=0, standardize=standardize).partial_fit(_first(x, kind))
        for start in range(0, 1000, 200):
            model.partial_fit(x[start : start + 200])
        models.append(model)
    expected = x.std(0) / np.sqrt(np.square(x.std(0)).mean())
    assert ((model.scale_ < 2 * expected) & (model.scale_ > expected / 2)).all()
    assert adjusted_rand_score(labels, model.predict(x)) > 0.98
    assert _outside(model.cluster_centers_, np.vstack([x, _first(x, kind)])) == 0
    np.testing.assert_array_equal(models[0].cluster_centers_, models[1].cluster_centers_)
    far = np.square((x[-200:, None] - model.cluster_centers_) / model.scale_).sum(2)
    assert model.inertia_ == pytest.approx(far.min(1).sum(), rel=1e-4)


def test_the_scale_recovers_from_a_constant_fit(tmp_path: Path):
    x, labels = _unlike()
    model = ClAM(5, standardize=True, **QUICK)
    with pytest.warns(match="clusters are used"):
        model.fit(_first(x, "one row"))
    model.save(tmp_path / "m")
    again = ClAM.load(tmp_path / "m")
    for start in range(0, 1000, 200):
        for one in (model, again):
            one.partial_fit(x[start : start + 200])
    assert adjusted_rand_score(labels, model.predict(x)) > 0.98
    np.testing.assert_array_equal(again.scale_, model.scale_)


def test_a_fit_keeps_its_scale_beside_few_rows():
    x, _ = _unlike()
    model = ClAM(1, standardize=True, **QUICK).fit(x)
    before = model.scale_
    np.testing.assert_array_equal(model.partial_fit(x[:3]).scale_, before)


def test_columns_that_do_not_vary_in_the_sample_keep_their_scale():
    """One column has a single value there, one has none; the third has another deviation."""
    x, _ = _unlike()
    frame = ClAM(5, standardize=True, **QUICK).fit(x)._frame
    z = frame.states(torch.from_numpy(x), torch.float64)
    z[:, 0], z[:, 1], z[:, 2] = torch.nan, z[0, 1], z[:, 2] * 10
    none = StreamSample.empty(z[:0], torch.zeros(0, dtype=torch.float64), frame.deviation)
    result = refresh_frame(True, frame, none, z, None)
    before, after = (f.deviation * f.width for f in (frame, result))
    torch.testing.assert_close(after, before * torch.tensor([1.0, 1.0, 10.0]).double())


def test_columns_that_start_to_vary_warn():
    x, _ = _unlike()
    model = ClAM(5, standardize=False, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.partial_fit(_first(x, "one row"))
    with pytest.warns(UserWarning, match="standardize=False: the spread of one column"):
        model.partial_fit(x[:500])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.partial_fit(x[500:])


# ---- units ---------------------------------------------------------------------------------------


def test_auto_leaves_columns_of_one_unit_alone():
    for x in (
        load_digits().data,
        load_iris().data,
        StandardScaler().fit_transform(load_wine().data),
    ):
        model = ClAM(3, n_init=1, max_iter=1, random_state=0).fit(x)
        np.testing.assert_array_equal(model.scale_, 1)
    assert (ClAM(3, standardize=True, n_init=1, max_iter=1).fit(x).scale_ != 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_a_tensor_is_a_tensor(raw, dtype, tmp_path: Path):
    x = torch.from_numpy(raw).to(dtype)
    model = ClAM(3, **QUICK).fit(x)
    assert isinstance(model.scale_, torch.Tensor)
    assert model.scale_.device == model.cluster_centers_.device
    far = ((x[:, None] - model.cluster_centers_) / model.scale_).norm(dim=2)
    torch.testing.assert_close(model.transform(x).double(), far, rtol=1e-4, atol=1e-2)
    assert isinstance(model.partial_fit(x).scale_, torch.Tensor)
    model.save(tmp_path / "m")
    again = ClAM.load(tmp_path / "m")
    assert type(again.scale_) is type(again.cluster_centers_) is np.ndarray
    np.testing.assert_array_equal(again.scale_, model.scale_)


def test_distances_are_in_units_of_the_data(raw):
    model = ClAM(3, **QUICK).fit(raw)
    deviation = raw.std(0)
    np.testing.assert_allclose(model.scale_, deviation / np.sqrt(np.mean(deviation**2)))
    far = np.linalg.norm((raw[:, None] - model.cluster_centers_) / model.scale_, axis=2)
    np.testing.assert_allclose(model.transform(raw), far)
    np.testing.assert_array_equal(model.labels_, far.argmin(1))
    assert model.inertia_ == pytest.approx(np.square(far.min(1)).sum())
    assert model.score(raw) == pytest.approx(-model.inertia_)
    p = model.predict_proba(raw)
    weights = np.exp(-model.beta_ * far**2)
    np.testing.assert_allclose(p, weights / weights.sum(1, keepdims=True), atol=1e-9)
    alone = ClAM(1, **QUICK).fit(raw)
    assert alone.inertia_ == pytest.approx(np.square(raw - raw.mean(0)).sum())


def test_another_unit_for_all_columns_changes_the_units_alone(raw):
    one, other = (ClAM(3, **QUICK).fit(table) for table in (raw, raw * 1000))
    np.testing.assert_array_equal(one.labels_, other.labels_)
    np.testing.assert_allclose(other.cluster_centers_, one.cluster_centers_ * 1000)
    np.testing.assert_allclose(other.transform(raw * 1000), one.transform(raw) * 1000)
    assert other.gap_ == pytest.approx(one.gap_ * 1e6)
    np.testing.assert_allclose(other.scale_, one.scale_)


def test_a_beta_is_in_the_units_that_the_model_reports(raw):
    free = ClAM(3, **QUICK).fit(raw)
    same_beta = ClAM(3, beta=free.beta_, **QUICK).fit(raw)
    assert same_beta.beta_ == pytest.approx(free.beta_)


def test_a_column_of_one_value_keeps_its_differences(raw):
    x = np.column_stack([raw, np.full(len(raw), 0.1)])
    model = ClAM(3, **QUICK).fit(x)
    assert model.scale_[-1] == 1
    moved = x[:1] + np.array([0.0] * raw.shape[1] + [1e6])
    np.testing.assert_allclose(model.transform(moved), 1e6, rtol=1e-3)
    np.testing.assert_array_equal(model.cluster_centers_[:, -1], 0.1)


def test_a_weight_is_a_repetition_in_the_scale(raw):
    weight = 1.0 + (np.arange(len(raw)) % 3 == 0)
    twice = np.concatenate([raw, raw[weight == 2]])
    one = ClAM(3, **QUICK).fit(raw, sample_weight=weight)
    np.testing.assert_allclose(one.scale_, ClAM(3, **QUICK).fit(twice).scale_)


# ---- warning, file -------------------------------------------------------------------------------


def test_a_fit_that_does_not_standardise_warns_once(raw):
    text = "standardize=False: the spread of one column of X is .e\\+03 times"
    with pytest.warns(UserWarning, match=text) as caught:
        ClAM(3, standardize=False, **QUICK).fit(raw)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    model = ClAM(3, standardize=False, **QUICK)
    first, second = np.array_split(raw, 2)
    with pytest.warns(UserWarning, match=text):
        model.partial_fit(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.partial_fit(second)
        ClAM(3, **QUICK).fit(raw)
        ClAM(3, standardize=False, **QUICK).fit(StandardScaler().fit_transform(raw))


def test_a_file_keeps_the_scale(raw, tmp_path: Path):
    gaps, _ = _with_gaps(raw)
    model = ClAM(3, standardize=True, **QUICK).fit(gaps)
    model.save(tmp_path / "m")
    again = ClAM.load(tmp_path / "m")
    assert again.standardize is True
    np.testing.assert_array_equal(again.scale_, model.scale_)
    np.testing.assert_array_equal(again.complete(gaps), model.complete(gaps))
    np.testing.assert_array_equal(again.transform(gaps), model.transform(gaps))
    wrong = model.complete(np.where(np.isnan(gaps), np.nan, gaps * 1.5))
    low, high = np.nanmin(gaps, axis=0), np.nanmax(gaps, axis=0)
    hidden = np.isnan(gaps)
    assert (((wrong < low) | (wrong > high)) & hidden).sum() == 0


def test_tensors_give_what_arrays_give(raw):
    gaps, _ = _with_gaps(raw)
    array = ClAM(3, **QUICK).fit(gaps)
    tensor = ClAM(3, **QUICK).fit(torch.from_numpy(gaps))
    np.testing.assert_array_equal(
        tensor.complete(torch.from_numpy(gaps)).numpy(), array.complete(gaps)
    )


def test_standardize_is_checked(raw):
    with pytest.raises(ValueError, match="'standardize' parameter of ClAM must be"):
        ClAM(3, standardize="yes").fit(raw)
