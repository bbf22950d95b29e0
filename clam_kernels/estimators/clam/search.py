# SPDX-License-Identifier: Apache-2.0
"""A fit of ClAM in its frame: recipe, starts, training of all replicas, choice of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.am import am_recursion
from ...ops.kmeans import kmeans_assign
from ..common.frame import Frame
from ..common.scale import rescaled
from ..common.threads import threads_for
from .completion import Plan, train
from .points import Points
from .rounds import START_ITERATIONS, OnEpoch, Rounds
from .selection import Candidate, Contest
from .start import gap_of, starts


@dataclass(frozen=True)
class Recipe:
    """The numbers behind a recipe; arguments given to the estimator come before them."""

    init: str
    n_init: int
    max_iter: int
    batch_size: int
    betas: tuple[float, ...]  # in units of 1/gap, for the authors' recipe of 1/|x|^2
    steps: int
    step: float
    mask_ratio: float
    learning_rate: float  # in units of the data's root mean square, for the authors' of |x|
    rounds: int
    authors: bool


RECIPES = {
    "default": Recipe("k-means++", 32, 50, 512, (1.0, 3.0, 10.0), 1, 1.0, 0.2, 0.05, 5, False),
    # beta: half of the example grid of the authors' code, whose weights are exp(-beta d^2 / 2)
    "paper": Recipe("normal", 4, 200, 8, (0.55, 0.75, 0.95, 1.2), 10, 0.1, 0.2, 0.01, 1, True),
}


# Silhouettes that far apart are as good as each other.
AS_GOOD = 1e-3


@dataclass(frozen=True)
class Found:
    """What a search comes to; lengths in units of the frame."""

    memories: Tensor  # [K, D]
    beta: float
    curve: list[float]
    table: Any  # array [C, columns]


def resolved(estimator: Any, name: str) -> Any:
    """An argument, or what the recipe has where it is None."""
    value = getattr(estimator, name)
    return getattr(RECIPES[estimator.recipe], name) if value is None else value


def search(
    estimator: Any, points: Points, frame: Frame, X: Any, seed: int, on_epoch: OnEpoch
) -> Found:
    """The memories kept, and what every replica came to."""
    recipe = RECIPES[estimator.recipe]
    with threads_for(points.rows.tile_work(estimator.n_clusters)):
        n_init = resolved(estimator, "n_init")
        memories = starts(estimator, recipe.init, points, frame, X, seed, n_init)
    contest = Contest(
        points,
        estimator.n_clusters,
        estimator.select,
        None if recipe.authors else estimator.inertia_guard,
        1 if recipe.authors else estimator.n_clusters,
        estimator.min_cluster_size,
        seed,
    )
    way = _as_published if recipe.authors else _in_rounds
    curve = way(estimator, points, frame, memories, contest, seed, on_epoch)
    winner = contest.winner()
    table = contest.figures(winner)
    kept = winner.memories if recipe.authors else _or_its_means(points, contest, winner)
    return Found(kept, contest.table[winner.number][3], curve, table)


def _in_rounds(
    estimator: Any,
    points: Points,
    frame: Frame,
    memories: Tensor,
    contest: Contest,
    seed: int,
    on_epoch: OnEpoch,
) -> list[float]:
    memories, labels = points.lloyd(memories, START_ITERATIONS)
    gap = gap_of(points, memories, seed)
    cycle = [b / gap for b in RECIPES["default"].betas]
    if estimator.beta is not None:
        cycle = [rescaled(float(estimator.beta), 2 * frame.unit)]
    plan = plan_of(estimator, frame, points, cycle, len(memories), seed)
    share = 1.0 if estimator.select == "loss" else estimator.am_share
    rounds = Rounds(points, contest, plan, share, on_epoch)
    count = min(RECIPES["default"].rounds, plan.epochs)
    rounds.run(memories, labels, [len(p) for p in np.array_split(np.arange(plan.epochs), count)])
    return rounds.curve


def _as_published(
    estimator: Any,
    points: Points,
    frame: Frame,
    memories: Tensor,
    contest: Contest,
    seed: int,
    on_epoch: OnEpoch,
) -> list[float]:
    cycle = [published_beta(frame, b) for b in RECIPES["paper"].betas]
    if estimator.beta is not None:
        cycle = [rescaled(float(estimator.beta), 2 * frame.unit)]
    plan = plan_of(estimator, frame, points, cycle, len(memories), seed)
    count = 0

    def seen(losses: Tensor) -> bool:
        nonlocal count
        count += 1
        return on_epoch(1, count - 1, losses, contest)

    with threads_for(memories.numel() * min(plan.batch_size, len(points))):
        out = train(points, memories, plan, seen)
    betas = [float(b) for b in plan.beta[:, 0]]
    kept = torch.where(out.best.isfinite(), out.best, 0.0)
    labels = [recalled_labels(points.z, m, beta, plan) for m, beta in zip(kept, betas, strict=True)]
    contest.enter(
        out.best,
        torch.stack(labels),
        stage=1,
        replicas=list(range(len(betas))),
        role="am",
        betas=betas,
        losses=out.losses.amin(0).tolist(),
    )
    return [float(x) for x in out.losses[:, contest.winner().number]]


def published_beta(frame: Frame, beta: float) -> float:
    """A beta of the published procedure, which is in absolute units, in the frame."""
    return beta / frame.one / frame.one


def recalled_labels(z: Tensor, memories: Tensor, beta: float, plan: Plan) -> Tensor:
    """Labels as published: the memory nearest to the state after the recursion."""
    states = am_recursion(z, memories, beta, plan.steps, step=plan.step, precision=plan.precision)
    return kmeans_assign(states, memories, distances=False, precision=plan.precision)[0]


def _or_its_means(points: Points, contest: Contest, winner: Candidate) -> Tensor:
    """The memories kept, or the means of their rows if those score as well but for what a sample
    cannot tell: memories trained on hidden entries stand beyond their rows.
    """
    if contest.select == "loss":
        return winner.memories
    memories = winner.memories[None]
    means = points.means(points.assign(memories), memories)[0].to(memories.dtype)
    ((quality, _, used),) = contest.measure(means, points.assign(means))
    worse = contest.select == "silhouette" and -quality > winner.key + AS_GOOD
    return winner.memories if worse or used < winner.used else means[0]


def rates_of(deviation: Tensor, length: float) -> Tensor:
    """Learning rate of every column beside that of the plan: steps are in units of deviations."""
    return deviation / length


def plan_of(
    estimator: Any, frame: Frame, points: Points, cycle: list[float], replicas: int, seed: int
) -> Plan:
    """How to train so many replicas, whose betas (in the frame) take turns."""
    recipe, z = RECIPES[estimator.recipe], points.z
    size = float(frame.deviation.square().mean().sqrt())
    length = frame.one if recipe.authors else size or 1.0
    low, high = frame.bounds(z)
    betas = [cycle[r % len(cycle)] for r in range(replicas)]
    return Plan(
        beta=torch.tensor(betas, dtype=z.dtype, device=z.device)[:, None],
        steps=resolved(estimator, "steps"),
        step=float(resolved(estimator, "step")),
        mask_ratio=resolved(estimator, "mask_ratio"),
        clamp=estimator.clamp,
        learning_rate=resolved(estimator, "learning_rate") * length,
        batch_size=resolved(estimator, "batch_size"),
        epochs=resolved(estimator, "max_iter"),
        length=length,
        rates=None if recipe.authors else rates_of(frame.deviation, length).to(z.device, z.dtype),
        low=low,
        high=high,
        authors=recipe.authors,
        precision=estimator.precision,
        seed=seed,
    )
