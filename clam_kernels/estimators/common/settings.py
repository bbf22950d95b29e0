# SPDX-License-Identifier: Apache-2.0
"""The parameters of an estimator as one call of it uses them: read once, at its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator


def parameters_of(
    estimator: BaseEstimator, recipe: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every parameter by its name; the recipe's value where a parameter is None.

    Numbers of numpy become Python's: torch refuses some of them, and a uint8 overflows.
    """
    parameters = {
        name: _python_number(value) for name, value in estimator.get_params(deep=False).items()
    }
    for name, value in (recipe or {}).items():
        if parameters[name] is None:
            parameters[name] = value
    return parameters


def check_n_clusters(n_clusters: object) -> None:
    """TypeError for True, which scikit-learn's checks take for the number 1."""
    if isinstance(n_clusters, bool):
        raise TypeError("n_clusters: expected an int >= 1, got True")


def check_enough_rows(rows: int, n_clusters: int) -> None:
    """ValueError for fewer rows than clusters."""
    if rows < n_clusters:
        raise ValueError(f"n_samples={rows} should be >= n_clusters={n_clusters}.")


def _python_number(value: Any) -> Any:
    if isinstance(value, np.integer):
        return int(value)
    return float(value) if isinstance(value, np.floating) else value
