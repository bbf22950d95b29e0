# SPDX-License-Identifier: Apache-2.0
"""The doubt rule of the reference, for tests that compare it with a kernel's rule."""

from __future__ import annotations

import torch
from torch import Tensor

from python_fallback.am import doubt


def rows_in_doubt(size: Tensor, along: Tensor, weights: Tensor, beta: float) -> Tensor:
    """[N] bool: the rows that `DoubtRule` puts in doubt, from |x|^2 + |recalled|^2 [N],
    <x, recalled> [N] and weights [N, K], for one beta and memories that are close together.
    """
    rho = torch.ones(1, 2, 1)  # two equal memories
    rule = doubt.DoubtRule(
        rho, rho.mT.square(), None, torch.full((1, 1, 1), beta), torch.zeros(1, 1, 1),
        torch.tensor([False]),
    )  # fmt: skip
    result = rule.rows_in_doubt(size[None, :, None], along[None, :, None], weights[None])
    return torch.zeros(len(size), dtype=torch.bool) if result is None else result[0]
