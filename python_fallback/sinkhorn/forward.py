# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling on a CPU: potentials f, g that give exp(logits + f + g) its row and column
sums.
"""

from __future__ import annotations

from torch import Tensor

from .scaling_batch import Case


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
    case = Case((logits,), (bias, log_row, log_col, init), scale)
    return case.forward(n_iter, prototype_first)


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
    case = Case((z, prototypes), (bias, log_row, log_col, init), scale)
    return case.forward(n_iter, prototype_first)


def sinkhorn_pass_forward(
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_pass` in row chunks."""
    return Case((logits,), (bias, log_row, None, g), scale, covered=False).one_pass()


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
    return Case((z, prototypes), (bias, log_row, None, g), scale, covered=False).one_pass()
