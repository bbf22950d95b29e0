# SPDX-License-Identifier: Apache-2.0
"""The default recipe: replicas that train or go on with Lloyd's iterations, round after round;
between rounds the best are copied and some of the copies' memories jump to far points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..common.threads import threads_for
from .completion import Plan, train
from .points import Points
from .selection import Contest

START_ITERATIONS, ROUND_ITERATIONS, JUMP_ITERATIONS = 20, 10, 3
# Of the copies of a good replica one stays as it is.
COPIES = 4
# on_epoch(round, epoch, losses [R], contest) -> whether to stop
OnEpoch = Callable[[int, int, Tensor, Contest], bool]


class Rounds:
    """R replicas under way."""

    def __init__(
        self,
        points: Points,
        contest: Contest,
        plan: Plan,
        am_share: float,
        on_epoch: OnEpoch,
    ) -> None:
        self.points, self.contest, self.plan, self.on_epoch = points, contest, plan, on_epoch
        self.betas = [float(b) for b in plan.beta[:, 0]]
        count = len(self.betas)
        self.trained = list(range(count - round(am_share * count + 1e-9), count))
        self.others = list(range(self.trained[0] if self.trained else count))
        self.random = np.random.default_rng([plan.seed, 2])
        self.curve: list[float] = []
        self.stopped = False

    def run(self, memories: Tensor, labels: Tensor, epochs: list[int]) -> None:
        """All rounds, of so many epochs each, from the starts after Lloyd's iterations."""
        everyone = list(range(len(memories)))
        self.memories = memories.clone()
        self.best = memories.clone()
        self.scores = self.contest.enter(
            memories, labels, stage=0, replicas=everyone, role="start", betas=self.betas
        )
        for stage, count in enumerate(epochs, 1):
            if stage > 1:
                self._renew()
            self._lloyd(stage)
            self._train(stage, count)
            if self.stopped:
                break

    def _lloyd(self, stage: int) -> None:
        if not self.others:
            return
        moved, labels = self.points.lloyd(self.memories[self.others], ROUND_ITERATIONS)
        self.memories[self.others] = moved
        self._harvest(moved, labels, stage, self.others, "lloyd")

    def _train(self, stage: int, epochs: int) -> None:
        if not self.trained:
            for epoch in range(epochs):
                self.curve.append(float("nan"))
                none = self.memories.new_zeros(0)
                self.stopped |= self.on_epoch(stage, epoch, none, self.contest)
                if self.stopped:
                    return
            return
        plan = dataclasses.replace(
            self.plan,
            beta=self.plan.beta[self.trained],
            epochs=epochs,
            seed=self.plan.seed + stage,
        )
        done = 0

        def seen(losses: Tensor) -> bool:
            nonlocal done
            self.curve.append(float(losses.mean()))
            self.stopped |= self.on_epoch(stage, done, losses, self.contest)
            done += 1
            return self.stopped

        start = self.memories[self.trained]
        with threads_for(start.numel() * min(plan.batch_size, len(self.points))):
            out = train(self.points, start, plan, seen)
        self.memories[self.trained] = out.last
        lowest = out.losses.amin(0).tolist()
        for memories, losses in (
            (out.middle, out.losses[(len(out.losses) - 1) // 2].tolist()),
            (out.best, lowest),
            (out.last, out.losses[-1].tolist()),
        ):
            self._harvest(memories, None, stage, self.trained, "am", losses)

    def _harvest(
        self,
        memories: Tensor,
        labels: Tensor | None,
        stage: int,
        replicas: list[int],
        role: str,
        losses: list[float] | None = None,
    ) -> None:
        """Score some replicas; each remembers its best memories."""
        finite = memories.isfinite().all(2).all(1)
        safe = torch.where(finite[:, None, None], memories, self.best[replicas])
        found = self.contest.enter(
            memories,
            self.points.assign(safe) if labels is None else labels,
            stage=stage,
            replicas=replicas,
            role=role,
            betas=[self.betas[r] for r in replicas],
            losses=losses,
        )
        for at, (r, score) in enumerate(zip(replicas, found, strict=True)):
            if score > self.scores[r]:
                self.scores[r] = score
                self.best[r] = memories[at]

    def _renew(self) -> None:
        """Copies of the best replicas, in other places; of most a memory jumps to a far point."""
        count = len(self.memories)
        parents = np.argsort(-np.array(self.scores), kind="stable")[: -(-count // COPIES)]
        slots = np.repeat(parents, COPIES)[:count]
        copies = self.best[torch.from_numpy(slots)].clone()
        jumped = [i for i in range(count) if i % COPIES]
        if jumped:
            labels = self.points.assign(self.best[torch.from_numpy(parents)])
            for i in jumped:
                self._jump(copies[i], self.best[slots[i]], labels[i // COPIES])
            copies[jumped] = self.points.lloyd(copies[jumped], JUMP_ITERATIONS)[0]
        order = self.random.permutation(count)
        self.memories = copies[torch.from_numpy(order)]
        self.scores = [self.scores[slots[i]] for i in order]
        self.best = self.best[torch.from_numpy(slots[order])]

    def _jump(self, copy: Tensor, parent: Tensor, labels: Tensor) -> None:
        """Move one memory to a point drawn by its squared distance, in place."""
        k, lot = self.random.integers(len(copy)), self.random.random()
        row = self.points.far_row(parent, labels, lot)
        if row is not None:
            copy[k] = row
