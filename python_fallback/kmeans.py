# SPDX-License-Identifier: Apache-2.0
"""k-means: the nearest centroid of every row, and sums of rows by label. Equations:
docs/ops/kmeans.md.

Labels are those of float64 on the stored values, lowest index where squared distances agree within
`TIE`: float32 scores decide where a bound on their error says that they can, float64 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ._chunk import broadcast_shapes, cells, lift, row_chunks, take
from ._nearest import TIE, TILE_ENTRIES, WIDE_ENTRIES, Scorer, table_of, tables_of
from ._score import compute_dtype

# N x K x D entries of a small problem.
FEW_ENTRIES = 1 << 15


# ---- the equations -------------------------------------------------------------------------------


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
    batch = _batch(x, centroids, shift, mask)
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
    labels = _labels_of_all(labels, weight)
    return labels, *kmeans_update(x, labels, centroids.shape[-2], weight, shift)


def _labels_of_all(labels: Tensor, weight: Tensor | None) -> Tensor:
    """Labels of every problem, also where only weights tell them apart."""
    if weight is None:
        return labels
    batch = broadcast_shapes(labels.shape, weight.shape)
    return labels.expand(batch).contiguous()


def _batch(*operands: Tensor | None) -> torch.Size:
    """Broadcast of the leading dims of (x or labels' owner, centroids, shift, mask)."""
    core = (2, 2, 1, 1)
    shapes = [o.shape[: o.ndim - c] for o, c in zip(operands, core, strict=True) if o is not None]
    return broadcast_shapes(*shapes)


# ---- assignment in row chunks --------------------------------------------------------------------


def kmeans_assign_forward(
    x: Tensor,
    centroids: Tensor,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    distances: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`kmeans_assign` in row chunks."""
    batch = _batch(x, centroids, shift, mask)
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


def problems(
    batch: torch.Size, *operands: tuple[Tensor | None, int]
) -> Iterator[tuple[tuple[int, ...], list[Tensor]]]:
    """Index of every problem of a batch, and each operand's part in it; nothing is copied."""
    wide = [
        None if o is None else o.expand([*batch, *o.shape[o.ndim - core :]]) for o, core in operands
    ]
    for at in product(*map(range, batch)):
        yield at, [None if o is None else o[at] for o in wide]  # type: ignore[misc]


# ---- sums by label -------------------------------------------------------------------------------


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


# ---- both --------------------------------------------------------------------------------------


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
    labels = _labels_of_all(labels, weight)
    return labels, *kmeans_update_forward(x, labels, centroids.shape[-2], weight, shift)
