# SPDX-License-Identifier: Apache-2.0
"""Operands of a launch: batch dims of any kind as two dims with strides, never copied where strides
can say it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def batch_of(operands: Sequence[tuple[Tensor, int]]) -> tuple[int, ...]:
    """Broadcast of the leading dims of `(tensor, core dims)`."""
    return tuple(
        torch.broadcast_shapes(*(x.shape[: max(x.ndim - core, 0)] for x, core in operands))
    )


def arrange(batch: Sequence[int], operands: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Views [O, I, *core] of `(tensor [*any, *core], core dims)`; O x I is the whole batch.

    Stride 0 stands where an operand is shared. Neighbouring batch dims are merged where the strides
    of all operands allow it; only if more than two remain are the operands that need it copied.
    """
    views = []
    for x, core in operands:
        while x.ndim < core:
            x = x[None]
        views.append(x.expand(*batch, *x.shape[x.ndim - core :]))
    groups = _merged(batch, [v.stride()[: len(batch)] for v in views])
    if len(groups) > 2:
        return [v.reshape(1, math.prod(batch), *v.shape[len(batch) :]) for v in views]
    sizes = [1] * (2 - len(groups)) + [size for size, _ in groups]
    found = []
    for i, (view, (_, core)) in enumerate(zip(views, operands, strict=True)):
        strides = [0] * (2 - len(groups)) + [stride[i] for _, stride in groups]
        tail = view.ndim - core
        found.append(
            view.as_strided((*sizes, *view.shape[tail:]), (*strides, *view.stride()[tail:]))
        )
    return found


def _merged(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Batch dims as few `(size, strides of the operands)` as possible, outermost first."""
    groups: list[tuple[int, list[int]]] = []
    for at in reversed(range(len(sizes))):
        if sizes[at] == 1:
            continue
        here = [s[at] for s in strides]
        if groups:
            size, inner = groups[0]
            if all(a == b * size for a, b in zip(here, inner, strict=True)):
                groups[0] = (sizes[at] * size, inner)
                continue
        groups.insert(0, (sizes[at], here))
    return groups
