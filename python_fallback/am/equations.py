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
from ..common.score import active_memories, compute_dtype
from .hard import assign, nearest_labels
from .problem import Beta, result_shape


def _differences(x: Tensor, rho: Tensor, log_weights: Tensor | None) -> Tensor:
    """`rho_k - x_n`, [..., N, K, D]; 0 for a masked memory, which may be NaN."""
    gap = rho[..., None, :, :] - x[..., :, None, :]
    active = active_memories(log_weights)
    return gap if active is None else torch.where(active[..., None, :, None], gap, 0.0)


def _logits(sqdist: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    """`log w_k - beta_k |x_n - rho_k|^2`, [..., N, K]; 0 where all memories are masked."""
    z = sqdist * -(beta[..., None, :] if isinstance(beta, Tensor) and beta.ndim else beta)
    if log_weights is None:
        return z
    any_active = active_memories(log_weights).any(-1, keepdim=True)[..., None]  # type: ignore[union-attr]
    return torch.where(any_active, z + torch.atleast_1d(log_weights)[..., None, :], 0.0)


def is_hard(beta: Beta) -> bool:
    """Whether beta = inf: each step moves a row towards its nearest memory alone."""
    return isinstance(beta, float) and math.isinf(beta)


def am_weights(x: Tensor, rho: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    """`softmax_k(log w_k - beta_k |x_n - rho_k|^2)`, [..., N, K]; one-hot at the nearest memory for
    beta = inf, 0 where all memories are masked. Computed in float64, as the rows in doubt of the
    recursion: logits of finite rows and memories may leave the range of float32.
    """
    x64, memories = x.double(), rho.double()
    beta = beta.double() if isinstance(beta, Tensor) else beta
    log_weights = None if log_weights is None else log_weights.double()
    gap = _differences(x64, memories, log_weights)
    return _weights(x64, memories, gap, beta, log_weights).to(x.dtype)


def _weights(x: Tensor, rho: Tensor, gap: Tensor, beta: Beta, log_weights: Tensor | None) -> Tensor:
    if is_hard(beta):
        labels = nearest_labels(x.detach(), rho.detach(), log_weights)[..., None]
        index = torch.arange(rho.shape[-2], dtype=torch.int64, device=x.device)
        p = (index == labels).to(x.dtype)
        return p + (gap.detach() * 0).sum(-1)  # NaN where a row or a memory is not finite
    p = torch.softmax(_logits(gap.square().sum(-1), beta, log_weights), -1)
    active = active_memories(log_weights)
    return p if active is None else torch.where(active[..., None, :], p, 0.0)


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
    dtype = compute_dtype(v.dtype)
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
    """`-(1/beta) logsumexp_k(log w_k - beta |v - rho_k|^2)`, [..., N]; +inf where all memories are
    masked.
    """
    dtype = compute_dtype(v.dtype)
    beta = beta.to(dtype) if isinstance(beta, Tensor) else float(beta)
    log_weights = None if log_weights is None else log_weights.to(dtype)
    sqdist = _differences(v.to(dtype), rho.to(dtype), log_weights).square().sum(-1)
    energy = -torch.logsumexp(_logits(sqdist, beta, log_weights), -1) / beta
    active = active_memories(log_weights)
    return (
        energy if active is None else torch.where(active.any(-1, keepdim=True), energy, torch.inf)
    )


def am_assign(
    v: Tensor, rho: Tensor, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """(argmin_k |v - rho_k|^2, the minimum) over the memories with log_weight > -inf; the lowest
    index of a tie, -1 where all memories are masked. Labels are those of `kmeans_assign`.
    """
    return assign(kmeans.kmeans_assign, v.detach(), rho.detach(), log_weights)
