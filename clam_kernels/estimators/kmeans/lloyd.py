# SPDX-License-Identifier: Apache-2.0
"""Lloyd's iterations over several starts at once, with scikit-learn's rules of stopping, and what
becomes of clusters without rows.
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
from ..common.rows import Rows, normalised

# Labels of all starts under way that are held at once; rows x centres below which a processor takes
# several starts in one call.
LABELS_AT_ONCE = 1 << 25
SMALL_PROBLEM = 1 << 16
# Entries of a chunk of differences.
CHUNK_ENTRIES = 1 << 17
# Sums are brought up to date where less than one row in so many has changed its label.
FEW = 8


@dataclass
class Run:
    """What one start came to."""

    centres: Tensor  # [K, D]
    labels: Tensor  # [N] int64
    inertia: float
    n_iter: int
    relocated: int = 0


@dataclass(frozen=True)
class Rule:
    """How a fit goes on and when it stops."""

    max_iter: int
    tolerance: float  # of the sum of squared moves of the centres
    empty: str
    precision: str | None
    tell: Callable[[str], None] | None = None
    seen: Callable[[int, int, float], bool] | None = None  # (start, iteration, shift) -> stop


def lloyd(
    rows: Rows, weight: Tensor | None, starts: Tensor, rule: Rule, random: np.random.RandomState
) -> list[Run]:
    """Run every start [R, K, D] to its end; each has the bits it would have alone."""
    told = rule.seen or rule.tell  # of one start after the other
    together = rows.device.type == "cuda" or (_is_small(rows, starts.shape[1]) and not told)
    group = max(1, LABELS_AT_ONCE // max(len(rows), 1)) if together else 1
    runs: list[Run] = []
    for first in range(0, len(starts), group):
        fit = _Fit(rows, weight, starts[first : first + group], rule, random, first)
        runs += fit.run()
        if fit.stopped:
            break
    return runs


def _is_small(rows: Rows, k: int) -> bool:
    """Whether calls take longer than the work in them."""
    return rows.whole and len(rows) * k <= SMALL_PROBLEM


class _Fit:
    """Some starts under way; those that have stopped leave."""

    def __init__(
        self,
        rows: Rows,
        weight: Tensor | None,
        starts: Tensor,
        rule: Rule,
        random: np.random.RandomState,
        first: int,
    ) -> None:
        self.rows, self.weight, self.rule, self.random = rows, weight, rule, random
        self.centres = starts.clone()
        self.number = list(range(first, first + len(starts)))
        self.relocated = [0] * len(starts)
        self.runs: list[Run | None] = [None] * len(starts)
        self.place = list(range(len(starts)))
        size = len(starts), len(rows)
        self.labels = torch.full(size, -1, dtype=torch.int64, device=rows.device)
        self.shift = None if rows.unit_norm else rows.shift
        self.kept: list[tuple[Tensor, Tensor]] = []  # sums and weights of the labels before
        self.fresh: tuple[Tensor, Tensor] | None = None  # those of the labels now, if known
        self.stopped = False  # whether a callback asked for it
        self.lost = [False] * len(starts)  # whether a cluster had no rows

    def run(self) -> list[Run]:
        for iteration in range(1, self.rule.max_iter + 1):
            labels = self._next_labels()
            moved = (labels != self.labels).any(1)
            centres = self._centres(labels)
            shift = (centres.double() - self.centres.double()).square_().sum((1, 2))
            self.labels = labels
            if self.rule.tell:
                self._tell_inertia(iteration)
            self.centres = centres
            strict, near, moves = torch.stack(
                [~moved, shift <= self.rule.tolerance, shift]
            ).tolist()
            last = iteration == self.rule.max_iter
            if self.rule.seen:
                asked = [
                    self.rule.seen(self.number[place], iteration, move)
                    for place, move in zip(self.place, moves, strict=True)
                ]
                self.stopped = any(asked)
                last = last or self.stopped
            self._leave(iteration, strict, near, moves, last)
            if not self.place:
                break
        return [run for run in self.runs if run is not None]

    @property
    def in_one_pass(self) -> bool:
        """Whether labels and sums are asked for at once: a GPU reads the rows once for both."""
        whole = self.rows.whole and not self.rows.unit_norm
        return whole and self.rows.device.type == "cuda"

    def _next_labels(self) -> Tensor:
        if not self.in_one_pass:
            return self._assign(self.centres)
        labels, sums, held = kmeans_step(
            self.rows.source,
            self.centres,
            weight=self.weight,
            shift=self.shift,
            precision=self.rule.precision,
        )
        self.fresh = (sums, held.double())
        return labels

    def _assign(self, centres: Tensor) -> Tensor:
        """Labels [A, N]."""
        return labels_of(self.rows, centres, self.rule.precision)

    def _sums(self, labels: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums [A, K, D] and weights [A, K] of the rows of each label.

        Of one start in a processor's memory, once few rows change sides, only those are added and
        taken away, in float64.
        """
        if self.fresh is not None:
            return self.fresh
        k = self.centres.shape[1]
        small = _is_small(self.rows, k)
        alone = len(labels) == 1 and self.weight is None and self.rows.in_place and not small
        moved = (labels[0] != self.labels[0]).nonzero()[:, 0] if alone and self.kept else None
        if moved is not None and len(moved) * FEW < len(self.rows):
            x = self.rows.take(moved)
            sums, held = self.kept[0]
            for found, sign in ((labels[0, moved], 1), (self.labels[0, moved], -1)):
                more, count = kmeans_update(x, found, k, shift=shift)
                sums, held = sums + sign * more, held + sign * count
        else:
            sums, held = self._all_sums(labels, shift)
        if alone:
            self.kept = [(sums, held)]
            return sums.clone(), held.clone()
        return sums, held

    def _all_sums(self, labels: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        count, k, d = self.centres.shape
        if self.rows.is_sparse:
            found = [sparse_rows.sums(self.rows, own, k, self.weight) for own in labels]
            some, weights = zip(*found, strict=True)
            if count == 1:  # no copy beside it
                return some[0][None], weights[0][None]
            return torch.stack(some), torch.stack(weights)
        wide: dict[str, Any] = {"dtype": torch.float64, "device": self.centres.device}
        sums, held = torch.zeros(count, k, d, **wide), torch.zeros(count, k, **wide)
        for part, block in self.rows.blocks():
            own = None if self.weight is None else self.weight[part]
            more, rows = kmeans_update(block, labels[:, part], k, weight=own, shift=shift)
            sums += more
            held += rows
        return sums, held

    def _centres(self, labels: Tensor) -> Tensor:
        """Means of the rows of each label."""
        sums, held = self._sums(labels, self.shift)
        self.lost = (held == 0).any(1).tolist()
        for a in [a for a, lost in enumerate(self.lost) if lost]:
            if self.rule.empty == "relocate":
                self._relocate(a, labels[a], sums[a], held[a])
        filled = (held > 0)[..., None]
        if self.rows.unit_norm:
            filled &= sums.norm(dim=-1, keepdim=True) > 0
            mean = normalised(sums)
        else:
            mean = sums.div_(held.clamp(min=torch.finfo(torch.float64).tiny)[..., None])
            mean = mean if self.shift is None else mean.add_(self.shift.double())
        centres = torch.where(filled, mean.to(self.centres.dtype), self.centres)
        centres = self._fill(centres, held)
        return normalised(centres) if self.rows.unit_norm else centres

    def _relocate(self, a: int, labels: Tensor, sums: Tensor, held: Tensor) -> None:
        """Give the rows farthest from their centres to the clusters without rows, in place."""
        empty = (held == 0).nonzero()[:, 0]
        far = pair_distances(self.rows, self.centres[a], labels)
        if self.weight is not None:
            far = torch.where(self.weight > 0, far, -1.0)
        if float(far.max()) <= 0:
            return
        # stable: of equally far rows the first
        chosen = torch.sort(far, descending=True, stable=True).indices[: len(empty)]
        values = self.rows.take(chosen).double()
        values = values if self.shift is None else values - self.shift.double()
        share = (
            torch.ones(len(chosen), dtype=torch.float64, device=far.device)
            if self.weight is None
            else self.weight[chosen]
        )
        for k, row, value, part in zip(empty.tolist(), chosen.tolist(), values, share, strict=True):
            old = int(labels[row])
            sums[old] -= part * value
            held[old] -= part
            sums[k] = part * value
            held[k] = part
        held[held.abs() < 1e-12 * held.max()] = 0.0
        self.relocated[self.place[a]] += len(empty)

    def _fill(self, centres: Tensor, held: Tensor) -> Tensor:
        """Centres of clusters that are still without rows."""
        if self.rule.empty == "keep" or not bool((held == 0).any()):
            return centres
        for a, k in (held == 0).nonzero().tolist():
            if self.rule.empty == "relocate":
                centres[a, k] = centres[a, held[a].argmax()]
                continue
            share = (held[a].cpu() - 1).clamp(min=0).numpy()
            if not share.sum():
                continue  # no cluster has a row to give
            giver = int(self.random.choice(len(share), p=share / share.sum()))
            self.relocated[self.place[a]] += 1
            nudge = centres.new_full(centres.shape[-1:], 1.0 / 1024)
            nudge[1::2] *= -1
            centre = centres[a, giver].clone()
            centres[a, k], centres[a, giver] = centre * (1 + nudge), centre * (1 - nudge)
            held[a, k] = held[a, giver] = held[a, giver] / 2
        return centres

    def _leave(
        self, iteration: int, strict: list[float], near: list[float], shift: list[float], last: bool
    ) -> None:
        """Take out the starts that stop here; labels are those of the final centres."""
        stay: list[int] = []
        gone = [i for i in range(len(self.place)) if strict[i] or near[i] or last]
        stale = [i for i in gone if not strict[i] or self.lost[i]]
        if stale:
            self.labels[stale] = self._assign(self.centres[stale])
        for i, place in enumerate(self.place):
            if i not in gone:
                stay.append(i)
                continue
            self._tell_stop(iteration, bool(strict[i]), bool(near[i]), shift[i])
            labels, centres = self.labels[i], self.centres[i]
            inertia = inertia_of(self.rows, self.weight, centres, labels)
            self.runs[place] = Run(
                centres.clone(), labels.clone(), inertia, iteration, self.relocated[place]
            )
        self.place = [self.place[i] for i in stay]
        if len(stay) < len(self.labels):
            self.labels, self.centres = self.labels[stay], self.centres[stay]

    def _tell_inertia(self, iteration: int) -> None:
        assert self.rule.tell is not None
        for labels, centres in zip(self.labels, self.centres, strict=True):
            inertia = inertia_of(self.rows, self.weight, centres, labels)
            self.rule.tell(f"Iteration {iteration - 1}, inertia {inertia}.")

    def _tell_stop(self, iteration: int, strict: bool, near: bool, shift: float) -> None:
        if self.rule.tell is None or not (strict or near):
            return
        why = "strict convergence"
        if not strict:
            why = f"center shift {shift} within tolerance {self.rule.tolerance}"
        self.rule.tell(f"Converged at iteration {iteration - 1}: {why}.")


def labels_of(rows: Rows, centres: Tensor, precision: str | None) -> Tensor:
    """Labels [A, N] of all rows for centres [A, K, D]."""
    if rows.is_sparse:
        return torch.stack([sparse_rows.assign(rows, one, precision)[0] for one in centres])
    if rows.whole:
        return nearest(rows.source, centres, rows, precision)
    size = len(centres), len(rows)
    labels = torch.empty(size, dtype=torch.int64, device=centres.device)
    for part, block in rows.blocks():
        labels[:, part] = nearest(block, centres, rows, precision)
    return labels


def nearest(block: Tensor, centres: Tensor, rows: Rows, precision: str | None) -> Tensor:
    """Labels of a block; a row of zeros has no direction and label 0."""
    labels, _ = kmeans_assign(block, centres, distances=False, precision=precision)
    if rows.unit_norm:
        labels = torch.where((block == 0).all(-1), 0, labels)
    return labels


def pair_distances(rows: Rows, centres: Tensor, labels: Tensor) -> Tensor:
    """|x_n - c_label|^2 [N] as float64, from differences in the rows' dtype."""
    if rows.is_sparse:
        return sparse_rows.pair_distances(rows, centres, labels)
    out = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for part, block in rows.blocks():
        step = max(1, CHUNK_ENTRIES // rows.features)
        own = out[part]
        for x, k, far in zip(
            block.split(step), labels[part].split(step), own.split(step), strict=True
        ):
            far.copy_(centres[k].sub_(x).square_().sum(-1))
    return out


def inertia_of(rows: Rows, weight: Tensor | None, centres: Tensor, labels: Tensor) -> float:
    """Sum of the weighted squared distances, halved where rows and centres are directions."""
    far = pair_distances(rows, centres, labels)
    total = float(far.sum() if weight is None else far @ weight)
    return total / 2 if rows.unit_norm else total


def same_clustering(a: Tensor, b: Tensor, k: int) -> bool:
    """Whether two labellings agree up to names."""
    both = len((a * k + b).unique())
    return both == len(a.unique()) == len(b.unique())
