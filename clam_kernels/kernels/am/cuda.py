# SPDX-License-Identifier: Apache-2.0
"""The recursion over few features (D <= 16) in the compiled CUDA library: one launch of it, and one
of Triton for the rows in doubt (`exact.py`, `exact_backward.py`).

The library takes operands as views [O, I, *core] of any strides; betas and log-weights are float32.
csrc/register.cpp has the contract. `_core.library` must have loaded it before the first call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import launch
from ..common.operands import arrange, batch_of
from . import exact, exact_backward
from .backward import whole

Beta = float | Tensor
MAX_FEATURES = 16
# Shared memory of a block in the backward, and its least number of warps, as in
# csrc/am_backward.h; a test compares `backward_memories` with it.
_SHARED_BYTES = 96 * 1024
_WARPS = 2
_BACKWARD_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


def backward_memories(features: int) -> int:
    """The most memories whose backward fits in shared memory; D may be symbolic."""
    return _fitting(next(size for size in _BACKWARD_SIZES if size >= features))


@functools.cache
def _fitting(d: int) -> int:
    slot, columns = (d + 6) // 4 * 4, -(-d // 8) * 8 + -(-(d + 2) // 8) * 8
    row = columns + 8 * (columns % 16 == 0)
    sums = 40 if d > 12 else -(-d // 2) * 2 + -(-(d + 2) // 2) * 2
    tiles = _WARPS * 32 * (row + 36)
    k = (_SHARED_BYTES // 4 - tiles) // (slot + _WARPS * sums) + 4
    while 4 * (-(-k // 4) * 4 * slot + tiles + _WARPS * (-(-sums * k // 4) * 4)) > _SHARED_BYTES:
        k -= 1
    return k


def why_not(v: Tensor, rho: object = None, beta: object = 1.0, *_: Any) -> str | None:
    """Why the library cannot take these arguments, or None; `explain` may pass the first few."""
    features = v.shape[-1]
    if features > MAX_FEATURES:
        return f"D = {features} > {MAX_FEATURES}"
    reason = launch.why_not(v)
    if reason is not None:
        return reason
    if isinstance(beta, float) and math.isinf(beta):
        return "beta = inf"
    if isinstance(rho, Tensor) and rho.shape[-2] > backward_memories(features):
        return f"K = {rho.shape[-2]} > {backward_memories(features)} for D = {features}"
    return None


def why_slower(v: Tensor, *rest: Any) -> str | None:
    """Why Triton is faster although the library can: the library does not use matrix units, whose
    lower modes are faster where products cost more than exponentials.
    """
    precision = rest[-1] if rest and isinstance(rest[-1], str) else "highest"
    if precision == "highest" or v.shape[-1] <= 8:
        return None
    return f"{precision} precision at D = {v.shape[-1]} is for matrix units"


class _Operands(NamedTuple):
    """The arguments as the library takes them, and the mask as the second launch takes it."""

    batch: tuple[int, ...]
    v: Tensor
    rho: Tensor
    beta: Tensor | None
    beta_value: float
    log_weights: Tensor | None
    update_mask: Tensor | None
    grad: Tensor | None
    full_mask: Tensor | None

    @property
    def shared(self) -> tuple[Any, ...]:
        """The arguments that forward and backward share."""
        return (
            self.v,
            self.rho,
            self.beta,
            self.beta_value,
            self.log_weights,
            self.update_mask,
        )

    def new_flag(self) -> Tensor:
        """An output [O, I, N] of the library: 1 for rows in doubt."""
        return launch.empty(self.v.shape[:3], torch.uint8, self.v.device)


def _operands(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    grad: Tensor | None = None,
) -> _Operands:
    number = 0.0 if isinstance(beta, Tensor) else float(beta)
    mask = None if update_mask is None else _full(update_mask, v)
    operands = [(v, 2), (rho, 2)]
    if isinstance(beta, Tensor):
        operands.append((beta.float(), 1))
    if log_weights is not None:
        operands.append((log_weights.float(), 1))
    if mask is not None:
        operands.append((mask, 2))
    batch = batch_of(operands)
    if grad is not None:
        operands.append((grad, 2))
    views = iter(arrange(batch, operands))
    return _Operands(
        batch,
        next(views),
        next(views),
        next(views) if isinstance(beta, Tensor) else None,
        number,
        None if log_weights is None else next(views),
        None if mask is None else next(views),
        None if grad is None else next(views),
        mask,
    )


def _full(mask: Tensor, v: Tensor) -> Tensor:
    """A mask expanded to [..., N, D]: float32, or bytes for a bool mask."""
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.float()
    if mask.shape[-2:] == v.shape[-2:]:
        return mask
    return mask.expand(*mask.shape[:-2], *v.shape[-2:])


def am_recursion(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    steps: int,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> Tensor:
    """All steps in one launch, in float32 for every precision, and one launch for rows in doubt."""
    a = _operands(v, rho, beta, update_mask, log_weights)
    shape = (*a.batch, *v.shape[-2:])
    if steps == 0 or step == 0 or 0 in shape:
        return v.new_empty(shape).copy_(v)
    flag = a.new_flag()
    out: Tensor = torch.ops.clam_cuda.recursion_small(*a.shared, steps, step, flag)
    exact.recursion(exact.operands(v, rho, beta, a.full_mask, log_weights), steps, step, flag, out)
    return out.view(shape)


def am_step(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> Tensor:
    """One step of `am_recursion`."""
    return am_recursion(v, rho, beta, 1, step, update_mask, log_weights, precision)


def am_step_saved(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """`am_step`, and zeros [..., N]: the backward computes the sums of the weights again, which is
    cheaper here than to load them.
    """
    out = am_step(v, rho, beta, step, update_mask, log_weights, precision)
    return out, out.new_zeros(out.shape[:-1], dtype=torch.float32)


def am_recursion_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    steps: int,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (v, rho, beta, update_mask, log_weights), empty where not needed; K is at most
    `backward_memories(D)`.
    """
    arguments = (v, rho, beta, update_mask, log_weights)
    targets = [
        x if need and isinstance(x, Tensor) else None
        for x, need in zip(arguments, needs, strict=True)
    ]
    if steps == 0 or step == 0 or grad.numel() == 0:
        # a copy: an op must not return one of its arguments
        copy = grad.clone(memory_format=torch.contiguous_format)
        gradients: list[Tensor | None] = [copy, None, None, None, None]
    else:
        gradients = _gradients(grad, arguments, steps, step, targets)
    return tuple(
        v.new_empty(0) if like is None else _like(value, like)
        for value, like in zip(gradients, targets, strict=True)
    )


