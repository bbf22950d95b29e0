# SPDX-License-Identifier: Apache-2.0
"""Which transforms of torch.func are active; torch has no public function for this."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform is active: grad, vmap, jvp, or a combination."""
    return torch._C._are_functorch_transforms_active()


def has_tangent(x: object) -> bool:
    """Whether a tensor has a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0 or not isinstance(x, Tensor):
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def maps(x: object) -> bool:
    """Whether torch.func.vmap maps over a tensor, also inside other transforms."""
    functorch = torch._C._functorch
    while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
