# SPDX-License-Identifier: Apache-2.0
"""The labels of k-means: exact cases, ties, and the labels of float64 in every dtype and range.
Each exact case runs through the op and through the truth.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _kmeans_data import BOTH, DTYPES, F64, PROBLEM, PROPERTY, blobs, draw, row_tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clam_kernels
import python_fallback.kmeans as fallback
from clam_kernels import testing
from python_fallback.kmeans import nearest


@pytest.fixture(params=BOTH.values(), ids=BOTH.keys())
def kmeans(request):
    """The public functions, or the equations."""
    return request.param


def _hard(n: int, k: int, d: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Float32 rows between two centroids, as near to the middle as float32 can represent: float32
    scores decide no label here.
    """
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(k, d, generator=generator)
    pairs = torch.randint(k, (n, 2), generator=generator)
    x = (centroids[pairs[:, 0]].double() + centroids[pairs[:, 1]].double()) / 2
    return (x * (1 + 1e-7 * torch.randn(n, d, generator=generator))).float(), centroids


def _same_labels(x: Tensor, centroids: Tensor, **options: Any) -> Tensor:
    """The op's labels, which must equal the truth's; its distances equal the truth's to float32."""
    labels, sqdist = clam_kernels.kmeans_assign(x, centroids, **options)
    expected, far = fallback.kmeans_assign(x, centroids, **options)
    assert torch.equal(labels, expected), f"{int((labels != expected).sum())} labels differ"
    torch.testing.assert_close(sqdist, far, rtol=1e-4, atol=1e-30, equal_nan=True)
    return labels


# ---- assignment: exact cases --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_goes_to_the_lowest_index(kmeans, dtype):
    x, centroids = row_tensor([0], [1], [2], [3], dtype=dtype), row_tensor([0], [2], dtype=dtype)
    labels, sqdist = kmeans.kmeans_assign(x, centroids)
    assert labels.tolist() == [0, 0, 1, 1]
    assert sqdist.tolist() == [0, 1, 0, 1]
    assert sqdist.dtype == (F64 if dtype == F64 else torch.float32)
    assert kmeans.kmeans_assign(x, centroids.flip(0))[0].tolist() == [1, 0, 0, 0]


def test_the_width_of_a_tie(kmeans):
    """Squared distances within 2^-40 of each other count as equal, because of float64's
    rounding.
    """
    x = row_tensor([0.0], dtype=F64)
    for gap, label in ((2.0**-42, 0), (2.0**-39, 1)):
        assert kmeans.kmeans_assign(x, row_tensor([1 + gap], [1.0], dtype=F64))[0].tolist() == [
            label
        ]
        assert kmeans.kmeans_assign(x, row_tensor([1.0], [1 + gap], dtype=F64))[0].tolist() == [0]


def test_duplicate_centroids(kmeans):
    x, centroids = row_tensor([0], [5], [9]), row_tensor([5], [5], [5])
    assert kmeans.kmeans_assign(x, centroids)[0].tolist() == [0, 0, 0]
    mask = torch.tensor([True, False, False])
    assert kmeans.kmeans_assign(x, centroids, mask=mask)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("n", [1, 257, 5000])
@pytest.mark.parametrize("k", [64, 130, 1025])
def test_equal_centroids_and_tail_rows(n, k):
    x, c = draw(1, (n, 3), (1, 3), dtype=torch.float32)
    labels, sqdist = clam_kernels.kmeans_assign(x, c.expand(k, 3))
    assert not labels.any()
    torch.testing.assert_close(sqdist, (x - c).square().sum(-1))
    # the only other centroid, far away: it wins only where it is nearer
    other = torch.cat([c.expand(k, 3), x[:1]])
    assert int(clam_kernels.kmeans_assign(x, other)[0][0]) == k


def test_distances_come_from_differences(kmeans):
    x, centroids = row_tensor([-1.0001], [-0.9999], [0.9999], [1.0001]), row_tensor([-1.0], [1.0])
    labels, sqdist = kmeans.kmeans_assign(x, centroids)
    assert labels.tolist() == [0, 0, 1, 1]
    assert float(sqdist.double().sum()) == pytest.approx(4.0013276e-08, rel=1e-6)


