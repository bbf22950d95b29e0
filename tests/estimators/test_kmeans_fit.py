# SPDX-License-Identifier: Apache-2.0
"""KMeans: scikit-learn's semantics, exact cases, files, callbacks."""

from __future__ import annotations

import csv
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _datasets import data
from sklearn import datasets
from sklearn.base import clone
from sklearn.cluster import KMeans as Peer
from sklearn.cluster import kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from clam_kernels import KMeans
from clam_kernels.estimators.common import rows as _rows
from clam_kernels.estimators.kmeans import lloyd as _lloyd
from clam_kernels.estimators.kmeans import seeding as _seeding

REFERENCE = Path(__file__).parents[3] / "shared/data/lloyd_reference.tsv"
WEIGHTS = "a row of weight 2 draws k-means++ starts otherwise than two rows do, as in scikit-learn"


def _expected_failures(estimator):
    return {
        "check_sample_weight_equivalence_on_dense_data": WEIGHTS,
        "check_sample_weight_equivalence_on_sparse_data": WEIGHTS,
    }


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([KMeans()], expected_failed_checks=_expected_failures)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


# ---- Lloyd ---------------------------------------------------------------------------------------


def _reference() -> list[dict[str, str]]:
    if not REFERENCE.exists():
        return []
    with REFERENCE.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.skipif(not _reference(), reason="shared/data/lloyd_reference.tsv is not here")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_reference_run(dtype):
    """66 runs of float64 Lloyd by direct differences: equal sizes, iterations and inertia."""
    tolerance, done = {np.float64: 1e-9, np.float32: 2e-6}[dtype], 0
    for row in _reference():
        if dtype is np.float32 and int(row["exact_ties"]) and "digits" not in row["dataset"]:
            continue  # ties in decimal numbers, which rounding to float32 breaks
        x, k = data(row["dataset"]).astype(dtype), int(row["k"])
        start = x[[int(i) for i in row["init_rows"].split()]]
        model = KMeans(k, init=start, n_init=1, tol=0, max_iter=1000).fit(x)
        assert " ".join(map(str, np.bincount(model.labels_, minlength=k))) == row["sizes"], row
        assert model.n_iter_ == int(row["iterations"]), row
        assert model.inertia_ == pytest.approx(float(row["inertia_f64"]), rel=tolerance), row
        done += 1
    assert done == {np.float64: 66, np.float32: 62}[dtype]


def test_a_cluster_without_rows_gets_the_farthest():
    x = np.array([[0.0], [1], [2], [10], [11], [30]])
    for options, iterations in ({"max_iter": 1}, 1), ({"tol": 0}, 2):
        model = KMeans(3, init=np.array([[0.0], [10], [100]]), n_init=1, **options).fit(x)
        assert model.cluster_centers_.ravel().tolist() == [1, 10.5, 30]
        assert model.labels_.tolist() == [0, 0, 0, 1, 1, 2]
        assert model.inertia_ == 2.5
        assert model.n_iter_ == iterations
        assert model.n_relocated_ == 1


def test_rows_all_equal():
    model = KMeans(3, init=np.ones((3, 2)), n_init=1)
    with pytest.warns(ConvergenceWarning, match=r"Number of distinct clusters \(1\)"):
        model.fit(np.ones((5, 2)))
    assert model.labels_.tolist() == [0] * 5
    assert (model.cluster_centers_ == 1).all()
    assert (model.inertia_, model.n_iter_) == (0.0, 1)


def test_weights():
    x = np.array([[0.0], [2], [10]])
    model = KMeans(2, init=np.array([[0.0], [10]]), n_init=1, tol=0)
    model.fit(x, sample_weight=[1, 3, 0])
    assert model.cluster_centers_.ravel().tolist() == [0, 2]
    assert model.labels_.tolist() == [0, 1, 1]
    assert (model.inertia_, model.n_iter_) == (0.0, 2)
    weight = np.array([1, 3, 2, 1, 1, 4])
    y = np.random.RandomState(0).normal(size=(6, 2))
    one = KMeans(2, init=y[:2], n_init=1).fit(y, sample_weight=weight)
    two = KMeans(2, init=y[:2], n_init=1).fit(np.repeat(y, weight, 0))
    np.testing.assert_allclose(one.cluster_centers_, two.cluster_centers_, rtol=1e-12)
    scaled = KMeans(2, init=y[:2], n_init=1).fit(y, sample_weight=4.0 * weight)
    assert np.array_equal(one.cluster_centers_, scaled.cluster_centers_)


@pytest.mark.parametrize("empty", ["relocate", "split", "keep"])
@pytest.mark.parametrize("seed", range(4))
def test_centroids_are_finite_whichever_clusters_become_empty(empty, seed):
    random = np.random.RandomState(seed)
    x = random.randint(0, 3, size=(30, 2)).astype(float)  # at most nine distinct rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(12, init=random.normal(size=(12, 2)), n_init=1, empty=empty).fit(x)
    assert np.isfinite(model.cluster_centers_).all()
    assert (model.predict(x) == model.labels_).all()


