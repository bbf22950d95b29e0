# SPDX-License-Identifier: Apache-2.0
"""ClAM's default recipe: candidates and guard, weights, memory maps, callbacks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _memory import most_bytes
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.preprocessing import StandardScaler

from clam_kernels import ClAM, metrics
from clam_kernels import KMeans as ClusterKMeans
from clam_kernels.estimators.clam import points as _points
from clam_kernels.estimators.clam import selection as _selection
from clam_kernels.estimators.common import columns as _columns
from clam_kernels.estimators.common import rows as _rows
from clam_kernels.estimators.common import scale as _scale

QUICK = {"n_init": 4, "max_iter": 6, "random_state": 0}


def _scaled(load) -> np.ndarray:
    return StandardScaler().fit_transform(load().data).astype(np.float32)


@pytest.fixture(scope="module")
def iris() -> np.ndarray:
    return _scaled(load_iris)


def _blobs(rows: int, k: int = 4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(k, 3))[rng.integers(k, size=rows)] * 6 + rng.normal(size=(rows, 3))


# ---- quality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_iris, load_wine, load_breast_cancer])
@pytest.mark.parametrize("seed", [0, 1])
def test_never_below_k_means_chosen_by_inertia(load, seed):
    x, k = _scaled(load), len(np.unique(load().target))
    ours = ClAM(k, random_state=seed).fit(x)
    theirs = KMeans(k, n_init=32, random_state=seed).fit(x)
    assert ours.n_clusters_used_ == k
    assert silhouette_score(x, ours.labels_) >= silhouette_score(x, theirs.labels_) - 0.005
    means = np.stack([x[ours.labels_ == i].mean(0) for i in range(k)])
    inertia = np.square(x - means[ours.labels_]).sum()
    assert inertia <= 1.05 * theirs.inertia_ * 1.001


def test_training_finds_partitions_that_lloyd_does_not():
    """breast_cancer: soft competition reaches another kind of partition (am.md section 8)."""
    x = _scaled(load_breast_cancer)
    both, off = (ClAM(2, random_state=0, am_share=share).fit(x) for share in (0.5, 0.0))
    assert silhouette_score(x, both.labels_) > silhouette_score(x, off.labels_) + 0.005
    assert np.isnan(off.loss_curve_).all()
    assert set(off.candidates_["role"]) == {"start", "lloyd"}


def test_the_guard_keeps_from_outlying_clusters():
    x = _scaled(load_breast_cancer)
    free, guarded = (ClAM(2, random_state=0, inertia_guard=g).fit(x) for g in (None, 1.05))
    assert silhouette_score(x, free.labels_) > silhouette_score(x, guarded.labels_)
    assert np.bincount(free.labels_).min() < np.bincount(guarded.labels_).min()


def test_selections(iris):
    fits = {
        s: ClAM(3, select=s, random_state=0).fit(iris) for s in ("silhouette", "inertia", "loss")
    }
    best = KMeans(3, n_init=32, random_state=0).fit(iris).inertia_
    assert fits["inertia"].inertia_ == pytest.approx(best, rel=1e-5)
    assert set(fits["loss"].candidates_["role"]) == {"start", "am"}
    chosen = fits["loss"].candidates_["chosen"]
    losses = fits["loss"].candidates_["loss"]
    assert losses[chosen] == np.nanmin(losses)


# ---- candidates ----------------------------------------------------------------------------------


def test_candidates_are_every_replica(iris):
    model = ClAM(3, n_init=8, max_iter=10, random_state=0).fit(iris)
    table = model.candidates_
    assert {len(column) for column in table.values()} == {8 + 5 * (4 + 3 * 4)}
    assert table["chosen"].sum() == 1
    row = {name: column[table["chosen"]][0] for name, column in table.items()}
    assert row["counts"]
    assert row["clusters_used"] == 3
    assert row["silhouette"] == pytest.approx(silhouette_score(iris, model.labels_), abs=1e-5)
    assert row["silhouette"] == pytest.approx(table["silhouette"][table["counts"]].max(), abs=1e-6)
    full = table["clusters_used"] == 3
    bound = 1.05 * table["inertia"][full].min()
    np.testing.assert_array_equal(table["counts"], full & (table["inertia"] <= bound * (1 + 1e-9)))
    assert set(table["round"][table["role"] == "start"]) == {0}
    assert model.beta_ == pytest.approx(3 / model.gap_)
    assert not hasattr(ClAM(3), "candidates_")


def test_candidates_survive_a_file(iris, tmp_path):
    model = ClAM(3, **QUICK).fit(iris)
    model.save(tmp_path / "m")
    again = ClAM.load(tmp_path / "m")
    for name, column in model.candidates_.items():
        np.testing.assert_array_equal(again.candidates_[name], column)


def test_min_cluster_size():
    x = np.concatenate([_blobs(300), [[60.0, 60, 60]]])
    with_outlier = ClAM(5, random_state=0).fit(x)
    assert np.bincount(with_outlier.labels_).min() == 1
    larger = ClAM(5, random_state=0, min_cluster_size=5).fit(x)
    assert np.bincount(larger.labels_).min() >= 5


def test_a_min_cluster_size_without_candidates_warns():
    x = _blobs(60)
    with pytest.warns(ConvergenceWarning, match="min_cluster_size=40: no partition that was tried"):
        ClAM(3, min_cluster_size=40, **QUICK).fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClAM(3, min_cluster_size=2, **QUICK).fit(x)


def test_silhouettes_of_candidates_are_exact():
    x = _scaled(load_wine)
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=(5, len(x)))
    labels[4] = np.where(np.arange(len(x)) == 7, 0, 1 + labels[4] % 2)  # a cluster of one row
    points = _points.points_of(torch.from_numpy(x), None, None)
    result = _selection.Silhouettes(points, 0)(torch.from_numpy(labels), 3)
    expected = [silhouette_score(x, own) for own in labels]
    np.testing.assert_allclose(result, expected, atol=2e-6)
    weight = torch.from_numpy(rng.integers(1, 4, len(x)).astype(float))
    heavy = _points.points_of(torch.from_numpy(x), weight, None)
    result = _selection.Silhouettes(heavy, 0)(torch.from_numpy(labels[:2]), 3)
    repeat = weight.long().numpy()
    expected = [
        silhouette_score(np.repeat(x, repeat, 0), np.repeat(own, repeat)) for own in labels[:2]
    ]
    np.testing.assert_allclose(result, expected, atol=2e-6)


# ---- weights -------------------------------------------------------------------------------------


def test_a_weight_is_a_repetition(iris):
    x = iris.astype(np.float64)
    weight = np.random.default_rng(0).integers(0, 3, len(x))
    settings = {**QUICK, "init": x[[3, 60, 120]]}
    heavy = ClAM(3, **settings).fit(x, sample_weight=weight)
    repeated = ClAM(3, **settings).fit(np.repeat(x, weight, 0))
    np.testing.assert_array_equal(np.repeat(heavy.labels_, weight), repeated.labels_)
    np.testing.assert_allclose(heavy.cluster_centers_, repeated.cluster_centers_, atol=1e-9)
    assert heavy.inertia_ == pytest.approx(repeated.inertia_)
    assert heavy.gap_ == pytest.approx(repeated.gap_)
    assert heavy.score(x, sample_weight=weight) == pytest.approx(-heavy.inertia_)


def test_rows_without_weight_do_not_count(iris):
    junk = np.full((5, 4), 1e4, np.float32)
    weight = np.r_[np.ones(len(iris)), np.zeros(5)]
    model = ClAM(3, **QUICK).fit(np.concatenate([iris, junk]), sample_weight=weight)
    plain = ClAM(3, **QUICK).fit(iris)
    assert adjusted_rand_score(model.labels_[:-5], plain.labels_) == 1.0
    np.testing.assert_allclose(model.inertia_, plain.inertia_, rtol=1e-3)
    for wrong, text in (
        (-weight - 1, "Negative"),
        (weight[:-1], "expected"),
        (weight * 0, "non-zero"),
    ):
        with pytest.raises(ValueError, match=text):
            ClAM(3, **QUICK).fit(np.concatenate([iris, junk]), sample_weight=wrong)


@pytest.mark.parametrize(
    "settings", [{}, {"select": "loss"}, {"recipe": "paper", "max_iter": 10}], ids=str
)
def test_a_row_that_does_not_count_changes_nothing(iris, settings):
    x = iris.astype(np.float64)
    plain = ClAM(3, n_init=4, random_state=0, **settings).fit(x)
    more = ClAM(3, n_init=4, random_state=0, **settings).fit(np.vstack([x, [[np.nan] * 4]]))
    np.testing.assert_array_equal(more.labels_[:-1], plain.labels_)
    assert more.inertia_ == pytest.approx(plain.inertia_)
    light = ClAM(3, n_init=4, random_state=0, **settings)
    light.fit(np.vstack([x, x[:1]]), sample_weight=np.r_[np.ones(150), 0])
    np.testing.assert_array_equal(light.labels_[:-1], plain.labels_)


@pytest.mark.parametrize("unit", [0.5, 0.01, 1 / 150, 1e-300])
def test_weights_below_one_are_numbers_of_rows_all_the_same(iris, unit):
    plain = ClAM(3, **QUICK).fit(iris)
    light = ClAM(3, **QUICK).fit(iris, sample_weight=np.full(150, unit))
    np.testing.assert_array_equal(light.labels_, plain.labels_)
    assert light.candidates_["counts"].sum() == plain.candidates_["counts"].sum()
    assert light.inertia_ == pytest.approx(unit * plain.inertia_, rel=1e-5)
    large = ClAM(3, **QUICK).fit(iris, sample_weight=np.full(150, 1e300))
    assert large.candidates_["silhouette"].max() > 0.4


def test_few_rows_with_weight_among_many_without():
    x = np.random.default_rng(0).normal(size=(30_000, 3))
    weight = np.zeros(len(x))
    weight[:40] = 1
    model = ClAM(5, search_rows=1000, **QUICK).fit(x, sample_weight=weight)
    alone = ClAM(5, **QUICK).fit(x[:40])
    assert model.n_clusters_used_ == 5
    assert model.inertia_ == pytest.approx(alone.inertia_, rel=0.2)
    with pytest.raises(ValueError, match="expected a"):
        ClAM(2).fit(np.where(weight[:, None] > 0, np.nan, x), sample_weight=weight)


def test_the_guard_and_the_labels_hold_beside_a_far_row(iris):
    for dtype, far in ((np.float64, 1e6), (np.float64, 1e8), (np.float32, 1e4)):
        x = np.vstack([iris, np.full((1, 4), far)]).astype(dtype)
        model = ClAM(4, random_state=0, n_init=8, max_iter=10).fit(x)
        table = model.candidates_
        full = table["clusters_used"] == 4
        least = table["inertia"][full].min()
        assert table["inertia"][table["chosen"]][0] <= 1.05 * least * (1 + 1e-6)
        np.testing.assert_array_equal(model.transform(x).argmin(1), model.labels_)
        np.testing.assert_allclose(model.predict_proba(x).sum(1), 1, atol=1e-5)


# ---- invariances (am.md section 11, case 15) -----------------------------------------------------


def test_far_and_large_data_give_the_same_labels():
    x = _scaled(load_digits)
    plain = ClAM(10, random_state=0, n_init=8, max_iter=20).fit(x)
    for other in (x + np.float32(1e3), x * np.float32(1024)):
        model = ClAM(10, random_state=0, n_init=8, max_iter=20).fit(other)
        same = np.mean(model.labels_ == plain.labels_)
        quality = [metrics.silhouette(x, m.labels_) for m in (model, plain)]
        assert quality[0] == pytest.approx(quality[1], abs=1e-3)
        assert same >= 0.995


def test_constant_columns_and_duplicates(iris):
    x = np.concatenate([np.full((150, 1), 7, np.float32), iris], axis=1)
    plain = ClAM(3, **QUICK).fit(iris)
    assert adjusted_rand_score(ClAM(3, **QUICK).fit(x).labels_, plain.labels_) > 0.95
    twice = ClAM(3, **QUICK).fit(np.repeat(iris, 2, 0))
    np.testing.assert_array_equal(twice.labels_[::2], twice.labels_[1::2])


@pytest.mark.parametrize("n_init", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_any_number_of_replicas(iris, n_init, share):
    model = ClAM(3, n_init=n_init, am_share=share, max_iter=3, random_state=0).fit(iris)
    assert model.n_clusters_used_ == 3
    assert model.n_iter_ == 3


# ---- many rows -----------------------------------------------------------------------------------


def test_more_rows_than_the_search_uses():
    x = _blobs(5000)
    whole, part = (ClAM(4, search_rows=n, **QUICK).fit(x) for n in (20_000, 400))
    assert adjusted_rand_score(whole.labels_, part.labels_) > 0.99
    assert part.inertia_ <= 1.001 * KMeans(4, n_init=5, random_state=0).fit(x).inertia_
    assert len(part.labels_) == 5000
    gaps = x.copy()
    gaps[np.random.default_rng(0).random(x.shape) < 0.1] = np.nan
    holes = ClAM(4, search_rows=400, **QUICK).fit(gaps)
    assert adjusted_rand_score(holes.labels_, whole.labels_) > 0.9


def test_the_papers_recipe_takes_no_sample():
    x = _blobs(600)
    settings = {"recipe": "paper", "n_init": 2, "max_iter": 3, "random_state": 0}
    few, whole = (ClAM(4, search_rows=n, **settings).fit(x) for n in (1, 1000))
    np.testing.assert_array_equal(few.cluster_centers_, whole.cluster_centers_)


def test_a_memory_map_is_not_read_whole(tmp_path: Path):
    x = _blobs(3000).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = ClAM(4, search_rows=400, **QUICK).fit(mapped)
    plain = ClAM(4, search_rows=400, **QUICK).fit(x)
    np.testing.assert_array_equal(model.labels_, plain.labels_)
    np.testing.assert_array_equal(model.predict(mapped), plain.labels_)
    np.testing.assert_allclose(model.cluster_centers_, plain.cluster_centers_, atol=1e-5)
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        ClAM(4).fit(sparse.csr_array(x))


@pytest.mark.parametrize("dtype", ["<f2", "<i4", ">f4"])
def test_a_memory_map_of_any_dtype_is_read_block_by_block(dtype, tmp_path, monkeypatch):
    x = np.floor(_blobs(20_000).repeat(16, 1) * 20)
    np.save(tmp_path / "x.npy", np.asfortranarray(x.astype(dtype)))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr(_rows, "BLOCK_ENTRIES", 1 << 13)
    monkeypatch.setattr(_scale, "CHUNK_ENTRIES", 1 << 13)
    monkeypatch.setattr(_columns, "SAMPLE_ENTRIES", 1 << 14)
    model = ClAM(4, search_rows=200, n_init=2, max_iter=2, random_state=0)
    most = most_bytes(lambda: model.fit(mapped))
    assert most < 0.6 * mapped.size * model.cluster_centers_.itemsize
    plain = ClAM(4, search_rows=200, n_init=2, max_iter=2, random_state=0).fit(x)
    np.testing.assert_array_equal(model.labels_, plain.labels_)


# ---- callbacks -----------------------------------------------------------------------------------


def test_callbacks(iris):
    calls: list[object] = []

    class FitRecorder:
        def on_fit_begin(self, estimator):
            calls.append("begin")

        def on_iteration(self, estimator, info):
            calls.append((info["round"], info["epoch"]))
            assert info["loss"] > 0

        def on_fit_end(self, estimator):
            calls.append(estimator.n_iter_)

    ClAM(3, n_init=4, max_iter=10, random_state=0, callbacks=FitRecorder()).fit(iris)
    assert calls == ["begin", *((r, e) for r in range(1, 6) for e in range(2)), 10]
    stopped = ClAM(3, n_init=4, max_iter=10, random_state=0, callbacks=lambda e, info: True).fit(
        iris
    )
    assert stopped.n_iter_ == 1
    assert stopped.n_clusters_used_ == 3

    models: list[object] = []
    ClAM(3, am_share=0.0, callbacks=lambda e, info: models.append(info) or True, **QUICK).fit(iris)
    assert len(models) == 1
    with pytest.raises(TypeError, match="got an iterator"):
        ClAM(3, callbacks=iter([print])).fit(iris)

    def fails(estimator, info):
        raise KeyError("mine")

    model = ClAM(3, callbacks=fails)
    with pytest.raises(KeyError, match="mine"):
        model.fit(iris)
    assert not hasattr(model, "cluster_centers_")
    with pytest.raises(TypeError, match="callbacks"):
        ClAM(3, callbacks=3).fit(iris)


# ---- partial_fit ---------------------------------------------------------------------------------


def test_candidates_before_a_fit():
    with pytest.raises(NotFittedError):
        _ = ClAM(3).candidates_
    assert not hasattr(ClAM(3), "candidates_")


# ---- masked arrays -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ClAM, ClusterKMeans])
@pytest.mark.parametrize("name", ["X", "sample_weight", "init"])
def test_masked_entries_are_refused(kind, name):
    x = _blobs(60)
    arguments = {"X": x, "sample_weight": np.ones(len(x)), "init": x[:4]}
    arguments[name] = np.ma.masked_array(arguments[name], mask=np.zeros_like(arguments[name], bool))
    init, fit = arguments.pop("init"), lambda: kind(4, init=init, n_init=1).fit(**arguments)
    fit()
    full = arguments.get(name, init)
    full[1] = np.ma.masked
    with pytest.raises(ValueError, match=f"{name}: expected an array without masked entries"):
        fit()
