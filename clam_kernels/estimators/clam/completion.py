# SPDX-License-Identifier: Apache-2.0
"""Training of the memories by completing masked patterns, all replicas in one op call.

All replicas get the same batches and masks, so that the result of one does not depend on R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.am import am_recursion
from ..training.optimisers import Adam
from .points import Points
from .wide import FEATURES, squared_errors

# The published schedule: the learning rate is multiplied by SHRINK when the mean loss of WINDOW
# epochs fell by less than GAIN for PATIENCE epochs in a row; training ends below LOWEST_RATE.
WINDOW, GAIN, PATIENCE, SHRINK, LOWEST_RATE = 10, 1e-3, 5, 0.8, 1e-6


@dataclass(frozen=True)
class CompletionPlan:
    """How to train the memories; lengths in units of the states."""

    beta: Tensor  # [R, 1]
    steps: int
    step: float
    mask_ratio: float
    clamp: bool  # whether the recursion updates masked entries alone
    learning_rate: float
    batch_size: int
    epochs: int
    length: float  # the thresholds below are multiples of it
    is_published: bool  # the published loss, schedule, shared masks and choice of an epoch
    precision: str | None
    seed: int
    rates: Tensor | None = None  # [D] rates of the columns, as multiples of the learning rate
    low: Tensor | None = None  # [D] bounds of the memories
    high: Tensor | None = None


@dataclass(frozen=True)
class TrainingResult:
    """The memories of each replica at three times, and its losses."""

    last: Tensor  # [R, K, D]
    best: Tensor  # after the epoch of least loss; NaN where every loss is NaN
    middle: Tensor  # after half of the epochs
    losses: Tensor  # [epochs, R]


def draw_masks(
    rows: int,
    features: int,
    ratio: float,
    generator: torch.Generator,
    observed: Tensor | None = None,
) -> Tensor:
    """Masked entries [rows, features]: each observed entry with probability `ratio`, at least one
    of a row, never all.

    The only observed entry of a row is not masked: no entry would remain to complete it.
    """
    device = generator.device
    uniform: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}
    masks = torch.rand(rows, features, **uniform) < ratio
    if observed is None:
        pick = torch.randint(features, (rows, 1), generator=generator, device=device)
        observed = torch.ones(rows, features, dtype=torch.bool, device=device)
    else:
        draws = torch.rand(rows, features, **uniform).masked_fill_(~observed, -1.0)
        pick = draws.argmax(1, keepdim=True)
    masks &= observed
    one = (torch.arange(features, dtype=torch.int64, device=device) == pick) & observed
    masks |= one & ~masks.any(1, keepdim=True)
    return masks & ~(one & (masks == observed).all(1, keepdim=True))


def mean_mask_count(points: Points, ratio: float) -> float:
    """Weighted mean over the rows of the number of entries that `draw_masks` masks; where it masks
    none, of the number of observed entries.

    Of m > 1 observed entries, ratio m + (1 - ratio)^m - ratio^m are masked on average.
    """
    n, d = points.z.shape
    observed = torch.full((n,), float(d), dtype=torch.float64, device=points.z.device)
    observed = observed if points.observed is None else points.observed.sum(1).double()
    masked = ratio * observed + (1 - ratio) ** observed - ratio**observed
    masked = torch.where(observed > 1, masked, 0.0)
    return float(masked @ points.weights / n) or float(observed @ points.weights / n)


@dataclass(frozen=True)
class Batch:
    """Some rows with their masks."""

    x: Tensor  # [B, D], 0 where not observed
    masks: Tensor  # [B, D] observed entries that the recursion does not get; the loss counts them
    observed: Tensor | None  # [B, D]; None where all entries are
    weight: Tensor | None  # [B]

    def backward(self, memories: Tensor, plan: CompletionPlan, expected: float) -> Tensor:
        """Loss of each replica [R], detached; its gradient is added to that of the memories.

        loss = sum_n w_n sum_j m_nj (y_nj - x_nj)^2 / (B M), with y the completed rows, m the masks
        and M the number of masked entries expected of a row. The published loss divides by B D.
        Where nothing is masked (rows of a single entry), all observed entries evolve and count.
        """
        has_masks = bool(self.masks.any())
        observed = torch.ones_like(self.masks) if self.observed is None else self.observed
        counted = self.masks if has_masks else observed
        if _is_wide(self.x, plan):
            return self._backward_wide(memories, plan, counted, expected)
        unknown = self.masks if self.observed is None else self.masks | ~self.observed
        completed = am_recursion(
            self.x.masked_fill(self.masks, 0.0),
            memories,
            plan.beta,
            plan.steps,
            step=plan.step,
            update_mask=unknown if plan.clamp and has_masks else None,
            precision=plan.precision,
        )
        count = self.x.numel() if plan.is_published else expected * len(self.x)
        error = (completed.detach() - self.x).mul_(counted)
        rows, slope = error.square().sum(2), error.mul_(2 / count)
        if self.weight is not None:
            rows = rows * self.weight.to(rows.dtype)
            slope = slope.mul_(self.weight.to(slope.dtype)[:, None])
        # a product, as `completed.backward(slope)` imports sympy at its first call
        torch.dot(completed.flatten(), slope.flatten()).backward()
        return rows.sum(1) / count

    def _backward_wide(
        self, memories: Tensor, plan: CompletionPlan, counted: Tensor, expected: float
    ) -> Tensor:
        """The same for one step of size 1 and many features."""
        count = expected * len(self.x)
        weight = self.x.new_ones(len(self.x)) if self.weight is None else self.weight.to(self.x)
        rows, slope = squared_errors(
            self.x, self.masks, counted, memories.detach(), plan.beta, weight / count
        )
        torch.dot(memories.flatten(), slope.flatten()).backward()
        return (rows * weight).sum(1) / count


def _is_wide(x: Tensor, plan: CompletionPlan) -> bool:
    is_one_step = plan.steps == 1 and plan.step == 1 and not plan.is_published
    return is_one_step and x.is_cpu and x.shape[1] >= FEATURES


def gradient_in_rates(slope: Tensor, plan: CompletionPlan) -> Tensor:
    """The gradient divided by the rates of the columns; 0 in a column of rate 0, which does not
    move.
    """
    if plan.rates is None:
        return slope
    return torch.where(plan.rates > 0, slope / plan.rates, 0.0)


def move_within(memories: Tensor, move: Tensor, plan: CompletionPlan) -> Tensor:
    """The memories after a move times the rates of the columns, clamped to the columns' ranges."""
    result = memories + (move if plan.rates is None else move * plan.rates)
    return result if plan.low is None else result.clamp(plan.low, plan.high)


