# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op, at which precision, and why.

Order: `with backend(name)`, then the environment's CLAM_BACKEND, then `auto`. Blocks are known to
the whole process, not to a context variable: CUDA backward runs on autograd's own threads, which
inherit no context. A forced backend that cannot run raises; it never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from . import checks, library
from .warn import warn

BACKENDS = ("reference", "triton", "cuda")
PRECISIONS = ("highest", "high", "medium")

# Called with (op, backend) before every run; tests see here what really ran.
observers: list[Callable[[str, str], None]] = []
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


class _Block:
    """One `with backend(name)` that has not ended, and the thread that entered it."""

    def __init__(self, name: str | None) -> None:
        self.name, self.thread = name, threading.get_ident()


# Blocks of all threads in the order of their start. One append or remove needs no lock.
_blocks: list[_Block] = []


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op that is called inside the block.

    The block rules in its own thread, and in each thread that is in no block itself: the threads in
    which autograd runs the backward of CUDA tensors are such. Of several blocks in one thread the
    innermost rules. Where several threads are in blocks, each has its own choice, and a thread
    without a block follows the block that began last. The end of a block ends its choice in every
    thread, in whatever order the blocks end. A backward runs on the backend of its forward.

    Parameters
    ----------
    name : "reference", "triton", "cuda" or None
        None goes back to the automatic choice, or to that of the environment's CLAM_BACKEND.

    Raises
    ------
    ValueError
        The name is none of these. An op that the backend cannot run raises RuntimeError when
        called.
    RuntimeError
        The block stands inside a function that torch.compile compiles as one graph. There it has no
        effect: put it around the call of the compiled function.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> with clam_kernels.backend("reference"):
    ...     clam_kernels.am_assign(torch.zeros(1, 2), torch.eye(2))[0]
    tensor([0])
    """
    checks.one_of("backend", name, BACKENDS)
    if torch.compiler.is_compiling():  # the ops choose when the graph runs, after the trace
        raise RuntimeError("backend: expected a block around the compiled call, got one inside it")
    block = _Block(name)
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)


def _forced() -> str | None:
    """What the blocks of this thread say, or else those of the others."""
    if not _blocks:
        return None
    thread, blocks = threading.get_ident(), _blocks[::-1]
    own = [block for block in blocks if block.thread == thread]
    return next((block.name for block in own or blocks), None)


def requested() -> str:
    """The backend asked for: a name, or "auto"."""
    name = _forced() or os.environ.get("CLAM_BACKEND") or "auto"
    if name != "auto":
        checks.one_of("CLAM_BACKEND", name, BACKENDS)
    return name


def _torch_precision() -> str:
    """Torch's float32 matmul precision now: "highest", "high" or "medium"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the user speaks the newer fp32_precision
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def default_precision() -> str:
    """Torch's float32 matmul precision as the user set it: "highest", "high" or "medium"."""
    while True:
        before = _products.user
        found = before[0] or _torch_precision()
        if _products.user is before:  # no other thread changed torch's mode meanwhile
            return found


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
    reason = library.why_unavailable() if name == "cuda" else None
    if reason is not None:
        return reason
    if not _has_triton():  # rows that the CUDA library leaves are computed by Triton
        return "triton is not installed"
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if device == "cuda" or interpreted else f"the tensors are on {device}"


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
        warn(
            f"clam::{spec.name} runs its reference on the GPU ({reason}); "
            "CLAM_BACKEND=reference silences this",
            RuntimeWarning,
        )


class _Products:
    """Torch's mode of float32 products, which all threads share, where it is below "highest".

    Calls that need float32 ("exact") set it, and put the user's back when the last of them ends.
    Calls in the user's mode and exact calls wait for each other, so that the bits of a call do not
    hang on what other threads do; calls of one kind run side by side.
    """

    def __init__(self) -> None:
        self.free = threading.Condition()
        self.inside, self.exact = 0, False  # how many calls run now, and their kind
        self.waiting = {False: 0, True: 0}
        self.changed: list[tuple[Any, str]] = []  # switches, and what the user had set
        self.word = ""  # torch's own word for the mode that is set here
        # The user's precision while the mode is not theirs. Each change puts a new list here, by
        # which `default_precision` sees that there was one.
        self.user: list[str | None] = [None]

    def enter(self, exact: bool) -> None:
        """Wait for calls of the other kind to end, or to have their turn."""
        with self.free:
            self.waiting[exact] += 1
            try:
                self.free.wait_for(lambda: self._is_free(exact))
                if exact and not self.inside:
                    self._set()
            finally:
                self.waiting[exact] -= 1
                self.free.notify_all()
            self.inside, self.exact = self.inside + 1, exact

    def _is_free(self, exact: bool) -> bool:
        return not self.inside or (self.exact == exact and not self.waiting[not exact])

    def leave(self) -> None:
        """A call has ended."""
        with self.free:
            self.inside -= 1
            if not self.inside:
                self._put_back()
                self.free.notify_all()

    def _set(self) -> None:
        self.user = [_torch_precision()]
        mkldnn: Any = torch.backends.mkldnn
        try:
            for switch in (torch.backends.cuda.matmul, mkldnn.matmul):
                mode = switch.fp32_precision
                if mode not in ("ieee", "none"):
                    switch.fp32_precision = "none"  # then it follows torch's general switch
                    follows = switch.fp32_precision == mode
                    self.changed.append((switch, "none" if follows else mode))
                    switch.fp32_precision = "ieee"
            self.word = _torch_precision()
        except BaseException:
            self._put_back()
            raise

    def _put_back(self) -> None:
        """The user's mode, unless the user has set another one meanwhile."""
        same = _torch_precision() == self.word
        for switch, mode in self.changed:
            if same and switch.fp32_precision == "ieee":
                switch.fp32_precision = mode
        self.changed.clear()
        self.user = [None]


_products = _Products()


@contextlib.contextmanager
def float32_products(exact: bool = True) -> Iterator[None]:
    """Compute torch's own products of float32 matrices in float32 inside the block, or, if not
    exact, in the mode that the user set.
    """
    if default_precision() == "highest":
        yield
        return
    _products.enter(exact)
    try:
        yield
    finally:
        _products.leave()


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
        if default_precision() == "highest":
            return spec.reference(*arguments)
        # torch's own mode is lower, which on a CPU may be bfloat16; there all is float32
        with float32_products(exact=precision == "highest" or device == "cpu"):
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
