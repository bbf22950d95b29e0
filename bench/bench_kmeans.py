# SPDX-License-Identifier: Apache-2.0
"""k-means against scikit-learn's Lloyd, and its ops against unchunked eager torch."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as Peer
from threadpoolctl import threadpool_limits
from torch import Tensor

from clam_kernels import KMeans, testing

ASSIGN, UPDATE = testing.workloads("kmeans_assign"), testing.workloads("kmeans_update")
STEP = testing.workloads("kmeans_step")
TIMER = {"timer": time.process_time, "min_rounds": 1}
ITERATIONS, SAMPLE_ROWS = 10, 4096


def eager_assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The simplest form: all N x K squared distances, expanded, and their minimum."""
    d = torch.addmm(centroids.square().sum(-1), x, -2 * centroids.T) + x.square().sum(-1, True)
    best = d.min(-1)
    return best.indices, best.values


def eager_update(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(k, x.shape[1]).index_add_(0, labels, x)
    return sums, torch.bincount(labels, minlength=k)


def eager_step(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    labels, _ = eager_assign(x, centroids)
    return labels, *eager_update(x, labels, len(centroids))


PLAIN = {
    "kmeans_assign": eager_assign, "kmeans_update": eager_update, "kmeans_step": eager_step,
}  # fmt: skip


def errors(workload: testing.Workload, args: tuple[Any, ...]) -> dict[str, float]:
    """max |out - exact| / max |exact| of the distances or sums on a sample of rows; `exact` is the
    result in float64.
    """
    first, second, *rest = args
    if workload.op == "kmeans_update":
        second = second[:SAMPLE_ROWS]
    rows = (first[:SAMPLE_ROWS], second, *rest)
    place = 0 if workload.op == "kmeans_update" else 1
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in rows)
    exact = testing.spec_of(workload.op).truth(*wide)[place]
    op: Any = getattr(torch.ops.clam, workload.op)
    plain: Any = PLAIN[workload.op]
    results = {"ours": op(*rows)[place], "eager": plain(*rows)[place]}
    return {
        name: float((out - exact).abs().max() / exact.abs().max()) for name, out in results.items()
    }


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("workload", ASSIGN, ids=lambda w: w.name)
def test_fit(workload: testing.Workload, race: Any) -> None:
    """Ten iterations of Lloyd from one start, without tolerance, on one thread each."""
    x, centroids = (t.numpy() for t in workload.make(0))
    options = {"init": centroids, "n_init": 1, "max_iter": ITERATIONS, "tol": 0}
    ours, peer = (cls(len(centroids), **options) for cls in (KMeans, Peer))
    with threadpool_limits(1):
        models = {"ours": ours.fit(x), "eager": peer.fit(x)}
        error = {}
        for name, model in models.items():  # error of the inertia, recomputed in float64
            nearest = model.cluster_centers_[model.labels_].astype(np.float64)
            exact = float(np.square(x - nearest).sum())
            error[name] = abs(model.inertia_ - exact) / exact
        row = race(
            workload.name.replace("kmeans_assign", "KMeans"),
            f"fit, {ours.n_iter_} iterations",
            flops=workload.flops * ITERATIONS,
            error_vs_float64=error,
            peak_extra_bytes={"ours": testing.peak_bytes(lambda: ours.fit(x))},
        )
        row.run(lambda: ours.fit(x), {"scikit-learn": lambda: peer.fit(x)})


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("workload", [*ASSIGN, *UPDATE, *STEP], ids=lambda w: w.name)
def test_ops(workload: testing.Workload, race: Any) -> None:
    args = workload.make(0)
    plain: Any = PLAIN[workload.op]
    op = getattr(torch.ops.clam, workload.op)
    row = race(
        workload.name,
        "forward",
        bytes=workload.bytes,
        flops=workload.flops,
        error_vs_float64=errors(workload, args),
        peak_extra_bytes={
            "ours": testing.peak_bytes(lambda: op(*args)),
            "eager": testing.peak_bytes(lambda: plain(*args)),
        },
    )
    with torch.inference_mode():
        row.run(lambda: op(*args), {"eager": lambda: plain(*args)})
