# SPDX-License-Identifier: Apache-2.0
"""`torch.func.vmap`: the mapped dim becomes a leading dim of every operand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .dispatch import LIBRARY
from .spec import NAMESPACE


def register_vmap(op: Any, name: str, core: Mapping[str, int] | None, dims: list[int]) -> None:
    """The vmap rule of an op whose argument i has `dims[i]` dims below its batch dims; without
    `core` the op refuses vmap.
    """
    name = f"{NAMESPACE}::{name}"

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: vmap is not supported: not all tensor arguments take leading dims"
        )

    def rule(info: Any, in_dims: Any, *a: Any) -> Any:
        lead = _lead(in_dims, a, dims)
        out = op(*(_aligned(x, d, c, lead) for x, d, c in zip(a, in_dims, dims, strict=False)))
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    torch.library.register_vmap(name, refuse if core is None else rule, lib=LIBRARY)


def register_vmap_backward(
    op: Any, name: str, dims: list[int], count: int, names: Sequence[str], slots: Sequence[str]
) -> None:
    """As `register_vmap` for a backward with `count` upstream gradients, but every operand is
    expanded: each problem of the batch has its gradient.
    """

    def rule(info: Any, in_dims: Any, *a: Any) -> Any:
        lead = _lead(in_dims, a, dims)
        put = [_aligned(x, d, c, lead) for x, d, c in zip(a, in_dims, dims, strict=True)]
        put = [x.reshape(1, 1) if isinstance(x, Tensor) and not x.ndim else x for x in put]
        out = op(*(_widened(x, info.batch_size) for x in put))
        arguments = dict(zip(names, a[count:], strict=False))
        restored = tuple(
            g.reshape(
                info.batch_size,
                *_core_shape(arguments[slot], in_dims[count + names.index(slot)]),
            )
            if need
            else g
            for g, slot, need in zip(out, slots, a[-3], strict=True)
        )
        return restored, tuple(0 if need else None for need in a[-3])

    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)


def _widened(x: Any, size: int) -> Any:
    """A tensor expanded along its first dim."""
    return x.expand(size, *x.shape[1:]) if isinstance(x, Tensor) else x


def _core_shape(x: Tensor, dim: int | None) -> list[int]:
    """The shape of one example of a batched tensor."""
    return [size for i, size in enumerate(x.shape) if i != dim]


def _lead(in_dims: Any, a: tuple[Any, ...], dims: list[int]) -> int:
    """Most batch dims that any argument has beside the mapped one."""
    return max(
        x.ndim - (d is not None) - c
        for x, d, c in zip(a, in_dims, dims, strict=False)
        if isinstance(x, Tensor)
    )


def _aligned(x: Any, dim: int | None, core: int, lead: int) -> Any:
    """The mapped dim first, then `lead` batch dims, then the core dims; a scalar stays a scalar."""
    if not isinstance(x, Tensor) or (dim is None and core == 1 and x.ndim == 0):
        return x
    x = x.movedim(dim, 0) if dim is not None else x.unsqueeze(0)
    if core == 1 and x.ndim == 1:
        x = x.unsqueeze(-1)
    while x.ndim < 1 + max(lead, 0) + core:
        x = x.unsqueeze(1)
    return x
