# SPDX-License-Identifier: Apache-2.0
"""Completed tables in the container that scikit-learn's `set_output` chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils._set_output import _get_container_adapter
from torch import Tensor


def in_container(estimator: BaseEstimator, X: Any, filled: Any) -> Any:
    """The completed X in the container that `set_output` chooses; a tensor stays a tensor."""
    adapter = None if isinstance(filled, Tensor) else _get_container_adapter("transform", estimator)
    if adapter is None:
        return filled
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        names = np.array([f"x{i}" for i in range(filled.shape[1])], dtype=object)
    frame = adapter.create_container(filled, X, columns=names, inplace=False)
    if not adapter.is_supported_container(X):
        return frame
    for i, name in enumerate(names):
        column = X.iloc[:, i] if hasattr(X, "iloc") else X[X.columns[i]]
        if not np.asarray(column.is_null() if hasattr(column, "is_null") else column.isna()).any():
            frame = _with_column(frame, i, name, column)
    return frame


def _with_column(frame: Any, place: int, name: str, column: Any) -> Any:
    """The data frame with a column of the input in the place of its own, in the input's dtype."""
    if hasattr(frame, "isetitem"):  # pandas
        frame.isetitem(place, column)
        return frame
    return frame.with_columns(column.alias(name))
