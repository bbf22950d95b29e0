# SPDX-License-Identifier: Apache-2.0
"""Plain torch as users write it, for the accuracy rule: matrix products of centred data.

The truth of `python_fallback` computes N x K x D differences, and is more accurate than what
users would run in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops._facts import compute_dtype
from . import spec_of


def _centred(
    v: Tensor, rho: Tensor, log_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """(states - centre, memories - centre, centre, dtype); masked memories are 0."""
    dtype = compute_dtype(v.dtype)
    memories = rho.to(dtype)
    if log_weights is None:
        c = memories.detach().mean(-2, keepdim=True)
        return v.to(dtype) - c, memories - c, c, dtype
    active = (torch.atleast_1d(log_weights) != -math.inf).expand(
        *log_weights.shape[:-1], rho.shape[-2]
    )[..., None]
    total = torch.where(active, memories.detach(), 0.0).sum(-2, keepdim=True)
    c = total / active.sum(-2, keepdim=True).clamp(min=1)
    return v.to(dtype) - c, torch.where(active, memories - c, 0.0), c, dtype


def _logits(x: Tensor, rho: Tensor, beta: float | Tensor, log_weights: Tensor | None) -> Tensor:
    """`log w_k - beta_k |x - rho_k|^2`, 0 where all memories are masked."""
    scale = beta[..., None, :] if isinstance(beta, Tensor) and beta.ndim else beta
    sqdist = x.square().sum(-1, keepdim=True)
    sqdist = sqdist + rho.square().sum(-1)[..., None, :] - 2 * x @ rho.mT
    if log_weights is None:
        return -scale * sqdist
    log_w = torch.atleast_1d(log_weights).to(x.dtype)[..., None, :]
    return torch.where((log_w != -math.inf).any(-1, keepdim=True), log_w - scale * sqdist, 0.0)


def am_recursion(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`steps` steps; the truth itself for no steps or beta = inf, which need no softmax."""
    if steps == 0 or (not isinstance(beta, Tensor) and math.isinf(beta)):
        truth = spec_of("am_recursion").truth
        out: Tensor = truth(v, rho, beta, steps, step, update_mask, log_weights)
        return out
    x, memories, c, dtype = _centred(v, rho, log_weights)
    beta = beta.to(dtype) if isinstance(beta, Tensor) else beta
    gain = step if update_mask is None else step * update_mask.to(dtype)
    if log_weights is not None:
        any_active = (torch.atleast_1d(log_weights) != -math.inf).any(-1, keepdim=True)
        gain = gain * any_active[..., None].to(dtype)
    for _ in range(steps):
        p = torch.softmax(_logits(x, memories, beta, log_weights), -1)
        x = x + gain * (p @ memories - x)
    return (x + c).to(v.dtype)


def am_step(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """One step of `am_recursion`."""
    return am_recursion(v, rho, beta, 1, step, update_mask, log_weights)


def am_energy(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`-(1/beta) logsumexp_k(logits)`."""
    x, memories, _, dtype = _centred(v, rho, log_weights)
    beta = beta.to(dtype) if isinstance(beta, Tensor) else beta
    energy = -torch.logsumexp(_logits(x, memories, beta, log_weights), -1) / beta
    if log_weights is None:
        return energy
    any_active = (torch.atleast_1d(log_weights) != -math.inf).any(-1, keepdim=True)
    return torch.where(any_active, energy, math.inf)
