# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, without the work that it does again for every value."""

from __future__ import annotations

import functools
import importlib
from typing import Any


class _Kept:
    """The language stays patched: the next launch needs it too."""

    def restore(self) -> None:
        pass


@functools.cache
def make_quick() -> None:
    """Patch triton's language once for each file of kernels, not for every launch and every call
    of a jit function inside another, and compute what depends on a type alone once for each type:
    two thirds of the interpreter's time. What it computes stays the same.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    interpreter._patch_lang = _once_for_each_file(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_for_each_dtype(interpreter._get_np_dtype)
    core = interpreter.tl.core
    core.block_type.__init__ = _block_init(core.block_type.__init__)
    core.tensor.__init__ = _tensor_init(core.tensor.__init__)


def _once_for_each_file(patch: Any) -> Any:
    patched: dict[int, Any] = {}

    def run(fn: Any) -> _Kept:
        names = fn.__globals__
        if id(names) not in patched:
            patch(fn)
            patched[id(names)] = names  # as long as it lives no other has its id
        return _Kept()

    return run


def _once_for_each_dtype(dtype_of: Any) -> Any:
    known: dict[str, Any] = {}

    def run(tt_dtype: Any) -> Any:
        name = tt_dtype.scalar.name
        if name not in known:
            known[name] = dtype_of(tt_dtype)
        return known[name]

    return run


def _block_init(init: Any) -> Any:
    """Of the type of a block, which its entries' type and its shape decide."""
    known: dict[Any, dict[str, Any]] = {}

    def run(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[getattr(n, "value", n) for n in shape])
        if key in known:
            self.__dict__.update(known[key])
        else:
            init(self, element_ty, shape)
            known[key] = dict(self.__dict__)

    return run


def _tensor_init(init: Any) -> Any:
    """Of a value, whose type decides all but the handle."""
    known: dict[str, dict[str, Any]] = {}

    def run(self: Any, handle: Any, type: Any) -> None:
        if type.name in known:
            self.__dict__.update(known[type.name])
            self.handle, self.type = handle, type
        else:
            init(self, handle, type)
            known[type.name] = dict(self.__dict__)

    return run
