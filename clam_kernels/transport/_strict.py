# SPDX-License-Identifier: Apache-2.0
"""Labels with no prototype above its share: rows move where that costs least."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import distributed
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


def evened(problem: Problem, g: Tensor, labels: Tensor, group: Any = None) -> Tensor:
    """Labels [..., N] of every problem with no prototype above its capacity; of the rows of this
    process, where the capacities are those of all rows of a group.
    """
    out, whole, first = labels.clone(), labels, 0
    if group is not None:
        whole, first = distributed.gathered_rows(labels.movedim(-1, 0), group)
        whole = whole.movedim(0, -1)
    mine = slice(first, first + labels.shape[-1])
    for at in itertools.product(*map(range, labels.shape[:-1])):
        row = whole[at].cpu().clone()
        if bool((row >= 0).any()):
            _Evening(problem.at(at), g[at], row, mine, group).run()
            out[at] = row[mine].to(out.device)
    return out


def _whole(numbers: list[int]) -> Tensor:
    """Integers as a tensor on the CPU, where rows are moved."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class _Evening:
    """One problem: rows leave prototypes above their capacity, the one of least regret first.

    `labels` are those of all rows, `mine` which of them this process has. All processes of a group
    exchange what they know of their rows, and then decide alike.
    """

    def __init__(
        self, problem: Problem, g: Tensor, labels: Tensor, mine: slice, group: Any
    ) -> None:
        self.problem, self.g, self.labels = problem, g, labels
        self.mine, self.group = mine, group
        k, total = g.shape[-1], int((labels >= 0).sum())
        if problem.log_col is None:
            mass = torch.ones(k, dtype=torch.float64, device="cpu")
        else:
            mass = problem.log_col.double().exp().cpu()
        held = torch.bincount(labels[labels >= 0], minlength=k)
        room = _whole(capacities(total, mass)) - held
        self.room: list[int] = room.tolist()
        self.over = -int(room.clamp(max=0).sum())  # rows that are too many
        self.heap: list[tuple[float, int, int]] = []  # (regret, row, which of its choices)
        self.choices: dict[int, tuple[list[float], list[int]]] = {}

    def run(self) -> None:
        """Until no prototype holds too many."""
        if self.over:
            self._offer((x, self._rows(part)) for part, x in self.problem.tiles(self.g))
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

    def _rows(self, part: slice) -> Tensor:
        """Which of all rows a run of this process's is."""
        first, last = self.mine.start + part.start, self.mine.start + part.stop
        return torch.arange(first, last, dtype=torch.int64, device="cpu")

    def _offer(self, tiles: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take in the choices of some (logits, rows)."""
        tables: Iterable[Tensor] = (self._choices(x, rows) for x, rows in tiles)
        if self.group is not None:  # all processes exchange once, however many tiles each has
            tables = self._of_all(torch.cat([self._choices(*self._nothing()), *tables])).split(4096)
        for table in tables:
            for row, *rest in table.tolist():
                costs, targets = rest[: len(rest) // 2], rest[len(rest) // 2 :]
                open_ = sum(cost < torch.inf for cost in costs)
                if open_:
                    self.choices[int(row)] = costs[:open_], [int(x) for x in targets[:open_]]
                    heapq.heappush(self.heap, (costs[0], int(row), 0))

    def _choices(self, x: Tensor, rows: Tensor) -> Tensor:
        """(row, regrets, prototypes) of those rows that are too many, for the best prototypes that
        have room; float64.
        """
        space = _whole(self.room)
        labels = self.labels[rows]
        many = ((labels >= 0) & (space[labels] < 0)).nonzero()[:, 0]
        inside = (space > 0).nonzero()[:, 0]
        x = x.cpu()[many]
        best = x[:, inside].topk(min(CHOICES, len(inside)), 1)
        regrets = x.gather(1, labels[many, None]) - best.values
        return torch.cat([rows[many, None], regrets, inside[best.indices]], 1).double()

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """The logits of no row, and no row."""
        return self.g.new_empty(0, len(self.room)), _whole([])

    def _of_all(self, mine: Tensor) -> Tensor:
        """Rows of a table, and below those of the other processes, in the order of the ranks."""
        if self.group is None:
            return mine
        return distributed.gathered_rows(mine.to(self.g.device), self.group)[0].cpu()

    def _ask_again(self, waiting: list[int]) -> None:
        rows = _whole(waiting)
        rows = rows[(rows >= self.mine.start) & (rows < self.mine.stop)]
        runs = rows.split(max(1, TILE_ENTRIES // len(self.room)))
        self._offer((self.problem.logits(r - self.mine.start, self.g), r) for r in runs)
        waiting.clear()

    def _chain(self) -> None:
        """One row fewer where forbidden pairs leave none that may move straight: along a path of
        rows, each into the place of the next.
        """
        regret, movers = self._moves()
        k = len(self.room)
        room = _whole(self.room)
        cost = torch.where(room < 0, 0.0, torch.inf).double()
        before = torch.full_like(room, -1)
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
        best = torch.empty((2, k, k), dtype=torch.float64, device="cpu")
        best[0], best[1] = torch.inf, -1.0
        for part, tile in self.problem.tiles(self.g):
            x, rows = tile.cpu().double(), self._rows(part)
            labels = self.labels[rows]
            for j in range(k):
                own = (labels == j).nonzero()[:, 0]
                if len(own):
                    least = (x[own, j][:, None] - x[own]).min(0)
                    move = torch.stack([least.values, rows[own[least.indices]].double()])
                    best[:, j] = torch.where(move[0] < best[0, j], move, best[:, j])
        first, *others = self._of_all(best[None])
        for other in others:
            first = torch.where(other[0] < first[0], other, first)
        regret, movers = first
        regret.fill_diagonal_(torch.inf)
        # a row moved before may gain: no cycles
        return regret.clamp_(min=0.0), movers.long()
