# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a call, in numpy's arrays and in torch's tensors."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

from clam_kernels.testing import peak_bytes


def most_bytes(call: Callable[[], object]) -> int:
    """Peak bytes of arrays or of tensors, each measured in its own run after a first one."""
    call()  # imports must not count
    tracemalloc.start()
    try:
        call()
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return max(arrays, peak_bytes(call))
