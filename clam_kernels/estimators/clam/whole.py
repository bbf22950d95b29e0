# SPDX-License-Identifier: Apache-2.0
"""More rows than are searched: a sample of them for the search, then Lloyd's iterations of what it
found through all of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.frame import Frame
from ..common.rows import Rows, in_scale
from ..common.threads import threads_for
from ..kmeans.lloyd import Rule, lloyd
from .points import Points, points_of
from .search import Found
from .start import SAMPLE_ROWS_PER_MEMORY

# Lloyd's iterations through all rows: most gain the last per mille of the inertia in so many.
ITERATIONS, PARTIAL_ITERATIONS = 20, 5


def searches_all(estimator: Any, rows: int) -> bool:
    """Whether the search sees all of so many rows; the published one has no sample."""
    some = max(estimator.search_rows, SAMPLE_ROWS_PER_MEMORY * estimator.n_clusters)
    return estimator.recipe == "paper" or rows <= some


def sampled(
    estimator: Any, rows: Rows, weight: Tensor | None, frame: Frame, seed: int
) -> tuple[Points, bool]:
    """(the rows to search on, in the frame; whether those are all that count).

    A weight is a number of rows; where the least is below 1 it is the unit.
    """
    index = _counting(rows, weight)
    if weight is not None:  # one unit for all rows, whatever is drawn of them
        weight = weight / weight[weight > 0].min().clamp(max=1.0)
    total = len(rows) if index is None else len(index)
    if total == 0:
        raise ValueError("X: expected a row with a weight and an observed entry, got none")
    whole = searches_all(estimator, total)
    if not whole:
        some = max(estimator.search_rows, SAMPLE_ROWS_PER_MEMORY * estimator.n_clusters)
        random = np.random.default_rng([seed, 3])
        chosen = torch.from_numpy(np.sort(random.choice(total, some, replace=False)))
        index = chosen if index is None else index[chosen]
    if index is None:
        return points_of(rows.states(frame), weight, estimator.precision), True
    own = None if weight is None else weight[index.to(weight.device)]
    z = frame.states(rows.take(index), rows.dtype)
    return points_of(z, own, estimator.precision), whole


def _counting(rows: Rows, weight: Tensor | None) -> Tensor | None:
    """Index of the rows that have a weight and something observed; None for all of them."""
    counts = torch.ones(len(rows), dtype=torch.bool, device="cpu")
    if weight is not None:
        counts &= (weight > 0).cpu()
    if rows.missing:
        for part, x in rows.pieces():
            counts[part] &= (~x.isnan()).any(1).cpu()
    return None if bool(counts.all()) else counts.nonzero()[:, 0]


def through_all(
    estimator: Any, found: Found, rows: Rows, weight: Tensor | None, frame: Frame
) -> Found:
    """The memories after Lloyd's iterations over all rows."""
    if rows.missing:
        memories = _partial(estimator, found.memories, rows, weight, frame)
        return dataclasses.replace(found, memories=memories)
    if frame.standard:
        rows = rows.seen_from(frame)
    rows.frame()
    first = found.memories if frame.standard else frame.data(found.memories)
    start = in_scale(first, rows.exponent).to(rows.dtype)
    rule = Rule(ITERATIONS, 0.0, "keep", estimator.precision)
    with threads_for(rows.tile_work(len(start))):
        (run,) = lloyd(rows, weight, start[None], rule, np.random.RandomState(0))
    centres = in_scale(run.centres.double(), -rows.exponent)
    memories = centres if frame.standard else frame.states(centres, found.memories.dtype)
    return dataclasses.replace(found, memories=memories.to(found.memories.dtype))


def _partial(
    estimator: Any, memories: Tensor, rows: Rows, weight: Tensor | None, frame: Frame
) -> Tensor:
    """The same where entries are missing, block by block."""
    k, d = memories.shape
    for _ in range(PARTIAL_ITERATIONS):
        sums, counts = torch.zeros(2, k, d, dtype=torch.float64, device=memories.device)
        for part, x in rows.pieces():
            own = None if weight is None else weight[part]
            points = points_of(frame.states(x, memories.dtype), own, estimator.precision)
            more, seen, _ = points.sums(points.assign(memories[None]), k)
            sums += more[0]
            counts += seen[0]
        mean = sums / counts.clamp(min=torch.finfo(torch.float64).tiny)
        memories = torch.where(counts > 0, mean, memories.double()).to(memories.dtype)
    return memories
