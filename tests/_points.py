# SPDX-License-Identifier: Apache-2.0
"""The two ways to compute the associative memory, normal points, and a comparison."""

from __future__ import annotations

import torch
from torch import Tensor

import clam_kernels
import python_fallback.am

F64 = torch.float64
BOTH = {"op": clam_kernels, "truth": python_fallback.am}


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in shapes]


def close(a: Tensor, b: Tensor | float, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=0, atol=atol)
