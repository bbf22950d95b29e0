# SPDX-License-Identifier: Apache-2.0
"""The equations of an associative memory in plain torch: any device, twice differentiable, with an
N x K x D array. docs/ops/am.md has them.

Shapes: v [..., N, D], rho [..., K, D], beta and log_weights broadcastable to [..., K],
update_mask to [..., N, D]; leading dims broadcast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import kmeans
from ..common.score import alive_memories, compute_dtype
from .hard import assign, nearest
from .problem import Beta, result_shape


def _differences(x: Tensor, rho: Tensor, log_weights: Tensor | None) -> Tensor:
    """`rho_k - x_n`, [..., N, K, D]; 0 for a memory that takes no part, which may hold NaN."""
    gap = rho[..., None, :, :] - x[..., :, None, :]
    alive = alive_memories(log_weights)
    return gap if alive is None else torch.where(alive[..., None, :, None], gap, 0.0)


def _logits(far: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    """`log w_k - beta_k |x_n - rho_k|^2`, [..., N, K]; 0 where no memory takes part."""
    z = far * -(beta[..., None, :] if isinstance(beta, Tensor) and beta.ndim else beta)
    if log_weights is None:
        return z
    some = alive_memories(log_weights).any(-1, keepdim=True)[..., None]  # type: ignore[union-attr]
    return torch.where(some, z + torch.atleast_1d(log_weights)[..., None, :], 0.0)


def is_hard(beta: Beta) -> bool:
    """Whether each row goes to its nearest memory."""
    return isinstance(beta, float) and math.isinf(beta)


def am_weights(x: Tensor, rho: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    """`softmax_k(log w_k - beta_k |x_n - rho_k|^2)`, [..., N, K]; one-hot at the nearest memory for
    beta = inf, 0 where no memory takes part. In float64, as the exact rows of the recursion: logits
    of finite rows and memories leave the range of float32.
    """
    wide, memories = x.double(), rho.double()
    beta = beta.double() if isinstance(beta, Tensor) else beta
    log_weights = None if log_weights is None else log_weights.double()
    gap = _differences(wide, memories, log_weights)
    return _weights(wide, memories, gap, beta, log_weights).to(x.dtype)


def _weights(x: Tensor, rho: Tensor, gap: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    if is_hard(beta):
        labels = nearest(x.detach(), rho.detach(), log_weights)[..., None]
        index = torch.arange(rho.shape[-2], dtype=torch.int64, device=x.device)
        p = (index == labels).to(x.dtype)
        return p + (gap.detach() * 0).sum(-1)  # what is not finite stays visible
    p = torch.softmax(_logits(gap.square().sum(-1), beta, log_weights), -1)
    alive = alive_memories(log_weights)
    return p if alive is None else torch.where(alive[..., None, :], p, 0.0)


def am_recursion(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    steps: int,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`steps` times `v + step * update_mask * (softmax_k(log w_k - beta_k |v - rho_k|^2) @ rho -
    v)`.
    """
    dtype = compute_dtype(v)
    rho, beta = rho.to(dtype), beta.to(dtype) if isinstance(beta, Tensor) else float(beta)
    log_weights = None if log_weights is None else log_weights.to(dtype)
    gain = step if update_mask is None else step * update_mask.to(dtype)
    x = v.to(dtype).expand(result_shape(v, rho, beta, update_mask, log_weights)).clone()
    for _ in range(steps):
        gap = _differences(x, rho, log_weights)
        p = _weights(x, rho, gap, beta, log_weights)
        x = x + gain * (p[..., None, :] @ gap)[..., 0, :]
    return x.to(v.dtype)


def am_step(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """One step of `am_recursion`."""
    return am_recursion(v, rho, beta, 1, step, update_mask, log_weights, precision)


def am_energy(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`-(1/beta) logsumexp_k(log w_k - beta |v - rho_k|^2)`, [..., N]; +inf where no memory takes
    part.
    """
    dtype = compute_dtype(v)
    beta = beta.to(dtype) if isinstance(beta, Tensor) else float(beta)
    log_weights = None if log_weights is None else log_weights.to(dtype)
    far = _differences(v.to(dtype), rho.to(dtype), log_weights).square().sum(-1)
    energy = -torch.logsumexp(_logits(far, beta, log_weights), -1) / beta
    alive = alive_memories(log_weights)
    return energy if alive is None else torch.where(alive.any(-1, keepdim=True), energy, torch.inf)


def am_assign(
    v: Tensor, rho: Tensor, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """Nearest memory with log_weight > -inf, lowest index on ties, and its squared distance; -1
    for none. Labels are those of `kmeans_assign`.
    """
    return assign(kmeans.kmeans_assign, v.detach(), rho.detach(), log_weights)
