# SPDX-License-Identifier: Apache-2.0
"""Sums of rows by label on a CPU, alone and after an assignment."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunk import broadcast_shapes, row_chunks
from ..common.problems import problems
from .assign import kmeans_assign_forward
from .equations import labels_of_all
from .nearest import WIDE_ENTRIES


def kmeans_update_forward(
    x: Tensor,
    labels: Tensor,
    k: int,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kmeans_update` in row chunks, added in the order of the rows in float64."""
    leads = [x.shape[:-2], labels.shape[:-1]]
    leads += [o.shape[:-1] for o in (weight, shift) if o is not None]
    batch = broadcast_shapes(*leads)
    wide, device = torch.float64, x.device
    d, (rows,) = x.shape[-1], labels.shape[-1:]
    sums = torch.zeros((*batch, k, d), dtype=wide, device=device)
    counts = torch.zeros(
        (*batch, k), dtype=torch.int64 if weight is None else torch.float64, device=x.device
    )
    shared = x.ndim == 2 and labels.ndim == 2 and weight is shift is None
    if shared and labels.numel() * d <= WIDE_ENTRIES and not x.is_cuda:
        return _update_together(x, labels, k)
    limit = max(1, WIDE_ENTRIES // 4 // max(d, k if x.is_cuda else 1))
    for at, own in problems(batch, (x, 2), (labels, 1), (weight, 1), (shift, 1)):
        rows_of, found, share, origin = own
        total = torch.zeros((k + 1, d), dtype=wide, device=device)
        held = torch.zeros(k + 1, dtype=counts.dtype, device=device)
        found = torch.where((found >= 0) & (found < k), found, k)
        share = None if share is None else share.double()
        for part in row_chunks(rows, limit):
            values = rows_of[part].double()
            if origin is not None:
                values = values - origin.double()
            heavy = None if share is None else share[part]
            if heavy is not None:
                values = values * heavy[:, None]
            add_grouped_(total, held, found[part], values, heavy)
        sums[at], counts[at] = total[:k], held[:k]
    return sums, counts


def _update_together(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sums of several labellings [P, N] of the same few rows, in the order of the rows."""
    (count, n), d = labels.shape, x.shape[-1]
    found = torch.where((labels >= 0) & (labels < k), labels, k)
    index = torch.arange(count, dtype=torch.int64, device=x.device)
    place = (found + (k + 1) * index[:, None]).flatten()
    total = torch.zeros((count * (k + 1), d), dtype=torch.float64, device=x.device)
    total.index_add_(0, place, x.double().expand(count, n, d).reshape(count * n, d))
    held = torch.bincount(place, minlength=len(total))
    sums, counts = total.view(count, k + 1, d)[:, :k], held.view(count, k + 1)[:, :k]
    return sums.contiguous(), counts.contiguous()


def add_grouped_(
    total: Tensor, held: Tensor, labels: Tensor, values: Tensor, weight: Tensor | None
) -> None:
    """Add rows [n, D] and their weights to the totals of their labels, in a fixed order: a GPU's
    own additions by index have none, a product has.
    """
    if values.is_cuda:
        index = torch.arange(len(total), dtype=torch.int64, device=labels.device)
        chosen = (index[:, None] == labels).double()
        total.addmm_(chosen, values)
        held += (chosen.sum(1) if weight is None else chosen @ weight).to(held.dtype)
        return
    total.index_add_(0, labels, values)
    held += torch.bincount(labels, weight, minlength=len(held))


def kmeans_step_forward(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kmeans_step`: labels, then sums."""
    labels, _ = kmeans_assign_forward(x, centroids, shift, mask, False, precision)
    labels = labels_of_all(labels, weight)
    return labels, *kmeans_update_forward(x, labels, centroids.shape[-2], weight, shift)
