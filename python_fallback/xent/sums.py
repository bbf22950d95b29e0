# SPDX-License-Identifier: Apache-2.0
"""Sums over rows of outer products, for the gradients of prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows whose sum float32 holds: after as many, the sum is added to a float64 total.
FLUSH_ROWS = 8192


class RowSums:
    """`sum_i w_ij x_i` [K, D], chunk after chunk: float32 products, and a float64 total from
    FLUSH_ROWS rows on.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums  # zeros [K, D], which receive the sums
        self.total: Tensor | None = None
        self.rows: dict[int, int] = {}

    def add(self, columns: slice, weights: Tensor, rows: Tensor) -> None:
        """Add weights [rows, columns] times rows [rows, D] to the prototypes `columns`."""
        part = self.sums[columns]
        part.addmm_(weights.t(), rows)
        count = self.rows.get(columns.start, 0) + len(rows)
        if count >= FLUSH_ROWS and part.dtype != torch.float64:
            self._wide()[columns] += part
            part.zero_()
            count = 0
        self.rows[columns.start] = count

    def _wide(self) -> Tensor:
        if self.total is None:
            self.total = torch.zeros_like(self.sums, dtype=torch.float64)
        return self.total

    def result(self) -> Tensor:
        """The sums, in the dtype of the products."""
        if self.total is not None:
            self.sums.copy_(self.total.add_(self.sums))
        return self.sums
