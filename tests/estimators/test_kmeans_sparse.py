# SPDX-License-Identifier: Apache-2.0
"""KMeans on sparse rows: the results of dense rows, without making the rows dense."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from _memory import most_bytes
from scipy import sparse
from sklearn.cluster import KMeans as Peer

from clam_kernels import KMeans, kmeans_assign
from clam_kernels.estimators.common import rows as _rows
from clam_kernels.estimators.common import sparse_rows as _sparse


def _counts(rows: int = 400, features: int = 60, *, seed: int = 0) -> np.ndarray:
    """Small whole numbers, most of them 0: many rows tie, and some are empty."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((rows, features)) < 0.03, rng.integers(1, 4, (rows, features)), 0.0)


def _topics(rows: int, features: int, kind: str = "csr") -> sparse.csr_array:
    """Rows of four kinds, each with nonzero entries among a part of the features."""
    rng = np.random.default_rng(0)
    own = rng.integers(4, size=rows)
    columns = own[:, None] * (features // 4) + rng.integers(features // 4, size=(rows, 20))
    x = sparse.csr_array(
        (rng.random(rows * 20), columns.ravel(), np.arange(rows + 1) * 20), shape=(rows, features)
    )
    x.sum_duplicates()
    return x.asformat(kind)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_labels_are_those_of_dense_rows(metric, dtype, scale):
    x = (_counts() * scale).astype(dtype)
    model = KMeans(12, metric=metric, random_state=0)
    rows = _rows.read_rows(model, sparse.csr_array(x), reset=True)
    rows.frame()
    dense = rows.take(torch.arange(len(x)))
    centroids = dense[torch.arange(0, 360, 30)].clone()
    centroids[5] = centroids[2]  # a copy of a centroid never gets a row
    centroids[7:] += centroids[:5]
    expected, far = kmeans_assign(dense, centroids)
    labels, near = _sparse.assign(rows, centroids, None)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(near, far.double(), rtol=1e-5, atol=1e-6)
    assert not (labels == 5).any()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
@pytest.mark.parametrize("algorithm", ["lloyd", "minibatch"])
@pytest.mark.parametrize("weighted", [False, True])
def test_fits_are_those_of_dense_rows(metric, init, algorithm, weighted):
    x = _topics(900, 80).toarray()
    options = {"metric": metric, "init": init, "algorithm": algorithm, "random_state": 0}
    weight = np.random.default_rng(1).random(900) if weighted else None
    expected = KMeans(6, **options).fit(x, sample_weight=weight)
    model = KMeans(6, **options).fit(sparse.csr_array(x), sample_weight=weight)
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    np.testing.assert_allclose(model.cluster_centers_, expected.cluster_centers_, atol=1e-12)
    assert model.inertia_ == pytest.approx(expected.inertia_, rel=1e-10)
    assert model.n_iter_ == expected.n_iter_
    np.testing.assert_array_equal(model.predict(sparse.csc_array(x)), expected.labels_)
    np.testing.assert_allclose(
        model.transform(sparse.csr_array(x)), expected.transform(x), rtol=1e-9
    )
    score = model.score(sparse.csr_array(x), sample_weight=weight)
    assert score == pytest.approx(expected.score(x, sample_weight=weight), rel=1e-10)


def test_a_fit_is_that_of_scikit_learn():
    x = _topics(2000, 500)
    x.indices, x.indptr = x.indices.astype(np.int32), x.indptr.astype(np.int32)
    ours, theirs = (m(8, n_init=2, random_state=0).fit(x) for m in (KMeans, Peer))
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-10)


@pytest.mark.parametrize("kind", ["int64 indices", "entries twice", "unsorted", "read-only"])
def test_any_csr_matrix_is_accepted_and_not_changed(kind):
    x = _topics(300, 80)
    expected = KMeans(4, random_state=0).fit(x)
    data, indices, ends = x.data.copy(), x.indices.copy(), x.indptr.copy()
    if kind == "int64 indices":
        indices, ends = indices.astype(np.int64), ends.astype(np.int64)
    if kind == "entries twice":
        data, indices, ends = np.repeat(data / 2, 2), np.repeat(indices, 2), ends * 2
    if kind == "unsorted":
        for a, b in itertools.pairwise(ends):
            data[a:b], indices[a:b] = data[a:b][::-1].copy(), indices[a:b][::-1].copy()
    if kind == "read-only":
        data.flags.writeable = False
    table = sparse.csr_array(x.shape)
    table.data, table.indices, table.indptr = data, indices, ends
    before = data.copy(), indices.copy(), ends.copy()
    model = KMeans(4, random_state=0).fit(table)
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    np.testing.assert_array_equal(model.predict(table), expected.labels_)
    for one, other in zip((table.data, table.indices, table.indptr), before, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "k-means++"},
        {"algorithm": "minibatch", "batch_size": 256},
        {"metric": "cosine"},
    ],
    ids=str,
)
def test_no_pass_makes_the_rows_dense(options):
    x = _topics(4000, 40_000)
    plain = {"n_clusters": 4, "init": "random", "n_init": 1, "max_iter": 3, "random_state": 0}
    model = KMeans(**{**plain, **options})

    def run() -> None:
        model.fit(x)
        model.predict(x)
        model.score(x)

    run()
    centroid_bytes = model.cluster_centers_.nbytes
    # a block of dense rows would take 33 MB
    assert most_bytes(run) < 6 * centroid_bytes + 16e6


def test_empty_rows_and_one_cluster():
    x = sparse.csr_array((5, 7))
    x = sparse.csr_array(sparse.vstack([x, sparse.eye_array(7)]))
    for k in (1, 3, 8):
        expected = KMeans(k, random_state=0).fit(x.toarray())
        model = KMeans(k, random_state=0).fit(x)
        np.testing.assert_array_equal(model.labels_, expected.labels_)
        assert model.inertia_ == pytest.approx(expected.inertia_, abs=1e-12)


