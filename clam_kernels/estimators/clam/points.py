# SPDX-License-Identifier: Apache-2.0
"""The rows that ClAM searches on, in its frame: Lloyd's iterations, labels, means, distances, for
several replicas [R, K, D] at once.

Two forms with the same methods: `Points` are complete and go through the k-means ops. Of
`PartialPoints` some entries are missing: they have the value 0 (the mean) and count nowhere; a
squared distance is that of the observed entries times D / their number.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...ops.kmeans import kmeans_assign, kmeans_update
from ..common.rows import in_memory
from ..common.threads import threads_for
from ..kmeans.lloyd import Rule, lloyd

# Entries of a tile of scores, rows x memories of all replicas.
TILE_ENTRIES = 1 << 22


def points_of(z: Tensor, weight: Tensor | None, precision: str | None) -> Points:
    """The rows that count, as points: those with a weight and something observed."""
    seen = ~z.isnan()
    counts = seen.any(1)
    if weight is not None:
        counts &= weight > 0
    if not bool(counts.all()):
        z, seen = z[counts], seen[counts]
        weight = None if weight is None else weight[counts]
    if bool(seen.all()):
        return Points(z, weight, precision)
    return PartialPoints(z.masked_fill(~seen, 0.0), seen, weight, precision)


class Points:
    """Complete rows [N, D] with their weights."""

    seen: Tensor | None = None  # observed entries [N, D]; None where all are

    def __init__(self, z: Tensor, weight: Tensor | None, precision: str | None) -> None:
        self.z, self.weight, self.precision = z, weight, precision
        self.rows = in_memory(z)
        self.rows.mean = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
        self.rows.variance = 1.0  # the frame has centred them
        ones = torch.ones(len(z), dtype=torch.float64, device=z.device)
        self.share = ones if weight is None else weight
        self.total = float(self.share.sum())

    def __len__(self) -> int:
        return len(self.z)

    def part(self, index: Tensor) -> Points:
        """Some rows."""
        weight = None if self.weight is None else self.weight[index]
        return Points(self.z[index], weight, self.precision)

    def lloyd(self, starts: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """(memories, labels [R, N]) after at most so many of Lloyd's iterations."""
        rule = Rule(iterations, 0.0, "keep", self.precision)
        random = np.random.RandomState(0)  # asked only by another rule for empty clusters
        with threads_for(self.rows.tile_work(starts.shape[1])):
            runs = lloyd(self.rows, self.weight, starts, rule, random)
        return torch.stack([r.centres for r in runs]), torch.stack([r.labels for r in runs])

    def assign(self, memories: Tensor) -> Tensor:
        """Labels [R, N]: the nearest memory of each replica."""
        with threads_for(self.rows.tile_work(memories.shape[1])):
            return kmeans_assign(self.z, memories, distances=False, precision=self.precision)[0]

    def means(self, labels: Tensor, memories: Tensor) -> tuple[Tensor, Tensor]:
        """(means of the rows of each label [R, K, D] in float64, weight of each label [R, K]); a
        memory without rows keeps its place.
        """
        sums, counts, held = self.sums(labels, memories.shape[1])
        means = torch.where(counts > 0, sums / counts.clamp(min=_TINY), memories.double())
        return means, held

    def sums(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(sums of the rows of each label [R, K, D], their weight at each feature [R, K, D], their
        weight [R, K]), in float64.
        """
        sums, held = kmeans_update(self.z, labels, k, weight=self.weight)
        held = held.double()
        return sums, held[..., None].expand(sums.shape), held

    def inertia(self, labels: Tensor, means: Tensor) -> Tensor:
        """Sum of weighted squared distances [R] to the means of the labels."""
        parts = [
            self.distances_to(m, own).double() @ self.share
            for m, own in zip(means.to(self.z.dtype), labels, strict=True)
        ]
        return torch.stack(parts)

    def distances_to(self, memories: Tensor, labels: Tensor) -> Tensor:
        """Squared distance of each row to the memory of its label, one replica."""
        return torch.cat(
            [
                (x - memories[own]).square_().sum(1)
                for x, own in zip(self._split(self.z), self._split(labels), strict=True)
            ]
        )

    def distances(self, memories: Tensor) -> Tensor:
        """Squared distances [N, K], one replica, from differences."""
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(self.z, memories, compute_mode=exact).square_()

    def far_row(self, memories: Tensor, labels: Tensor, lot: float) -> Tensor | None:
        """A place for a memory: the row that a lot in [0, 1) draws by weight and squared distance;
        None where every row lies on its memory.
        """
        mass = (self.distances_to(memories, labels).double() * self.share).cumsum(0)
        if float(mass[-1]) <= 0:
            return None
        index = torch.searchsorted(mass, lot * float(mass[-1])).clamp(max=len(mass) - 1)
        return self.completed(int(index), memories)

    def completed(self, index: int, memories: Tensor) -> Tensor:
        """A row as a place for a memory."""
        return self.z[index]

    def between(self) -> Tensor:
        """Distances [N, N] of the rows to each other, in float64."""
        z = self.z.double()
        return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(max(1, TILE_ENTRIES // self.z.shape[1]))


class PartialPoints(Points):
    """Rows with missing entries; every row has an observed one."""

    def __init__(
        self, z: Tensor, seen: Tensor, weight: Tensor | None, precision: str | None
    ) -> None:
        super().__init__(z, weight, precision)
        self.seen = seen
        self.mask = seen.to(z.dtype)
        self.scale = z.shape[1] / self.mask.sum(1)
        wide = z.double()  # a score is a difference of much larger terms
        self.both = torch.cat([seen.double(), -2 * wide], 1)  # and is both . (rho^2, rho)
        self.square = wide.square().sum(1)

    def part(self, index: Tensor) -> Points:
        weight = None if self.weight is None else self.weight[index]
        assert self.seen is not None
        return PartialPoints(self.z[index], self.seen[index], weight, self.precision)

    def lloyd(self, starts: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        memories, labels = starts, self.assign(starts)
        for _ in range(iterations):
            memories = self.means(labels, memories)[0].to(starts.dtype)
            before, labels = labels, self.assign(memories)
            if torch.equal(before, labels):
                break
        return memories, labels

    def assign(self, memories: Tensor) -> Tensor:
        flat = memories.reshape(-1, memories.shape[-1]).double()
        table = torch.cat([flat.square(), flat], 1).mT.contiguous()
        count, k, _ = memories.shape
        step = max(1, TILE_ENTRIES // (count * k))
        found = [(x @ table).view(-1, count, k).argmin(2) for x in self.both.split(step)]
        return torch.cat(found).mT.contiguous()

    def sums(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        sums, held = kmeans_update(self.z, labels, k, weight=self.weight)
        counts, _ = kmeans_update(self.mask, labels, k, weight=self.weight)
        return sums, counts, held.double()

    def distances_to(self, memories: Tensor, labels: Tensor) -> Tensor:
        parts = [
            ((x - memories[own]).square_() * seen).sum(1)
            for x, seen, own in zip(
                self._split(self.z), self._split(self.mask), self._split(labels), strict=True
            )
        ]
        return torch.cat(parts) * self.scale

    def distances(self, memories: Tensor) -> Tensor:
        wide = memories.double()
        scores = self.both @ torch.cat([wide.square(), wide], 1).mT
        far = scores.add_(self.square[:, None]).clamp_(min=0).mul_(self.scale[:, None])
        return far.to(self.z.dtype)

    def completed(self, index: int, memories: Tensor) -> Tensor:
        """The row with its missing entries from the nearest of the memories."""
        assert self.seen is not None
        gap = (memories - self.z[index]).square() * self.mask[index]
        return torch.where(self.seen[index], self.z[index], memories[gap.sum(1).argmin()])

    def between(self) -> Tensor:
        """Of what both rows have, times D / the number of that; the mean of all distances where
        they have nothing in common.
        """
        x, m = self.z.double(), self.mask.double()
        square, common = x.square() @ m.mT, m @ m.mT
        far = (square + square.mT - 2 * (x @ x.mT)).clamp_(min=0)
        far = (far * x.shape[1] / common).sqrt_().fill_diagonal_(0.0)
        known = common > 0
        return torch.where(known, far, far[known].mean())


_TINY = torch.finfo(torch.float64).tiny


def masked_distances(z: Tensor, memories: Tensor) -> Tensor:
    """Squared distances [N, K] of rows with NaN for missing entries; a row without any entry stands
    at the mean.
    """
    seen = ~z.isnan()
    seen = seen | ~seen.any(1, keepdim=True)
    points = PartialPoints(z.nan_to_num(0.0), seen, None, None)
    return points.distances(memories)
