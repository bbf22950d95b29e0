# SPDX-License-Identifier: Apache-2.0
"""Which replica is kept: measured on all rows (inertia, clusters used) and on one fixed sample
(silhouette).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import pairwise_distances, silhouette_score
from torch import Tensor

from ..ops.am import am_assign, am_recursion
from ..ops.kmeans import kmeans_update
from ._completion import Plan, Trained
from ._frame import chunks
from ._start import sample

SILHOUETTE_ROWS = 2048


@dataclass(frozen=True)
class Fitted:
    """The states, how they were trained on, and what came out."""

    z: Tensor
    trained: Trained
    plan: Plan
    betas: Sequence[float]
    recalls: bool  # labels by the recursion

    def labels(self, z: Tensor, memories: Tensor, beta: float) -> tuple[Tensor, float]:
        """Labels of states by some memories, and the inertia."""
        plan = self.plan
        labels, inertia = [], 0.0
        for part in chunks(z):
            recalled = part
            if self.recalls:
                recalled = am_recursion(part, memories, beta, plan.steps, step=plan.step)
            found, sqdist = assigned(part, recalled, memories, plan.precision)
            labels.append(found)
            inertia += float(sqdist.double().sum())
        return torch.cat(labels), inertia


def assigned(
    z: Tensor, recalled: Tensor, memories: Tensor, precision: str | None
) -> tuple[Tensor, Tensor]:
    """Nearest memory of the recalled states, and the squared distance of the rows z to it."""
    labels, sqdist = am_assign(recalled, memories, precision=precision)
    return labels, sqdist if recalled is z else (z - memories[labels]).square().sum(-1)


@dataclass(frozen=True)
class Candidate:
    """One replica, measured; lengths in units of the frame."""

    memories: Tensor  # [K, D]
    beta: float
    losses: list[float]
    used: int
    inertia: float
    silhouette: float


def means(z: Tensor, labels: Tensor, memories: Tensor) -> Tensor:
    """Mean of the rows of each label; a memory without rows keeps its place."""
    sums, counts = kmeans_update(z, labels, len(memories))
    filled = counts[:, None] > 0
    return torch.where(filled, sums / counts.clamp(min=1)[:, None], memories.double()).to(
        memories.dtype
    )


def measure(fitted: Fitted, select: str, seed: int) -> list[Candidate]:
    """Every finite replica with its figures; the silhouette only if it decides.

    Beside the trained memories stand the means of their rows: where few features leave a hidden
    entry ambiguous, the memories that complete best lie beyond the rows they stand for.
    """
    rows = sample(fitted.z, SILHOUETTE_ROWS, seed)
    distances = pairwise_distances(rows.double().cpu().numpy()) if select == "silhouette" else None
    found = []
    with torch.inference_mode():
        for memories, beta, losses in zip(
            fitted.trained.memories, fitted.betas, fitted.trained.losses.T.tolist(), strict=True
        ):
            if not bool(memories.isfinite().all()):
                continue
            stands = [memories]
            for _ in range(1 if fitted.recalls else 2):
                now = stands[-1]
                labels, inertia = fitted.labels(fitted.z, now, beta)
                stands.append(means(fitted.z, labels, now))
                on_sample = labels if rows is fitted.z else fitted.labels(rows, now, beta)[0]
                quality = _silhouette(distances, on_sample.cpu().numpy())
                used = len(labels.unique())
                found.append(Candidate(now, beta, losses, used, inertia, quality))
    return found


def _silhouette(distances: np.ndarray | None, labels: np.ndarray) -> float:
    """Mean silhouette; -1 where it is not defined."""
    if distances is None or not 2 <= len(np.unique(labels)) < len(labels):
        return -1.0
    return float(silhouette_score(distances, labels, metric="precomputed"))


def choose(
    candidates: Sequence[Candidate], select: str, guard: float | None, required: int
) -> Candidate:
    """The best candidate among those that use `required` clusters, else among those that use most.

    `guard` bounds the inertia of a choice by silhouette. Among equals the
    lowest inertia wins: soft replicas find the same labels with memories that overshoot.
    """
    if not candidates:
        raise FloatingPointError(
            "the memories of every restart became NaN or infinite: lower learning_rate or beta"
        )
    most = min(required, max(c.used for c in candidates))
    counting = [c for c in candidates if c.used >= most]
    if select == "silhouette" and guard is not None:
        bound = guard * min(c.inertia for c in counting)
        counting = [c for c in counting if c.inertia <= bound]
    keys: dict[str, Callable[[Candidate], float]] = {
        "silhouette": lambda c: -c.silhouette,
        "inertia": lambda c: 0.0,
        "loss": lambda c: min(c.losses, default=math.inf),
    }
    return min(counting, key=lambda c: (keys[select](c), c.inertia))
