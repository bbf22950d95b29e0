# SPDX-License-Identifier: Apache-2.0
"""The nearest centroid of every row on a CPU, in row chunks.

Labels are those of float64 on the stored values, lowest index where squared distances agree within
`TIE`: float32 scores decide where a bound on their error says that they can, float64 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunk import cells, lift, row_chunks, take
from ..common.problems import problems
from ..common.score import compute_dtype
from .equations import batch_of, kmeans_assign
from .nearest import TILE_ENTRIES, Scorer, table_of, tables_of

# N x K x D entries of a small problem.
FEW_ENTRIES = 1 << 15


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
    rows, dtype = x.shape[-2], compute_dtype(x)
    labels = x.new_empty((*batch, rows), dtype=torch.int64)
    sqdist = x.new_empty((*batch, rows if distances else 0), dtype=dtype)
    if x.numel() > 0 and x.shape[-2:].numel() * centroids.shape[-2] <= FEW_ENTRIES:
        _assign_few(x, centroids, mask, labels, sqdist)
        return labels, sqdist
    if not distances and shift is mask is None and _is_small(x, centroids):
        _assign_together(x, centroids, labels)
        return labels, sqdist
    for at, own in problems(batch, (x, 2), (centroids, 2), (shift, 1), (mask, 1)):
        rows_of, centres, origin, gone = own
        table = table_of(centres, origin, gone, x)
        found = labels[at]
        scorer = Scorer(table, rows_of, found)
        scorer.run()
        narrow = centres.to(dtype)
        for part in row_chunks(rows if distances else 0, scorer.rows):
            pair = pair_distances(rows_of[part].to(dtype), narrow, found[part])
            sqdist[at][part] = pair
    return labels, sqdist


def _assign_few(
    x: Tensor, centroids: Tensor, mask: Tensor | None, labels: Tensor, sqdist: Tensor
) -> None:
    """Labels and distances of problems so small that the equation itself is the fastest way."""
    dims, (rows, features) = labels.ndim - 1, x.shape[-2:]
    xs, cs = lift(x, dims, 2), lift(centroids, dims, 2)
    masks = None if mask is None else lift(mask, dims, 1)
    outs = [lift(out[..., None], dims, 2) for out in (labels, sqdist)]
    dtype, entries = sqdist.dtype, rows * features * centroids.shape[-2]
    for cell in cells(labels.shape[:-1], entries, FEW_ENTRIES, 1):
        own, centres = take(xs, cell), take(cs, cell)
        gone = None if masks is None else take(masks, cell)
        found = kmeans_assign(own, centres, None, gone, False)[0].expand(cell.size, -1)
        take(outs[0], cell)[..., 0] = found
        if sqdist.numel():
            take(outs[1], cell)[..., 0] = pair_distances(own.to(dtype), centres.to(dtype), found)


def _is_small(x: Tensor, centroids: Tensor) -> bool:
    """Whether several problems [P, K, D] share few rows: calls would take longer than the work."""
    shared = x.ndim == 2 and centroids.ndim == 3 and len(centroids) > 1
    return shared and 0 < len(x) * centroids.shape[-2] * 4 <= TILE_ENTRIES


def _assign_together(x: Tensor, centroids: Tensor, labels: Tensor) -> None:
    """Labels [P, N] of several problems on the same rows, by one product; those that its scores do
    not decide one problem after the other.
    """
    (count, k, _), dtype = centroids.shape, compute_dtype(x)
    rows = x.to(dtype)
    low, high = torch.aminmax(rows)
    size = max(-float(low), float(high)) * x.shape[-1] ** 0.5
    unit, base = torch.finfo(dtype).eps / 2, 1 << (k - 1).bit_length()
    codes = torch.arange(base, base + k, dtype=dtype, device=x.device)
    step = max(1, TILE_ENTRIES // (len(x) * k))
    for start in range(0, count, step):
        found = labels[start : start + step]
        tables = tables_of(centroids[start : start + step], None, None, x)
        plain = size == size and all(
            t.origin is None and not t.is_dead and size < t.cap for t in tables
        )
        undecided = torch.ones_like(found, dtype=torch.bool)
        if plain:
            half = torch.cat([t.half for t in tables])[:, None]
            score = torch.addmm(half, torch.cat([t.centred for t in tables]), rows.mT, alpha=-1)
            score = score.view(len(tables), k, len(x))
            slack = score.new_tensor([t.slack(size, unit) for t in tables])
            least = score.amin(1, keepdim=True) + slack[:, None, None]
            code = torch.matmul(codes, score.le_(least))
            found.copy_(code)
            undecided = (found < base) | (found >= 2 * base)
            found -= base
        for p in undecided.any(1).nonzero()[:, 0].tolist():
            some = undecided[p].nonzero()[:, 0]
            out = found[p, some]
            Scorer(tables[p], x[some], out).run()
            found[p, some] = out


def pair_distances(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """|x_n - c_label|^2 from differences; for a label of -1 NaN if the row is not finite, or
    inf. Rows [N, D] of one problem, or [P, N, D] of several.
    """
    place, (size, features) = labels.clamp(min=0), centroids.shape[-2:]
    if centroids.ndim > 2 and len(centroids) > 1:
        first = torch.arange(len(centroids), dtype=torch.int64, device=place.device) * size
        place = place + first[:, None]
    chosen = centroids.reshape(-1, features).index_select(0, place.flatten())
    found = (x - chosen.view(*labels.shape, features)).square_().sum(-1)
    lost = labels < 0
    if bool(lost.any()):
        finite = x.isfinite().all(-1)
        found = found.masked_fill(lost, torch.nan).masked_fill(lost & finite, torch.inf)
    return found
