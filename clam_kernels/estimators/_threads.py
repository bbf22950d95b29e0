# SPDX-License-Identifier: Apache-2.0
"""One thread for work too small to share.

On a busy machine every parallel region waits for its slowest thread, and thousands of small ones
then take ten times their work. A process that has run a parallel region cannot fork: the child
waits for threads that are not there. Small work therefore starts none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

# Multiply-adds of one product below which more threads gain nothing: about 1 ms of one core.
SMALL_PRODUCT = 1 << 26
# Entries of a table below which one pass over it needs one thread.
SMALL_PASS = 1 << 22

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
def threads_for(product: int, *, small: int = SMALL_PRODUCT) -> Iterator[None]:
    """Run the block on one thread if its products are small.

    Only the calling thread changes its number of threads, and it has its own again afterwards.
    """
    before = torch.get_num_threads()
    if product >= small or before == 1:
        yield
        return
    try:
        _set_own(1)
        yield
    finally:
        _set_own(before)
