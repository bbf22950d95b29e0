# SPDX-License-Identifier: Apache-2.0
"""Labels with no prototype above its share: rows move where that costs least."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from ._problem import Problem

Offer = tuple[float, int, int]


def capacities(total: int, mass: Tensor) -> list[int]:
    """Whole shares of a number of rows: rounded down, the rest to the largest remainders, the
    lowest index on ties.
    """
    exact = mass.double() / mass.double().sum() * total
    whole = (exact + 1e-9).floor().long()
    order = torch.sort(whole.double() - exact, stable=True).indices
    whole[order[: total - int(whole.sum())]] += 1
    return [int(x) for x in whole]


def evened(problem: Problem, g: Tensor, labels: Tensor) -> Tensor:
    """Labels [..., N] of every problem with no prototype above its capacity."""
    out = labels.clone()
    flat, places = out.reshape(-1, labels.shape[-1]), list(_places(labels.shape[:-1]))
    for row, at in zip(flat, places, strict=True):
        if bool((row >= 0).any()):
            _even_one(problem.at(at), g[at], row)
    return flat.reshape(labels.shape)


def _places(batch: torch.Size) -> list[tuple[int, ...]]:
    return [tuple(at) for at in torch.cartesian_prod(*map(torch.arange, batch)).reshape(
        -1, len(batch)).tolist()] if batch else [()]  # fmt: skip


def _even_one(problem: Problem, g: Tensor, labels: Tensor) -> None:
    """Move rows of least regret from prototypes above their capacity to those below, in place."""
    k, total = g.shape[-1], int((labels >= 0).sum())
    mass = torch.ones(k) if problem.log_col is None else problem.log_col.double().exp().cpu()
    held = torch.bincount(labels[labels >= 0], minlength=k).tolist()
    room = [c - n for c, n in zip(capacities(total, mass), held, strict=True)]
    heap: list[Offer] = []
    for part, x in problem.tiles(g):
        heap += _offers(x, labels[part], room, part.start)
    heapq.heapify(heap)
    while heap and min(room) < 0:
        _, row, target = heapq.heappop(heap)
        source = int(labels[row])
        if room[source] >= 0:
            continue
        if room[target] <= 0:  # it has filled up since
            x = problem.logits(slice(row, row + 1)) + g
            for offer in _offers(x, labels[row : row + 1], room, row):
                heapq.heappush(heap, offer)
            continue
        labels[row] = target
        room[source] += 1
        room[target] -= 1


def _offers(x: Tensor, labels: Tensor, room: list[int], first: int) -> list[Offer]:
    """(regret, row, prototype) of the rows that are too many: the best that has room."""
    space = torch.tensor(room, device=x.device)
    rows = (labels >= 0).nonzero()[:, 0]
    rows = rows[space[labels[rows]] < 0]
    best = x[rows].masked_fill(space <= 0, -torch.inf).max(1)
    regret = x[rows, labels[rows]] - best.values
    return list(zip(regret.tolist(), (rows + first).tolist(), best.indices.tolist(), strict=True))
