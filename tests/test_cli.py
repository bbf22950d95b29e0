# SPDX-License-Identifier: Apache-2.0
"""The command `clam`: exit codes, files, messages."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _children import ended
from _command import QUICK, X, clam, write_tables_and_model
from sklearn.datasets import load_wine

import clam_kernels
from clam_kernels import ClAM, KMeans, tables
from clam_kernels.exceptions import DataFileError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables_and_model(tmp_path_factory.mktemp("données 🐚"))


@pytest.mark.filterwarnings("default:standardize=False")
def test_standardize(tmp_path: Path) -> None:
    """The README's commands on a raw table: no filled cell lies outside the range of its column."""
    x = load_wine().data
    gaps = np.where(np.random.default_rng(0).random(x.shape) < 0.1, np.nan, x)
    np.save(tmp_path / "gaps.npy", gaps)
    fit = ("fit", tmp_path / "gaps.npy", "-k", 3, *QUICK, "-o")
    for option, standard, warned in (
        ([], True, False),
        (["--standardize"], True, False),
        (["--no-standardize"], False, True),
    ):
        model, out = tmp_path / f"m{len(option)}{standard}", tmp_path / f"{option}.npy"
        run = clam(*fit, model, *option)
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("warning: standardize=False") == warned
        assert (ClAM.load(model).scale_ != 1).any() == standard
        assert clam("complete", model, tmp_path / "gaps.npy", "-o", out).returncode == 0
        filled = np.load(out)
        assert (filled >= np.nanmin(gaps, axis=0)).all()
        assert (filled <= np.nanmax(gaps, axis=0)).all()
    refused = clam(*fit, tmp_path / "k", "--algo", "kmeans", "--standardize")
    assert refused.returncode == 2
    assert "--standardize belongs to --algo clam" in refused.stderr


def test_fit_reports_both_inertias(tmp_path: Path) -> None:
    """The inertia of the memories, and that of the partition about the means of its clusters."""
    np.save(tmp_path / "x.npy", load_wine().data)
    fit = ("fit", tmp_path / "x.npy", "-k", 3, *QUICK, "-o")
    run = clam(*fit, tmp_path / "m", "--json")
    report = json.loads(run.stdout)
    model = ClAM.load(tmp_path / "m")
    x = load_wine().data / model.scale_
    means = np.stack([x[model.labels_ == k].mean(0) for k in range(3)])
    about = np.square(x - means[model.labels_]).sum()
    assert report["partition_inertia"] == pytest.approx(about)
    assert report["inertia"] == model.inertia_ >= about * (1 - 1e-9)
    run = clam(*fit, tmp_path / "n")
    both = f"inertia {model.inertia_:.6g} about the memories, {about:.6g} about the means of the"
    assert both in run.stderr
    run = clam(*fit, tmp_path / "k", "--algo", "kmeans", "--json")
    assert json.loads(run.stdout)["partition_inertia"] == json.loads(run.stdout)["inertia"]


def test_outputs(folder: Path, tmp_path: Path) -> None:
    model = folder / "m.safetensors"
    for suffix in (".csv", ".npy", ".parquet"):
        out = tmp_path / f"labels{suffix}"
        assert clam("predict", model, folder / "x.npy", "-o", out).returncode == 0
        assert out.stat().st_size > 100
    again = clam("predict", model, folder / "x.npy", "-o", tmp_path / "labels.csv")
    assert again.returncode == 2
    assert "--force" in again.stderr
    forced = clam("predict", model, folder / "x.npy", "-o", tmp_path / "labels.csv", "--force")
    assert forced.returncode == 0
    same = clam("complete", model, folder / "plain.csv", "-o", folder / "plain.csv", "--force")
    assert same.returncode == 2
    assert "is an input" in same.stderr
    assert clam("transform", model, folder / "x.npy").stdout.startswith("clam0,clam1,clam2\n")
    assert clam("score", model, folder / "x.npy").stdout.startswith("score -")
    picture = clam("plot", model, folder / "x.npy", "-o", tmp_path / "p.png")
    assert picture.returncode == 0, picture.stderr
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_k_means_by_command(folder: Path, tmp_path: Path) -> None:
    model, x = tmp_path / "k.safetensors", folder / "x.npy"
    run = clam("fit", x, "-k", 3, "--algo", "kmeans", "--restarts", 2, "-o", model, "--json")
    facts = json.loads(run.stdout)
    assert (facts["algo"], facts["clusters_used"]) == ("kmeans", 3)
    expected = KMeans(3, n_init=2, random_state=0).fit(X)
    assert facts["inertia"] == expected.inertia_
    labels = clam("predict", model, x).stdout.split()[1:]
    np.testing.assert_array_equal(np.array(labels, int), expected.labels_)
    assert clam("transform", model, x).stdout.startswith("kmeans0,kmeans1,kmeans2\n")
    score = clam("score", model, x).stdout
    assert score.startswith("score -78.85")
    assert "energy" not in score
    assert clam("plot", model, x, "-o", tmp_path / "p.png").returncode == 0
    refused = clam("complete", model, x)
    assert (refused.returncode, "cannot complete" in refused.stderr) == (1, True)
    mixed = ("fit", x, "-k", 3, "--algo", "kmeans", "--recipe", "paper", "-o", tmp_path / "n")
    assert clam(*mixed).returncode == 2


