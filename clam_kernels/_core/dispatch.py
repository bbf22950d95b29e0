# SPDX-License-Identifier: Apache-2.0
"""Definition of the ops, and registration of kernels for CPU, CUDA and fake tensors.

Only this file, `autograd.py`, `batching.py` and `install.py` use torch's private dispatch
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
# Dispatch keys of plain eager tensors on a CPU and on a GPU.
_DIRECT = frozenset(
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autograd{key}"))
    ).raw_repr()
    for key in ("CPU", "CUDA")
)
# The key of a call that passed its check: metadata of tensors, and values of these types.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_VALUES = frozenset({bool, int, float, str, type(None)})
_MAX_STORED = 1024


@dataclass(frozen=True)
class Implementation:
    """A function that `backend.run` runs: an op, its `_<name>_forward`, or its backward."""

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
    """Register a kernel and a fake for an op."""
    name = op._schema.name.partition("::")[2]
    overload = qualified(name, op._schema.overload_name)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(overload, kernel, key)
    for key in ("MPS", "XPU"):
        LIBRARY.impl(overload, functools.partial(_refuse_device, name=name), key)
    torch.library.register_fake(f"{NAMESPACE}::{overload}", fake, lib=LIBRARY)


def is_direct(keys: Any) -> bool:
    """Whether no mode and no tensor subclass is active: Autograd then calls the kernel without the
    dispatcher.
    """
    return keys.raw_repr() in _DIRECT


def check_key(a: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The key of a call: all facts of plain arguments that `OpSpec.check` reads. None if one is
    symbolic or of another class.
    """
    key: list[Any] = []
    for x in a:
        kind = type(x)
        if kind in _TENSORS:
            key += (x.shape, x.dtype, x.device)
        elif kind in _VALUES:
            key.append(x)
        else:
            return None
    return tuple(key)


def store_key(passed: set[tuple[Any, ...]], key: tuple[Any, ...] | None) -> None:
    """Store the key of a call that passed its check; a full set is cleared first."""
    if key is not None:
        if len(passed) >= _MAX_STORED:
            passed.clear()
        passed.add(key)
