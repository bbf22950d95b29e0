# SPDX-License-Identifier: Apache-2.0
"""`clam fit`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, reworded_errors
from .facts import facts_of
from .files import read

if TYPE_CHECKING:
    from ..estimators import ClAM, KMeans


def fit(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Fit a model and save it; (the table, facts of the model)."""
    import numpy as np

    table = read(options, None)
    x, names = table.matrix, table.names
    if len(x) < options.clusters:
        k = options.clusters
        raise ValueError(f"{options.data}: expected at least {k} rows for -k {k}, got {len(x)}")
    model = _model(options)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr), reworded_errors(options, names):
        model.fit(x)  # a verbose fit prints on stdout
    seconds = time.perf_counter() - start
    if names is not None:
        model.feature_names_in_ = np.asarray(names, dtype=object)
    model.save(options.output)
    return x, {"seconds": seconds, "seed": options.seed, **facts_of(model)}


def _model(options: argparse.Namespace) -> ClAM | KMeans:
    """The estimator of `clam fit` with the parameters of the options."""
    from ..estimators import ClAM, KMeans

    shared = {
        "device": options.device,
        "random_state": options.seed,
        "verbose": int(options.verbose),
    }
    if options.algo == "clam":
        return ClAM(
            options.clusters,
            recipe=options.recipe,
            n_init=options.restarts,
            max_iter=options.epochs,
            standardize="auto" if options.standardize is None else options.standardize,
            **shared,
        )
    if options.recipe != "default":
        raise ArgumentError("--recipe belongs to --algo clam")
    if options.standardize is not None:
        raise ArgumentError("--standardize belongs to --algo clam")
    numbers = {"n_init": options.restarts, "max_iter": options.epochs}
    shared |= {name: value for name, value in numbers.items() if value is not None}
    return KMeans(options.clusters, **shared)
