# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op, at which precision, and why.

Order: `with backend(name)`, then the environment's CLAM_BACKEND, then `auto`. The choice is a flag
of the process, not a context variable: CUDA backward runs on autograd's own threads, which inherit
no context. A forced backend that cannot run raises; it never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from . import checks, library

BACKENDS = ("reference", "triton", "cuda")
PRECISIONS = ("highest", "high", "medium")

# Called with (op, backend) before every run; tests see here what really ran.
observers: list[Callable[[str, str], None]] = []
_forced: str | None = None
_fallback_told = threading.Lock()


class Runnable(Protocol):
    """What the choice needs to know of an op."""

    @property
    def name(self) -> str: ...
    @property
    def reference(self) -> Callable[..., Any]: ...
    @property
    def kernels(self) -> Mapping[str, str]: ...
    @property
    def limits(self) -> Mapping[str, str]: ...


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op called inside the block, in all threads.

    Parameters
    ----------
    name : "reference", "triton", "cuda" or None
        None goes back to the automatic choice.

    Raises
    ------
    ValueError
        The name is none of these. An op that the backend cannot run raises RuntimeError when
        called.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> with clam_kernels.backend("reference"):
    ...     clam_kernels.am_assign(torch.zeros(1, 2), torch.eye(2))[0]
    tensor([0])
    """
    global _forced
    checks.one_of("backend", name, BACKENDS)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def requested() -> str:
    """The backend asked for: a name, or "auto"."""
    name = _forced or os.environ.get("CLAM_BACKEND") or "auto"
    if name != "auto":
        checks.one_of("CLAM_BACKEND", name, BACKENDS)
    return name


def default_precision() -> str:
    """Torch's own float32 matmul precision: "highest", "high" or "medium"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the user speaks the newer fp32_precision
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def resolve_precision(precision: str | None) -> str:
    """The mode an op runs in."""
    checks.one_of("precision", precision, PRECISIONS)
    return precision or default_precision()


def why_not(spec: Runnable, name: str, device: str, arguments: tuple[Any, ...] = ()) -> str | None:
    """None if a backend can run the op on a device (on these arguments, if any), else the
    reason.
    """
    if name == "reference":
        return None
    if name not in spec.kernels:
        return f"the op has no {name} kernel"
    reason = _unavailable(name, device)
    if reason is None and arguments and name in spec.limits:
        reason = implementation(spec.limits[name])(*arguments)
    return reason


def _unavailable(name: str, device: str) -> str | None:
    """Why a GPU backend cannot run in this process, on this device."""
    if name == "cuda":
        reason = library.why_unavailable()
        return reason if device == "cuda" or reason else f"the tensors are on {device}"
    if not _has_triton():
        return "triton is not installed"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device}"


@functools.cache
def _has_triton() -> bool:
    """Whether triton can be imported: a search of the path, too slow for every call."""
    return importlib.util.find_spec("triton") is not None


def _slower(spec: Runnable, name: str, arguments: tuple[Any, ...]) -> str | None:
    """Why the automatic choice passes over a backend that could run the op."""
    where = spec.limits.get(f"auto-{name}")
    reason: str | None = implementation(where)(*arguments) if where and arguments else None
    return reason


def _public(name: str) -> str:
    """The op that a user called where its saving forward runs."""
    return name.removeprefix("_").removesuffix("_forward")


def choose(spec: Runnable, device: str, arguments: tuple[Any, ...] = ()) -> tuple[str, str]:
    """(backend, reason) for tensors on a device type."""
    name = requested()
    if name != "auto":
        reason = why_not(spec, name, device, arguments)
        if reason is not None:
            raise RuntimeError(f"backend '{name}' cannot run clam::{_public(spec.name)}: {reason}")
        return name, "forced"
    if device != "cuda":
        return "reference", f"the tensors are on {device}"
    refusals: list[str] = []
    for candidate in ("cuda", "triton"):
        reason = why_not(spec, candidate, device, arguments)
        reason = reason or _slower(spec, candidate, arguments)
        if reason is None:
            return candidate, "; ".join(refusals) or "preferred on a GPU"
        refusals.append(f"{candidate}: {reason}")
    return "reference", "; ".join(refusals)


def _tell_fallback(spec: Runnable, reason: str) -> None:
    """Say once per process that a GPU runs the reference."""
    if requested() == "auto" and _fallback_told.acquire(blocking=False):
        warnings.warn(
            f"clam::{spec.name} runs its reference on the GPU ({reason}); "
            "CLAM_BACKEND=reference silences this",
            RuntimeWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """Hold torch's own matrix products at float32."""
    mkldnn: Any = torch.backends.mkldnn
    switches = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, mode in zip(switches, before, strict=True):
            switch.fp32_precision = mode


def run(
    spec: Runnable, device: str, precision: str, arguments: tuple[Any, ...], name: str | None = None
) -> Any:
    """Call an implementation: the chosen one, or the one named (a backward follows its forward)."""
    reason = None if name is None else why_not(spec, name, device)
    if reason is not None:
        raise RuntimeError(f"backend '{name}' cannot run clam::{_public(spec.name)}: {reason}")
    if name is None:
        name, reason = choose(spec, device, arguments)
    for observer in observers:
        observer(spec.name, name)
    if name == "reference":
        if device == "cuda":
            _tell_fallback(spec, reason or "its forward did")
        if precision != "highest" or default_precision() == "highest":
            return spec.reference(*arguments)
        with _float32_products():  # torch's own mode is lower
            return spec.reference(*arguments)
    return implementation(spec.kernels[name])(*arguments)


_module = functools.cache(importlib.import_module)


def implementation(where: str) -> Callable[..., Any]:
    """The callable behind "package.module:function" or "clam_cuda::op"."""
    if "::" in where:
        namespace, _, op = where.partition("::")
        found: Callable[..., Any] = getattr(getattr(torch.ops, namespace), op)
        return found
    name, _, function = where.partition(":")
    found = getattr(_module(name), function)
    return found
