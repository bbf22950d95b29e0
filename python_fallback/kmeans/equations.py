# SPDX-License-Identifier: Apache-2.0
"""The equations of k-means in plain torch, from N x K x D differences in float64.
docs/ops/kmeans.md has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunk import broadcast_shapes
from ..common.score import compute_dtype
from .nearest import TIE


def kmeans_assign(
    x: Tensor,
    centroids: Tensor,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    distances: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The equation of `clam_kernels.kmeans_assign`, from N x K x D differences in float64."""
    gap = x.double()[..., :, None, :] - centroids.double()[..., None, :, :]
    far = gap.square_().sum(-1)
    far = torch.where(far.isfinite() & centroids.isfinite().all(-1)[..., None, :], far, torch.inf)
    if mask is not None:
        far = torch.where(mask[..., None, :], torch.inf, far)
    batch = batch_of(x, centroids, shift, mask)
    far = far.expand(*batch, *far.shape[-2:])
    best = far.detach().amin(-1, keepdim=True)
    size = far.shape[-1]
    index = torch.arange(size, dtype=torch.int64, device=x.device)
    first = torch.where(far.detach() <= best * (1 + TIE), index, size).amin(-1)
    regular = x.isfinite().all(-1)
    lost = ~regular | ~best[..., 0].isfinite()
    labels = torch.where(lost, -1, first)
    if not distances:
        return labels, x.new_empty((*batch, 0), dtype=compute_dtype(x))
    near = far.gather(-1, torch.where(lost, 0, first)[..., None])[..., 0]
    return labels, torch.where(regular, near, torch.nan).to(compute_dtype(x))


def kmeans_update(
    x: Tensor,
    labels: Tensor,
    k: int,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The equation of `clam_kernels.kmeans_update`, from an N x K x D array in float64."""
    chosen = labels[..., None] == torch.arange(k, dtype=torch.int64, device=x.device)
    rows = x.double() if shift is None else x.double() - shift.double()[..., None, :]
    held = chosen.double()
    if weight is not None:
        rows = rows * weight.double()[..., None]
        held = torch.where(chosen, weight.double()[..., None], 0.0)
    # a row takes part in its own label's sum alone, whatever it holds
    sums = torch.where(chosen[..., None], rows[..., None, :], 0.0).sum(-3)
    counts = held.sum(-2) if weight is not None else chosen.sum(-2)
    return sums, counts.expand(sums.shape[:-1]).contiguous()


def kmeans_step(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of `clam_kernels.kmeans_step`: one after the other."""
    labels, _ = kmeans_assign(x, centroids, shift, mask, False, precision)
    labels = labels_of_all(labels, weight)
    return labels, *kmeans_update(x, labels, centroids.shape[-2], weight, shift)


def labels_of_all(labels: Tensor, weight: Tensor | None) -> Tensor:
    """Labels of every problem, also where only weights tell them apart."""
    if weight is None:
        return labels
    batch = broadcast_shapes(labels.shape, weight.shape)
    return labels.expand(batch).contiguous()


def batch_of(*operands: Tensor | None) -> torch.Size:
    """Broadcast of the leading dims of (x or labels' owner, centroids, shift, mask)."""
    core = (2, 2, 1, 1)
    shapes = [o.shape[: o.ndim - c] for o, c in zip(operands, core, strict=True) if o is not None]
    return broadcast_shapes(*shapes)
