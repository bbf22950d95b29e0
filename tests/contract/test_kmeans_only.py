# SPDX-License-Identifier: Apache-2.0
"""The contract of k-means alone: exact labels, centroids that cannot win, sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels import testing
from clam_kernels._core.backend import implementation

ASSIGN, UPDATE, STEP = ("kmeans_assign",), ("kmeans_update",), ("kmeans_step",)


def _between(backend: Any, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Float32 rows between two centroids, as near to the middle as float32 can represent."""
    generator = torch.Generator().manual_seed(3)
    centroids = torch.randn(k, d, generator=generator)
    pairs = torch.randint(k, (n, 2), generator=generator)
    x = (centroids[pairs[:, 0]].double() + centroids[pairs[:, 1]].double()) / 2
    x = (x * (1 + 1e-7 * torch.randn(n, d, generator=generator))).float()
    return x.to(backend.device), centroids.to(backend.device)


def _equal(result: Any, expected: Any) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.contract(ops=ASSIGN)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("d", [2, 20])
def test_labels_are_exact_in_every_precision(spec, backend, precision, d):
    x, centroids = _between(backend, 150, 20, d)
    labels, sqdist = spec.packet(x, centroids, None, None, True, precision)
    expected, far = spec.truth(x, centroids)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(sqdist, far, rtol=1e-5, atol=0)


@pytest.mark.contract(ops=ASSIGN)
@pytest.mark.parametrize("offset", [100.0, 1e5])
def test_labels_are_exact_far_from_the_origin(spec, backend, offset):
    for dtype in backend.dtypes:
        if dtype == torch.float16 and offset > 1e4:
            continue
        args = testing.large(spec.name, dtype, backend.device, n=200, offset=offset).args
        assert torch.equal(spec.packet(*args)[0], spec.truth(*args)[0]), dtype


@pytest.mark.contract(ops=ASSIGN)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-18, 1e-6, 1e9, 1e19, 1e30])
def test_values_of_any_size(spec, backend, size):
    args = testing.large(spec.name, torch.float64, n=100, k=10, d=3).args
    x, centroids = ((size * a).float().to(backend.device) for a in args[:2])
    labels, sqdist = spec.packet(x, centroids)
    assert torch.equal(labels, spec.truth(x, centroids)[0])
    assert not bool(sqdist.isnan().any())


@pytest.mark.contract(ops=ASSIGN)
def test_equal_centroids_in_any_tile(spec, backend):
    """A tie across tiles, and rows that do not fill a tile."""
    for n, k in ((1, 130), (40, 130)):
        x = testing.problem(spec.name, n, 1, 4, device=backend.device).args[0]
        assert not bool(spec.packet(x, x[:1].expand(k, 4))[0].any())


@pytest.mark.contract(ops=ASSIGN)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_and_infinite_centroids_do_not_change_labels(spec, backend, bad):
    """A centroid that is not finite, or is masked with any value: padding is made of these."""
    x, centroids = testing.problem(spec.name, 40, 6, 5, device=backend.device).args
    mask = torch.tensor([True, False, False, True, False, False], device=backend.device)
    clean = spec.packet(x, centroids, None, mask)
    centroids = centroids.clone()
    centroids[0, 1], centroids[3] = bad, bad
    _equal(spec.packet(x, centroids, None, mask), clean)
    if not math.isfinite(bad):
        _equal(spec.packet(x, centroids), clean)
        labels, sqdist = spec.packet(x, torch.full_like(centroids, bad))
        assert bool((labels == -1).all())
        assert bool((sqdist == math.inf).all())


@pytest.mark.contract(ops=ASSIGN + STEP)
@pytest.mark.parametrize("k", [1, 2, 70])
def test_labels_are_minus_one_if_every_centroid_is_masked(spec, backend, k):
    """The op refuses such a mask on a CPU. On a GPU it does not read the mask, so a kernel
    gets it.
    """
    named = backend.name != "reference"
    kernel = implementation(spec.kernels[backend.name]) if named else spec.reference
    x, centroids = testing.problem(spec.name, 20, k, 5, device=backend.device).args
    mask = torch.zeros(2, k, dtype=torch.bool, device=backend.device)
    mask[1] = True
    if spec.name in ASSIGN:
        labels, sqdist = kernel(x, centroids, None, mask, True, "highest")
        assert bool((sqdist[1] == math.inf).all())
        assert bool(sqdist[0].isfinite().all())
    else:
        labels, sums, counts = kernel(x, centroids, None, None, mask, "highest")
        assert not bool(sums[1].any() | counts[1].any())
    assert bool((labels[1] == -1).all())
    _equal(labels[0], spec.truth(x, centroids)[0])


@pytest.mark.contract(ops=ASSIGN)
def test_restarts_are_separate_calls(spec, backend):
    x, _ = testing.problem(spec.name, 90, 6, 5, device=backend.device).args
    starts = torch.stack([x[i : i + 6] for i in range(3)])
    together = spec.packet(x, starts)
    for i in range(3):
        _equal(spec.packet(x, starts[i]), tuple(out[i] for out in together))


