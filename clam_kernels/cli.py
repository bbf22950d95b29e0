# SPDX-License-Identifier: Apache-2.0
"""The command `clam`: fit, predict, transform, complete, score, plot, info.

Results go to a file or stdout, messages to stderr. Exit codes: 0 done, 1 bad input or failed run,
2 wrong arguments (also an output that exists, without --force), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .estimators import ClAM, KMeans

# Errors that the command prints in one line.
FAILURES = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError)
# Options of the command by the parameters of the estimators.
OPTIONS = {
    "n_clusters": "-k",
    "n_init": "--restarts",
    "max_iter": "--epochs",
    "random_state": "--seed",
}
BAD_ENTRY = re.compile(r"Input X contains (\w+): .* the first at row (\d+), column (\d+)\.")
EMPTY_COLUMNS = re.compile(r"X: expected an observed entry in every column, got none in \[(.*)\]")
# Verbs with a result beside the object that --json prints.
RESULTS = ("predict", "transform", "complete")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clam", description="Clustering with associative memories and k-means."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"clam_kernels {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, text: str, *, model: bool = True, output: str = ""
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        if model:
            sub.add_argument("model", type=Path, help="model file that `clam fit` wrote")
        sub.add_argument(
            "data", type=Path, help=".npy, .npz, CSV, TSV (also .gz) or Parquet; - reads stdin"
        )
        _add_reading(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object about the run")
        if output:
            sub.add_argument(
                "-o", "--output", type=Path, required=name in ("fit", "plot"), help=output
            )
            sub.add_argument("--force", action="store_true", help="overwrite the output")
        return sub

    fit = verb("fit", "cluster a table and write the model", model=False, output="model file")
    fit.add_argument("-k", "--clusters", type=_whole(1), required=True, help="number of clusters")
    fit.add_argument("--algo", choices=("clam", "kmeans"), default="clam", help="default clam")
    fit.add_argument("--recipe", choices=("default", "paper"), default="default", help="clam only")
    fit.add_argument(
        "--standardize",
        action=argparse.BooleanOptionalAction,
        help="divide every column by its deviation; clam only. Without it clam does so where the"
        " spreads of the columns differ by more than 256 times",
    )
    fit.add_argument("--restarts", type=_whole(1), help="number of starts")
    fit.add_argument("--epochs", type=_whole(1), help="most passes over the table")
    fit.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="default 0")
    fit.add_argument("--device", default="auto", help="cpu, cuda or auto (a GPU if there is one)")
    fit.add_argument("-v", "--verbose", action="store_true", help="progress on stderr")
    table = ".csv, .tsv (also .gz), .npy or .parquet; without it, or with -, CSV on stdout"
    verb("predict", "label of each row", output=table)
    verb("transform", "distance of each row to each memory", output=table)
    verb("complete", "fill the missing entries (NaN, empty); a clam model", output=table)
    verb("score", "minus the inertia of a table, and its mean energy (clam)")
    verb("plot", "picture of the clusters", output="image file; the suffix decides the format")
    verbs.add_parser("info", help="what is installed, and the backends of each op")
    return parser


def _add_reading(sub: argparse.ArgumentParser) -> None:
    """Add the options of reading a table."""
    sub.add_argument("--key", help="array of an .npz that has several")
    sub.add_argument(
        "--columns",
        type=_names,
        metavar="A,B",
        help="the features: names, or numbers from 0",
    )
    sub.add_argument(
        "--drop", type=_names, metavar="A,B", help="columns that are no features, such as id,label"
    )
    sub.add_argument(
        "--index-col",
        type=_levels,
        metavar="A,B",
        help="index of a data frame, which is no feature; `--index-col none` keeps all columns",
    )
    sub.add_argument(
        "--header",
        action=argparse.BooleanOptionalAction,
        help="the first row of a text has names; default: yes if it has text, or is 0,1,2,...",
    )
    sub.add_argument("--decimal", choices=(".", ","), default=".", help="decimal point of a text")


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A function that reads a whole number in a range, for the type of an option."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            bound = f">= {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number {bound}, got {text!r}")
        return number

    return read


def _names(text: str) -> list[str]:
    """Names between commas; a name with a comma is in quotes."""
    return next(csv.reader([text]), [""])


def _levels(text: str) -> list[str]:
    """The names of an index; without names, the empty name."""
    return _names(text) or [""]


class _ArgumentError(Exception):
    """Arguments that are wrong or contradict each other: exit code 2."""


def _check_output(options: argparse.Namespace) -> None:
    """_ArgumentError unless the output can be written, before there is a result."""
    output = getattr(options, "output", None)
    if options.verb in RESULTS and str(output) == "-":
        options.output = output = None
    if options.json and options.verb in RESULTS and output is None:
        raise _ArgumentError(f"--json takes stdout: give {options.verb} a file with -o")
    if output is None:
        return
    if options.verb != "fit":
        from . import plots, tables

        try:
            (tables if options.verb in RESULTS else plots).check_output(output)
        except ValueError as error:
            raise _ArgumentError(f"{output}: {error}") from None
    for source in (options.data, getattr(options, "model", None)):
        if source is not None and output.exists() and source.exists() and output.samefile(source):
            raise _ArgumentError(f"{output} is an input of this command")
    if not output.parent.is_dir():
        raise _ArgumentError(f"{output.parent} is not a folder")
    if output.is_dir():
        raise _ArgumentError(f"{output} is a folder")
    if output.exists() and not options.force:
        raise _ArgumentError(f"{output} exists; --force overwrites it")
    from . import serialize

    try:
        serialize.check_writable(output)
    except OSError as error:
        raise _ArgumentError(f"{output}: {error.strerror}") from None


def _write_table(options: argparse.Namespace, array: Any, names: list[str]) -> None:
    """Write a result to the output file, or to stdout as CSV."""
    from . import tables

    if options.output is not None:
        tables.write(options.output, array, names)
    else:
        sys.stdout.buffer.write(tables.encode(array, "", names))


def _model(options: argparse.Namespace) -> ClAM | KMeans:
    """The estimator of `clam fit` with the parameters of the options."""
    from .estimators import ClAM, KMeans

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
        raise _ArgumentError("--recipe belongs to --algo clam")
    if options.standardize is not None:
        raise _ArgumentError("--standardize belongs to --algo clam")
    numbers = {"n_init": options.restarts, "max_iter": options.epochs}
    shared |= {name: value for name, value in numbers.items() if value is not None}
    return KMeans(options.clusters, **shared)


def _fit(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Fit a model and save it; (the table, facts of the model)."""
    import numpy as np

    x, names = _read(options, None)
    if len(x) < options.clusters:
        k = options.clusters
        raise ValueError(f"{options.data}: expected at least {k} rows for -k {k}, got {len(x)}")
    model = _model(options)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr), _reworded_errors(options, names):
        model.fit(x)  # a verbose fit prints on stdout
    seconds = time.perf_counter() - start
    if names is not None:
        model.feature_names_in_ = np.asarray(names, dtype=object)
    model.save(options.output)
    return x, {"seconds": seconds, "seed": options.seed, **_facts(model)}


