# SPDX-License-Identifier: Apache-2.0
"""Samples and workloads of the k-means family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops._facts import compute_dtype
from . import DTYPES, FLOATS, BadRow, Sample, Workload, constants, zeros

B, N, K, D = 2, 7, 4, 3
WIDE = (torch.float64, torch.float32)


def _rows(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal values rounded to a grid that is exact in every dtype, so that all have the same
    ties.
    """
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 8).round() / 8


def _assigned(seed: int) -> dict[str, tuple[Any, ...]]:
    """Calls of kmeans_assign: (x, centroids, shift, mask, distances)."""
    g = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return _rows(g, *shape)

    mask = torch.tensor([False, True, False, False])
    odd, bad = rows(N, D), rows(K, D)
    odd[2, 1], odd[4, 0] = torch.nan, torch.inf
    bad[1, 0] = torch.nan
    none_finite = torch.full((K, D), torch.inf, dtype=torch.float64)
    none_finite[::2, 0] = torch.nan
    pairs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.5, 3.0]], dtype=torch.float64)
    return {
        "plain": (rows(N, D), rows(K, D), None, None, True),
        "one-centroid": (rows(N, D), rows(1, D), None, None, True),
        "no-rows": (rows(0, D), rows(K, D), None, None, True),
        "one-row": (rows(1, D), rows(K, D), None, None, True),
        "one-dim": (rows(N, 1), rows(K, 1), None, None, True),
        "wide": (rows(67, 17), rows(33, 17), None, None, True),
        "ties": (pairs, pairs[:2].clone(), None, None, True),
        "equal-centroids": (rows(N, D), rows(1, D).expand(K, D).clone(), None, None, True),
        "on-centroids": ((c := rows(N, D)), c[:K].clone(), None, None, True),
        "offset": (1000 + rows(N, D), 1000 + rows(K, D), None, None, True),
        "shift": (1000 + rows(N, D), 1000 + rows(K, D), 1000 + rows(D), None, True),
        "shift-batch": (rows(N, D), rows(K, D), rows(B, D), None, True),
        "mask": (rows(N, D), rows(K, D), None, mask, True),
        "mask-batch": (rows(N, D), rows(K, D), None, torch.stack([mask, mask.flip(0)]), True),
        "batch": (rows(B, N, D), rows(B, K, D), None, None, True),
        "restarts": (rows(N, D), rows(B, K, D), None, None, True),
        "batch-of-rows": (rows(B, N, D), rows(K, D), None, None, True),
        "batch-crossed": (rows(B, 1, N, D), rows(3, K, D), None, None, True),
        "no-batch": (rows(0, N, D), rows(K, D), None, None, True),
        "not-finite-rows": (odd, rows(K, D), None, None, True),
        "not-finite-centroid": (rows(N, D), bad, None, None, True),
        "labels-alone": (rows(N, D), rows(K, D), None, None, False),
        "everything": (rows(B, 1, N, D), rows(3, K, D), rows(3, D), mask, True),
        "no-rows-restarts": (rows(0, D), rows(B, K, D), None, None, True),
        "no-rows-batch": (rows(B, 0, D), rows(K, D), None, mask, True),
        "no-restarts": (rows(N, D), rows(0, K, D), None, None, True),
        "one-not-finite-centroid": (rows(N, D), none_finite[:1].clone(), None, None, True),
        "not-finite-centroids": (odd.clone(), none_finite.clone(), rows(D), None, True),
        "not-finite-or-masked": (rows(N, D), bad.clone(), None, ~mask, True),
        "not-finite-restart": (rows(N, D), torch.stack([bad[1:2], bad[:1]]), None, None, True),
        "labels-alone-batch": (rows(B, N, D), rows(K, D), None, None, False),
        "labels-alone-no-rows": (rows(0, D), rows(B, K, D), None, None, False),
        "labels-alone-not-finite": (
            rows(N, D),
            torch.stack([bad[1:2], bad[:1]]),
            None,
            None,
            False,
        ),
    }


