# SPDX-License-Identifier: Apache-2.0
"""The nearest centroid of every row on a CPU, in row chunks.

Labels are those of float64 for the stored values, and the lowest index where squared distances
agree within `TIE`. Scores in float32 decide a row where the bound on their error allows it, float64
decides the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunk import (
    SMALL_PROBLEM_ENTRIES,
    TILE_ENTRIES,
    add_batch_dims,
    cells,
    row_chunks,
    take,
)
from ..common.problems import problems
from ..common.score import compute_dtype
from .equations import batch_of, kmeans_assign
from .nearest import Scorer, table_of, tables_of


def kmeans_assign_forward(
    x: Tensor,
    centroids: Tensor,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    distances: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`kmeans_assign` in row chunks."""
    batch = batch_of(x, centroids, shift, mask)
    rows, dtype = x.shape[-2], compute_dtype(x.dtype)
    labels = x.new_empty((*batch, rows), dtype=torch.int64)
    sqdist = x.new_empty((*batch, rows if distances else 0), dtype=dtype)
    if x.numel() > 0 and x.shape[-2:].numel() * centroids.shape[-2] <= SMALL_PROBLEM_ENTRIES:
        _assign_small(x, centroids, mask, labels, sqdist)
        return labels, sqdist
    if not distances and shift is mask is None and _shares_few_rows(x, centroids):
        _assign_batch(x, centroids, labels)
        return labels, sqdist
    operands = ((x, 2), (centroids, 2), (shift, 1), (mask, 1))
    for index, (x_of, centroids_of, shift_of, mask_of) in problems(batch, *operands):
        table = table_of(centroids_of, shift_of, mask_of, x)
        labels_of = labels[index]
        scorer = Scorer(table, x_of, labels_of)
        scorer.run()
        narrow = centroids_of.to(dtype)
        for part in row_chunks(rows if distances else 0, scorer.tile_rows):
            pair = pair_distances(x_of[part].to(dtype), narrow, labels_of[part])
            sqdist[index][part] = pair
    return labels, sqdist


def _assign_small(
    x: Tensor, centroids: Tensor, mask: Tensor | None, labels: Tensor, sqdist: Tensor
) -> None:
    """Labels and distances by the equation itself, the fastest code for small problems."""
    dims, (rows, features) = labels.ndim - 1, x.shape[-2:]
    xs, cs = add_batch_dims(x, dims, 2), add_batch_dims(centroids, dims, 2)
    masks = None if mask is None else add_batch_dims(mask, dims, 1)
    outs = [add_batch_dims(out[..., None], dims, 2) for out in (labels, sqdist)]
    dtype, entries = sqdist.dtype, rows * features * centroids.shape[-2]
    for cell in cells(labels.shape[:-1], entries, SMALL_PROBLEM_ENTRIES, 1):
        x_of, centroids_of = take(xs, cell), take(cs, cell)
        mask_of = None if masks is None else take(masks, cell)
        labels_of = kmeans_assign(x_of, centroids_of, None, mask_of, False)[0]
        labels_of = labels_of.expand(cell.size, -1)
        take(outs[0], cell)[..., 0] = labels_of
        if sqdist.numel():
            distances = pair_distances(x_of.to(dtype), centroids_of.to(dtype), labels_of)
            take(outs[1], cell)[..., 0] = distances


def _shares_few_rows(x: Tensor, centroids: Tensor) -> bool:
    """Whether several problems [P, K, D] share rows [N, D] so few that the calls for one problem
    would take longer than its computation.
    """
    shared = x.ndim == 2 and centroids.ndim == 3 and len(centroids) > 1
    return shared and 0 < len(x) * centroids.shape[-2] * 4 <= TILE_ENTRIES


def _assign_batch(x: Tensor, centroids: Tensor, labels: Tensor) -> None:
    """Labels [P, N] of several problems with the same rows. One matrix product computes the scores
    of all problems; rows that they do not decide are computed one problem after the other.
    """
    (count, k, _), dtype = centroids.shape, compute_dtype(x.dtype)
    rows = x.to(dtype)
    low, high = torch.aminmax(rows)
    size = max(-float(low), float(high)) * x.shape[-1] ** 0.5
    unit, base = torch.finfo(dtype).eps / 2, 1 << (k - 1).bit_length()
    codes = torch.arange(base, base + k, dtype=dtype, device=x.device)
    step = max(1, TILE_ENTRIES // (len(x) * k))
    for start in range(0, count, step):
        labels_of = labels[start : start + step]
        tables = tables_of(centroids[start : start + step], None, None, x)
        scores_decide = size == size and all(
            t.origin is None and not t.is_empty and size < t.max_row_norm for t in tables
        )
        undecided = torch.ones_like(labels_of, dtype=torch.bool)
        if scores_decide:
            half = torch.cat([t.half for t in tables])[:, None]
            score = torch.addmm(half, torch.cat([t.centred for t in tables]), rows.mT, alpha=-1)
            score = score.view(len(tables), k, len(x))
            slack = score.new_tensor([t.slack(size, unit) for t in tables])
            least = score.amin(1, keepdim=True) + slack[:, None, None]
            code = torch.matmul(codes, score.le_(least))
            labels_of.copy_(code)
            undecided = (labels_of < base) | (labels_of >= 2 * base)
            labels_of -= base
        for p in undecided.any(1).nonzero()[:, 0].tolist():
            index = undecided[p].nonzero()[:, 0]
            own = labels_of[p, index]
            Scorer(tables[p], x[index], own).run()
            labels_of[p, index] = own


def pair_distances(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """|x_n - c_label|^2 from differences, for rows [N, D] of one problem or [P, N, D] of several.
    With a label of -1 it is inf for a finite row, and NaN for another.
    """
    place, (size, features) = labels.clamp(min=0), centroids.shape[-2:]
    if centroids.ndim > 2 and len(centroids) > 1:
        first = torch.arange(len(centroids), dtype=torch.int64, device=place.device) * size
        place = place + first[:, None]
    nearest = centroids.reshape(-1, features).index_select(0, place.flatten())
    sqdist = (x - nearest.view(*labels.shape, features)).square_().sum(-1)
    unlabelled = labels < 0
    if bool(unlabelled.any()):
        finite = x.isfinite().all(-1)
        sqdist = sqdist.masked_fill(unlabelled, torch.nan)
        sqdist = sqdist.masked_fill(unlabelled & finite, torch.inf)
    return sqdist
