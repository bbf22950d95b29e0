# SPDX-License-Identifier: Apache-2.0
"""`partial_fit` of ClAM: two sets of memories that batches update, and the choice of one.

Set 0 is the running means of the rows that each memory wins (mini-batch k-means). Set 1 trains by
completion with Adam. As in a fit, set 1 is the answer where its silhouette is better and its
inertia inside the guard. Both are measured on a sample of all rows so far, and both are replaced
where a search on that sample gives clearly better memories: the order of the rows does not matter.
The frame follows the sample too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.columns import TINY, frame_of, near
from ..common.frame import Frame
from ..common.rows import Rows
from ..common.scale import scale_number
from ..kmeans.seeding import plus_plus
from .completion import (
    Batch,
    CompletionPlan,
    draw_masks,
    gradient_in_rates,
    mean_mask_count,
    move_within,
)
from .points import Points, points_of
from .refresh import refresh_frame, size_in
from .rounds import START_ITERATIONS
from .sample import StreamSample
from .search import plan_of, rates_of
from .selection import Silhouettes
from .settings import ClAMSettings
from .start import gap_of, sample_index, starts

# The sample is searched again where its inertia, or the weight of all rows so far, is this many
# times that of the last search. The frame is compared with the sample where the number of rows is.
GROWTH = 1.05
# A search replaces the memories where its inertia is below this share of the memories' inertia.
IMPROVEMENT = 0.97
# Fresh starts of a search, beside the start from set 0.
STARTS = 3
# Rows of the sample that the silhouettes are computed from.
SILHOUETTE_ROWS = 1024
# Beta of the training in units of 1/gap: at a smaller one the memories move away from their rows.
SHARPNESS = 10.0
# Steps after which the learning rate is half of the first one; Adam's numbers.
HALF_RATE_STEPS = 10.0
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
# The sets of memories.
MEANS, TRAINED = 0, 1
MAGNITUDE = "the memories became NaN or infinite: X is of another magnitude than the batches before"
# on_batch(loss) -> whether to stop
OnBatch = Callable[[float], bool]


@dataclass
class StreamState:
    """The state between two batches; lengths in units of the frame."""

    seed: int
    frame: Frame  # centered on the mean of all rows so far
    memories: Tensor  # [2, K, D] both sets
    observed: Tensor  # [D] weight of the observed entries so far
    won: Tensor  # [K, D] weight of the entries behind the running means
    sample: StreamSample
    gap: float
    first: Tensor  # [K, D] Adam's running means of gradients and of their squares
    second: Tensor
    level: float = math.inf  # mean squared distance of set 0 after the last search
    searched: float = 0.0  # weight of the observed entries at the last search
    steps: int = 0
    chosen: int = MEANS  # the set that is the answer
    framed: int = 0  # rows so far when the frame was last compared with the sample
    used: int = 0  # memories of the chosen set with a row in the sample

    def answer(self) -> Tensor:
        """The memories [K, D] of the chosen set."""
        return self.memories[self.chosen]


def begin(
    settings: ClAMSettings, rows: Rows, weight: Tensor | None, X: Any, names: Any = None
) -> StreamState:
    """Memories from the first batch: the best of several starts after Lloyd's iterations."""
    frame = frame_of(rows, weight, names, settings.standardize)
    points = points_of(rows.states(frame), weight, settings.precision)
    seed = settings.draw_seed()
    first = starts(settings, points, frame, X, seed)
    memories, labels = points.lloyd(first, START_ITERATIONS)
    means, _ = points.means(labels, memories)
    best = memories[int(points.inertia(labels, means).argmin())]
    won = torch.zeros_like(best, dtype=torch.float64)
    stream = _new_stream(seed, frame, best, won, gap_of(points, best[None], seed))
    return dataclasses.replace(stream, framed=len(points))


def resume(seed: int, memories: Tensor, frame: Frame, won: Tensor, gap: float) -> StreamState:
    """A stream that continues from fitted memories; `won` [K, D] is the weight of the entries that
    each memory won.
    """
    return _new_stream(seed, frame.on(memories.device), memories, won, gap)


def _new_stream(seed: int, frame: Frame, memories: Tensor, won: Tensor, gap: float) -> StreamState:
    zeros = torch.zeros_like(memories)
    both = torch.stack([memories, memories])
    sample = StreamSample.empty(memories, won.amax(1), frame.deviation)
    return StreamState(seed, frame, both, won.sum(0), won, sample, gap, zeros, zeros.clone())


def advance(
    settings: ClAMSettings,
    stream: StreamState,
    rows: Rows,
    weight: Tensor | None,
    on_batch: OnBatch,
) -> tuple[StreamState, list[float]]:
    """The stream after one more call, and the loss of each of its batches, in units of the data."""
    losses = []
    size = settings.batch_size
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        index = torch.arange(start, stop, dtype=torch.int64, device="cpu")
        own = None if weight is None else weight[index.to(weight.device)]
        stream, points = _recenter(settings, stream, rows.take(index), own)
        if len(points):
            stream = _update_means(stream, points)
            sample = stream.sample.points(settings.precision)
            stream = _search_sample(stream, sample)
            stream, loss = _train(settings, stream, sample)
            losses.append(scale_number(loss, 2 * stream.frame.unit))
            if on_batch(losses[-1]):
                break
    return _choose_set(settings, stream), losses


