# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op, at which precision, and why.

Order: `with backend(name)`, then the environment variable CLAM_BACKEND, then `auto`. Blocks are
stored for the whole process, not in a context variable: a CUDA backward runs on threads of
autograd, which inherit no context. A forced backend that cannot run raises; it never falls back.
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

# Called with (op, backend) before every run, so that tests see which backend ran.
observers: list[Callable[[str, str], None]] = []
_fallback_told = threading.Lock()


class Runnable(Protocol):
    """The fields of an op that the choice of a backend reads."""

    @property
    def name(self) -> str: ...
    @property
    def reference(self) -> Callable[..., Any]: ...
    @property
    def kernels(self) -> Mapping[str, str]: ...
    @property
    def limits(self) -> Mapping[str, str]: ...


class _Block:
    """An open `with backend(name)` block, and the thread that entered it."""

    def __init__(self, name: str | None) -> None:
        self.name, self.thread = name, threading.get_ident()


# The open blocks of all threads, in the order of their start. append and remove need no lock.
_blocks: list[_Block] = []


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op that is called inside the block.

    A block applies to its own thread, and to threads that are in no block, such as the threads in
    which autograd runs the backward of CUDA tensors. In one thread the innermost block applies. If
    several threads are in blocks, each has its own choice, and a thread without a block follows the
    block that began last. When a block ends, its choice ends in all threads, in any order of the
    blocks. A backward runs on the backend of its forward.

    Parameters
    ----------
    name : "reference", "triton", "cuda" or None
        None restores the choice of CLAM_BACKEND, or the automatic one.

    Raises
    ------
    ValueError
        The name is not one of these. An op that the backend cannot run raises RuntimeError when it
        is called.
    RuntimeError
        The block is inside a function that torch.compile compiles as one graph, where it has no
        effect: put it around the call of the compiled function.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> with clam_kernels.backend("reference"):
    ...     clam_kernels.am_assign(torch.zeros(1, 2), torch.eye(2))[0]
    tensor([0])
    """
    checks.one_of("backend", name, BACKENDS)
    if torch.compiler.is_compiling():  # ops choose when the graph runs, after tracing
        raise RuntimeError("backend: expected a block around the compiled call, got one inside it")
    block = _Block(name)
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)


def _choice_of_blocks() -> str | None:
    """The choice of the blocks of this thread, or else of the other threads; None for no choice."""
    if not _blocks:
        return None
    thread, blocks = threading.get_ident(), _blocks[::-1]
    own = [block for block in blocks if block.thread == thread]
    return next((block.name for block in own or blocks), None)


def requested() -> str:
    """The requested backend: a name, or "auto"."""
    name = _choice_of_blocks() or os.environ.get("CLAM_BACKEND") or "auto"
    if name != "auto":
        checks.one_of("CLAM_BACKEND", name, BACKENDS)
    return name


def _torch_precision() -> str:
    """Torch's float32 matmul precision now: "highest", "high" or "medium"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the user set the newer fp32_precision
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def default_precision() -> str:
    """Torch's float32 matmul precision as the user set it: "highest", "high" or "medium"."""
    while True:
        before = _products.user
        precision = before[0] or _torch_precision()
        if _products.user is before:  # no other thread changed the mode in between
            return precision


def resolve_precision(precision: str | None) -> str:
    """The precision in which an op runs."""
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
    if not _has_triton():  # Triton computes the rows that the CUDA library flags
        return "triton is not installed"
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if device == "cuda" or interpreted else f"the device is {device}, not a GPU"


@functools.cache
def _has_triton() -> bool:
    """Whether triton is installed; cached, because the search of the path is slow."""
    return importlib.util.find_spec("triton") is not None


def _slower(spec: Runnable, name: str, arguments: tuple[Any, ...]) -> str | None:
    """Why the automatic choice skips a backend that can run the op; None if it does not."""
    where = spec.limits.get(f"auto-{name}")
    reason: str | None = implementation(where)(*arguments) if where and arguments else None
    return reason


def _public(name: str) -> str:
    """The name of the public op, for an op or its `_<name>_forward`."""
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
    """Warn once per process that a GPU runs the reference."""
    if requested() == "auto" and _fallback_told.acquire(blocking=False):
        warn(
            f"clam::{spec.name} runs its reference on the GPU ({reason}); "
            "CLAM_BACKEND=reference silences this",
            RuntimeWarning,
        )


class _Products:
    """Torch's mode of float32 products, a setting that all threads share, while it is below
    "highest".

    Exact calls need float32: the first sets the mode, and the last restores the user's. Exact calls
    and calls in the user's mode wait for each other, so that the bits of a call do not depend on
    other threads; calls of one kind run at the same time.
    """

    def __init__(self) -> None:
        self.free = threading.Condition()
        self.inside, self.exact = 0, False  # how many calls run now, and their kind
        self.waiting = {False: 0, True: 0}
        self.changed: list[tuple[Any, str]] = []  # (setting, value of the user)
        self.mode_name = ""  # torch's name of the mode that `_set` sets
        # The user's precision while another mode is set. Each change assigns a new list, so that
        # `default_precision` can detect it.
        self.user: list[str | None] = [None]

    def enter(self, exact: bool) -> None:
        """Wait until no call of the other kind runs; the kinds take turns."""
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
        """Whether a call of a kind may start."""
        return not self.inside or (self.exact == exact and not self.waiting[not exact])

    def leave(self) -> None:
        """End a call; the last one restores the mode."""
        with self.free:
            self.inside -= 1
            if not self.inside:
                self._restore()
                self.free.notify_all()

    def _set(self) -> None:
        """Set torch's mode to float32, and store the user's."""
        self.user = [_torch_precision()]
        mkldnn: Any = torch.backends.mkldnn
        try:
            for switch in (torch.backends.cuda.matmul, mkldnn.matmul):
                mode = switch.fp32_precision
                if mode not in ("ieee", "none"):
                    switch.fp32_precision = "none"  # then it follows torch's general setting
                    follows = switch.fp32_precision == mode
                    self.changed.append((switch, "none" if follows else mode))
                    switch.fp32_precision = "ieee"
            self.mode_name = _torch_precision()
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        """Restore the user's mode, unless the user has set another one since."""
        same = _torch_precision() == self.mode_name
        for switch, mode in self.changed:
            if same and switch.fp32_precision == "ieee":
                switch.fp32_precision = mode
        self.changed.clear()
        self.user = [None]


_products = _Products()


@contextlib.contextmanager
def float32_products(exact: bool = True) -> Iterator[None]:
    """A block in which torch multiplies float32 matrices in float32 or, if not exact, in the mode
    that the user set.
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
    """Run an op on the chosen backend, or on backend `name`: a backward uses that of its
    forward.
    """
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
        # torch's mode is lower, on a CPU perhaps bfloat16; ops on a CPU multiply in float32
        with float32_products(exact=precision == "highest" or device == "cpu"):
            return spec.reference(*arguments)
    return implementation(spec.kernels[name])(*arguments)


_module = functools.cache(importlib.import_module)


def implementation(where: str) -> Callable[..., Any]:
    """The callable behind "package.module:function" or "clam_cuda::op"."""
    if "::" in where:
        namespace, _, op = where.partition("::")
        kernel: Callable[..., Any] = getattr(getattr(torch.ops, namespace), op)
        return kernel
    name, _, function = where.partition(":")
    kernel = getattr(_module(name), function)
    return kernel
