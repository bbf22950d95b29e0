# SPDX-License-Identifier: Apache-2.0
"""Lloyd's iterations of several starts at once, with scikit-learn's rules of convergence, and the
rules for clusters without rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.kmeans import kmeans_assign, kmeans_step, kmeans_update
from ..common import sparse_rows
from ..common.rows import Rows, normalise_rows, weighted_sum

# Labels in memory at once, those of all starts that run together.
LABELS_AT_ONCE = 1 << 25
# Rows x centroids below which a CPU runs several starts in one call.
SMALL_PROBLEM = 1 << 16
# Entries of a chunk of differences from centroids.
CHUNK_ENTRIES = 1 << 17
# Sums are updated, not computed anew, where less than one row in so many has another label.
INCREMENTAL_UPDATE_RATIO = 8


@dataclass
class LloydResult:
    """The centroids and labels of one start after its last iteration."""

    centroids: Tensor  # [K, D]
    labels: Tensor  # [N] int64
    inertia: float
    n_iter: int
    relocated: int = 0


@dataclass(frozen=True)
class LloydRule:
    """When iterations end, and the rule for clusters without rows."""

    max_iter: int
    tolerance: float  # of the sum of squared moves of the centroids
    empty: str
    precision: str | None
    print_line: Callable[[str], None] | None = None  # gets the lines of a verbose fit
    # on_iteration(start, iteration, shift) -> whether to stop
    on_iteration: Callable[[int, int, float], bool] | None = None


def lloyd(
    rows: Rows,
    weight: Tensor | None,
    starts: Tensor,
    rule: LloydRule,
    random: np.random.RandomState,
) -> list[LloydResult]:
    """Run every start [R, K, D] to its end. The bits of a start do not depend on the others."""
    reports = rule.on_iteration or rule.print_line  # reports are of one start after the other
    together = rows.device.type == "cuda" or (_is_small(rows, starts.shape[1]) and not reports)
    group = max(1, LABELS_AT_ONCE // max(len(rows), 1)) if together else 1
    results: list[LloydResult] = []
    for first in range(0, len(starts), group):
        fit = _Fit(rows, weight, starts[first : first + group], rule, random, first)
        results += fit.run()
        if fit.is_stopped:
            break
    return results


def _is_small(rows: Rows, k: int) -> bool:
    """Whether a call of an op takes longer than its products."""
    return rows.is_whole and len(rows) * k <= SMALL_PROBLEM


class _Fit:
    """Starts that run together: A of them are active, the others have converged."""

    def __init__(
        self,
        rows: Rows,
        weight: Tensor | None,
        starts: Tensor,
        rule: LloydRule,
        random: np.random.RandomState,
        first: int,
    ) -> None:
        self.rows, self.weight, self.rule, self.random = rows, weight, rule, random
        self.centroids = starts.clone()  # [A, K, D]
        self.number = list(range(first, first + len(starts)))
        self.relocated = [0] * len(starts)
        self.results: list[LloydResult | None] = [None] * len(starts)
        self.active = list(range(len(starts)))  # the starts behind the A rows of centroids
        size = len(starts), len(rows)
        self.labels = torch.full(size, -1, dtype=torch.int64, device=rows.device)
        self.shift = None if rows.unit_norm else rows.shift
        # sums and weights of the last labels, from which the next ones may be updated
        self.last_sums: tuple[Tensor, Tensor] | None = None
        # sums and weights of the new labels where one op computes both
        self.step_sums: tuple[Tensor, Tensor] | None = None
        self.is_stopped = False  # whether a callback ended the fit
        self.has_empty = [False] * len(starts)  # whether a cluster had no rows

    def run(self) -> list[LloydResult]:
        """Iterate until every start has converged."""
        for iteration in range(1, self.rule.max_iter + 1):
            labels = self._next_labels()
            is_changed = (labels != self.labels).any(1)
            centroids = self._new_centroids(labels)
            shift = (centroids.double() - self.centroids.double()).square_().sum((1, 2))
            self.labels = labels
            if self.rule.print_line:
                self._print_inertia(iteration)
            self.centroids = centroids
            strict, near, moves = torch.stack(
                [~is_changed, shift <= self.rule.tolerance, shift]
            ).tolist()
            last = iteration == self.rule.max_iter
            if self.rule.on_iteration:
                stops = [
                    self.rule.on_iteration(self.number[start], iteration, move)
                    for start, move in zip(self.active, moves, strict=True)
                ]
                self.is_stopped = any(stops)
                last = last or self.is_stopped
            self._finish(iteration, strict, near, moves, last)
            if not self.active:
                break
        return [result for result in self.results if result is not None]

    @property
    def in_one_pass(self) -> bool:
        """Whether one op computes labels and sums: a GPU reads the rows once for both."""
        is_whole = self.rows.is_whole and not self.rows.unit_norm
        return is_whole and self.rows.device.type == "cuda"

    def _next_labels(self) -> Tensor:
        if not self.in_one_pass:
            return self._assign(self.centroids)
        labels, sums, masses = kmeans_step(
            self.rows.source,
            self.centroids,
            weight=self.weight,
            shift=self.shift,
            precision=self.rule.precision,
        )
        self.step_sums = (sums, masses.double())
        return labels

    def _assign(self, centroids: Tensor) -> Tensor:
        """Labels [A, N]."""
        return labels_of(self.rows, centroids, self.rule.precision)

    def _sums(self, labels: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums [A, K, D] and weights [A, K] of the rows of each label, in float64.

        For one start in a CPU's memory whose labels change for few rows: these rows are added to
        the sum of their new label and subtracted from that of the old one.
        """
        if self.step_sums is not None:
            return self.step_sums
        k = self.centroids.shape[1]
        small = _is_small(self.rows, k)
        alone = len(labels) == 1 and self.weight is None and self.rows.is_in_memory and not small
        changed = None
        if alone and self.last_sums is not None:
            changed = (labels[0] != self.labels[0]).nonzero()[:, 0]
        if changed is not None and len(changed) * INCREMENTAL_UPDATE_RATIO < len(self.rows):
            assert self.last_sums is not None
            x = self.rows.take(changed)
            sums, masses = self.last_sums
            for own, sign in ((labels[0, changed], 1), (self.labels[0, changed], -1)):
                part_sums, counts = kmeans_update(x, own, k, shift=shift)
                sums, masses = sums + sign * part_sums, masses + sign * counts
        else:
            sums, masses = self._all_sums(labels, shift)
        if alone:
            self.last_sums = sums, masses
            return sums.clone(), masses.clone()
        return sums, masses

    def _all_sums(self, labels: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums [A, K, D] and weights [A, K], from all rows."""
        count, k, d = self.centroids.shape
        if self.rows.is_sparse:
            parts = [sparse_rows.sums(self.rows, own, k, self.weight) for own in labels]
            start_sums, start_masses = zip(*parts, strict=True)
            if count == 1:  # a view, as the sums may be large
                return start_sums[0][None], start_masses[0][None]
            return torch.stack(start_sums), torch.stack(start_masses)
        float64: dict[str, Any] = {"dtype": torch.float64, "device": self.centroids.device}
        sums, masses = torch.zeros(count, k, d, **float64), torch.zeros(count, k, **float64)
        for part, block in self.rows.blocks():
            own = None if self.weight is None else self.weight[part]
            block_sums, counts = kmeans_update(block, labels[:, part], k, weight=own, shift=shift)
            sums += block_sums
            masses += counts
        return sums, masses

    def _new_centroids(self, labels: Tensor) -> Tensor:
        """Means of the rows of each label: c_k = shift + sum_n w_n (x_n - shift) / sum_n w_n; of
        unit norm for the cosine metric.
        """
        sums, masses = self._sums(labels, self.shift)
        self.has_empty = (masses == 0).any(1).tolist()
        for a, has_empty in enumerate(self.has_empty):
            if has_empty and self.rule.empty == "relocate":
                self._relocate(a, labels[a], sums[a], masses[a])
        has_rows = (masses > 0)[..., None]
        if self.rows.unit_norm:
            has_rows &= sums.norm(dim=-1, keepdim=True) > 0
            mean = normalise_rows(sums)
        else:
            mean = sums.div_(masses.clamp(min=torch.finfo(torch.float64).tiny)[..., None])
            mean = mean if self.shift is None else mean.add_(self.shift.double())
        centroids = torch.where(has_rows, mean.to(self.centroids.dtype), self.centroids)
        centroids = self._fill(centroids, masses)
        return normalise_rows(centroids) if self.rows.unit_norm else centroids

    def _relocate(self, a: int, labels: Tensor, sums: Tensor, masses: Tensor) -> None:
        """Move the rows farthest from their centroids to the clusters without rows, in place."""
        empty = (masses == 0).nonzero()[:, 0]
        sqdist = pair_distances(self.rows, self.centroids[a], labels)
        if self.weight is not None:
            sqdist = torch.where(self.weight > 0, sqdist, -1.0)
        if float(sqdist.max()) <= 0:
            return
        # stable: the first of equally far rows
        chosen = torch.sort(sqdist, descending=True, stable=True).indices[: len(empty)]
        values = self.rows.take(chosen).double()
        values = values if self.shift is None else values - self.shift.double()
        weights = torch.ones(len(chosen), dtype=torch.float64, device=sqdist.device)
        weights = weights if self.weight is None else self.weight[chosen]
        for k, row, value, w in zip(empty.tolist(), chosen.tolist(), values, weights, strict=True):
            old = int(labels[row])
            sums[old] -= w * value
            masses[old] -= w
            sums[k] = w * value
            masses[k] = w
        masses[masses.abs() < 1e-12 * masses.max()] = 0.0
        self.relocated[self.active[a]] += len(empty)

    def _fill(self, centroids: Tensor, masses: Tensor) -> Tensor:
        """Replace the centroids of clusters that still have no rows, by the rule."""
        if self.rule.empty == "keep" or not bool((masses == 0).any()):
            return centroids
        for a, k in (masses == 0).nonzero().tolist():
            if self.rule.empty == "relocate":
                centroids[a, k] = centroids[a, masses[a].argmax()]
                continue
            share = (masses[a].cpu() - 1).clamp(min=0).numpy()
            if not share.sum():
                continue  # every cluster has one row or none
            split = int(self.random.choice(len(share), p=share / share.sum()))
            self.relocated[self.active[a]] += 1
            nudge = centroids.new_full(centroids.shape[-1:], 1.0 / 1024)
            nudge[1::2] *= -1
            centroid = centroids[a, split].clone()
            centroids[a, k], centroids[a, split] = centroid * (1 + nudge), centroid * (1 - nudge)
            masses[a, k] = masses[a, split] = masses[a, split] / 2
        return centroids

    def _finish(
        self, iteration: int, strict: list[float], near: list[float], shift: list[float], last: bool
    ) -> None:
        """Store the results of the starts that end here, with the labels of their last centroids.

        `strict` and `near` say whether labels stayed the same, and whether centroids moved by less
        than the tolerance; `last` ends all starts.
        """
        ended = [i for i in range(len(self.active)) if strict[i] or near[i] or last]
        stale = [i for i in ended if not strict[i] or self.has_empty[i]]
        if stale:
            self.labels[stale] = self._assign(self.centroids[stale])
        for i in ended:
            self._print_convergence(iteration, bool(strict[i]), bool(near[i]), shift[i])
            start, labels, centroids = self.active[i], self.labels[i], self.centroids[i]
            inertia = inertia_of(self.rows, self.weight, centroids, labels)
            self.results[start] = LloydResult(
                centroids.clone(), labels.clone(), inertia, iteration, self.relocated[start]
            )
        others = [i for i in range(len(self.active)) if i not in ended]
        self.active = [self.active[i] for i in others]
        if len(others) < len(self.labels):
            self.labels, self.centroids = self.labels[others], self.centroids[others]

    def _print_inertia(self, iteration: int) -> None:
        assert self.rule.print_line is not None
        for labels, centroids in zip(self.labels, self.centroids, strict=True):
            inertia = inertia_of(self.rows, self.weight, centroids, labels)
            self.rule.print_line(f"Iteration {iteration - 1}, inertia {inertia}.")

    def _print_convergence(self, iteration: int, strict: bool, near: bool, shift: float) -> None:
        if self.rule.print_line is None or not (strict or near):
            return
        why = "strict convergence"
        if not strict:
            why = f"center shift {shift} within tolerance {self.rule.tolerance}"
        self.rule.print_line(f"Converged at iteration {iteration - 1}: {why}.")


def labels_of(rows: Rows, centroids: Tensor, precision: str | None) -> Tensor:
    """Labels [A, N] of all rows by centroids [A, K, D]."""
    if rows.is_sparse:
        return torch.stack([sparse_rows.assign(rows, one, precision)[0] for one in centroids])
    if rows.is_whole:
        return nearest(rows.source, centroids, rows, precision)
    size = len(centroids), len(rows)
    labels = torch.empty(size, dtype=torch.int64, device=centroids.device)
    for part, block in rows.blocks():
        labels[:, part] = nearest(block, centroids, rows, precision)
    return labels


def nearest(block: Tensor, centroids: Tensor, rows: Rows, precision: str | None) -> Tensor:
    """Labels of a block; with the cosine metric a row of zeros, without direction, has label 0."""
    labels, _ = kmeans_assign(block, centroids, distances=False, precision=precision)
    if rows.unit_norm:
        labels = torch.where((block == 0).all(-1), 0, labels)
    return labels


def pair_distances(rows: Rows, centroids: Tensor, labels: Tensor) -> Tensor:
    """|x_n - c_label|^2 [N] in float64, from differences in the rows' dtype."""
    if rows.is_sparse:
        return sparse_rows.pair_distances(rows, centroids, labels)
    out = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for part, block in rows.blocks():
        step = max(1, CHUNK_ENTRIES // rows.features)
        own = out[part]
        for x, k, sqdist in zip(
            block.split(step), labels[part].split(step), own.split(step), strict=True
        ):
            sqdist.copy_(centroids[k].sub_(x).square_().sum(-1))
    return out


def inertia_of(rows: Rows, weight: Tensor | None, centroids: Tensor, labels: Tensor) -> float:
    """sum_n w_n |x_n - c_label|^2; half of it for the cosine metric."""
    total = weighted_sum(pair_distances(rows, centroids, labels), weight)
    return total / 2 if rows.unit_norm else total


def same_clustering(a: Tensor, b: Tensor, k: int) -> bool:
    """Whether two labellings are the same up to the numbers of the labels."""
    pairs = len((a * k + b).unique())
    return pairs == len(a.unique()) == len(b.unique())
