# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of rows and the prototypes of their labels: exact cases, PCL, limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import clam_kernels as ck
from clam_kernels import testing
from python_fallback import xent as truth

INF, NAN = math.inf, math.nan


def wide(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: Tensor, b: Any, bound: float = 1e-9) -> None:
    b = b if isinstance(b, Tensor) else wide(b)
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound)


def lattice(rows: int, columns: int, a: int, b: int, m: int) -> Tensor:
    """The matrix ((a i + b j) mod m) / m - 0.5."""
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    return ((a * i + b * j) % m).double() / m - 0.5


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def first_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = unit(lattice(5, 4, 7, 3, 11) + 0.05)
    prototypes = unit(lattice(6, 4, 5, 2, 13) + 0.03)
    phi = wide([0.1, 0.2, 0.15, 0.25, 0.3, 0.12])
    return z, prototypes, phi, torch.tensor([0, 3, -1, 5, 2])


def graded(z: Tensor, prototypes: Tensor, phi: Any, labels: Tensor, **rest: Any) -> list[Tensor]:
    """The loss, and its gradients for z, prototypes, and phi and bias where they are tensors."""
    args = testing.leaves_of([z, prototypes, phi])
    if isinstance(rest.get("bias"), Tensor):
        rest["bias"] = rest["bias"].clone().requires_grad_()
    loss = ck.proto_nce(*args, labels, **rest)
    leaves = [x for x in (*args, rest.get("bias")) if isinstance(x, Tensor)]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


# ---- exact cases ---------------------------------------------------------------------------------


def test_losses_and_gradients_of_the_first_case():
    z, prototypes, phi, labels = first_case()
    rows = ck.proto_nce(z, prototypes, phi, labels, reduction="none")
    close(rows, [0.0734030084, 8.536719443, 0.0, 0.0073545172, 0.0037690159])
    loss, dz, dc, dphi = graded(z, prototypes, phi, labels)
    close(loss, 2.1553114961)
    close(ck.proto_nce(z, prototypes, phi, labels, reduction="sum"), 4 * 2.1553114961)
    close(dz.norm(), 2.4900397121)
    close(dc.norm(), 1.9525283553)
    close(dphi, [1.21584861, -0.12054985, -10.11119467, -2.57273902, 0.00072362, 0.09638492], 1e-8)


def test_a_masked_prototype_has_no_gradient():
    z, prototypes, phi, labels = first_case()
    bias = torch.zeros(6, dtype=torch.float64)
    bias[4] = -INF
    hidden = prototypes.clone()
    hidden[4] = NAN
    for points in (prototypes, hidden):
        loss, _, dc, dphi, dbias = graded(z, points, phi, labels, bias=bias)
        close(loss, 2.1540956342)
        assert dc[4].eq(0).all()
        assert dphi[4] == 0
        assert dbias[4] == 0


def test_rows_without_labels_have_no_loss():
    z, prototypes, phi, labels = first_case()
    z[1] = NAN
    bias = torch.zeros(6, dtype=torch.float64)
    for result in graded(z, prototypes, phi, 0 * labels - 1, bias=bias):
        assert result.eq(0).all()