def test_bad_input_is_one_line_and_exit_1(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "nan.npy", np.full((5, 2), np.nan))
    np.save(tmp_path / "inf.npy", np.full((5, 2), np.inf))
    (tmp_path / "text.csv").write_text("a,b\n1,x\n2,y\n")
    (tmp_path / "ragged.csv").write_text("5,2\n3\n")
    (tmp_path / "evil.npy").write_bytes(pickle.dumps({"a": 1}))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    cases = {
        "nan.npy": "nan.npy: expected a value in every column, got none in 0, 1",
        "inf.npy": "infinity",
        "text.csv": "column 'b', row 1: expected a number, got 'x'",
        "ragged.csv": "ragged.csv",
        "evil.npy": "evil.npy",
        "object.npy": "pickle|object",
        "missing.npy": "no such file",
    }
    for name, text in cases.items():
        run = clam("fit", tmp_path / name, "-k", 2, "-o", tmp_path / "m")
        assert run.returncode == 1, name
        assert run.stderr.startswith("clam: error: "), run.stderr
        assert any(part in run.stderr for part in text.split("|")), run.stderr
        assert len(run.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "m").exists()
    assert clam("predict", folder / "x.npy", folder / "x.npy").returncode == 1
    assert clam("fit", folder / "x.npy").returncode == 2
    assert clam("nonsense").returncode == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", 0], "argument -k/--clusters: expected a whole number >= 1, got '0'"),
        (["-k", "2.5"], "argument -k/--clusters: expected a whole number >= 1, got '2.5'"),
        (["-k", 2, "--seed", -1], "argument --seed: expected a whole number from 0 to 4294967295"),
        (["-k", 2, "--restarts", 0], "argument --restarts: expected a whole number >= 1, got '0'"),
        (["-k", 2, "--epochs", 0], "argument --epochs: expected a whole number >= 1, got '0'"),
    ],
)
@pytest.mark.parametrize("algo", ["clam", "kmeans"])
def test_wrong_numbers_name_the_option(folder: Path, tmp_path: Path, words, message, algo) -> None:
    run = clam("fit", folder / "x.npy", "--algo", algo, *words, "-o", tmp_path / "m", "--force")
    assert run.returncode == 2
    assert message in run.stderr


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("algo", ["clam", "kmeans"])
def test_errors_of_estimators_name_options_of_the_command(tmp_path: Path, algo: str) -> None:
    def fit(text: str, *words: object) -> str:
        (tmp_path / "x.csv").write_text(text)
        run = clam(
            "fit", tmp_path / "x.csv", "--algo", algo, *words, "-o", tmp_path / "m", "--force"
        )
        assert not re.search("n_clusters|n_init|max_iter|random_state|Input X", run.stderr)
        return run.stderr

    assert "x.csv: expected at least 3 rows for -k 3, got 2" in fit("a,b\n1,2\n3,4\n", "-k", 3)
    infinite = fit("a,b\n1,2\n3,inf\n5,6\n", "-k", 2)
    assert "x.csv: column 'b', row 2: expected a finite number, got infinity" in infinite
    assert "column 1, row 2: expected a finite" in fit("1,2\n3,inf\n5,6\n", "-k", 2, "--no-header")
    gap = fit("a,b\n1,\n3,\n5,\n", "-k", 2)
    missing = "row 1: expected a finite number, got a missing cell"
    assert f"x.csv: {'expected a value' if algo == 'clam' else 'column'}" in gap
    assert ("got none in 'b'" if algo == "clam" else missing) in gap
    assert "-k" in fit("a,b\n1,2\n1,2\n1,2\n", "-k", 2, *QUICK)
    if not torch.cuda.is_available():
        assert "--device: expected" in fit("5,2\n3,4\n5,9\n", "-k", 2, "--device", "cuda")
    np.save(tmp_path / "wide.npy", np.eye(3))
    assert fit("5,2\n3,4\n5,9\n", "-k", 2, *QUICK).startswith("2 of 2")
    run = clam("predict", tmp_path / "m", tmp_path / "wide.npy")
    assert "wide.npy has 3 features, but" in run.stderr


def test_an_output_that_cannot_be_written_fails_before_the_fit(folder, tmp_path: Path) -> None:
    long = tmp_path / ("m" * 250)
    run = clam("fit", folder / "missing.npy", "-k", 3, "-o", long)
    assert run.returncode == 2
    assert "File name too long" in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "hidden", "text"),
    [
        ("fit -k 3 -v", "tqdm", "a progress bar needs tqdm, which the extra progress brings"),
        ("plot", "matplotlib", "a picture needs matplotlib, which the extra plot brings"),
    ],
)
def test_an_error_names_the_extra_of_a_missing_package(
    folder, tmp_path, monkeypatch, verb, hidden, text
):
    for name in list(sys.modules):
        if name.partition(".")[0] == hidden:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.setitem(sys.modules, f"{hidden}.auto", None)
    verb, *rest = verb.split()
    words = [] if verb == "fit" else [folder / "m.safetensors"]
    run = clam(verb, *words, folder / "x.npy", *rest, "-o", tmp_path / "out.png")
    assert run.returncode == 1
    assert run.stderr.strip() == f"clam: error: {run.stderr.strip().partition('error: ')[2]}"
    assert f"{text}: pip install {hidden}" in run.stderr
    assert not list(tmp_path.iterdir())


