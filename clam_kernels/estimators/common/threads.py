# SPDX-License-Identifier: Apache-2.0
"""One thread for small work.

On a busy machine every parallel region waits for its slowest thread; thousands of small regions
then take ten times as long. After a parallel region a process cannot fork: the child waits for
threads that it does not have. So small work runs on one thread.
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
from sklearn.base import BaseEstimator

F = TypeVar("F", bound=Callable[..., Any])

# Multiply-adds of a product below which more threads are not faster: about 1 ms of one core.
SMALL_PRODUCT = 1 << 26


@functools.cache
def _library() -> Any:
    """The library of torch that has the functions of its OpenMP and its MKL."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _call(name: str, number: int) -> int:
    """Call a function of the library with a number, and return its result; 0 where this torch has
    no such function: a block then runs on all threads.
    """
    with contextlib.suppress(AttributeError, OSError):
        return int(getattr(_library(), name)(ctypes.c_int(number)))
    return 0


@contextlib.contextmanager
def threads_for(product: int) -> Iterator[None]:
    """Run the block on one thread if its products have few multiply-adds.

    Only the number of threads of the calling thread changes, and is restored afterwards.
    `torch.set_num_threads` would also change the number that new threads begin with.
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
    """A method of an estimator that runs on one thread where its work on X is small, by
    `estimator._work(rows, features)`.
    """

    @functools.wraps(method)
    def wrapped(self: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
        with threads_for(_work(self, X)):
            return method(self, X, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _work(estimator: BaseEstimator, X: Any) -> int:
    """Multiply-adds of a method; those of large work where X is no matrix, for which the method
    raises.
    """
    try:
        rows, features = X.shape if hasattr(X, "shape") else np.shape(X)
        return int(estimator._work(rows, features))
    except (TypeError, ValueError):
        return SMALL_PRODUCT