def test_large_scores_stay_finite():
    z, prototypes, phi, labels = first_case()
    exact = graded(200 * z, prototypes, phi, labels)
    narrow = graded(*(x.float() for x in (200 * z, prototypes, phi)), labels)
    for a, b in zip(narrow, exact, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clusterings_in_one_call_are_those_of_separate_calls(dtype):
    sizes, n = (5, 9, 4), 30
    ends = [0, 5, 14, 18]
    z, prototypes = unit(normal(n, 6, dtype=dtype)), unit(normal(18, 6, dtype=dtype))
    phi, bias = normal(18, dtype=dtype).exp(), normal(18, seed=1, dtype=dtype)
    labels = torch.stack([torch.arange(n) % k for k in sizes])
    labels[1, :7] = -1
    labels[2] = -1  # a clustering without labels still divides by M
    together = graded(z, prototypes, phi, labels, bias=bias, offsets=ends)
    parts = [
        graded(z, prototypes[a:b], phi[a:b], labels[m], bias=bias[a:b])
        for m, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    close(together[0], sum(p[0] for p in parts) / 3, bound)
    close(together[1], sum(p[1] for p in parts) / 3, bound)
    for i in (2, 3, 4):
        close(together[i], torch.cat([p[i] for p in parts]) / 3, bound)


def test_permuted_prototypes_give_the_same_loss():
    z, prototypes, phi, labels = first_case()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    place = order.argsort()
    moved = torch.where(labels < 0, -1, place[labels.clamp(min=0)])
    one, other = graded(z, prototypes, phi, labels), graded(z, prototypes[order], phi[order], moved)
    close(one[0], other[0], 1e-14)
    close(one[1], other[1], 1e-13)
    close(one[2][order], other[2], 1e-13)
    close(one[3][order], other[3], 1e-12)


# ---- PCL's official form -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_a_sample_of_negatives_is_a_bias(dtype, bound):
    """PCL concatenates the positives of the batch and sampled negatives, and the target of row i is
    column i. A prototype that is positive for two rows stands there twice.
    """
    k, n = 40, 12
    z, prototypes = unit(normal(n, 8, dtype=dtype)), unit(normal(k, 8, dtype=dtype))
    phi = 0.1 + normal(k, dtype=dtype).abs() / 5
    positives = torch.tensor([0, 3, 3, 7, 9, 11, 0, 15, 0, 21, 22, 23])
    negatives = torch.tensor([1, 2, 30, 31, 32, 38, 39])
    columns = torch.cat([positives, negatives])
    leaves = [x.clone().requires_grad_() for x in (z, prototypes)]
    scores = leaves[0] @ leaves[1][columns].T / phi[columns]
    official = functional.cross_entropy(scores, torch.arange(n))
    bias = torch.bincount(columns, minlength=k).to(dtype).log()
    loss, dz, dc, *_ = graded(z, prototypes, phi, positives, bias=bias)
    close(loss + bias[positives].mean(), official.detach(), bound)
    expected = torch.autograd.grad(official, leaves)
    close(dz, expected[0], 10 * bound)
    close(dc, expected[1], 10 * bound)


def test_cross_entropy_of_torch():
    z, prototypes, labels = normal(50, 7), normal(9, 7), torch.arange(50) % 9
    labels[::6] = -1
    leaves = [x.clone().requires_grad_() for x in (z, prototypes)]
    expected = functional.cross_entropy(leaves[0] @ leaves[1].T / 0.3, labels, ignore_index=-1)
    loss, dz, dc = graded(z, prototypes, 0.3, labels)
    close(loss, expected.detach(), 1e-12)
    for a, b in zip((dz, dc), torch.autograd.grad(expected, leaves), strict=True):
        close(a, b, 1e-12)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    z, prototypes = normal(5, 3), normal(7, 3)
    phi, bias = normal(7).exp(), normal(7)
    bias[2] = -INF
    labels = torch.tensor([0, -1, 6, 3, -1])
    leaves = [x.requires_grad_() for x in (z, prototypes, phi, bias)]

    def loss(z: Tensor, prototypes: Tensor, phi: Tensor, bias: Tensor) -> Tensor:
        return ck.proto_nce(z, prototypes, phi, labels, bias=bias, reduction=reduction)

    assert torch.autograd.gradcheck(loss, leaves)


def test_gradients_of_any_upstream_are_those_of_the_truth():
    """One number for a clustering scales the gradients of forward; others compute them again."""
    ends, labels = [0, 3, 7], torch.stack([torch.arange(20) % 3, torch.arange(20) % 4])
    args = [normal(20, 5), normal(7, 5), normal(7).exp(), labels, normal(7)]
    one, some = torch.ones(2, 20, dtype=torch.float64), normal(2, 20)
    for upstream in (one, one * wide([[2.0], [-3.0]]), some, 0 * some):
        results = []
        for call in (torch.ops.clam.proto_nce_losses, truth.proto_nce_losses):
            leaves = testing.leaves_of(args)
            (call(*leaves, ends) * upstream).sum().backward()
            results.append([x.grad for x in leaves if x.is_floating_point()])
        for a, b in zip(*results, strict=True):
            close(a, b, 1e-12)


def test_a_backward_twice_gives_the_same():
    z, prototypes, phi, labels = first_case()
    leaf = z.requires_grad_()
    loss = ck.proto_nce(leaf, prototypes, phi, labels)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, leaf)
    close(second, 3 * first, 1e-14)


def test_a_row_that_is_not_finite_touches_only_itself():
    z, prototypes, phi, labels = first_case()
    labels = labels.clamp(min=0)
    rest = ck.proto_nce(z, prototypes, phi, labels, reduction="none")
    _, dz, dc, dphi = graded(z[1:], prototypes, phi, labels[1:], reduction="sum")
    for value in (NAN, INF, -INF):
        bad = z.clone()
        bad[0, 2] = value
        losses = ck.proto_nce(bad, prototypes, phi, labels, reduction="none")
        assert losses[0].isnan()
        close(losses[1:], rest[1:], 1e-14)
        _, gz, gc, gphi = graded(bad, prototypes, phi, labels, reduction="sum")
        assert gz[0].isnan().all()
        close(gz[1:], dz, 1e-13)
        close(gc, dc, 1e-13)
        close(gphi, dphi, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_are_computed_in_float32(dtype):
    z, prototypes, labels = normal(30, 8).to(dtype), normal(6, 8).to(dtype), torch.arange(30) % 6
    loss = ck.proto_nce(z, prototypes, 0.5, labels)
    assert loss.dtype == torch.float32
    close(loss, ck.proto_nce(z.double(), prototypes.double(), 0.5, labels), 1e-6)


def test_many_rows_and_chunks():
    """Sums of more rows than float32 holds, and a last chunk that is not full."""
    n = 20_001
    z, prototypes = unit(normal(n, 3, dtype=torch.float32)), unit(normal(40, 3)).float()
    labels = torch.arange(n) % 40
    narrow = graded(z, prototypes, 0.2, labels)
    exact = graded(z.double(), prototypes.double(), 0.2, labels)
    for a, b in zip(narrow, exact, strict=True):
        assert (a.double() - b).abs().max() <= 2e-6 * b.abs().max()


def test_peak_memory_is_a_small_part_of_the_logits():
    n, k, d = 4000, 2000, 16
    z, prototypes = unit(normal(n, d)).float(), unit(normal(k, d)).float()
    labels = torch.arange(n) % k
    peak = testing.peak_bytes(lambda: graded(z, prototypes, 0.1, labels))
    assert peak < 0.15 * 4 * n * k


# ---- errors of proto_nce -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"reduction": "batch"}, ValueError,
         "reduction: expected 'mean', 'sum', 'none', got 'batch'"),
        ({"labels": torch.zeros(5)}, TypeError, "labels: expected dtype int64, got float32"),
        ({"labels": torch.tensor([0, 6, 0, 0, 0])}, ValueError,
         "labels: expected values in [-1, 6), got 6"),
        ({"offsets": (0, 2, 4)}, ValueError,
         "offsets: expected increasing ints from 0 to 6 to match prototypes [6, 4], got [0, 2, 4]"),
        ({"offsets": 6}, TypeError, "offsets: expected a list of ints or None, got 6"),
        ({"phi": 0.0}, ValueError, "phi: expected a finite number > 0, got 0.0"),
    ],
)  # fmt: skip
def test_errors(change, error, text):
    z, prototypes, phi, labels = first_case()
    arguments = {"z": z, "prototypes": prototypes, "phi": phi, "labels": labels, **change}
    with pytest.raises(error) as caught:
        ck.proto_nce(**arguments)
    assert str(caught.value) == text