def _recenter(
    settings: ClAMSettings, stream: StreamState, x: Tensor, weight: Tensor | None
) -> tuple[StreamState, Points]:
    """(the stream in a frame with the mean and the deviations of all rows so far, the batch in that
    frame).
    """
    frame, dtype = stream.frame, stream.memories.dtype
    z = frame.states(x, torch.float64)
    is_near = near(z, frame)
    weights = torch.ones(len(z), 1, dtype=torch.float64, device=z.device)
    weights = weights if weight is None else weight[:, None]
    total = stream.observed + (is_near * weights).sum(0)
    shift = (torch.where(is_near, z, 0.0) * weights).sum(0) / total.clamp(min=TINY)
    z = z - shift
    points = points_of(z.to(dtype), weight, settings.precision)
    if not bool(points.z.square().sum().isfinite()):
        raise FloatingPointError(MAGNITUDE)
    stream = dataclasses.replace(
        stream,
        frame=frame.move_to(shift).include(x if weight is None else x[weight > 0]),
        memories=(stream.memories.double() - shift).to(dtype),
        sample=stream.sample.move(shift),
        observed=total,
    )
    count = stream.sample.count + len(points)
    if count <= GROWTH * stream.framed:
        return stream, points
    before = stream.frame
    frame = refresh_frame(settings.standardize, before, stream.sample, z, weight)
    stream = dataclasses.replace(stream, framed=count)
    if frame is before:
        return stream, points
    z = (z * (before.width / frame.width)).to(dtype)
    return _rescale(settings, stream, frame), points_of(z, weight, settings.precision)


def _rescale(settings: ClAMSettings, stream: StreamState, frame: Frame) -> StreamState:
    """The stream in a frame with other widths; the next step searches there."""
    factor = stream.frame.width / frame.width
    # Adam's gradients are divided by the rates of the columns; the published ones are absolute
    size = size_in(frame, factor)
    if settings.is_published:
        slope: Any = factor
    else:
        slope = size_in(frame) / size if size else 1.0
    return dataclasses.replace(
        stream,
        frame=frame,
        memories=(stream.memories.double() * factor).to(stream.memories.dtype),
        sample=stream.sample.stretch(factor),
        first=(stream.first.double() * slope).to(stream.first.dtype),
        second=(stream.second.double() * slope * slope).to(stream.second.dtype),
        level=math.inf,
        searched=0.0,
    )


def _update_means(stream: StreamState, points: Points) -> StreamState:
    """Update set 0 and the sample with a batch.

    c_k <- c_k + (sum of the rows of label k - n_k c_k) / N_k, with n_k the weight of these rows and
    N_k that of all rows which the memory won so far.
    """
    k, steps = stream.memories.shape[1], stream.steps + 1
    sums, counts, _ = points.sums(points.assign(stream.memories[:1]), k)
    won = stream.won + counts[0]
    means = stream.memories[MEANS].double()
    means = means + (sums[0] - counts[0] * means) / won.clamp(min=TINY)
    memories = torch.stack([means.to(stream.memories.dtype), stream.memories[TRAINED]])
    random = np.random.default_rng([stream.seed, steps])
    sample = stream.sample.with_rows(points, k, random)
    return dataclasses.replace(stream, memories=memories, won=won, sample=sample, steps=steps)


def _search_sample(stream: StreamState, sample: Points) -> StreamState:
    """Search the sample again where that is due; both sets become the result where it is clearly
    better.
    """
    inertia_now = _mean_inertia(sample, stream.memories[:1])[0]
    total = float(stream.observed.sum())
    if inertia_now <= GROWTH * stream.level and total <= GROWTH * stream.searched:
        return stream
    k = stream.memories.shape[1]
    random = np.random.RandomState([stream.seed, stream.steps])
    fresh = [plus_plus(sample.rows, sample.weight, k, random) for _ in range(STARTS)]
    first = torch.stack([stream.memories[MEANS], *fresh])
    memories, labels = sample.lloyd(first, START_ITERATIONS)
    inertia = _mean_inertia(sample, memories)
    best = inertia.index(min(inertia))
    if inertia[best] >= IMPROVEMENT * inertia_now:
        return dataclasses.replace(stream, level=inertia_now, searched=total)
    counts = sample.sums(labels[best : best + 1], k)[1][0]
    zeros = torch.zeros_like(stream.first)
    return dataclasses.replace(
        stream,
        memories=torch.stack([memories[best], memories[best]]),
        first=zeros,
        second=zeros.clone(),
        won=counts * stream.sample.rows_per_row,
        level=inertia[best],
        searched=total,
    )


def _mean_inertia(points: Points, memories: Tensor) -> list[float]:
    """Mean squared distance of the rows to their nearest memory, for each set [R, K, D]."""
    labels = points.assign(memories)
    return (points.inertia(labels, memories) / points.total).tolist()


