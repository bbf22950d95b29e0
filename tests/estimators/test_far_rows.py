# SPDX-License-Identifier: Apache-2.0
"""One far row or cell beside ordinary rows: the labels, sums and distances of the others do not
change.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.datasets import load_wine
from sklearn.metrics import adjusted_rand_score

from clam_kernels import ClAM, KMeans

QUICK = {"n_init": 8, "max_iter": 10, "random_state": 0}
CASES = [("f4", 1e12), ("f4", 9.97e36), ("f8", 1e12), ("f8", 9.97e36), ("f8", -1e200)]


def _groups() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    return (rng.normal(size=(3, 4)) * 6)[labels] + rng.normal(size=(200, 4)), labels


def _beside(x: np.ndarray, far: float, cell: bool) -> np.ndarray:
    row = np.where(np.arange(x.shape[1]) == 1, far, 0.0) if cell else np.full(x.shape[1], far)
    return np.vstack([x, row.astype(x.dtype)])


@pytest.mark.parametrize(("dtype", "far"), CASES)
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("kind", [ClAM, KMeans])
def test_sums_and_distances_survive(dtype, far, cell, kind):
    x, labels = _groups()
    x = x.astype(dtype)
    alone = kind(3, **QUICK).fit(x)
    both = _beside(x, far, cell)
    model = kind(4, **QUICK).fit(both)
    assert adjusted_rand_score(labels, model.labels_[:-1]) == 1
    assert (model.labels_[:-1] != model.labels_[-1]).all()
    assert model.inertia_ == pytest.approx(alone.inertia_, rel=1e-5)
    assert -model.score(both) == pytest.approx(model.inertia_, rel=1e-5)
    distances = model.transform(both)
    assert distances.dtype == model.cluster_centers_.dtype == x.dtype
    np.testing.assert_array_equal(distances.argmin(1), model.labels_)
    np.testing.assert_allclose(
        np.sort(distances[:-1], 1)[:, 0], alone.transform(x).min(1), rtol=1e-4
    )
    np.testing.assert_array_equal(model.predict(both), model.labels_)
    np.testing.assert_array_equal(model.predict(x), model.labels_[:-1])
    if kind is ClAM:
        gaps = x.copy()
        gaps[::7, 0] = np.nan
        assert np.isfinite(model.complete(gaps)).all()
        assert np.isfinite(model.predict_proba(both)).all()
        assert np.isfinite(model.gap_)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_far_cell_does_not_move_the_frame(dtype, standardize):
    x, _ = _groups()
    gaps = np.where(np.random.default_rng(1).random(x.shape) < 0.1, np.nan, x).astype(dtype)
    gaps[0] = 0.0
    alone = ClAM(3, standardize=standardize, **QUICK).fit(gaps)
    model = ClAM(4, standardize=standardize, **QUICK).fit(_beside(gaps, 1e12, True))
    np.testing.assert_allclose(model.scale_, alone.scale_, rtol=0.02)
    frames = [m._frame for m in (model, alone)]
    means = [f.mean.numpy() * 2.0**f.range for f in frames]
    np.testing.assert_allclose(*means, atol=0.1)
    error = np.square(model.complete(gaps) - x)[np.isnan(gaps)].mean()
    assert error < 1.2 * np.square(alone.complete(gaps) - x)[np.isnan(gaps)].mean()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("at", [20, 250])
def test_batches_survive_a_far_row(dtype, at):
    x, labels = _groups()
    x, labels = np.tile(x, (3, 1)).astype(dtype), np.tile(labels, 3)
    far = x.copy()
    far[at] = 1e12
    model = ClAM(4, n_init=8, random_state=0, batch_size=50)
    for batch in np.array_split(far, 6):
        model.partial_fit(batch)
    assert adjusted_rand_score(labels, model.predict(x)) == 1


def test_two_groups_far_apart_are_no_far_rows():
    """More than a twentieth of a column is not far: the deviation is that of all entries."""
    x, labels = _groups()
    x[labels == 0] += 1e7
    np.testing.assert_allclose(
        ClAM(3, standardize=True, **QUICK).fit(x).scale_, x.std(0) / np.sqrt((x.std(0) ** 2).mean())
    )
    assert adjusted_rand_score(labels, ClAM(3, **QUICK).fit(x).labels_) == 1


def test_a_far_cell_alone_is_no_other_unit():
    x, _ = _groups()
    model = ClAM(4, **QUICK).fit(_beside(x, 1e12, True))
    np.testing.assert_array_equal(model.scale_, 1)
    assert (ClAM(4, **QUICK).fit(_beside(load_wine().data, 1e12, True)).scale_ != 1).any()


# ---- values whose squares overflow ---------------------------------------------------------------

HUGE = (
    r"X: expected values that float64 can square beside each other, got 1e\+290 in row 200, column "
)


@pytest.mark.parametrize(("rows", "cell"), [(1, False), (1, True), (300, False)])
@pytest.mark.parametrize(
    "model",
    [
        KMeans(4, random_state=0),
        KMeans(4, random_state=0, chunk_rows=50),
        KMeans(4, random_state=0, algorithm="minibatch"),
        ClAM(4, **QUICK),
        ClAM(4, standardize=True, **QUICK),
        ClAM(4, standardize=False, **QUICK),
    ],
)
def test_a_huge_value_is_refused(model, rows, cell):
    x, _ = _groups()
    both = _beside(x, 1e290, cell)
    both = np.vstack([both, *[both[-1:]] * (rows - 1)])
    with pytest.raises(ValueError, match=HUGE):
        model.fit(both)
    if isinstance(model, KMeans):
        with pytest.raises(ValueError, match=HUGE):
            model.fit(sparse.csr_matrix(both))
    else:
        with pytest.raises(ValueError, match=HUGE):
            model.partial_fit(both)


@pytest.mark.parametrize("kind", [ClAM, KMeans])
def test_huge_values_are_clustered_if_others_keep_their_digits(kind):
    x, labels = _groups()
    for table in (x * 1e250, x * 1e290):
        assert adjusted_rand_score(labels, kind(3, **QUICK).fit(table).labels_) == 1
    alone = kind(3, **QUICK).fit(x)
    for far in (1e150, 1e250):
        model = kind(4, **QUICK).fit(_beside(x, far, True))
        assert model.inertia_ == pytest.approx(alone.inertia_, rel=1e-5)
    zeros = kind(2, **QUICK).fit(_beside(np.zeros((20, 4)), 1e290, True))
    assert zeros.inertia_ == 0
    assert list(zeros.labels_[:-1]) == [1 - zeros.labels_[-1]] * 20


def test_a_model_refuses_rows_that_it_cannot_tell_apart():
    x, _ = _groups()
    model = KMeans(3, random_state=0).fit(x)
    both = _beside(x, 1e290, True)
    for method in (model.predict, model.transform, model.score):
        with pytest.raises(ValueError, match=HUGE):
            method(both)
    with pytest.raises(ValueError, match=HUGE):
        model.predict(_beside(np.zeros_like(x), 1e290, True))
    np.testing.assert_allclose(model.transform(both[-1:]), 1e290)


def test_a_huge_row_leaves_the_labels_of_others_alone():
    x, _ = _groups()
    model = ClAM(3, **QUICK).fit(x)
    np.testing.assert_array_equal(model.predict(_beside(x, 1e290, True))[:-1], model.labels_)
    with pytest.raises(FloatingPointError, match="another magnitude"):
        ClAM(3, **QUICK).partial_fit(x).partial_fit(_beside(x, 1e290, True))


def test_a_column_of_huge_values_is_standardised():
    x, labels = _groups()
    both = np.vstack([_beside(x, 1e290, True), *[_beside(x[:0], 1e290, True)] * 299])
    model = ClAM(4, **QUICK).fit(both)
    assert adjusted_rand_score([*labels, *[3] * 300], model.labels_) == 1
