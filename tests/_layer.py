# SPDX-License-Identifier: Apache-2.0
"""A layer with every option, and comparisons, for the tests of `AssociativeMemory`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clam_kernels.nn import AssociativeMemory

F64 = torch.float64
HALVES = [torch.float16, torch.bfloat16]


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def full(seed: int = 0, dtype: torch.dtype = F64) -> AssociativeMemory:
    """A layer with every option: four memories of three features, nothing frozen."""
    layer = AssociativeMemory.from_patterns(
        draw(seed, 4, 3, dtype=dtype), steps=3, step=0.7, beta=0.8, learn_memories=True,
        learn_beta=True, log_weights=0.3 * draw(seed + 1, 4, dtype=dtype), precision="highest",
    )  # fmt: skip
    assert all(p.requires_grad for p in layer.parameters())
    return layer


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


class Shifted(nn.Module):
    """A parametrization: the parameter is the stored value plus one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1

    def right_inverse(self, x: Tensor) -> Tensor:
        return x - 1