@pytest.mark.contract(ops=ASSIGN)
def test_half_rows_with_float32_centroids(spec, backend):
    for dtype in (t for t in backend.dtypes if t.itemsize == 2):
        x, centroids = testing.problem(spec.name, 60, 9, 20, device=backend.device).args
        x = x.to(dtype)
        _equal(spec.packet(x, centroids)[0], spec.truth(x, centroids)[0])


# ---- sums ---------------------------------------------------------------------------------------


@pytest.mark.contract(ops=UPDATE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_row_changes_its_own_label_alone(spec, backend, bad):
    x, labels, k = testing.problem(spec.name, 70, 6, 5, device=backend.device).args
    clean = spec.packet(x, labels, k)
    x = x.clone()
    x[37, 2] = bad
    sums, counts = spec.packet(x, labels, k)
    assert torch.equal(counts, clean[1])
    touched = torch.zeros_like(sums, dtype=torch.bool)
    touched[labels[37], 2] = True
    assert torch.equal(sums[~touched], clean[0][~touched])
    assert not bool(sums[touched].isfinite().any())
    for outside in (-1, k, -(2**40), 2**40):
        labels[37] = outside
        sums, counts = spec.packet(x, labels, k)
        assert bool(sums.isfinite().all())
        assert int(counts.sum()) == 69


@pytest.mark.contract(ops=UPDATE)
def test_means_keep_their_digits_far_from_the_origin(spec, backend):
    """With a shift near the data the error is at most 2^-22 of the spread."""
    x, labels, k = testing.problem(spec.name, 600, 3, 4, device=backend.device).args
    far, shift = x + 1e4, torch.full((4,), 1e4, device=x.device)
    sums, counts = spec.packet(far, labels, k, None, shift)
    exact, _ = spec.truth(far, labels, k, None, shift)
    spread = float((far.double() - 1e4).abs().mean())
    assert float(((sums - exact) / counts[:, None]).abs().max()) <= 2**-22 * spread


@pytest.mark.contract(ops=UPDATE)
def test_weights_of_a_power_of_two_scale_the_bits(spec, backend):
    x, labels, k = testing.problem(spec.name, 300, 4, 5, device=backend.device).args
    weight = x[:, 0].abs() + 0.5
    one, eight = (spec.packet(x, labels, k, w * weight) for w in (1, 8))
    _equal(eight, tuple(8 * out for out in one))


# ---- both ---------------------------------------------------------------------------------------


@pytest.mark.contract(ops=STEP)
@pytest.mark.parametrize("size", [(700, 9, 5), (300, 64, 16), (130, 200, 40), (90, 1, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_step_is_an_assignment_and_an_update(spec, backend, size, shifted):
    """Labels and counts are equal bit for bit, sums to 2^-22 of the summands."""
    x, centroids = testing.problem(spec.name, *size, device=backend.device).args
    far = 1e4 if shifted else 0.0
    x, centroids = x + far, centroids + far
    shift = x.mean(0) if shifted else None
    x[3, 1] = math.nan
    labels, sums, counts = spec.packet(x, centroids, None, shift)
    expected, _ = torch.ops.clam.kmeans_assign(x, centroids, shift)
    _equal(labels, expected)
    exact, counted = testing.spec_of("kmeans_update").truth(x, labels, size[1], None, shift)
    _equal(counts, counted)
    origin = 0.0 if shift is None else shift.double()
    gap = torch.where(labels[:, None] < 0, 0.0, (x.double() - origin).abs().nan_to_num())
    room = torch.zeros_like(sums).index_add_(0, labels.clamp(min=0), gap)
    assert bool(((sums - exact).abs() <= 2**-22 * room).all())
    again = spec.packet(x, centroids, None, shift)
    _equal(again, (labels, sums, counts))


@pytest.mark.contract(ops=STEP)
@pytest.mark.parametrize("n", [64, 1024, 5000])
def test_sums_of_equal_rows_keep_their_digits(spec, backend, n):
    """Here every rounding error has the same sign."""
    x = torch.full((n, 2), 0.1, device=backend.device)
    sums = spec.packet(x, torch.tensor([[0.0, 0.0], [1e30, 0.0]], device=backend.device))[1]
    assert bool(((sums[0] - x.double().sum(0)).abs() <= 2**-22 * 0.1 * n).all())


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.contract(ops=(*ASSIGN, *UPDATE, *STEP))
def test_a_broadcast_operand_is_not_copied(spec):
    """Fifty restarts over the same rows."""
    n, d, k = 20_000, 4, 8
    x = torch.randn(1, n, d)
    if spec.name in ASSIGN:
        args: tuple[Any, ...] = (x, torch.randn(50, k, d))
        result = 50 * n * 12
    elif spec.name in STEP:
        args = (x, torch.randn(50, k, d))
        result = 50 * (n * 8 + k * (d + 1) * 8)
    else:
        args = (x, torch.randint(k, (50, n)), k)
        result = 50 * k * (d + 1) * 8
    assert testing.peak_bytes(lambda: spec.packet(*args)) < result + 12e6
