# SPDX-License-Identifier: Apache-2.0
"""The arguments of the command."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

from .._version import __version__


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clam",
        description="Clustering with associative memories, k-means and deep embedded clustering.",
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
    _add_fitting(fit)
    table = ".csv, .tsv (also .gz), .npy or .parquet; without it, or with -, CSV on stdout"
    for name, text in (
        ("predict", "label of each row"),
        ("transform", "distance of each row to each memory or centroid; its code (dec, idec)"),
        ("complete", "fill the missing entries (NaN, empty); a clam model"),
    ):
        verb(name, text, output=table).add_argument(
            "--keep",
            type=_levels,
            default=[],
            metavar="A,B",
            help="columns that are no features and that the output repeats, such as id",
        )
    verb("score", "minus the inertia of a table, and its mean energy (clam)")
    verb("plot", "picture of the clusters", output="image file; the suffix decides the format")
    text = "what is in a model file; without a file, what is installed and the backends of each op"
    info = verbs.add_parser("info", help=text, description=text)
    info.add_argument("model", type=Path, nargs="?", help="model file that `clam fit` wrote")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.add_argument("--selftest", action="store_true", help="run each op against its truth")
    return parser


def _add_fitting(fit: argparse.ArgumentParser) -> None:
    """Add the options of a fit."""
    fit.add_argument("-k", "--clusters", type=_whole(1), required=True, help="number of clusters")
    fit.add_argument(
        "--algo",
        choices=("clam", "kmeans", "dec", "idec"),
        default="clam",
        help="default clam; dec and idec train an autoencoder and cluster its codes",
    )
    fit.add_argument(
        "--recipe", choices=("default", "paper"), default="default", help="not for kmeans"
    )
    fit.add_argument(
        "--standardize",
        action=argparse.BooleanOptionalAction,
        help="divide every column by its deviation; not for kmeans. Without this option the fit"
        " does so where the spreads of the columns differ by more than 256 times",
    )
    fit.add_argument(
        "--images",
        type=_shape,
        metavar="HxW",
        help="each row is an image of this shape, such as 28x28; dec and idec shift and rotate it",
    )
    fit.add_argument(
        "--regroup",
        action="store_true",
        help="join clusters without a gap and divide others that have one; dec and idec",
    )
    fit.add_argument("--checkpoint", type=Path, help="file of the state of a run; dec and idec")
    fit.add_argument("--resume", action="store_true", help="continue the run of --checkpoint")
    fit.add_argument("--restarts", type=_whole(1), help="number of starts")
    fit.add_argument(
        "--epochs",
        type=_whole(1),
        help="most passes over the table, of dec after its pretraining",
    )
    fit.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="default 0")
    fit.add_argument("--device", default="auto", help="cpu, cuda or auto (a GPU if there is one)")
    fit.add_argument("-v", "--verbose", action="store_true", help="progress on stderr")


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


def _shape(text: str) -> tuple[int, int]:
    """Height and width between an x."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected a height and a width as 28x28, got {text!r}")
    return int(height), int(width)


def _names(text: str) -> list[str]:
    """Names between commas; a name with a comma is in quotes."""
    return next(csv.reader([text]), [""])


def _levels(text: str) -> list[str]:
    """The names of an index; without names, the empty name."""
    return _names(text) or [""]
