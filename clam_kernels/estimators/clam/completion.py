# SPDX-License-Identifier: Apache-2.0
"""Training of the memories by completing masked patterns, all replicas in one op call.

Replica r of R sees the same batches and masks as the others, so its result does not depend on R.
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

# The authors' schedule: the learning rate falls by SHRINK when the mean loss of WINDOW epochs
# gained less than GAIN for PATIENCE epochs in a row; training ends below LOWEST_RATE.
WINDOW, GAIN, PATIENCE, SHRINK, LOWEST_RATE = 10, 1e-3, 5, 0.8, 1e-6


@dataclass(frozen=True)
class Plan:
    """How to train; lengths in units of the states."""

    beta: Tensor  # [R, 1]
    steps: int
    step: float
    mask_ratio: float
    clamp: bool  # only masked entries evolve
    learning_rate: float
    batch_size: int
    epochs: int
    length: float  # what a length of 1 in the units of the thresholds below is here
    authors: bool  # their loss, schedule, shared masks and choice of the best epoch
    precision: str | None
    seed: int
    rates: Tensor | None = None  # [D] of the columns, as multiples of the learning rate
    low: Tensor | None = None  # [D] where memories may stand
    high: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """What came out, replica by replica."""

    last: Tensor  # [R, K, D]
    best: Tensor  # those after the epoch of least loss; NaN where every loss was
    middle: Tensor  # those after half of the epochs
    losses: Tensor  # [epochs, R]


def draw_masks(
    rows: int,
    features: int,
    ratio: float,
    generator: torch.Generator,
    seen: Tensor | None = None,
) -> Tensor:
    """Masked entries [rows, features], Bernoulli(ratio) of those that are `seen`: at least one in
    a row, never all.

    A single entry is not masked: nothing would be left to complete it from.
    """
    place = generator.device
    lots: dict[str, Any] = {"generator": generator, "device": place, "dtype": torch.float32}
    masks = torch.rand(rows, features, **lots) < ratio
    if seen is None:
        pick = torch.randint(features, (rows, 1), generator=generator, device=place)
        seen = torch.ones(rows, features, dtype=torch.bool, device=place)
    else:
        drawn = torch.rand(rows, features, **lots).masked_fill_(~seen, -1.0)
        pick = drawn.argmax(1, keepdim=True)
    masks &= seen
    one = (torch.arange(features, dtype=torch.int64, device=place) == pick) & seen
    masks |= one & ~masks.any(1, keepdim=True)
    return masks & ~(one & (masks == seen).all(1, keepdim=True))


def expected_masked(points: Points, ratio: float) -> float:
    """Weighted mean over the rows of how many entries `draw_masks` hides; of how many are seen
    where it hides none.
    """
    n, d = points.z.shape
    full = torch.full((n,), float(d), dtype=torch.float64, device=points.z.device)
    seen = full if points.seen is None else points.seen.sum(1).double()
    hidden = ratio * seen + (1 - ratio) ** seen - ratio**seen
    hidden = torch.where(seen > 1, hidden, 0.0)
    return float(hidden @ points.share / n) or float(seen @ points.share / n)


@dataclass(frozen=True)
class Batch:
    """Some rows with their masks."""

    x: Tensor  # [B, D], 0 where not observed
    masks: Tensor  # [B, D] hidden on purpose: what the loss counts
    seen: Tensor | None
    weight: Tensor | None  # [B]

    def backward(self, memories: Tensor, plan: Plan, expected: float) -> Tensor:
        """Loss of each replica [R], detached; its gradient is added to that of the memories.

        It is the weighted squared error of the masked entries over the number expected of them (the
        authors': over all entries). Where nothing is masked, rows of a single entry, all that is
        seen evolves and counts.
        """
        masked = bool(self.masks.any())
        given = torch.ones_like(self.masks) if self.seen is None else self.seen
        counted = self.masks if masked else given
        if _is_wide(self.x, plan):
            return self._backward_wide(memories, plan, counted, expected)
        hidden = self.masks if self.seen is None else self.masks | ~self.seen
        out = am_recursion(
            self.x.masked_fill(self.masks, 0.0),
            memories,
            plan.beta,
            plan.steps,
            step=plan.step,
            update_mask=hidden if plan.clamp and masked else None,
            precision=plan.precision,
        )
        count = self.x.numel() if plan.authors else expected * len(self.x)
        error = (out.detach() - self.x).mul_(counted)
        rows, slope = error.square().sum(2), error.mul_(2 / count)
        if self.weight is not None:
            rows = rows * self.weight.to(rows.dtype)
            slope = slope.mul_(self.weight.to(slope.dtype)[:, None])
        # a product, as `out.backward(slope)` imports sympy at its first call
        torch.dot(out.flatten(), slope.flatten()).backward()
        return rows.sum(1) / count

    def _backward_wide(
        self, memories: Tensor, plan: Plan, counted: Tensor, expected: float
    ) -> Tensor:
        """The same for one whole step, where features are many."""
        count = expected * len(self.x)
        weight = self.x.new_ones(len(self.x)) if self.weight is None else self.weight.to(self.x)
        found, fixed = memories.detach(), plan.beta
        rows, slope = squared_errors(self.x, self.masks, counted, found, fixed, weight / count)
        torch.dot(memories.flatten(), slope.flatten()).backward()
        return (rows * weight).sum(1) / count


def _is_wide(x: Tensor, plan: Plan) -> bool:
    one = plan.steps == 1 and plan.step == 1 and not plan.authors
    return one and x.is_cpu and x.shape[1] >= FEATURES


def in_rates(slope: Tensor, plan: Plan) -> Tensor:
    """A gradient by what the optimiser moves: memories in units of the columns' rates. A column
    without a rate does not move.
    """
    if plan.rates is None:
        return slope
    return torch.where(plan.rates > 0, slope / plan.rates, 0.0)


def within(memories: Tensor, move: Tensor, plan: Plan) -> Tensor:
    """The memories after a move at the rates of the columns, inside the range of the columns."""
    moved = memories + (move if plan.rates is None else move * plan.rates)
    return moved if plan.low is None else moved.clamp(plan.low, plan.high)


class _Plateau:
    """The authors' learning-rate schedule of one replica."""

    def __init__(self, gain: float) -> None:
        self.losses: list[float] = []
        self.gain = gain
        self.flat = 0

    def shrinks(self, loss: float) -> bool:
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


class _Optimiser:
    """Adam over the replicas: one cosine for all, or the authors' plateau for each."""

    def __init__(self, start: Tensor, plan: Plan) -> None:
        split = list(start) if plan.authors else [start]
        self.parts = [part.clone().requires_grad_() for part in split]
        self.adam = Adam(self.parts, plan.learning_rate, eps=1e-8 * plan.length)
        self.plan = plan
        gain = GAIN * plan.length**2
        self.plateaus = [_Plateau(gain) for _ in self.parts]

    def memories(self) -> Tensor:
        return torch.stack(self.parts) if self.plan.authors else self.parts[0]

    def step(self) -> None:
        """One step by the gradients. A column moves at its own rate and stays in its range."""
        plan = self.plan
        before = [part.detach().clone() for part in self.parts]
        with torch.no_grad():
            for part in self.parts:
                assert part.grad is not None
                part.grad.copy_(in_rates(part.grad, plan))
            self.adam.step()
            for part, old in zip(self.parts, before, strict=True):
                part.copy_(within(old, part - old, plan))

    def finish_epoch(self, epoch: int, loss: Tensor) -> bool:
        """Set the next learning rates; whether training goes on."""
        if not self.plan.authors:
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


class _Batches:
    """Batches of an epoch, the same for all replicas."""

    def __init__(self, points: Points, plan: Plan, generator: torch.Generator) -> None:
        self.points, self.plan, self.generator = points, plan, generator
        self.count = max(1, round(len(points) / plan.batch_size))
        self.twins: Tensor | None = None
        if self.count == 1 and not plan.authors:
            rows = (
                points.z
                if points.seen is None
                else torch.cat([points.z, points.seen.to(points.z.dtype)], 1)
            )
            self.twins = rows.unique(dim=0, return_inverse=True)[1].cpu()

    def epoch(self, number: int) -> Iterator[Batch]:
        points, device = self.points, self.points.z.device
        if self.twins is not None:
            masks = self._masks_of_twins().to(device)
            yield Batch(points.z, masks, points.seen, points.weight)
            return
        order = torch.randperm(len(points), generator=self.generator, device="cpu")
        by_size = self.plan.authors
        for index in order.split(self.plan.batch_size) if by_size else order.chunk(self.count):
            at = index.to(device)
            seen = None if points.seen is None else points.seen[at]
            weight = None if points.weight is None else points.weight[at]
            masks = self._masks(len(index), self.plan.authors and number % 3 == 2, seen)
            yield Batch(points.z[at], masks.to(device), seen, weight)

    def _masks(self, rows: int, shared: bool, seen: Tensor | None) -> Tensor:
        d, ratio = self.points.z.shape[1], self.plan.mask_ratio
        if shared:
            masks = draw_masks(1, d, ratio, self.generator).expand(rows, d)
            return masks if seen is None else masks & seen.cpu()
        return draw_masks(rows, d, ratio, self.generator, None if seen is None else seen.cpu())

    def _masks_of_twins(self) -> Tensor:
        """Equal rows get equal masks, so that a weight is a repetition."""
        assert self.twins is not None
        count = int(self.twins.max()) + 1
        seen = None
        if self.points.seen is not None:
            size = count, self.points.z.shape[1]
            seen = torch.empty(size, dtype=torch.bool, device="cpu")
            seen[self.twins] = self.points.seen.cpu()
        return self._masks(count, False, seen)[self.twins]


def train(
    points: Points, start: Tensor, plan: Plan, seen: Callable[[Tensor], bool] | None = None
) -> Trained:
    """Fit the memories `start` [R, K, D] to the points; `seen(losses)` is told of every epoch and
    may end it.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    batches = _Batches(points, plan, generator)
    optimiser = _Optimiser(start, plan)
    expected = expected_masked(points, plan.mask_ratio)
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
        stop = bool(seen and seen(loss))
        if not optimiser.finish_epoch(epoch, loss) or stop:
            break
    return Trained(optimiser.memories().detach(), best, middle, torch.stack(curve))


def _epoch(
    batches: _Batches, optimiser: _Optimiser, plan: Plan, epoch: int, expected: float
) -> Tensor:
    """One pass over the rows in random batches; the mean loss of each replica."""
    rows, device = len(batches.points), batches.points.z.device
    total = torch.zeros(len(plan.beta), dtype=torch.float64, device=device)
    for batch in batches.epoch(epoch):
        optimiser.adam.zero_grad()
        loss = batch.backward(optimiser.memories(), plan, expected)
        optimiser.step()
        total += loss.double() * (len(batch.x) / rows)
    return total.cpu()
