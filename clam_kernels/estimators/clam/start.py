# SPDX-License-Identifier: Apache-2.0
"""The starting memories, and the gap, which sets the scale of beta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...metrics import refuse_masked_entries
from ..common.frame import Frame
from ..common.numbers import as_numbers
from ..common.rows import in_memory
from ..kmeans.seeding import plus_plus, random_rows
from .settings import ClAMSettings

if TYPE_CHECKING:
    from .points import Points

# Rows that a start and the gap are computed from; more rows change neither.
SAMPLE_ROWS, SAMPLE_ROWS_PER_MEMORY = 10_000, 100


def sample_index(rows: int, limit: int, seed: int, weight: Tensor | None = None) -> Tensor | None:
    """Index of at most `limit` of so many rows, in order; None for all rows.

    A generator of its own draws the rows by weight, without replacement.
    """
    if rows <= limit:
        return None
    share = None if weight is None else (weight / weight.sum()).cpu().numpy()
    if share is not None and int((share > 0).sum()) < limit:
        share = None
    index = np.random.default_rng([seed, 1]).choice(rows, limit, replace=False, p=share)
    device = None if weight is None else weight.device
    return torch.from_numpy(np.sort(index)).to(device)


def starts(settings: ClAMSettings, points: Points, frame: Frame, X: Any, seed: int) -> Tensor:
    """Starting memories [R, K, D] in the frame; replica r depends on the seed and r alone."""
    z, init, n_init = points.z, settings.init, settings.n_init
    k, d = settings.n_clusters, z.shape[1]
    if not isinstance(init, str) and not callable(init):
        return _array_start(init, frame, z, (k, d)).expand(n_init, k, d).clone()
    part = _sample(points, k, seed)
    rows = in_memory(part.z)
    replicas = []
    for replica in range(n_init):
        random = np.random.RandomState([seed, replica])
        if callable(init):
            replicas.append(_array_start(init(X, k, random), frame, z, (k, d)))
        elif init == "k-means++":
            replicas.append(plus_plus(rows, part.weight, k, random))
        elif init == "random":
            replicas.append(_random_start(part, k, random))
        else:
            normal = random.normal(0.1, 0.1, (k, d)) * frame.one
            replicas.append(torch.from_numpy(normal))
    return torch.stack([memories.to(z.device, z.dtype) for memories in replicas])


def _sample(points: Points, k: int, seed: int) -> Points:
    """The rows that a start and the gap are computed from."""
    index = sample_index(len(points), max(SAMPLE_ROWS, SAMPLE_ROWS_PER_MEMORY * k), seed)
    return points if index is None else points.part(index.to(points.z.device))


def _random_start(points: Points, k: int, random: np.random.RandomState) -> Tensor:
    """K rows, different ones where as many count."""
    if len(points) < k:
        return points.z[torch.from_numpy(random.choice(len(points), k)).to(points.z.device)]
    return random_rows(points.rows, points.weight, k, random)


def _array_start(init: Any, frame: Frame, like: Tensor, shape: tuple[int, int]) -> Tensor:
    """An array of starting memories, in the frame."""
    x = as_numbers(
        "init", init if isinstance(init, Tensor) else refuse_masked_entries("init", init)
    )
    if not isinstance(x, Tensor):
        x = torch.as_tensor(np.array(x), device="cpu")
    if tuple(x.shape) != shape:
        raise ValueError(
            f"The shape of the initial centers {tuple(x.shape)} does not match the number of"
            f" clusters {shape[0]} and the number of features of the data {shape[1]}."
        )
    x = x.detach().to(like.device, torch.float64)
    if not bool(x.isfinite().all()):
        raise ValueError("init: expected finite values, got NaN or infinity")
    return frame.states(x, like.dtype)


def gap_of(points: Points, memories: Tensor, seed: int) -> float:
    """Weighted median over rows of second-nearest minus nearest squared distance, for the best of
    the replicas [R, K, D].

    Where that is 0 or there is one memory: the mean nearest distance; where that is 0 too: 1.
    """
    k = memories.shape[1]
    part = _sample(points, k, seed)
    best: tuple[float, Tensor] | None = None
    for rho in memories:
        two = part.distances(rho).topk(min(2, k), largest=False).values.double()
        mean = float(two[:, 0] @ part.weights / part.total)
        if best is None or mean < best[0]:
            best = mean, two
    assert best is not None
    mean, two = best
    gap = _median(two[:, 1] - two[:, 0], part.weights) if k > 1 else 0.0
    return gap or mean or 1.0


def _median(values: Tensor, weight: Tensor) -> float:
    """The lower weighted median: a weight of 2 is the value twice."""
    order = torch.sort(values).indices
    below = weight[order].cumsum(0)
    return float(values[order[int((below * 2 < below[-1]).sum())]])
