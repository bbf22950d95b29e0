# SPDX-License-Identifier: Apache-2.0
"""Values that are no numbers, or that float64 would round, are refused with the name of their
column.
"""

from __future__ import annotations

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from scipy import sparse
from sklearn.base import clone

from clam_kernels import ClAM, KMeans, plots
from clam_kernels.estimators.common import rows as _rows

ROWS = 8
FLOATS = np.linspace(0, 1, ROWS)
DAYS = pd.Series(pd.date_range("2020-01-01", periods=ROWS))
GAPS = DAYS.where(DAYS.index != 3)
LARGE = 2**53 + 1 + 2 * np.arange(ROWS)
ESTIMATORS = [ClAM(2, n_init=1, max_iter=1, random_state=0), KMeans(2, n_init=1, random_state=0)]

DATES = {
    "dates": GAPS,
    "dates with a zone": DAYS.dt.tz_localize("UTC"),
    "durations": GAPS - DAYS[0],
    "periods": DAYS.dt.to_period("D"),
    "dates of Python": [datetime.datetime(2020, 1, 1)] * ROWS,
    "dates as objects": pd.Series(list(GAPS), dtype=object),
    "dates of numpy as objects": pd.Series(list(GAPS.to_numpy()), dtype=object),
    "durations of numpy as objects": pd.Series(list((GAPS - DAYS[0]).to_numpy()), dtype=object),
    "a missing date among numbers": pd.Series([1, pd.NaT] * (ROWS // 2), dtype=object),
    "complex numbers of numpy as objects": pd.Series(list(FLOATS + 1j), dtype=object),
    "dates of Arrow": GAPS.astype("timestamp[ns][pyarrow]"),
}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kind", DATES)
def test_a_column_that_is_no_number_is_refused_by_name(estimator, kind):
    column = pd.Series(DATES[kind])
    for frame in (pd.DataFrame({"a": FLOATS, "when": column}), pd.DataFrame({"when": column})):
        with pytest.raises(TypeError, match="X: expected numbers in column 'when', got"):
            estimator.fit(frame)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("array", [GAPS.to_numpy(), (GAPS - DAYS[0]).to_numpy()], ids=["M", "m"])
def test_arrays_of_dates_are_refused(estimator, array):
    x = np.stack([array, array], 1)
    with pytest.raises(TypeError, match="X: expected numbers, got dtype"):
        estimator.fit(x)
    x_object = np.stack([FLOATS, FLOATS], 1).astype(object)
    x_object[5, 1] = array[3]
    with pytest.raises(TypeError, match=r"X: expected numbers in column 1, got .*NaT.* in row 5"):
        estimator.fit(x_object)
    fine = np.stack([FLOATS, FLOATS], 1)
    with pytest.raises(TypeError, match="sample_weight: expected numbers, got dtype"):
        estimator.fit(fine, sample_weight=array)


def test_starts_and_pictures_of_dates_are_refused():
    fine, dates = np.stack([FLOATS, FLOATS], 1), np.stack([GAPS, GAPS], 1)
    with pytest.raises(TypeError, match="init: expected numbers, got dtype"):
        ClAM(2, init=dates[:2]).fit(fine)
    with pytest.raises(ValueError, match="init: expected numbers"):
        KMeans(2, init=dates[:2]).fit(fine)
    with pytest.raises(TypeError, match="X: expected numbers, got dtype"):
        plots.plot_clusters(dates, [0, 1] * (ROWS // 2))


def test_a_date_in_new_rows_is_refused():
    x = pd.DataFrame({"a": FLOATS, "b": FLOATS})
    model = ClAM(2, n_init=1, max_iter=1, random_state=0).fit(x)
    with pytest.raises(TypeError, match="column 'b'"):
        model.complete(x.assign(b=GAPS))


INTEGERS = {
    "numpy": LARGE,
    "numpy, unsigned": LARGE.astype(np.uint64) + np.uint64(2**63),
    "nullable": pd.array(list(LARGE), dtype="Int64"),
    "nullable with a gap": pd.array([None, *LARGE[1:]], dtype="Int64"),
    "Arrow with a gap": pd.Series([None, *LARGE[1:].tolist()], dtype="int64[pyarrow]"),
    "objects": pd.Series(LARGE.tolist(), dtype=object),
    "objects beyond 64 bits": pd.Series([2**70 + 1] * ROWS, dtype=object),
    "categories": pd.Categorical(LARGE),
}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_that_float64_rounds_are_refused_by_name(estimator, kind):
    frame = pd.DataFrame({"a": FLOATS, "id": INTEGERS[kind]})
    with pytest.raises(ValueError, match=r"X: expected integers .* in column 'id', row [01]"):
        estimator.fit(frame)


@pytest.mark.parametrize(
    "container",
    [
        lambda x: x,
        lambda x: x.tolist(),
        lambda x: x.astype(">i8"),
        lambda x: np.asfortranarray(x),
        torch.from_numpy,
        lambda x: x.astype(object),
        sparse.csr_array,
    ],
    ids=["array", "list", "big-endian", "Fortran", "tensor", "objects", "sparse"],
)
def test_integers_of_arrays_are_refused_by_place(container):
    x = np.zeros((ROWS, 3), dtype=np.int64)
    x[5, 1] = -(2**53) - 1
    with pytest.raises(ValueError, match=f"got {-(2**53) - 1} in column 1, row 5"):
        KMeans(2, n_init=1).fit(container(x))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kind", ["<i8", ">i8", "<u8"])
def test_integers_of_a_memory_map_are_refused_by_place(estimator, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(_rows, "BLOCK_ENTRIES", 6)  # two rows
    x = np.arange(ROWS * 3).reshape(ROWS, 3).astype(kind)
    np.save(tmp_path / "small.npy", x)
    x[5, 1] = 2**53 + 1
    np.save(tmp_path / "big.npy", x)
    model = clone(estimator).fit(np.load(tmp_path / "small.npy", mmap_mode="r"))
    words = rf"X: expected integers .* got {2**53 + 1} in column 1, row 5"
    for method in (clone(estimator).fit, model.predict):
        with pytest.raises(ValueError, match=words):
            method(np.load(tmp_path / "big.npy", mmap_mode="r"))


def test_integers_that_float64_can_represent_are_accepted():
    x = np.array([[2**53, 2**62], [-(2**53) - 2, -(2**63)], [0, 1]])
    model = KMeans(3, n_init=1, random_state=0).fit(x)
    assert sorted(map(tuple, model.cluster_centers_)) == sorted(map(tuple, x.astype(float)))
    assert KMeans(2, n_init=1).fit(abs(x[:, :1]).astype(np.uint64)).n_features_in_ == 1


def test_numbers_in_other_columns_are_read():
    frame = pd.DataFrame(
        {
            "object": pd.Series([1, 2.5, None, pd.NA] * 2, dtype=object),
            "decimal": [Decimal(i) for i in range(ROWS)],
            "text": [str(i) for i in range(ROWS)],
            "truth": pd.array([True, None] * (ROWS // 2), dtype="boolean"),
            "nullable": pd.array([None, *range(1, ROWS)], dtype="Int64"),
            "category": pd.Categorical([3, 1] * (ROWS // 2)),
        }
    )
    nan = np.nan
    expected = np.array(
        [[1, 2.5, nan, nan] * 2, range(ROWS), range(ROWS), [1, nan] * 4, [nan, *range(1, 8)],
         [3, 1] * 4]
    ).T  # fmt: skip
    model = ClAM(2, n_init=1, max_iter=2, random_state=0).fit(frame)
    plain = ClAM(2, n_init=1, max_iter=2, random_state=0).fit(expected)
    np.testing.assert_array_equal(model.cluster_centers_, plain.cluster_centers_)
    assert list(model.feature_names_in_) == list(frame.columns)
    assert frame["object"].isna().sum() == 4
    assert frame["object"].dtype == object


def test_text_is_refused_with_column_row_and_value():
    frame = pd.DataFrame({"a": FLOATS, "word": ["1", "x"] * (ROWS // 2)})
    for column in (frame["word"], frame["word"].astype("category"), frame["word"].astype("string")):
        with pytest.raises(
            ValueError, match="X: expected numbers in column 'word', got 'x' in row 1"
        ):
            ClAM(2).fit(frame.assign(word=column))
    with pytest.raises(ValueError, match="column 'c', got dtype complex128: Complex data not supp"):
        KMeans(2).fit(pd.DataFrame({"a": FLOATS, "c": FLOATS + 1j}))


@pytest.mark.parametrize("values", [DAYS.tolist(), [*LARGE[:-1].tolist(), None]])
def test_tables_of_arrow_are_checked(values):
    with pytest.raises((TypeError, ValueError), match="in column 'b'"):
        KMeans(2).fit(pa.table({"a": FLOATS, "b": values}))
