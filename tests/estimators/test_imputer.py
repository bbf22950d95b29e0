# SPDX-License-Identifier: Apache-2.0
"""Completed tables keep names, index and dtypes; ClAM fills gaps as a step of a Pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from clam_kernels import ClAM, ClAMImputer, KMeans

QUICK: dict[str, Any] = {"n_init": 2, "max_iter": 3, "random_state": 0}
WHY = "a row of weight 2 draws k-means++ starts otherwise than two shuffled rows do"
FAILURES = {f"check_sample_weight_equivalence_on_{kind}_data": WHY for kind in ("dense", "sparse")}
X = load_iris().data


@pytest.fixture
def frame() -> pd.DataFrame:
    """Columns of four dtypes, two with gaps, and an index of their own."""
    table = pd.DataFrame(X, columns=["a", "b", "c", "d"], index=[f"row {i}" for i in range(150)])
    table["count"] = np.arange(150, dtype=np.int16)
    table["nullable"] = pd.array([None, *range(149)], dtype="Int64")
    table["whole"] = pd.array(range(150), dtype="Int64")
    return table.mask(np.arange(150)[:, None] % 10 == np.array([0, 99, 3, 99, 99, 99, 99])).astype(
        {"count": np.int16}
    )


@pytest.mark.filterwarnings("ignore:.*clusters are used:sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [ClAMImputer(n_init=2, max_iter=3)], expected_failed_checks=lambda _: FAILURES
)
def test_scikit_learn_checks(estimator: ClAMImputer, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("kind", [ClAM, ClAMImputer])
def test_completed_frames_keep_names_index_and_dtypes(kind: type[ClAM], frame) -> None:
    plain = kind(3, **QUICK).fit(frame)
    model = clone(plain).set_output(transform="pandas").fit(frame)
    filled = model.complete(frame)
    assert list(filled.columns) == list(frame.columns)
    assert filled.index.equals(frame.index)
    assert filled.isna().sum().sum() == 0
    for name in ("b", "d", "count", "whole"):
        pd.testing.assert_series_equal(filled[name], frame[name])
    gaps = frame.isna()
    for name in ("a", "c", "nullable"):
        assert filled[name].dtype == np.float64
        observed = frame[name][~gaps[name]].astype(float)
        np.testing.assert_array_equal(filled[name][~gaps[name]], observed)
    array = plain.complete(frame)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(filled.astype(float), array)
    one = model.complete(frame.iloc[[7]])
    assert list(one.index) == ["row 7"]


def test_arrays_become_frames_and_tensors_stay() -> None:
    gaps = X.copy()
    gaps[::7, 1] = np.nan
    model = ClAM(3, **QUICK).set_output(transform="pandas").fit(gaps)
    assert list(model.complete(gaps).columns) == ["x0", "x1", "x2", "x3"]
    assert isinstance(model.complete(torch.from_numpy(gaps)), torch.Tensor)


@pytest.mark.parametrize(
    "names",
    [range(4), [0.5, 1.5, 2.5, 3.5], pd.MultiIndex.from_product([["a", "b"], [1, 2]])],
    ids=["integers", "floats", "levels"],
)
@pytest.mark.parametrize("kind", [ClAM, ClAMImputer])
def test_names_that_are_not_strings_become_scikit_learns_names(kind: type[ClAM], names) -> None:
    table = pd.DataFrame(X, columns=names, index=range(5, 155))
    table.isetitem(3, np.arange(150, dtype=np.int16))
    table.iloc[::7, 1] = np.nan
    model = kind(3, **QUICK).set_output(transform="pandas").fit(table)
    filled = model.complete(table)
    assert list(filled.columns) == ["x0", "x1", "x2", "x3"]
    assert list(filled.dtypes) == list(table.dtypes)
    assert filled.index.equals(table.index)
    array = clone(model).set_output(transform="default").fit(table.to_numpy()).complete(table)
    np.testing.assert_array_equal(filled, array)
    if kind is ClAMImputer:
        pd.testing.assert_frame_equal(clone(model).fit_transform(table), filled)
    other = model.fit(table.to_numpy()).complete(table)
    pd.testing.assert_frame_equal(other, filled)


@pytest.mark.parametrize("names", [["a", "b", "a", "c"], [0, 0, 0, 1]])
@pytest.mark.parametrize("model", [ClAMImputer(3, **QUICK), KMeans(3)])
def test_columns_with_equal_names_are_refused(model, names) -> None:
    text = f"X: expected columns of different names, got {names[0]!r} {names.count(names[0])} times"
    with pytest.raises(ValueError, match=text):
        model.fit(pd.DataFrame(X, columns=names))


def test_the_imputer_is_a_step_of_a_pipeline(frame) -> None:
    target = load_iris().target
    steps = make_pipeline(
        StandardScaler(), ClAMImputer(8, **QUICK), LogisticRegression(max_iter=1000)
    )
    assert cross_val_score(steps, frame[["a", "b", "c", "d"]], target, cv=3).mean() > 0.85
    two = make_pipeline(ClAMImputer(8, **QUICK), StandardScaler()).set_output(transform="pandas")
    out = two.fit_transform(frame)
    assert list(out.columns) == list(frame.columns) == list(two.get_feature_names_out())
    assert out.index.equals(frame.index)
    assert two[0].get_params()["n_clusters"] == 8


def test_the_imputer_completes_as_clam_does(frame, tmp_path: Path) -> None:
    gaps = frame[["a", "b", "c", "d"]].to_numpy()
    clam, imputer = (kind(3, **QUICK) for kind in (ClAM, ClAMImputer))
    expected = clam.fit(gaps).complete(gaps)
    np.testing.assert_array_equal(imputer.fit_transform(gaps), expected)
    np.testing.assert_array_equal(imputer.labels_, clam.labels_)
    imputer.save(tmp_path / "m")
    again = ClAMImputer.load(tmp_path / "m")
    np.testing.assert_array_equal(again.transform(gaps), expected)
    assert again.get_feature_names_out().tolist() == ["x0", "x1", "x2", "x3"]
