# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin (`-p bench.gpu.poison`): before each test it fills the GPU memory that torch will
allocate with NaN, so that an output entry that a kernel does not write is NaN.
"""

from __future__ import annotations

import pytest
import torch

# torch serves requests up to 1 MiB from one pool and larger ones from another
SIZES = (*[1 << 20] * 8, 8 << 20, 32 << 20)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    if torch.cuda.is_available():
        filled = [torch.full((size // 4,), torch.nan, device="cuda") for size in SIZES]
        del filled
