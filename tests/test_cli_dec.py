# SPDX-License-Identifier: Apache-2.0
"""The command with deep embedded clustering."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clam_kernels import DEC
from clam_kernels.cli import main


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three clusters of 4 x 4 images, with names of columns."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(90, 16))) + 4.0 * np.eye(3, 16)[np.arange(90) % 3]
    path = tmp_path / "table.csv"
    header = ",".join(f"p{i}" for i in range(16))
    np.savetxt(path, x, delimiter=",", header=header, comments="")
    return path


def fit(table: Path, *options: str, algo: str = "dec") -> tuple[int, Path]:
    model = table.parent / "model.safetensors"
    arguments = ["fit", str(table), "-k", "3", "--algo", algo, "--epochs", "2", "-o", str(model)]
    return main([*arguments, *options]), model


@pytest.mark.parametrize("algo", ["dec", "idec"])
def test_every_verb_works_with_a_dec_model(
    table: Path, algo: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, model = fit(table, "--json", algo=algo)
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["algo"], report["k"], report["rows"]) == (algo, 3, 90)
    assert report["stop_reason"] in ("tol", "max_iter")
    labels = tmp_path / "labels.npy"
    assert main(["predict", str(model), str(table), "-o", str(labels)]) == 0
    assert np.array_equal(np.load(labels).ravel(), DEC.load(model).labels_)
    assert main(["transform", str(model), str(table)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(",")[:2] == ["dec0", "dec1"]
    assert len(lines) == 91
    assert main(["score", str(model), str(table)]) == 0
    assert capsys.readouterr().out.startswith("score -")
    assert main(["plot", str(model), str(table), "-o", str(tmp_path / "codes.png")]) == 0
    assert main(["info", str(model)]) == 0
    assert algo in capsys.readouterr().out
    assert main(["complete", str(model), str(table)]) == 1
    assert "cannot complete; clam can" in capsys.readouterr().err


def test_images_are_shifted_and_rotated(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(table, "--images", "4x4", "--regroup")[0] == 0
    assert fit(table, "--images", "5x4", "--force")[0] == 1
    assert "expected 20 columns for --images 5x4, got 16" in capsys.readouterr().err
    for bad in ("4", "0x4", "4xx", "-1x4"):
        with pytest.raises(SystemExit):
            fit(table, f"--images={bad}", "--force")
        assert f"expected a height and a width as 28x28, got '{bad}'" in capsys.readouterr().err


def test_a_checkpoint_continues_the_run(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = table.parent / "state.safetensors"
    code, model = fit(table, "--checkpoint", str(state))
    assert code == 0
    labels = DEC.load(model).labels_
    assert fit(table, "--checkpoint", str(state), "--force")[0] == 2
    assert "exists; --resume continues its run" in capsys.readouterr().err
    assert fit(table, "--checkpoint", str(state), "--resume", "--force")[0] == 0
    assert np.array_equal(DEC.load(model).labels_, labels)


@pytest.mark.parametrize(
    ("algo", "options", "text"),
    [
        ("clam", ["--images", "4x4"], "--images belongs to --algo dec, idec"),
        ("kmeans", ["--checkpoint", "state"], "--checkpoint belongs to --algo dec, idec"),
        ("clam", ["--regroup"], "--regroup belongs to --algo dec, idec"),
        ("kmeans", ["--recipe", "paper"], "--recipe belongs to --algo clam, dec, idec"),
        ("dec", ["--resume"], "--resume needs --checkpoint"),
    ],
)
def test_options_of_another_algorithm_are_refused(
    table: Path, algo: str, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(table, *options, algo=algo)[0] == 2
    assert text in capsys.readouterr().err


def test_a_missing_cell_names_its_place(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = table.read_text().splitlines()
    lines[3] = "," + lines[3].partition(",")[2]
    table.write_text("\n".join(lines))
    assert fit(table)[0] == 1
    error = capsys.readouterr().err
    assert "'p0', row 3: expected a finite number" in error
    assert "only --algo clam takes any" in error
