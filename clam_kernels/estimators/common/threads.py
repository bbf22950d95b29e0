# SPDX-License-Identifier: Apache-2.0
"""One thread for work too small to share.

On a busy machine every parallel region waits for its slowest thread, and thousands of small ones
then take ten times their work. A process that has run a parallel region cannot fork: the child
waits for threads that are not there. Small work therefore starts none.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

F = TypeVar("F", bound=Callable[..., Any])

# Multiply-adds of one product below which more threads gain nothing: about 1 ms of one core.
SMALL_PRODUCT = 1 << 26

_lock = threading.Lock()


def _set_own(number: int) -> None:
    """Set the number of threads of the calling thread, and leave that of new threads as it is.

    `torch.set_num_threads` sets both. Only a new thread can read what new threads begin with.
    """
    known, changed = threading.Event(), threading.Event()

    def keep() -> None:
        default = torch.get_num_threads()
        known.set()
        changed.wait()
        torch.set_num_threads(default)

    with _lock:
        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            known.wait()
            torch.set_num_threads(number)
        finally:  # Ctrl-C may end the wait
            changed.set()
        keeper.join()


@contextlib.contextmanager
def threads_for(product: int) -> Iterator[None]:
    """Run the block on one thread if its products are small.

    Only the calling thread changes its number of threads, and it has its own again afterwards.
    """
    before = torch.get_num_threads()
    if product >= SMALL_PRODUCT or before == 1:
        yield
        return
    try:
        _set_own(1)
        yield
    finally:
        _set_own(before)


def small_on_one_thread(method: F) -> F:
    """A method of an estimator that runs on one thread from its first line to its last where its
    work on X, which `estimator._work(rows, features)` says, is small.
    """

    @functools.wraps(method)
    def wrapped(self: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
        with threads_for(_work(self, X)):
            return method(self, X, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _work(estimator: Any, X: Any) -> int:
    """Multiply-adds; of what is no matrix, which the method refuses, as for a large one."""
    try:
        rows, features = X.shape if hasattr(X, "shape") else np.shape(X)
        return int(estimator._work(rows, features))
    except (TypeError, ValueError):
        return SMALL_PRODUCT