def test_a_label_of_a_masked_prototype_is_an_error_on_a_cpu_and_infinite_elsewhere():
    z, prototypes, phi, labels = first_case()
    bias = wide([0.0, 0.0, 0.0, -INF, 0.0, 0.0])
    with pytest.raises(ValueError, match="labels of prototypes with bias > -inf, got 3"):
        ck.proto_nce(z, prototypes, phi, labels, bias=bias)
    for call in (truth.proto_nce_losses, truth.proto_nce_losses_forward):
        losses = call(z, prototypes, phi, labels[None], bias)
        assert losses[0, 1] == INF
        assert losses[0].isfinite().tolist() == [True, False, True, True, True]


# ---- the concentration ---------------------------------------------------------------------------

DISTANCES, CLUSTERS = wide([0.2, 0.3, 0.4, 0.5, 0.1, 0.6, 0.7]), torch.tensor([0, 0, 0, 1, 1, 2, 3])


def test_concentration_of_the_first_case():
    raw = [0.9 / (3 * math.log(13)), 0.6 / (2 * math.log(12))]
    close(wide(raw), [0.11696137, 0.12072888], 1e-8)
    phi = ck.cluster_concentration(DISTANCES, CLUSTERS, 5, tau=0.2)
    close(phi, [0.19699293, *[0.20075177] * 4], 1e-8)
    close(phi.mean(), 0.2, 1e-15)