@contextlib.contextmanager
def _reworded_errors(options: argparse.Namespace, names: list[str] | None) -> Iterator[None]:
    """In the block, errors and warnings of an estimator name the options, file, columns and rows of
    the command.
    """
    show_before = warnings.showwarning

    def show(message: Warning | str, *rest: Any) -> None:
        show_before(_reworded(str(message), options, names), *rest)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(_reworded(str(error), options, names)) from error
    finally:
        warnings.showwarning = show_before


def _reworded(text: str, options: argparse.Namespace, names: list[str] | None) -> str:
    """A message of an estimator with the names that the command uses."""

    def column(number: str) -> str:
        return repr(names[int(number)]) if names is not None else number

    entry = BAD_ENTRY.match(text)
    if entry is not None:
        what, row, number = entry.groups()
        got = "a missing cell (k-means takes none, --algo clam does)" if what == "NaN" else what
        place = f"column {column(number)}, row {int(row) + 1}"
        return f"{options.data}: {place}: expected a finite number, got {got}"
    empty = EMPTY_COLUMNS.match(text)
    if empty is not None:
        listed = ", ".join(map(column, empty[1].split(", ")))
        return f"{options.data}: expected a value in every column, got none in {listed}"
    if text.startswith("X has "):
        text = f"{options.data}{text[1:]}"
    text = re.sub(r"^device:", "--device:", text)
    for name, option in OPTIONS.items():
        text = re.sub(rf"(?<![\w./-]){name}=(?=\w)", f"{option} ", text)
        text = re.sub(rf"(?<![\w./-]){name}(?![\w./-])", option, text)
    return text


