# SPDX-License-Identifier: Apache-2.0
"""The problems of a batch, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor


def problems(
    batch: torch.Size, *operands: tuple[Tensor | None, int]
) -> Iterator[tuple[tuple[int, ...], list[Tensor]]]:
    """The index of every problem of a batch, and its view of each operand; an operand is a pair
    (tensor, dims of one problem).
    """
    views = [
        None if o is None else o.expand([*batch, *o.shape[o.ndim - core :]]) for o, core in operands
    ]
    for index in product(*map(range, batch)):
        yield index, [None if o is None else o[index] for o in views]  # type: ignore[misc]


def part_index(x: Tensor, at: tuple[int, ...], core: int) -> tuple[int, ...]:
    """The index of one problem's part of a tensor whose last `core` dims belong to a problem;
    problems share it along a batch dim that is 1 or missing.
    """
    batch = x.shape[: max(x.ndim - core, 0)]
    index = at[len(at) - len(batch) :]
    return tuple(0 if size == 1 else j for size, j in zip(batch, index, strict=True))
