# SPDX-License-Identifier: Apache-2.0
"""The parameters of one fit of KMeans."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import Interval, StrOptions

from ..._core.backend import PRECISIONS
from ..._core.warn import warn
from ..common.callbacks import Callbacks
from ..common.settings import check_n_clusters, parameters_of

# What scikit-learn checks of each parameter.
CONSTRAINTS: dict[str, list[Any]] = {
    "n_clusters": [Interval(Integral, 1, None, closed="left")],
    "init": [StrOptions({"k-means++", "k-means||", "random"}), callable, "array-like"],
    "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "tol": [Interval(Real, 0, None, closed="left")],
    "verbose": ["verbose"],
    "random_state": ["random_state"],
    "copy_x": ["boolean"],
    "algorithm": [StrOptions({"lloyd", "elkan", "minibatch"})],
    "metric": [StrOptions({"euclidean", "cosine"})],
    "empty": [StrOptions({"relocate", "split", "keep"})],
    "batch_size": [Interval(Integral, 1, None, closed="left")],
    "precision": [StrOptions(set(PRECISIONS)), None],
    "device": [str],
    "chunk_rows": [Interval(Integral, 1, None, closed="left"), None],
    "callbacks": "no_validation",  # type: ignore[dict-item]
}


@dataclass(frozen=True)
class KMeansSettings:
    """The parameters of a `KMeans` in one call of it; `n_init` is a number."""

    n_clusters: int
    init: Any
    n_init: int
    max_iter: int
    tol: float
    verbose: int
    random_state: Any
    copy_x: bool
    algorithm: str
    metric: str
    empty: str
    batch_size: int
    precision: str | None
    device: str
    chunk_rows: int | None
    callbacks: Callbacks

    @classmethod
    def of(cls, estimator: BaseEstimator) -> KMeansSettings:
        """The settings of an estimator whose parameters are valid."""
        parameters = parameters_of(estimator)
        check_n_clusters(parameters["n_clusters"])
        parameters["callbacks"] = Callbacks(estimator, parameters["callbacks"])
        if isinstance(parameters["n_init"], str):  # "auto"
            init = parameters["init"]
            is_one = _is_array(init) or (isinstance(init, str) and init != "random")
            several = 3 if parameters["algorithm"] == "minibatch" else 10
            parameters["n_init"] = 1 if is_one else several
        return cls(**parameters)

    @property
    def is_cosine(self) -> bool:
        """Whether rows and centroids are of unit norm."""
        return self.metric == "cosine"

    @property
    def starts(self) -> int:
        """Number of starts: 1 where `init` is an array."""
        return 1 if _is_array(self.init) else self.n_init

    def warn_of_ignored(self) -> None:
        """Warn of parameters that have no effect, in scikit-learn's words."""
        if _is_array(self.init) and self.n_init != 1:
            warn(
                "Explicit initial center position passed: performing only one init in KMeans"
                f" instead of n_init={self.n_init}.",
                RuntimeWarning,
            )
        if self.algorithm == "elkan" and self.n_clusters == 1:
            warn(
                "algorithm='elkan' doesn't make sense for a single cluster. Using 'lloyd' instead.",
                RuntimeWarning,
            )


def _is_array(init: Any) -> bool:
    return not isinstance(init, str) and not callable(init)
