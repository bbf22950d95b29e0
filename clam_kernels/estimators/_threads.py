# SPDX-License-Identifier: Apache-2.0
"""One thread for training steps too small to share.

On a busy machine every parallel region waits for its slowest thread, and thousands of small ones
then take ten times their work.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

# Multiply-adds of one product below which more threads gain nothing: about 1 ms of one core.
SMALL_PRODUCT = 1 << 26


class _Single:
    """How many threads compute on one thread of torch now.

    Torch keeps a number of threads for each thread of the process, and one more, the last that any
    thread set, with which a new thread begins.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.outside = 1  # the number of the first thread that entered
        self.own = threading.local()

    def enter(self) -> int:
        """One thread from now on; the number that this thread goes back to."""
        with self.lock:
            before = torch.get_num_threads()
            if self.inside == 0:
                self.outside = before
            elif before == 1:  # it has begun since the first one entered, with the 1 of that
                before = self.outside
            self.inside += 1
            torch.set_num_threads(1)
            return before

    def leave(self, before: int) -> None:
        """The number of before, for this thread and for new ones."""
        with self.lock:
            self.inside -= 1
            torch.set_num_threads(before)


_single = _Single()


@contextlib.contextmanager
def threads_for(product: int) -> Iterator[None]:
    """Run the block on one thread if its products are small.

    After it each thread that was in such a block has its own number of threads again. Only a thread
    that begins meanwhile, and runs no such block, stays at one: torch tells nobody its number.
    """
    if product >= SMALL_PRODUCT or getattr(_single.own, "inside", False):
        yield
        return
    before = _single.enter()
    _single.own.inside = True
    try:
        yield
    finally:
        _single.own.inside = False
        _single.leave(before)
