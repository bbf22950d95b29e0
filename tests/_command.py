# SPDX-License-Identifier: Apache-2.0
"""Run the command `clam` in the process of a test, on tables of iris."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from sklearn.datasets import load_iris

from clam_kernels import tables
from clam_kernels.cli import main

X = load_iris().data
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


def write_tables_and_model(root: Path) -> Path:
    """A folder with a table in every format, and a model."""
    np.save(root / "x.npy", X)
    np.savez(root / "x.npz", X=X, y=load_iris().target)
    np.savetxt(root / "plain.csv", X, delimiter=",", fmt="%.17g")
    np.savetxt(root / "named.tsv", X, delimiter="\t", fmt="%.17g", header="a\tb\tc\td", comments="")
    tables.write(root / "x.parquet", X, list("abcd"))
    run = clam("fit", root / "x.npy", "-k", 3, "-o", root / "m.safetensors", *QUICK)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("3 of 3 clusters used")
    return root
