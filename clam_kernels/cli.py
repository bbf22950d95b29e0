# SPDX-License-Identifier: Apache-2.0
"""The command `clam`: fit, predict, transform, complete, score, plot, info.

Results go to a file or stdout, messages to stderr. Exit codes: 0 done, 1 bad input or failed run,
2 wrong arguments (an output that exists, without --force, too), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .estimators import ClAM, KMeans

# Verbs that have a result beside what --json says of the run.
RESULTS = ("predict", "transform", "complete")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clam", description="Clustering with associative memories and k-means."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, text: str, *, model: bool = True, output: str = ""
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        if model:
            sub.add_argument("model", type=Path, help="model file that `clam fit` wrote")
        sub.add_argument("data", type=Path, help=".npy, .npz, CSV, TSV or Parquet")
        sub.add_argument("--key", help="array of an .npz that holds several")
        sub.add_argument("--json", action="store_true", help="print one JSON object about the run")
        if output:
            sub.add_argument(
                "-o", "--output", type=Path, required=name in ("fit", "plot"), help=output
            )
            sub.add_argument("--force", action="store_true", help="overwrite the output")
        return sub

    fit = verb("fit", "cluster a table and write the model", model=False, output="model file")
    fit.add_argument("-k", "--clusters", type=int, required=True, help="number of clusters")
    fit.add_argument("--algo", choices=("clam", "kmeans"), default="clam", help="default clam")
    fit.add_argument("--recipe", choices=("default", "paper"), default="default", help="of clam")
    fit.add_argument("--restarts", type=int, help="n_init")
    fit.add_argument("--epochs", type=int, help="max_iter")
    fit.add_argument("--seed", type=int, default=0, help="default 0")
    fit.add_argument("--device", default="auto", help="cpu, cuda or auto (a GPU if there is one)")
    fit.add_argument("-v", "--verbose", action="store_true", help="progress on stderr")
    table = ".csv, .tsv, .npy or .parquet; CSV on stdout without it"
    verb("predict", "label of each row", output=table)
    verb("transform", "distance of each row to each memory", output=table)
    verb("complete", "fill the missing entries (NaN, empty); a clam model", output=table)
    verb("score", "minus the inertia of a table, and its mean energy (clam)")
    verb("plot", "picture of the clusters", output="image file; the suffix decides the format")
    verbs.add_parser("info", help="what is installed and what each op can run on")
    return parser


class _Refused(Exception):
    """Arguments that do not go together: exit code 2."""


def _check_output(options: argparse.Namespace) -> None:
    output = getattr(options, "output", None)
    if output is None:
        return
    for source in (options.data, getattr(options, "model", None)):
        if source is not None and output.exists() and source.exists() and output.samefile(source):
            raise _Refused(f"{output} is an input of this command")
    if not output.parent.is_dir():
        raise _Refused(f"{output.parent} is not a folder")
    if output.is_dir():
        raise _Refused(f"{output} is a folder")
    if output.exists() and not options.force:
        raise _Refused(f"{output} exists; --force overwrites it")


def _put(options: argparse.Namespace, array: Any, names: list[str]) -> None:
    """A result to its file, or to stdout as CSV; stdout has room for one thing alone."""
    from . import tables

    if options.output is not None:
        tables.write(options.output, array, names)
    elif not options.json:
        sys.stdout.buffer.write(tables.encode(array, "", names))


def _model(options: argparse.Namespace) -> ClAM | KMeans:
    """The estimator that `clam fit` was asked for."""
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
            **shared,
        )
    if options.recipe != "default":
        raise _Refused("--recipe belongs to --algo clam")
    given = {"n_init": options.restarts, "max_iter": options.epochs}
    shared |= {name: value for name, value in given.items() if value is not None}
    return KMeans(options.clusters, **shared)


def _fit(options: argparse.Namespace, x: Any, names: list[str] | None) -> dict[str, Any]:
    import numpy as np

    model = _model(options)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # what a verbose fit tells
        model.fit(x)
    seconds = time.perf_counter() - start
    if names is not None:
        model.feature_names_in_ = np.asarray(names, dtype=object)
    model.save(options.output)
    return {"seconds": seconds, "seed": options.seed, **_facts(model)}


def _facts(model: ClAM | KMeans) -> dict[str, Any]:
    return {
        "algo": type(model).__name__.lower(),
        "k": model.n_clusters,
        "clusters_used": len(set(model.labels_.tolist())),
        "inertia": model.inertia_,
        "device": model.device_,
        "backend": model.backend_,
    }


def _use(options: argparse.Namespace, x: Any, names: list[str] | None) -> dict[str, Any]:
    """A verb that reads a model."""
    from . import estimators, serialize

    model = getattr(estimators, serialize.class_of(options.model)).load(options.model)
    facts = _facts(model)
    if options.verb == "complete" and not hasattr(model, "complete"):
        raise ValueError(f"{options.model}: a {facts['algo']} model cannot complete; clam can")
    fitted_on = list(model.__dict__.pop("feature_names_in_", names or []))
    if names is not None and names != fitted_on:
        raise ValueError(
            f"{options.data}: expected the columns {', '.join(fitted_on)} that the model was fitted"
            f" on, got {', '.join(names)}"
        )
    if options.verb == "predict":
        _put(options, model.predict(x), ["label"])
    elif options.verb == "transform":
        _put(options, model.transform(x), list(model.get_feature_names_out()))
    elif options.verb == "complete":
        columns = names or [f"column{i}" for i in range(x.shape[1])]
        _put(options, model.complete(x), columns)
    elif options.verb == "score":
        facts |= {"score": model.score(x)}
        if hasattr(model, "energy"):
            facts |= {"mean_energy": float(model.energy(x).mean())}
        if not options.json:
            energy = f", mean energy {facts['mean_energy']:.6g}" if "mean_energy" in facts else ""
            print(f"score {facts['score']:.6g}{energy}")
    else:
        from . import plots

        labels = model.predict(x)
        x = model.complete(x) if hasattr(model, "complete") else x
        drawn = plots.plot_clusters(x, labels, model.cluster_centers_)
        plots.save(drawn, options.output)
    return facts


def _run(options: argparse.Namespace) -> None:
    import numpy as np

    from . import __version__, tables

    _check_output(options)
    if options.json and options.verb in RESULTS and options.output is None:
        raise _Refused(f"--json takes stdout: give {options.verb} a file with -o")
    x, names = tables.read(options.data, options.key)
    if np.asarray(x).dtype.kind == "f" and options.verb != "complete" and not len(x):
        raise ValueError(f"{options.data}: no rows")
    facts = (_fit if options.verb == "fit" else _use)(options, x, names)
    if options.json:
        shape = {"rows": int(x.shape[0]), "features": int(x.shape[1])}
        print(json.dumps({"verb": options.verb, **shape, **facts, "version": __version__}))
    elif options.verb == "fit":
        used, k = facts["clusters_used"], facts["k"]
        print(f"{used} of {k} clusters used, inertia {facts['inertia']:.6g}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["info"]:
        from . import info

        return info.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        _run(options)
        sys.stdout.flush()
    except _Refused as error:
        print(f"clam: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError) as error:
        if options.debug:
            raise
        print(f"clam: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
