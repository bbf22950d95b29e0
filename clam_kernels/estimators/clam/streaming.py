# SPDX-License-Identifier: Apache-2.0
"""`partial_fit` of ClAM: two lines of memories on batches as they come, and the choice of one.

Line 0 keeps running means of the rows that each memory wins (mini-batch k-means), line 1 trains by
completion with Adam; as in a fit, line 1 is the answer where its silhouette is better and its
inertia inside the guard. Both are measured on a sample of all rows so far, and both move where a
search on that sample finds memories that are clearly better: the order of the rows does not matter.
The frame, too, follows the sample.
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

from ..common.frame import Frame
from ..common.rows import Rows
from ..common.scale import rescaled
from ..kmeans.seeding import plus_plus
from .columns import frame_of, near
from .completion import Batch, Plan, draw_masks, expected_masked, in_rates, within
from .points import Points, points_of
from .refresh import refreshed, size_in
from .rounds import START_ITERATIONS
from .sample import Sample
from .search import RECIPES, plan_of, published_beta, rates_of, resolved
from .selection import Silhouettes
from .start import gap_of, sample_index, starts

# The sample is searched again where its inertia, or the weight of all rows so far, has grown by
# this factor; the memories move where that makes the inertia less than this share of what it was.
# The frame is compared with the sample where the number of rows has grown by that factor.
GROWN, BETTER = 1.05, 0.97
# Fresh starts of a search, beside that from line 0.
STARTS = 3
# Rows of the sample that the silhouettes are computed from.
SILHOUETTE_ROWS = 1024
# Beta of the training in units of 1/gap: with a softer one the memories drift apart. Steps after
# which its rate has halved; Adam's numbers.
SHARPNESS, HALFWAY = 10.0, 10.0
FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8
MEANS, TRAINED = 0, 1
MAGNITUDE = "the memories became NaN or infinite: X is of another magnitude than the batches before"
_TINY = torch.finfo(torch.float64).tiny
# on_batch(loss) -> whether to stop
OnBatch = Callable[[float], bool]


@dataclass
class Stream:
    """What is kept from batch to batch; lengths in units of the frame."""

    seed: int
    frame: Frame  # centred on the mean of all rows so far
    memories: Tensor  # [2, K, D]
    held: Tensor  # [D] weight of the observed entries so far
    won: Tensor  # [K, D] weight of the entries behind the running means
    sample: Sample
    gap: float
    first: Tensor  # [K, D] Adam's running means of gradients and of their squares
    second: Tensor
    level: float = math.inf  # mean squared distance of line 0 after the last search
    searched: float = 0.0  # weight of the observed entries at the last search
    steps: int = 0
    line: int = MEANS  # the line that counts
    framed: int = 0  # rows when the frame was last compared with the sample
    used: int = 0  # memories of that line with a row in the sample

    def answer(self) -> Tensor:
        """The memories [K, D] of the line that counts."""
        return self.memories[self.line]


def begin(estimator: Any, rows: Rows, weight: Tensor | None, X: Any) -> Stream:
    """Memories from the first batch: the best of several starts after Lloyd's iterations."""
    names = getattr(estimator, "feature_names_in_", None)
    frame = frame_of(rows, weight, names, estimator.standardize)
    points = points_of(rows.states(frame), weight, estimator.precision)
    init, count = RECIPES[estimator.recipe].init, resolved(estimator, "n_init")
    seed = _seed(estimator)
    found, labels = points.lloyd(
        starts(estimator, init, points, frame, X, seed, count), START_ITERATIONS
    )
    means, _ = points.means(labels, found)
    best = found[int(points.inertia(labels, means).argmin())]
    nothing = torch.zeros_like(best, dtype=torch.float64)
    stream = _at(seed, frame, best, nothing, gap_of(points, best[None], seed))
    return dataclasses.replace(stream, framed=len(points))


def resume(estimator: Any, memories: Tensor, frame: Frame, gap: float) -> Stream:
    """From a fitted estimator."""
    won = torch.from_numpy(np.array(estimator._held)).to(memories.device)
    return _at(_seed(estimator), frame.on(memories.device), memories, won, gap)


def _seed(estimator: Any) -> int:
    return int(check_random_state(estimator.random_state).randint(np.iinfo(np.int32).max))


def _at(seed: int, frame: Frame, memories: Tensor, won: Tensor, gap: float) -> Stream:
    still = torch.zeros_like(memories)
    both = torch.stack([memories, memories])
    sample = Sample.empty(memories, won.amax(1), frame.deviation)
    return Stream(seed, frame, both, won.sum(0), won, sample, gap, still, still.clone())


