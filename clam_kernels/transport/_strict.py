# SPDX-License-Identifier: Apache-2.0
"""Labels where no prototype has more rows than its capacity: rows move where that costs least."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ._problem import TILE_ENTRIES, TransportProblem

# A row has a list of CHOICES other prototypes, the best first. When all of them are full, the row
# waits. `_renew_choices` computes the lists of the waiting rows again when their number exceeds
# 1 / WAITING_DIVISOR of the excess.
CHOICES, WAITING_DIVISOR = 32, 64


def capacities(total: int, mass: Tensor) -> list[int]:
    """Number of rows of each prototype: `mass * total` rounded down, plus one for the largest
    remainders, the lowest index of a tie, until the sum is `total`.
    """
    exact = mass.double() / mass.double().sum() * total
    whole = (exact + 1e-9).floor().long()
    order = torch.sort(whole.double() - exact, stable=True).indices
    whole[order[: total - int(whole.sum())]] += 1
    return [int(x) for x in whole]


def enforce_capacities(
    problem: TransportProblem, g: Tensor, labels: Tensor, group: Any = None
) -> Tensor:
    """Labels [..., N] where no prototype has more rows than its capacity. With a group, labels are
    those of this process, and capacities count the rows of all processes.
    """
    result, all_labels, first = labels.clone(), labels, 0
    if group is not None:
        all_labels, first = distributed.gather_rows(labels.movedim(-1, 0), group)
        all_labels = all_labels.movedim(0, -1)
    own_rows = slice(first, first + labels.shape[-1])
    for index in itertools.product(*map(range, labels.shape[:-1])):
        row = all_labels[index].cpu().clone()
        if bool((row >= 0).any()):
            _CapacityMoves(problem.problem_at(index), g[index], row, own_rows, group).run()
            result[index] = row[own_rows].to(result.device)
    return result


def _int_tensor(numbers: list[int]) -> Tensor:
    """Integers as a tensor on the CPU, which moves the rows."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class _CapacityMoves:
    """Moves rows away from prototypes that have too many, the row with the least regret first.

    The regret of a move is the logit of the old label minus that of the new one. `labels` are those
    of all rows, `own_rows` the rows of this process. The processes of a group exchange their
    choices, and then all make the same moves.
    """

    def __init__(
        self, problem: TransportProblem, g: Tensor, labels: Tensor, own_rows: slice, group: Any
    ) -> None:
        self.problem, self.g, self.labels = problem, g, labels
        self.own_rows, self.group = own_rows, group
        k, total = g.shape[-1], int((labels >= 0).sum())
        if problem.log_col is None:
            mass = torch.ones(k, dtype=torch.float64, device="cpu")
        else:
            mass = problem.log_col.double().exp().cpu()
        counts = torch.bincount(labels[labels >= 0], minlength=k)
        free = _int_tensor(capacities(total, mass)) - counts
        self.free: list[int] = free.tolist()
        self.excess = -int(free.clamp(max=0).sum())  # rows above the capacities
        self.heap: list[tuple[float, int, int]] = []  # (regret, row, index of the choice)
        self.choices: dict[int, tuple[list[float], list[int]]] = {}

    def run(self) -> None:
        """Move rows until no prototype exceeds its capacity."""
        if self.excess:
            tiles = self.problem.tiles(self.g)
            self._add_choices((x, self._global_rows(part)) for part, x in tiles)
        waiting: list[int] = []
        while self.excess and (self.heap or waiting):
            if waiting and (not self.heap or len(waiting) > self.excess // WAITING_DIVISOR):
                self._renew_choices(waiting)
                continue
            _, row, rank = heapq.heappop(self.heap)
            source = int(self.labels[row])
            if self.free[source] >= 0:
                continue
            regrets, targets = self.choices[row]
            while rank < len(targets) and self.free[targets[rank]] <= 0:
                rank += 1  # a prototype that is full by now
            if rank == len(targets):
                waiting.append(row)
            elif self.heap and regrets[rank] > self.heap[0][0]:
                heapq.heappush(self.heap, (regrets[rank], row, rank))
            else:
                self._move(row, targets[rank])
        while self.excess:
            self._move_along_path()

    def _move(self, row: int, target: int) -> None:
        """Give a row the label `target`."""
        source = int(self.labels[row])
        self.excess += int(self.free[target] <= 0) - int(self.free[source] < 0)
        self.free[source] += 1
        self.free[target] -= 1
        self.labels[row] = target

    def _global_rows(self, part: slice) -> Tensor:
        """The indices of a chunk of this process, among the rows of all processes."""
        first, last = self.own_rows.start + part.start, self.own_rows.start + part.stop
        return torch.arange(first, last, dtype=torch.int64, device="cpu")

    def _add_choices(self, tiles: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add the choices of some (logits, rows) to the heap."""
        tables: Iterable[Tensor] = (self._choices(x, rows) for x, rows in tiles)
        if self.group is not None:  # one exchange, for any number of tiles of each process
            table = torch.cat([self._choices(*self._empty_tile()), *tables])
            tables = self._of_all_processes(table).split(4096)
        for table in tables:
            for row, *rest in table.tolist():
                costs, targets = rest[: len(rest) // 2], rest[len(rest) // 2 :]
                count = sum(cost < torch.inf for cost in costs)
                if count:
                    self.choices[int(row)] = costs[:count], [int(x) for x in targets[:count]]
                    heapq.heappush(self.heap, (costs[0], int(row), 0))

    def _choices(self, x: Tensor, rows: Tensor) -> Tensor:
        """[m, 1 + 2 CHOICES] float64: (row, regrets, prototypes) of the rows whose prototype has
        too many, for the best prototypes with free capacity.
        """
        free = _int_tensor(self.free)
        labels = self.labels[rows]
        surplus = ((labels >= 0) & (free[labels] < 0)).nonzero()[:, 0]
        candidates = (free > 0).nonzero()[:, 0]
        x = x.cpu()[surplus]
        best = x[:, candidates].topk(min(CHOICES, len(candidates)), 1)
        regrets = x.gather(1, labels[surplus, None]) - best.values
        targets = candidates[best.indices]
        return torch.cat([rows[surplus, None], regrets, targets], 1).double()

    def _empty_tile(self) -> tuple[Tensor, Tensor]:
        """(logits, rows) of no rows."""
        return self.g.new_empty(0, len(self.free)), _int_tensor([])

    def _of_all_processes(self, table: Tensor) -> Tensor:
        """The rows of the tables of all processes, in the order of the ranks."""
        if self.group is None:
            return table
        return distributed.gather_rows(table.to(self.g.device), self.group)[0].cpu()

    def _renew_choices(self, waiting: list[int]) -> None:
        """Compute the choices of the waiting rows again, and clear the list."""
        rows = _int_tensor(waiting)
        rows = rows[(rows >= self.own_rows.start) & (rows < self.own_rows.stop)]
        chunks = rows.split(max(1, TILE_ENTRIES // len(self.free)))
        start = self.own_rows.start
        self._add_choices((self.problem.logits(r - start, self.g), r) for r in chunks)
        waiting.clear()

    def _move_along_path(self) -> None:
        """Reduce the excess by one where forbidden pairs (-inf) allow no direct move: rows move
        along the cheapest path of prototypes, from one that has too many to one with free capacity.
        """
        regret, movers = self._cheapest_moves()
        k = len(self.free)
        free = _int_tensor(self.free)
        cost = torch.where(free < 0, 0.0, torch.inf).double()
        previous = torch.full_like(free, -1)
        for _ in range(k):  # Bellman-Ford: no path has more than k steps
            least = (cost[:, None] + regret).min(0)
            shorter = least.values < cost
            if not bool(shorter.any()):
                break
            cost = torch.where(shorter, least.values, cost)
            previous = torch.where(shorter, least.indices, previous)
        ends = torch.where(free > 0, cost, torch.inf)
        target = int(ends.argmin())
        if not bool(ends[target].isfinite()):
            raise ValueError(
                "strict: expected False where forbidden pairs (-inf) leave no labels of exact"
                " shares, got True"
            )
        while (source := int(previous[target])) >= 0:
            self._move(int(movers[source, target]), target)
            target = source

    def _cheapest_moves(self) -> tuple[Tensor, Tensor]:
        """(least regret, its row) of a move from one prototype to another, both [K, K]."""
        k = len(self.free)
        best = torch.empty((2, k, k), dtype=torch.float64, device="cpu")
        best[0], best[1] = torch.inf, -1.0
        for part, tile in self.problem.tiles(self.g):
            x, rows = tile.cpu().double(), self._global_rows(part)
            labels = self.labels[rows]
            for j in range(k):
                index = (labels == j).nonzero()[:, 0]
                if len(index):
                    least = (x[index, j][:, None] - x[index]).min(0)
                    move = torch.stack([least.values, rows[index[least.indices]].double()])
                    best[:, j] = torch.where(move[0] < best[0, j], move, best[:, j])
        first, *others = self._of_all_processes(best[None])
        for other in others:
            first = torch.where(other[0] < first[0], other, first)
        regret, movers = first
        regret.fill_diagonal_(torch.inf)
        # a row that moved before may have a negative regret: 0 instead, so that no path is a cycle
        return regret.clamp_(min=0.0), movers.long()
