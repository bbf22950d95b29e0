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


def default_pairs(assigned: int, views: int, like: Tensor) -> Tensor:
    """The weights of SwAV's pairs, [A, V]: 1 / (A (V - 1)), and 0 for a view with itself."""
    share = 1 / (assigned * (views - 1))
    pairs = torch.full((assigned, views), share, dtype=torch.float64, device=like.device)
    return pairs.fill_diagonal_(0.0)


def row_shares(weight: Tensor | None, views: int, rows: int, like: Tensor) -> Tensor:
    """`h_vi = w_vi / sum_i w_vi`, [*, V, B] in float64; 0 where all weights of a view are 0."""
    if weight is None:
        return torch.full((views, rows), 1 / max(rows, 1), dtype=torch.float64, device=like.device)
    weight = weight.double()
    weight = weight.expand(*weight.shape[:-2], views, rows)
    mass = weight.sum(-1, keepdim=True)
    return weight / torch.where(mass == 0, 1.0, mass)


def swapped_scores(
    z: Tensor, prototypes: Tensor, bias: Tensor | None, temperature: float
) -> Tensor:
    """`S_vik / temperature` of rows [*, V, B, D], with S = z . c + b; [*, V, B, K] in float64."""
    line = None if bias is None else bias[..., None, :].double() / temperature
    return nce_scores(z, prototypes[..., None, :, :], temperature, line)


def codes_of(scores: Tensor, f: Tensor, g: Tensor, is_row_regular: Tensor) -> tuple[Tensor, Tensor]:
    """`q = exp(scores + f + g)`, a constant, [*, A, B, K], and which of its rows are finite; the
    others are 0.
    """
    q = (scores + f.double()[..., None] + g.double()[..., None, :]).exp().detach()
    finite = q.isfinite().all(-1) & is_row_regular
    return torch.where(finite[..., None], q, 0.0), finite


def swapped_prediction(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    bias: Tensor | None = None,
    target_z: Tensor | None = None,
    target_prototypes: Tensor | None = None,
    target_bias: Tensor | None = None,
    pairs: Tensor | None = None,
    weight: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`L = sum_vi h_vi sum_k t_vik (lse_vi - S_vik / temperature)`, [*], with the targets t
    constants.
    """
    views, rows = z.shape[-3], z.shape[-2]
    teacher = z[..., : f.shape[-2], :, :] if target_z is None else target_z
    points = prototypes if target_prototypes is None else target_prototypes
    line = bias if target_bias is None else target_bias
    scores = swapped_scores(teacher, points, line, epsilon)
    q, finite = codes_of(scores, f, g, is_regular(teacher))
    pairs = default_pairs(f.shape[-2], views, f) if pairs is None else pairs.double()
    t = torch.einsum("...av,...abk->...vbk", pairs, q)
    is_undefined = ((pairs != 0)[..., None] & ~finite[..., None, :]).any(-3)  # [*, V, B]
    share = row_shares(weight, views, rows, f)
    good = (share != 0) & is_regular(z) & ~is_undefined
    s = swapped_scores(z, prototypes, bias, temperature)
    logs = torch.where(good[..., None], s, 0.0).log_softmax(-1)
    losses = -torch.where((t == 0) | ~good[..., None], 0.0, t * logs).sum(-1)
    void = torch.where((share != 0) & ~good, torch.nan, 0.0).double()
    void = void * torch.where((share != 0)[..., None], z, 0.0).double().sum(-1)
    return (share * losses + void).sum((-2, -1)).to(compute_dtype(z.dtype))
