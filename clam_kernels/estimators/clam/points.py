# SPDX-License-Identifier: Apache-2.0
"""The rows of a ClAM search, in its frame: Lloyd's iterations, labels, means and distances for
several replicas [R, K, D] at once.

`Points` are complete rows and use the k-means ops. `PartialPoints` have the same methods for rows
with missing entries: these have the value 0 (the mean) and do not count; a squared distance is that
of the m observed entries times D / m.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...ops.kmeans import kmeans_assign, kmeans_update
from ..common.columns import TINY
from ..common.rows import in_memory
from ..common.threads import threads_for
from ..kmeans.lloyd import LloydRule, lloyd

# Scores that are computed at once: rows x memories of all replicas.
CHUNK_SCORES = 1 << 22


def points_of(z: Tensor, weight: Tensor | None, precision: str | None) -> Points:
    """The rows that count, as points: those with a weight and an observed entry."""
    observed = ~z.isnan()
    counts = observed.any(1)
    if weight is not None:
        counts &= weight > 0
    if not bool(counts.all()):
        z, observed = z[counts], observed[counts]
        weight = None if weight is None else weight[counts]
    if bool(observed.all()):
        return Points(z, weight, precision)
    return PartialPoints(z.masked_fill(~observed, 0.0), observed, weight, precision)


class Points:
    """Complete rows [N, D] with their weights."""

    observed: Tensor | None = None  # bool [N, D]; None where all entries are observed

    def __init__(self, z: Tensor, weight: Tensor | None, precision: str | None) -> None:
        self.z, self.weight, self.precision = z, weight, precision
        self.rows = in_memory(z)
        self.rows.mean = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
        self.rows.variance = 1.0  # the frame has centered the rows
        ones = torch.ones(len(z), dtype=torch.float64, device=z.device)
        self.weights = ones if weight is None else weight
        self.total = float(self.weights.sum())

    def __len__(self) -> int:
        return len(self.z)

    def part(self, index: Tensor) -> Points:
        """The points of some rows."""
        weight = None if self.weight is None else self.weight[index]
        return Points(self.z[index], weight, self.precision)

    def lloyd(self, starts: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """(memories, labels [R, N]) after at most so many of Lloyd's iterations."""
        rule = LloydRule(iterations, 0.0, "keep", self.precision)
        random = np.random.RandomState(0)  # not used: the rule keeps empty clusters
        with threads_for(self.rows.tile_work(starts.shape[1])):
            runs = lloyd(self.rows, self.weight, starts, rule, random)
        return torch.stack([r.centroids for r in runs]), torch.stack([r.labels for r in runs])

    def assign(self, memories: Tensor) -> Tensor:
        """Labels [R, N]: the nearest memory of each replica."""
        with threads_for(self.rows.tile_work(memories.shape[1])):
            return kmeans_assign(self.z, memories, distances=False, precision=self.precision)[0]

    def means(self, labels: Tensor, memories: Tensor) -> tuple[Tensor, Tensor]:
        """(means of the rows of each label [R, K, D] in float64, weight of each label [R, K]).

        mean_kj = sum_n w_n x_nj / sum_n w_n over the observed entries of label k; the memory where
        there is none.
        """
        sums, counts, masses = self.sums(labels, memories.shape[1])
        means = torch.where(counts > 0, sums / counts.clamp(min=TINY), memories.double())
        return means, masses

    def sums(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted sums of the rows of each label [R, K, D], weights of their observed entries
        [R, K, D], weights of the rows [R, K]), in float64.
        """
        sums, masses = kmeans_update(self.z, labels, k, weight=self.weight)
        masses = masses.double()
        return sums, masses[..., None].expand(sums.shape), masses

    def inertia(self, labels: Tensor, means: Tensor) -> Tensor:
        """sum_n w_n |x_n - means_label|^2 [R]."""
        parts = [
            self.distances_to(m, own).double() @ self.weights
            for m, own in zip(means.to(self.z.dtype), labels, strict=True)
        ]
        return torch.stack(parts)

    def distances_to(self, memories: Tensor, labels: Tensor) -> Tensor:
        """Squared distances [N] of the rows to the memories [K, D] of their labels."""
        return torch.cat(
            [
                (x - memories[own]).square_().sum(1)
                for x, own in zip(self._split(self.z), self._split(labels), strict=True)
            ]
        )

    def distances(self, memories: Tensor) -> Tensor:
        """Squared distances [N, K] to memories [K, D], from differences."""
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(self.z, memories, compute_mode=exact).square_()

    def far_row(self, memories: Tensor, labels: Tensor, draw: float) -> Tensor | None:
        """A new memory: the row that a number in [0, 1) draws by weight times squared distance;
        None where every row is equal to its memory.
        """
        mass = (self.distances_to(memories, labels).double() * self.weights).cumsum(0)
        if float(mass[-1]) <= 0:
            return None
        index = torch.searchsorted(mass, draw * float(mass[-1])).clamp(max=len(mass) - 1)
        return self.complete_row(int(index), memories)

    def complete_row(self, index: int, memories: Tensor) -> Tensor:
        """A row without missing entries."""
        return self.z[index]

    def distances_between_rows(self) -> Tensor:
        """Distances [N, N] of the rows to each other, in float64."""
        z = self.z.double()
        return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(max(1, CHUNK_SCORES // self.z.shape[1]))


class PartialPoints(Points):
    """Rows with missing entries; every row has an observed entry."""

    def __init__(
        self, z: Tensor, observed: Tensor, weight: Tensor | None, precision: str | None
    ) -> None:
        super().__init__(z, weight, precision)
        self.observed = observed
        self.mask = observed.to(z.dtype)
        self.scale = z.shape[1] / self.mask.sum(1)
        # |m (x - rho)|^2 - |m x|^2 = (m, -2 m x) . (rho^2, rho), with the mask m of a row; in
        # float64, as the terms are much larger than their difference
        x = z.double()
        self.factors = torch.cat([observed.double(), -2 * x], 1)
        self.square = x.square().sum(1)

    def part(self, index: Tensor) -> Points:
        weight = None if self.weight is None else self.weight[index]
        assert self.observed is not None
        return PartialPoints(self.z[index], self.observed[index], weight, self.precision)

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
        step = max(1, CHUNK_SCORES // (count * k))
        labels = [(x @ table).view(-1, count, k).argmin(2) for x in self.factors.split(step)]
        return torch.cat(labels).mT.contiguous()

    def sums(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        sums, masses = kmeans_update(self.z, labels, k, weight=self.weight)
        counts, _ = kmeans_update(self.mask, labels, k, weight=self.weight)
        return sums, counts, masses.double()

    def distances_to(self, memories: Tensor, labels: Tensor) -> Tensor:
        parts = [
            ((x - memories[own]).square_() * mask).sum(1)
            for x, mask, own in zip(
                self._split(self.z), self._split(self.mask), self._split(labels), strict=True
            )
        ]
        return torch.cat(parts) * self.scale

    def distances(self, memories: Tensor) -> Tensor:
        rho = memories.double()
        scores = self.factors @ torch.cat([rho.square(), rho], 1).mT
        distances = scores.add_(self.square[:, None]).clamp_(min=0).mul_(self.scale[:, None])
        return distances.to(self.z.dtype)

    def complete_row(self, index: int, memories: Tensor) -> Tensor:
        """A row whose missing entries are those of the nearest memory."""
        assert self.observed is not None
        squares = (memories - self.z[index]).square() * self.mask[index]
        nearest = memories[squares.sum(1).argmin()]
        return torch.where(self.observed[index], self.z[index], nearest)

    def distances_between_rows(self) -> Tensor:
        """Distances [N, N]: squared differences at the c entries that both rows have, times D / c;
        the mean of all other distances where c is 0.
        """
        x, m = self.z.double(), self.mask.double()
        square, common = x.square() @ m.mT, m @ m.mT
        distances = (square + square.mT - 2 * (x @ x.mT)).clamp_(min=0)
        distances = (distances * x.shape[1] / common).sqrt_().fill_diagonal_(0.0)
        is_known = common > 0
        return torch.where(is_known, distances, distances[is_known].mean())


def masked_distances(z: Tensor, memories: Tensor) -> Tensor:
    """Squared distances [N, K] of rows with NaN for missing entries; a row without any entry is the
    mean.
    """
    observed = ~z.isnan()
    observed = observed | ~observed.any(1, keepdim=True)
    points = PartialPoints(z.nan_to_num(0.0), observed, None, None)
    return points.distances(memories)
