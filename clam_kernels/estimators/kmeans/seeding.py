# SPDX-License-Identifier: Apache-2.0
"""Starts of k-means: greedy k-means++, k-means||, random rows.

numpy draws all random numbers on the CPU, before the distances: no draw depends on the device, and
k-means++ draws the rows that scikit-learn draws from the same state.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.kmeans import kmeans_assign, kmeans_update
from ..common import sparse_rows
from ..common.rows import Rows, in_memory

# Multiply-adds of greedy k-means++ beyond which k-means|| replaces it.
GREEDY_WORK = 1e11
PARALLEL_ROUNDS, PARALLEL_ROUNDS_LONG, PARALLEL_SHARE, PARALLEL_LLOYD = 5, 8, 2, 5


def trials_of(k: int) -> int:
    """Number of candidates of each greedy step, as in scikit-learn."""
    return 2 + int(np.log(k))


def plus_plus(rows: Rows, weight: Tensor | None, k: int, random: np.random.RandomState) -> Tensor:
    """Greedy k-means++ [K, D].

    Each step draws candidates with probability proportional to w_n min_k |x_n - c_k|^2, and adds
    the one with the least potential, sum_n w_n min_k |x_n - c_k|^2.
    """
    n, trials = len(rows), trials_of(k)
    share = _shares(rows, weight)
    chosen = int(random.choice(n, p=share))
    draws = torch.from_numpy(random.uniform(size=(k - 1, trials))).to(rows.device)
    centroids = [rows.take(_index(chosen))[0]]
    nearest = _sqdist(rows, centroids[0][None])[0]
    for draw in draws:
        mass = nearest if weight is None else nearest * weight
        total = mass.cumsum(0)
        # where every row is equal to a centroid, all rows have the same probability
        total = torch.where(total[-1] > 0, total, torch.ones_like(total).cumsum(0))
        index = torch.searchsorted(total, draw * total[-1]).clamp(max=n - 1)
        candidates = rows.take(index)
        closer = torch.minimum(_sqdist(rows, candidates), nearest)
        potential = closer.sum(1) if weight is None else closer @ weight
        best = potential.argmin()
        nearest = closer[best]
        centroids.append(candidates[best])
    return torch.stack(centroids)


def _index(row: int) -> Tensor:
    """The index of one row, for `Rows.take`."""
    return torch.tensor([row], dtype=torch.int64, device="cpu")


def _shares(rows: Rows, weight: Tensor | None) -> np.ndarray[Any, Any]:
    """Probability of each row by its weight, on the CPU."""
    if weight is None:
        return np.full(len(rows), 1.0 / len(rows))
    weights = weight.cpu().numpy()
    return np.asarray(weights / weights.sum())


def _sqdist(rows: Rows, centroids: Tensor) -> Tensor:
    """Squared distances [L, N] in float64 from few centroids to all rows, from differences."""
    if rows.is_sparse:
        return sparse_rows.distances(rows, centroids, exact=False)
    out = torch.empty(len(centroids), len(rows), dtype=torch.float64, device=rows.device)
    for part, block in rows.blocks():
        distances = torch.cdist(centroids, block, compute_mode="donot_use_mm_for_euclid_dist")
        out[:, part] = distances.double().square_()
    return out


def _nearest(rows: Rows, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(labels [N], squared distances [N] in float64 to the nearest centroids)."""
    if rows.is_sparse:
        return sparse_rows.assign(rows, centroids, None)
    parts = [kmeans_assign(block, centroids) for _, block in rows.blocks()]
    labels, sqdist = zip(*parts, strict=True)
    return torch.cat(labels), torch.cat(sqdist).double()


def parallel(rows: Rows, weight: Tensor | None, k: int, random: np.random.RandomState) -> Tensor:
    """k-means|| [K, D]: each round adds many rows to the candidates, by their squared distance from
    the nearest candidate; then weighted k-means++ and Lloyd's iterations of the candidates.
    """
    n = len(rows)
    chosen = _index(int(random.choice(n, p=_shares(rows, weight))))
    nearest = _sqdist(rows, rows.take(chosen))[0]
    mass = nearest if weight is None else nearest * weight
    potential = float(mass.sum())
    long = potential > 0 and math.log(potential) > PARALLEL_ROUNDS_LONG
    for _ in range(PARALLEL_ROUNDS_LONG if long else PARALLEL_ROUNDS):
        if potential == 0:
            break
        draws = torch.from_numpy(random.uniform(size=n)).to(rows.device)
        fresh = (draws * potential < PARALLEL_SHARE * k * mass).nonzero()[:, 0]
        if len(fresh):
            chosen = torch.cat([chosen, fresh.cpu()])
            nearest = torch.minimum(nearest, _nearest(rows, rows.take(fresh))[1])
        mass = nearest if weight is None else nearest * weight
        potential = float(mass.sum())
    chosen = chosen.unique()
    if len(chosen) < k:  # few rows differ from the candidates: add any other rows
        rest = np.setdiff1d(np.arange(n), chosen.numpy())
        more = random.choice(rest, k - len(chosen), replace=False)
        chosen = torch.cat([chosen, torch.from_numpy(more)])
    return _reduce_candidates(rows, weight, rows.take(chosen), k, random)


def _reduce_candidates(
    rows: Rows,
    weight: Tensor | None,
    candidates: Tensor,
    k: int,
    random: np.random.RandomState,
) -> Tensor:
    """K centroids of the candidates, each with the weight of the rows nearest to it."""
    labels = _nearest(rows, candidates)[0]
    count = torch.bincount(labels, weight, minlength=len(candidates)).double()
    centroids = plus_plus(in_memory(candidates), count, k, random)
    for _ in range(PARALLEL_LLOYD):
        labels = kmeans_assign(candidates, centroids, distances=False)[0]
        sums, masses = kmeans_update(candidates, labels, k, weight=count)
        mean = (sums / masses.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).to(rows.dtype)
        centroids = torch.where(masses[:, None] > 0, mean, centroids)
    return centroids


def random_rows(rows: Rows, weight: Tensor | None, k: int, random: np.random.RandomState) -> Tensor:
    """K different rows, drawn with probability proportional to their weights."""
    count = len(rows) if weight is None else int((weight > 0).sum())
    if count < k:
        raise ValueError(
            f"n_clusters: expected at most {count}, the number of rows that count (with a weight"
            f" above 0), got {k}"
        )
    index = random.choice(len(rows), size=k, replace=False, p=_shares(rows, weight))
    return rows.take(torch.from_numpy(np.asarray(index)))


def start(
    rows: Rows,
    weight: Tensor | None,
    k: int,
    init: str,
    random: np.random.RandomState,
) -> Tensor:
    """One start by the name of its method."""
    work = float(k) * trials_of(k) * len(rows) * rows.features
    if init == "random":
        return random_rows(rows, weight, k, random)
    if init == "k-means||" or work > GREEDY_WORK:
        return parallel(rows, weight, k, random)
    return plus_plus(rows, weight, k, random)
