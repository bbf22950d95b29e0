# SPDX-License-Identifier: Apache-2.0
"""The search of a ClAM fit, in its frame: start, train all replicas, choose one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.am import am_recursion
from ...ops.kmeans import kmeans_assign
from ..common.frame import Frame
from ..common.threads import threads_for
from .completion import CompletionPlan, train
from .points import Points
from .rounds import START_ITERATIONS, OnEpoch, Rounds
from .selection import Candidate, Candidates
from .settings import ClAMSettings
from .start import gap_of, starts

# Rounds of the default recipe.
ROUNDS = 5
# Silhouettes of a sample that differ by less than this are equally good.
SILHOUETTE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SearchResult:
    """The memories that a search chose, and its figures; lengths in units of the frame."""

    memories: Tensor  # [K, D]
    beta: float
    curve: list[float]  # loss of each epoch
    table: Any  # array [C, columns], one row for each candidate


def search(
    settings: ClAMSettings, points: Points, frame: Frame, X: Any, seed: int, on_epoch: OnEpoch
) -> SearchResult:
    """Start and train `n_init` replicas, and choose the memories of one."""
    is_published = settings.is_published
    with threads_for(points.rows.tile_work(settings.n_clusters)):
        memories = starts(settings, points, frame, X, seed)
    candidates = Candidates(
        points,
        settings.n_clusters,
        settings.select,
        None if is_published else settings.inertia_guard,
        1 if is_published else settings.n_clusters,
        settings.min_cluster_size,
        seed,
    )
    if is_published:
        plan = plan_of(settings, frame, points, settings.betas(frame), len(memories), seed)
        curve = _train_as_published(points, memories, plan, candidates, on_epoch)
    else:
        memories, labels = points.lloyd(memories, START_ITERATIONS)
        betas = settings.betas(frame, gap_of(points, memories, seed))
        plan = plan_of(settings, frame, points, betas, len(memories), seed)
        share = 1.0 if settings.select == "loss" else settings.am_share
        rounds = Rounds(points, candidates, plan, share, on_epoch)
        count = min(ROUNDS, plan.epochs)
        epochs = [len(part) for part in np.array_split(np.arange(plan.epochs), count)]
        rounds.run(memories, labels, epochs)
        curve = rounds.curve
    best = candidates.best()
    table = candidates.figures(best)
    chosen = best.memories if is_published else _memories_or_means(points, candidates, best)
    return SearchResult(chosen, candidates.table[best.number][3], curve, table)


def _train_as_published(
    points: Points,
    memories: Tensor,
    plan: CompletionPlan,
    candidates: Candidates,
    on_epoch: OnEpoch,
) -> list[float]:
    """Train all replicas [R, K, D] by the published procedure; the losses of the best one."""
    epoch = 0

    def after_epoch(losses: Tensor) -> bool:
        nonlocal epoch
        epoch += 1
        return on_epoch(1, epoch - 1, losses, candidates)

    with threads_for(memories.numel() * min(plan.batch_size, len(points))):
        result = train(points, memories, plan, after_epoch)
    betas = [float(b) for b in plan.beta[:, 0]]
    finite = torch.where(result.best.isfinite(), result.best, 0.0)
    labels = [
        _recalled_labels(points.z, rho, beta, plan) for rho, beta in zip(finite, betas, strict=True)
    ]
    candidates.add(
        result.best,
        torch.stack(labels),
        stage=1,
        replicas=list(range(len(betas))),
        role="am",
        betas=betas,
        losses=result.losses.amin(0).tolist(),
    )
    return [float(x) for x in result.losses[:, candidates.best().number]]


def _recalled_labels(z: Tensor, memories: Tensor, beta: float, plan: CompletionPlan) -> Tensor:
    """Labels [N] as published: the memory nearest to the state after the recursion."""
    states = am_recursion(z, memories, beta, plan.steps, step=plan.step, precision=plan.precision)
    return kmeans_assign(states, memories, distances=False, precision=plan.precision)[0]


def _memories_or_means(points: Points, candidates: Candidates, best: Candidate) -> Tensor:
    """The memories of the best candidate, or the means of their rows if those score as well.

    Memories that were trained on hidden entries lie beyond their rows. Silhouettes are of a
    sample: a difference below `SILHOUETTE_TOLERANCE` does not count.
    """
    if candidates.select == "loss":
        return best.memories
    memories = best.memories[None]
    means = points.means(points.assign(memories), memories)[0].to(memories.dtype)
    ((quality, _, used),) = candidates.measure(means, points.assign(means))
    limit = best.key + SILHOUETTE_TOLERANCE
    is_worse = candidates.select == "silhouette" and -quality > limit
    return best.memories if is_worse or used < best.used else means[0]


def rates_of(deviation: Tensor, length: float) -> Tensor:
    """Learning rates [D] of the columns as multiples of the plan's: deviation / length."""
    return deviation / length


def plan_of(
    settings: ClAMSettings,
    frame: Frame,
    points: Points,
    betas: list[float],
    replicas: int,
    seed: int,
) -> CompletionPlan:
    """How to train R replicas, which use the betas (in the frame) in turn."""
    is_published, z = settings.is_published, points.z
    size = float(frame.deviation.square().mean().sqrt())
    length = frame.one if is_published else size or 1.0
    low, high = frame.bounds(z)
    beta = [betas[r % len(betas)] for r in range(replicas)]
    rates = None if is_published else rates_of(frame.deviation, length).to(z.device, z.dtype)
    return CompletionPlan(
        beta=torch.tensor(beta, dtype=z.dtype, device=z.device)[:, None],
        steps=settings.steps,
        step=settings.step,
        mask_ratio=settings.mask_ratio,
        clamp=settings.clamp,
        learning_rate=settings.learning_rate * length,
        batch_size=settings.batch_size,
        epochs=settings.max_iter,
        length=length,
        rates=rates,
        low=low,
        high=high,
        is_published=is_published,
        precision=settings.precision,
        seed=seed,
    )
