# SPDX-License-Identifier: Apache-2.0
"""Dispatch keys: ops are defined here, and kernels put under CPU, CUDA and fake tensors.

With `autograd.py`, `batching.py` and `install.py` this is all that uses torch's private dispatch
functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from .spec import NAMESPACE, qualified

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
below_autograd = torch._C._AutoDispatchBelowAutograd
# Dispatch keys of plain eager tensors, of a CPU and of a GPU.
_DIRECT = frozenset(
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autograd{key}"))
    ).raw_repr()
    for key in ("CPU", "CUDA")
)
# What a call that passed its check is remembered by: tensors by their metadata, these by value.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_VALUES = frozenset({bool, int, float, str, type(None)})
_MOST_REMEMBERED = 1024


@dataclass(frozen=True)
class Part:
    """What `backend.run` needs: the op itself, its saving forward, or its backward."""

    name: str
    reference: Callable[..., Any]
    kernels: Mapping[str, str]
    limits: Mapping[str, str] = field(default_factory=dict)


def define(name: str, overload: str, schema: str) -> Any:
    """Define one overload and return it."""
    LIBRARY.define(f"{qualified(name, overload)}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(getattr(torch.ops.clam, name), overload or "default")


def _refuse_device(*_: Any, name: str, **__: Any) -> NoReturn:
    raise RuntimeError(f"{NAMESPACE}::{name}: expected tensors on cpu or cuda")


def register(op: Any, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Put a kernel and a fake under an op."""
    name = op._schema.name.partition("::")[2]
    overload = qualified(name, op._schema.overload_name)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(overload, kernel, key)
    for key in ("MPS", "XPU"):
        LIBRARY.impl(overload, functools.partial(_refuse_device, name=name), key)
    torch.library.register_fake(f"{NAMESPACE}::{overload}", fake, lib=LIBRARY)


def is_direct(keys: Any) -> bool:
    """Whether nothing stands between Autograd and the kernel, no mode and no wrapper: then the
    kernel is called without the dispatcher.
    """
    return keys.raw_repr() in _DIRECT


def seen_by_check(a: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that `OpSpec.check` sees of plain arguments; None where one is symbolic or of a class
    of its own.
    """
    seen: list[Any] = []
    for x in a:
        kind = type(x)
        if kind in _TENSORS:
            seen += (x.shape, x.dtype, x.device)
        elif kind in _VALUES:
            seen.append(x)
        else:
            return None
    return tuple(seen)


def remember(passed: set[tuple[Any, ...]], seen: tuple[Any, ...] | None) -> None:
    """What passed the check need not be checked again; forgotten when it is too much."""
    if seen is not None:
        if len(passed) >= _MOST_REMEMBERED:
            passed.clear()
        passed.add(seen)