def test_concentration_ignores_rows_without_a_label():
    more = torch.cat([DISTANCES, wide([5.0, NAN])])
    labels = torch.cat([CLUSTERS, torch.tensor([-1, -1])])
    expected = ck.cluster_concentration(DISTANCES, CLUSTERS, 5)
    assert torch.equal(ck.cluster_concentration(more, labels, 5), expected)


@pytest.mark.parametrize(
    ("distances", "labels"),
    [(0 * DISTANCES, CLUSTERS), (DISTANCES, torch.arange(7)), (DISTANCES[:0], CLUSTERS[:0])],
    ids=["collapsed", "single rows", "no rows"],
)
def test_concentration_is_tau_where_nothing_is_known(distances, labels):
    close(ck.cluster_concentration(distances, labels, 7, tau=0.3), [0.3] * 7, 1e-15)


def test_concentration_without_clipping():
    phi = ck.cluster_concentration(DISTANCES, CLUSTERS, 2 + 2, clip=(0, 100))
    raw = wide([0.9 / (3 * math.log(13)), *[0.6 / (2 * math.log(12))] * 3])
    close(phi, 0.1 * raw / raw.mean(), 1e-15)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"n_clusters": 3}, ValueError, "labels: expected values in [-1, 3), got 3"),
        ({"n_clusters": 0}, ValueError, "n_clusters: expected an int >= 1, got 0"),
        ({"labels": CLUSTERS.int()}, TypeError, "labels: expected dtype int64, got int32"),
        ({"labels": CLUSTERS[1:]}, ValueError,
         "labels: expected shape [7] to match distances, got [6]"),
        ({"distances": CLUSTERS}, TypeError,
         "distances: expected dtype float16, bfloat16, float32 or float64, got int64"),
        ({"tau": 0.0}, ValueError, "tau: expected a finite number > 0, got 0.0"),
        ({"alpha": -1.0}, ValueError, "alpha: expected a finite number >= 0, got -1.0"),
        ({"clip": (90, 10)}, ValueError,
         "clip: expected two numbers 0 <= low <= high <= 100, got (90, 10)"),
        ({"clip": 10}, TypeError, "clip: expected two numbers 0 <= low <= high <= 100, got 10"),
    ],
)  # fmt: skip
def test_errors_of_the_concentration(change, error, text):
    arguments = {"distances": DISTANCES, "labels": CLUSTERS, "n_clusters": 5, **change}
    with pytest.raises(error) as caught:
        ck.cluster_concentration(**arguments)
    assert str(caught.value) == text
