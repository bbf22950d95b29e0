# SPDX-License-Identifier: Apache-2.0
"""The memory that a call needs, of numpy's arrays and of torch's tensors."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

from clam_kernels.testing import peak_bytes


def most_bytes(call: Callable[[], object]) -> int:
    """Most bytes of arrays, or of tensors, at once; each in a run of its own after a first one."""
    call()  # what it imports does not count
    tracemalloc.start()
    try:
        call()
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return max(arrays, peak_bytes(call))
