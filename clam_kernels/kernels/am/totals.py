# SPDX-License-Identifier: Apache-2.0
"""Sums over rows for the gradients of the memories, over all launches of a backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class MemoryTotals:
    """Sums [O, I, K, D + 2] float64 for the gradients of memories, log-weights and betas; a batch
    dim is 1 where all its problems share the memories.
    """

    def __init__(
        self,
        lead: Sequence[int],
        memories: int,
        features: int,
        batch: Sequence[int],
        memory_batch: Sequence[int],
        device: torch.device,
    ) -> None:
        self.features, self.batch, self.memory_batch = features, batch, memory_batch
        shape = (*lead, memories, features + 2)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)

    def of_problems(self, o: int, problems: slice) -> Tensor:
        """The sums of problems of one outer index [., K, D + 2], one for all if they share it."""
        row = self.total[o if self.total.shape[0] > 1 else 0]
        return row[problems] if row.shape[0] > 1 else row

    def add(self, o: int, problems: slice, part: Tensor, sums: Tensor) -> None:
        """Add the partial sums of some problems, [problems, splits, K, D or more] and [problems,
        splits, K, 2].
        """
        total, d = self.of_problems(o, problems), self.features
        for columns, parts in ((total[..., :d], part[..., :d]), (total[..., d:], sums)):
            columns += parts.sum(1, dtype=torch.float64).sum_to_size(columns.shape)

    def of_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(acc [..., K, D], mass [..., K], beta_sum [..., K]) over the memories' own batch; the
        kernel that fills them says what they are.
        """
        batch, core = torch.Size(self.memory_batch), self.total.shape[2:]
        if self.total.shape[:2].numel() == batch.numel():
            sums = self.total.reshape(*batch, *core)
        else:
            sums = self.total.reshape(*self.batch, *core).sum_to_size(*batch, *core)
        return sums[..., : self.features], sums[..., -2], sums[..., -1]
