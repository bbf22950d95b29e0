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