def test_one_centroid(kmeans):
    (x,) = draw(2, (30, 4), dtype=torch.float32)
    labels, sqdist = kmeans.kmeans_assign(x, x[:1])
    assert not labels.any()
    assert float(sqdist[0]) == 0


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_centroid_that_is_not_finite_never_wins(kmeans, k, bad):
    x, centroids = torch.zeros(2, 3), torch.full((k, 3), bad)
    labels, sqdist = kmeans.kmeans_assign(x, centroids)
    assert labels.tolist() == [-1, -1]
    assert sqdist.tolist() == [math.inf, math.inf]
    restarts = torch.stack([centroids, torch.zeros(k, 3)])
    assert kmeans.kmeans_assign(x, restarts, distances=False)[0].tolist() == [[-1, -1], [0, 0]]
    labels, sums, counts = kmeans.kmeans_step(x + 1, restarts)
    assert labels.tolist() == [[-1, -1], [0, 0]]
    assert (sums.sum(), counts.sum()) == (6, 2)


@pytest.mark.parametrize("restarts", [2, 0])
def test_without_rows_or_problems_sums_are_zero(kmeans, restarts):
    """Several labellings of the same rows, without rows or without labellings."""
    rows = torch.zeros(0 if restarts else 5, 3)
    labels, sums, counts = kmeans.kmeans_step(rows, torch.randn(restarts, 4, 3))
    assert labels.shape == (restarts, len(rows))
    for result in ((sums, counts), kmeans.kmeans_update(rows, labels, 4)):
        assert [tuple(x.shape) for x in result] == [(restarts, 4, 3), (restarts, 4)]
        assert not any(x.any() for x in result)


def test_without_distances(kmeans):
    x, centroids = draw(3, (3, 20, 4), (5, 4))
    labels, none = kmeans.kmeans_assign(x, centroids, distances=False)
    assert torch.equal(labels, kmeans.kmeans_assign(x, centroids)[0])
    assert none.shape == (3, 0)
    assert kmeans.kmeans_assign(x[0], centroids, distances=False)[1].shape == (0,)


def test_digits_are_assigned_as_integers():
    """Pixels 0..16 with data rows as centroids tie, also after adding 4096."""
    sklearn = pytest.importorskip("sklearn.datasets")
    pixels = torch.from_numpy(sklearn.load_digits().data).long()
    ties = 0
    for k in (10, 32, 64):
        for seed in range(3):
            rows = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))[:k]
            far = pixels.square().sum(1)[:, None] + pixels[rows].square().sum(1)
            far = far - 2 * (pixels @ pixels[rows].T)
            index = torch.arange(k)
            expected = torch.where(far == far.amin(1, keepdim=True), index, k).amin(1)
            ties += int(((far == far.amin(1, keepdim=True)).sum(1) > 1).sum())
            for offset in (0, 4096):
                x = (pixels + offset).float()
                labels, sqdist = clam_kernels.kmeans_assign(x, x[rows])
                assert torch.equal(labels, expected), (k, seed, offset)
                assert torch.equal(sqdist.long(), far.amin(1))
    assert ties > 5


# ---- labels are float64's on the stored values --------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float32, 1e4), (torch.float32, 1e6), (torch.float32, -3e7),
        (torch.bfloat16, 3.0), (torch.bfloat16, 100.0), (torch.float16, 30.0),
        (torch.float16, 3000.0), (torch.float64, 1e12),
    ],
)  # fmt: skip
def test_far_from_the_origin(dtype, offset):
    x, centroids = (t + offset for t in blobs(7, 4000, 32, 16))
    _same_labels(x.to(dtype), centroids.to(dtype))
    if dtype != F64:
        _same_labels(x.to(dtype), centroids.float())


def test_blobs_ten_thousand_from_the_origin():
    x, centroids = (t.float() + 1e4 for t in blobs(8, 20_000, 32, 16))
    _same_labels(x, centroids)


