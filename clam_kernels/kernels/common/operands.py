# SPDX-License-Identifier: Apache-2.0
"""Operands of a launch: all batch dims as two dims with strides, without a copy where strides
suffice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..._core import checks


def batch_of(operands: Sequence[tuple[Tensor, int]]) -> tuple[int, ...]:
    """Broadcast of the leading dims of `(tensor, core dims)`."""
    # not torch.broadcast_shapes, which imports sympy at its first call
    return tuple(checks.broadcast([("operand", x, core) for x, core in operands]))


def arrange(batch: Sequence[int], operands: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Views [O, I, *core] of `(tensor [*any, *core], core dims)`; O x I is the whole batch.

    Stride 0 stands where an operand is shared. Neighbouring batch dims are merged where the strides
    of all operands allow it; only if more than two remain are the operands that need it copied.
    """
    tensors = [(_with_dims(x, core), core) for x, core in operands]
    if not batch:  # nothing to expand, nothing to merge
        return [x.as_strided((1, 1, *x.shape), (0, 0, *x.stride())) for x, _ in tensors]
    views = [x.expand(*batch, *x.shape[x.ndim - core :]) for x, core in tensors]
    groups = _merge_dims(batch, [v.stride()[: len(batch)] for v in views])
    if len(groups) > 2:
        return [v.reshape(1, math.prod(batch), *v.shape[len(batch) :]) for v in views]
    sizes = [1] * (2 - len(groups)) + [size for size, _ in groups]
    result = []
    for i, (view, (_, core)) in enumerate(zip(views, operands, strict=True)):
        strides = [0] * (2 - len(groups)) + [stride[i] for _, stride in groups]
        tail = view.ndim - core
        result.append(
            view.as_strided((*sizes, *view.shape[tail:]), (*strides, *view.stride()[tail:]))
        )
    return result


def in_rows(view: Tensor, d: int) -> tuple[int, ...]:
    """Batch strides of dense rows [O, I, N, D], in rows. A kernel multiplies them by D: the
    compiler derives the alignment of its addresses for every batch, and sums a row in one order.
    """
    return tuple(step // d for step in view.stride()[:2])


def by_name(names: Sequence[str], values: Sequence[int] | None) -> dict[str, Any]:
    """Strides as arguments of a launch; all None where the call has no such operand."""
    return dict.fromkeys(names) if values is None else dict(zip(names, values, strict=True))


def of_each(view: Tensor | None) -> tuple[int, ...] | None:
    """Strides of a vector [O, I, K], the last 0 where one number serves all K."""
    return None if view is None else (*view.stride()[:2], view.stride(2) * (view.shape[2] > 1))


def _with_dims(x: Tensor, core: int) -> Tensor:
    """`x` with `core` dims at least."""
    while x.ndim < core:
        x = x[None]
    return x


def _merge_dims(
    sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> list[tuple[int, list[int]]]:
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
