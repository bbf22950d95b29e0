# SPDX-License-Identifier: Apache-2.0
"""`clam info`: facts of the installation, or of a model file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _command import QUICK, clam
from sklearn.datasets import load_iris

import clam_kernels
from clam_kernels import ClAM, KMeans, tables

X = load_iris().data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each algorithm."""
    root = tmp_path_factory.mktemp("info")
    tables.write(root / "x.csv", X, list("abcd"))
    np.save(root / "x.npy", X)
    fit = ["fit", root / "x.csv", "-k", 3, *QUICK, "-o", root / "clam"]
    assert clam(*fit, "--standardize", "--seed", 7).returncode == 0
    KMeans(4, n_init=1, init=X[:4], random_state=0).fit(X).save(root / "kmeans")
    return root


def test_the_installation() -> None:
    run = clam("info", "--json")
    facts = json.loads(run.stdout)
    assert run.returncode == 0
    assert facts["ops"]["am_step"]["reference"] == "available"
    assert str(Path.home()) not in run.stdout
    assert "selftest_error" in clam("info", "--selftest").stdout
    module = [sys.executable, "-m", "clam_kernels.info", "--json"]
    output = subprocess.run(module, capture_output=True, check=True).stdout
    assert json.loads(output)["ops"] == facts["ops"]


def test_a_model_file_as_json(folder: Path) -> None:
    run = clam("info", folder / "clam", "--json")
    assert (run.returncode, run.stderr) == (0, "")
    facts, model = json.loads(run.stdout), ClAM.load(folder / "clam")
    assert (facts["algo"], facts["k"], facts["rows"], facts["features"]) == ("clam", 3, 150, 4)
    assert facts["feature_names"] == list("abcd")
    assert facts["scale"] == model.scale_.tolist()
    assert facts["inertia"] == model.inertia_
    assert facts["version"] == clam_kernels.__version__
    settings = facts["settings"]
    assert settings.keys() == model.get_params().keys()
    assert (settings["random_state"], settings["standardize"], settings["n_init"]) == (7, True, 2)


def test_a_model_file_as_text(folder: Path) -> None:
    run = clam("info", folder / "clam")
    assert (run.returncode, run.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert lines["algo"] == "clam"
    assert lines["feature_names"] == "'a', 'b', 'c', 'd'"
    assert lines["scale"] == "one for each column"
    assert "random_state 7" in lines["settings"]
    lines = dict(
        line.split(maxsplit=1) for line in clam("info", folder / "kmeans").stdout.splitlines()
    )
    assert (lines["algo"], lines["k"], lines["feature_names"]) == ("kmeans", "4", "none")
    assert "init array of 4 rows" in lines["settings"]
    assert "scale" not in lines
    assert json.loads(clam("info", folder / "kmeans", "--json").stdout)["settings"]["init"] == (
        X[:4].tolist()
    )


def test_a_file_that_is_no_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    for name, text in (("x.npy", "no model file"), ("x.csv", "model file"), ("none", "No such")):
        run = clam("info", folder / name)
        assert run.returncode == 1
        assert run.stderr.startswith("clam: error: ")
        assert text in run.stderr
        assert name in run.stderr
        assert len(run.stderr.splitlines()) == 1
        assert not run.stdout
    run = clam("info", folder / "clam", "--selftest")
    assert run.returncode == 2
    assert "--selftest belongs to `clam info` without a model file" in run.stderr
