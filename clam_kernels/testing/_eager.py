# SPDX-License-Identifier: Apache-2.0
"""Plain torch as users write it, for the accuracy rule: matrix products of centred data.

The truth of `python_fallback` takes differences, N x K x D of them, and is more accurate than what
anyone would run in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import spec_of


def _centred(
    v: Tensor, rho: Tensor, log_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """(states, memories, centre, dtype): memories that take no part are 0."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    wide = rho.to(dtype)
    if log_weights is None:
        c = wide.detach().mean(-2, keepdim=True)
        return v.to(dtype) - c, wide - c, c, dtype
    keep = (torch.atleast_1d(log_weights) != -math.inf).expand(
        *log_weights.shape[:-1], rho.shape[-2]
    )[..., None]
    total = torch.where(keep, wide.detach(), 0.0).sum(-2, keepdim=True)
    c = total / keep.sum(-2, keepdim=True).clamp(min=1)
    return v.to(dtype) - c, torch.where(keep, wide - c, 0.0), c, dtype


def _logits(x: Tensor, rho: Tensor, beta: float | Tensor, log_weights: Tensor | None) -> Tensor:
    scale = beta[..., None, :] if isinstance(beta, Tensor) and beta.ndim else beta
    far = x.square().sum(-1, keepdim=True)
    far = far + rho.square().sum(-1)[..., None, :] - 2 * x @ rho.mT
    if log_weights is None:
        return -scale * far
    lam = torch.atleast_1d(log_weights).to(x.dtype)[..., None, :]
    return torch.where((lam != -math.inf).any(-1, keepdim=True), lam - scale * far, 0.0)


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
    """`steps` steps; without a softmax (no step, or beta = inf) the truth itself."""
    if steps == 0 or (not isinstance(beta, Tensor) and math.isinf(beta)):
        truth = spec_of("am_recursion").truth
        out: Tensor = truth(v, rho, beta, steps, step, update_mask, log_weights)
        return out
    x, memories, c, dtype = _centred(v, rho, log_weights)
    beta = beta.to(dtype) if isinstance(beta, Tensor) else beta
    gain = step if update_mask is None else step * update_mask.to(dtype)
    if log_weights is not None:
        some = (torch.atleast_1d(log_weights) != -math.inf).any(-1, keepdim=True)
        gain = gain * some[..., None].to(dtype)
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
    some = (torch.atleast_1d(log_weights) != -math.inf).any(-1, keepdim=True)
    return torch.where(some, energy, math.inf)
