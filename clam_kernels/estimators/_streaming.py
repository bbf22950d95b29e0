# SPDX-License-Identifier: Apache-2.0
"""`partial_fit` of ClAM: two lines of memories on batches as they come, and the choice of one.

Line 0 keeps running means of the rows that each memory wins (mini-batch k-means), line 1 trains by
completion with Adam; as in a fit, line 1 is the answer where its silhouette is better and its
inertia inside the guard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from ._columns import frame_of, near
from ._completion import Batch, Plan, draw_masks, expected_masked, in_rates, within
from ._frame import Frame, rescaled
from ._points import Points, points_of
from ._rounds import START_ITERATIONS
from ._rows import Rows
from ._search import RECIPES, plan_of, published_beta, rates_of, resolved
from ._selection import Silhouettes
from ._start import gap_of, starts

# Batches without a row after which a memory jumps to a far row of the batch.
PATIENCE = 20
# Beta of the training in units of 1/gap: with a softer one the memories drift apart. Steps after
# which its rate has halved; Adam's numbers; least share of a batch in what is averaged over them.
SHARPNESS, HALFWAY = 10.0, 10.0
FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8
SHARE = 0.05
MEANS, TRAINED = 0, 1
# on_batch(loss) -> whether to stop
OnBatch = Callable[[float], bool]
_TINY = torch.finfo(torch.float64).tiny


@dataclass
class Stream:
    """What is kept from batch to batch; lengths in units of the frame."""

    seed: int
    frame: Frame  # centred on the mean of all rows so far
    memories: Tensor  # [2, K, D]
    held: Tensor  # [D] weight of the observed entries so far
    won: Tensor  # [K, D] weight of the entries behind the running means
    idle: Tensor  # [2, K] batches since a memory had a row
    gap: float
    square: Tensor  # [D] mean of the squared entries so far
    first: Tensor  # [K, D] Adam's running means of gradients and of their squares
    second: Tensor
    quality: list[float]  # running silhouettes and inertias of the lines
    inertia: list[float]
    steps: int = 0

    def answer(self, estimator: Any) -> Tensor:
        """The memories [K, D] of the line that counts."""
        return self.memories[self._line(estimator)]

    def used(self, estimator: Any) -> int:
        """How many of them had a row lately."""
        return int((self.idle[self._line(estimator)] < PATIENCE).sum())

    def _line(self, estimator: Any) -> int:
        trained = estimator.recipe == "paper" or estimator.select == "loss"
        if not trained and estimator.select == "silhouette":
            guard = estimator.inertia_guard or math.inf
            inside = self.inertia[TRAINED] <= guard * self.inertia[MEANS]
            trained = inside and self.quality[TRAINED] > self.quality[MEANS]
        return TRAINED if trained else MEANS


def begin(estimator: Any, rows: Rows, weight: Tensor | None, X: Any) -> Stream:
    """Memories from the first batch: the best of several starts after Lloyd's iterations."""
    names = getattr(estimator, "feature_names_in_", None)
    frame = frame_of(rows, weight, names, estimator.standardize)
    points = points_of(frame.all_states(rows), weight, estimator.precision)
    init, count = RECIPES[estimator.recipe].init, resolved(estimator, "n_init")
    seed = _seed(estimator)
    found, labels = points.lloyd(
        starts(estimator, init, points, frame, X, seed, count), START_ITERATIONS
    )
    means, _ = points.means(labels, found)
    best = found[int(points.inertia(labels, means).argmin())]
    nothing = torch.zeros_like(best, dtype=torch.float64)
    return _at(seed, frame, best, nothing, gap_of(points, best[None], seed))


def resume(estimator: Any, memories: Tensor, frame: Frame, gap: float) -> Stream:
    """From a fitted estimator."""
    won = torch.from_numpy(np.array(estimator._held)).to(memories.device)
    return _at(_seed(estimator), frame, memories, won, gap)


def _seed(estimator: Any) -> int:
    return int(check_random_state(estimator.random_state).randint(np.iinfo(np.int32).max))


def _at(seed: int, frame: Frame, memories: Tensor, won: Tensor, gap: float) -> Stream:
    still = torch.zeros_like(memories)
    idle = torch.zeros(2, len(memories), dtype=torch.int64, device=memories.device)
    both = torch.stack([memories, memories])
    none, nothing = [0.0, 0.0], torch.zeros_like(frame.mean)
    return Stream(
        seed, frame, both, won.sum(0), won, idle, gap, nothing, still, still.clone(), none, none
    )


def advance(
    estimator: Any, stream: Stream, rows: Rows, weight: Tensor | None, on_batch: OnBatch
) -> tuple[Stream, list[float]]:
    """The stream after one more call, and the loss of each of its batches."""
    losses = []
    size = resolved(estimator, "batch_size")
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        index = torch.arange(start, stop, dtype=torch.int64, device="cpu")
        own = None if weight is None else weight[index.to(weight.device)]
        stream, points = _centred(stream, rows.take(index), own, estimator.precision)
        if len(points):
            stream = _judged(estimator, stream, points)
            stream, loss = _trained(estimator, stream, points)
            losses.append(loss)
            if on_batch(loss):
                break
    return stream, losses


