# SPDX-License-Identifier: Apache-2.0
"""ClAM's `partial_fit`: quality, order of the rows, weights, missing entries, callbacks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from clam_kernels import ClAM
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


def _stream(model, x, size):
    for start in range(0, len(x), size):
        model.partial_fit(x[start : start + size])
    return model


@pytest.mark.parametrize("size", [100, 1000])
def test_partial_fit_is_as_good_as_mini_batch_k_means(size):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(12, 5))[rng.integers(12, size=10_000)] * 3 + rng.normal(size=(10_000, 5))
    ours = _stream(ClAM(12, random_state=0), x, size)
    theirs = _stream(MiniBatchKMeans(12, n_init=3, random_state=0), x, size)
    assert ours.score(x) > 1.02 * theirs.score(x)  # both are below 0
    assert ours.n_clusters_used_ == 12
    assert ours.n_iter_ == len(ours.loss_curve_) >= 20
    assert len(ours.labels_) == size
    again = _stream(ClAM(12, random_state=0), x, size)
    np.testing.assert_array_equal(ours.cluster_centers_, again.cluster_centers_)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("order", ["ordered", "shuffled", "constant first", "constant, ordered"])
def test_partial_fit_does_not_depend_on_the_order_of_the_rows(order, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=3000)
    x = rng.normal(size=(10, 8))[labels] * 3 + rng.normal(size=(3000, 8)) * 0.7
    batches = x[np.argsort(labels, kind="stable")] if "ordered" in order else x
    if "constant" in order:
        batches = np.concatenate([np.repeat(x[:1], 200, 0), batches])
    ours = _stream(ClAM(10, random_state=seed), batches, 200)
    theirs = _stream(MiniBatchKMeans(10, n_init=3, random_state=seed), batches, 200)
    assert ours.score(x) > 1.2 * theirs.score(x)  # both are below 0
    # those of mini-batch k-means may be several times worse than the best
    assert ours.score(x) > 1.2 * KMeans(10, n_init=5, random_state=seed).fit(x).score(x)
    assert ours.n_clusters_used_ == 10


def test_partial_fit_keeps_missing_entries_and_weights_of_ordered_rows():
    x = np.repeat(np.eye(6) * 9, 300, 0) + np.random.default_rng(0).normal(size=(1800, 6))
    gaps = np.where(np.random.default_rng(1).random(x.shape) < 0.1, np.nan, x)
    gaps[:, 1] = np.where(np.isnan(gaps).all(1), x[:, 1], gaps[:, 1])
    weight = np.tile([0.0, 2.0, 2.0], 600)
    gaps[weight == 0] += 1000  # rows of weight 0 have no influence
    model = ClAM(6, random_state=0)
    for start in range(0, len(x), 100):
        part = slice(start, start + 100)
        model.partial_fit(gaps[part], sample_weight=weight[part])
    assert adjusted_rand_score(model.predict(x), np.repeat(np.arange(6), 300)) > 0.95


def test_partial_fit_goes_on_from_a_fit_and_from_a_file(iris, tmp_path):
    x = _blobs(2000)
    model = ClAM(4, **QUICK).fit(x[:500])
    inertia = model.score(x)
    model.save(tmp_path / "m")
    for one in (model, ClAM.load(tmp_path / "m")):
        _stream(one, x[500:1500], 100)
        assert one.score(x) > 1.01 * inertia
        assert one.n_clusters_used_ == 4
    # a file keeps the weights of the memories, so one strange batch does not move them far
    model.save(tmp_path / "n")
    for one in (model, ClAM.load(tmp_path / "n")):
        before = one.score(x)
        one.partial_fit(x[:100] + 3)
        assert one.score(x) > 1.1 * before
    with pytest.raises(ValueError, match="features"):
        model.partial_fit(iris)
    model.n_clusters = 5
    with pytest.raises(ValueError, match="n_clusters: expected 4"):
        model.partial_fit(x)


def test_partial_fit_follows_rows_that_move():
    x = _blobs(1000)
    model = _stream(ClAM(4, random_state=0), x, 100)
    moved = x[:100] + 50
    for _ in range(60):
        model.partial_fit(moved)
    assert model.score(moved) > 2 * KMeans(4, random_state=0, n_init=5).fit(moved).score(moved)


def test_partial_fit_with_missing_entries_and_weights():
    x = _blobs(2000)
    x[np.random.default_rng(0).random(x.shape) < 0.2] = np.nan
    x[5] = np.nan
    weight = np.ones(len(x))
    weight[:50] = 0
    model = ClAM(4, random_state=0)
    for start in range(0, len(x), 200):
        part = slice(start, start + 200)
        model.partial_fit(x[part], sample_weight=weight[part])
    whole = ClAM(4, random_state=0).fit(x)
    assert adjusted_rand_score(model.predict(x), whole.labels_) > 0.9
    assert np.isfinite(model.complete(x)).all()


def test_weights_of_batches_have_one_unit():
    """A batch whose weights are a thousandth moves the means as much as before."""
    x = _blobs(1000)
    model = _stream(ClAM(4, random_state=0), x, 100)
    before = model.cluster_centers_.copy()
    model.partial_fit(x[:100] + 3, sample_weight=np.full(100, 1e-3))
    assert np.abs(model.cluster_centers_ - before).max() < 1e-3


def test_blocks_of_a_large_table_have_one_unit(monkeypatch):

    x = _blobs(3000)
    x[::7, 0] = np.nan
    weight = np.where(np.arange(3000) < 1500, 1e-3, 1.0)
    whole = ClAM(4, search_rows=500, **QUICK).fit(x, sample_weight=weight)
    monkeypatch.setattr(_scale, "CHUNK_ENTRIES", 3 * 300)
    parts = ClAM(4, search_rows=500, **QUICK).fit(x, sample_weight=weight)
    np.testing.assert_allclose(parts.cluster_centers_, whole.cluster_centers_, atol=1e-9)


def test_partial_fit_refuses_and_keeps_its_state(iris):
    model = ClAM(3, random_state=0)
    with pytest.raises(ValueError, match="n_samples=2 should be >= n_clusters=3"):
        model.partial_fit(iris[:2])
    assert not hasattr(model, "n_features_in_")
    model.partial_fit(iris)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match="infinity"):
        model.partial_fit(np.full((3, 4), np.inf))
    assert model.__dict__ == before
    with pytest.raises(FloatingPointError, match="another magnitude"):
        model.partial_fit(iris * np.float32(1e37))
    assert model.__dict__ == before
    model.partial_fit(iris[:1])  # fewer rows than clusters are fine later
    fresh = ClAM(3, recipe="paper", n_init=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert np.isfinite(_stream(fresh, iris, 50).cluster_centers_).all()


def test_callbacks_of_partial_fit(iris):
    heard = []

    class BatchRecorder:
        def on_fit_begin(self, estimator):
            heard.append("begin")

        def on_iteration(self, estimator, info):
            heard.append((info["round"], info["epoch"], info["loss"], info["candidates"]))

        def on_fit_end(self, estimator):
            heard.append("end")

    model = ClAM(3, n_init=2, batch_size=30, random_state=0, callbacks=BatchRecorder())
    model.partial_fit(iris[:60]).partial_fit(iris[60:])
    losses = list(model.loss_curve_)
    expected = [(0, epoch, loss, 0) for epoch, loss in enumerate(losses)]
    assert len(expected) == 5
    assert heard == ["begin", *expected[:2], "end", "begin", *expected[2:], "end"]
    stopped = ClAM(3, n_init=2, batch_size=30, random_state=0, callbacks=lambda e, info: True)
    assert stopped.partial_fit(iris).n_iter_ == 1
    assert stopped.partial_fit(iris).n_iter_ == 2

    def fails(estimator, info):
        raise KeyboardInterrupt

    stopped.callbacks = fails
    with pytest.raises(KeyboardInterrupt):
        stopped.partial_fit(iris)
    assert stopped.n_iter_ == 2


def test_callbacks_get_losses_in_units_of_the_data(iris):
    heard = []
    ClAM(3, callbacks=lambda e, info: heard.append(info["loss"]), **QUICK).fit(iris * 64)
    model = ClAM(3, **QUICK).fit(iris * 64)
    np.testing.assert_array_equal(heard, model.loss_curve_)


def test_verbose_partial_fit_has_a_bar(iris, capsys):
    pytest.importorskip("tqdm")
    ClAM(3, n_init=2, batch_size=30, random_state=0, verbose=1).partial_fit(iris)
    output = capsys.readouterr()
    assert "/5 " in output.err
    assert "batch/s" in output.err
    assert output.out == ""