def advance(
    estimator: Any, stream: Stream, rows: Rows, weight: Tensor | None, on_batch: OnBatch
) -> tuple[Stream, list[float]]:
    """The stream after one more call, and the loss of each of its batches, in units of the data."""
    losses = []
    size = resolved(estimator, "batch_size")
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        index = torch.arange(start, stop, dtype=torch.int64, device="cpu")
        own = None if weight is None else weight[index.to(weight.device)]
        stream, points = _centred(estimator, stream, rows.take(index), own)
        if len(points):
            stream = _averaged(stream, points)
            whole = stream.sample.points(estimator.precision)
            stream = _searched(stream, whole)
            stream, loss = _trained(estimator, stream, whole)
            losses.append(rescaled(loss, 2 * stream.frame.unit))
            if on_batch(losses[-1]):
                break
    return _judged(estimator, stream), losses


def _centred(
    estimator: Any, stream: Stream, x: Tensor, weight: Tensor | None
) -> tuple[Stream, Points]:
    """The frame moved to the mean of all rows so far, and with their deviations; the batch and the
    memories in it.
    """
    frame, dtype = stream.frame, stream.memories.dtype
    z = frame.states(x, torch.float64)
    seen = near(z, frame)
    share = torch.ones(len(z), 1, dtype=torch.float64, device=z.device)
    share = share if weight is None else weight[:, None]
    total = stream.held + (seen * share).sum(0)
    by = (torch.where(seen, z, 0.0) * share).sum(0) / total.clamp(min=_TINY)
    z = z - by
    points = points_of(z.to(dtype), weight, estimator.precision)
    if not bool(points.z.square().sum().isfinite()):
        raise FloatingPointError(MAGNITUDE)
    fresh = dataclasses.replace(
        stream,
        frame=frame.moved(by).widened(x if weight is None else x[weight > 0]),
        memories=(stream.memories.double() - by).to(dtype),
        sample=stream.sample.shifted(by),
        held=total,
    )
    if fresh.sample.count + len(points) <= GROWN * fresh.framed:
        return fresh, points
    frame = refreshed(estimator.standardize, fresh.frame, fresh.sample, z, weight)
    fresh = dataclasses.replace(fresh, framed=fresh.sample.count + len(points))
    if frame is fresh.frame:
        return fresh, points
    z = (z * (fresh.frame.width / frame.width)).to(dtype)
    return _stretched(estimator, fresh, frame), points_of(z, weight, estimator.precision)


def _stretched(estimator: Any, stream: Stream, frame: Frame) -> Stream:
    """The stream in a frame with other widths; a search is due there."""
    by = stream.frame.width / frame.width
    # Adam's gradients are divided by the rates of the columns, or they are absolute
    size = size_in(frame, by)
    slope = by if estimator.recipe == "paper" else size_in(frame) / size if size else 1.0
    return dataclasses.replace(
        stream,
        frame=frame,
        memories=(stream.memories.double() * by).to(stream.memories.dtype),
        sample=stream.sample.stretched(by),
        first=(stream.first.double() * slope).to(stream.first.dtype),
        second=(stream.second.double() * slope * slope).to(stream.second.dtype),
        level=math.inf,
        searched=0.0,
    )


def _averaged(stream: Stream, points: Points) -> Stream:
    """Line 0 moved to the means of the rows that its memories win; the sample with the batch."""
    k, steps = stream.memories.shape[1], stream.steps + 1
    sums, counts, _ = points.sums(points.assign(stream.memories[:1]), k)
    won = stream.won + counts[0]
    means = stream.memories[MEANS].double()
    means = means + (sums[0] - counts[0] * means) / won.clamp(min=_TINY)
    memories = torch.stack([means.to(stream.memories.dtype), stream.memories[TRAINED]])
    random = np.random.default_rng([stream.seed, steps])
    sample = stream.sample.with_rows(points, k, random)
    return dataclasses.replace(stream, memories=memories, won=won, sample=sample, steps=steps)


def _searched(stream: Stream, whole: Points) -> Stream:
    """Both lines at the memories of a new search on the sample, where one is due and those are
    clearly better.
    """
    now = _inertia(whole, stream.memories[:1])[0]
    total = float(stream.held.sum())
    if now <= GROWN * stream.level and total <= GROWN * stream.searched:
        return stream
    k = stream.memories.shape[1]
    random = np.random.RandomState([stream.seed, stream.steps])
    fresh = [plus_plus(whole.rows, whole.weight, k, random) for _ in range(STARTS)]
    found, labels = whole.lloyd(torch.stack([stream.memories[MEANS], *fresh]), START_ITERATIONS)
    inertia = _inertia(whole, found)
    best = inertia.index(min(inertia))
    if inertia[best] >= BETTER * now:
        return dataclasses.replace(stream, level=now, searched=total)
    counts = whole.sums(labels[best : best + 1], k)[1][0]
    still = torch.zeros_like(stream.first)
    return dataclasses.replace(
        stream, memories=torch.stack([found[best], found[best]]), first=still, second=still.clone(),
        won=counts * stream.sample.rows_per_row, level=inertia[best], searched=total,
    )  # fmt: skip


