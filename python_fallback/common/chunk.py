# SPDX-License-Identifier: Apache-2.0
"""Row chunking: the one place that turns a budget into chunk sizes, and the only loop over chunks.

An operand is `[*batch, *core]` with as many leading dims as the broadcast batch (size 1 where it
is shared), so that nothing is ever expanded in memory. A `Cell` is one index of all batch dims but
the last and a run of the last; inside it the chunked code works on 3-D tensors `[batch, rows, .]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of one rows x K tile: a score tile and its softmax then fit in a 2 MB second-level cache.
TILE_ENTRIES = 1 << 18
MIN_ROWS, MAX_ROWS = 128, 32768
# What a backward may keep of one chunk's trajectory (states, and weights when they fit).
KEPT_ENTRIES = 1 << 22


def padded(size: int, to: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // to) * to


class Cell(NamedTuple):
    """One index of the leading batch dims and a run of the last one."""

    lead: tuple[int, ...]
    batch: slice

    @property
    def size(self) -> int:
        return int(self.batch.stop - self.batch.start)


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """The shape that shapes broadcast to. `torch.broadcast_shapes` imports sympy at its first call,
    which takes a second; after Ctrl-C in the middle of it every later call fails.
    """
    batch: list[int] = []
    for shape in shapes:
        batch = [1] * (len(shape) - len(batch)) + batch
        for i in range(1, len(shape) + 1):
            if shape[-i] == batch[-i] or shape[-i] == 1:
                continue
            if batch[-i] != 1:
                raise RuntimeError(f"shapes: expected ones that broadcast, got {shapes}")
            batch[-i] = shape[-i]
    return torch.Size(batch)


def chunk_rows(width: int, kept: int = 0) -> int:
    """Rows of one chunk whose tiles are `width` wide, with `kept` entries a row held beside
    them.
    """
    rows = max(MIN_ROWS, min(MAX_ROWS, TILE_ENTRIES // max(width, 1)))
    return max(16, min(rows, KEPT_ENTRIES // max(kept, 1)))


def cells(batch: Sequence[int], rows: int, limit: int, core: int) -> Iterator[Cell]:
    """Cells that cover `batch`; several problems share one where `rows` is far below `limit` and
    the `core` entries a problem sums over its rows stay within the budget.
    """
    *lead, last = batch or (1,)
    run = max(1, min(limit // max(rows, 1), KEPT_ENTRIES // max(core, 1)))
    for index in product(*map(range, lead)):
        for start in range(0, last, run):
            yield Cell(index, slice(start, min(start + run, last)))


def row_chunks(rows: int, limit: int) -> Iterator[slice]:
    """Slices of at most `limit` rows that cover `rows`."""
    for start in range(0, rows, limit):
        yield slice(start, min(start + limit, rows))


def lift(operand: Tensor, batch_dims: int, core_dims: int) -> Tensor:
    """View of `operand` with exactly max(1, `batch_dims`) leading dims."""
    missing = max(batch_dims, 1) + core_dims - operand.ndim
    return operand.reshape((1,) * missing + tuple(operand.shape))


def take(operand: Tensor, cell: Cell, rows: slice | None = None) -> Tensor:
    """The 3-D part of a lifted operand that belongs to a cell (and to a chunk of its rows)."""
    for index in cell.lead:
        operand = operand[index if operand.shape[0] > 1 else 0]
    if operand.shape[0] > 1:
        operand = operand[cell.batch]
    if rows is not None and operand.shape[1] > 1:
        operand = operand[:, rows]
    return operand


class GradientSum:
    """Gradient of one operand, summed back to the operand's own shape in a fixed order."""

    def __init__(self, operand: Tensor, lifted: Tensor, dtype: torch.dtype) -> None:
        self.operand = operand
        self.total = torch.zeros(lifted.shape, dtype=dtype, device=operand.device)

    def add(self, cell: Cell, value: Tensor, rows: slice | None = None) -> None:
        part = take(self.total, cell, rows)
        part += value.sum_to_size(part.shape)

    def result(self) -> Tensor:
        return self.total.reshape(self.operand.shape).to(self.operand.dtype)