def _updated(seed: int) -> dict[str, tuple[Any, ...]]:
    """Calls of kmeans_update: (x, labels, k, weight, shift)."""
    g = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return _rows(g, *shape)

    def labels(*shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, K, shape, generator=g)

    def weight(*shape: int) -> Tensor:
        return _rows(g, *shape).abs() + 0.125

    not_finite = rows(N, D)
    not_finite[2, 1] = torch.nan
    unlabelled = labels(N)
    unlabelled[2] = -1
    out_of_range = labels(N)
    out_of_range[0], out_of_range[1] = K, -7
    zero_weight = weight(N)
    zero_weight[3] = 0.0
    return {
        "plain": (rows(N, D), labels(N), K, None, None),
        "one-label": (rows(N, D), torch.zeros(N, dtype=torch.int64), 1, None, None),
        "empty-labels": (rows(N, D), torch.full((N,), 2), K, None, None),
        "no-rows": (rows(0, D), labels(0), K, None, None),
        "one-row": (rows(1, D), labels(1), K, None, None),
        "one-dim": (rows(N, 1), labels(N), K, None, None),
        "long": (rows(1500, D), labels(1500), K, None, None),
        "wide": (rows(67, 300), labels(67), K, None, None),
        "without-labels": (rows(N, D), torch.full((N,), -1), K, None, None),
        "some-without-label": (rows(N, D), labels(N, low=-1), K, None, None),
        "out-of-range": (rows(N, D), out_of_range, K, None, None),
        "not-finite-row-without-label": (not_finite, unlabelled, K, None, None),
        "weight": (rows(N, D), labels(N), K, weight(N), None),
        "weight-0": (rows(N, D), labels(N), K, zero_weight, None),
        "weight-batch": (rows(N, D), labels(N), K, weight(B, N), None),
        "shift": (1000 + rows(N, D), labels(N), K, None, 1000 + rows(D)),
        "batch": (rows(B, N, D), labels(B, N), K, None, None),
        "restarts": (rows(N, D), labels(B, N), K, None, None),
        "batch-crossed": (rows(B, 1, N, D), labels(3, N), K, None, None),
        "no-batch": (rows(0, N, D), labels(N), K, None, None),
        "everything": (rows(B, 1, N, D), labels(3, N, low=-1), K, weight(N), rows(3, D)),
        "no-rows-restarts": (rows(0, D), labels(B, 0), K, None, None),
        "no-rows-weight": (rows(0, D), labels(0), K, weight(B, 0), None),
        "no-rows-shift": (rows(B, 0, D), labels(0), K, None, rows(D)),
        "no-restarts": (rows(N, D), labels(0, N), K, None, None),
        "weights-0": (rows(N, D), labels(N), K, torch.zeros(N, dtype=torch.float64), None),
    }


def _stepped(seed: int) -> dict[str, tuple[Any, ...]]:
    """Calls of kmeans_step: (x, centroids, weight, shift, mask)."""
    g = torch.Generator().manual_seed(seed)
    result = {
        name: (x, centroids, None, shift, mask)
        for name, (x, centroids, shift, mask, distances) in _assigned(seed).items()
        if distances
    }

    def weight(*shape: int) -> Tensor:
        return _rows(g, *shape).abs() + 0.125

    x, centroids, _, shift, mask = result["everything"]
    long = _rows(g, 300, D)
    return {
        **result,
        "long": (long, long[:K].clone(), None, None, None),
        "weight": (*result["plain"][:2], weight(N), None, None),
        "weight-batch": (*result["plain"][:2], weight(B, N), None, None),
        "everything": (x, centroids, weight(N), shift, mask),
        "no-rows-weight": (*result["no-rows"][:2], weight(B, 0), None, None),
        "weights-0": (*result["plain"][:2], torch.zeros(N, dtype=torch.float64), None, None),
    }


# Half precision is too coarse for these values.
NARROWED = ("offset", "shift")


def samples(op: str, seed: int) -> list[Sample]:
    """The samples of an op of this family."""
    makers = {"kmeans_assign": _assigned, "kmeans_update": _updated, "kmeans_step": _stepped}
    return [
        Sample(op, name, args, dtypes=WIDE if name in NARROWED else DTYPES)
        for name, args in makers[op](seed).items()
    ]


