# SPDX-License-Identifier: Apache-2.0
"""Model files: round trips, damage, foreign files, full disks."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save as to_bytes
from sklearn.datasets import load_iris

from clam_kernels import ClAM, serialize
from clam_kernels.cli import main
from clam_kernels.estimators.common.files import COLUMNS
from clam_kernels.exceptions import ModelFileError

X = load_iris().data


@pytest.fixture(scope="module")
def model() -> ClAM:
    return ClAM(3, n_init=2, max_iter=2, random_state=0).fit(X)


@pytest.fixture
def saved(model: ClAM, tmp_path: Path) -> Path:
    model.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_round_trip(model: ClAM, saved: Path) -> None:
    again = ClAM.load(saved)
    assert again.get_params() == model.get_params()
    for name in ("cluster_centers_", "labels_", "loss_curve_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(model, name))
        assert getattr(again, name).dtype == getattr(model, name).dtype
    for name in ("inertia_", "beta_", "gap_", "n_clusters_used_", "n_iter_", "n_features_in_"):
        assert getattr(again, name) == getattr(model, name)
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    np.testing.assert_array_equal(again.energy(X), model.energy(X))


def test_names_arrays_and_tensors_round_trip(tmp_path: Path) -> None:
    frame = pd.DataFrame(X, columns=["a", "b", "c", "d"])
    init = X[:3].astype(np.float32)
    fitted = ClAM(3, init=init, n_init=1, max_iter=1, random_state=0).fit(frame)
    fitted.save(tmp_path / "m")
    again = ClAM.load(tmp_path / "m")
    assert list(again.feature_names_in_) == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(again.init, init)
    assert again.init.dtype == np.float32
    tensor = ClAM(3, n_init=1, max_iter=1, random_state=0).fit(torch.from_numpy(X))
    tensor.save(tmp_path / "t")
    np.testing.assert_array_equal(ClAM.load(tmp_path / "t").predict(X), tensor.labels_.numpy())


def test_parameters_changed_since_fit_are_not_saved(tmp_path: Path) -> None:
    fitted = ClAM(3, n_init=1, max_iter=1, random_state=0).fit(X).set_params(n_clusters=7)
    with pytest.raises(ValueError, match="n_clusters: expected 3"):
        fitted.save(tmp_path / "m")


def test_a_parameter_that_is_no_data_is_refused_by_name(tmp_path: Path) -> None:
    fitted = ClAM(3, init=lambda x, k, random_state: x[:k], n_init=1, max_iter=1).fit(X)
    with pytest.raises(TypeError, match="init: a function cannot be written"):
        fitted.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_callbacks_of_a_fit_are_left_out(tmp_path: Path) -> None:
    from clam_kernels import KMeans

    epochs: list[int] = []
    fitted = KMeans(3, random_state=0, callbacks=lambda *event: epochs.append(1)).fit(X)
    fitted.save(tmp_path / "m")
    loaded = KMeans.load(tmp_path / "m")
    assert loaded.callbacks is None
    np.testing.assert_array_equal(loaded.predict(X), fitted.labels_)


@pytest.mark.parametrize("size", [0, 4, 8, 20, -4])
def test_truncated(saved: Path, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        ClAM.load(saved)


def test_single_bit_flips_give_an_error_or_a_finite_model(saved: Path) -> None:
    good = saved.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(len(good) * 8, size=400):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << (position % 8)
        saved.write_bytes(bytes(bad))
        try:
            loaded = ClAM.load(saved)
        except ModelFileError:
            refused += 1
        else:
            assert np.isfinite(loaded.cluster_centers_).all()
            assert set(loaded.labels_) <= {0, 1, 2}
    assert refused > 50


def test_every_prefix_is_refused(saved: Path) -> None:
    good = saved.read_bytes()
    for size in range(0, len(good), 37):
        saved.write_bytes(good[:size])
        with pytest.raises(ModelFileError):
            ClAM.load(saved)


def test_foreign_files(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (canary,))

    for content in (
        pickle.dumps(Evil()),
        b"\x93NUMPY",
        os.urandom(1000),
        b"PK\x03\x04" + b"\0" * 99,
    ):
        saved.write_bytes(content)
        with pytest.raises(ModelFileError):
            ClAM.load(saved)
    assert not canary.exists()
    saved.write_bytes(struct.pack("<Q", 10**12) + b"{}")
    with pytest.raises(ModelFileError, match="header is longer"):
        ClAM.load(saved)
    with pytest.raises(ModelFileError, match="not a regular file"):
        ClAM.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone"):
        ClAM.load(tmp_path / "gone")


def _rewrite(path: Path, **changes: str) -> None:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_headers_that_lie(saved: Path, model: ClAM) -> None:
    cases = {
        "written by clam_kernels": {"format": str(serialize.FORMAT + 1)},
        "holds a KMeans": {"class": "KMeans"},
        "holds a os.system": {"class": "os.system"},
        "n_clusters": {"parameters": json.dumps({**model.get_params(), "n_clusters": -3})},
        "unexpected keyword": {"parameters": json.dumps({"evil": 1})},
        "shapes do not fit": {"parameters": json.dumps({**model.get_params(), "n_clusters": 4})},
        "not those of this class": {"learned": json.dumps({"frame": [0, 0, 1.0, False]})},
        "unknown metadata": {"extra": "1"},
    }
    good = saved.read_bytes()
    for text, change in cases.items():
        saved.write_bytes(good)
        _rewrite(saved, **change)
        with pytest.raises(ModelFileError, match=text):
            ClAM.load(saved)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("_candidates", lambda x: x * 0, "candidates"),
        ("_candidates", lambda x: x[:, :-1], "candidates"),
        ("_candidates", lambda x: x[:-1] * np.nan, "candidates"),
        ("_held", lambda x: x[:-1], "weights of clusters"),
        ("_held", lambda x: x * np.inf, "weights of clusters"),
        ("loss_curve_", lambda x: x[:-1], "losses"),
        ("labels_", lambda x: x[None], "labels"),
        ("cluster_centers_", lambda x: x.astype(np.int64), "values are not finite"),
        *((f"frame.{x}", lambda x: x[:-1], "shapes do not fit") for x in COLUMNS),
        *((f"frame.{x}", lambda x: x * np.nan, "not finite|> 0|empty") for x in COLUMNS),
        ("frame.low", lambda x: x + 1e9, "ranges of columns are empty"),
        ("frame.mean", lambda x: None, "contents"),
    ],
)
def test_tensors_that_do_not_fit(saved: Path, name: str, damage: Any, message: str) -> None:
    """The error names the file, in Python and in the command."""
    with safe_open(saved, "np") as file:
        tensors, metadata = {x: file.get_tensor(x) for x in file.keys()}, file.metadata()  # noqa: SIM118
    tensors[name] = damage(tensors[name])
    if tensors[name] is None:
        del tensors[name]
    saved.write_bytes(to_bytes({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata))
    with pytest.raises(ModelFileError, match=rf"model\.safetensors: .*({message})"):
        ClAM.load(saved)
    np.save(saved.parent / "x.npy", X)
    assert main(["predict", str(saved), str(saved.parent / "x.npy")]) == 1


def test_numbers_that_do_not_fit(saved: Path) -> None:
    with safe_open(saved, "np") as file:
        learned = json.loads(file.metadata()["learned"])
    good = saved.read_bytes()
    for change in (
        *({name: "x"} for name in ("inertia_", "beta_", "gap_", "n_iter_", "_sharpness", "frame")),
        *({name: None} for name in ("device_", "backend_", "n_features_in_", "n_clusters_used_")),
        {"_sharpness": [1.0]},
        {"_sharpness": [1.0, float("nan")]},
        {"frame": [10**9, 0, 1.0, False]},
        {"frame": [0, 0, float("nan"), False]},
        {"feature_names_in_": ["a"]},
        {"feature_names_in_": [1, 2, 3, 4]},
        {"n_features_in_": 3},
    ):
        saved.write_bytes(good)
        _rewrite(saved, learned=json.dumps({**learned, **change}))
        with pytest.raises(ModelFileError, match=r"model\.safetensors: "):
            ClAM.load(saved)


def test_a_failed_write_leaves_the_old_file(saved: Path, model: ClAM, tmp_path: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(OSError, match=r"no-such-folder.m'$"):
        model.save(tmp_path / "no-such-folder" / "m")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            model.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
