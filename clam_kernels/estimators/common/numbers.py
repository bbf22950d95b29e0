# SPDX-License-Identifier: Apache-2.0
"""Checks of a data matrix before scikit-learn converts it: float64 can hold every entry.

A conversion to float64 turns a missing date into -9.2e18 and rounds integers beyond 2^53. The
checks raise for both, and for other entries that are no numbers; the error names column and row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import sparse
from torch import Tensor

from ...tables._numbers import first_rounded

DATES = "convert dates and durations to numbers first, or leave them out"
AXES = ("row", "column")
# Scalars of numpy that `float` converts, although they are no real numbers.
NO_NUMBERS = (np.datetime64, np.timedelta64, np.complexfloating)
# Types of entries that float64 holds without a check.
PLAIN = {float, bool, type(None), np.float64, np.float32, np.bool_}


def as_numbers(name: str, x: Any) -> Any:
    """`x` for a conversion by scikit-learn; an error for entries that float64 cannot hold.

    A list becomes an array, and NA among objects becomes NaN. Text stays: the conversion reads
    numbers in it, and raises for other text.
    """
    if sparse.issparse(x):
        return _checked_sparse(name, x)
    if isinstance(x, Tensor):
        _check_array(name, x.detach().cpu().numpy() if _is_wide(x) else np.empty(0))
        return x
    if hasattr(x, "columns") and not isinstance(x, np.ndarray):
        return _checked_frame(name, x)
    if isinstance(x, list | tuple):
        try:
            x = np.asarray(x)
        except ValueError:  # lists of several lengths: scikit-learn raises
            return x
    return _check_array(name, x) if isinstance(x, np.ndarray) else x


def refuse_same_names(name: str, x: Any) -> None:
    """ValueError for a data frame with two columns of the same name."""
    if not hasattr(x, "columns") or isinstance(x, np.ndarray):
        return
    labels = list(getattr(x, "column_names", x.columns))
    label, count = max(Counter(labels).items(), key=lambda item: item[1], default=(None, 0))
    if count > 1:
        raise ValueError(
            f"{name}: expected columns of different names, got {label!r} {count} times"
        )


def _is_wide(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex()) and x.element_size() == 8


def _checked_sparse(name: str, x: Any) -> Any:
    """A sparse matrix, whose indices are checked: compiled code writes at them."""
    if x.ndim != 2:
        return x  # scikit-learn raises
    if x.format not in ("csr", "csc", "bsr", "coo"):
        x = x.tocsr()
    if x.format == "coo":
        for axis, indices in zip(AXES, (x.row, x.col), strict=True):
            _check_indices(name, x, axis, indices)
    else:
        _check_compressed(name, x)
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8:
        entries = x.tocoo()
        place = first_rounded(entries.data)
        if place is not None:
            row, column = int(entries.row[place]), int(entries.col[place])
            raise _rounding_error(name, column, row, entries.data[place])
    return x


def _check_compressed(name: str, x: Any) -> None:
    block = x.blocksize if x.format == "bsr" else (1, 1)
    major, minor = (1, 0) if x.format == "csc" else (0, 1)
    ends, most = x.indptr, min(len(x.indices), len(x.data))
    rising = len(ends) == x.shape[major] // block[major] + 1 and ends[0] == 0
    if not rising or ends[-1] > most or bool((ends[1:] < ends[:-1]).any()):
        raise ValueError(
            f"{name}: expected an indptr of {x.shape[major] // block[major] + 1} numbers that rises"
            f" from 0 to at most {most}, the number of entries, got {ends}"
        )
    _check_indices(name, x, AXES[minor], x.indices[: ends[-1]], block[minor])


def _check_indices(name: str, x: Any, axis: str, indices: np.ndarray, block: int = 1) -> None:
    size = x.shape[AXES.index(axis)] // block
    if not len(indices) or (indices.min() >= 0 and indices.max() < size):
        return
    place = int(((indices < 0) | (indices >= size)).argmax())
    if x.format == "coo":
        number = int((x.col if axis == "row" else x.row)[place])
    else:
        number = int(np.searchsorted(x.indptr, place, side="right")) - 1
    other = AXES[1 - AXES.index(axis)]
    unit = " of blocks" if x.format == "bsr" else ""
    raise ValueError(
        f"{name}: expected {axis} indices{unit} from 0 to {size - 1}, got {int(indices[place])} in"
        f" {other} {number}{unit}"
    )


def check_integers(name: str, x: Any, first_row: int = 0) -> None:
    """ValueError for an integer of an array [N, D] that float64 rounds; rows count from
    `first_row`.
    """
    place = first_rounded(x)
    if place is not None:
        row, *rest = (int(i) for i in np.unravel_index(place, x.shape))
        column = rest[0] if len(rest) == 1 else None
        raise _rounding_error(name, column, first_row + row, x.flat[place])


def _check_array(name: str, x: np.ndarray) -> np.ndarray:
    if x.dtype.kind in "mM":
        raise TypeError(f"{name}: expected numbers, got dtype {x.dtype}; {DATES}")
    if x.dtype.kind == "O" and x.ndim == 2:
        columns = [_checked_objects(name, j, column) for j, column in enumerate(x.T)]
        return x if all(column is None for column in columns) else _without_na(x)
    if x.size:
        check_integers(name, x)
    return x


def _checked_frame(name: str, x: Any) -> Any:
    """A data frame of pandas, polars or pyarrow; columns of floats need no check."""
    names = list(getattr(x, "column_names", x.columns))
    types = list(getattr(x, "dtypes", [None] * len(names)))
    replaced = {}
    for i, (label, dtype) in enumerate(zip(names, types, strict=True)):
        kind = getattr(dtype, "kind", "O")
        if kind in "fb":
            continue
        if kind in "mM":
            raise _no_numbers(name, label, dtype)
        column = x.iloc[:, i] if hasattr(x, "iloc") else x[label]
        numbers = _checked_column(name, label, column)
        if numbers is not None:
            replaced[i] = numbers
    if replaced:  # only pandas has NA
        x = x.copy(deep=False)
        for i, numbers in replaced.items():
            x.isetitem(i, numbers)
    return x


def _checked_column(name: str, label: Any, column: Any) -> np.ndarray | None:
    """The numbers of a column of objects with NA; None if the column needs no change."""
    values = np.asarray(column)
    if values.dtype.kind == "f" and np.isnan(values).any():
        # integers with missing values, which are floats here and may be rounded
        fill = getattr(column, "fill_null", None) or column.fillna
        values = np.asarray(fill(0))
    if values.dtype.kind in "mM":
        raise _no_numbers(name, label, values.dtype)
    if values.dtype.kind == "c":
        raise ValueError(
            f"{name}: expected real numbers in column {label!r}, got dtype {values.dtype}: Complex"
            " data not supported"
        )
    if values.dtype.kind in "OSTU":
        return _checked_objects(name, label, values.astype(object))
    row = first_rounded(values)
    if row is not None:
        raise _rounding_error(name, label, row, values[row])
    return None


def _checked_objects(name: str, label: Any, values: Iterable[Any]) -> np.ndarray | None:
    """The values as float64 where some are NA, else None."""
    values = np.asarray(values)
    if set(map(type, values)) <= PLAIN:
        return None
    has_na = False
    for row, value in enumerate(values):
        if _is_na(value):
            has_na = True
        elif type(value) not in PLAIN:
            _check_object(name, label, row, value)
    return _without_na(values).astype(np.float64) if has_na else None


def _check_object(name: str, label: Any, row: int, value: Any) -> None:
    where = f"{name}: expected numbers in column {label!r}, got {value!r} in row {row}"
    if isinstance(value, NO_NUMBERS):
        raise TypeError(where)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from None
    if isinstance(value, int | np.integer) and int(number) != int(value):
        raise _rounding_error(name, label, row, value)


def _without_na(values: np.ndarray) -> np.ndarray:
    """A copy in which NA of pandas is NaN."""
    copy = values.copy()
    copy[np.frompyfunc(_is_na, 1, 1)(values).astype(bool)] = np.nan
    return copy


def _is_na(value: Any) -> bool:
    return type(value).__name__ == "NAType"


def _no_numbers(name: str, label: Any, dtype: Any) -> TypeError:
    return TypeError(f"{name}: expected numbers in column {label!r}, got dtype {dtype}; {DATES}")


def _rounding_error(name: str, label: Any, row: int, value: Any) -> ValueError:
    place = f"in row {row}" if label is None else f"in column {label!r}, row {row}"
    return ValueError(
        f"{name}: expected integers that float64 can hold, got {int(value)} {place}; beyond 2^53 it"
        " rounds some"
    )
