# SPDX-License-Identifier: Apache-2.0
"""The input of KMeans: sizes of values, containers, memory maps, dtypes, errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from _datasets import data
from _memory import most_bytes
from scipy import sparse
from sklearn import datasets
from sklearn.exceptions import NotFittedError

from clam_kernels import ClAM, KMeans
from clam_kernels.exceptions import BackendUnavailableError


@pytest.mark.parametrize("size", [1e30, 1e38, 1e-30, 1e-42])
def test_values_near_the_ends_of_the_floats(size):
    x = (data("iris") / 8 * size).astype(np.float32)
    model = KMeans(3, random_state=0).fit(x)
    assert np.isfinite(model.cluster_centers_).all()
    assert np.unique(model.labels_).size == 3
    assert (model.predict(x) == model.labels_).all()
    assert np.isfinite(model.transform(x)).all()
    if size > 1e-40:  # the grid of denormals is coarser than iris
        plain = KMeans(3, init=(model.cluster_centers_ / np.float32(size)), n_init=1)
        assert plain.fit(data("iris") / 8).inertia_ * size**2 == pytest.approx(
            model.inertia_, rel=1e-4
        )


def test_powers_of_two_change_no_label():
    x = data("iris")
    labels = KMeans(3, random_state=0).fit(x).labels_
    for power in (600, -600):
        assert np.array_equal(KMeans(3, random_state=0).fit(x * 2.0**power).labels_, labels)


def test_far_from_the_origin():
    x, truth = datasets.make_blobs(400, centers=4, cluster_std=0.5, random_state=0)
    far = (x + 1e4).astype(np.float32)
    model = KMeans(4, n_init=5, random_state=0).fit(far)
    assert len(set(zip(model.labels_.tolist(), truth.tolist(), strict=True))) == 4


def _kinds(x: np.ndarray, folder: Path) -> dict[str, object]:
    file = folder / "x.npy"
    np.save(file, x)
    still = x.copy()
    still.flags.writeable = False
    return {
        "fortran": np.asfortranarray(x),
        "read-only": still,
        "memory map": np.load(file, mmap_mode="r"),
        "csr": sparse.csr_matrix(x),
        "csr array": sparse.csr_array(x),
        "tensor": torch.from_numpy(x),
        "strided tensor": torch.from_numpy(np.repeat(x, 2, 1))[:, ::2],
        "chunks": x,
    }


KINDS = "fortran, read-only, memory map, csr, csr array, tensor, strided tensor, chunks"


@pytest.mark.parametrize("kind", KINDS.split(", "))
def test_every_container_gives_the_same(kind, tmp_path):
    x = np.ascontiguousarray(data("iris"))
    expected = KMeans(3, random_state=0).fit(x)
    container = _kinds(x, tmp_path)[kind]
    model = KMeans(3, random_state=0, chunk_rows=40 if kind == "chunks" else None).fit(container)
    centroids = np.asarray(model.cluster_centers_)
    np.testing.assert_allclose(centroids, expected.cluster_centers_, rtol=1e-12)
    assert np.array_equal(np.asarray(model.labels_), expected.labels_)
    assert np.array_equal(np.asarray(model.predict(container)), expected.labels_)
    np.testing.assert_allclose(
        np.asarray(model.transform(container)), expected.transform(x), rtol=1e-9
    )
    assert model.score(container) == pytest.approx(-expected.inertia_, rel=1e-12)
    if "tensor" in kind:
        assert model.labels_.dtype == torch.int64
    else:
        assert model.labels_.dtype == np.int32
    assert np.array_equal(x, data("iris"))


MAPPED = ["|u1", "<f2", "<i4", "|b1", ">f4", ">f8", ">i2", "fortran", "every second", "view"]


def _mapped(kind: str, values: np.ndarray, file: Path) -> np.ndarray:
    """A memory map that is not float32 or float64 in C order."""
    plain = kind in ("fortran", "every second", "view")
    x = values.astype(np.float64 if plain else kind)
    np.save(file, np.asfortranarray(x) if kind == "fortran" else x)
    mapped = np.load(file, mmap_mode="r+" if kind == "fortran" else "r")
    if kind == "every second":
        return mapped[::2]
    return np.asarray(mapped) if kind == "view" else mapped


@pytest.mark.parametrize("kind", MAPPED)
def test_a_memory_map_of_any_dtype_is_read_block_by_block(kind, tmp_path):
    rng = np.random.default_rng(0)
    values = np.floor(rng.normal(size=(4, 200))[rng.integers(4, size=5000)] * 9 + 60)
    values = values > 60 if kind == "|b1" else values
    mapped = _mapped(kind, values, tmp_path / "x.npy")
    whole = KMeans(4, random_state=0).fit(np.array(mapped))
    whole_bytes = mapped.size * whole.cluster_centers_.itemsize
    model = KMeans(4, random_state=0, chunk_rows=100)

    def run() -> None:
        model.fit(mapped).predict(mapped)

    assert most_bytes(run) < 0.3 * whole_bytes
    assert model.cluster_centers_.dtype == whole.cluster_centers_.dtype
    np.testing.assert_array_equal(model.labels_, whole.labels_)
    np.testing.assert_allclose(model.cluster_centers_, whole.cluster_centers_, rtol=1e-5)


def test_a_memory_map_is_checked_as_an_array_is(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12, dtype=np.int32).reshape(6, 2))
    np.save(tmp_path / "cube.npy", np.zeros((2, 3, 4), np.uint8))
    np.save(tmp_path / "gap.npy", np.array([[1, 2], [np.inf, 3]], np.float16))
    model = KMeans(2, random_state=0).fit(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert model.n_features_in_ == 2
    with pytest.raises(ValueError, match="X has 3 features, but KMeans is expecting 2"):
        model.predict(np.asfortranarray(np.load(tmp_path / "cube.npy", mmap_mode="r")[:, :, 0]))
    with pytest.raises(ValueError, match="dim 3"):
        model.fit(np.load(tmp_path / "cube.npy", mmap_mode="r"))
    with pytest.raises(ValueError, match="infinity: 1 bad entry, the first at row 1, column 0"):
        model.fit(np.load(tmp_path / "gap.npy", mmap_mode="r"))


def test_arrays_keep_float32_in_any_order_of_bytes_and_in_frames():
    x = data("iris").astype(np.float32)
    pandas = pytest.importorskip("pandas")
    for table in (x.astype(">f4"), pandas.DataFrame(x), np.asfortranarray(x)):
        assert KMeans(3, random_state=0).fit(table).cluster_centers_.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_tensor_dtypes(dtype):
    x = torch.from_numpy(data("digits")).to(dtype)
    model = KMeans(10, random_state=0).fit(x)
    assert model.cluster_centers_.dtype == torch.float32
    assert torch.equal(model.predict(x), model.labels_)


def test_one_precision_fits_and_another_predicts():
    x = data("iris")
    narrow = KMeans(3, random_state=0).fit(x.astype(np.float32))
    assert np.array_equal(narrow.predict(x), narrow.labels_)
    wide = KMeans(3, random_state=0).fit(x)
    assert np.array_equal(wide.predict(x.astype(np.float32)), wide.labels_)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"X": [[1.0, np.nan], [2.0, 1.0]]}, "1 bad entry, the first at row 0, column 1"),
        ({"X": np.full((3, 2), np.inf)}, "contains infinity: 6 bad entries"),
        ({"X": sparse.csr_array([[1.0], [np.nan]])}, "row 1, column 0"),
        ({"n_clusters": 9}, "n_samples=4 should be >= n_clusters=9"),
        ({"init": np.zeros((2, 2))}, "does not match the number of clusters 3"),
        ({"init": np.zeros((3, 5))}, "does not match the number of features of the data 2"),
        ({"init": np.full((3, 2), np.nan)}, "init: expected finite values"),
        ({"init": np.full((3, 2), 1e160)}, r"init: expected magnitudes up to 1e\+150"),
        ({"init": lambda X, k, random_state: None}, r"init: expected numbers \[K, D\]"),
        ({"X": torch.zeros(4, 2, device="meta")}, "X: expected a tensor with values"),
        ({"sample_weight": [1, 1, 1]}, r"sample_weight.shape == \(3,\), expected \(4,\)"),
        ({"sample_weight": [1, 1, 1, -1]}, "Negative values in data"),
        ({"sample_weight": [0, 0, 0, 0]}, "at least one non-zero"),
        ({"sample_weight": [1, 1, 1, np.nan]}, "sample_weight contains NaN"),
    ],
)
def test_bad_input(change, text):
    arguments = {"X": np.arange(8.0).reshape(4, 2), "n_clusters": 3, "n_init": 1, **change}
    x, weight = arguments.pop("X"), arguments.pop("sample_weight", None)
    if arguments["n_clusters"] == 3 and len(x if not sparse.issparse(x) else [0] * 2) < 3:
        arguments["n_clusters"] = 1
    model = KMeans(**arguments)
    with pytest.raises((ValueError, RuntimeError), match=text):
        model.fit(x, sample_weight=weight)
    assert not hasattr(model, "cluster_centers_")


@pytest.mark.parametrize(
    ("count", "device", "there"),
    [
        (0, "cuda", "no CUDA device"),
        (0, "cuda:7", "no CUDA device"),
        (1, "cuda:7", "1 CUDA device"),
        (4, "cuda:4", "4 CUDA devices"),
    ],
)
def test_a_missing_device_raises(count, device, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    text = f"device: expected one of this machine, which has {there}, got '{device}'"
    for model in (KMeans(3, device=device), ClAM(3, device=device)):
        with pytest.raises(BackendUnavailableError, match=re.escape(text)):
            model.fit(np.arange(8.0).reshape(4, 2))


def test_a_failed_fit_leaves_the_model_as_it_was():
    model = KMeans(3, random_state=0).fit(data("iris"))
    before = model.cluster_centers_
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.full((9, 4), np.nan))
    assert model.cluster_centers_ is before

    def stop(estimator, info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.set_params(callbacks=stop).fit(data("digits"))
    assert model.cluster_centers_ is before


def test_unfitted_models_and_bools_as_numbers_are_refused():
    with pytest.raises(NotFittedError):
        KMeans().predict(np.zeros((2, 2)))
    with pytest.raises((TypeError, ValueError), match="n_clusters"):
        KMeans(True).fit(np.zeros((2, 2)))
    with pytest.raises(TypeError, match="callbacks: expected callables"):
        KMeans(1, callbacks=[3]).fit(np.zeros((2, 2)))
