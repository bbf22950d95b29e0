# SPDX-License-Identifier: Apache-2.0
"""The recipes of SeLa, and the parameters of one fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from ..common.callbacks import Callbacks
from ..common.settings import parameters_of
from ..training.trainer import SCHEDULES

# The values of parameters that are None.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "n_epochs": 40,
        "batch_size": 128,
        "schedule": "cosine",
        "weight_decay": 1e-4,
        "n_relabels": 12,
        "n_augment": 4,
        "tol": 1e-3,
        "max_iter": 400,
    },
    "paper": {
        "n_epochs": 400,
        "batch_size": 256,
        "schedule": "steps",
        "weight_decay": 1e-5,
        "n_relabels": 100,
        "n_augment": 1,
        "tol": None,  # 0.1 / N, a tenth of a row
        "max_iter": 2000,
    },
}
# Least tolerance that float32 potentials can reach.
LEAST_TOL = 1e-6

# What scikit-learn checks of each parameter.
CONSTRAINTS: dict[str, list[Any]] = {
    "encoder": [nn.Module],
    "n_clusters": [Interval(Integral, 1, None, closed="left")],
    "n_heads": [Interval(Integral, 1, None, closed="left")],
    "recipe": [StrOptions(set(RECIPES))],
    "augment": [callable, None],
    "n_epochs": [Interval(Integral, 1, None, closed="left"), None],
    "batch_size": [Interval(Integral, 2, None, closed="left"), None],
    "learning_rate": [Interval(Real, 0, None, closed="neither")],
    "momentum": [Interval(Real, 0, 1, closed="left")],
    "weight_decay": [Interval(Real, 0, None, closed="left"), None],
    "schedule": [StrOptions(set(SCHEDULES)), callable, None],
    "optimizer": [callable, None],
    "n_relabels": [Interval(Integral, 1, None, closed="left"), None],
    "n_augment": [Interval(Integral, 1, None, closed="left"), None],
    "lam": [Interval(Real, 0, None, closed="neither")],
    "tol": [Interval(Real, 0, None, closed="neither"), None],
    "max_iter": [Interval(Integral, 1, None, closed="left"), None],
    "col_marginal": ["array-like", Tensor, None],
    "row_marginal": ["array-like", Tensor, None],
    "strict": ["boolean"],
    "image_size": [Interval(Integral, 1, None, closed="left"), None],
    "device": [str],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
    "writer": "no_validation",  # type: ignore[dict-item]
    "callbacks": "no_validation",  # type: ignore[dict-item]
}


@dataclass(frozen=True)
class SeLaSettings:
    """The parameters of a `SeLa` in one call of it, with the values of its recipe."""

    encoder: nn.Module
    n_clusters: int
    n_heads: int
    recipe: str
    augment: Callable[[Tensor, torch.Generator], Tensor] | None
    n_epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    schedule: str | Callable[[float], float]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None
    n_relabels: int
    n_augment: int
    lam: float
    tol: float | None
    max_iter: int
    col_marginal: Any
    row_marginal: Any
    strict: bool
    image_size: int | None
    device: str
    random_state: Any
    verbose: int
    writer: Any
    callbacks: Callbacks

    @classmethod
    def of(cls, estimator: BaseEstimator) -> SeLaSettings:
        """The settings of an estimator whose parameters are valid."""
        parameters = parameters_of(estimator, RECIPES[estimator.recipe])
        parameters["callbacks"] = Callbacks(estimator, parameters["callbacks"])
        return cls(**parameters)

    @property
    def learning_rate_factor(self) -> Callable[[float], float]:
        """The schedule as a function of the progress in [0, 1)."""
        return SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule

    def tolerance(self, rows: int) -> float:
        """The L1 error of the label shares at which a relabelling of so many rows converges."""
        return max(0.1 / rows, LEAST_TOL) if self.tol is None else float(self.tol)