class _Plateau:
    """The published learning-rate schedule of one replica."""

    def __init__(self, gain: float) -> None:
        self.losses: list[float] = []
        self.gain = gain
        self.flat = 0

    def shrinks(self, loss: float) -> bool:
        """Add the loss of an epoch; return whether the learning rate falls after it."""
        self.losses.append(loss)
        if len(self.losses) <= WINDOW:
            return False
        now = sum(self.losses[-WINDOW:])
        before = sum(self.losses[-WINDOW - 1 : -1])
        self.flat = self.flat + 1 if (before - now) / WINDOW < self.gain else 0
        if self.flat < PATIENCE:
            return False
        self.flat = 0
        return True


class _ReplicaOptimiser:
    """Adam for all replicas: one cosine schedule, or the published plateau of each replica."""

    def __init__(self, start: Tensor, plan: CompletionPlan) -> None:
        split = list(start) if plan.is_published else [start]
        self.parts = [part.clone().requires_grad_() for part in split]
        self.adam = Adam(self.parts, plan.learning_rate, eps=1e-8 * plan.length)
        self.plan = plan
        gain = GAIN * plan.length**2
        self.plateaus = [_Plateau(gain) for _ in self.parts]

    def memories(self) -> Tensor:
        return torch.stack(self.parts) if self.plan.is_published else self.parts[0]

    def step(self) -> None:
        """One step with the gradients. A column moves at its own rate and stays in its range."""
        plan = self.plan
        before = [part.detach().clone() for part in self.parts]
        with torch.no_grad():
            for part in self.parts:
                assert part.grad is not None
                part.grad.copy_(gradient_in_rates(part.grad, plan))
            self.adam.step()
            for part, old in zip(self.parts, before, strict=True):
                part.copy_(move_within(old, part - old, plan))

    def finish_epoch(self, epoch: int, loss: Tensor) -> bool:
        """Set the next learning rates; return whether training goes on."""
        if not self.plan.is_published:
            share = 0.5 * (1 + math.cos(math.pi * (epoch + 1) / self.plan.epochs))
            self.adam.param_groups[0]["lr"] = self.plan.learning_rate * share
            return True
        for group, plateau, value in zip(
            self.adam.param_groups, self.plateaus, loss.tolist(), strict=True
        ):
            if plateau.shrinks(value):
                group["lr"] *= SHRINK
        lowest = LOWEST_RATE * self.plan.length
        return any(group["lr"] >= lowest for group in self.adam.param_groups)