def test_one_row_has_a_picture(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", X[:1])
    run = clam("plot", folder / "m.safetensors", tmp_path / "one.npy", "-o", tmp_path / "p.png")
    assert (run.returncode, run.stderr) == (0, "")


def test_a_table_without_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("a,b,c,d\n")
    np.save(tmp_path / "none.npy", np.zeros((0, 4), int))
    for verb in ("predict", "transform", "complete", "score"):
        for name in ("none.csv", "none.npy"):
            run = clam(verb, folder / "m.safetensors", tmp_path / name)
            assert run.returncode == 1
            assert f"{name}: no rows" in run.stderr


def test_a_missing_folder_fails_before_the_fit(folder: Path, tmp_path: Path) -> None:
    run = clam("fit", folder / "x.npy", "-k", 3, "-o", tmp_path / "none" / "m")
    assert run.returncode == 2
    assert "is not a folder" in run.stderr


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((4000, 1000)))
    with pytest.raises(DataFileError, match="unpacks to more"):
        tables.read(tmp_path / "bomb.npz")


def test_help_imports_neither_scikit_learn_nor_triton() -> None:
    code = (
        "import sys\nfrom clam_kernels.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'sklearn', 'triton'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "fit" in run.stdout


# A shell starts a background job with SIGINT ignored, and its children inherit this.
HEARS_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("clam_kernels", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_is_130_without_a_traceback(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20000, 8)))
    model = tmp_path / "m"
    arguments = ["fit", tmp_path / "x.npy", "-k", "8", "-o", model, "--epochs", "5000", "-v"]
    run = subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *map(str, arguments)], stderr=subprocess.PIPE
    )
    with ended(run):
        assert run.stderr is not None
        output = b""
        while b"epoch" not in output:  # training has begun
            more = os.read(run.stderr.fileno(), 4096)
            assert more, output
            output += more
        run.send_signal(signal.SIGINT)
        rest = run.communicate()[1]
    assert run.returncode == 130
    assert b"Traceback" not in rest
    assert not model.exists()


def test_a_bad_output_fails_before_the_fit(folder: Path, tmp_path: Path) -> None:
    model, missing = folder / "m.safetensors", tmp_path / "missing.npy"
    for verb, name in (("predict", "l.txt"), ("complete", "x.xlsx"), ("plot", "p.gif1")):
        run = clam(verb, model, missing, "-o", tmp_path / name)
        assert run.returncode == 2, run.stderr
        assert f"got {Path(name).suffix!r}" in run.stderr


def test_the_version() -> None:
    run = clam("--version")
    assert (run.returncode, run.stdout.split()) == (0, ["clam_kernels", clam_kernels.__version__])


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_without_source(folder: Path, tmp_path: Path) -> None:
    tables.write(tmp_path / "x.csv", X, list("0123"))
    run = clam("fit", tmp_path / "x.csv", "-k", 3, "-o", tmp_path / "m", *QUICK)
    first = run.stderr.splitlines()[0]
    assert first.startswith("clam: warning: ")
    assert first.endswith(
        "the first row (0,1,2,3) became column names; --no-header reads it as data"
    )


def test_json_has_no_infinity(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClAM, "score", lambda *_: -np.inf)
    run = clam("score", folder / "m.safetensors", folder / "x.npy", "--json")
    assert "Infinity" not in run.stdout
    assert json.loads(run.stdout)["score"] is None


def test_the_installed_command(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clam_kernels"]
    run = subprocess.run(
        [*command, "predict", folder / "m.safetensors", folder / "x.npy", "-o", tmp_path / "l.npy"],
        capture_output=True,
        check=False,
    )
    message = b"clam: 150 rows read, 150 rows written\n"
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", message)
    assert np.load(tmp_path / "l.npy").shape == (150,)


@pytest.mark.filterwarnings("always")
def test_a_column_that_counts_the_rows_has_a_warning(tmp_path: Path) -> None:
    rows = np.column_stack([np.arange(1000, 1040), np.random.default_rng(0).normal(size=(40, 2))])
    table = tmp_path / "table.csv"
    np.savetxt(table, rows, delimiter=",", header="id,a,b", comments="")
    model = str(tmp_path / "m.safetensors")
    command = ("fit", str(table), "-k", "2", "--algo", "kmeans", "-o", model, "--force")
    assert "column 'id' counts the rows: --drop id leaves it out" in clam(*command).stderr
    assert "warning" not in clam(*command, "--drop", "id").stderr
