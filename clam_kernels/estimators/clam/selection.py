# SPDX-License-Identifier: Apache-2.0
"""The choice of one candidate: the memories of a replica at one time.

Inertia and the number of clusters used are of all rows, the silhouette is of one fixed sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._core.backend import float32_products
from ..common.frame import LARGEST
from ..common.scale import exponent_of
from ..common.threads import threads_for
from .points import Points
from .start import sample_index

SILHOUETTE_ROWS = 2048
# Rows whose distances give the typical distance.
TYPICAL_ROWS = 64
# What a candidate that does not count loses of its score.
PENALTY = 2.0
# Silhouettes that differ by less are equal: their sums are in float32.
RESOLUTION = 1e-6
ROLES = ("start", "lloyd", "am")
COLUMNS = (
    "round",
    "replica",
    "role",
    "beta",
    "loss",
    "silhouette",
    "inertia",
    "clusters_used",
    "counts",
)


class Silhouettes:
    """Mean silhouettes of several labellings of one sample of rows."""

    def __init__(self, points: Points, seed: int) -> None:
        index = sample_index(len(points), SILHOUETTE_ROWS, seed, points.weight)
        self.index = index
        part = points if index is None else points.part(index)
        # a sample is drawn by weight: its rows have equal weights
        weights = part.weights if index is None else torch.ones_like(part.weights)
        top = float(weights.max())
        self.unit = min(1.0, float(weights.min())) / top  # weight of one row
        self.weights, self.weights32 = weights, (weights / top).float()
        self.distances = _bound_distances(part.distances_between_rows())

    def __call__(self, labels: Tensor, k: int) -> Tensor:
        """Silhouettes [R] of labels [R, N], each row weighted; -1 where they are not defined."""
        own = labels if self.index is None else labels[:, self.index]
        step = max(1, (1 << 22) // (own.shape[1] * k))
        return torch.cat([self._silhouettes(part, k) for part in own.split(step)])

    def _silhouettes(self, labels: Tensor, k: int) -> Tensor:
        """Weighted mean [R] of s_n = (b_n - a_n) / max(a_n, b_n): a_n is the mean distance of row n
        to the other rows of its cluster, b_n the least mean distance to those of another cluster.
        """
        count, n = labels.shape
        member = torch.nn.functional.one_hot(labels, k).float()  # [R, n, K]
        weighted = (member * self.weights32[:, None]).movedim(0, 1).reshape(n, count * k)
        with float32_products():
            sums = (self.distances @ weighted).view(n, count, k).movedim(1, 0)  # [R, n, K]
        masses = weighted.sum(0).view(count, 1, k)
        own = labels[..., None]
        size = masses.expand(-1, n, -1).gather(2, own)[..., 0]
        alone = self.unit * (1 + 1e-5)  # weight of a cluster of one row
        inside = sums.gather(2, own)[..., 0] / (size - self.unit).clamp(min=1e-30)
        means = torch.where(masses > 0, sums / masses.clamp(min=1e-30), torch.inf)
        outside = means.scatter(2, own, torch.inf).amin(2)
        larger = torch.maximum(inside, outside)
        width = (outside - inside) / torch.where(larger > 0, larger, 1.0)
        width = torch.where(size > alone, width, 0.0).double()
        used = (masses[:, 0] > 0).sum(1)
        is_defined = (used > 1) & (masses[:, 0] > alone).any(1)
        return torch.where(is_defined, width @ self.weights / self.weights.sum(), -1.0)


def _bound_distances(distances: Tensor) -> Tensor:
    """Distances as float32, divided by a power of two near their median and at most `LARGEST`, so
    that their sums stay finite beside one far row. `distances` is overwritten.
    """
    some = distances[:: max(1, len(distances) // TYPICAL_ROWS)]
    some = some[some > 0]
    typical = float(some.median()) if len(some) else 0.0
    power = max(-1000, min(1000, -exponent_of(typical)))
    return distances.mul_(2.0**power).clamp_(max=LARGEST).float()


def _round_inertia(inertia: float) -> float:
    """The digits of an inertia that do not depend on the order of its sum."""
    return float(f"{inertia:.9e}")


@dataclass(frozen=True)
class Candidate:
    """The memories of one replica at one time, with their figures; lengths in units of the
    frame.
    """

    memories: Tensor  # [K, D]
    number: int  # its row in the table
    used: int  # clusters used, at most as many as are required
    key: float  # the number that the choice minimises
    inertia: float

    def dominates(self, other: Candidate) -> bool:
        """Whether it is at least as good in every figure."""
        return self.used >= other.used and self.key <= other.key and self.inertia <= other.inertia


@dataclass
class Candidates:
    """The figures of every candidate, and the memories of the candidates in the front."""

    points: Points
    k: int
    select: str  # "silhouette", "inertia" or "loss"
    guard: float | None
    required: int  # clusters that a candidate must use to count
    smallest: float  # weight of a cluster that counts as used
    seed: int
    table: list[list[float]] = field(default_factory=list)
    front: list[Candidate] = field(default_factory=list)  # no other candidate dominates them

    def __post_init__(self) -> None:
        needs_silhouettes = self.select == "silhouette" and self.k > 1
        self.silhouettes = Silhouettes(self.points, self.seed) if needs_silhouettes else None

    def add(
        self,
        memories: Tensor,
        labels: Tensor,
        *,
        stage: int,
        replicas: list[int],
        role: str,
        betas: list[float],
        losses: list[float] | None = None,
    ) -> list[float]:
        """Measure memories [R, K, D] with their labels; the score of each, higher is better."""
        losses = [math.nan] * len(memories) if losses is None else losses
        finite = memories.isfinite().all(2).all(1).tolist()
        scores = []
        for r, figures in enumerate(self.measure(memories, labels)):
            row = [stage, replicas[r], ROLES.index(role), betas[r], losses[r], *figures, 0.0]
            self.table.append(row)
            scores.append(self._add(memories[r], row) if finite[r] else -math.inf)
        return scores

    def measure(self, memories: Tensor, labels: Tensor) -> list[tuple[float, float, int]]:
        """(silhouette, inertia about the means of the labels, clusters used) of each replica."""
        with threads_for(self.points.rows.tile_work(self.k)):
            means, masses = self.points.means(labels, memories)
            inertia = self.points.inertia(labels, means).tolist()
        used = ((masses > 0) & (masses >= self.smallest)).sum(1).tolist()
        quality = [-1.0] * len(memories)
        if self.silhouettes is not None:
            quality = self.silhouettes(labels, self.k).tolist()
        return list(zip(quality, inertia, used, strict=True))

    def _add(self, memories: Tensor, row: list[float]) -> float:
        """Compare a candidate with the others; mark in its row whether it counts. Its score."""
        keys = {
            "silhouette": -round(row[5] / RESOLUTION) * RESOLUTION,
            "inertia": 0.0,
            "loss": math.inf if math.isnan(row[4]) else row[4],
        }
        used = min(int(row[7]), self.required)
        new = Candidate(
            memories, len(self.table) - 1, used, keys[self.select], _round_inertia(row[6])
        )
        if not any(old.dominates(new) for old in self.front):
            self.front = [old for old in self.front if not new.dominates(old)]
            self.front.append(replace(new, memories=memories.clone()))
        counts = new.used >= self.required and new.inertia <= self._largest_inertia(new.used)
        row[8] = float(counts)
        value = -new.inertia if self.select == "inertia" else -new.key
        return value - (0.0 if counts else PENALTY)

    def _largest_inertia(self, used: int) -> float:
        """The largest inertia at which a candidate with so many clusters counts so far."""
        if self.guard is None or self.select != "silhouette":
            return math.inf
        inertias = [c.inertia for c in self.front if c.used >= used]
        return self.guard * min(inertias, default=math.inf)

    def best(self) -> Candidate:
        """The best candidate with `required` used clusters, or with most where none has so many."""
        if not self.front:
            raise FloatingPointError(
                "the memories of every restart became NaN or infinite: lower learning_rate or beta"
            )
        most = max(c.used for c in self.front)
        bound = self._largest_inertia(most)
        counting = [c for c in self.front if c.used == most and c.inertia <= bound]
        return min(counting, key=lambda c: (c.key, c.inertia, c.number))

    def figures(self, best: Candidate) -> Any:
        """The table [C, COLUMNS]. Column `counts` is by the last bound, and 2 in the row of the
        best candidate.
        """
        rows = np.array(self.table, dtype=np.float64)
        bound = self._largest_inertia(self.required)
        is_inside = np.array([_round_inertia(inertia) <= bound for inertia in rows[:, 6]])
        rows[:, 8] = (rows[:, 7] >= self.required) & is_inside
        rows[best.number, 8] = 2
        return rows
