# SPDX-License-Identifier: Apache-2.0
"""Labels with no prototype above its share: rows move where that costs least."""

from __future__ import annotations

import heapq
import itertools

import torch
from torch import Tensor

from ._problem import TILE_ENTRIES, Problem

# Other prototypes that are kept for a row, best first, until all of them are full; and the share of
# the rows too many that wait for others before they are looked at again together.
CHOICES, WAITING = 32, 64


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
    for at in itertools.product(*map(range, labels.shape[:-1])):
        row = out[at].cpu()
        if bool((row >= 0).any()):
            _Evening(problem.at(at), g[at], row).run()
            out[at] = row.to(out.device)
    return out


class _Evening:
    """One problem: rows leave prototypes above their capacity, the one of least regret first."""

    def __init__(self, problem: Problem, g: Tensor, labels: Tensor) -> None:
        self.problem, self.g, self.labels = problem, g, labels
        k, total = g.shape[-1], int((labels >= 0).sum())
        mass = torch.ones(k) if problem.log_col is None else problem.log_col.double().exp().cpu()
        held = torch.bincount(labels[labels >= 0], minlength=k)
        room = torch.tensor(capacities(total, mass)) - held
        self.room: list[int] = room.tolist()
        self.over = -int(room.clamp(max=0).sum())  # rows that are too many
        self.heap: list[tuple[float, int, int]] = []  # (regret, row, which of its choices)
        self.choices: dict[int, tuple[list[float], list[int]]] = {}

    def run(self) -> None:
        """Until no prototype holds too many."""
        if self.over:
            for part, x in self.problem.tiles(self.g):
                self._offer(x.cpu(), torch.arange(part.start, part.stop))
        waiting: list[int] = []
        while self.over and (self.heap or waiting):
            if waiting and (not self.heap or len(waiting) > self.over // WAITING):
                self._ask_again(waiting)
                continue
            _, row, rank = heapq.heappop(self.heap)
            source = int(self.labels[row])
            if self.room[source] >= 0:
                continue
            regrets, targets = self.choices[row]
            while rank < len(targets) and self.room[targets[rank]] <= 0:
                rank += 1  # they have filled up since
            if rank == len(targets):
                waiting.append(row)
            elif self.heap and regrets[rank] > self.heap[0][0]:
                heapq.heappush(self.heap, (regrets[rank], row, rank))
            else:
                self._move(row, targets[rank])
        while self.over:
            self._chain()

    def _move(self, row: int, target: int) -> None:
        source = int(self.labels[row])
        self.over += int(self.room[target] <= 0) - int(self.room[source] < 0)
        self.room[source] += 1
        self.room[target] -= 1
        self.labels[row] = target

    def _offer(self, x: Tensor, rows: Tensor) -> None:
        """Choices of those of some rows that are too many, among the prototypes that have room."""
        space = torch.tensor(self.room)
        labels = self.labels[rows]
        many = ((labels >= 0) & (space[labels] < 0)).nonzero()[:, 0]
        inside = (space > 0).nonzero()[:, 0]
        best = x[many][:, inside].topk(min(CHOICES, len(inside)), 1)
        regrets = (x[many, labels[many]][:, None] - best.values).tolist()
        found = (rows[many].tolist(), regrets, inside[best.indices].tolist())
        for row, costs, targets in zip(*found, strict=True):
            open_ = sum(cost < torch.inf for cost in costs)
            if open_:
                self.choices[row] = costs[:open_], targets[:open_]
                heapq.heappush(self.heap, (costs[0], row, 0))

    def _ask_again(self, waiting: list[int]) -> None:
        for some in torch.tensor(waiting).split(max(1, TILE_ENTRIES // len(self.room))):
            self._offer((self.problem.logits(some) + self.g).cpu(), some)
        waiting.clear()

    def _chain(self) -> None:
        """One row fewer where forbidden pairs leave none that may move straight: along a path of
        rows, each into the place of the next.
        """
        regret, movers = self._moves()
        k = len(self.room)
        room = torch.tensor(self.room)
        cost = torch.where(room < 0, 0.0, torch.inf).double()
        before = torch.full((k,), -1)
        for _ in range(k):  # Bellman and Ford's: no path is longer
            least = (cost[:, None] + regret).min(0)
            shorter = least.values < cost
            if not bool(shorter.any()):
                break
            cost = torch.where(shorter, least.values, cost)
            before = torch.where(shorter, least.indices, before)
        ends = torch.where(room > 0, cost, torch.inf)
        target = int(ends.argmin())
        if not bool(ends[target].isfinite()):
            raise ValueError("labels: strict shares cannot be met with these forbidden pairs")
        while (source := int(before[target])) >= 0:
            self._move(int(movers[source, target]), target)
            target = source

    def _moves(self) -> tuple[Tensor, Tensor]:
        """(least regret, its row) of moving any row from one prototype to another [K, K]."""
        k = len(self.room)
        regret = torch.full((k, k), torch.inf, dtype=torch.float64)
        movers = torch.full((k, k), -1)
        for part, tile in self.problem.tiles(self.g):
            x, labels = tile.cpu().double(), self.labels[part]
            for j in range(k):
                rows = (labels == j).nonzero()[:, 0]
                if len(rows):
                    least = (x[rows, j][:, None] - x[rows]).min(0)
                    closer = least.values < regret[j]
                    regret[j] = torch.where(closer, least.values, regret[j])
                    movers[j] = torch.where(closer, rows[least.indices] + part.start, movers[j])
        regret.fill_diagonal_(torch.inf)
        return regret.clamp_(min=0.0), movers  # a row moved before may gain: no cycles
