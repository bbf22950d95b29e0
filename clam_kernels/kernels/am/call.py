# SPDX-License-Identifier: Apache-2.0
"""The launchers of the associative-memory family share this: one call's operands as the kernels
read them, and cells of bounded scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import launch
from ..common.operands import arrange, batch_of, by_name, in_rows
from . import exact
from .memories import memories
from .totals import MemoryTotals

MASK_STRIDES = ("u_o", "u_i", "u_row", "u_feature")


class Views(NamedTuple):
    """Operands of one launch as views [O, I, ...], and as arguments of its kernel."""

    v: Tensor
    mask: Tensor | None
    table: Tensor
    side: Tensor
    centre: Tensor

    def rows(self) -> dict[str, Any]:
        """The rows; batch strides in rows."""
        v_o, v_i = in_rows(self.v, self.v.shape[-1])
        return {"V": self.v, "v_o": v_o, "v_i": v_i}

    def memories(self) -> dict[str, Any]:
        """The tables without the centre; batch strides in problems."""
        m_o, m_i = (step // self.centre.shape[-1] for step in self.centre.stride()[:2])
        return {"RHO": self.table, "SIDE": self.side, "m_o": m_o, "m_i": m_i}

    def update_mask(self) -> dict[str, Any]:
        """The update mask, if the call has one."""
        strides = None if self.mask is None else self.mask.stride()
        return {"U": self.mask, **by_name(MASK_STRIDES, strides), "MASK": self.mask is not None}


class Call:
    """Operands of one call as views [O, I, ...]; without a batch of memories all rows are one
    problem.
    """

    def __init__(
        self,
        v: Tensor,
        rho: Tensor,
        beta: float | Tensor,
        update_mask: Tensor | None,
        log_weights: Tensor | None,
        precision: str,
    ) -> None:
        operands = [(v, 2), (rho, 2)]
        operands += [(x, 1) for x in (beta, log_weights) if isinstance(x, Tensor)]
        if update_mask is not None:
            update_mask = _full(update_mask, v)
            operands.append((update_mask, 2))
        self.batch = batch_of(operands)
        self.shape = (*self.batch, *v.shape[-2:])
        self.features, self.mode, self.device = v.shape[-1], precision, v.device
        self.memories = memories(rho, beta, log_weights)
        self._arguments = (v, rho, beta, update_mask, log_weights)
        self.masked = update_mask is not None
        self.views = self._arrange(launch.rows(v), update_mask)
        self.outer, self.inner, self.rows = self.views.v.shape[:3]

    def _arrange(self, v: Tensor, mask: Tensor | None) -> Views:
        table, side, centre = self.memories[:3]
        large = [v] if mask is None else [v, mask]
        if table.shape[:-2].numel() == 1:
            flat = arrange((*self.batch, v.shape[-2]), [(x, 1) for x in large])
            if flat[0].shape[0] == 1 and flat[0].stride(1) == self.features:
                table, side = (x.reshape(1, 1, *x.shape[-2:]) for x in (table, side))
                u = None if mask is None else flat[1][None]
                return Views(flat[0][None], u, table, side, centre.reshape(1, 1, -1))
        small = [(table, 2), (side, 2), (centre, 1)]
        views = arrange(self.batch, [*((x, 2) for x in large), *small])
        table, side, centre = views[-3:]
        return Views(views[0], None if mask is None else views[1], table, side, centre)

    def operands(self) -> exact.Operands:
        """The caller's own arguments, for the launch that computes rows in doubt again."""
        return exact.operands(*self._arguments)

    def settings(self, kernel: str) -> dict[str, Any]:
        """Tile and options of a kernel for this call."""
        return launch.settings(kernel, self.device, self.mode, self.features)

    def totals(self) -> MemoryTotals:
        """Sums for the gradients of the memories, all 0."""
        table = self.views.table
        lead = [n if table.stride(i) else 1 for i, n in enumerate(table.shape[:2])]
        batch = self.memories.table.shape[:-2]
        return MemoryTotals(
            lead, self.memories.size, self.features, self.batch, batch, self.device
        )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return launch.empty(shape, dtype, self.device)

    def cells(
        self, blocks: int, limit: int, most: int = 1 << 16
    ) -> Iterator[tuple[int, slice, int, int]]:
        """`(o, run of i, first block, blocks)`: at most `most` whole problems, or a part of one,
        `limit` blocks a cell.
        """
        run = max(1, min(most, limit // max(blocks, 1)))
        for o in range(self.outer if blocks else 0):
            for i in range(0, self.inner, run):
                problems = slice(i, min(i + run, self.inner))
                for first in range(0, blocks, limit):
                    yield o, problems, first, min(limit, blocks - first)

    def at(self, o: int, problems: slice) -> Views:
        """The operands of one cell."""
        v, mask, *rest = self.views
        table, side, centre = (x[o : o + 1, problems] for x in rest)
        u = None if mask is None else mask[o : o + 1, problems]
        return Views(v[o : o + 1, problems], u, table, side, centre)

    def recursion(self, keep: int) -> dict[str, Any]:
        """Tile and options of the recursion. A mask, a beta per memory and saved states cost
        registers: a call without any of them has a tile of its own.
        """
        plain = keep == 0 and not self.masked and not self.memories.per_memory
        if self.memories.hard:  # the lowest products leave many rows in doubt, which cost more
            mode = "high" if self.mode == "medium" else self.mode
            return launch.settings("am_recursion_full", self.device, mode, self.features)
        return self.settings("am_recursion" if plain else "am_recursion_full")

    def tile(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Constants of a kernel over these operands; DIM is a row unless `settings` has it."""
        width = {"DIM": launch.dim(self.features)}
        return {"D": self.features, "STRIDE": self.memories.stride, **width, **settings}


def _full(mask: Tensor, v: Tensor) -> Tensor:
    """A mask expanded to [..., N, D]; a bool mask as bytes."""
    lead = mask.shape[:-2] if mask.ndim > 2 else ()
    mask = mask.expand(*lead, *v.shape[-2:])
    return mask.view(torch.uint8) if mask.dtype == torch.bool else launch.plain(mask)


class ScratchCell(NamedTuple):
    """A run of problems of one outer index, `blocks` blocks of rows of each from block `first` on,
    and the scratch that they share.
    """

    o: int
    problems: slice
    first: int
    blocks: int
    block: int  # rows of a block, a multiple of the tiles of both kernels over rows
    path: Tensor  # [T, size * rows, stride]: the states
    pull: Tensor  # the same shape: the recalls, then h
    top: Tensor  # [T, size * rows]: the largest logit
    total: Tensor  # the same shape: the sum of the weights relative to it
    delta: Tensor  # the same shape

    @property
    def size(self) -> int:
        """How many problems."""
        return int(self.problems.stop - self.problems.start)

    @property
    def rows(self) -> int:
        """Rows of scratch for each problem."""
        return self.blocks * self.block

    def grid(self, tile: int) -> tuple[tuple[int], int, int]:
        """(grid, first block, blocks of a problem) of a kernel whose program takes `tile` rows."""
        share = self.block // tile
        return (self.size * self.blocks * share,), self.first * share, self.blocks * share