@pytest.mark.parametrize("size", [(4000, 50, 16), (3000, 7, 1), (500, 40, 700), (1500, 2000, 3)])
def test_between_two_centroids(size):
    _same_labels(*_hard(*size))
    x, centroids = _hard(*size)
    _same_labels(x + 4.0, centroids + 4.0)  # neither far from the origin nor centred


@pytest.mark.parametrize("slack", [0.0, 1e-9])
def test_without_the_bound_labels_are_wrong(monkeypatch, slack):
    """The tests above can fail: float32 scores do not decide these rows."""
    monkeypatch.setattr(nearest.CentroidTable, "slack", lambda *_: slack)
    x, centroids = _hard(4000, 50, 16)
    labels = clam_kernels.kmeans_assign(x, centroids)[0]
    assert int((labels != fallback.kmeans_assign(x, centroids)[0]).sum()) > 100


def test_the_bound_covers_the_error_of_every_score():
    """The bound is twice the largest error that a score can have, and no score reaches it."""
    for d, offset in ((1, 0.0), (16, 0.0), (16, 3.0), (700, 0.0), (16, 1e5)):
        x, centroids = (t.float() + offset for t in blobs(9, 500, 40, d))
        table = nearest.table_of(centroids, None, None, x)
        rows = x if table.origin is None else x - table.origin
        assert (table.origin is None) == (offset < 100)
        size = float(rows.abs().amax(0).double().norm())
        score = torch.addmm(table.half[:, None], table.centred, rows.T, alpha=-1).double()
        centre = (table.exact - table.centred.double()).median(0).values.float().double()
        fixed = centroids.double() - centre
        shift = 0 if table.origin is None else table.origin.double()
        half = fixed.square().sum(1) / 2 + (fixed @ centre if table.origin is None else 0)
        exact = half[:, None] - fixed @ (x.double() - shift).T
        error = float((score - exact).abs().max())
        assert 2 * error <= table.slack(size, 2.0**-24)
        assert error > 0 or offset == 1e5  # float32 represents that grid exactly


def test_few_rows_are_computed_again(monkeypatch):
    """The bound is narrow enough: float64 computes few rows again."""
    counted: list[int] = []
    real_add = nearest.UndecidedRows.add

    def add(self: Any, rows: Tensor, near: Tensor) -> None:
        counted.append(len(rows))
        real_add(self, rows, near)

    monkeypatch.setattr(nearest.UndecidedRows, "add", add)
    x, centroids = (t.float() for t in blobs(10, 20_000, 32, 16))
    far = centroids.clone()
    far[7] = 1e6  # it must change neither the centre nor the bound of the other scores
    for offset, some in ((0.0, centroids), (1e4, centroids), (0.0, far), (1e4, far)):
        counted.clear()
        clam_kernels.kmeans_assign(x + offset, some + offset)
        assert sum(counted) < 100


def test_any_shift_gives_the_same_labels():
    x, centroids = (t.float() + 50 for t in blobs(11, 2000, 32, 8))
    expected = _same_labels(x, centroids)
    mean = x.mean(0)
    for shift in (
        mean,
        0 * mean,
        -mean,
        1e6 + mean,
        mean.double(),
        mean.bfloat16(),
        0 * mean + 1e300,
    ):
        labels = clam_kernels.kmeans_assign(x, centroids, shift=shift.to(shift.dtype))[0]
        assert torch.equal(labels, expected), shift
    inf = torch.full((8,), math.inf)
    assert torch.equal(clam_kernels.kmeans_assign(x, centroids, shift=inf)[0], expected)
    wide = torch.full((8,), 1e300, dtype=F64)  # inf in float32
    assert torch.equal(clam_kernels.kmeans_assign(x, centroids, shift=wide)[0], expected)


@pytest.mark.parametrize("precision", ["highest", "high", "medium", None])
def test_labels_do_not_depend_on_the_precision(precision):
    x, centroids = _hard(1000, 20, 16)
    _same_labels(x, centroids, precision=precision)


@pytest.mark.parametrize("size", [(3000, 5000, 2), (700, 1, 1), (700, 300, 1), (300, 20, 700)])
def test_shapes(size):
    n, k, d = size
    x, centroids = draw(12, (n, d), (k, d), dtype=torch.float32)
    _same_labels(x, centroids)