def _read(options: argparse.Namespace, expected: list[str] | None) -> tuple[Any, list[str] | None]:
    """(matrix, column names) of the table; `expected` has the column names of a model."""
    from . import tables

    x, names = tables.read(
        options.data,
        options.key,
        columns=options.columns,
        drop=options.drop,
        index_col=False if options.index_col == ["none"] else options.index_col,
        header=options.header,
        decimal=options.decimal,
        expected=expected,
    )
    if not len(x):
        raise ValueError(f"{options.data}: no rows")
    return x, names


def _facts(model: ClAM | KMeans) -> dict[str, Any]:
    """Facts of a fitted model, for --json."""
    return {
        "algo": type(model).__name__.lower(),
        "k": model.n_clusters,
        "clusters_used": len(set(model.labels_.tolist())),
        "inertia": model.inertia_,
        "partition_inertia": _partition_inertia(model),
        "device": model.device_,
        "backend": model.backend_,
    }


def _partition_inertia(model: Any) -> float:
    """Inertia about the means of the labels.

    Memories of `ClAM` may lie outside the range of their rows. They are the means of their rows if
    the search took a sample, or if there was no search.
    """
    from .estimators.clam.settings import ClAMSettings
    from .estimators.clam.whole import searches_all

    inertia = getattr(model, "candidates_", {"inertia": []})["inertia"]
    if not len(inertia) or not searches_all(ClAMSettings.of(model), len(model.labels_)):
        return float(model.inertia_)
    return float(inertia[model.candidates_["chosen"]][0])


def _apply(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Run a verb that reads a model; (the table, facts of the model)."""
    from . import estimators, serialize
    from .tables import listed

    model = getattr(estimators, serialize.class_of(options.model)).load(options.model)
    facts = _facts(model)
    if options.verb == "complete" and not hasattr(model, "complete"):
        raise ValueError(f"{options.model}: a {facts['algo']} model cannot complete; clam can")
    feature_names = model.__dict__.pop("feature_names_in_", None)
    fitted_on = None if feature_names is None else list(feature_names)
    x, names = _read(options, fitted_on)
    if options.columns and fitted_on is not None and names not in (None, fitted_on):
        raise ValueError(
            f"{options.data}: expected the columns {listed(fitted_on)} that the model was fitted"
            f" on, got {listed(names)} with --columns"
        )
    with _reworded_errors(options, names):
        _write_result(options, model, x, names, facts)
    if options.verb in RESULTS:
        print(f"clam: {len(x)} rows read, {len(x)} rows written", file=sys.stderr)
    return x, facts


def _write_result(
    options: argparse.Namespace, model: Any, x: Any, names: list[str] | None, facts: dict[str, Any]
) -> None:
    """Compute and write the result of a verb; `score` adds to the facts."""
    if options.verb == "predict":
        _write_table(options, model.predict(x), ["label"])
    elif options.verb == "transform":
        _write_table(options, model.transform(x), list(model.get_feature_names_out()))
    elif options.verb == "complete":
        columns = names or [f"column{i}" for i in range(x.shape[1])]
        _write_table(options, model.complete(x), columns)
    elif options.verb == "score":
        facts["score"] = model.score(x)
        if hasattr(model, "energy"):
            facts["mean_energy"] = float(model.energy(x).mean())
        if not options.json:
            energy = f", mean energy {facts['mean_energy']:.6g}" if "mean_energy" in facts else ""
            print(f"score {facts['score']:.6g}{energy}")
    else:
        from . import plots

        labels = model.predict(x)
        x = model.complete(x) if hasattr(model, "complete") else x
        figure = plots.plot_clusters(x, labels, model.cluster_centers_)
        plots.save(figure, options.output)


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as JSON has them: a number that is not finite is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }


def _run(options: argparse.Namespace) -> None:
    _check_output(options)
    x, facts = (_fit if options.verb == "fit" else _apply)(options)
    if options.json:
        shape = {"rows": int(x.shape[0]), "features": int(x.shape[1])}
        report = {"verb": options.verb, **shape, **_plain(facts), "version": __version__}
        print(json.dumps(report, allow_nan=False))
    elif options.verb == "fit":
        used, k = facts["clusters_used"], facts["k"]
        text = f"{used} of {k} clusters used, inertia {facts['inertia']:.6g}"
        if facts["algo"] == "clam":
            about = facts["partition_inertia"]
            text += f" about the memories, {about:.6g} about the means of the clusters"
        print(text, file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as one line, without the line of source that raised it."""
    print(f"clam: warning: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["info"]:
        from . import info

        return info.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            _run(options)
        sys.stdout.flush()
    except _ArgumentError as error:
        print(f"clam: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FAILURES as error:
        if options.debug:
            raise
        print(f"clam: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
