# SPDX-License-Identifier: Apache-2.0
"""SeLa in a pipeline, with writers, and with labels by file name."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from _sela_case import X, Y, same, sela
from PIL import Image
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from clam_kernels import SeLa


def test_in_a_pipeline_and_with_classes_at_hand():
    alone = sela().fit(X)
    piped = make_pipeline(FunctionTransformer(), sela()).fit(X)
    same(piped[-1], alone)
    same(sela().fit(X, Y), alone)


def test_an_object_that_is_no_writer_is_refused():
    with pytest.raises(TypeError, match="writer: expected an object with add_scalar, got str"):
        sela(writer="runs").fit(X)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_labels_of_a_folder_go_by_the_names_of_its_files(tmp_path, suffix):
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["plain.png", "with, comma.png", 'with "marks".png', *(f"{i}.png" for i in range(9))]
    for i, name in enumerate(names):
        Image.fromarray(np.full((4, 4), 20 * i, np.uint8)).save(folder / name)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    model = SeLa(encoder, 3, n_heads=2, n_epochs=1, random_state=0).fit(folder)
    path = tmp_path / f"labels{suffix}"
    model.export_labels(path)
    if suffix == ".parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    else:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    assert [row["file"] for row in rows] == model.files_
    assert sorted(model.files_) == sorted(names)
    for head in range(2):
        labels = [int(row[f"head_{head}"]) for row in rows]
        assert labels == model.labels_[head].tolist()


@pytest.mark.parametrize(("whole", "real"), [(np.int64, np.float64), (np.uint8, np.float16)])
def test_numbers_of_numpy_give_the_same_run(whole, real):
    """A fit converts them to Python's numbers: a uint8 would overflow."""
    ints = {"n_heads": 3, "n_epochs": 3, "batch_size": 33, "n_relabels": 4, "max_iter": 200,
            "n_augment": 2, "random_state": 0}  # fmt: skip
    floats = {"learning_rate": 0.0625, "momentum": 0.5, "weight_decay": 0.25, "lam": 25.0}
    options = {n: whole(x) for n, x in ints.items()} | {n: real(x) for n, x in floats.items()}
    model = sela(n_clusters=whole(4), **options).fit(X)
    same(model, sela(n_clusters=4, **ints, **floats).fit(X))
    assert type(model.n_clusters) is whole
    assert type(model.lam) is real