def _choose_set(settings: ClAMSettings, stream: StreamState) -> StreamState:
    """Choose the set that is the answer, by the figures of both on the sample."""
    sample = stream.sample.points(settings.precision)
    k = stream.memories.shape[1]
    chosen = TRAINED if settings.is_published or settings.select == "loss" else MEANS
    if chosen == MEANS and settings.select == "silhouette":
        inertia = _mean_inertia(sample, stream.memories)
        guard = settings.inertia_guard or math.inf
        if inertia[TRAINED] <= guard * inertia[MEANS] and 1 < k < len(sample):
            index = sample_index(len(sample), SILHOUETTE_ROWS, stream.seed, sample.weight)
            part = sample if index is None else sample.part(index)
            quality = Silhouettes(part, stream.seed)(part.assign(stream.memories), k).tolist()
            chosen = TRAINED if quality[TRAINED] > quality[MEANS] else MEANS
    used = len(sample.assign(stream.memories[chosen, None]).unique())
    return dataclasses.replace(stream, chosen=chosen, used=used)


def _train(
    settings: ClAMSettings, stream: StreamState, sample: Points
) -> tuple[StreamState, float]:
    """(the stream after one step of Adam of set 1 on rows of the sample, the loss)."""
    random = np.random.default_rng([stream.seed, stream.steps, 1])
    stream = _move_unused(stream, sample, random)
    gap = gap_of(sample, stream.memories[:1], stream.seed)
    stream = dataclasses.replace(stream, gap=gap)
    plan = _plan(settings, stream, sample)
    size = min(len(sample), settings.batch_size)
    index = torch.from_numpy(np.sort(random.choice(len(sample), size, replace=False)))
    points = sample.part(index.to(sample.z.device))
    generator = torch.Generator().manual_seed(stream.seed + stream.steps)
    n, d = points.z.shape
    observed = None if points.observed is None else points.observed.cpu()
    masks = draw_masks(n, d, plan.mask_ratio, generator, observed).to(points.z.device)
    memories = stream.memories[TRAINED].clone().requires_grad_()
    batch = Batch(points.z, masks, points.observed, points.weight)
    loss = batch.backward(memories[None], plan, mean_mask_count(points, plan.mask_ratio))
    assert memories.grad is not None
    slope = gradient_in_rates(memories.grad, plan)
    first = BETA1 * stream.first + (1 - BETA1) * slope
    second = BETA2 * stream.second + (1 - BETA2) * slope.square()
    rate = plan.learning_rate / (1 + stream.steps / HALF_RATE_STEPS)
    root = (second / (1 - BETA2**stream.steps)).sqrt() + EPSILON * plan.length
    move = -rate * (first / (1 - BETA1**stream.steps)) / root
    trained = move_within(memories.detach(), move, plan)
    both = torch.stack([stream.memories[MEANS], trained])
    if not (bool(both.isfinite().all()) and math.isfinite(gap)):
        raise FloatingPointError(MAGNITUDE)
    return dataclasses.replace(stream, memories=both, first=first, second=second), float(loss)


def _move_unused(stream: StreamState, sample: Points, random: np.random.Generator) -> StreamState:
    """The stream after memories of set 1 without a row have jumped to rows that are drawn by their
    squared distance.
    """
    memories = stream.memories[TRAINED]
    labels = sample.assign(memories[None])[0]
    unused = (torch.bincount(labels, minlength=len(memories)) == 0).nonzero()[:, 0].tolist()
    if not unused:
        return stream
    memories, first, second = memories.clone(), stream.first.clone(), stream.second.clone()
    for k in unused:
        row = sample.far_row(memories, labels, random.random())
        if row is not None:
            memories[k], first[k], second[k] = row, 0.0, 0.0
    both = torch.stack([stream.memories[MEANS], memories])
    return dataclasses.replace(stream, memories=both, first=first, second=second)


def _plan(settings: ClAMSettings, stream: StreamState, points: Points) -> CompletionPlan:
    """How to train set 1; the deviations of the columns are those of the points."""
    if settings.is_published or settings.beta is not None:
        beta = settings.betas(stream.frame)[0]
    else:
        beta = SHARPNESS / stream.gap
    plan = plan_of(settings, stream.frame, points, [beta], 1, stream.seed)
    if settings.is_published:
        return plan
    square = _mean_squares(stream.frame, points)
    size = math.sqrt(float(square.mean())) or 1.0
    rate = settings.learning_rate * size
    rates = rates_of(square.sqrt(), size).to(points.z.dtype)
    return dataclasses.replace(plan, learning_rate=rate, length=size, rates=rates)


def _mean_squares(frame: Frame, points: Points) -> Tensor:
    """Weighted mean [D] of the squares of the entries that are observed and not far."""
    z = points.z.double()
    z = z if points.observed is None else z.masked_fill(~points.observed, torch.nan)
    weights = near(z, frame) * points.weights[:, None]
    return (z.nan_to_num(0.0).square() * weights).sum(0) / weights.sum(0).clamp(min=TINY)
