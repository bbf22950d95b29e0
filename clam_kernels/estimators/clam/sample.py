# SPDX-License-Identifier: Apache-2.0
"""A sample of all rows that a stream has brought so far: each row is in it with equal probability.

Batches may come ordered, the rows of one class after those of another. What is computed from the
sample does not depend on that order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .points import Points, points_of

# The most rows of a sample.
ROWS, ROWS_PER_MEMORY = 2000, 100
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Sample:
    """Rows in a frame, NaN where an entry is missing; memories of a fit that stand for its rows."""

    rows: Tensor  # [M, D]
    weight: Tensor  # [M] float64
    keys: Tensor  # [M] float64 on the host: random numbers, of which the smallest are kept
    count: int  # rows so far, without those of the fit
    memories: Tensor  # [A, D]
    held: Tensor  # [A] float64, the weight of the rows that each of them stands for
    beside: Tensor  # [D] float64, the deviation of those rows beside their memories

    @classmethod
    def empty(cls, memories: Tensor, held: Tensor, deviation: Tensor) -> Sample:
        """A sample without rows; `deviation` [D] is that of the rows of the fit."""
        none = torch.zeros(0, dtype=torch.float64, device=held.device)
        keys = torch.zeros(0, dtype=torch.float64, device="cpu")
        share = held[:, None] / held.sum().clamp(min=_TINY)
        wide = memories.double()
        between = ((wide - (wide * share).sum(0)).square() * share).sum(0)
        beside = (deviation.square() - between).clamp(min=0).sqrt()
        return cls(memories[:0], none, keys, 0, memories, held, beside)

    @property
    def rows_per_row(self) -> float:
        """How many rows of the stream each row of the sample stands for."""
        return max(self.count, 1) / max(len(self.rows), 1)

    def shifted(self, by: Tensor) -> Sample:
        """The sample in a frame whose mean is moved."""
        rows, memories = ((x.double() - by).to(x.dtype) for x in (self.rows, self.memories))
        return dataclasses.replace(self, rows=rows, memories=memories)

    def stretched(self, by: Tensor) -> Sample:
        """The sample in a frame whose columns are multiplied."""
        rows, memories = ((x.double() * by).to(x.dtype) for x in (self.rows, self.memories))
        return dataclasses.replace(self, rows=rows, memories=memories, beside=self.beside * by)

    def table(self, z: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """(rows [N, D] in float64, weights [N]) with the moments of all rows so far, those of a
        batch z among them; two rows stand for the rows of a memory of a fit.
        """
        memories, half = self.memories.double(), self.held / 2
        rows = [self.rows.double(), memories - self.beside, memories + self.beside, z.double()]
        own = torch.ones(len(z), dtype=torch.float64, device=z.device) if weight is None else weight
        return torch.cat(rows), torch.cat([self.weight * self.rows_per_row, half, half, own])

    def with_rows(self, points: Points, k: int, random: np.random.Generator) -> Sample:
        """The sample after more rows of the stream."""
        z = points.z if points.seen is None else points.z.masked_fill(~points.seen, torch.nan)
        drawn = torch.from_numpy(random.random(len(z)))
        keys = torch.cat([self.keys, drawn])
        kept = keys.sort().indices[: max(ROWS, ROWS_PER_MEMORY * k)].sort().values
        there = kept.to(z.device)
        return dataclasses.replace(
            self,
            rows=torch.cat([self.rows.to(z.dtype), z])[there],
            weight=torch.cat([self.weight, points.share])[there],
            keys=keys[kept],
            count=self.count + len(z),
        )

    def points(self, precision: str | None) -> Points:
        """The sample for a search; the memories of a fit weigh as much beside it as the rows of
        the fit beside the stream.
        """
        if not bool((self.held > 0).any()) and bool((self.weight == 1).all()):
            return points_of(self.rows, None, precision)
        rows = torch.cat([self.rows, self.memories.to(self.rows.dtype)])
        weight = torch.cat([self.weight, self.held / self.rows_per_row])
        return points_of(rows, weight, precision)
