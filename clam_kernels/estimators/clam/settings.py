# SPDX-License-Identifier: Apache-2.0
"""The recipes of ClAM, and the parameters of one fit."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions

from ..._core.backend import PRECISIONS
from ..common.callbacks import Callbacks
from ..common.frame import Frame
from ..common.scale import scale_number
from ..common.settings import check_n_clusters, parameters_of

# The values of parameters that are None.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "init": "k-means++",
        "n_init": 32,
        "max_iter": 50,
        "batch_size": 512,
        "steps": 1,
        "step": 1.0,
        "mask_ratio": 0.2,
        "learning_rate": 0.05,  # in units of the root mean square of the data
    },
    "paper": {
        "init": "normal",
        "n_init": 4,
        "max_iter": 200,
        "batch_size": 8,
        "steps": 10,
        "step": 0.1,
        "mask_ratio": 0.2,
        "learning_rate": 0.01,  # in units of |x|
    },
}
# Betas of the default recipe in units of 1/gap, which its replicas use in turn.
BETAS = (1.0, 3.0, 10.0)
# Those of the published procedure in units of 1/|x|^2: half of the example grid of the authors'
# code, whose weights are exp(-beta d^2 / 2).
PUBLISHED_BETAS = (0.55, 0.75, 0.95, 1.2)

# What scikit-learn checks of each parameter.
CONSTRAINTS: dict[str, list[Any]] = {
    "n_clusters": [Interval(Integral, 1, None, closed="left")],
    "recipe": [StrOptions(set(RECIPES))],
    "init": [StrOptions({"k-means++", "random", "normal"}), callable, "array-like", None],
    "n_init": [Interval(Integral, 1, None, closed="left"), None],
    "max_iter": [Interval(Integral, 1, None, closed="left"), None],
    "batch_size": [Interval(Integral, 1, None, closed="left"), None],
    "beta": [Interval(Real, 0, None, closed="neither"), None],
    "steps": [Interval(Integral, 1, None, closed="left"), None],
    "step": [Interval(Real, 0, 2, closed="right"), None],
    "mask_ratio": [Interval(Real, 0, 1, closed="neither"), None],
    "clamp": ["boolean"],
    "learning_rate": [Interval(Real, 0, None, closed="neither"), None],
    "select": [StrOptions({"silhouette", "inertia", "loss"})],
    "inertia_guard": [Interval(Real, 1, None, closed="left"), None],
    "am_share": [Interval(Real, 0, 1, closed="both")],
    "min_cluster_size": [Interval(Real, 0, None, closed="neither")],
    "standardize": [StrOptions({"auto"}), "boolean"],
    "search_rows": [Interval(Integral, 1, None, closed="left")],
    "precision": [StrOptions(set(PRECISIONS)), None],
    "device": [str],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
    "callbacks": "no_validation",  # type: ignore[dict-item]
}


@dataclass(frozen=True)
class ClAMSettings:
    """The parameters of a `ClAM` in one call of it, with the values of its recipe."""

    n_clusters: int
    recipe: str
    init: Any
    n_init: int
    max_iter: int
    batch_size: int
    beta: float | None  # in units of the data; None is the betas of the recipe
    steps: int
    step: float
    mask_ratio: float
    clamp: bool
    learning_rate: float
    select: str
    inertia_guard: float | None
    min_cluster_size: float
    am_share: float
    standardize: str | bool
    search_rows: int
    precision: str | None
    device: str
    random_state: Any
    verbose: int
    callbacks: Callbacks

    @classmethod
    def of(cls, estimator: BaseEstimator) -> ClAMSettings:
        """The settings of an estimator whose parameters are valid."""
        parameters = parameters_of(estimator, RECIPES[estimator.recipe])
        check_n_clusters(parameters["n_clusters"])
        parameters["callbacks"] = Callbacks(estimator, parameters["callbacks"])
        parameters["step"] = float(parameters["step"])
        if parameters["beta"] is not None:
            parameters["beta"] = float(parameters["beta"])
        return cls(**parameters)

    @property
    def is_published(self) -> bool:
        """Whether the fit follows the published procedure."""
        return self.recipe == "paper"

    def draw_seed(self) -> int:
        """A seed; a RandomState gives another one at each call."""
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def betas(self, frame: Frame, gap: float | None = None) -> list[float]:
        """The betas of training in a frame, which replicas use in turn; `gap` in the frame."""
        if self.beta is not None:
            return [scale_number(self.beta, 2 * frame.unit)]
        if self.is_published:
            return [published_beta(frame, beta) for beta in PUBLISHED_BETAS]
        assert gap is not None
        return [beta / gap for beta in BETAS]


def published_beta(frame: Frame, beta: float = PUBLISHED_BETAS[0]) -> float:
    """A beta of the published procedure, which is in absolute units, in the frame."""
    return beta / frame.one / frame.one
