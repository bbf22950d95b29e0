# SPDX-License-Identifier: Apache-2.0
"""The tables of the command `clam`: formats, columns, names, gaps, and the labels of Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _command import QUICK, X, clam, write_tables_and_model

from clam_kernels import ClAM, KMeans, tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables_and_model(tmp_path_factory.mktemp("données 🐚"))


def test_labels_equal_python_in_every_format(folder: Path) -> None:
    expected = ClAM(3, n_init=2, max_iter=3, random_state=0).fit(X).labels_
    for name in ("x.npy", "plain.csv", "named.tsv", "x.parquet"):
        run = clam("predict", folder / "m.safetensors", folder / name)
        assert run.returncode == 0, run.stderr
        head, *labels = run.stdout.split()
        assert head == "label"
        np.testing.assert_array_equal(np.array(labels, int), expected)
    run = clam("predict", folder / "m.safetensors", folder / "x.npz")
    assert (run.returncode, "holds X, y" in run.stderr) == (1, True)
    words = ("predict", folder / "m.safetensors", folder / "x.npz", "--key", "X", "--json")
    run = clam(*words, "-o", folder / "labels.npy")
    assert json.loads(run.stdout)["rows"] == 150
    assert np.load(folder / "labels.npy").shape == (150,)
    refused = clam(*words)
    assert refused.returncode == 2
    assert "--json takes stdout: give predict a file with -o" in refused.stderr
    assert not refused.stdout
    fit = ("fit", folder / "x.npz", "--key", "X", "-k", 3, "--algo", "kmeans", "-v", "--json")
    fit_run = clam(*fit, "-o", folder / "told.safetensors")
    assert json.loads(fit_run.stdout)["k"] == 3
    assert "Iteration 0" in fit_run.stderr
    assert "is a folder" in clam(*words, "-o", folder, "--force").stderr


def test_complete_fills_empty_cells(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gaps.csv").write_text("a,b,c,d\n5.1,,1.4,0.2\n6.0,2.9,nan,1.5\n")
    run = clam("complete", folder / "m.safetensors", tmp_path / "gaps.csv")
    assert run.returncode == 0, run.stderr
    rows = [list(map(float, line.split(","))) for line in run.stdout.split()[1:]]
    assert np.isfinite(rows).all()
    assert rows[0][0] == 5.1
    assert rows[1][3] == 1.5


@pytest.mark.filterwarnings("default")
def test_the_columns_of_a_model_are_chosen_by_name(folder: Path, tmp_path: Path) -> None:
    model, text = tmp_path / "m", (folder / "named.tsv").read_text()
    assert clam("fit", folder / "named.tsv", "-k", 3, "-o", model, *QUICK).returncode == 0
    assert clam("predict", model, folder / "named.tsv").returncode == 0
    error = clam("predict", model, folder / "x.npy").stderr
    assert error == "clam: 150 rows read, 150 rows written\n"
    expected = clam("predict", model, folder / "named.tsv").stdout
    rows = [line.split("\t") for line in text.splitlines()]
    more = ["\t".join([c, f"id {i}", b, d, a]) for i, (a, b, c, d) in enumerate(rows)]
    more[0] = more[0].replace("id 0", "name")
    (tmp_path / "more.tsv").write_text("\n".join(more))
    run = clam("predict", model, tmp_path / "more.tsv")
    assert run.stdout == expected
    assert "the model was not fitted on column 'name', which is left out" in run.stderr
    filled = clam("complete", model, tmp_path / "more.tsv")
    assert filled.stdout == clam("complete", model, folder / "named.tsv").stdout
    assert filled.stdout.startswith("a,b,c,d\n")
    assert "warning" not in clam("predict", model, tmp_path / "more.tsv", "--drop", "name").stderr
    by_name = clam("predict", model, folder / "named.tsv", "--columns", "b,a,c,d")
    assert by_name.returncode == 1
    assert (
        "expected the columns 'a', 'b', 'c', 'd' that the model was fitted on, got 'b', 'a'"
        in by_name.stderr
    )
    for head, error in (
        (
            "a\tb\tc\te",
            "that the model was fitted on, got 'a', 'b', 'c', 'e'",
        ),
        ("a\tb\tc\td\td", "expected 1 column with the name 'd', got 2"),
    ):
        lines = text.splitlines()[1:]
        lines = [line + "\t1" for line in lines] if head.count("d") == 2 else lines
        (tmp_path / "wrong.tsv").write_text("\n".join([head, *lines]))
        run = clam("predict", model, tmp_path / "wrong.tsv")
        assert run.returncode == 1
        assert error in run.stderr


def test_a_model_of_many_columns_is_written(tmp_path: Path) -> None:
    names = [f"column {i} of a table {'x' * 60}" for i in range(15_000)]
    tables.write(tmp_path / "x.parquet", np.random.default_rng(0).normal(size=(3, 15_000)), names)
    options = ["-k", 2, "--algo", "kmeans", "--restarts", 1, "-o", tmp_path / "m"]
    run = clam("fit", tmp_path / "x.parquet", *options)
    assert run.returncode == 0, run.stderr
    assert KMeans.load(tmp_path / "m").feature_names_in_.tolist() == names


def test_one_empty_line_is_one_row(folder: Path, tmp_path: Path) -> None:
    table, model = tmp_path / "m7.csv", tmp_path / "s.st"
    table.write_text("a\n1\n\n3\n9\n")
    fitted = clam("fit", table, "-k", 2, "-o", model, *QUICK)
    assert fitted.returncode == 0, fitted.stderr
    run = clam("predict", model, table)
    assert len(run.stdout.split()) == 1 + 4
    assert run.stderr == "clam: 4 rows read, 4 rows written\n"


def test_predict_reads_what_complete_wrote(tmp_path: Path) -> None:
    hostile = ["", "a,b", 'c"d', "e\nf", "g\rh", "Größe", "日本", " x ", "x", "x", "2019", "n;t"]
    x = np.hstack([X, X, X])
    x[::7, 3] = np.nan
    for suffix in (".csv", ".tsv", ".csv.gz", ".parquet"):
        table, model, filled = (tmp_path / f"{name}{suffix}" for name in ("x", "m", "filled"))
        tables.write(table, x, hostile)
        options = ["--index-col", "none", "--header"]
        fit_run = clam("fit", table, *options, "-k", 3, "-o", model, *QUICK)
        assert fit_run.returncode == 0, fit_run.stderr
        done = clam("complete", model, table, "-o", filled)
        assert done.returncode == 0, done.stderr
        run = clam("predict", model, filled)
        assert run.returncode == 0, run.stderr
        assert run.stderr == "clam: 150 rows read, 150 rows written\n"
        assert run.stdout == clam("predict", model, table).stdout
        table_read, names = tables.read(filled, expected=hostile)
        assert names == hostile
        np.testing.assert_array_equal(table_read[~np.isnan(x)], x[~np.isnan(x)])


def test_a_model_recognises_its_names_in_a_first_row_of_numbers(tmp_path: Path) -> None:
    table, model = tmp_path / "x.csv", tmp_path / "m"
    tables.write(table, X, ["2019", "2021", "2023", "2025"])
    fit = clam("fit", table, "--header", "-k", 3, "-o", model, *QUICK)
    assert fit.returncode == 0, fit.stderr
    assert clam("predict", model, table).stderr == "clam: 150 rows read, 150 rows written\n"


def test_columns_are_chosen_by_options(folder: Path, tmp_path: Path) -> None:
    table, model = tmp_path / "x.csv", tmp_path / "m"
    lines = [f"r{i},{a},{b},{c},{d},ill" for i, (a, b, c, d) in enumerate(X)]
    table.write_text("\n".join(["id,a,b,c,d,label", *lines]))
    for chosen in (["--drop", "id,label"], ["--columns", "a,b,c,d"]):
        fit = clam("fit", table, *chosen, "-k", 3, "-o", model, "--force", *QUICK)
        assert fit.returncode == 0, fit.stderr
        expected = clam("predict", folder / "m.safetensors", folder / "x.npy").stdout
        assert clam("predict", model, table, *chosen).stdout == expected
    refused = clam("fit", table, "-k", 3, "-o", model, "--force")
    assert refused.returncode == 1
    assert "column 'id', row 1: expected a number, got 'r0'" in refused.stderr
    assert "got 'b', 'c', 'd'" in clam("predict", model, table, "--drop", "id,a,label").stderr
    by_number = clam("fit", folder / "x.npy", "--columns", "1,2", "-k", 3, "-o", model, "--force",
                     "--json", *QUICK)  # fmt: skip
    assert json.loads(by_number.stdout)["features"] == 2


def test_a_table_can_come_from_a_pipe(folder: Path) -> None:
    command = [sys.executable, "-m", "clam_kernels", "predict", folder / "m.safetensors", "-"]
    expected = clam("predict", folder / "m.safetensors", folder / "x.npy").stdout
    for name in ("plain.csv", "x.npy", "x.parquet"):
        content = (folder / name).read_bytes()
        run = subprocess.run(command, input=content, capture_output=True, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.decode() == expected


def test_the_index_may_have_several_levels(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i % 3},{i % 2},{i % 5}\n" for i in range(20))
    for names, columns in ((",,a,b", ""), ("u,v,a,b", "u,v"), (",Unnamed: 1,a,b", ",Unnamed: 1")):
        (tmp_path / "x.csv").write_text(f"{names}\n{rows}")
        fit = ["fit", tmp_path / "x.csv", "-k", 2, "--force", "-o", tmp_path / "m", *QUICK]
        run = clam(*fit, "--json", "--index-col", columns)
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["features"] == 2
