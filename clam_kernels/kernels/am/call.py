# SPDX-License-Identifier: Apache-2.0
"""What the launchers of the associative-memory family share: one call's operands as the kernels
read them, cells of bounded scratch, sums over rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import launch
from ..common.operands import arrange, batch_of, in_rows
from . import exact
from .memories import memories


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
        self._given = (v, rho, beta, update_mask, log_weights)
        self.masked = update_mask is not None
        self.v, self.u, *self.tables = self._views(launch.rows(v), update_mask)
        self.outer, self.inner, self.rows = self.v.shape[:3]

    def _views(self, v: Tensor, mask: Tensor | None) -> list[Any]:
        table, side, centre = self.memories[:3]
        u = v if mask is None else mask
        if table.shape[:-2].numel() == 1:
            flat = arrange((*self.batch, v.shape[-2]), [(v, 1), (u, 1)])
            if flat[0].shape[0] == 1 and flat[0].stride(1) == self.features:
                shared = [x.reshape(1, 1, *x.shape[-n:]) for x, n in ((table, 2), (side, 2))]
                return [x[None] for x in flat] + [*shared, centre.reshape(1, 1, -1)]
        return arrange(self.batch, [(v, 2), (u, 2), (table, 2), (side, 2), (centre, 1)])

    def given(self) -> exact.Operands:
        """The arguments as they are, for rows that are computed again."""
        return exact.operands(*self._given)

    def settings(self, kernel: str) -> dict[str, Any]:
        """Tile and options of a kernel for this call."""
        return launch.settings(kernel, self.device, self.mode, self.features)

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

    def at(self, o: int | None = None, problems: slice | None = None) -> tuple[Any, ...]:
        """(v, rho, side, centre, u), the batch strides of v in rows and of the memories in
        problems, those of u; of one cell or of all.
        """
        views = [self.v, self.u, *self.tables]
        if o is not None and problems is not None:
            views = [x[o : o + 1, problems] for x in views]
        v, u, table, side, centre = views
        m = [s // centre.shape[-1] for s in centre.stride()[:2]]
        return (v, table, side, centre, u), (*in_rows(v, self.features), *m), u.stride()

    def recursion(self, keep: int) -> dict[str, Any]:
        """Of the recursion: options cost registers, so without any there is a tile of its own."""
        plain = keep == 0 and not self.masked and not self.memories.per_memory
        if self.memories.hard:  # not the lowest products: what they leave open is expensive
            mode = "high" if self.mode == "medium" else self.mode
            return launch.settings("am_recursion_full", self.device, mode, self.features)
        return self.settings("am_recursion" if plain else "am_recursion_full")

    def tile(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """Constants of a kernel over these operands; DIM holds a whole row unless it is chosen."""
        width = {"DIM": launch.dim(self.features)}
        return {"D": self.features, "STRIDE": self.memories.stride, **width, **chosen}


def _full(mask: Tensor, v: Tensor) -> Tensor:
    """A mask [..., N, D] by strides, in bytes if it is of bits."""
    lead = mask.shape[:-2] if mask.ndim > 2 else ()
    mask = mask.expand(*lead, *v.shape[-2:])
    return mask.view(torch.uint8) if mask.dtype == torch.bool else launch.plain(mask)


class Totals:
    """Sums of the memories' side, [O, I, K, .] float64, 1 where all problems share the memories."""

    def __init__(self, call: Call) -> None:
        self.call = call
        table = call.tables[0]
        lead = [n if table.stride(i) else 1 for i, n in enumerate(table.shape[:2])]
        count, stride = table.shape[2:]
        wide: dict[str, Any] = {"dtype": torch.float64, "device": call.device}
        self.acc = torch.zeros((*lead, count, stride), **wide)
        self.sums = torch.zeros((*lead, count, 2), **wide)

    def add(self, o: int, problems: slice, part: Tensor, sums: Tensor) -> None:
        """Partials [problems, splits, K, .] of one cell."""
        for total, found in ((self.acc, part), (self.sums, sums)):
            row = total[o if total.shape[0] > 1 else 0]
            found = found.sum(1, dtype=torch.float64)
            if row.shape[0] > 1:
                row[problems] += found
            else:
                row[0] += found.sum(0)

    def of_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(acc [..., K, D], mass [..., K], heat [..., K]) over the memories' own batch."""
        batch, whole = self.call.memories.table.shape[:-2], self.call.batch
        found = []
        for total in (self.acc[..., : self.call.features], self.sums):
            core = total.shape[2:]
            if total.shape[:2].numel() == batch.numel():
                found.append(total.reshape(*batch, *core))
            else:
                found.append(total.reshape(*whole, *core).sum_to_size(*batch, *core))
        return found[0], found[1][..., 0], found[1][..., 1]


class Cell(NamedTuple):
    """A run of problems of one outer index, `blocks` blocks of each from block `first`, and its
    scratch.
    """

    o: int
    problems: slice
    first: int
    blocks: int
    block: int  # rows of a block, a multiple of what either kernel of the rows takes
    path: Tensor  # [T, size * rows, stride], as pull
    pull: Tensor
    top: Tensor  # [T, size * rows], as total and delta
    total: Tensor
    delta: Tensor

    @property
    def size(self) -> int:
        """Problems."""
        return int(self.problems.stop - self.problems.start)

    @property
    def rows(self) -> int:
        """Rows of scratch for each problem."""
        return self.blocks * self.block

    def grid(self, tile: int) -> tuple[tuple[int], int, int]:
        """(grid, first block, blocks a problem) of a kernel that takes `tile` rows."""
        share = self.block // tile
        return (self.size * self.blocks * share,), self.first * share, self.blocks * share