def test_a_row_has_its_label_in_any_chunk():
    x, centroids = _hard(3000, 100, 5)
    whole = clam_kernels.kmeans_assign(x, centroids)
    for rows in (slice(0, 1), slice(5, 24), slice(1000, 3000), torch.arange(2999, -1, -1)):
        part = clam_kernels.kmeans_assign(x[rows], centroids)
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1], whole[1][rows])


# ---- the ends of the range ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1e-20, 1e-18, 1e9, 1e18, 1e19, 1e30, 1e38])
def test_any_size_of_value(dtype, size):
    """Squares overflow and underflow float32; labels stay exact, and no distance is NaN."""
    x, centroids = (t * size for t in blobs(13, 600, 20, 6))
    x, centroids = (t.clamp(-3e38, 3e38).to(dtype) for t in (x, centroids))
    labels, sqdist = clam_kernels.kmeans_assign(x, centroids)
    expected, far = fallback.kmeans_assign(x, centroids)
    assert torch.equal(labels, expected)
    assert not sqdist.isnan().any()
    assert torch.equal(sqdist == math.inf, far == math.inf)


def test_the_largest_values():
    """Sums of two overflow too: rows at one end of float32, centroids at the other."""
    top = 3e38
    x = row_tensor([top], [-top], [7e37], [0.0], [1.0], [-8e37])
    _same_labels(x, row_tensor([-3.3e38], [-3.2e38]))
    _same_labels(x, row_tensor([top], [-top], [0.0]))
    _same_labels(torch.cat([x, row_tensor([math.nan])]), row_tensor([-3.3e38], [-3.2e38]))
    _same_labels(x, row_tensor([top], [-top], [1e30]), shift=row_tensor(top))


def test_partial_sums_that_overflow():
    """A dot product whose partial sums overflow although its value does not."""
    x = 1e30 * row_tensor([1.0, 1.0, -1.0, -1.0])
    centroids = 1e9 * row_tensor([0.3, 0.3, 0.3, 0.3], [0.2, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1])
    _same_labels(x, centroids)
    _same_labels(x.expand(40, 4), centroids.flip(0))


def test_rows_that_are_not_finite(kmeans):
    x, centroids = draw(14, (9, 3), (4, 3), dtype=torch.float32)
    clean = kmeans.kmeans_assign(x, centroids)
    x[2, 1], x[4], x[5, 0], x[6, 2] = math.nan, math.nan, math.inf, -math.inf
    labels, sqdist = kmeans.kmeans_assign(x, centroids)
    bad = torch.tensor([2, 4, 5, 6])
    good = torch.tensor([0, 1, 3, 7, 8])
    assert labels[bad].tolist() == [-1] * 4
    assert bool(sqdist[bad].isnan().all())
    assert torch.equal(labels[good], clean[0][good])
    assert torch.equal(sqdist[good], clean[1][good])
    assert kmeans.kmeans_assign(x[bad], centroids)[0].tolist() == [-1] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_centroids_that_are_not_finite_never_win(kmeans, bad):
    x, centroids = draw(15, (50, 3), (5, 3), dtype=torch.float32)
    masked = torch.tensor([True, False, False, True, False])
    expected = kmeans.kmeans_assign(x, centroids, mask=masked)
    centroids[0, 1], centroids[3] = bad, bad
    for result in (
        kmeans.kmeans_assign(x, centroids),
        kmeans.kmeans_assign(x, centroids, mask=masked),
    ):
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])
    centroids[:] = bad
    labels, sqdist = kmeans.kmeans_assign(x, centroids)
    assert bool((labels == -1).all())
    assert bool((sqdist == math.inf).all())


def test_a_masked_centroid_gets_no_row(kmeans):
    x, centroids = draw(16, (200, 3), (7, 3), dtype=torch.float32)
    mask = torch.tensor([False, True, False, False, True, True, False])
    active = (~mask).nonzero()[:, 0]
    labels, sqdist = kmeans.kmeans_assign(x, centroids, mask=mask)
    expected = kmeans.kmeans_assign(x, centroids[active])
    assert torch.equal(labels, active[expected[0]])
    assert torch.equal(sqdist, expected[1])
    assert torch.equal(kmeans.kmeans_assign(x, centroids, mask=mask & False)[0],
                       kmeans.kmeans_assign(x, centroids)[0])  # fmt: skip


