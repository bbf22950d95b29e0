# SPDX-License-Identifier: Apache-2.0
"""Mini-batch k-means: running means of the batches' rows (Sculley 2010), with scikit-learn's rules
of reassignment and stopping.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...ops.kmeans import kmeans_assign, kmeans_update
from ..common import sparse_rows
from ..common.rows import Rows, normalised
from .lloyd import Rule, Run, inertia_of, labels_of, pair_distances

REASSIGN_EVERY, REASSIGN_RATIO, PATIENCE = 10, 0.01, 10


def minibatch(
    rows: Rows,
    weight: Tensor | None,
    seed: Callable[[Rows, Tensor | None], Tensor],
    k: int,
    n_init: int,
    batch: int,
    rule: Rule,
    random: np.random.RandomState,
) -> Run:
    """Fit K centres by batches; the best of `n_init` starts on a sample goes on."""
    n = len(rows)
    batch = min(batch, n)
    centres = _best_start(rows, weight, seed, k, n_init, batch, random)
    share = None if weight is None else (weight / weight.sum()).cpu().numpy()
    held = torch.zeros(len(centres), dtype=torch.float64, device=rows.device)
    steps, since, average, best, patience = rule.max_iter * n // batch, 0, 0.0, math.inf, 0
    step = 0
    for step in range(1, steps + 1):
        index = random.choice(n, batch, replace=True, p=share)
        x = rows.part(torch.from_numpy(np.asarray(index)))
        before = centres
        centres, inertia = _step(x, centres, held, rows, rule)
        if rule.tell:
            rule.tell(f"Minibatch step {step}/{steps}: mean batch inertia: {inertia}")
        since += batch
        lost = bool((held == 0).any())
        if lost or since >= REASSIGN_EVERY * len(centres):
            since = 0
            _reassign(x, centres, held, random)
        stop = bool(rule.seen and rule.seen(0, step, float((centres - before).square().sum())))
        if step == 1:  # its inertia is that of the start
            continue
        alpha = min(1.0, 2.0 * batch / (n + 1))
        average = inertia if step == 2 else average * (1 - alpha) + inertia * alpha
        best, patience = (average, 0) if average < best else (best, patience + 1)
        if stop or patience >= PATIENCE:
            break
    centres, labels, moved = _filled(rows, weight, centres, rule)
    total = inertia_of(rows, weight, centres, labels)
    return Run(centres, labels, total, math.ceil(step * batch / n), moved)


def _filled(
    rows: Rows, weight: Tensor | None, centres: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, int]:
    """(centres, labels, how many centres jumped): those without rows jump to the rows that are
    farthest from their own centres, until each has a row or no row is far.
    """
    jumps = 0
    while True:
        labels = labels_of(rows, centres[None], rule.precision)[0]
        counted = labels if weight is None else labels[weight > 0]
        empty = (torch.bincount(counted, minlength=len(centres)) == 0).nonzero()[:, 0]
        if not len(empty) or rule.empty == "keep":
            return centres, labels, jumps
        far = pair_distances(rows, centres, labels)
        if weight is not None:
            far = far.masked_fill(weight == 0, 0.0)
        # stable: of equally far rows the first
        order = torch.sort(far, descending=True, stable=True).indices[: len(empty)]
        order = order[far[order] > 0]
        if not len(order):
            return centres, labels, jumps
        centres = centres.index_copy(0, empty[: len(order)], rows.take(order))
        jumps += len(order)


def _best_start(
    rows: Rows,
    weight: Tensor | None,
    seed: Callable[[Rows, Tensor | None], Tensor],
    k: int,
    n_init: int,
    batch: int,
    random: np.random.RandomState,
) -> Tensor:
    """Of some starts the one with the least inertia on a sample of the rows that count."""
    counting = None if weight is None else (weight > 0).nonzero()[:, 0].cpu()
    count = len(rows) if counting is None else len(counting)
    size = min(count, 3 * max(batch, k))

    def drawn() -> tuple[Rows, Tensor | None]:
        index = torch.from_numpy(np.sort(random.choice(count, size, replace=False)))
        index = index if counting is None else counting[index]
        few = rows.part(index)
        return few, None if weight is None else weight[index.to(weight.device)]

    sample, own = drawn()
    best: tuple[float, Tensor] | None = None
    for _ in range(n_init):
        first = seed(*drawn())
        labels = labels_of(sample, first[None], None)[0]
        inertia = inertia_of(sample, own, first, labels)
        if best is None or inertia < best[0]:
            best = inertia, first
    assert best is not None
    return best[1].clone()


def _step(x: Rows, centres: Tensor, held: Tensor, rows: Rows, rule: Rule) -> tuple[Tensor, float]:
    """Move the centres towards the batch's means; (centres, mean squared distance before)."""
    if x.is_sparse:
        labels, far = sparse_rows.assign(x, centres, rule.precision)
        sums, counts = sparse_rows.sums(x, labels, len(centres), None)
    else:
        labels, far = kmeans_assign(x.source, centres, precision=rule.precision)
        sums, counts = kmeans_update(x.source, labels, len(centres))
    total = held + counts
    moved = (centres.double() * held[:, None] + sums) / total.clamp(min=1.0)[:, None]
    held += counts
    moved = torch.where((counts > 0)[:, None], moved, centres.double())
    if rows.unit_norm:
        moved = normalised(moved)
    return moved.to(centres.dtype), float(far.double().mean())


def _reassign(x: Rows, centres: Tensor, held: Tensor, random: np.random.RandomState) -> None:
    """Centres of very few rows jump to rows of the batch, in place."""
    weak = held < REASSIGN_RATIO * held.max()
    most = len(x) // 2
    if int(weak.sum()) > most:  # the weakest, as many as half the batch can serve
        order = torch.sort(held, stable=True).indices[:most]
        weak = torch.zeros_like(weak).index_fill_(0, order, True)
    count = int(weak.sum())
    if count == 0:
        return
    chosen = random.choice(len(x), count, replace=False)
    centres[weak] = x.take(torch.from_numpy(np.asarray(chosen)))
    held[weak] = held[~weak].min() if count < len(held) else 1.0
