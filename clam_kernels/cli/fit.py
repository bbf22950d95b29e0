# SPDX-License-Identifier: Apache-2.0
"""`clam fit`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from typing import Any

from .errors import ArgumentError, reworded_errors
from .facts import facts_of
from .files import read


def fit(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Fit a model and save it; (the table, facts of the model)."""
    import numpy as np

    table = read(options, None)
    x, names = table.matrix, table.names
    if len(x) < options.clusters:
        k = options.clusters
        raise ValueError(f"{options.data}: expected at least {k} rows for -k {k}, got {len(x)}")
    _check_images(options, x.shape[1])
    _warn_of_row_numbers(x, names)
    model = _model(options)
    run = {}
    if options.checkpoint is not None:
        run = {"checkpoint": options.checkpoint, "resume": options.resume}
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr), reworded_errors(options, names):
        model.fit(x, **run)  # a verbose fit prints on stdout
    seconds = time.perf_counter() - start
    if names is not None:
        model.feature_names_in_ = np.asarray(names, dtype=object)
    model.save(options.output)
    return x, {"seconds": seconds, "seed": options.seed, **facts_of(model)}


def _model(options: argparse.Namespace) -> Any:
    """The estimator of `clam fit` with the parameters of the options."""
    from .. import estimators

    _check_options(options)
    shared = {
        "device": options.device,
        "random_state": options.seed,
        "verbose": int(options.verbose),
    }
    if options.algo == "clam":
        return estimators.ClAM(
            options.clusters,
            recipe=options.recipe,
            n_init=options.restarts,
            max_iter=options.epochs,
            standardize=_standardize(options),
            **shared,
        )
    if options.restarts is not None:
        shared["n_init"] = options.restarts
    if options.algo == "kmeans":
        if options.epochs is not None:
            shared["max_iter"] = options.epochs
        return estimators.KMeans(options.clusters, **shared)
    from ..augment import ShiftAndRotate

    return estimators.DEC(
        options.clusters,
        variant=options.algo,
        recipe=options.recipe,
        n_epochs=options.epochs,
        standardize=_standardize(options),
        regroup=options.regroup or None,
        augment=None if options.images is None else ShiftAndRotate(options.images),
        **shared,
    )


def _standardize(options: argparse.Namespace) -> bool | str:
    return "auto" if options.standardize is None else options.standardize


def _check_options(options: argparse.Namespace) -> None:
    """ArgumentError for an option that the algorithm does not have."""
    deep = ("dec", "idec")
    algos_of = {
        "--recipe": (options.recipe != "default", ("clam", *deep)),
        "--standardize": (options.standardize is not None, ("clam", *deep)),
        "--images": (options.images is not None, deep),
        "--regroup": (options.regroup, deep),
        "--checkpoint": (options.checkpoint is not None, deep),
        "--resume": (options.resume, deep),
    }
    for option, (is_set, algos) in algos_of.items():
        if is_set and options.algo not in algos:
            raise ArgumentError(f"{option} belongs to --algo {', '.join(algos)}")
    if options.resume and options.checkpoint is None:
        raise ArgumentError("--resume needs --checkpoint")
    if options.checkpoint is not None and options.checkpoint.exists() and not options.resume:
        raise ArgumentError(f"{options.checkpoint} exists; --resume continues its run")


def _warn_of_row_numbers(x: Any, names: list[str] | None) -> None:
    """Warn of columns that count the rows: they are names of rows, and would decide the fit."""
    import numpy as np

    if len(x) < 3:
        return
    with np.errstate(invalid="ignore"):  # infinite cells, which the fit refuses
        is_count = (np.diff(x, axis=0) == 1).all(0)
    for i in np.flatnonzero(is_count):
        name = names[i] if names is not None else str(i)
        warnings.warn(f"column {name!r} counts the rows: --drop {name} leaves it out", stacklevel=2)


def _check_images(options: argparse.Namespace, features: int) -> None:
    """ValueError unless a row has the pixels of an image."""
    if options.images is not None and options.images[0] * options.images[1] != features:
        height, width = options.images
        raise ValueError(
            f"{options.data}: expected {height * width} columns for --images {height}x{width},"
            f" got {features}"
        )
