# SPDX-License-Identifier: Apache-2.0
"""Clusters that share a class are joined and clusters of two classes are divided, by the graph of
nearest rows; and the rounds of a fit repeat and resume.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clam_kernels import DEC, metrics
from clam_kernels.estimators.dec.regroup import (
    best_division,
    boundary_depth,
    neighbour_graph,
    normalised_cuts,
    regroup,
)

SIZE = 500


def blobs(centres: list[list[float]]) -> tuple[torch.Tensor, np.ndarray]:
    """SIZE rows of deviation 1 around each centre, and their classes."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(len(centres)), SIZE)
    return torch.from_numpy(np.array(centres)[y] + rng.normal(size=(len(y), 2))), y


def test_graph_equals_that_of_all_distances():
    z, _ = blobs([[0, 0], [5, 0]])
    far = torch.cdist(z, z).fill_diagonal_(torch.inf)
    ends = far.topk(15, largest=False).indices.numpy()
    expected = np.zeros((len(z), len(z)))
    np.put_along_axis(expected, ends, 1.0, axis=1)
    np.testing.assert_array_equal(neighbour_graph(z, []).toarray(), (expected + expected.T) / 2)


def test_a_draw_brings_rows_near():
    """A row of the first class whose draw lies in the second class has its neighbours there."""
    z, _ = blobs([[0, 0], [50, 0]])
    draw = z.clone()
    draw[0] = z[SIZE]
    assert neighbour_graph(z, [])[0, SIZE:].sum() == 0
    assert neighbour_graph(z, [draw])[0, SIZE:].sum() > 0


def test_depths_tell_a_gap_from_none():
    z, y = blobs([[0, 0], [6, 0]])
    graph = neighbour_graph(z, [])
    assert boundary_depth(graph, y == 0) < 0.2
    assert boundary_depth(graph, z[:, 1].numpy() > 0) > 0.7
    across = (z[:, 1].numpy() > 0).astype(np.int64)
    gap, cut = (normalised_cuts(graph, labels, 2) for labels in (y, across))
    assert gap[0, 1] < cut[0, 1]
    assert normalised_cuts(graph, y, 3)[0, 2] == 2.0, "a cluster without rows"
    assert best_division(graph).depth < 0.2
    division = best_division(graph)
    assert metrics.clustering_accuracy(y, division.side.astype(np.int64)) > 0.99
    np.testing.assert_array_equal(best_division(graph).side, division.side, "it repeats")
    one = neighbour_graph(blobs([[0, 0]])[0], [])
    assert best_division(one).depth > 0.5


def test_a_class_in_two_clusters_and_two_classes_in_one():
    z, y = blobs([[0, 0], [8, 0], [0, 8]])
    wrong = np.where(y == 2, 1, y)  # classes 1 and 2 share a cluster
    wrong[(y == 0) & (z[:, 1].numpy() > 0)] = 2  # class 0 has two
    graph = neighbour_graph(z, [])
    labels, moves = regroup(graph, wrong, 3)
    assert moves == 1
    assert metrics.clustering_accuracy(y, labels) > 0.99
    assert regroup(graph, labels, 3)[1] == 0
    assert wrong.max() == 2, "the labels of the caller do not change"


def test_two_classes_cut_across():
    z, y = blobs([[0, 0], [8, 0]])
    labels, moves = regroup(neighbour_graph(z, []), (z[:, 1].numpy() > 0).astype(np.int64), 2)
    assert moves == 1
    assert metrics.clustering_accuracy(y, labels) > 0.99


@pytest.mark.parametrize("k", [1, 2])
def test_few_rows_and_one_cluster_have_no_moves(k):
    z = blobs([[0, 0]])[0][:20]
    assert regroup(neighbour_graph(z, []), np.arange(20) % k, k)[1] == 0


def of_unequal_sizes() -> tuple[np.ndarray, np.ndarray]:
    """One wide class and two small ones near each other: k-means divides the wide one."""
    rng = np.random.default_rng(0)
    parts = [(0, 0, 3, 800), (30, 0, 1, 100), (30, 7, 1, 100)]
    x = [rng.normal((a, b, 0, 0, 0), deviation, (n, 5)) for a, b, deviation, n in parts]
    y = np.repeat(np.arange(3), [rows for *_, rows in parts])
    return np.concatenate(x).astype(np.float32), y


def identity() -> nn.Module:
    layer = nn.Linear(5, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(5))
        layer.bias.zero_()
    return layer


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning", "ignore:DEC. ")
def test_rounds_of_a_fit_resume(tmp_path: Path):
    """A fit of two rounds finds what k-means does not, and resumes in its second round."""
    x, y = of_unequal_sizes()
    settings = {
        "encoder": identity(), "pretrain": "none", "n_epochs": 3, "regroup": True,
        "random_state": 0, "learning_rate": 1e-4,
    }  # fmt: skip
    whole = DEC(3, **settings).fit(x)
    assert whole.n_rounds_ == 2
    plain = DEC(3, **{**settings, "regroup": False}).fit(x)
    assert plain.n_rounds_ == 1
    before, after = (metrics.clustering_accuracy(y, m.labels_) for m in (plain, whole))
    assert before < 0.7 < 0.95 < after
    np.testing.assert_array_equal(plain.init_labels_, whole.init_labels_)
    calls = []

    def stop(model: DEC, info: dict) -> None:
        calls.append(info)
        if len(calls) == 5:
            raise KeyboardInterrupt

    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        DEC(3, callbacks=stop, **settings).fit(x, checkpoint=path)
    for _ in range(2):  # from the middle, and from the end
        model = DEC(3, **settings).fit(x, checkpoint=path, resume=True)
        assert model.n_rounds_ == 2
        for name in ("labels_", "cluster_centers_", "init_labels_"):
            np.testing.assert_array_equal(getattr(model, name), getattr(whole, name))
    model.save(tmp_path / "file")
    assert DEC.load(tmp_path / "file", encoder=identity()).n_rounds_ == 2
