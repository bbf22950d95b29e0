# SPDX-License-Identifier: Apache-2.0
"""A fit of ClAM in its frame: recipe, starts, training of all replicas, choice of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._base import Data
from ._completion import Plan, train
from ._frame import Frame, rescaled
from ._selection import Candidate, Fitted, choose, measure
from ._start import gap_of, starts
from ._threads import threads_for


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
    authors: bool


RECIPES = {
    "default": Recipe("k-means++", 8, 60, 512, (1.0, 3.0, 10.0), 1, 1.0, 0.2, 0.05, False),
    # beta: half of the example grid of the authors' code, whose weights are exp(-beta d^2 / 2)
    "paper": Recipe("normal", 4, 200, 8, (0.55, 0.75, 0.95, 1.2), 10, 0.1, 0.2, 0.01, True),
}


def resolved(estimator: Any, name: str) -> Any:
    """An argument, or what the recipe has where it is None."""
    value = getattr(estimator, name)
    return getattr(RECIPES[estimator.recipe], name) if value is None else value


def search(
    estimator: Any,
    z: Tensor,
    frame: Frame,
    data: Data,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> tuple[Candidate, int]:
    """The replica kept, and the epochs run."""
    recipe = RECIPES[estimator.recipe]
    memories = starts(estimator, recipe, z, frame, data, seed, resolved(estimator, "n_init"))
    betas = _betas(estimator, recipe, frame, z, memories, seed)
    plan = _plan(estimator, recipe, frame, z, betas, seed)
    product = memories.numel() * min(plan.batch_size, len(z))
    with threads_for(product):
        trained = train(z, memories, plan, progress)
    fitted = Fitted(z, trained, plan, betas, recipe.authors)
    candidates = measure(fitted, estimator.select, seed)
    guard = None if recipe.authors else estimator.inertia_guard
    required = 1 if recipe.authors else estimator.n_clusters
    return choose(candidates, estimator.select, guard, required), len(trained.losses)


def _betas(
    estimator: Any, recipe: Recipe, frame: Frame, z: Tensor, memories: Tensor, seed: int
) -> list[float]:
    """Beta of each replica, in the frame."""
    if estimator.beta is not None or recipe.authors:
        given = recipe.betas if estimator.beta is None else (float(estimator.beta),)
        cycle = [rescaled(b, 2 * frame.unit) for b in given]
    else:
        gap = gap_of(z, memories, seed)
        cycle = [b / gap for b in recipe.betas]
    return [cycle[r % len(cycle)] for r in range(len(memories))]


def _plan(
    estimator: Any, recipe: Recipe, frame: Frame, z: Tensor, betas: list[float], seed: int
) -> Plan:
    size = float(z.double().square().mean().sqrt()) or 1.0
    length = rescaled(1.0, -frame.unit) if recipe.authors else size
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
        authors=recipe.authors,
        precision=estimator.precision,
        seed=seed,
    )
