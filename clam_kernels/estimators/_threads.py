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
    """How many fits run single-threaded now, and the number of threads to go back to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = 1


_single = _Single()


@contextlib.contextmanager
def threads_for(product: int) -> Iterator[None]:
    """Run the block on one thread if its products are small.

    The last fit to leave restores torch's number of threads.
    """
    if product >= SMALL_PRODUCT:
        yield
        return
    with _single.lock:
        if _single.inside == 0:
            _single.before = torch.get_num_threads()
            torch.set_num_threads(1)
        _single.inside += 1
    try:
        yield
    finally:
        with _single.lock:
            _single.inside -= 1
            if _single.inside == 0:
                torch.set_num_threads(_single.before)