def test_restarts_are_separate_calls():
    """Bit for bit, also the sums."""
    (x,) = draw(17, (700, 5), dtype=torch.float32)
    starts = torch.stack([x[torch.randperm(700)[:6]] for _ in range(4)])
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2] = True
    together = clam_kernels.kmeans_assign(x, starts, mask=mask)
    sums = clam_kernels.kmeans_update(x, together[0], 6)
    for r in range(4):
        one = clam_kernels.kmeans_assign(x, starts[r], mask=mask[r])
        assert torch.equal(one[0], together[0][r])
        assert torch.equal(one[1], together[1][r])
        for a, b in zip(clam_kernels.kmeans_update(x, one[0], 6), sums, strict=True):
            assert torch.equal(a, b[r])


# ---- samples and properties ---------------------------------------------------------------------


def test_samples_reach_every_kind_of_argument():
    """The samples contain every kind of argument that the contract promises to test."""
    for op in ("kmeans_assign", "kmeans_update"):
        names = testing.argument_names(op)
        rows = [dict(zip(names, s.args, strict=False)) for s in testing.samples(op)]
        assert {0, 1, 7} <= {g["x"].shape[-2] for g in rows}
        assert {1, 3} <= {g["x"].shape[-1] for g in rows}
        other = "centroids" if op == "kmeans_assign" else "labels"
        core = 2 if op == "kmeans_assign" else 1
        leads = {(g["x"].ndim - 2, g[other].ndim - core) for g in rows}
        assert {(0, 0), (0, 1), (1, 0) if op == "kmeans_assign" else (1, 1), (2, 1)} <= leads
        for name in ("shift", "mask", "weight"):
            values = [g[name] for g in rows if g.get(name) is not None]
            assert name not in names or {1, 2} <= {x.ndim for x in values}, name
        assert any(not g["x"].isfinite().all() for g in rows)
    labels = [s.args[1] for s in testing.samples("kmeans_update")]
    assert any((x < -1).any() for x in labels)
    assert any((x == -1).all() for x in labels if x.numel())


def test_workload_names_are_complete():
    sizes = ("200k-16-64", "100k-64-256", "50k-784-100")
    names = {r.name for op in ("kmeans_assign", "kmeans_update") for r in testing.workloads(op)}
    assert names == {f"{op}/{s}-fp32" for op in ("kmeans_assign", "kmeans_update") for s in sizes}


@PROPERTY
@given(**PROBLEM, dtype=st.sampled_from(DTYPES), offset=st.sampled_from([0, 7, 100]))
def test_small_integers_tie_and_agree_with_integer_arithmetic(seed, n, k, d, dtype, offset):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (n, d), generator=generator)
    centroids = torch.randint(-3, 4, (k, d), generator=generator)
    far = (x[:, None] - centroids).square().sum(-1)
    expected = torch.where(far == far.amin(1, keepdim=True), torch.arange(k), k).amin(1)
    labels, sqdist = clam_kernels.kmeans_assign(
        (x + offset).to(dtype), (centroids + offset).to(dtype)
    )
    assert torch.equal(labels, expected)
    assert torch.equal(sqdist.long(), far.amin(1))


def test_a_nan_row_sends_no_other_row_to_float64(monkeypatch):
    """One NaN, or one row too long for scores, sends itself to float64 and no other row."""
    x, centroids = torch.randn(1000, 4), torch.randn(8, 4)
    x[10, 2], x[20, 1] = torch.nan, 3e38
    counts = []
    real = nearest.UndecidedRows.add

    def add(self: Any, rows: Tensor, near: Tensor) -> None:
        counts.append(len(rows))
        real(self, rows, near)

    monkeypatch.setattr(nearest.UndecidedRows, "add", add)
    labels, _ = clam_kernels.kmeans_assign(x, centroids)
    assert sum(counts) < 20
    assert torch.equal(labels, fallback.kmeans_assign(x, centroids)[0])
