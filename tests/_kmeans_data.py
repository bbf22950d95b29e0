# SPDX-License-Identifier: Apache-2.0
"""Rows and centroids for the tests of k-means."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import clam_kernels
import python_fallback.kmeans as fallback

F64 = torch.float64
BOTH = {"op": clam_kernels, "truth": fallback}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def row_tensor(*rows: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in shapes]


def blobs(seed: int, n: int, k: int, d: int, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Rows in k blobs, and k of the rows as centroids; float64."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(k, d, generator=generator, dtype=F64)
    x = centers[torch.randint(k, (n,), generator=generator)]
    x = x + spread * torch.randn(n, d, generator=generator, dtype=F64)
    return x, x[torch.randperm(n, generator=generator)[:k]].clone()


PROPERTY = settings(max_examples=40)
PROBLEM = {
    "seed": st.integers(0, 10**6),
    "n": st.integers(0, 30),
    "k": st.integers(1, 20),
    "d": st.integers(1, 5),
}