def test_sums_brought_up_to_date_are_those_of_all_rows(monkeypatch):
    x = np.random.RandomState(0).normal(size=(3000, 5))
    start = x[:20]
    results = []
    for few in (1e9, 1.0):
        monkeypatch.setattr(_lloyd, "INCREMENTAL_UPDATE_RATIO", few)
        results.append(KMeans(20, init=start, n_init=1, tol=0).fit(x))
    assert results[0].n_iter_ == results[1].n_iter_ > 10
    assert np.array_equal(results[0].labels_, results[1].labels_)
    np.testing.assert_allclose(
        results[0].cluster_centers_, results[1].cluster_centers_, rtol=1e-12, atol=1e-14
    )


def test_stacked_starts_have_the_bits_of_separate_ones():
    x = torch.from_numpy(np.random.RandomState(1).normal(size=(500, 3)))
    rows = _rows.read_rows(KMeans(), x, reset=True)
    rows.frame()
    starts = torch.stack([x[i : i + 4] for i in (0, 9, 50, 300)])
    rule = _lloyd.LloydRule(50, 1e-8, "relocate", None)
    random = np.random.RandomState(0)
    alone = [_lloyd.lloyd(rows, None, one[None], rule, random)[0] for one in starts]
    stacked = _lloyd._Fit(rows, None, starts, rule, random, 0).run()
    for a, b in zip(alone, stacked, strict=True):
        assert a.n_iter == b.n_iter
        assert torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.centroids, b.centroids, rtol=1e-14, atol=1e-14)


# ---- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "k", "seed", "rows"),
    [
        ("iris", 3, 0, [82, 46, 112]),
        ("iris", 3, 1, [62, 0, 77]),
        ("iris", 8, 0, [82, 46, 145, 105, 3, 127, 78, 93]),
        ("digits", 10, 0, [986, 748, 768, 1431, 137, 1507, 817, 230, 465, 1097]),
        ("digits", 10, 1, [749, 0, 326, 967, 44, 367, 553, 145, 1718, 1230]),
    ],
)
def test_scikit_learns_rows(name, k, seed, rows):
    x = data(name)
    table = _rows.read_rows(KMeans(), x, reset=True)
    chosen_rows = _seeding.plus_plus(table, None, k, np.random.RandomState(seed))
    assert np.array_equal(chosen_rows.numpy(), x[rows])
    assert kmeans_plusplus(x, k, random_state=seed)[1].tolist() == rows


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_starts_find_the_blobs(init):
    corners = [[i, j] for i in (0, 5) for j in (0, 5, 10)]
    x, truth = datasets.make_blobs(600, centers=corners, cluster_std=0.3, random_state=3)
    model = KMeans(6, init=init, n_init=10, random_state=0).fit(x)
    assert len(set(zip(model.labels_.tolist(), truth.tolist(), strict=True))) == 6
    again = KMeans(6, init=init, n_init=10, random_state=0).fit(x)
    assert np.array_equal(model.cluster_centers_, again.cluster_centers_)


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_a_row_without_weight_is_no_start(init):
    x = np.random.RandomState(0).normal(size=(60, 3))
    weight = np.ones(60)
    weight[::2] = 0
    rows = _rows.read_rows(KMeans(), x, reset=True)
    starts = _seeding.start(rows, torch.from_numpy(weight), 9, init, np.random.RandomState(0))
    if init != "k-means||":  # which ends at means
        assert all((c == x[1::2]).all(1).any() for c in starts.numpy())
    assert torch.isfinite(starts).all()


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_fewer_distinct_rows_than_centroids(init):
    x = np.repeat(np.arange(3.0)[:, None], 5, 0)
    with pytest.warns(ConvergenceWarning, match="Possibly due to duplicate points"):
        model = KMeans(5, init=init, n_init=2, random_state=0).fit(x)
    assert np.isfinite(model.cluster_centers_).all()
    assert model.inertia_ == 0.0


def test_a_huge_start_takes_the_parallel_one(monkeypatch):
    called = []
    monkeypatch.setattr(_seeding, "GREEDY_WORK", 1.0)
    real = _seeding.parallel
    monkeypatch.setattr(_seeding, "parallel", lambda *a: called.append(1) or real(*a))
    KMeans(3, random_state=0).fit(data("iris"))
    assert called


