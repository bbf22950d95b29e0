# SPDX-License-Identifier: Apache-2.0
"""Training of the memories by completing masked patterns, all replicas in one op call.

Replica r of R sees the same batches and masks as the others, so its result does not depend on R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.am import am_recursion

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


@dataclass(frozen=True)
class Trained:
    """What came out, replica by replica."""

    memories: Tensor  # [R, K, D]
    losses: Tensor  # [epochs, R]


def draw_masks(rows: int, features: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Masked entries [rows, features], Bernoulli(ratio): at least one in a row, never all of
    several.

    A single feature is not masked at all: nothing would be left to complete it from.
    """
    if features == 1:
        return torch.zeros(rows, 1, dtype=torch.bool)
    masks = torch.rand(rows, features, generator=generator) < ratio
    pick = torch.randint(features, (rows, 1), generator=generator)
    one = torch.arange(features) == pick
    masks |= one & ~masks.any(1, keepdim=True)
    return masks & ~(one & masks.all(1, keepdim=True))


def _loss(x: Tensor, masks: Tensor, memories: Tensor, plan: Plan) -> Tensor:
    """Loss of each replica [R] on one batch [B, D]: mean squared error of the masked entries."""
    counted = masks if bool(masks.any()) else torch.ones_like(masks)
    out = am_recursion(
        x.masked_fill(masks, 0.0),
        memories,
        plan.beta,
        plan.steps,
        step=plan.step,
        update_mask=masks if plan.clamp and counted is masks else None,
        precision=plan.precision,
    )
    error = ((out - x).square() * counted).sum((1, 2))
    return error / (x.numel() if plan.authors else counted.sum())


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
        groups = [{"params": [part]} for part in self.parts]
        self.adam = torch.optim.Adam(
            groups, lr=plan.learning_rate, eps=1e-8 * plan.length, foreach=True
        )
        self.plan = plan
        gain = GAIN * plan.length**2
        self.plateaus = [_Plateau(gain) for _ in self.parts]

    def memories(self) -> Tensor:
        return torch.stack(self.parts) if self.plan.authors else self.parts[0]

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


def train(
    z: Tensor, start: Tensor, plan: Plan, progress: Callable[[Iterable[int]], Iterable[int]]
) -> Trained:
    """Fit the memories `start` [R, K, D] to the states z [N, D]."""
    generator = torch.Generator().manual_seed(plan.seed)
    optimiser = _Optimiser(start, plan)
    best = start.clone()
    lowest = torch.full((len(start),), math.inf, dtype=torch.float64)
    curve = []
    for epoch in progress(range(plan.epochs)):
        loss = _epoch(z, optimiser, plan, epoch, generator)
        curve.append(loss)
        better = loss < lowest if plan.authors else torch.ones_like(lowest, dtype=torch.bool)
        lowest = torch.where(better, loss, lowest)
        keep = better.to(best.device)[:, None, None]
        best = torch.where(keep, optimiser.memories().detach(), best)
        if not optimiser.finish_epoch(epoch, loss):
            break
    return Trained(best, torch.stack(curve) if curve else torch.zeros(0, len(start)))


def _epoch(
    z: Tensor, optimiser: _Optimiser, plan: Plan, epoch: int, generator: torch.Generator
) -> Tensor:
    """One pass over the rows in random batches; the mean loss of each replica."""
    order = torch.randperm(len(z), generator=generator)
    total = torch.zeros(len(plan.beta), dtype=torch.float64, device=z.device)
    for index in order.split(plan.batch_size):
        shared = plan.authors and epoch % 3 == 2
        rows = 1 if shared else len(index)
        masks = draw_masks(rows, z.shape[1], plan.mask_ratio, generator)
        x = z[index.to(z.device)]
        loss = _loss(x, masks.expand(len(index), -1).to(z.device), optimiser.memories(), plan)
        optimiser.adam.zero_grad()
        loss.sum().backward()
        optimiser.adam.step()
        total += loss.detach().double() * (len(index) / len(z))
    return total.cpu()
