# SPDX-License-Identifier: Apache-2.0
"""`torch.func.vmap`: the mapped dim becomes a leading batch dim of every operand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .dispatch import LIBRARY
from .spec import NAMESPACE


def register_vmap(op: Any, name: str, core: Mapping[str, int] | None, dims: list[int]) -> None:
    """Register the vmap rule of an op. Argument i has `dims[i]` dims without its batch dims.
    Without `core` the op raises under vmap.
    """
    name = f"{NAMESPACE}::{name}"

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: vmap is not supported: not all tensor arguments take leading dims"
        )

    def rule(info: Any, in_dims: Any, *a: Any) -> Any:
        batch_dims = _batch_dims(in_dims, a, dims)
        out = op(*(_align(x, d, c, batch_dims) for x, d, c in zip(a, in_dims, dims, strict=False)))
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    torch.library.register_vmap(name, refuse if core is None else rule, lib=LIBRARY)


def register_vmap_backward(
    op: Any, name: str, dims: list[int], count: int, names: Sequence[str], slots: Sequence[str]
) -> None:
    """As `register_vmap`, for a backward with `count` upstream gradients. Every operand is
    expanded, because each problem of the batch has its own gradient.
    """

    def rule(info: Any, in_dims: Any, *a: Any) -> Any:
        batch_dims = _batch_dims(in_dims, a, dims)
        operands = [_align(x, d, c, batch_dims) for x, d, c in zip(a, in_dims, dims, strict=True)]
        operands = [
            x.reshape(1, 1) if isinstance(x, Tensor) and not x.ndim else x for x in operands
        ]
        out = op(*(_expand_first(x, info.batch_size) for x in operands))
        arguments = dict(zip(names, a[count:], strict=False))
        gradients = tuple(
            g.reshape(
                info.batch_size,
                *_core_shape(arguments[slot], in_dims[count + names.index(slot)]),
            )
            if need
            else g
            for g, slot, need in zip(out, slots, a[-3], strict=True)
        )
        return gradients, tuple(0 if need else None for need in a[-3])

    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)


def _expand_first(x: Any, size: int) -> Any:
    """A tensor expanded along its first dim."""
    return x.expand(size, *x.shape[1:]) if isinstance(x, Tensor) else x


def _core_shape(x: Tensor, dim: int | None) -> list[int]:
    """The shape of one example of a batched tensor."""
    return [size for i, size in enumerate(x.shape) if i != dim]


def _batch_dims(in_dims: Any, a: tuple[Any, ...], dims: list[int]) -> int:
    """The largest number of batch dims of an argument, without the mapped dim."""
    return max(
        x.ndim - (d is not None) - c
        for x, d, c in zip(a, in_dims, dims, strict=False)
        if isinstance(x, Tensor)
    )


def _align(x: Any, dim: int | None, core: int, batch_dims: int) -> Any:
    """The mapped dim first, then `batch_dims` batch dims, then the core dims; a scalar stays a
    scalar.
    """
    if not isinstance(x, Tensor) or (dim is None and core == 1 and x.ndim == 0):
        return x
    x = x.movedim(dim, 0) if dim is not None else x.unsqueeze(0)
    if core == 1 and x.ndim == 1:
        x = x.unsqueeze(-1)
    while x.ndim < 1 + max(batch_dims, 0) + core:
        x = x.unsqueeze(1)
    return x
