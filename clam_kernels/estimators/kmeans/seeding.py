# SPDX-License-Identifier: Apache-2.0
"""Where k-means starts: greedy k-means++, k-means||, random rows, given centres.

All draws are numpy's, on the host and before the work: no result depends on the device, and the
rows of k-means++ are those that scikit-learn draws from the same state.
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

# Multiply-adds of the greedy search beyond which k-means|| takes its place.
GREEDY_WORK = 1e11
PARALLEL_ROUNDS, PARALLEL_ROUNDS_LONG, PARALLEL_SHARE, PARALLEL_LLOYD = 5, 8, 2, 5


def trials_of(k: int) -> int:
    """Candidates of each greedy step, as scikit-learn has it."""
    return 2 + int(np.log(k))


def plus_plus(rows: Rows, weight: Tensor | None, k: int, random: np.random.RandomState) -> Tensor:
    """Greedy k-means++ [K, D]: D^2 sampling, of some candidates the one of least potential."""
    n, trials = len(rows), trials_of(k)
    share = _shares(rows, weight)
    chosen = int(random.choice(n, p=share))
    draws = torch.from_numpy(random.uniform(size=(k - 1, trials))).to(rows.device)
    centres = [rows.take(_index(chosen))[0]]
    nearest = _sqdist(rows, centres[0][None])[0]
    for draw in draws:
        mass = nearest if weight is None else nearest * weight
        ladder = mass.cumsum(0)
        # where every row lies on a centre all are as good
        ladder = torch.where(ladder[-1] > 0, ladder, torch.ones_like(ladder).cumsum(0))
        candidates = torch.searchsorted(ladder, draw * ladder[-1]).clamp(max=n - 1)
        found = rows.take(candidates)
        closer = torch.minimum(_sqdist(rows, found), nearest)
        potential = closer.sum(1) if weight is None else closer @ weight
        best = potential.argmin()
        nearest = closer[best]
        centres.append(found[best])
    return torch.stack(centres)


def _index(row: int) -> Tensor:
    """One row, as `Rows.take` takes it."""
    return torch.tensor([row], dtype=torch.int64, device="cpu")


def _shares(rows: Rows, weight: Tensor | None) -> np.ndarray[Any, Any]:
    """Probability of each row, on the host."""
    if weight is None:
        return np.full(len(rows), 1.0 / len(rows))
    host = weight.cpu().numpy()
    return np.asarray(host / host.sum())


def _sqdist(rows: Rows, centres: Tensor) -> Tensor:
    """Squared distances [L, N] in float64 of few centres to every row, from differences."""
    if rows.is_sparse:
        return sparse_rows.distances(rows, centres, exact=False)
    out = torch.empty(len(centres), len(rows), dtype=torch.float64, device=rows.device)
    for part, block in rows.blocks():
        far = torch.cdist(centres, block, compute_mode="donot_use_mm_for_euclid_dist")
        out[:, part] = far.double().square_()
    return out


def _nearest(rows: Rows, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(labels, squared distances in float64) of the nearest centre of every row."""
    if rows.is_sparse:
        return sparse_rows.assign(rows, centres, None)
    found = [kmeans_assign(block, centres) for _, block in rows.blocks()]
    labels, far = zip(*found, strict=True)
    return torch.cat(labels), torch.cat(far).double()


def parallel(rows: Rows, weight: Tensor | None, k: int, random: np.random.RandomState) -> Tensor:
    """k-means|| [K, D]: rows join in rounds, then weighted k-means++ and Lloyd among those."""
    n = len(rows)
    chosen = _index(int(random.choice(n, p=_shares(rows, weight))))
    nearest = _sqdist(rows, rows.take(chosen))[0]
    mass = nearest if weight is None else nearest * weight
    potential = float(mass.sum())
    long = potential > 0 and math.log(potential) > PARALLEL_ROUNDS_LONG
    for _ in range(PARALLEL_ROUNDS_LONG if long else PARALLEL_ROUNDS):
        if potential == 0:
            break
        joins = torch.from_numpy(random.uniform(size=n)).to(rows.device)
        fresh = (joins * potential < PARALLEL_SHARE * k * mass).nonzero()[:, 0]
        if len(fresh):
            chosen = torch.cat([chosen, fresh.cpu()])
            nearest = torch.minimum(nearest, _nearest(rows, rows.take(fresh))[1])
        mass = nearest if weight is None else nearest * weight
        potential = float(mass.sum())
    chosen = chosen.unique()
    if len(chosen) < k:  # few rows are apart from those chosen: any fill the rest
        rest = np.setdiff1d(np.arange(n), chosen.numpy())
        more = random.choice(rest, k - len(chosen), replace=False)
        chosen = torch.cat([chosen, torch.from_numpy(more)])
    return _reduced(rows, weight, rows.take(chosen), k, random)


def _reduced(
    rows: Rows,
    weight: Tensor | None,
    candidates: Tensor,
    k: int,
    random: np.random.RandomState,
) -> Tensor:
    """K centres of the candidates, each weighing the rows nearest to it."""
    labels = _nearest(rows, candidates)[0]
    count = torch.bincount(labels, weight, minlength=len(candidates)).double()
    few = in_memory(candidates)
    centres = plus_plus(few, count, k, random)
    for _ in range(PARALLEL_LLOYD):
        labels = kmeans_assign(candidates, centres, distances=False)[0]
        sums, held = kmeans_update(candidates, labels, k, weight=count)
        mean = (sums / held.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).to(rows.dtype)
        centres = torch.where(held[:, None] > 0, mean, centres)
    return centres


def random_rows(rows: Rows, weight: Tensor | None, k: int, random: np.random.RandomState) -> Tensor:
    """K different rows, drawn by weight."""
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
    """One start by name."""
    work = float(k) * trials_of(k) * len(rows) * rows.features
    if init == "random":
        return random_rows(rows, weight, k, random)
    if init == "k-means||" or work > GREEDY_WORK:
        return parallel(rows, weight, k, random)
    return plus_plus(rows, weight, k, random)
