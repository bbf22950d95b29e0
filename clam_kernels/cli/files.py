# SPDX-License-Identifier: Apache-2.0
"""Read the table of a command, and write its result."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError

if TYPE_CHECKING:
    from ..tables import KeptColumn, Table

# Verbs with a result beside the object that --json prints.
RESULTS = ("predict", "transform", "complete")


def check_output(options: argparse.Namespace) -> None:
    """ArgumentError unless the output can be written, before there is a result."""
    output = getattr(options, "output", None)
    if options.verb in RESULTS and str(output) == "-":
        options.output = output = None
    if options.json and options.verb in RESULTS and output is None:
        raise ArgumentError(f"--json takes stdout: give {options.verb} a file with -o")
    if output is None:
        return
    if options.verb != "fit":
        from .. import plots, tables

        try:
            if options.verb in RESULTS:
                tables.check_output(output, keeps_columns=bool(options.keep))
            else:
                plots.check_output(output)
        except ValueError as error:
            raise ArgumentError(f"{output}: {error}") from None
    for source in (options.data, getattr(options, "model", None)):
        if source is not None and output.exists() and source.exists() and output.samefile(source):
            raise ArgumentError(f"{output} is an input of this command")
    if not output.parent.is_dir():
        raise ArgumentError(f"{output.parent} is not a folder")
    if output.is_dir():
        raise ArgumentError(f"{output} is a folder")
    if output.exists() and not options.force:
        raise ArgumentError(f"{output} exists; --force overwrites it")
    from .. import serialize

    try:
        serialize.check_writable(output)
    except OSError as error:
        raise ArgumentError(f"{output}: {error.strerror}") from None


def read(options: argparse.Namespace, expected: list[str] | None) -> Table:
    """The table of a command; `expected` has the column names of a model."""
    from .. import tables

    table = tables.read_table(
        options.data,
        options.key,
        columns=options.columns,
        drop=options.drop,
        index_col=False if options.index_col == ["none"] else options.index_col,
        header=options.header,
        decimal=options.decimal,
        expected=expected,
        keep=getattr(options, "keep", ()),
    )
    if not len(table.matrix):
        raise ValueError(f"{options.data}: no rows")
    return table


def check_names(options: argparse.Namespace, names: list[str], kept: list[KeptColumn]) -> None:
    """ValueError if a column that the output repeats has the name of a column of the result."""
    from .. import tables

    twice = [column.name for column in kept if column.name in names]
    if twice:
        raise ValueError(
            f"{options.data}: --keep: expected names that the result does not have, got"
            f" {tables.listed(twice)}"
        )


def write_table(
    options: argparse.Namespace, array: Any, names: list[str], kept: list[KeptColumn]
) -> None:
    """Write a result to the output file, or to stdout as CSV."""
    from .. import tables

    if options.output is not None:
        tables.write(options.output, array, names, kept)
    else:
        sys.stdout.buffer.write(tables.encode(array, "", names, kept))
