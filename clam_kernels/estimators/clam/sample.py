# SPDX-License-Identifier: Apache-2.0
"""A sample of all rows of a stream so far: each row is in it with equal probability.

Batches may be ordered, the rows of one class after those of another. The sample does not depend on
that order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.columns import TINY
from .points import Points, points_of

# A sample has at most the larger of these numbers of rows.
ROWS, ROWS_PER_MEMORY = 2000, 100


@dataclass(frozen=True)
class StreamSample:
    """Rows in a frame, NaN where an entry is missing; and the memories of a fit before the stream,
    which represent its rows.
    """

    rows: Tensor  # [M, D]
    weight: Tensor  # [M] float64
    keys: Tensor  # [M] float64 on the CPU: random numbers; the rows with the smallest ones stay
    count: int  # rows so far, without those of the fit
    memories: Tensor  # [A, D]
    won: Tensor  # [A] float64, the weight of the rows that each memory represents
    spread: Tensor  # [D] float64, the deviation of those rows from their memories

    @classmethod
    def empty(cls, memories: Tensor, won: Tensor, deviation: Tensor) -> StreamSample:
        """A sample without rows; `deviation` [D] is that of the rows of the fit."""
        weight = torch.zeros(0, dtype=torch.float64, device=won.device)
        keys = torch.zeros(0, dtype=torch.float64, device="cpu")
        share = won[:, None] / won.sum().clamp(min=TINY)
        rho = memories.double()
        between = ((rho - (rho * share).sum(0)).square() * share).sum(0)
        spread = (deviation.square() - between).clamp(min=0).sqrt()
        return cls(memories[:0], weight, keys, 0, memories, won, spread)

    @property
    def rows_per_row(self) -> float:
        """How many rows of the stream each row of the sample represents."""
        return max(self.count, 1) / max(len(self.rows), 1)

    def move(self, shift: Tensor) -> StreamSample:
        """The sample in a frame whose mean is moved by `shift`."""
        rows, memories = ((x.double() - shift).to(x.dtype) for x in (self.rows, self.memories))
        return dataclasses.replace(self, rows=rows, memories=memories)

    def stretch(self, factor: Tensor) -> StreamSample:
        """The sample in a frame whose columns are multiplied by `factor` [D]."""
        rows, memories = ((x.double() * factor).to(x.dtype) for x in (self.rows, self.memories))
        spread = self.spread * factor
        return dataclasses.replace(self, rows=rows, memories=memories, spread=spread)

    def table(self, z: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """(rows [N, D] in float64, weights [N]) with the moments of all rows so far and of a batch.

        Two rows represent the rows of each memory of a fit.
        """
        memories, half = self.memories.double(), self.won / 2
        rows = [self.rows.double(), memories - self.spread, memories + self.spread, z.double()]
        own = torch.ones(len(z), dtype=torch.float64, device=z.device) if weight is None else weight
        return torch.cat(rows), torch.cat([self.weight * self.rows_per_row, half, half, own])

    def with_rows(self, points: Points, k: int, random: np.random.Generator) -> StreamSample:
        """The sample after more rows of the stream."""
        z = points.z
        if points.observed is not None:
            z = z.masked_fill(~points.observed, torch.nan)
        keys = torch.cat([self.keys, torch.from_numpy(random.random(len(z)))])
        index = keys.sort().indices[: max(ROWS, ROWS_PER_MEMORY * k)].sort().values
        device_index = index.to(z.device)
        return dataclasses.replace(
            self,
            rows=torch.cat([self.rows.to(z.dtype), z])[device_index],
            weight=torch.cat([self.weight, points.weights])[device_index],
            keys=keys[index],
            count=self.count + len(z),
        )

    def points(self, precision: str | None) -> Points:
        """The rows and memories of the sample for a search. The memories of a fit have the share of
        the weight that the rows of the fit have of all rows.
        """
        if not bool((self.won > 0).any()) and bool((self.weight == 1).all()):
            return points_of(self.rows, None, precision)
        rows = torch.cat([self.rows, self.memories.to(self.rows.dtype)])
        weight = torch.cat([self.weight, self.won / self.rows_per_row])
        return points_of(rows, weight, precision)