def test_small_distances_keep_their_digits():
    """Rows of large values close to each other: |x|^2 + |c|^2 - 2 x.c has no correct digit."""
    rng = np.random.default_rng(0)
    x = 1e6 + rng.normal(size=(200, 5)) * 1e-3
    expected = KMeans(3, random_state=0).fit(x)
    model = KMeans(3, init=expected.cluster_centers_, n_init=1, max_iter=1).fit(sparse.csr_array(x))
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    assert model.inertia_ == pytest.approx(expected.inertia_, rel=1e-6)
    distances = model.transform(sparse.csr_array(x))
    np.testing.assert_allclose(distances, expected.transform(x), rtol=1e-4)


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "lil"])
@pytest.mark.parametrize("index", [7, -1])
def test_an_index_outside_the_matrix_is_refused(kind, index):
    """Compiled code of scipy would write outside its array."""
    x = sparse.csr_matrix((np.ones(3), [0, 1, 2], [0, 1, 2, 3]), shape=(3, 5)).asformat(kind)
    if kind == "coo":
        x.col[2] = index
    elif kind == "lil":
        x.rows[2] = [index]
    else:
        x.indices[2] = index
    axis, most = ("row", 2) if kind == "csc" else ("column", 4)
    unit = " of blocks" if kind == "bsr" else ""
    other = "column" if kind == "csc" else "row"
    words = f"X: expected {axis} indices{unit} from 0 to {most}, got {index} in {other} 2"
    with pytest.raises(ValueError, match=words):
        KMeans(2, n_init=1).fit(x)
    model = KMeans(2, n_init=1).fit(np.eye(3, 5))
    for method in (model.predict, model.transform, model.score):
        with pytest.raises(ValueError, match=words):
            method(x)


@pytest.mark.parametrize("ends", [[0, 2, 1, 3], [0, 1, 2, 4], [1, 1, 2, 3], [0, 1, 3]])
def test_an_indptr_that_does_not_rise_to_the_end_is_refused(ends):
    x = sparse.csr_matrix((np.ones(3), [0, 1, 2], [0, 1, 2, 3]), shape=(3, 5))
    x.indptr = np.array(ends, dtype=np.int32)
    with pytest.raises(ValueError, match=r"X: expected an indptr of 4 numbers that rises from 0"):
        KMeans(2, n_init=1).fit(x)


def test_rows_at_their_centroids_are_not_made_dense(monkeypatch):
    """An earlier version took 30 times as long as scikit-learn here."""
    own = np.random.default_rng(0).integers(0, 30, 2000)
    x = sparse.csr_array((np.ones(2000), (np.arange(2000), own)), shape=(2000, 500))
    model = KMeans(30, n_init=1, max_iter=5, random_state=0).fit(x)
    rows = _rows.read_rows(model, x, reset=True)
    rows.frame()
    monkeypatch.setattr(_rows.Rows, "take", None)
    centroids = torch.from_numpy(model.cluster_centers_)
    labels = torch.from_numpy(model.labels_).long()
    assert float(_sparse.pair_distances(rows, centroids, labels).max()) == 0.0
    assert model.inertia_ == 0.0
    far = _sparse.distances(rows, centroids, exact=True)
    assert torch.equal(far, 2.0 - 2.0 * torch.nn.functional.one_hot(labels, 30).double().mT)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-3, 1.0])
def test_distances_of_pairs_are_those_of_differences(metric, dtype, scale, gap):
    """A gap at the nonzero entries of a row and a gap at the others."""
    rng = np.random.default_rng(0)
    x = (_counts() * scale).astype(dtype)
    model = KMeans(12, metric=metric, random_state=0)
    rows = _rows.read_rows(model, sparse.csr_array(x), reset=True)
    rows.frame()
    dense = rows.take(torch.arange(len(x)))
    centroids = dense[:24] + gap * dense.max() * torch.from_numpy(rng.normal(size=(24, 60)) ** 9)
    centroids = centroids.to(dense.dtype)
    labels = torch.arange(len(x)) % 24
    expected = (dense.double() - centroids.double()[labels]).square_().sum(1)
    result = _sparse.pair_distances(rows, centroids, labels)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=0.0)
    assert float(result.sum()) == pytest.approx(float(expected.sum()), rel=1e-12)
    every = _sparse.distances(rows, centroids, exact=True)[labels, torch.arange(len(x))]
    torch.testing.assert_close(every, expected, rtol=1e-8, atol=0.0)


def test_unit_rows_of_float32_are_rounded_alike():
    """Once dense rows were rounded three times, and 17 fits of 20 had other labels."""
    x = sparse.random_array((500, 200), density=0.05, format="csr", dtype=np.float32, rng=0)
    for seed in range(5):
        model = KMeans(8, n_init=1, metric="cosine", random_state=seed)
        labels, inertia = model.fit(x.toarray()).labels_, model.inertia_
        np.testing.assert_array_equal(model.fit(x).labels_, labels)
        assert model.inertia_ == pytest.approx(inertia, rel=1e-6)
    rows = _rows.read_rows(model, x, reset=True, unit_norm=True)
    wide = torch.from_numpy(x.toarray()).double()
    expected = torch.nn.functional.normalize(wide).float()
    assert torch.equal(_sparse.dense(rows), expected)
    assert torch.equal(_rows.normalise_rows(wide.float()), expected)
    assert torch.equal(_rows.normalise_rows(wide.float().mT.contiguous().mT), expected)
