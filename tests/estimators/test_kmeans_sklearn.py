# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's own tests of KMeans, from the installed package, run on ours. Tests of
MiniBatchKMeans, of other functions of scikit-learn, and of a private method are left out.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import sklearn.cluster

from clam_kernels import KMeans

pytestmark = pytest.mark.filterwarnings("ignore")
SOURCE = Path(sklearn.cluster.__file__).parent / "tests/test_k_means.py"
PRIVATE = {
    # functions of scikit-learn's own
    "test_relocate_empty_clusters",
    "test_euclidean_distance",
    "test_inertia",
    "test_is_same_clustering",
    "test_k_means_function",
    "test_kmeans_plusplus_wrong_params",
    "test_kmeans_plusplus_output",
    "test_kmeans_plusplus_norms",
    "test_kmeans_plusplus_dataorder",
    # its method _init_centroids
    "test_sample_weight_init",
    "test_sample_weight_zero",
}


class Batches:
    """A stand-in for MiniBatchKMeans; its tests are left out."""


def _suite() -> dict[str, Any]:
    """The tests of the file, with our class under the name of scikit-learn's."""
    space: dict[str, Any] = {"__name__": __name__, "__file__": str(SOURCE)}
    with mock.patch.multiple(sklearn.cluster, KMeans=KMeans, MiniBatchKMeans=Batches):
        exec(compile(SOURCE.read_text(encoding="utf-8"), str(SOURCE), "exec"), space)
    return {
        name: value
        for name, value in space.items()
        if name.startswith("test_")
        and inspect.isfunction(value)
        and name not in PRIVATE
        and "minibatch" not in name
    }


def _without_batches(test: Any) -> Any:
    """The test without its parameters for MiniBatchKMeans."""
    marks = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            values = [value for value in mark.args[1] if not _names_batches(value)]
            if len(values) < len(mark.args[1]):
                mark = pytest.mark.parametrize(mark.args[0], values).mark
        marks.append(mark)
    test.pytestmark = marks
    return test


def _names_batches(value: Any) -> bool:
    return value is Batches or (isinstance(value, tuple) and Batches in value)


if SOURCE.exists():
    SUITE = _suite()
    globals().update({name: _without_batches(test) for name, test in SUITE.items()})


@pytest.fixture
def global_random_seed() -> int:
    return 42


@pytest.fixture(params=[np.float32, np.float64])
def global_dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.skipif(not SOURCE.exists(), reason="scikit-learn was installed without its tests")
def test_the_suite_has_tests():
    assert len(SUITE) >= 30
    assert {"test_kmeans_results", "test_kmeans_predict", "test_transform"} <= set(SUITE)
    assert not inspect.getsource(KMeans).count("sklearn.cluster import")
