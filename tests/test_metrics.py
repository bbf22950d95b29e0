# SPDX-License-Identifier: Apache-2.0
"""The silhouette against scikit-learn's, and its memory."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.datasets import load_digits, load_iris
from sklearn.metrics import silhouette_score

from clam_kernels import metrics, testing


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("load", [load_iris, load_digits])
def test_equals_scikit_learns(load, dtype, offset):
    data = load()
    x = (data.data + offset).astype(dtype)
    expected = silhouette_score(x.astype(np.float64), data.target)
    assert metrics.silhouette(x, data.target) == pytest.approx(expected, abs=1e-6)
    tensors = torch.from_numpy(x), torch.from_numpy(data.target)
    assert metrics.silhouette(*tensors) == pytest.approx(expected, abs=1e-6)


def test_any_tile_gives_the_same(monkeypatch):
    data = load_iris()
    whole = metrics.silhouette(data.data, data.target)
    monkeypatch.setattr(metrics, "TILE_ENTRIES", 1000)
    assert metrics.silhouette(data.data, data.target) == pytest.approx(whole, abs=1e-7)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_any_size_of_value(size):
    data = load_iris()
    expected = silhouette_score(data.data, data.target)
    assert metrics.silhouette(data.data * size, data.target) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rows", "far"), [(30, 1e9), (3000, 1e9)])
def test_one_row_far_from_all_others(rows, far):
    x = np.random.default_rng(0).normal(size=(rows, 20))
    x[rows // 2 :] += 4
    x[-1] = far
    labels = np.r_[np.arange(rows - 1) * 2 // rows, 2]
    expected = silhouette_score(x[:-1], labels[:-1])
    # the far row is a cluster of its own and no row's second nearest: its silhouette is 0
    result = metrics.silhouette(x, labels)
    assert result == pytest.approx(expected * (rows - 1) / rows, abs=1e-6)


def test_names_singletons_and_duplicates():
    x = np.array([[0.0], [0.0], [5.0], [5.0], [90.0]])
    labels = np.array([7, 7, -3, -3, 40])
    assert metrics.silhouette(x, labels) == silhouette_score(x, labels)
    assert metrics.silhouette(np.zeros((4, 2)), [0, 0, 1, 1]) == 0.0


def test_labels_of_any_kind():
    data = load_iris()
    expected = metrics.silhouette(data.data, data.target)
    assert metrics.silhouette(data.data, data.target_names[data.target]) == expected
    still = data.target.copy()
    still.flags.writeable = False
    assert metrics.silhouette(data.data, still) == expected
    with pytest.raises(ValueError, match="labels: expected finite"):
        metrics.silhouette(data.data, np.where(data.target, data.target, np.nan))
    with pytest.raises(TypeError, match="X: expected an array or a dense Tensor"):
        metrics.silhouette(sparse.csr_array(data.data), data.target)


def test_a_sample():
    data = load_digits()
    result = metrics.silhouette(data.data, data.target, 900)
    assert result == metrics.silhouette(data.data, data.target, 900)
    assert result != metrics.silhouette(data.data, data.target, 900, random_state=1)
    assert result == pytest.approx(silhouette_score(data.data, data.target), abs=0.02)


@pytest.mark.parametrize(
    ("x", "labels", "size", "text"),
    [
        ([[1.0], [2.0]], [0, 0], None, "expected 2 to 1 clusters among 2 rows, got 1"),
        ([[1.0], [2.0], [3.0]], [0, 1, 2], None, "expected 2 to 2 clusters among 3 rows, got 3"),
        ([[1.0], [2.0], [3.0]], [0, 1], None, r"labels: expected shape \[3\], got \[2\]"),
        ([1.0, 2.0], [0, 1], None, r"X: expected shape \[N, D\] with N, D >= 1, got \[2\]"),
        ([[1.0], [np.nan], [3.0]], [0, 1, 1], None, "X: expected finite values"),
        ([[1.0], [2.0], [3.0]], [0, 1, 1], 9, "sample_size: expected an int from 3 to 3, got 9"),
        ([[1.0], [2.0], [3.0]], [0, 1, 1], True, "sample_size: expected an int from 3 to 3, got T"),
    ],
)
def test_bad_input(x, labels, size, text):
    with pytest.raises(ValueError, match=text):
        metrics.silhouette(x, labels, size)


def test_memory_is_bounded():
    """At 20 000 rows one array of all distances would be 3.2 GB."""
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    assert testing.peak_bytes(lambda: metrics.silhouette(x, labels)) < 150e6


@pytest.mark.slow
def test_memory_of_a_hundred_thousand_rows():
    x = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0)
    assert testing.peak_bytes(lambda: metrics.silhouette(x, labels)) < 500e6


@pytest.mark.parametrize("name", ["X", "labels"])
def test_masked_entries_are_refused(name):
    x, labels = np.arange(8.0).reshape(4, 2), np.array([0, 0, 1, 1])
    arguments = {"X": np.ma.masked_greater(x, 6), "labels": np.ma.masked_equal(labels, 1)}[name]
    text = f"{name}: expected an array without masked entries, got a masked array"
    with pytest.raises(ValueError, match=text):
        metrics.silhouette(*((arguments, labels) if name == "X" else (x, arguments)))
    nothing_hidden = np.ma.masked_array(x, mask=False)
    assert metrics.silhouette(nothing_hidden, labels) == metrics.silhouette(x, labels)


def test_accuracy_is_that_of_the_best_matching():
    rng = np.random.default_rng(0)
    classes, labels = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    best = max(np.mean(np.array(m)[labels] == classes) for m in permutations(range(4)))
    assert metrics.clustering_accuracy(classes, labels) == pytest.approx(best)
    tensors = torch.from_numpy(classes), torch.from_numpy(labels)
    assert metrics.clustering_accuracy(*tensors) == pytest.approx(best)
    names = np.array(["a", "b", "c", "d"])[labels]
    assert metrics.clustering_accuracy(classes, names) == pytest.approx(best)


def test_accuracy_with_other_numbers_of_clusters():
    classes = np.repeat([0, 1], 4)
    assert metrics.clustering_accuracy(classes, np.zeros(8)) == 0.5
    assert metrics.clustering_accuracy(classes, np.arange(8)) == 0.25
    assert metrics.clustering_accuracy(classes, 9 - classes) == 1.0


@pytest.mark.parametrize(
    ("classes", "labels", "words"),
    [
        ([], [], "labels: expected at least one row"),
        ([0, 1], [0], r"classes: expected shape \[1\]"),
        ([0.0, np.nan], [0, 1], "classes: expected finite values"),
    ],
)
def test_accuracy_refuses(classes, labels, words):
    with pytest.raises(ValueError, match=words):
        metrics.clustering_accuracy(classes, labels)
