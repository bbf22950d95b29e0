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
    """Index of every problem of a batch, and each operand's part in it; nothing is copied."""
    wide = [
        None if o is None else o.expand([*batch, *o.shape[o.ndim - core :]]) for o, core in operands
    ]
    for at in product(*map(range, batch)):
        yield at, [None if o is None else o[at] for o in wide]  # type: ignore[misc]
