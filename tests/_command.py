# SPDX-License-Identifier: Apache-2.0
"""Run the command `clam` in the process of a test."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace

from clam_kernels.cli import main

# Options of a fit that takes little time.
QUICK = ["--restarts", "2", "--epochs", "3"]


def clam(*arguments: object) -> SimpleNamespace:
    """Run the command in this process: exit code and output."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
        out.flush()
    stdout = out.buffer.getvalue().decode("utf-8", "surrogateescape")
    return SimpleNamespace(returncode=code, stdout=stdout, stderr=err.getvalue())
