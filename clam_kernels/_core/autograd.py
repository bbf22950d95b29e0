# SPDX-License-Identifier: Apache-2.0
"""Autograd: the differentiable form of an op, and ops without a derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend
from .dispatch import LIBRARY, below_autograd, is_direct
from .spec import Gradient, OpSpec, qualified, tensor_names


def register_autograd(
    spec: OpSpec,
    op: Any,
    filled: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    tensors: Sequence[int],
    kernel: Callable[..., Any],
    differentiate: Callable[..., Any] | None,
) -> None:
    """Register the Autograd kernel of an op. Under torch.func or forward AD it runs the truth,
    where an argument requires a gradient the differentiable form, otherwise the kernel. `filled`
    adds the defaults that the dispatcher drops; `tensors` are the positions of the tensor
    arguments.
    """

    def autograd_kernel(keys: Any, *a: Any) -> Any:
        a = filled(a)
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            spec.check(*a)
            return spec.truth(*a)
        if differentiate is not None and torch.is_grad_enabled():
            for i in tensors:
                if a[i] is not None and a[i].requires_grad:
                    return differentiate(is_direct(keys), *a)
        with below_autograd():
            return kernel(*a) if is_direct(keys) else op(*a)

    name = qualified(spec.name, op._schema.overload_name)
    LIBRARY.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def refuse_gradient(op: Any, kernel: Callable[..., Any], why: str) -> None:
    """Register an Autograd kernel whose result raises NotImplementedError when differentiated."""
    name = op._schema.name

    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(*a: Any) -> Any:
            with below_autograd():
                return op(*a)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> NoReturn:
            raise NotImplementedError(f"{name}: {why}")

    apply: Callable[..., Any] = Refuse.apply

    def autograd_kernel(keys: Any, *a: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in a):
            return apply(*a)
        with below_autograd():
            return kernel(*a) if is_direct(keys) else op(*a)

    overload = qualified(name.partition("::")[2], op._schema.overload_name)
    LIBRARY.impl(overload, autograd_kernel, "Autograd", with_keyset=True)


def function(
    spec: OpSpec,
    gradient: Gradient,
    names: Sequence[str],
    forward: tuple[Any, Callable[..., Any]],
    backward_op: Any,
) -> Callable[..., Any]:
    """The autograd function of one overload with arguments `names`. Backward uses the precision and
    the backend that forward resolved. `forward` is (op, kernel); `is_direct` is the index of the
    one that runs.
    """
    positions = [names.index(slot) for slot in tensor_names(spec)]
    first, count = positions[0], len(gradient.outputs)
    has_forward, first_saved = gradient.saved is not None, -len(gradient.saved_tensors)

    class Fn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, direct: bool, *inputs: Any) -> Any:
            # no `setup_context`: with one, torch inspects a signature at every call
            needs = [[ctx.needs_input_grad[1 + i] for i in positions]]
            with below_autograd():
                output = forward[direct](*inputs, *(needs if gradient.saved_for_needs else ()))
            saved = [x if isinstance(x, Tensor) else None for x in inputs]
            if has_forward:
                saved += output[first_saved:]
            ctx.save_for_backward(*saved)
            ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]
            device = inputs[first].device.type
            ctx.precision = backend.resolve_precision(inputs[-1])
            ctx.backend = backend.choose(spec, device, (*inputs[:-1], ctx.precision))[0]
            ctx.set_materialize_grads(False)
            if has_forward or count > 1:
                ctx.mark_non_differentiable(*output[count:])
                ctx.shapes = [(o.shape, o.dtype) for o in output[:count]]
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            upstream = grads[:count]
            if all(grad is None for grad in upstream):
                return (None,) * (1 + len(names))
            tensors = ctx.saved_tensors
            arguments = [
                number if tensor is None else tensor
                for number, tensor in zip(ctx.numbers, tensors, strict=False)
            ]
            extra = tensors[len(names) :]
            needs = [ctx.needs_input_grad[1 + i] for i in positions]
            if count > 1:
                like = next(grad for grad in upstream if grad is not None)
                upstream = tuple(
                    like.new_zeros(shape, dtype=dtype) if grad is None else grad
                    for grad, (shape, dtype) in zip(upstream, ctx.shapes, strict=True)
                )
            gradients = backward_op(
                *upstream, *arguments[:-1], *extra, needs, ctx.precision, ctx.backend
            )
            result: list[Any] = [None] * (1 + len(names))
            for i, need, value in zip(positions, needs, gradients, strict=True):
                result[1 + i] = value if need else None
            return tuple(result)

    apply: Callable[..., Any] = Fn.apply
    return (lambda *a: apply(*a)[0]) if has_forward else apply
