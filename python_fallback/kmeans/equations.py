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
    """(argmin_k |x_n - c_k|^2, the minimum), from N x K x D differences in float64."""
    difference = x.double()[..., :, None, :] - centroids.double()[..., None, :, :]
    sqdist = difference.square_().sum(-1)
    sqdist = torch.where(
        sqdist.isfinite() & centroids.isfinite().all(-1)[..., None, :], sqdist, torch.inf
    )
    if mask is not None:
        sqdist = torch.where(mask[..., None, :], torch.inf, sqdist)
    batch = batch_of(x, centroids, shift, mask)
    sqdist = sqdist.expand(*batch, *sqdist.shape[-2:])
    least = sqdist.detach().amin(-1, keepdim=True)
    size = sqdist.shape[-1]
    index = torch.arange(size, dtype=torch.int64, device=x.device)
    lowest = torch.where(sqdist.detach() <= least * (1 + TIE), index, size).amin(-1)
    finite = x.isfinite().all(-1)
    unlabelled = ~finite | ~least[..., 0].isfinite()
    labels = torch.where(unlabelled, -1, lowest)
    if not distances:
        return labels, x.new_empty((*batch, 0), dtype=compute_dtype(x.dtype))
    minimum = sqdist.gather(-1, torch.where(unlabelled, 0, lowest)[..., None])[..., 0]
    return labels, torch.where(finite, minimum, torch.nan).to(compute_dtype(x.dtype))


def kmeans_update(
    x: Tensor,
    labels: Tensor,
    k: int,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum_n [label_n = k] w_n (x_n - shift), sum_n [label_n = k] w_n), from an N x K x D array in
    float64.
    """
    is_label = labels[..., None] == torch.arange(k, dtype=torch.int64, device=x.device)
    rows = x.double() if shift is None else x.double() - shift.double()[..., None, :]
    weights = is_label.double()
    if weight is not None:
        rows = rows * weight.double()[..., None]
        weights = torch.where(is_label, weight.double()[..., None], 0.0)
    # a row that is not finite changes the sum of its own label only
    sums = torch.where(is_label[..., None], rows[..., None, :], 0.0).sum(-3)
    counts = weights.sum(-2) if weight is not None else is_label.sum(-2)
    return sums, counts.expand(sums.shape[:-1]).contiguous()


def kmeans_step(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kmeans_assign`, then `kmeans_update` by its labels."""
    labels, _ = kmeans_assign(x, centroids, shift, mask, False, precision)
    labels = labels_of_all(labels, weight)
    return labels, *kmeans_update(x, labels, centroids.shape[-2], weight, shift)


def labels_of_all(labels: Tensor, weight: Tensor | None) -> Tensor:
    """Labels of every problem, also of problems that differ in their weights only."""
    if weight is None:
        return labels
    batch = broadcast_shapes(labels.shape, weight.shape)
    return labels.expand(batch).contiguous()


def batch_of(*operands: Tensor | None) -> torch.Size:
    """The broadcast of the leading dims of (x, centroids, shift, mask)."""
    core = (2, 2, 1, 1)
    shapes = [o.shape[: o.ndim - c] for o, c in zip(operands, core, strict=True) if o is not None]
    return broadcast_shapes(*shapes)
