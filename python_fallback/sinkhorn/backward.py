# SPDX-License-Identifier: Apache-2.0
"""The gradients of Sinkhorn scaling on a CPU, through all iterations."""

from __future__ import annotations

from torch import Tensor

from .scaling_batch import SinkhornCall, iterations_backward, pass_backward


def sinkhorn_potentials_backward(
    grad_f: Tensor,
    grad_g: Tensor,
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    bias: Tensor | None,
    scale: Tensor | None,
    needs: list[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (logits, log_row, log_col, init, bias, scale) through all iterations."""
    call = SinkhornCall((logits,), (bias, log_row, log_col, init), scale)
    backward_of = iterations_backward(n_iter, prototype_first)
    order = [needs[i] for i in (0, 4, 1, 2, 3, 5)]
    grads = call.backward(backward_of, (grad_f, grad_g), order)
    grad_logits, grad_bias, grad_row, grad_col, grad_init, grad_scale = grads
    return grad_logits, grad_row, grad_col, grad_init, grad_bias, grad_scale


def sinkhorn_potentials_features_backward(
    grad_f: Tensor,
    grad_g: Tensor,
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    scale: Tensor | None,
    needs: list[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, prototypes, bias, log_row, log_col, init, scale) through all iterations."""
    call = SinkhornCall((z, prototypes), (bias, log_row, log_col, init), scale)
    backward_of = iterations_backward(n_iter, prototype_first)
    return call.backward(backward_of, (grad_f, grad_g), needs)


def sinkhorn_pass_backward(
    grad_f: Tensor,
    grad_log_mass: Tensor,
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    needs: list[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (logits, g, log_row, bias, scale)."""
    call = SinkhornCall((logits,), (bias, log_row, None, g), scale, needs_mass=False)
    order = [needs[0], needs[3], needs[2], False, needs[1], needs[4]]
    grads = call.backward(pass_backward, (grad_f, grad_log_mass), order)
    grad_logits, grad_bias, grad_row, _, grad_g, grad_scale = grads
    return grad_logits, grad_g, grad_row, grad_bias, grad_scale


def sinkhorn_features_pass_backward(
    grad_f: Tensor,
    grad_log_mass: Tensor,
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    scale: Tensor | None,
    needs: list[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, prototypes, g, bias, log_row, scale)."""
    call = SinkhornCall((z, prototypes), (bias, log_row, None, g), scale, needs_mass=False)
    order = [needs[0], needs[1], needs[3], needs[4], False, needs[2], needs[5]]
    grads = call.backward(pass_backward, (grad_f, grad_log_mass), order)
    grad_z, grad_prototypes, grad_bias, grad_row, _, grad_g, grad_scale = grads
    return grad_z, grad_prototypes, grad_g, grad_bias, grad_row, grad_scale