def _inertia(points: Points, memories: Tensor) -> list[float]:
    """Mean squared distance of the rows to their nearest memory, of each line."""
    labels = points.assign(memories)
    return (points.inertia(labels, memories) / points.total).tolist()


def _judged(estimator: Any, stream: Stream) -> Stream:
    """The line that counts, by the figures of both on the sample."""
    whole = stream.sample.points(estimator.precision)
    k = stream.memories.shape[1]
    line = TRAINED if estimator.recipe == "paper" or estimator.select == "loss" else MEANS
    if line == MEANS and estimator.select == "silhouette":
        inertia = _inertia(whole, stream.memories)
        guard = estimator.inertia_guard or math.inf
        if inertia[TRAINED] <= guard * inertia[MEANS] and 1 < k < len(whole):
            index = sample_index(len(whole), SILHOUETTE_ROWS, stream.seed, whole.weight)
            some = whole if index is None else whole.part(index)
            quality = Silhouettes(some, stream.seed)(some.assign(stream.memories), k).tolist()
            line = TRAINED if quality[TRAINED] > quality[MEANS] else MEANS
    used = len(whole.assign(stream.memories[line, None]).unique())
    return dataclasses.replace(stream, line=line, used=used)


def _trained(estimator: Any, stream: Stream, whole: Points) -> tuple[Stream, float]:
    """Line 1 after one step of Adam on rows of the sample; a memory of it without a row jumps."""
    random = np.random.default_rng([stream.seed, stream.steps, 1])
    stream = _revived(stream, whole, random)
    gap = gap_of(whole, stream.memories[:1], stream.seed)
    stream = dataclasses.replace(stream, gap=gap)
    plan = _plan(estimator, stream, whole)
    size = min(len(whole), resolved(estimator, "batch_size"))
    index = torch.from_numpy(np.sort(random.choice(len(whole), size, replace=False)))
    points = whole.part(index.to(whole.z.device))
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
    fresh = dataclasses.replace(stream, memories=both, first=first, second=second)
    if not (bool(both.isfinite().all()) and math.isfinite(gap)):
        raise FloatingPointError(MAGNITUDE)
    return fresh, float(loss)


def _revived(stream: Stream, whole: Points, random: np.random.Generator) -> Stream:
    """The stream after memories of line 1 without a row have jumped to rows drawn by their squared
    distance.
    """
    memories = stream.memories[TRAINED]
    labels = whole.assign(memories[None])[0]
    dead = (torch.bincount(labels, minlength=len(memories)) == 0).nonzero()[:, 0].tolist()
    if not dead:
        return stream
    memories, first, second = memories.clone(), stream.first.clone(), stream.second.clone()
    for k in dead:
        row = whole.far_row(memories, labels, random.random())
        if row is not None:
            memories[k], first[k], second[k] = row, 0.0, 0.0
    both = torch.stack([stream.memories[MEANS], memories])
    return dataclasses.replace(stream, memories=both, first=first, second=second)


def _plan(estimator: Any, stream: Stream, points: Points) -> Plan:
    beta = SHARPNESS / stream.gap
    if estimator.beta is not None:
        beta = rescaled(float(estimator.beta), 2 * stream.frame.unit)
    elif estimator.recipe == "paper":
        beta = published_beta(stream.frame, RECIPES["paper"].betas[0])
    plan = plan_of(estimator, stream.frame, points, [beta], 1, stream.seed)
    if estimator.recipe == "paper":
        return plan
    square = _squares(stream.frame, points)
    size = math.sqrt(float(square.mean())) or 1.0
    rate = resolved(estimator, "learning_rate") * size
    rates = rates_of(square.sqrt(), size).to(points.z.dtype)
    return dataclasses.replace(plan, learning_rate=rate, length=size, rates=rates)


def _squares(frame: Frame, points: Points) -> Tensor:
    """Mean [D] of the squared entries that are observed and not far."""
    z = points.z.double()
    z = z if points.seen is None else z.masked_fill(~points.seen, torch.nan)
    share = near(z, frame) * points.share[:, None]
    return (z.nan_to_num(0.0).square() * share).sum(0) / share.sum(0).clamp(min=_TINY)
