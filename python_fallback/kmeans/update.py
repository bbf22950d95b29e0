# SPDX-License-Identifier: Apache-2.0
"""Sums of rows by label on a CPU, alone and after an assignment."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunk import FLOAT64_ENTRIES, broadcast_shapes, row_chunks
from ..common.problems import problems
from .assign import kmeans_assign_forward
from .equations import labels_of_all


def kmeans_update_forward(
    x: Tensor,
    labels: Tensor,
    k: int,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kmeans_update` in row chunks: float64 sums in the order of the rows."""
    leads = [x.shape[:-2], labels.shape[:-1]]
    leads += [o.shape[:-1] for o in (weight, shift) if o is not None]
    batch = broadcast_shapes(*leads)
    wide, device = torch.float64, x.device
    d, (rows,) = x.shape[-1], labels.shape[-1:]
    sums = torch.zeros((*batch, k, d), dtype=wide, device=device)
    counts = torch.zeros(
        (*batch, k), dtype=torch.int64 if weight is None else torch.float64, device=x.device
    )
    shares_rows = x.ndim == 2 and labels.ndim == 2 and weight is shift is None
    if shares_rows and labels.numel() * d <= FLOAT64_ENTRIES and not x.is_cuda:
        return _update_batch(x, labels, k)
    limit = max(1, FLOAT64_ENTRIES // 4 // max(d, k if x.is_cuda else 1))
    operands = ((x, 2), (labels, 1), (weight, 1), (shift, 1))
    for index, (x_of, labels_of, weight_of, shift_of) in problems(batch, *operands):
        total = torch.zeros((k + 1, d), dtype=wide, device=device)  # row k: labels out of range
        count = torch.zeros(k + 1, dtype=counts.dtype, device=device)
        labels_of = torch.where((labels_of >= 0) & (labels_of < k), labels_of, k)
        weight_of = None if weight_of is None else weight_of.double()
        for part in row_chunks(rows, limit):
            values = x_of[part].double()
            if shift_of is not None:
                values = values - shift_of.double()
            weights = None if weight_of is None else weight_of[part]
            if weights is not None:
                values = values * weights[:, None]
            add_grouped_(total, count, labels_of[part], values, weights)
        sums[index], counts[index] = total[:k], count[:k]
    return sums, counts


def _update_batch(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sums of the same few rows for several problems' labels [P, N], in the order of the rows."""
    (batch, n), d = labels.shape, x.shape[-1]
    labels = torch.where((labels >= 0) & (labels < k), labels, k)
    index = torch.arange(batch, dtype=torch.int64, device=x.device)
    place = (labels + (k + 1) * index[:, None]).flatten()
    total = torch.zeros((batch * (k + 1), d), dtype=torch.float64, device=x.device)
    total.index_add_(0, place, x.double().expand(batch, n, d).reshape(batch * n, d))
    count = torch.bincount(place, minlength=len(total))
    sums, counts = total.view(batch, k + 1, d)[:, :k], count.view(batch, k + 1)[:, :k]
    return sums.contiguous(), counts.contiguous()


def add_grouped_(
    total: Tensor, count: Tensor, labels: Tensor, values: Tensor, weight: Tensor | None
) -> None:
    """Add rows [n, D] to total[label] and their weights to count[label], in a fixed order. A GPU
    adds by index in any order, so there a matrix product does it.
    """
    if values.is_cuda:
        index = torch.arange(len(total), dtype=torch.int64, device=labels.device)
        is_label = (index[:, None] == labels).double()
        total.addmm_(is_label, values)
        count += (is_label.sum(1) if weight is None else is_label @ weight).to(count.dtype)
        return
    total.index_add_(0, labels, values)
    count += torch.bincount(labels, weight, minlength=len(count))


def kmeans_step_forward(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kmeans_assign`, then `kmeans_update` by its labels."""
    labels, _ = kmeans_assign_forward(x, centroids, shift, mask, False, precision)
    labels = labels_of_all(labels, weight)
    return labels, *kmeans_update_forward(x, labels, centroids.shape[-2], weight, shift)
