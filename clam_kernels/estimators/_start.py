# SPDX-License-Identifier: Apache-2.0
"""Where the memories start, and the gap that sets the scale of beta."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._base import Data
from ._frame import Frame
from ._rows import in_memory
from ._seeding import plus_plus, random_rows

# Rows that a start and the gap are computed from; more add nothing to either.
SAMPLE_ROWS, SAMPLE_ROWS_PER_MEMORY = 10_000, 100


def sample(z: Tensor, limit: int, seed: int) -> Tensor:
    """At most `limit` rows, drawn without replacement by a generator of their own."""
    if len(z) <= limit:
        return z
    index = np.random.default_rng([seed, 1]).choice(len(z), limit, replace=False)
    return z[torch.from_numpy(np.sort(index)).to(z.device)]


def starts(
    estimator: Any, recipe: Any, z: Tensor, frame: Frame, data: Data, seed: int, n_init: int
) -> Tensor:
    """Starting memories [R, K, D] in the frame; replica r depends on the seed and r alone."""
    k, d = estimator.n_clusters, z.shape[1]
    init = recipe.init if estimator.init is None else estimator.init
    if not isinstance(init, str) and not callable(init):
        return _given(init, frame, data, (k, d)).expand(n_init, k, d).clone()
    rows = in_memory(sample(z, max(SAMPLE_ROWS, SAMPLE_ROWS_PER_MEMORY * k), seed))
    found = []
    for replica in range(n_init):
        random = np.random.RandomState([seed, replica])
        if callable(init):
            x = data.give(data.values)
            found.append(_given(init(x, k, random), frame, data, (k, d)))
        elif init == "k-means++":
            found.append(plus_plus(rows, None, k, random))
        elif init == "random":
            found.append(random_rows(rows, None, k, random))
        else:
            drawn = random.normal(0.1, 0.1, (k, d)) / 2.0**frame.unit
            found.append(torch.from_numpy(drawn))
    return torch.stack([m.to(z.device, z.dtype) for m in found])


def _given(init: Any, frame: Frame, data: Data, shape: tuple[int, int]) -> Tensor:
    """An array of starting memories, in the frame."""
    x = torch.as_tensor(np.array(init)) if not isinstance(init, Tensor) else init
    if tuple(x.shape) != shape:
        raise ValueError(
            f"The shape of the initial centers {tuple(x.shape)} does not match the number of"
            f" clusters {shape[0]} and the number of features of the data {shape[1]}."
        )
    x = x.detach().to(data.values.device, torch.float64)
    if not bool(x.isfinite().all()):
        raise ValueError("init: expected finite values, got NaN or infinity")
    return frame.states(x, data.values.dtype)


def gap_of(z: Tensor, memories: Tensor, seed: int) -> float:
    """Median over rows of second-nearest minus nearest squared distance, for the best of the
    replicas.

    Where that is 0 or there is one memory: the mean nearest distance; where that is 0 too: 1.
    """
    k = memories.shape[1]
    rows = sample(z, max(SAMPLE_ROWS, SAMPLE_ROWS_PER_MEMORY * k), seed)
    mode = "donot_use_mm_for_euclid_dist"
    best: tuple[float, Tensor] | None = None
    for rho in memories:
        parts = [
            torch.cdist(part, rho, compute_mode=mode).square().topk(min(2, k), largest=False).values
            for part in rows.split(max(1, (1 << 22) // k))
        ]
        two = torch.cat(parts).double()
        mean = float(two[:, 0].mean())
        if best is None or mean < best[0]:
            best = mean, two
    assert best is not None
    mean, two = best
    gap = float((two[:, 1] - two[:, 0]).median()) if k > 1 else 0.0
    return gap or mean or 1.0
