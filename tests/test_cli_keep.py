# SPDX-License-Identifier: Apache-2.0
"""`clam predict`, `transform` and `complete` repeat columns of the input with `--keep`."""

from __future__ import annotations

import csv
import datetime
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from _command import QUICK, clam
from pyarrow import parquet as pq
from sklearn.datasets import load_iris

X = load_iris().data
# Texts that a reader of numbers or of missing words would change.
IDS = ["007", "1.50", "", "NA", "a,b", 'c"d', " x ", "Größe", "e\nf", "true", "-", "1e3", "n;t"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with a column of text first and one last, and a model of its features."""
    root = tmp_path_factory.mktemp("keep")
    with (root / "x.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "a", "b", "c", "d", "day"])
        writer.writerows([_id(i), *row, f"day {i}"] for i, row in enumerate(X))
    fit = ["fit", root / "x.csv", "--drop", "id,day", "-k", 3, *QUICK, "-o", root / "m"]
    assert clam(*fit).returncode == 0
    return root


def _id(row: int) -> str:
    return IDS[row % len(IDS)]


def _rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def _labels(folder: Path) -> list[str]:
    run = clam("predict", folder / "m", folder / "x.csv", "--drop", "id,day")
    assert run.returncode == 0, run.stderr
    return run.stdout.split()[1:]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", ["--keep id,day", "--keep day,id --drop id", "--keep 5,0"])
def test_labels_have_the_columns_before_them(folder: Path, options: str) -> None:
    run = clam("predict", folder / "m", folder / "x.csv", *options.split())
    assert (run.returncode, run.stderr) == (0, "clam: 150 rows read, 150 rows written\n")
    head, *rows = _rows(run.stdout)
    assert head == ["id", "day", "label"]
    expected = [[_id(i), f"day {i}", label] for i, label in enumerate(_labels(folder))]
    assert rows == expected


@pytest.mark.filterwarnings("default")
def test_keep_works_beside_drop(folder: Path) -> None:
    run = clam("predict", folder / "m", folder / "x.csv", "--keep", "day", "--drop", "id")
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr
    assert _rows(run.stdout)[1] == ["day 0", _labels(folder)[0]]
    run = clam("predict", folder / "m", folder / "x.csv", "--keep", "day")
    assert "the model was not fitted on column 'id', which is left out" in run.stderr


def test_files_have_the_columns(folder: Path, tmp_path: Path) -> None:
    labels = _labels(folder)
    for suffix in (".csv", ".tsv", ".csv.gz", ".parquet"):
        out = tmp_path / f"out{suffix}"
        run = clam(
            "predict", folder / "m", folder / "x.csv", "--keep", "id", "--drop", "day", "-o", out
        )
        assert run.returncode == 0, run.stderr
        if suffix == ".parquet":
            table = pq.read_table(out)
            assert table.schema.field("id").type == pa.string()
            assert table.column("id").to_pylist() == [_id(i) for i in range(150)]
            assert list(map(str, table.column("label").to_pylist())) == labels
        else:
            mark = "\t" if suffix == ".tsv" else ","
            frame = pd.read_csv(out, sep=mark, dtype=str, keep_default_na=False)
            assert frame["id"].tolist() == [_id(i) for i in range(150)]
            assert frame["label"].tolist() == labels


def test_npy_is_refused_before_the_model_is_read(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    run = clam("predict", tmp_path / "no model", folder / "x.csv", "--keep", "id", "-o", out)
    assert run.returncode == 2
    assert run.stderr == (
        f"clam: error: {out}: expected an output .csv, .tsv (also with .gz) or .parquet for the"
        " columns of --keep, got '.npy'\n"
    )
    assert not out.exists()


def test_a_completed_table_keeps_its_other_columns(folder: Path, tmp_path: Path) -> None:
    rows = _rows((folder / "x.csv").read_text(encoding="utf-8"))
    for row in rows[1::7]:
        row[2] = ""
    with (tmp_path / "gaps.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    run = clam("complete", folder / "m", tmp_path / "gaps.csv", "--keep", "id,day")
    assert run.returncode == 0, run.stderr
    head, *filled = _rows(run.stdout)
    assert head == ["id", "day", "a", "b", "c", "d"]
    assert [row[:2] for row in filled] == [[row[0], row[5]] for row in rows[1:]]
    assert np.isfinite([float(cell) for row in filled for cell in row[2:]]).all()
    distances = clam("transform", folder / "m", folder / "x.csv", "--keep", "id", "--drop", "day")
    assert distances.stdout.startswith("id,clam0,clam1,clam2\n007,")


def test_columns_without_names_are_kept_by_number(tmp_path: Path) -> None:
    model = tmp_path / "m"
    table = np.column_stack([np.arange(150) + 100, X, np.arange(150) / 4])
    np.save(tmp_path / "x.npy", table)
    np.savetxt(tmp_path / "x.csv", table, delimiter=",", fmt="%g")
    options = ["--drop", "0,5", "--no-header", "-k", 3, *QUICK, "-o", model]
    assert clam("fit", tmp_path / "x.csv", *options).returncode == 0
    for name, first in (("x.npy", ["100.0", "0.0"]), ("x.csv", ["100", "0"])):
        run = clam("complete", model, tmp_path / name, "--no-header", "--keep", "0,5")
        assert run.returncode == 0, run.stderr
        head, row, *_ = _rows(run.stdout)
        assert head == [f"column{i}" for i in (0, 5, 1, 2, 3, 4)]
        assert row == [*first, "5.1", "3.5", "1.4", "0.2"]


def test_parquet_keeps_the_types_of_its_columns(folder: Path, tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4, 5)
    columns = {
        "when": pa.array([day, None, day], pa.timestamp("ns")),
        "small": pa.array([0.1, 2, None], pa.float32()),
        "count": pa.array([2**60, None, 3]),
        "raw": pa.array([b"\xff", b"x", None]),
        "kind": pa.array(["u", "v", None]).dictionary_encode(),
        **dict(zip("abcd", X[:3].T, strict=True)),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    words = ["predict", folder / "m", tmp_path / "x.parquet", "--keep", "when,small,count,raw,kind"]
    out = tmp_path / "out.parquet"
    run = clam(*words, "-o", out)
    assert run.returncode == 0, run.stderr
    written = pq.read_table(out)
    assert written.column_names == ["when", "small", "count", "raw", "kind", "label"]
    for name in ("when", "small", "count", "raw", "kind"):
        assert written.column(name).to_pylist() == columns[name].to_pylist()
        assert written.schema.field(name).type == columns[name].type
    run = clam(*words)
    assert run.returncode == 0, run.stderr
    _, *rows = _rows(run.stdout)
    assert rows[0][:-1] == ["2026-01-02 03:04:05.000000000", "0.1", str(2**60), "\udcff", "u"]
    assert rows[1][:-1] == ["", "2.0", "", "x", "v"]
    assert rows[2][1:-1] == ["", "3", "", ""]


def test_text_that_is_no_utf_8_stays_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "x.csv", tmp_path / "out.csv"
    table.write_bytes(b"id,a,b,c,d\nna\xefve,5.1,3.5,1.4,0.2\n")
    words = ["predict", folder / "m", table, "--keep", "id", "-o"]
    run = clam(*words, out)
    assert run.returncode == 0, run.stderr
    assert out.read_bytes().startswith(b"id,label\nna\xefve,")
    assert clam(*words, tmp_path / "out.parquet").returncode == 0
    assert pq.read_table(tmp_path / "out.parquet").column("id").to_pylist() == [b"na\xefve"]


def test_an_index_column_is_kept_by_its_name(folder: Path, tmp_path: Path) -> None:
    frame = pd.DataFrame(X, columns=list("abcd"))
    for name, column in (("", ""), ("Unnamed: 0", "Unnamed: 0")):
        frame.to_csv(tmp_path / "x.csv", index_label=name)
        run = clam("predict", folder / "m", tmp_path / "x.csv", "--keep", column)
        assert run.returncode == 0, run.stderr
        head, *rows = _rows(run.stdout)
        assert head == [name, "label"]
        assert rows[149][0] == "149"
    frame.set_index("a", drop=False).rename_axis("row").to_parquet(tmp_path / "x.parquet")
    run = clam("predict", folder / "m", tmp_path / "x.parquet", "--keep", "row")
    assert run.stdout.startswith("row,label\n5.1,"), run.stderr


@pytest.mark.filterwarnings("default")
def test_wrong_columns_are_one_line(folder: Path, tmp_path: Path) -> None:
    x = folder / "x.csv"
    missing = clam("predict", folder / "m", x, "--keep", "name")
    assert missing.returncode == 1
    assert missing.stderr == (
        f"clam: error: {x}: no column 'name'; the table has the columns 'id', 'a', 'b', 'c', 'd',"
        " 'day'\n"
    )
    feature = clam("predict", folder / "m", x, "--keep", "a")
    assert feature.returncode == 1
    assert "expected the columns 'a', 'b', 'c', 'd' that the model was fitted on" in feature.stderr
    text = x.read_text(encoding="utf-8").replace("day\n", "label\n", 1).replace("day\r", "label\r")
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    both = clam("predict", folder / "m", tmp_path / "x.csv", "--keep", "label")
    assert both.returncode == 1
    assert "--keep: expected names that the result does not have, got 'label'" in both.stderr
    assert not both.stdout
    assert clam("complete", folder / "m", tmp_path / "x.csv", "--keep", "label").returncode == 0
    for verb in ("fit", "score", "plot"):
        assert clam(verb, folder / "m", x, "--keep", "id").returncode == 2


def test_a_table_from_a_pipe_keeps_columns(folder: Path) -> None:
    command = [sys.executable, "-m", "clam_kernels", "predict", folder / "m", "-", "--keep", "id"]
    run = subprocess.run(
        [*command, "--drop", "day"],
        input=(folder / "x.csv").read_bytes(),
        capture_output=True,
        check=False,
        env=os.environ,
    )
    assert run.returncode == 0, run.stderr
    direct = clam("predict", folder / "m", folder / "x.csv", "--keep", "id", "--drop", "day")
    assert run.stdout.decode() == direct.stdout
