# SPDX-License-Identifier: Apache-2.0
"""The recipes of DEC, and the parameters of one fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from ..._core import checks
from ..common.callbacks import Callbacks
from ..common.settings import parameters_of
from ..training.trainer import count_of

# The values of parameters that are None. An interval of None is the batches of an epoch, at most
# MOST_INTERVAL.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "hidden": (250, 250, 1000),
        "n_components": 10,
        "pretrain": "ae",
        "z_scale": "auto",
        "pretrain_epochs": 40,
        "pretrain_steps": None,
        "pretrain_batch_size": 64,
        "pretrain_learning_rate": 1e-3,
        "n_epochs": None,  # as many as have STEPS steps
        "batch_size": 256,
        "learning_rate": 1e-3,
        "optimizer": "adam",
        "interval": 30,
        "tol": 1e-3,
        "regroup": False,
    },
    "paper": {
        "hidden": (500, 500, 2000),
        "n_components": 10,
        "pretrain": "sdae",
        "z_scale": 1.0,
        "pretrain_epochs": None,
        "pretrain_steps": 50_000,  # of each layer; twice as many of all layers together
        "pretrain_batch_size": 256,
        "pretrain_learning_rate": 0.05,  # published: .1 of half the mean square
        "n_epochs": 200,
        "batch_size": 256,
        "learning_rate": 0.01,
        "optimizer": "sgd",
        "interval": None,
        "tol": 1e-3,
        "regroup": False,
    },
}
MOST_INTERVAL = 140
# The default recipe clusters for so many steps, rounded up to whole epochs.
STEPS = 400

_COUNT = Interval(Integral, 1, None, closed="left")
_POSITIVE = Interval(Real, 0, None, closed="neither")

# What scikit-learn checks of each parameter.
CONSTRAINTS: dict[str, list[Any]] = {
    "n_clusters": [_COUNT],
    "encoder": [nn.Module, None],
    "decoder": [nn.Module, None],
    "hidden": ["array-like", None],
    "n_components": [_COUNT, None],
    "variant": [StrOptions({"dec", "idec"})],
    "target": [StrOptions({"frozen", "minibatch", "self"})],
    "pretrain": [StrOptions({"ae", "sdae", "none"}), None],
    "augment": [callable, None],
    "recipe": [StrOptions(set(RECIPES))],
    "z_scale": [StrOptions({"auto"}), _POSITIVE, None],
    "standardize": [StrOptions({"auto"}), "boolean"],
    "alpha": [_POSITIVE],
    "gamma": [Interval(Real, 0, None, closed="left")],
    "pretrain_epochs": [_COUNT, None],
    "pretrain_steps": [_COUNT, None],
    "pretrain_batch_size": [Interval(Integral, 2, None, closed="left"), None],
    "pretrain_learning_rate": [_POSITIVE, None],
    "n_epochs": [Interval(Integral, 0, None, closed="left"), None],
    "batch_size": [Interval(Integral, 2, None, closed="left"), None],
    "learning_rate": [_POSITIVE, None],
    "optimizer": [StrOptions({"adam", "sgd"}), callable, None],
    "interval": [_COUNT, None],
    "tol": [Interval(Real, 0, None, closed="left"), None],
    "regroup": ["boolean", None],
    "n_init": [_COUNT],
    "image_size": [_COUNT, None],
    "device": [str],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
    "writer": "no_validation",  # type: ignore[dict-item]
    "callbacks": "no_validation",  # type: ignore[dict-item]
}


@dataclass(frozen=True)
class DecSettings:
    """The parameters of a `DEC` in one call of it, with the values of its recipe."""

    n_clusters: int
    encoder: nn.Module | None
    decoder: nn.Module | None
    hidden: tuple[int, ...]
    n_components: int
    variant: str
    target: str
    pretrain: str
    augment: Callable[[Tensor, torch.Generator], Tensor] | None
    recipe: str
    z_scale: str | float
    standardize: str | bool
    alpha: float
    gamma: float
    pretrain_epochs: int | None
    pretrain_steps: int | None
    pretrain_batch_size: int
    pretrain_learning_rate: float
    n_epochs: int | None
    batch_size: int
    learning_rate: float
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    interval: int | None
    tol: float
    regroup: bool
    n_init: int
    image_size: int | None
    device: str
    random_state: Any
    verbose: int
    writer: Any
    callbacks: Callbacks

    @classmethod
    def of(cls, estimator: BaseEstimator) -> DecSettings:
        """The settings of an estimator whose parameters are valid."""
        recipe = dict(RECIPES[estimator.recipe])
        if estimator.pretrain_epochs is not None or estimator.pretrain_steps is not None:
            # the user's unit of the length replaces that of the recipe
            recipe["pretrain_epochs"] = recipe["pretrain_steps"] = None
        parameters = parameters_of(estimator, recipe)
        parameters["hidden"] = _sizes(parameters["hidden"])
        parameters["callbacks"] = Callbacks(estimator, parameters["callbacks"])
        settings = cls(**parameters)
        settings._check()
        return settings

    def _check(self) -> None:
        """ValueError or TypeError for parameters that do not fit together."""
        if self.encoder is None and self.decoder is not None:
            raise ValueError(checks.wording("encoder", "a module to go with decoder", "None"))
        if self.encoder is None and self.pretrain == "none":
            words = "a trained module where pretrain='none'"
            raise ValueError(checks.wording("encoder", words, "None"))
        if self.pretrain_epochs is not None and self.pretrain_steps is not None:
            got = f"{self.pretrain_epochs} and pretrain_steps={self.pretrain_steps}"
            raise ValueError(checks.wording("pretrain_epochs", "None where steps are given", got))

    def interval_of(self, rows: int) -> int:
        """Steps between two refreshes of the target."""
        if self.interval is not None:
            return self.interval
        return min(count_of(rows, self.batch_size), MOST_INTERVAL)

    def cluster_length(self, rows: int) -> int:
        """Epochs of clustering."""
        if self.n_epochs is not None:
            return self.n_epochs
        return math.ceil(STEPS / count_of(rows, self.batch_size))

    def pretrain_length(self, rows: int, factor: int = 1) -> int:
        """Epochs of a phase of pretraining; steps become whole epochs."""
        if self.pretrain_epochs is not None:
            return self.pretrain_epochs
        assert self.pretrain_steps is not None
        steps = factor * self.pretrain_steps
        return math.ceil(steps / count_of(rows, self.pretrain_batch_size))


def _sizes(hidden: Any) -> tuple[int, ...]:
    """The sizes of the hidden layers."""
    sizes = hidden.tolist() if hasattr(hidden, "tolist") else hidden
    fits = isinstance(sizes, list | tuple) and all(checks.is_whole(x) and x >= 1 for x in sizes)
    checks.expect(fits, "hidden", "sizes of layers, ints >= 1", repr(hidden))
    return tuple(int(x) for x in sizes)
