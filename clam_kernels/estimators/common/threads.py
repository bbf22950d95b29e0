# SPDX-License-Identifier: Apache-2.0
"""One thread for work too small to share.

On a busy machine every parallel region waits for its slowest thread, and thousands of small ones
then take ten times their work. A process that has run a parallel region cannot fork: the child
waits for threads that are not there. Small work therefore starts none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

F = TypeVar("F", bound=Callable[..., Any])

# Multiply-adds of one product below which more threads gain nothing: about 1 ms of one core.
SMALL_PRODUCT = 1 << 26


@functools.cache
def _library() -> Any:
    """The library of torch through which its OpenMP and its MKL are reached."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _call(name: str, number: int) -> int:
    """What a function of the library returns for a number; 0 where this torch has no such function,
    and a block then runs on all threads.
    """
    with contextlib.suppress(AttributeError, OSError):
        return int(getattr(_library(), name)(ctypes.c_int(number)))
    return 0


@contextlib.contextmanager
def threads_for(product: int) -> Iterator[None]:
    """Run the block on one thread if its products are small.

    Only the calling thread changes its number of threads, and it has its own again afterwards.
    `torch.set_num_threads` would also set the number that new threads begin with.
    """
    before = torch.get_num_threads()  # the first call of a thread sets its number
    if product >= SMALL_PRODUCT or before == 1:
        yield
        return
    products = 0
    try:
        products = _call("MKL_Set_Num_Threads_Local", 1)  # 0: the number of all threads
        _call("omp_set_num_threads", 1)
        yield
    finally:
        _call("omp_set_num_threads", before)
        _call("MKL_Set_Num_Threads_Local", products)


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