class _MaskedBatches:
    """The batches of each epoch, the same for all replicas."""

    def __init__(self, points: Points, plan: CompletionPlan, generator: torch.Generator) -> None:
        self.points, self.plan, self.generator = points, plan, generator
        self.count = max(1, round(len(points) / plan.batch_size))
        self.duplicates: Tensor | None = None  # [N] the number of each row among different rows
        if self.count == 1 and not plan.is_published:
            rows = points.z
            if points.observed is not None:
                rows = torch.cat([rows, points.observed.to(rows.dtype)], 1)
            self.duplicates = rows.unique(dim=0, return_inverse=True)[1].cpu()

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, with new masks."""
        points, device = self.points, self.points.z.device
        if self.duplicates is not None:
            masks = self._masks_of_duplicates().to(device)
            yield Batch(points.z, masks, points.observed, points.weight)
            return
        is_published = self.plan.is_published
        order = torch.randperm(len(points), generator=self.generator, device="cpu")
        parts = order.split(self.plan.batch_size) if is_published else order.chunk(self.count)
        for part in parts:
            index = part.to(device)
            observed = None if points.observed is None else points.observed[index]
            weight = None if points.weight is None else points.weight[index]
            masks = self._masks(len(part), is_published and number % 3 == 2, observed)
            yield Batch(points.z[index], masks.to(device), observed, weight)

    def _masks(self, rows: int, is_shared: bool, observed: Tensor | None) -> Tensor:
        """Masks of some rows; one mask for all rows where `is_shared`."""
        d, ratio = self.points.z.shape[1], self.plan.mask_ratio
        observed = None if observed is None else observed.cpu()
        if is_shared:
            masks = draw_masks(1, d, ratio, self.generator).expand(rows, d)
            return masks if observed is None else masks & observed
        return draw_masks(rows, d, ratio, self.generator, observed)

    def _masks_of_duplicates(self) -> Tensor:
        """Masks that are equal for equal rows, so that a weight is a repetition."""
        assert self.duplicates is not None
        count = int(self.duplicates.max()) + 1
        observed = None
        if self.points.observed is not None:
            size = count, self.points.z.shape[1]
            observed = torch.empty(size, dtype=torch.bool, device="cpu")
            observed[self.duplicates] = self.points.observed.cpu()
        return self._masks(count, False, observed)[self.duplicates]


def train(
    points: Points,
    start: Tensor,
    plan: CompletionPlan,
    after_epoch: Callable[[Tensor], bool] | None = None,
) -> TrainingResult:
    """Train the memories `start` [R, K, D] on the points. `after_epoch(losses)` is called after
    every epoch; training ends where it returns true.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    batches = _MaskedBatches(points, plan, generator)
    optimiser = _ReplicaOptimiser(start, plan)
    expected = mean_mask_count(points, plan.mask_ratio)
    best, middle = torch.full_like(start, torch.nan), start.clone()
    lowest = torch.full((len(start),), math.inf, dtype=torch.float64, device="cpu")
    curve = []
    for epoch in range(plan.epochs):
        loss = _epoch(batches, optimiser, plan, epoch, expected)
        curve.append(loss)
        better = loss < lowest
        lowest = torch.where(better, loss, lowest)
        now = optimiser.memories().detach()
        best = torch.where(better.to(best.device)[:, None, None], now, best)
        if epoch + 1 == (plan.epochs + 1) // 2:
            middle = now.clone()
        stop = bool(after_epoch and after_epoch(loss))
        if not optimiser.finish_epoch(epoch, loss) or stop:
            break
    return TrainingResult(optimiser.memories().detach(), best, middle, torch.stack(curve))


def _epoch(
    batches: _MaskedBatches,
    optimiser: _ReplicaOptimiser,
    plan: CompletionPlan,
    epoch: int,
    expected: float,
) -> Tensor:
    """One pass over the rows in random batches; the mean loss [R] of each replica."""
    rows, device = len(batches.points), batches.points.z.device
    total = torch.zeros(len(plan.beta), dtype=torch.float64, device=device)
    for batch in batches.epoch(epoch):
        optimiser.adam.zero_grad()
        loss = batch.backward(optimiser.memories(), plan, expected)
        optimiser.step()
        total += loss.double() * (len(batch.x) / rows)
    return total.cpu()