def am_step_backward(
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    step: float,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    saved: Tensor,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of one step; it ignores `saved`."""
    return am_recursion_backward(
        grad, v, rho, beta, 1, step, update_mask, log_weights, needs, precision
    )


def _gradients(
    grad: Tensor,
    arguments: tuple[Tensor, Tensor, Beta, Tensor | None, Tensor | None],
    steps: int,
    step: float,
    targets: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients in the order of `arguments`, with the whole batch, not yet summed over it."""
    v, rho, beta, update_mask, log_weights = arguments
    grad = whole(grad, grad.shape)  # as the second launch reads it
    a = _operands(v, rho, beta, update_mask, log_weights, grad)
    flag = a.new_flag()
    memory_side = any(targets[i] is not None for i in (1, 2, 4))
    grad_v, partials, grad_mask = torch.ops.clam_cuda.recursion_small_backward(
        a.grad,
        *a.shared,
        steps,
        step,
        v.shape != grad.shape,  # float32 until the sum over the batch
        memory_side,
        targets[3] is not None,
        flag,
    )
    operands = exact.operands(v, rho, beta, a.full_mask, log_weights)
    masked = None if targets[3] is None else grad_mask
    again = exact_backward.recursion_backward(
        operands, grad, steps, step, flag, grad_v, masked, memory_side
    )
    gradients: list[Tensor | None] = [grad_v.view(grad.shape), None, None, None, None]
    if again is not None:
        sums = partials.sum(2, dtype=torch.float64).view(*a.batch, *partials.shape[3:])
        sums = sums.sum_to_size(*operands.memory_batch, *partials.shape[3:])
        d, (grad_rho, mass, beta_sum) = v.shape[-1], again.of_batch()
        gradients[1], gradients[4] = sums[..., :d] + grad_rho, sums[..., d] + mass
        gradients[2] = sums[..., d + 1] - beta_sum
    if targets[3] is not None:
        gradients[3] = grad_mask.view(grad.shape)
    return gradients


def _like(value: Tensor | None, like: Tensor) -> Tensor:
    """A gradient summed to the shape and dtype of its argument `like`; None is 0 everywhere."""
    if value is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    lead = value.ndim - like.ndim
    dims = [
        i for i, size in enumerate(value.shape) if i < lead or size != like.shape[i - lead] == 1
    ]
    if dims:
        value = value.sum(dims, dtype=torch.float64)
    return value.to(like.dtype).reshape(like.shape).contiguous()