def _centred(
    stream: Stream, x: Tensor, weight: Tensor | None, precision: str | None
) -> tuple[Stream, Points]:
    """The frame moved to the mean of all rows so far, with the batch and the memories in it."""
    frame, dtype = stream.frame, stream.memories.dtype
    z = frame.states(x, torch.float64)
    seen = near(z, frame)
    share = torch.ones(len(z), 1, dtype=torch.float64, device=z.device)
    share = share if weight is None else weight[:, None]
    held = (seen * share).sum(0)
    total = stream.held + held
    by = (torch.where(seen, z, 0.0) * share).sum(0) / total.clamp(min=_TINY)
    points = points_of((z - by).to(dtype), weight, precision)
    square = (torch.where(seen, z - by, 0.0).square() * share).sum(0)
    # 0: nothing is known of what came before
    before = torch.where(stream.square > 0, stream.held, 0.0)
    fresh = dataclasses.replace(
        stream,
        frame=frame.moved(by).widened(x if weight is None else x[weight > 0]),
        memories=(stream.memories.double() - by).to(dtype),
        held=total,
        square=(stream.square * before + square) / (before + held).clamp(min=_TINY),
    )
    return fresh, points


def _judged(estimator: Any, stream: Stream, points: Points) -> Stream:
    """The lines' running figures with this batch; dead memories in new places; line 0 moved."""
    stream, labels = _revived(stream, points)
    k, steps = stream.memories.shape[1], stream.steps + 1
    part = max(1.0 / steps, SHARE)
    far = [
        float(points.distances_to(m, own).double() @ points.share) / points.total
        for m, own in zip(stream.memories, labels, strict=True)
    ]
    quality = stream.quality
    if estimator.select == "silhouette" and 1 < k < len(points):
        found = Silhouettes(points, stream.seed + steps)(labels, k).tolist()
        quality = [a + part * (b - a) for a, b in zip(quality, found, strict=True)]
    inertia = [a + part * (b - a) for a, b in zip(stream.inertia, far, strict=True)]
    sums, counts, _ = points.sums(labels[:1], k)
    won = stream.won + counts[0]
    means = stream.memories[MEANS].double()
    means = means + (sums[0] - counts[0] * means) / won.clamp(min=_TINY)
    memories = torch.stack([means.to(stream.memories.dtype), stream.memories[TRAINED]])
    return dataclasses.replace(
        stream, memories=memories, won=won, quality=quality, inertia=inertia, steps=steps
    )


def _trained(estimator: Any, stream: Stream, points: Points) -> tuple[Stream, float]:
    """Line 1 after one step of Adam on the batch."""
    plan = _plan(estimator, stream, points)
    generator = torch.Generator().manual_seed(stream.seed + stream.steps)
    n, d = points.z.shape
    seen = None if points.seen is None else points.seen.cpu()
    masks = draw_masks(n, d, plan.mask_ratio, generator, seen).to(points.z.device)
    memories = stream.memories[TRAINED].clone().requires_grad_()
    batch = Batch(points.z, masks, points.seen, points.weight)
    loss = batch.backward(memories[None], plan, expected_masked(points, plan.mask_ratio))
    assert memories.grad is not None
    slope = in_rates(memories.grad, plan)
    first = FIRST * stream.first + (1 - FIRST) * slope
    second = SECOND * stream.second + (1 - SECOND) * slope.square()
    rate = plan.learning_rate / (1 + stream.steps / HALFWAY)
    wide = (second / (1 - SECOND**stream.steps)).sqrt() + EPSILON * plan.length
    move = -rate * (first / (1 - FIRST**stream.steps)) / wide
    moved = within(memories.detach(), move, plan)
    both = torch.stack([stream.memories[MEANS], moved])
    own = gap_of(points, both[:1], stream.seed)
    gap = stream.gap + max(SHARE, 1 / stream.steps) * (own - stream.gap)
    fresh = dataclasses.replace(stream, memories=both, first=first, second=second, gap=gap)
    if not (bool(both.isfinite().all()) and math.isfinite(gap)):
        raise FloatingPointError(
            "the memories became NaN or infinite: X is of another magnitude than the batches before"
        )
    return fresh, float(loss)


def _plan(estimator: Any, stream: Stream, points: Points) -> Plan:
    beta = SHARPNESS / stream.gap
    if estimator.beta is not None:
        beta = rescaled(float(estimator.beta), 2 * stream.frame.unit)
    elif estimator.recipe == "paper":
        beta = published_beta(stream.frame, RECIPES["paper"].betas[0])
    plan = plan_of(estimator, stream.frame, points, [beta], 1, stream.seed)
    if estimator.recipe == "paper":
        return plan
    size = math.sqrt(float(stream.square.mean())) or 1.0
    rate = resolved(estimator, "learning_rate") * size
    rates = rates_of(stream.square.sqrt(), size).to(points.z.dtype)
    return dataclasses.replace(plan, learning_rate=rate, length=size, rates=rates)


def _revived(stream: Stream, points: Points) -> tuple[Stream, Tensor]:
    """(the stream after memories that no batch has used for long have jumped to rows drawn by
    their squared distance, labels [2, N]).
    """
    labels = points.assign(stream.memories)
    idle = stream.idle + 1
    for line in (MEANS, TRAINED):
        idle[line, labels[line].unique()] = 0
    dead = (idle >= PATIENCE).nonzero().tolist()
    if not dead:
        return dataclasses.replace(stream, idle=idle), labels
    fresh = dataclasses.replace(
        stream, memories=stream.memories.clone(), won=stream.won.clone(),
        first=stream.first.clone(), second=stream.second.clone(), idle=idle,
    )  # fmt: skip
    random = np.random.default_rng([stream.seed, stream.steps])
    for line, k in dead:
        row = points.far_row(stream.memories[line], labels[line], random.random())
        idle[line, k] = 0
        if row is None:
            continue
        fresh.memories[line, k] = row
        if line == MEANS:
            fresh.won[k] = 0.0
        else:
            fresh.first[k] = fresh.second[k] = 0.0
    return fresh, points.assign(fresh.memories)
