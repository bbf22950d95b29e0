# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling on a CPU: potentials f, g for which exp(logits + f + g) has the row and column
sums exp(log_row) and exp(log_col).
"""

from __future__ import annotations

from torch import Tensor

from .scaling_batch import SinkhornCall


def sinkhorn_potentials_forward(
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn_potentials` in row chunks."""
    call = SinkhornCall((logits,), (bias, log_row, log_col, init), scale)
    return call.forward(n_iter, prototype_first)


def sinkhorn_potentials_features_forward(
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn_potentials_features` in row chunks; the logits of one chunk exist at a time."""
    call = SinkhornCall((z, prototypes), (bias, log_row, log_col, init), scale)
    return call.forward(n_iter, prototype_first)


def sinkhorn_pass_forward(
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_pass` in row chunks."""
    return SinkhornCall((logits,), (bias, log_row, None, g), scale, needs_mass=False).one_pass()


def sinkhorn_features_pass_forward(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_features_pass` in row chunks; the logits of one chunk exist at a time."""
    return SinkhornCall(
        (z, prototypes), (bias, log_row, None, g), scale, needs_mass=False
    ).one_pass()
