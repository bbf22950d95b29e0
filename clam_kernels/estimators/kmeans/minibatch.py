# SPDX-License-Identifier: Apache-2.0
"""Mini-batch k-means: running means of the batches' rows (Sculley 2010), with scikit-learn's rules
of reassignment and convergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...ops.kmeans import kmeans_assign, kmeans_update
from ..common import sparse_rows
from ..common.rows import Rows, normalise_rows
from .lloyd import LloydResult, LloydRule, inertia_of, labels_of, pair_distances

REASSIGN_EVERY, REASSIGN_RATIO, PATIENCE = 10, 0.01, 10


def minibatch(
    rows: Rows,
    weight: Tensor | None,
    seed: Callable[[Rows, Tensor | None], Tensor],
    k: int,
    n_init: int,
    batch: int,
    rule: LloydRule,
    random: np.random.RandomState,
) -> LloydResult:
    """Fit K centroids batch by batch, from the best of `n_init` starts on a sample."""
    n = len(rows)
    batch = min(batch, n)
    centroids = _best_start(rows, weight, seed, k, n_init, batch, random)
    share = None if weight is None else (weight / weight.sum()).cpu().numpy()
    masses = torch.zeros(len(centroids), dtype=torch.float64, device=rows.device)
    steps = rule.max_iter * n // batch
    since = 0  # rows since the last reassignment
    average, best = 0.0, math.inf  # running mean of the batches' inertia, and its least value
    patience, step = 0, 0
    for step in range(1, steps + 1):
        index = random.choice(n, batch, replace=True, p=share)
        x = rows.part(torch.from_numpy(np.asarray(index)))
        before = centroids
        centroids, inertia = _step(x, centroids, masses, rows, rule)
        if rule.print_line:
            rule.print_line(f"Minibatch step {step}/{steps}: mean batch inertia: {inertia}")
        since += batch
        has_empty = bool((masses == 0).any())
        if has_empty or since >= REASSIGN_EVERY * len(centroids):
            since = 0
            _reassign(x, centroids, masses, random)
        shift = float((centroids - before).square().sum()) if rule.on_iteration else 0.0
        stop = bool(rule.on_iteration and rule.on_iteration(0, step, shift))
        if step == 1:  # its inertia is that of the start
            continue
        alpha = min(1.0, 2.0 * batch / (n + 1))
        average = inertia if step == 2 else average * (1 - alpha) + inertia * alpha
        best, patience = (average, 0) if average < best else (best, patience + 1)
        if stop or patience >= PATIENCE:
            break
    centroids, labels, moved = _without_empty(rows, weight, centroids, rule)
    total = inertia_of(rows, weight, centroids, labels)
    return LloydResult(centroids, labels, total, math.ceil(step * batch / n), moved)


def _without_empty(
    rows: Rows, weight: Tensor | None, centroids: Tensor, rule: LloydRule
) -> tuple[Tensor, Tensor, int]:
    """(centroids, labels, number of centroids that jumped).

    Centroids without rows jump to the rows farthest from their own centroids, until every centroid
    has a row or every row is equal to its centroid.
    """
    jumps = 0
    while True:
        labels = labels_of(rows, centroids[None], rule.precision)[0]
        counted = labels if weight is None else labels[weight > 0]
        empty = (torch.bincount(counted, minlength=len(centroids)) == 0).nonzero()[:, 0]
        if not len(empty) or rule.empty == "keep":
            return centroids, labels, jumps
        sqdist = pair_distances(rows, centroids, labels)
        if weight is not None:
            sqdist = sqdist.masked_fill(weight == 0, 0.0)
        # stable: the first of equally far rows
        order = torch.sort(sqdist, descending=True, stable=True).indices[: len(empty)]
        order = order[sqdist[order] > 0]
        if not len(order):
            return centroids, labels, jumps
        centroids = centroids.index_copy(0, empty[: len(order)], rows.take(order))
        jumps += len(order)


def _best_start(
    rows: Rows,
    weight: Tensor | None,
    seed: Callable[[Rows, Tensor | None], Tensor],
    k: int,
    n_init: int,
    batch: int,
    random: np.random.RandomState,
) -> Tensor:
    """The start with the least inertia on a sample of the rows that count."""
    counted = None if weight is None else (weight > 0).nonzero()[:, 0].cpu()
    count = len(rows) if counted is None else len(counted)
    size = min(count, 3 * max(batch, k))

    def draw() -> tuple[Rows, Tensor | None]:
        index = torch.from_numpy(np.sort(random.choice(count, size, replace=False)))
        index = index if counted is None else counted[index]
        part = rows.part(index)
        return part, None if weight is None else weight[index.to(weight.device)]

    sample, own = draw()
    best: tuple[float, Tensor] | None = None
    for _ in range(n_init):
        first = seed(*draw())
        labels = labels_of(sample, first[None], None)[0]
        inertia = inertia_of(sample, own, first, labels)
        if best is None or inertia < best[0]:
            best = inertia, first
    assert best is not None
    return best[1].clone()


def _step(
    x: Rows, centroids: Tensor, masses: Tensor, rows: Rows, rule: LloydRule
) -> tuple[Tensor, float]:
    """(centroids after a batch, mean squared distance of its rows before); masses in place.

    c_k <- (m_k c_k + sum of the rows of label k) / (m_k + n_k), m_k <- m_k + n_k, with n_k the
    number of these rows.
    """
    if x.is_sparse:
        labels, sqdist = sparse_rows.assign(x, centroids, rule.precision)
        sums, counts = sparse_rows.sums(x, labels, len(centroids), None)
    else:
        labels, sqdist = kmeans_assign(x.source, centroids, precision=rule.precision)
        sums, counts = kmeans_update(x.source, labels, len(centroids))
    total = masses + counts
    means = (centroids.double() * masses[:, None] + sums) / total.clamp(min=1.0)[:, None]
    masses += counts
    means = torch.where((counts > 0)[:, None], means, centroids.double())
    if rows.unit_norm:
        means = normalise_rows(means)
    return means.to(centroids.dtype), float(sqdist.double().mean())


def _reassign(x: Rows, centroids: Tensor, masses: Tensor, random: np.random.RandomState) -> None:
    """Centroids with very few rows jump to rows of the batch, in place."""
    weak = masses < REASSIGN_RATIO * masses.max()
    most = len(x) // 2
    if int(weak.sum()) > most:  # the weakest, at most half as many as rows in the batch
        order = torch.sort(masses, stable=True).indices[:most]
        weak = torch.zeros_like(weak).index_fill_(0, order, True)
    count = int(weak.sum())
    if count == 0:
        return
    chosen = random.choice(len(x), count, replace=False)
    centroids[weak] = x.take(torch.from_numpy(np.asarray(chosen)))
    masses[weak] = masses[~weak].min() if count < len(masses) else 1.0
