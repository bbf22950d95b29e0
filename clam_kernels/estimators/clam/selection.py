# SPDX-License-Identifier: Apache-2.0
"""Which replica is kept: measured on all rows (inertia, clusters used) and on one fixed sample
(silhouette).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
# Rows whose distances say what is typical.
SOME_ROWS = 64
# Score of a candidate that does not count, beside that of one that does.
PENALTY = 2.0
# Silhouettes closer than this are equal: float32 sums.
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
    """Mean silhouettes of several labellings of one sample."""

    def __init__(self, points: Points, seed: int) -> None:
        index = sample_index(len(points), SILHOUETTE_ROWS, seed, points.weight)
        self.index = index
        part = points if index is None else points.part(index)
        # a sample is drawn by weight
        share = part.share if index is None else torch.ones_like(part.share)
        top = float(share.max())
        self.unit = min(1.0, float(share.min())) / top  # one row
        self.share, self.weights = share, (share / top).float()
        self.far = _bounded(part.between())

    def __call__(self, labels: Tensor, k: int) -> Tensor:
        """Silhouettes [R] of labels [R, N], each row as often as its weight says; -1 where they are
        not defined.
        """
        own = labels if self.index is None else labels[:, self.index]
        found = [self._some(part, k) for part in own.split(max(1, (1 << 22) // (own.shape[1] * k)))]
        return torch.cat(found)

    def _some(self, own: Tensor, k: int) -> Tensor:
        count, n = own.shape
        member = torch.nn.functional.one_hot(own, k).float()  # [R, n, K]
        weighted = (member * self.weights[:, None]).movedim(0, 1).reshape(n, count * k)
        with float32_products():
            sums = (self.far @ weighted).view(n, count, k).movedim(1, 0)
        held = weighted.sum(0).view(count, 1, k)
        mine = own[..., None]
        size = held.expand(-1, n, -1).gather(2, mine)[..., 0]
        alone = self.unit * (1 + 1e-5)
        inside = sums.gather(2, mine)[..., 0] / (size - self.unit).clamp(min=1e-30)
        means = torch.where(held > 0, sums / held.clamp(min=1e-30), torch.inf)
        outside = means.scatter(2, mine, torch.inf).amin(2)
        most = torch.maximum(inside, outside)
        width = (outside - inside) / torch.where(most > 0, most, 1.0)
        width = torch.where(size > alone, width, 0.0).double()
        used = (held[:, 0] > 0).sum(1)
        defined = (used > 1) & (held[:, 0] > alone).any(1)
        return torch.where(defined, width @ self.share / self.share.sum(), -1.0)


def _bounded(far: Tensor) -> Tensor:
    """Distances in float32 with room for those of one far row: in units near the median of some of
    them, and of at most `LARGEST`. `far` is scratch afterwards.
    """
    some = far[:: max(1, len(far) // SOME_ROWS)]
    some = some[some > 0]
    typical = float(some.median()) if len(some) else 0.0
    power = max(-1000, min(1000, -exponent_of(typical)))
    return far.mul_(2.0**power).clamp_(max=LARGEST).float()


def _rounded(inertia: float) -> float:
    """What the order of a sum cannot change."""
    return float(f"{inertia:.9e}")


@dataclass(frozen=True)
class Candidate:
    """One replica at one time, measured; lengths in units of the frame."""

    memories: Tensor  # [K, D]
    number: int  # its row in the table
    used: int
    key: float  # what the selection minimises
    inertia: float

    def covers(self, other: Candidate) -> bool:
        """Whether it is as good in everything."""
        return self.used >= other.used and self.key <= other.key and self.inertia <= other.inertia


@dataclass
class Contest:
    """Every candidate's figures, and the memories of those that could still be the answer."""

    points: Points
    k: int
    select: str  # "silhouette", "inertia" or "loss"
    guard: float | None
    required: int  # clusters that a candidate must use to count
    smallest: float  # weight of a cluster that counts as used
    seed: int
    table: list[list[float]] = field(default_factory=list)
    front: list[Candidate] = field(default_factory=list)

    def __post_init__(self) -> None:
        score = self.select == "silhouette" and self.k > 1
        self.silhouettes = Silhouettes(self.points, self.seed) if score else None

    def enter(
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
            scores.append(self._enter(memories[r], row) if finite[r] else -math.inf)
        return scores

    def measure(self, memories: Tensor, labels: Tensor) -> list[tuple[float, float, int]]:
        """(silhouette, inertia about the labels' means, clusters used) of each."""
        with threads_for(self.points.rows.tile_work(self.k)):
            means, held = self.points.means(labels, memories)
            inertia = self.points.inertia(labels, means).tolist()
        used = ((held > 0) & (held >= self.smallest)).sum(1).tolist()
        quality = [-1.0] * len(memories)
        if self.silhouettes is not None:
            quality = self.silhouettes(labels, self.k).tolist()
        return list(zip(quality, inertia, used, strict=True))

    def _enter(self, memories: Tensor, row: list[float]) -> float:
        keys = {
            "silhouette": -round(row[5] / RESOLUTION) * RESOLUTION,
            "inertia": 0.0,
            "loss": math.inf if math.isnan(row[4]) else row[4],
        }
        used = min(int(row[7]), self.required)
        new = Candidate(memories, len(self.table) - 1, used, keys[self.select], _rounded(row[6]))
        if not any(old.covers(new) for old in self.front):
            self.front = [old for old in self.front if not new.covers(old)]
            kept = Candidate(memories.clone(), new.number, new.used, new.key, new.inertia)
            self.front.append(kept)
        counts = self._counts(new)
        row[8] = float(counts)
        value = -new.inertia if self.select == "inertia" else -new.key
        return value - (0.0 if counts else PENALTY)

    def _bound(self, used: int) -> float:
        """The most inertia that a candidate with so many clusters may have, by those so far."""
        if self.guard is None or self.select != "silhouette":
            return math.inf
        found = [c.inertia for c in self.front if c.used >= used]
        return self.guard * min(found, default=math.inf)

    def _counts(self, one: Candidate) -> bool:
        return one.used >= self.required and one.inertia <= self._bound(one.used)

    def winner(self) -> Candidate:
        """The best of those that use `required` clusters, else of those that use most."""
        if not self.front:
            raise FloatingPointError(
                "the memories of every restart became NaN or infinite: lower learning_rate or beta"
            )
        most = max(c.used for c in self.front)
        bound = self._bound(most)
        counting = [c for c in self.front if c.used == most and c.inertia <= bound]
        return min(counting, key=lambda c: (c.key, c.inertia, c.number))

    def figures(self, winner: Candidate) -> Any:
        """The table [C, COLUMNS]; what counts by the bound as it is in the end, the winner's row
        marked by 2.
        """
        rows = np.array(self.table, dtype=np.float64)
        bound = self._bound(self.required)
        inside = np.array([_rounded(inertia) <= bound for inertia in rows[:, 6]])
        rows[:, 8] = (rows[:, 7] >= self.required) & inside
        rows[winner.number, 8] = 2
        return rows
