# SPDX-License-Identifier: Apache-2.0
"""Random tensors for samples."""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """Tensors from one random stream: the same seed and calls give the same tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int, low: float = 0.2, high: float = 1.5) -> Tensor:
        """Uniform in [low, high), float64."""
        share = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * share

    def bits(self, *shape: int) -> Tensor:
        """True or False with equal probability."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float32) < 0.5

    def log_masses(self, *shape: int) -> Tensor:
        """Logarithms of marginals of total 1, float64."""
        return self.normal(*shape).log_softmax(-1)
