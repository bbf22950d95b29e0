# SPDX-License-Identifier: Apache-2.0
"""Tables from .npy and .npz files."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from clam_kernels import tables
from clam_kernels.exceptions import DataFileError


def test_integers_of_arrays_that_float64_rounds_are_refused(tmp_path):
    x = np.zeros((2000, 3), dtype=np.int64)
    x[1800, 1], x[1900, 2] = 2**53 + 1, 2**62
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", X=x.astype(np.uint64) + np.uint64(2**63))
    with pytest.raises(DataFileError, match=f"column 1, row 1801: .* {2**53 + 1},"):
        tables.read(tmp_path / "x.npy")
    assert tables.read(tmp_path / "x.npy", columns=["2", "0"])[0][1900].tolist() == [2**62, 0]
    with pytest.raises(DataFileError, match="column 1, row 1801"):
        tables.read(tmp_path / "x.npy", columns=["2", "1"])
    with pytest.raises(DataFileError, match="column 1, row 1801"):
        tables.read(tmp_path / "x.npz")
    with pytest.raises(DataFileError, match=r"x.npy, row 1801: .* beyond 2\^53$"):
        tables.read_array(tmp_path / "x.npy")
    least = np.array([[-(2**63), -(2**53)]])
    np.save(tmp_path / "least.npy", least)
    assert tables.read(tmp_path / "least.npy")[0].tolist() == least.tolist()


def test_a_matrix_without_columns_is_refused(tmp_path):
    for suffix in (".npy", ".parquet"):
        path = tmp_path / f"x{suffix}"
        tables.write(path, np.zeros((3, 0)), [])
        with pytest.raises(DataFileError, match=rf"x\{suffix}: expected at least one column, got"):
            tables.read(path)


def test_a_key_is_of_an_npz(tmp_path):
    for suffix in (".npy", ".csv", ".parquet"):
        path = tmp_path / f"x{suffix}"
        tables.write(path, np.eye(2), ["a", "b"])
        for read in (tables.read, tables.read_array):
            with pytest.raises(DataFileError, match=rf"x\{suffix}: --key: expected an .npz file"):
                read(path, "X")


def test_an_npz_without_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz")
    with pytest.raises(DataFileError, match="holds no array"):
        tables.read(tmp_path / "x.npz")


def test_other_members_of_an_npz_do_not_matter(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, X=np.eye(2), bomb=np.zeros((4000, 1000)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.txt", "how the array came about")
    assert tables.read(path, "X")[0].shape == (2, 2)
    with pytest.raises(DataFileError, match="holds X, bomb; choose one with --key"):
        tables.read(path)
    with pytest.raises(DataFileError, match="unpacks to more"):
        tables.read(path, "bomb")
    np.savez(path, X=np.eye(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.txt", "how the array came about")
    assert tables.read(path)[0].shape == (2, 2)
    assert tables.read_array(path).shape == (2, 2)
