# SPDX-License-Identifier: Apache-2.0
"""The default recipe: in each round some replicas train and the others run Lloyd's iterations.

Between rounds the best replicas are copied, and in most copies one memory jumps to a far row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..common.threads import threads_for
from .completion import CompletionPlan, train
from .points import Points
from .selection import Candidates

START_ITERATIONS, ROUND_ITERATIONS, JUMP_ITERATIONS = 20, 10, 3
# Copies of a good replica; one of them stays as it is.
COPIES = 4
# on_epoch(round, epoch, losses [R], candidates) -> whether to stop
OnEpoch = Callable[[int, int, Tensor, Candidates], bool]


class Rounds:
    """The state of R replicas from round to round."""

    def __init__(
        self,
        points: Points,
        candidates: Candidates,
        plan: CompletionPlan,
        am_share: float,
        on_epoch: OnEpoch,
    ) -> None:
        self.points, self.candidates, self.plan = points, candidates, plan
        self.on_epoch = on_epoch
        self.betas = [float(b) for b in plan.beta[:, 0]]
        count = len(self.betas)
        first = count - round(am_share * count + 1e-9)
        self.am_replicas = list(range(first, count))
        self.lloyd_replicas = list(range(first))
        self.random = np.random.default_rng([plan.seed, 2])
        self.curve: list[float] = []  # mean loss of each epoch
        self.is_stopped = False

    def run(self, memories: Tensor, labels: Tensor, epochs: list[int]) -> None:
        """Run all rounds from memories [R, K, D]; `epochs` has the epochs of each round."""
        self.memories = memories.clone()
        self.best = memories.clone()  # of each replica, by its score
        self.scores = self.candidates.add(
            memories,
            labels,
            stage=0,
            replicas=list(range(len(memories))),
            role="start",
            betas=self.betas,
        )
        for stage, count in enumerate(epochs, 1):
            if stage > 1:
                self._renew()
            self._lloyd(stage)
            self._train(stage, count)
            if self.is_stopped:
                break

    def _lloyd(self, stage: int) -> None:
        if not self.lloyd_replicas:
            return
        memories, labels = self.points.lloyd(self.memories[self.lloyd_replicas], ROUND_ITERATIONS)
        self.memories[self.lloyd_replicas] = memories
        self._score(memories, labels, stage, self.lloyd_replicas, "lloyd")

    def _train(self, stage: int, epochs: int) -> None:
        if not self.am_replicas:
            for epoch in range(epochs):
                if self._after_epoch(stage, epoch, self.memories.new_zeros(0)):
                    return
            return
        plan = dataclasses.replace(
            self.plan,
            beta=self.plan.beta[self.am_replicas],
            epochs=epochs,
            seed=self.plan.seed + stage,
        )
        epoch = -1

        def after_epoch(losses: Tensor) -> bool:
            nonlocal epoch
            epoch += 1
            return self._after_epoch(stage, epoch, losses)

        start = self.memories[self.am_replicas]
        with threads_for(start.numel() * min(plan.batch_size, len(self.points))):
            result = train(self.points, start, plan, after_epoch)
        self.memories[self.am_replicas] = result.last
        for memories, losses in (
            (result.middle, result.losses[(len(result.losses) - 1) // 2]),
            (result.best, result.losses.amin(0)),
            (result.last, result.losses[-1]),
        ):
            self._score(memories, None, stage, self.am_replicas, "am", losses.tolist())

    def _after_epoch(self, stage: int, epoch: int, losses: Tensor) -> bool:
        """Note the losses of an epoch; return whether a callback ends the fit."""
        self.curve.append(float(losses.mean()) if len(losses) else float("nan"))
        self.is_stopped |= self.on_epoch(stage, epoch, losses, self.candidates)
        return self.is_stopped

    def _score(
        self,
        memories: Tensor,
        labels: Tensor | None,
        stage: int,
        replicas: list[int],
        role: str,
        losses: list[float] | None = None,
    ) -> None:
        """Add the memories of some replicas to the candidates; store the best of each replica."""
        finite = memories.isfinite().all(2).all(1)
        safe = torch.where(finite[:, None, None], memories, self.best[replicas])
        scores = self.candidates.add(
            memories,
            self.points.assign(safe) if labels is None else labels,
            stage=stage,
            replicas=replicas,
            role=role,
            betas=[self.betas[r] for r in replicas],
            losses=losses,
        )
        for i, (r, score) in enumerate(zip(replicas, scores, strict=True)):
            if score > self.scores[r]:
                self.scores[r] = score
                self.best[r] = memories[i]

    def _renew(self) -> None:
        """Replace all replicas by copies of the best ones, in random order; in most copies one
        memory jumps to a far row.
        """
        count = len(self.memories)
        parents = np.argsort(-np.array(self.scores), kind="stable")[: -(-count // COPIES)]
        slots = np.repeat(parents, COPIES)[:count]
        copies = self.best[torch.from_numpy(slots)].clone()
        changed = [i for i in range(count) if i % COPIES]
        if changed:
            labels = self.points.assign(self.best[torch.from_numpy(parents)])
            for i in changed:
                self._jump(copies[i], self.best[slots[i]], labels[i // COPIES])
            copies[changed] = self.points.lloyd(copies[changed], JUMP_ITERATIONS)[0]
        order = self.random.permutation(count)
        self.memories = copies[torch.from_numpy(order)]
        self.scores = [self.scores[slots[i]] for i in order]
        self.best = self.best[torch.from_numpy(slots[order])]

    def _jump(self, copy: Tensor, parent: Tensor, labels: Tensor) -> None:
        """Move one memory to a row that is drawn by its squared distance, in place."""
        k, draw = self.random.integers(len(copy)), self.random.random()
        row = self.points.far_row(parent, labels, draw)
        if row is not None:
            copy[k] = row