def _blobs(seed: int, n: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows around k random means, and k of the rows as centroids."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(k, d, generator=generator, dtype=torch.float32)
    x = torch.randn(n, d, generator=generator, dtype=torch.float32).mul_(0.7)
    x += means[torch.randint(k, (n,), generator=generator)]
    return x, x[torch.randperm(n, generator=generator)[:k]].clone()


def workloads() -> list[Workload]:
    """Calls that the benches time."""
    result = []
    for n, d, k in ((200_000, 16, 64), (100_000, 64, 256), (50_000, 784, 100)):
        name = f"{n // 1000}k-{d}-{k}-fp32"

        def assign(seed: int, n: int = n, d: int = d, k: int = k) -> tuple[Any, ...]:
            return _blobs(seed, n, d, k)

        def update(seed: int, n: int = n, d: int = d, k: int = k) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(seed)
            labels = torch.randint(k, (n,), generator=generator)
            return _blobs(seed, n, d, k)[0], labels, k

        moved_bytes = 4 * (n * d + k * d)
        result += [
            Workload(
                f"kmeans_assign/{name}",
                "kmeans_assign",
                assign,
                moved_bytes + 12 * n,
                2 * n * k * d,
            ),
            Workload(
                f"kmeans_update/{name}",
                "kmeans_update",
                update,
                moved_bytes + 4 * k * d + 8 * n,
                n * d,
            ),
            Workload(
                f"kmeans_step/{name}",
                "kmeans_step",
                assign,
                moved_bytes + 8 * n,
                2 * n * k * d + n * d,
            ),
        ]
    return result


# ---- the values of this family that the contract tests read --------------------------------------

ASSIGN, UPDATE, STEP = ("kmeans_assign",), ("kmeans_update",), ("kmeans_step",)
NEAREST, SUMMED = ASSIGN + STEP, UPDATE + STEP
ALL = ASSIGN + UPDATE + STEP
ROW_ARGUMENTS = ("x", "labels", "weight")
COUPLED = SUMMED
SELECTIONS = {
    "traced": (
        "plain", "no-rows", "batch-crossed", "restarts", "mask-batch", "labels-alone",
        "weight-batch", "everything",
    ),
    "compiled": ("plain", "mask-batch", "labels-alone", "weight", "everything"),
    "exported": ("plain", "restarts", "shift", "weight"),
    "laid": (
        "plain", "batch", "batch-crossed", "wide", "mask-batch", "shift-batch", "weight-batch",
        "everything",
    ),
    "mapped": (
        "plain", "batch-crossed", "restarts", "mask", "mask-batch", "shift", "shift-batch",
        "labels-alone", "weight", "weight-batch", "no-rows", "no-rows-restarts",
        "not-finite-restart", "everything",
    ),
    "nested": ("plain", "restarts"),
    "autocast": ("plain", "mask", "weight", "shift"),
}  # fmt: skip


def problem(op: str, n: int, k: int, d: int, seed: int) -> Sample:
    """Normal rows, and normal centroids or random labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if op in NEAREST:
        args: tuple[Any, ...] = (x, torch.randn(k, d, generator=g, dtype=torch.float64))
    else:
        args = (x, torch.randint(k, (n,), generator=g), k)
    return Sample(op, "problem", args)


def large(op: str, n: int, k: int, d: int, offset: float, seed: int) -> Sample:
    """Rows around k centroids; each row's label is the centroid it was drawn around."""
    g = torch.Generator().manual_seed(seed)
    centroids = torch.randn(k, d, generator=g, dtype=torch.float64)
    labels = torch.randint(k, (n,), generator=g)
    x = centroids[labels] + 0.6 * torch.randn(n, d, generator=g, dtype=torch.float64) + offset
    if op in ASSIGN:
        return Sample(op, "large", (x, centroids + offset, None, None, True))
    if op in STEP:
        return Sample(op, "large", (x, centroids + offset, None, None, None))
    return Sample(op, "large", (x, labels, k, None, None))


def result_dtypes(op: str, dtype: torch.dtype) -> list[torch.dtype]:
    """Labels and counts are integers; distances are float32 unless x is float64, sums never."""
    if op in SUMMED:
        return [*[torch.int64] * (op in STEP), torch.float64, torch.int64]
    return [torch.int64, compute_dtype(dtype)]


# ---- calls that must raise -----------------------------------------------------------------------

PLAIN: dict[str, Callable[[], Any]] = {
    "x": lambda: torch.zeros(5, 3),
    "centroids": lambda: torch.ones(4, 3),
    "labels": lambda: torch.zeros(5, dtype=torch.int64),
    "k": lambda: 4,
    "shift": lambda: None,
    "mask": lambda: None,
    "weight": lambda: None,
    "distances": lambda: True,
    "precision": lambda: None,
}


_ROWS: list[BadRow] = [
    ("x int64", ALL, TypeError, f"x: expected {FLOATS}, got int64",
        {"x": zeros(5, 3, dtype=torch.int64)}),
    ("x complex", ALL, TypeError, f"x: expected {FLOATS}, got complex64",
        {"x": zeros(5, 3, dtype=torch.complex64)}),
    ("x 1-d", ALL, ValueError, "x: expected shape [..., N, D], got [3]", {"x": zeros(3)}),
    ("x 0-d", ALL, ValueError, "x: expected shape [..., N, D], got []", {"x": zeros()}),
    ("D 0", ALL, ValueError, "x: expected D >= 1, got [5, 0]",
        {"x": zeros(5, 0), "centroids": zeros(4, 0)}),
    ("shift int", ALL, TypeError, f"shift: expected {FLOATS}, got int64",
        {"shift": zeros(3, dtype=torch.int64)}),
    ("shift of another D", ALL, ValueError,
        "shift: expected shape [..., 3] to match x [5, 3], got [4]", {"shift": zeros(4)}),
    ("shift of one entry", ALL, ValueError,
        "shift: expected shape [..., 3] to match x [5, 3], got [1]", {"shift": zeros(1)}),
    ("shift 0-d", ALL, ValueError,
        "shift: expected shape [..., 3] to match x [5, 3], got []", {"shift": zeros()}),
    ("centroids bool", NEAREST, TypeError, f"centroids: expected {FLOATS}, got bool",
        {"centroids": zeros(4, 3, dtype=torch.bool)}),
    ("centroids float64", NEAREST, TypeError,
        "centroids: expected dtype float32 to match x, got float64",
        {"centroids": zeros(4, 3, dtype=torch.float64)}),
    ("centroids bfloat16", NEAREST, TypeError,
        "centroids: expected dtype float32 to match x, got bfloat16",
        {"centroids": zeros(4, 3, dtype=torch.bfloat16)}),
    ("x float64", NEAREST, TypeError,
        "centroids: expected dtype float64 to match x, got float32",
        {"x": zeros(5, 3, dtype=torch.float64)}),
    ("another half", NEAREST, TypeError,
        "centroids: expected dtype float32 or float16 to match x, got bfloat16",
        {"x": zeros(5, 3, dtype=torch.float16),
         "centroids": zeros(4, 3, dtype=torch.bfloat16)}),
    ("centroids 1-d", NEAREST, ValueError, "centroids: expected shape [..., K, D], got [3]",
        {"centroids": zeros(3)}),
    ("D differs", NEAREST, ValueError,
        "centroids: expected shape [..., K, 3] to match x [5, 3], got [4, 8]",
        {"centroids": zeros(4, 8)}),
    ("D differs, batch", NEAREST, ValueError,
        "centroids: expected shape [..., K, 16] to match x [2, 5, 16], got [4, 8]",
        {"x": zeros(2, 5, 16), "centroids": zeros(4, 8)}),
    ("K 0", NEAREST, ValueError, "centroids: expected K >= 1, got [0, 3]",
        {"centroids": zeros(0, 3)}),
    ("leading dims", NEAREST, ValueError,
        "centroids: expected leading dims that broadcast to match x [2, 5, 3], got [7, 4, 3]",
        {"x": zeros(2, 5, 3), "centroids": zeros(7, 4, 3)}),
    ("leading dims of shift", NEAREST, ValueError,
        "shift: expected leading dims that broadcast to match x [2, 5, 3], got [7, 3]",
        {"x": zeros(2, 5, 3), "shift": zeros(7, 3)}),
    ("leading dims of mask", NEAREST, ValueError,
        "mask: expected leading dims that broadcast to match x [2, 5, 3], got [7, 4]",
        {"x": zeros(2, 5, 3), "mask": zeros(7, 4, dtype=torch.bool)}),
    ("mask float", NEAREST, TypeError, "mask: expected dtype bool, got float32",
        {"mask": zeros(4)}),
    ("mask int", NEAREST, TypeError, "mask: expected dtype bool, got uint8",
        {"mask": zeros(4, dtype=torch.uint8)}),
    ("mask of another K", NEAREST, ValueError,
        "mask: expected shape [..., 4] to match centroids [4, 3], got [5]",
        {"mask": zeros(5, dtype=torch.bool)}),
    ("mask 0-d", NEAREST, ValueError,
        "mask: expected shape [..., 4] to match centroids [4, 3], got []",
        {"mask": zeros(dtype=torch.bool)}),
    ("precision", NEAREST, ValueError,
        "precision: expected 'highest', 'high', 'medium' or None, got 'fast'",
        constants(precision="fast")),
    ("labels int32", UPDATE, TypeError, "labels: expected dtype int64, got int32",
        {"labels": zeros(5, dtype=torch.int32)}),
    ("labels float", UPDATE, TypeError, "labels: expected dtype int64, got float32",
        {"labels": zeros(5)}),
    ("labels of another N", UPDATE, ValueError,
        "labels: expected shape [..., 5] to match x [5, 3], got [4]",
        {"labels": zeros(4, dtype=torch.int64)}),
    ("labels 0-d", UPDATE, ValueError,
        "labels: expected shape [..., 5] to match x [5, 3], got []",
        {"labels": zeros(dtype=torch.int64)}),
    ("weight int", SUMMED, TypeError, f"weight: expected {FLOATS}, got int64",
        {"weight": zeros(5, dtype=torch.int64)}),
    ("weight of another N", SUMMED, ValueError,
        "weight: expected shape [..., 5] to match x [5, 3], got [5, 1]",
        {"weight": zeros(5, 1)}),
    ("k 0", UPDATE, ValueError, "k: expected an int >= 1, got 0", constants(k=0)),
    ("k -1", UPDATE, ValueError, "k: expected an int >= 1, got -1", constants(k=-1)),
    ("leading dims of labels", UPDATE, ValueError,
        "labels: expected leading dims that broadcast to match x [2, 5, 3], got [7, 5]",
        {"x": zeros(2, 5, 3), "labels": zeros(7, 5, dtype=torch.int64)}),
    ("leading dims of weight", SUMMED, ValueError,
        "weight: expected leading dims that broadcast to match x [2, 5, 3], got [7, 5]",
        {"x": zeros(2, 5, 3), "weight": zeros(7, 5)}),
    ("leading dims of shift, update", UPDATE, ValueError,
        "shift: expected leading dims that broadcast to match x [2, 5, 3], got [7, 3]",
        {"x": zeros(2, 5, 3), "shift": zeros(7, 3)}),
]  # fmt: skip
_VALUES: list[BadRow] = [
    ("mask all True", NEAREST, ValueError,
        "mask: expected an active centroid in every problem, got all True",
        {"mask": lambda: torch.ones(4, dtype=torch.bool)}),
    ("mask all True in one problem", NEAREST, ValueError,
        "mask: expected an active centroid in every problem, got all True",
        {"mask": lambda: torch.tensor([[False] * 4, [True] * 4])}),
]  # fmt: skip
_TYPES: list[BadRow] = [
    ("x list", ALL, TypeError, "x: expected a Tensor, got list", constants(x=[[0.0]])),
    ("x array", ALL, TypeError, "x: expected a Tensor, got ndarray",
        {"x": lambda: torch.zeros(5, 3).numpy()}),
    ("shift number", ALL, TypeError, "shift: expected a Tensor or None, got float",
        constants(shift=0.5)),
    ("centroids int", NEAREST, TypeError, "centroids: expected a Tensor, got int",
        constants(centroids=3)),
    ("mask list", NEAREST, TypeError, "mask: expected a Tensor or None, got list",
        constants(mask=[True])),
    ("distances int", ASSIGN, TypeError, "distances: expected a bool, got int",
        constants(distances=1)),
    ("distances None", ASSIGN, TypeError, "distances: expected a bool, got NoneType",
        constants(distances=None)),
    ("precision int", NEAREST, TypeError, "precision: expected a str or None, got int",
        constants(precision=1)),
    ("labels None", UPDATE, TypeError, "labels: expected a Tensor, got NoneType",
        constants(labels=None)),
    ("weight list", SUMMED, TypeError, "weight: expected a Tensor or None, got list",
        constants(weight=[1.0])),
    *(
        (f"k {value!r}", UPDATE, TypeError, f"k: expected an int >= 1, got {value!r}",
            constants(k=value))
        for value in (4.0, "4", True, None)
    ),
]  # fmt: skip
BAD_CALLS = {"op": _ROWS, "values": _VALUES, "function": _TYPES}
