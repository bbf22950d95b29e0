# SPDX-License-Identifier: Apache-2.0
"""Run the command, and turn errors into messages and exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings

from .._version import __version__
from .apply import apply
from .errors import FAILURES, ArgumentError, show_warning
from .facts import plain
from .files import check_output
from .fit import fit
from .info import show_info
from .parser import command_parser


def _run(options: argparse.Namespace) -> int:
    """Run a verb, print its report, and return the exit code."""
    if options.verb == "info":
        return show_info(options)
    check_output(options)
    x, facts = (fit if options.verb == "fit" else apply)(options)
    if options.json:
        shape = {"rows": int(x.shape[0]), "features": int(x.shape[1])}
        report = {"verb": options.verb, **shape, **plain(facts), "version": __version__}
        print(json.dumps(report, allow_nan=False))
    elif options.verb == "fit":
        used, k = facts["clusters_used"], facts["k"]
        text = f"{used} of {k} clusters used, inertia {facts['inertia']:.6g}"
        if facts["algo"] == "clam":
            about = facts["partition_inertia"]
            text += f" about the memories, {about:.6g} about the means of the clusters"
        print(text, file=sys.stderr)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    options = command_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # type: ignore[assignment]
            code = _run(options)
        sys.stdout.flush()
    except ArgumentError as error:
        print(f"clam: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        state = getattr(options, "checkpoint", None)
        hint = f"; --resume continues the run of {state}" if state and state.exists() else ""
        print(f"clam: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FAILURES as error:
        if options.debug:
            raise
        print(f"clam: error: {error}", file=sys.stderr)
        return 1
    return code
