# SPDX-License-Identifier: Apache-2.0
"""The prototype cross-entropies in plain torch: any device, twice differentiable, in float64.
docs/ops/xent.md has the equations.

Shapes: z [*, N, D] or [*, V, N, D], prototypes [*, K, D]; leading dims broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..common.chunk import broadcast_shapes
from ..common.score import compute_dtype

Number = float | Tensor


def batch_of(*operands: tuple[object, int]) -> torch.Size:
    """Broadcast of the leading dims of (operand, dims below them); a number has none."""
    leads = [o.shape[: max(o.ndim - core, 0)] for o, core in operands if isinstance(o, Tensor)]
    return broadcast_shapes(*leads)


def is_regular(z: Tensor) -> Tensor:
    """Which rows are finite, [..., N]."""
    return z.isfinite().all(-1)


def zero_masked(prototypes: Tensor, bias: Tensor) -> Tensor:
    """The prototypes [*, K, D], with 0 for those with bias -inf."""
    return torch.where((bias == -torch.inf)[..., None], 0.0, prototypes)


def nce_scores(z: Tensor, prototypes: Tensor, phi: Number, bias: Tensor | None) -> Tensor:
    """`s_ij = z_i . c_j / phi_j + b_j`, [*, N, Kt] in float64; a row that is not finite counts as
    0, a masked prototype (bias -inf) has score -inf.
    """
    rows = torch.where(is_regular(z)[..., None], z, 0.0).double()
    fixed = prototypes if bias is None else zero_masked(prototypes, bias)
    scale = phi.double()[..., None] if isinstance(phi, Tensor) and phi.ndim else phi
    s = rows @ (fixed.double() / scale).mT
    return s if bias is None else s + bias.double()[..., None, :]


def proto_nce_losses(
    z: Tensor,
    prototypes: Tensor,
    phi: Number,
    labels: Tensor,
    bias: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    precision: str | None = None,
) -> Tensor:
    """`l_mi = logsumexp_{j in m} s_ij - s_i,label`, [*, M, N]; 0 where the label is -1."""
    s = nce_scores(z, prototypes, phi, bias)
    batch = batch_of((z, 2), (prototypes, 2), (phi, 1), (labels, 2), (bias, 1))
    labels, s = labels.expand(*batch, *labels.shape[-2:]), s.expand(*batch, *s.shape[-2:])
    regular = is_regular(z)
    losses = []
    for m, (start, stop) in enumerate(pairwise(offsets or (0, prototypes.shape[-2]))):
        label = labels[..., m, :]
        used = ((label >= 0) & regular)[..., None]
        scores = torch.where(used, s[..., start:stop], 0.0)  # [*, N, K]
        positive = scores.gather(-1, label.clamp(min=0)[..., None])
        loss = (scores.logsumexp(-1, keepdim=True) - positive)[..., 0]
        void = torch.where((label >= 0) & ~regular, torch.nan, 0.0).double()
        rows = torch.where((label >= 0)[..., None], z, 0.0).double()
        losses.append(torch.where(used[..., 0], loss, 0.0) + void * rows.sum(-1))
    return torch.stack(losses, -2).to(compute_dtype(z.dtype)).contiguous()
