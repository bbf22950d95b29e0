# SPDX-License-Identifier: Apache-2.0
"""The gradients of Sinkhorn scaling on a CPU, through all iterations."""

from __future__ import annotations

from torch import Tensor

from .scaling_batch import Case, through_all, through_pass


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
    case = Case((logits,), (bias, log_row, log_col, init), scale)
    through = through_all(n_iter, prototype_first)
    order = [needs[i] for i in (0, 4, 1, 2, 3, 5)]
    x, h, a, b, g, times = case.backward(through, (grad_f, grad_g), order)
    return x, a, b, g, h, times


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
    case = Case((z, prototypes), (bias, log_row, log_col, init), scale)
    through = through_all(n_iter, prototype_first)
    return case.backward(through, (grad_f, grad_g), needs)


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
    case = Case((logits,), (bias, log_row, None, g), scale, covered=False)
    order = [needs[0], needs[3], needs[2], False, needs[1], needs[4]]
    x, h, a, _, g, times = case.backward(through_pass, (grad_f, grad_log_mass), order)
    return x, g, a, h, times


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
    case = Case((z, prototypes), (bias, log_row, None, g), scale, covered=False)
    order = [needs[0], needs[1], needs[3], needs[4], False, needs[2], needs[5]]
    z, c, h, a, _, g, times = case.backward(through_pass, (grad_f, grad_log_mass), order)
    return z, c, g, h, a, times