# ---- algorithms and metrics ----------------------------------------------------------------------


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
@pytest.mark.parametrize(("n", "k", "batch"), [(1000, 50, 8), (300, 200, 16), (50, 50, 10)])
def test_minibatch_gives_all_clusters_where_k_is_above_three_batches(init, n, k, batch):
    x = np.random.default_rng(0).normal(size=(n, 4))
    options = {"algorithm": "minibatch", "batch_size": batch, "init": init, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model = KMeans(k, **options).fit(x)
    assert len(np.unique(model.labels_)) == k
    np.testing.assert_array_equal(model.predict(x), model.labels_)


def test_minibatch_relocates_clusters_without_rows_unless_they_are_kept():
    x = np.random.default_rng(0).normal(size=(60, 4))
    options = {"algorithm": "minibatch", "batch_size": 10, "random_state": 0}
    assert KMeans(50, **options).fit(x).n_relocated_ > 0
    with pytest.warns(ConvergenceWarning, match="empty='keep'"):
        assert KMeans(50, empty="keep", **options).fit(x).n_relocated_ == 0


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_minibatch_draws_its_start_from_rows_with_a_weight(init):
    x = np.random.default_rng(0).normal(size=(5000, 3))
    weight = np.zeros(5000)
    weight[::100] = 1
    options = {"algorithm": "minibatch", "batch_size": 4, "init": init, "random_state": 0}
    model = KMeans(20, **options).fit(x, sample_weight=weight)
    assert len(np.unique(model.labels_[::100])) == 20


@pytest.mark.parametrize("algorithm", ["lloyd", "minibatch"])
def test_random_rows_need_as_many_weights_as_clusters(algorithm):
    x, weight = np.random.default_rng(0).normal(size=(50, 3)), np.zeros(50)
    weight[:4] = 1
    model = KMeans(5, init="random", algorithm=algorithm)
    with pytest.raises(ValueError, match="n_clusters: expected at most 4, the number of rows that"):
        model.fit(x, sample_weight=weight)


def test_minibatch():
    x = data("digits")
    full = KMeans(10, n_init=3, random_state=0).fit(x)
    model = KMeans(10, algorithm="minibatch", random_state=0).fit(x)
    assert model.inertia_ < 1.05 * full.inertia_
    assert (model.predict(x) == model.labels_).all()
    again = KMeans(10, algorithm="minibatch", random_state=0).fit(x)
    assert np.array_equal(model.cluster_centers_, again.cluster_centers_)
    heavy = KMeans(3, algorithm="minibatch", random_state=0, batch_size=64)
    heavy.fit(data("iris"), sample_weight=np.r_[np.zeros(50), np.ones(100)])
    assert heavy.n_iter_ <= 300


def test_cosine():
    x = data("digits")
    model = KMeans(10, metric="cosine", random_state=0).fit(x)
    np.testing.assert_allclose(np.linalg.norm(model.cluster_centers_, axis=1), 1.0, rtol=1e-12)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert (model.labels_ == (unit @ model.cluster_centers_.T).argmax(1)).all()
    expected = (1 - (unit * model.cluster_centers_[model.labels_]).sum(1)).sum()
    assert model.inertia_ == pytest.approx(expected, rel=1e-9)
    assert np.array_equal(model.predict(x * 1e6), model.labels_)
    zero = np.vstack([np.zeros((1, x.shape[1])), x])
    assert KMeans(10, metric="cosine", random_state=0).fit(zero).labels_[0] == 0


def test_cosine_with_rows_of_zeros():
    """Rows of zeros are no start, are not relocated, and do not move a centroid."""
    x = data("iris")
    zeros = np.vstack([np.zeros((40, 4)), x])
    for init in ("k-means++", "k-means||", "random"):
        model = KMeans(3, metric="cosine", random_state=0, init=init).fit(zeros)
        np.testing.assert_allclose(np.linalg.norm(model.cluster_centers_, axis=1), 1.0, rtol=1e-9)
        assert np.unique(model.labels_[40:]).size == 3
        assert (model.labels_[:40] == 0).all()
        assert model.score(zeros) == pytest.approx(model.score(x), rel=1e-9)


def test_split_serves_every_metric_and_weight():
    x = data("iris")
    start = np.array([-x[0], -x[1], x[0]])
    model = KMeans(3, metric="cosine", empty="split", init=start, n_init=1, random_state=0).fit(x)
    assert np.unique(model.labels_).size == 3
    assert model.n_relocated_ > 0
    few = KMeans(3, empty="split", random_state=0).fit(x, sample_weight=np.r_[1, 1, [0] * 148])
    assert np.isfinite(few.cluster_centers_).all()


# ---- files, copies, callbacks --------------------------------------------------------------------


def test_files_pickles_and_clones(tmp_path):
    x = data("iris")
    model = KMeans(3, random_state=0).fit(x)
    model.save(tmp_path / "model.safetensors")
    for other in (KMeans.load(tmp_path / "model.safetensors"), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other.predict(x), model.labels_)
        assert other.inertia_ == model.inertia_
        assert other.get_params() == model.get_params()
    assert not hasattr(clone(model), "cluster_centers_")
    model.set_params(n_clusters=4)
    with pytest.raises(ValueError, match="fit again before saving"):
        model.save(tmp_path / "other.safetensors")


def test_callbacks():
    calls: list[object] = []

    class Recorder:
        def on_fit_begin(self, estimator):
            calls.append("begin")

        def on_iteration(self, estimator, info):
            calls.append(info["iteration"])
            return info["iteration"] == 3

        def on_fit_end(self, estimator):
            calls.append(estimator.n_iter_)

    KMeans(10, random_state=0, tol=0, callbacks=Recorder()).fit(data("digits"))
    assert calls == ["begin", 1, 2, 3, 3]
    moves: list[float] = []
    KMeans(3, random_state=0, callbacks=[lambda e, info: moves.append(info["shift"])]).fit(
        data("iris")
    )
    assert moves[-1] < moves[0]
    starts: list[int] = []

    def stop(estimator, info):
        starts.append(info["start"])
        with pytest.raises(NotFittedError):
            estimator.predict(data("iris"))
        return np.True_

    KMeans(3, n_init=5, random_state=0, callbacks=stop).fit(data("iris"))
    assert starts == [0]
    with pytest.raises(TypeError, match="X: expected a dense tensor"):
        KMeans(3).fit(torch.eye(4).to_sparse())


def test_nothing_is_printed_unless_verbose(capsys):
    x = data("iris")
    KMeans(3, random_state=0).fit(x)
    assert capsys.readouterr() == ("", "")
    KMeans(3, random_state=0, verbose=1).fit(x)
    assert "Iteration 0, inertia" in capsys.readouterr().out


@pytest.mark.parametrize("k", [2, 5, 20])
def test_no_worse_than_scikit_learn(k):
    x = data("digits")
    ours = KMeans(k, random_state=0).fit(x)
    peer = Peer(k, random_state=0).fit(x)
    assert ours.inertia_ == pytest.approx(peer.inertia_, rel=1e-6)


def test_data_is_not_copied():
    """Except for labels and scratch, a fit allocates no array of the size of X."""
    from clam_kernels import testing

    x = torch.randn(200_000, 64, generator=torch.Generator().manual_seed(0))
    model = KMeans(8, init=x[:8], n_init=1, max_iter=2)
    assert testing.peak_bytes(lambda: model.fit(x)) < 0.6 * x.numel() * 4


def test_a_cluster_without_rows_is_named_in_a_warning():
    init = np.array([[0.0], [1.0], [99.0]])
    with pytest.warns(ConvergenceWarning, match="empty='keep' leaves a cluster without rows"):
        KMeans(3, init=init, empty="keep").fit([[0.0], [0.2], [1.0], [1.1]])


def test_init_of_another_rank_says_its_shape():
    with pytest.raises(ValueError, match=r"init: expected numbers \[K, D\], got ndarray \[3\]"):
        KMeans(3, init=np.zeros(3)).fit(np.eye(4))


@pytest.mark.parametrize("empty", ["relocate", "split", "keep"])
def test_a_lost_cluster_in_one_pass(monkeypatch, empty):
    x = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [30.0]])
    options = {"init": np.array([[0.0], [10.0], [100.0]]), "tol": 0, "random_state": 0}
    fits = []
    for one_pass in (False, True):
        monkeypatch.setattr(_lloyd._Fit, "in_one_pass", one_pass)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fits.append(KMeans(3, n_init=1, empty=empty, **options).fit(x))
    np.testing.assert_array_equal(fits[0].cluster_centers_, fits[1].cluster_centers_)
    assert fits[0].n_relocated_ == fits[1].n_relocated_
    if empty == "relocate":
        assert sorted(fits[1].cluster_centers_[:, 0]) == [1.0, 10.5, 30.0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_labels_and_sums_in_one_pass(monkeypatch, weighted, offset):
    """As on a GPU: several starts, some end before others, and clusters lose all rows."""
    rng = np.random.RandomState(0)
    x = rng.randn(400, 3) + offset
    weight = rng.rand(400) if weighted else None
    options = {"n_clusters": 30, "init": "random", "n_init": 4, "random_state": 0}
    two = KMeans(**options).fit(x, sample_weight=weight)
    monkeypatch.setattr(_lloyd._Fit, "in_one_pass", True)
    one = KMeans(**options).fit(x, sample_weight=weight)
    assert np.array_equal(one.labels_, two.labels_)
    assert one.n_iter_ == two.n_iter_
    np.testing.assert_allclose(one.cluster_centers_, two.cluster_centers_, rtol=1e-12)
    assert one.inertia_ == pytest.approx(two.inertia_, rel=1e-12)
