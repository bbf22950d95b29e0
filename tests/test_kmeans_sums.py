# SPDX-License-Identifier: Apache-2.0
"""The sums of k-means by label, and a whole iteration."""

from __future__ import annotations

import math

import pytest
import torch
from _kmeans_data import BOTH, DTYPES, F64, PROBLEM, PROPERTY, blobs, draw, row_tensor
from hypothesis import given
from hypothesis import strategies as st

import clam_kernels
from python_fallback.kmeans import update


@pytest.fixture(params=BOTH.values(), ids=BOTH.keys())
def kmeans(request):
    """The public functions, or the equations."""
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_numbers(kmeans, dtype):
    x = row_tensor([1, 2], [3, 4], [5, 6], [7, 8], dtype=dtype)
    labels = torch.tensor([0, 2, 0, -1])
    sums, counts = kmeans.kmeans_update(x, labels, 4)
    assert sums.tolist() == [[6, 8], [0, 0], [3, 4], [0, 0]]
    assert counts.tolist() == [2, 0, 1, 0]
    assert (sums.dtype, counts.dtype) == (F64, torch.int64)
    weight = row_tensor(0.5, 2, 0, 9, dtype=dtype)
    sums, counts = kmeans.kmeans_update(
        x, labels, 4, weight=weight, shift=row_tensor(1, 0, dtype=dtype)
    )
    assert sums.tolist() == [[0, 1], [0, 0], [4, 8], [0, 0]]
    assert counts.tolist() == [0.5, 0, 2, 0]
    assert counts.dtype == F64


def test_counts_beyond_float32():
    """A running float32 count stops at 2^24."""
    n = 2**24 + 3
    x, labels = torch.ones(1, 1).expand(n, 1), torch.zeros(1, dtype=torch.int64).expand(n)
    sums, counts = clam_kernels.kmeans_update(x, labels, 1)
    assert sums.item() == counts.item() == n


def test_a_mean_far_from_the_origin():
    """A running float32 sum is wrong by 1.3 % here."""
    (x,) = draw(18, (2_000_000, 1), dtype=torch.float32)
    x += 100
    labels = torch.zeros(1, dtype=torch.int64).expand(len(x))
    exact = float(x.double().mean())
    sums, counts = clam_kernels.kmeans_update(x, labels, 1, shift=torch.tensor([100.0]))
    assert abs((sums / counts[:, None]).item() + 100 - exact) < 1e-9
    assert abs((clam_kernels.kmeans_update(x, labels, 1)[0] / len(x)).item() - exact) < 1e-9


def test_sums_repeat_bit_for_bit():
    x, weight = draw(19, (30_000, 9), (30_000,), dtype=torch.float32)
    labels = torch.randint(-1, 12, (30_000,), generator=torch.Generator().manual_seed(0))
    first = clam_kernels.kmeans_update(x, labels, 12, weight=weight)
    for _ in range(10):
        for a, b in zip(
            clam_kernels.kmeans_update(x, labels, 12, weight=weight), first, strict=True
        ):
            assert torch.equal(a, b)


def test_weights_are_repeated_rows(kmeans):
    (x,) = draw(20, (40, 3))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (40,), generator=generator)
    times = torch.randint(4, (40,), generator=generator)
    sums, counts = kmeans.kmeans_update(x, labels, 5, weight=times.double())
    expected = kmeans.kmeans_update(
        x.repeat_interleave(times, 0), labels.repeat_interleave(times), 5
    )
    torch.testing.assert_close(sums, expected[0], rtol=1e-13, atol=1e-13)
    assert torch.equal(counts, expected[1].double())
    doubled = kmeans.kmeans_update(x, labels, 5, weight=8 * times.double())
    assert torch.equal(doubled[0], 8 * sums)


def test_a_nan_row_changes_its_own_label_alone(kmeans):
    (x,) = draw(21, (20, 3))
    labels = torch.arange(20) % 4
    clean = kmeans.kmeans_update(x, labels, 4)
    x[6, 1], x[7, 0] = math.nan, math.inf
    dirty = kmeans.kmeans_update(x, labels, 4)
    assert torch.equal(dirty[1], clean[1])
    assert torch.equal(dirty[0][:2], clean[0][:2])
    assert bool(dirty[0][2, 1].isnan())
    assert float(dirty[0][3, 0]) == math.inf
    labels[6:8] = torch.tensor([-1, 4])  # and no sum if it has no label
    assert bool(kmeans.kmeans_update(x, labels, 4)[0].isfinite().all())


def test_a_lloyd_iteration_moves_centroids_to_means():
    x, centroids = blobs(22, 500, 6, 4)
    before = math.inf
    for _ in range(20):
        labels, sqdist = clam_kernels.kmeans_assign(x, centroids)
        assert float(sqdist.sum()) <= before + 1e-9
        before = float(sqdist.sum())
        sums, counts = clam_kernels.kmeans_update(x, labels, 6)
        centroids = sums / counts[:, None]
        for k in range(6):
            torch.testing.assert_close(centroids[k], x[labels == k].mean(0))


@PROPERTY
@given(**PROBLEM, weighted=st.booleans(), shifted=st.booleans())
def test_sums_equal_the_truth(seed, n, k, d, weighted, shifted):
    x, weight, shift = draw(seed, (n, d), (n,), (d,))
    labels = torch.randint(-2, k + 2, (n,), generator=torch.Generator().manual_seed(seed))
    options = {"weight": weight if weighted else None, "shift": shift if shifted else None}
    result, expected = (m.kmeans_update(x, labels, k, **options) for m in BOTH.values())
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_sums_of_a_gpu_are_products(monkeypatch):
    """The GPU form, with a fixed order, gives the same sums."""
    x, labels = torch.randn(300, 5).double(), torch.randint(7, (300,))
    weight = torch.rand(300).double()
    for own in (None, weight):
        counts = torch.int64 if own is None else torch.float64
        results = []
        for device in (False, True):
            total, total_counts = torch.zeros(7, 5).double(), torch.zeros(7, dtype=counts)
            values = type("Rows", (torch.Tensor,), {"is_cuda": device})(x)
            update.add_grouped_(total, total_counts, labels, values, own)
            results.append((total, total_counts))
        torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)
