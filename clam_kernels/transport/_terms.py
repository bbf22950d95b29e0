# SPDX-License-Identifier: Apache-2.0
"""The terms of the logits in the methods of a result: products of features, and scores times a
scale. Autocast applies where `sinkhorn` is called, and not here, neither forward nor backward.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# Entries of one tile of a product whose sum is a gradient.
TILE_ENTRIES = 1 << 18


def autocast_off(like: Tensor) -> Any:
    """A context that disables autocast on the device of a tensor."""
    kind = like.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def product(z: Tensor, prototypes: Tensor, exact: bool) -> Tensor:
    """The product z @ prototypes^T; `exact` computes it in float64, because torch's precision may
    be lower than float32.
    """
    # dynamo does not trace an autograd.Function with a jvp
    if torch.compiler.is_dynamo_compiling() or not (z.requires_grad or prototypes.requires_grad):
        return _matmul(z, prototypes.mT, exact)
    result: Tensor = _Product.apply(z, prototypes, exact)  # type: ignore[no-untyped-call]
    return result


def scale_scores(x: Tensor, base: Tensor | None, scale: Tensor) -> Tensor:
    """`(x - base) * scale`, with base [..., N, 1] a number of each row."""
    if not scale.requires_grad:
        return _subtract_base(x, base) * scale
    if torch.compiler.is_dynamo_compiling():  # the compiler fuses this
        is_forbidden = x == -torch.inf
        finite = torch.where(is_forbidden, 0.0, _subtract_base(x, base))
        return torch.where(is_forbidden, x, finite * scale)
    result: Tensor = _Scaled.apply(x, base, scale)  # type: ignore[no-untyped-call]
    return result


def _subtract_base(x: Tensor, base: Tensor | None) -> Tensor:
    return x if base is None else x - base


def _matmul(a: Tensor, b: Tensor, exact: bool) -> Tensor:
    with autocast_off(a):
        return (a.double() @ b.double()).to(a.dtype) if exact else a @ b


class _Product(torch.autograd.Function):
    """z @ prototypes^T with the gradients G @ prototypes and G^T @ z. Inside a `with` block of
    autocast torch's own gradient of a product would have autocast's dtype.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, prototypes: Tensor, exact: bool) -> Tensor:
        return _matmul(z, prototypes.mT, exact)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        *pair, ctx.exact = inputs
        ctx.save_for_backward(*pair)
        ctx.save_for_forward(*pair)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, prototypes = ctx.saved_tensors
        d_z = d_prototypes = None
        if ctx.needs_input_grad[0]:
            d_z = _matmul(grad, prototypes, ctx.exact).sum_to_size(z.shape)
        if ctx.needs_input_grad[1]:
            d_prototypes = _matmul(grad.mT, z, ctx.exact).sum_to_size(prototypes.shape)
        return d_z, d_prototypes, None

    @staticmethod
    def jvp(ctx: Any, d_z: Tensor | None, d_prototypes: Tensor | None, _: None) -> Tensor:
        z, prototypes = ctx.saved_tensors
        result = torch.zeros_like(z[..., :1])
        if d_z is not None:
            result = result + _matmul(d_z, prototypes.mT, ctx.exact)
        if d_prototypes is not None:
            result = result + _matmul(z, d_prototypes.mT, ctx.exact)
        return result


class _Scaled(torch.autograd.Function):
    """`(x - base) * scale` with the gradients G scale, and sum (x - base) G for the scale. A
    forbidden pair (-inf) adds nothing to the latter: 0 * inf is NaN. Autograd saves the scores
    alone, and no other [N, K] array.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, base: Tensor | None, scale: Tensor) -> Tensor:
        return _subtract_base(x, base) * scale

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor]:
        x, base, scale = ctx.saved_tensors
        size = max(1, TILE_ENTRIES * x.shape[-2] // max(1, x.numel()))
        base_tiles = [None] * x.shape[-2] if base is None else base.split(size, -2)
        grad_scale = torch.zeros_like(scale, dtype=torch.float64)
        tiles = zip(grad.split(size, -2), x.split(size, -2), base_tiles, strict=False)
        for grad_tile, x_tile, base_tile in tiles:
            terms = grad_tile * _subtract_base(x_tile, base_tile)
            terms = torch.where(x_tile == -torch.inf, 0.0, terms)
            grad_scale = grad_scale + terms.sum(dtype=torch.float64)
        return grad * scale if ctx.needs_input_grad[0] else None, None, grad_scale.to(scale.dtype)

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor | None, _: None, d_scale: Tensor | None) -> Tensor:
        x, base, scale = ctx.saved_tensors
        result = torch.zeros_like(x) if d_x is None else d_x * scale
        if d_scale is None:
            return result
        return result + torch.where(x == -torch.inf, 0.0, _subtract_base(x, base) * d_scale)
