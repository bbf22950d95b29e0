# SPDX-License-Identifier: Apache-2.0
"""What logits are made of where a result is read: products of features, and scores times a scale.
Autocast has its say where `sinkhorn` is called, and none here, forward or backward.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# Entries of a product whose sum is a gradient, in memory at once.
ENTRIES = 1 << 18


def autocast_off(like: Tensor) -> Any:
    """A block in which autocast does nothing on the device of a tensor."""
    kind = like.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def product(z: Tensor, prototypes: Tensor, exact: bool) -> Tensor:
    """The product z @ prototypes^T; `exact` computes it in float64, where torch's own may be lower
    than float32.
    """
    # dynamo takes no function of autograd with a forward derivative
    if torch.compiler.is_dynamo_compiling() or not (z.requires_grad or prototypes.requires_grad):
        return _multiplied(z, prototypes.mT, exact)
    found: Tensor = _Product.apply(z, prototypes, exact)  # type: ignore[no-untyped-call]
    return found


def scaled(x: Tensor, base: Tensor | None, scale: Tensor) -> Tensor:
    """Scores, less the base of their rows, times the scale."""
    if not scale.requires_grad:
        return _above(x, base) * scale
    if torch.compiler.is_dynamo_compiling():  # which tiles and fuses this
        shut = x == -torch.inf
        return torch.where(shut, x, torch.where(shut, 0.0, _above(x, base)) * scale)
    found: Tensor = _Scaled.apply(x, base, scale)  # type: ignore[no-untyped-call]
    return found


def _above(x: Tensor, base: Tensor | None) -> Tensor:
    return x if base is None else x - base


def _multiplied(a: Tensor, b: Tensor, exact: bool) -> Tensor:
    with autocast_off(a):
        return (a.double() @ b.double()).to(a.dtype) if exact else a @ b


class _Product(torch.autograd.Function):
    """Autograd's own gradient of a product would be in autocast's dtype inside its block."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, prototypes: Tensor, exact: bool) -> Tensor:
        return _multiplied(z, prototypes.mT, exact)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        *pair, ctx.exact = inputs
        ctx.save_for_backward(*pair)
        ctx.save_for_forward(*pair)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, prototypes = ctx.saved_tensors
        of_z = of_prototypes = None
        if ctx.needs_input_grad[0]:
            of_z = _multiplied(grad, prototypes, ctx.exact).sum_to_size(z.shape)
        if ctx.needs_input_grad[1]:
            of_prototypes = _multiplied(grad.mT, z, ctx.exact).sum_to_size(prototypes.shape)
        return of_z, of_prototypes, None

    @staticmethod
    def jvp(ctx: Any, of_z: Tensor | None, of_prototypes: Tensor | None, _: None) -> Tensor:
        z, prototypes = ctx.saved_tensors
        found = torch.zeros_like(z[..., :1])
        if of_z is not None:
            found = found + _multiplied(of_z, prototypes.mT, ctx.exact)
        if of_prototypes is not None:
            found = found + _multiplied(z, of_prototypes.mT, ctx.exact)
        return found


class _Scaled(torch.autograd.Function):
    """A forbidden pair gives the scale no gradient: 0 times infinity would be NaN. Autograd keeps
    the scores themselves, and no array beside them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, base: Tensor | None, scale: Tensor) -> Tensor:
        return _above(x, base) * scale

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor]:
        x, base, scale = ctx.saved_tensors
        size = max(1, ENTRIES * x.shape[-2] // max(1, x.numel()))
        bases = [None] * x.shape[-2] if base is None else base.split(size, -2)
        slope = torch.zeros_like(scale, dtype=torch.float64)
        for one, other, own in zip(grad.split(size, -2), x.split(size, -2), bases, strict=False):
            terms = torch.where(other == -torch.inf, 0.0, one * _above(other, own))
            slope = slope + terms.sum(dtype=torch.float64)
        return grad * scale if ctx.needs_input_grad[0] else None, None, slope.to(scale.dtype)

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, _: None, of_scale: Tensor | None) -> Tensor:
        x, base, scale = ctx.saved_tensors
        found = torch.zeros_like(x) if of_x is None else of_x * scale
        if of_scale is None:
            return found
        return found + torch.where(x == -torch.inf, 0.0, _above(x, base) * of_scale)
