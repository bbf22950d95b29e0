# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings in the words of the command: its options, the file, columns and rows."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

# Errors that the command prints in one line.
FAILURES = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError)
# Options of the command by the parameters of the estimators.
OPTIONS = {
    "n_clusters": "-k",
    "n_init": "--restarts",
    "max_iter": "--epochs",
    "n_epochs": "--epochs",
    "random_state": "--seed",
}
BAD_ENTRY = re.compile(r"Input X contains (\w+): .* the first at row (\d+), column (\d+)\.")
EMPTY_COLUMNS = re.compile(r"X: expected an observed entry in every column, got none in \[(.*)\]")


class ArgumentError(Exception):
    """Arguments that are wrong or contradict each other: exit code 2."""


@contextlib.contextmanager
def reworded_errors(options: argparse.Namespace, names: list[str] | None) -> Iterator[None]:
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
        got = "a missing cell (only --algo clam takes any)" if what == "NaN" else what
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


def show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as one line, without the line of source that raised it."""
    print(f"clam: warning: {message}", file=sys.stderr)
