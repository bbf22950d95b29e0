# SPDX-License-Identifier: Apache-2.0
"""ClAM: data and parameters that it refuses, degenerate data, and fits that stop early."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.preprocessing import StandardScaler

from clam_kernels import ClAM
from clam_kernels.estimators.clam import completion as _completion
from clam_kernels.exceptions import BackendUnavailableError

QUICK = {"n_init": 2, "max_iter": 4, "random_state": 0}


@pytest.fixture(scope="module")
def iris() -> np.ndarray:
    return StandardScaler().fit_transform(load_iris().data)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ([[1.0, np.nan], [2, np.nan], [4, np.nan]], r"in every column, got none in \[1\]"),
        (
            [[1.0, 2], [np.inf, 3], [np.inf, 5]],
            r"infinity: 2 bad entries, the first at row 1, column 0",
        ),
        (np.ma.masked_array(np.eye(3), np.eye(3) > 0), "masked"),
        (np.eye(3) + 1j, "Complex data not supported"),
        ([[1.0, 2], [3, 4]], r"n_samples=2 should be >= n_clusters=3"),
        (np.zeros((0, 2)), r"0 sample\(s\)"),
        (np.zeros((5, 0)), r"0 feature\(s\)"),
        (np.zeros(5), "Expected 2D"),
        (torch.zeros(5), "Expected 2D"),
        (torch.zeros(0, 2), r"0 sample\(s\)"),
        (torch.full((4, 2), torch.nan), r"got none in \[0, 1\]"),
        ([["a", "b"], ["c", "d"], ["e", "f"]], "could not convert string"),
    ],
)
def test_bad_data_is_refused_and_changes_nothing(x: object, text: str, iris: np.ndarray) -> None:
    model = ClAM(3, **QUICK)
    with pytest.raises(ValueError, match=text):
        model.fit(x)
    assert not hasattr(model, "n_features_in_")
    model.fit(iris)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match=text):
        model.fit(x)
    assert model.__dict__ == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_clusters": 0},
        {"n_clusters": 2.5},
        {"n_clusters": True},
        {"recipe": "other"},
        {"init": "pca"},
        {"n_init": 0},
        {"mask_ratio": 1.0},
        {"step": 0.0},
        {"step": 2.5},
        {"beta": -1.0},
        {"beta": np.nan},
        {"learning_rate": 0.0},
        {"select": "best"},
        {"precision": "fast"},
        {"inertia_guard": 0.9},
        {"max_iter": 0},
        {"batch_size": 0},
        {"init": np.zeros((2, 4))},
        {"init": np.full((3, 4), np.nan)},
        {"beta": np.inf},
        {"learning_rate": np.inf},
    ],
    ids=str,
)
def test_bad_parameters_are_refused(iris: np.ndarray, wrong: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong)) + "|initial centers"):
        ClAM(**{**QUICK, "n_clusters": 3, **wrong}).fit(iris)


def test_a_missing_device_raises(iris: np.ndarray) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        ClAM(3, device="cuda", **QUICK).fit(iris)
    with pytest.raises(BackendUnavailableError, match="got 'mps'"):
        ClAM(3, device="mps", **QUICK).fit(iris)
    with pytest.raises(ValueError, match="got 'gpu0'"):
        ClAM(3, device="gpu0", **QUICK).fit(iris)


def test_unfitted(iris: np.ndarray) -> None:
    for method in ("predict", "transform", "predict_proba", "score", "energy", "complete"):
        with pytest.raises(NotFittedError):
            getattr(ClAM(3), method)(iris)


def test_fewer_distinct_rows_than_clusters_warns_and_stays_finite() -> None:
    x = np.repeat(np.eye(2), 5, axis=0)
    with pytest.warns(ConvergenceWarning, match="2 of n_clusters=4"):
        model = ClAM(4, **QUICK).fit(x)
    assert model.n_clusters_used_ == 2
    assert np.isfinite(model.cluster_centers_).all()


@pytest.mark.parametrize("k", [1, 5])
def test_one_cluster_and_one_cluster_for_each_row(k: int) -> None:
    x = np.random.default_rng(0).normal(size=(5, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = ClAM(k, random_state=0).fit(x)
    assert np.isfinite(model.cluster_centers_).all()
    assert model.predict_proba(x).shape == (5, k)


def test_all_rows_equal() -> None:
    with pytest.warns(ConvergenceWarning, match="1 of n_clusters=3"):
        model = ClAM(3, **QUICK).fit(np.full((10, 3), 7.0))
    np.testing.assert_allclose(model.cluster_centers_[model.labels_[0]], 7.0)
    assert np.isfinite(model.cluster_centers_).all()


def test_ctrl_c_leaves_the_estimator_as_it_was(
    iris: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ClAM(3, **QUICK).fit(iris)
    before = dict(model.__dict__)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_completion, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(iris[:, :2])
    assert model.__dict__ == before
    unfitted = ClAM(3)
    with pytest.raises(KeyboardInterrupt):
        unfitted.fit(iris)
    assert not hasattr(unfitted, "cluster_centers_")
    assert not hasattr(unfitted, "n_features_in_")


def test_training_that_diverges_raises(iris: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:

    def explodes(batch: object, memories: torch.Tensor, *_: object) -> torch.Tensor:
        memories.backward(torch.full_like(memories, torch.nan))
        return memories.detach().sum((1, 2)) * np.nan

    monkeypatch.setattr(_completion.Batch, "backward", explodes)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        ClAM(3, recipe="paper", **QUICK).fit(iris)
    # in the default recipe k-means starts and Lloyd's replicas run beside those that train
    assert np.isfinite(ClAM(3, **QUICK).fit(iris).cluster_centers_).all()
