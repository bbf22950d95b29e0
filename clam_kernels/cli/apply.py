# SPDX-License-Identifier: Apache-2.0
"""The verbs that read a model and a table: predict, transform, complete, score, plot."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .errors import reworded_errors
from .facts import facts_of
from .files import RESULTS, check_names, read, write_table

if TYPE_CHECKING:
    from ..tables import Table


def apply(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Run a verb that reads a model; (the table, facts of the model)."""
    from .. import estimators, serialize
    from ..tables import listed

    model = getattr(estimators, serialize.class_of(options.model)).load(options.model)
    facts = facts_of(model)
    if options.verb == "complete" and not hasattr(model, "complete"):
        raise ValueError(f"{options.model}: a model of {facts['algo']} cannot complete; clam can")
    feature_names = model.__dict__.pop("feature_names_in_", None)
    fitted_on = None if feature_names is None else list(feature_names)
    table = read(options, fitted_on)
    x, names = table.matrix, table.names
    if options.columns and fitted_on is not None and names not in (None, fitted_on):
        raise ValueError(
            f"{options.data}: expected the columns {listed(fitted_on)} that the model was fitted"
            f" on, got {listed(names)} with --columns"
        )
    with reworded_errors(options, names):
        if options.verb in RESULTS:
            _write_result(options, model, table)
        elif options.verb == "score":
            _score(options, model, x, facts)
        else:
            _plot(options, model, x)
    if options.verb in RESULTS:
        print(f"clam: {len(x)} rows read, {len(x)} rows written", file=sys.stderr)
    return x, facts


def _write_result(options: argparse.Namespace, model: Any, table: Table) -> None:
    """Compute and write the result of predict, transform or complete."""
    if options.verb == "predict":
        compute, names = model.predict, ["label"]
    elif options.verb == "transform":
        compute, names = model.transform, list(model.get_feature_names_out())
    else:
        compute, names = model.complete, table.feature_names
    check_names(options, names, table.kept)
    write_table(options, compute(table.matrix), names, table.kept)


def _score(options: argparse.Namespace, model: Any, x: Any, facts: dict[str, Any]) -> None:
    """Add the score to the facts, and print it unless --json prints the facts."""
    facts["score"] = model.score(x)
    if hasattr(model, "energy"):
        facts["mean_energy"] = float(model.energy(x).mean())
    if not options.json:
        energy = f", mean energy {facts['mean_energy']:.6g}" if "mean_energy" in facts else ""
        print(f"score {facts['score']:.6g}{energy}")


def _plot(options: argparse.Namespace, model: Any, x: Any) -> None:
    """Write a picture of the clusters: of the codes of dec, else of the rows, whose gaps a clam
    model fills first.
    """
    from .. import plots

    labels = model.predict(x)
    if hasattr(model, "complete"):
        x = model.complete(x)
    elif hasattr(model, "code_scale_"):
        x = model.transform(x)
    figure = plots.plot_clusters(x, labels, model.cluster_centers_)
    plots.save(figure, options.output)
