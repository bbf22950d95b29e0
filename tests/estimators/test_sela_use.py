# SPDX-License-Identifier: Apache-2.0
"""SeLa beside other things: pipelines, writers, labels by file name."""

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


def test_a_writer_that_is_none():
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
        found = [int(row[f"head_{head}"]) for row in rows]
        assert found == model.labels_[head].tolist()
