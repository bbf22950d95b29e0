# SPDX-License-Identifier: Apache-2.0
"""Row chunks, and the budgets of the CPU code: how many entries of an array it computes at once.

An operand is `[*batch, *core]` with as many leading dims as the broadcast batch. A dim that
problems share has size 1, so no operand is expanded. A `BatchCell` is one index of all batch
dims but the last, and a slice of the last; the chunked functions compute one with 3-D tensors
`[problems, rows, .]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class RowBounds(NamedTuple):
    """The least and the most rows of one chunk."""

    least: int
    most: int


# Budgets are numbers of entries.
# One tile of scores [rows, K]: the tile and its softmax then fit in a second-level cache of 2 MB.
TILE_ENTRIES = 1 << 18
# One tile of float64: the same bytes as TILE_ENTRIES in float32.
FLOAT64_TILE_ENTRIES = 1 << 17
# An array of float64 in k-means (differences of rows in doubt, rows of a sum): 2 MB.
FLOAT64_ENTRIES = 1 << 18
# A tile of k-means with the least rows may exceed TILE_ENTRIES, but not this: 32 MB of float32.
MAX_TILE_ENTRIES = 1 << 23
# What a backward saves of one chunk: its states, and its weights if they fit. 16 MB of float32.
SAVED_ENTRIES = 1 << 22
# N x K x D of a k-means problem: up to this, the equation is faster than chunks.
SMALL_PROBLEM_ENTRIES = 1 << 15
# Fewer rows would load the K memories or centroids too often. More rows would make tiles [rows, D]
# large where K is small.
AM_ROWS = RowBounds(128, 1 << 15)
DEC_ROWS = RowBounds(32, 1 << 13)
KMEANS_ROWS = RowBounds(256, 1 << 12)
# The scores [views, rows, K] of a chunk of swapped_prediction with all prototypes, and the most of
# a chunk of VIEWS_ROWS.least rows. Beyond, a chunk has at most VIEWS_ROWS.most rows, and its tiles
# of prototypes have VIEWS_TILE_ENTRIES entries.
VIEWS_ENTRIES, MAX_VIEWS_ENTRIES = 1 << 17, 1 << 21
VIEWS_TILE_ENTRIES = 1 << 20
VIEWS_ROWS = RowBounds(64, 512)
# No budget, however small, makes a chunk shorter than this.
FEWEST_ROWS = 16
# Rows in doubt of am that one product computes in float64 at least; their tile is padded to this.
FEWEST_ROWS_IN_DOUBT = 32


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


class BatchCell(NamedTuple):
    """One index of the leading batch dims, and a slice of the last one."""

    lead: tuple[int, ...]
    batch: slice

    @property
    def size(self) -> int:
        return int(self.batch.stop - self.batch.start)


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """The common shape of operands that broadcast. `torch.broadcast_shapes` imports sympy at its
    first call: that takes a second, and if Ctrl-C interrupts it, every later call fails.
    """
    batch: list[int] = []
    for shape in shapes:
        batch = [1] * (len(shape) - len(batch)) + batch
        for i in range(1, len(shape) + 1):
            if shape[-i] == batch[-i] or shape[-i] == 1:
                continue
            if batch[-i] != 1:
                raise RuntimeError(f"shapes: expected shapes that broadcast, got {shapes}")
            batch[-i] = shape[-i]
    return torch.Size(batch)


def rows_within(bounds: RowBounds, rows: int) -> int:
    """`rows`, or the nearest number inside the bounds."""
    return max(bounds.least, min(bounds.most, rows))


def chunk_rows(width: int, saved: int = 0) -> int:
    """Rows of one chunk with tiles [rows, width], where a backward saves `saved` entries of each
    row.
    """
    rows = rows_within(AM_ROWS, TILE_ENTRIES // max(width, 1))
    return max(FEWEST_ROWS, min(rows, SAVED_ENTRIES // max(saved, 1)))


def cells(batch: Sequence[int], rows: int, limit: int, core: int) -> Iterator[BatchCell]:
    """Batch cells that cover `batch`. Several problems share one if their `rows` are fewer than
    the `limit` rows of a chunk, and if their sums over rows, `core` entries each, fit the budget.
    """
    *lead, last = batch or (1,)
    run = max(1, min(limit // max(rows, 1), SAVED_ENTRIES // max(core, 1)))
    for index in product(*map(range, lead)):
        for start in range(0, last, run):
            yield BatchCell(index, slice(start, min(start + run, last)))


def row_chunks(rows: int, limit: int) -> Iterator[slice]:
    """Slices of at most `limit` rows that cover `rows`."""
    for start in range(0, rows, limit):
        yield slice(start, min(start + limit, rows))


def add_batch_dims(operand: Tensor, batch_dims: int, core_dims: int) -> Tensor:
    """View of `operand` with exactly max(1, `batch_dims`) leading dims."""
    missing = max(batch_dims, 1) + core_dims - operand.ndim
    return operand.reshape((1,) * missing + tuple(operand.shape))


def take(operand: Tensor, cell: BatchCell, rows: slice | None = None) -> Tensor:
    """The 3-D part of an operand for one cell, and for one chunk of its rows; `operand` comes from
    `add_batch_dims`.
    """
    for index in cell.lead:
        operand = operand[index if operand.shape[0] > 1 else 0]
    if operand.shape[0] > 1:
        operand = operand[cell.batch]
    if rows is not None and operand.shape[1] > 1:
        operand = operand[:, rows]
    return operand


class GradientSum:
    """Gradient of one operand: sum over the problems that share it, in a fixed order.

    `batched` is the operand with the dims of `add_batch_dims`; `dtype` is that of the sum.
    """

    def __init__(self, operand: Tensor, batched: Tensor, dtype: torch.dtype) -> None:
        self.operand = operand
        self.total = torch.zeros(batched.shape, dtype=dtype, device=operand.device)

    def of_problem(self, index: tuple[int, ...]) -> Tensor:
        """A view of the sum: the part of the problem with this index in the batch."""
        part = self.total
        for i in index or (0,):
            part = part[i if part.shape[0] > 1 else 0]
        return part

    def add(self, cell: BatchCell, value: Tensor, rows: slice | None = None) -> None:
        part = take(self.total, cell, rows)
        part += value.sum_to_size(part.shape)

    def result(self) -> Tensor:
        return self.total.reshape(self.operand.shape).to(self.operand.dtype)
