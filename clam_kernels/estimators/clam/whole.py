# SPDX-License-Identifier: Apache-2.0
"""More rows than the search takes: search on a sample, then run Lloyd's iterations of all rows from
the memories of the search.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ..common.frame import Frame
from ..common.rows import Rows, in_scale
from ..common.threads import threads_for
from ..kmeans.lloyd import LloydRule, lloyd
from .points import Points, points_of
from .search import SearchResult
from .settings import ClAMSettings
from .start import SAMPLE_ROWS_PER_MEMORY

# Lloyd's iterations of all rows: most data gain the last per mille of the inertia in so many.
ITERATIONS, PARTIAL_ITERATIONS = 20, 5


def _sample_size(settings: ClAMSettings) -> int:
    return max(settings.search_rows, SAMPLE_ROWS_PER_MEMORY * settings.n_clusters)


def searches_all(settings: ClAMSettings, rows: int) -> bool:
    """Whether the search takes all of so many rows; the published procedure always does."""
    return settings.is_published or rows <= _sample_size(settings)


def points_of_search(
    settings: ClAMSettings, rows: Rows, weight: Tensor | None, frame: Frame, seed: int
) -> tuple[Points, bool]:
    """(the rows of the search, in the frame; whether they are all rows that count).

    A weight is a number of rows; where the least weight is below 1, it is the unit.
    """
    index = _counted_rows(rows, weight)
    if weight is not None:  # one unit for all rows, also for those outside the sample
        weight = weight / weight[weight > 0].min().clamp(max=1.0)
    total = len(rows) if index is None else len(index)
    if total == 0:
        raise ValueError("X: expected a row with a weight and an observed entry, got none")
    is_whole = searches_all(settings, total)
    if not is_whole:
        random = np.random.default_rng([seed, 3])
        draws = random.choice(total, _sample_size(settings), replace=False)
        chosen = torch.from_numpy(np.sort(draws))
        index = chosen if index is None else index[chosen]
    if index is None:
        return points_of(rows.states(frame), weight, settings.precision), True
    own = None if weight is None else weight[index.to(weight.device)]
    z = frame.states(rows.take(index), rows.dtype)
    return points_of(z, own, settings.precision), is_whole


def _counted_rows(rows: Rows, weight: Tensor | None) -> Tensor | None:
    """Index of the rows that have a weight and an observed entry; None for all rows."""
    counted = torch.ones(len(rows), dtype=torch.bool, device="cpu")
    if weight is not None:
        counted &= (weight > 0).cpu()
    if rows.has_missing:
        for part, x in rows.pieces():
            counted[part] &= (~x.isnan()).any(1).cpu()
    return None if bool(counted.all()) else counted.nonzero()[:, 0]


def through_all(
    settings: ClAMSettings, result: SearchResult, rows: Rows, weight: Tensor | None, frame: Frame
) -> SearchResult:
    """The result with its memories after Lloyd's iterations of all rows."""
    if rows.has_missing:
        memories = _lloyd_of_partial_rows(settings, result.memories, rows, weight, frame)
        return dataclasses.replace(result, memories=memories)
    if frame.is_standard:
        rows = rows.in_frame(frame)
    rows.frame()
    first = result.memories if frame.is_standard else frame.data(result.memories)
    start = in_scale(first, rows.exponent).to(rows.dtype)
    rule = LloydRule(ITERATIONS, 0.0, "keep", settings.precision)
    with threads_for(rows.tile_work(len(start))):
        (run,) = lloyd(rows, weight, start[None], rule, np.random.RandomState(0))
    memories = in_scale(run.centroids.double(), -rows.exponent)
    if not frame.is_standard:
        memories = frame.states(memories, result.memories.dtype)
    return dataclasses.replace(result, memories=memories.to(result.memories.dtype))


def _lloyd_of_partial_rows(
    settings: ClAMSettings, memories: Tensor, rows: Rows, weight: Tensor | None, frame: Frame
) -> Tensor:
    """Memories [K, D] after Lloyd's iterations of rows with missing entries, chunk by chunk."""
    k, d = memories.shape
    for _ in range(PARTIAL_ITERATIONS):
        sums, counts = torch.zeros(2, k, d, dtype=torch.float64, device=memories.device)
        for part, x in rows.pieces():
            own = None if weight is None else weight[part]
            points = points_of(frame.states(x, memories.dtype), own, settings.precision)
            chunk_sums, chunk_counts, _ = points.sums(points.assign(memories[None]), k)
            sums += chunk_sums[0]
            counts += chunk_counts[0]
        mean = sums / counts.clamp(min=torch.finfo(torch.float64).tiny)
        memories = torch.where(counts > 0, mean, memories.double()).to(memories.dtype)
    return memories
