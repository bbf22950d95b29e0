# SPDX-License-Identifier: Apache-2.0
"""The exact nearest centroid of every row of one problem. Scores in float32 decide a row where the
bound on their error allows it; float64 differences decide the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.chunk import (
    FEWEST_ROWS,
    FLOAT64_ENTRIES,
    KMEANS_ROWS,
    MAX_TILE_ENTRIES,
    TILE_ENTRIES,
    row_chunks,
    rows_within,
)
from ..common.score import centre_of, compute_dtype

# Squared distances are a tie if their relative difference is at most this.
TIE = 2.0**-40
SMALLEST_NORMAL, LARGEST = (
    {t: getattr(torch.finfo(t), word) for t in (torch.float32, torch.float64)}
    for word in ("tiny", "max")
)
# A few distant centroids may move the mean where the largest squared distance from it exceeds the
# mean of these distances by this factor. `centre_of`, which they cannot move, then replaces the
# mean.
OUTLIER_FACTOR = 4.0


class CentroidTable(NamedTuple):
    """Centroids of one problem. The nearest has the least score, `half - x . centred`."""

    exact: Tensor  # [K, D] float64, the centroids
    active: Tensor  # [K] bool: finite and not masked
    centred: Tensor  # [K, D], centroids - origin; 0 where not active
    half: Tensor  # [K], |centred|^2 / 2, + origin . centred if rows are not shifted; or inf
    origin: Tensor | None  # [D], subtracted from the rows; None if rows are not shifted
    largest_norm: float  # the largest |centred|, -1 if no centroid is active
    origin_norm: float  # |origin| if rows are not shifted, else 0
    norms: Tensor  # [K], |centred| in ascending order, -1 where not active

    @property
    def is_empty(self) -> bool:
        """Whether no centroid is active."""
        return self.largest_norm < 0

    def slack(self, size: float, unit: float) -> float:
        """Twice the bound on the error of a score, for rows of norm `size`, plus the width of a
        tie.
        """
        d, origin = self.exact.shape[-1], self.origin_norm
        largest = self._largest_competitor(size + origin)
        scores = (d + 6) * size * largest + 2 * largest**2 + 3 * origin * largest
        underflow = (d + 4) * SMALLEST_NORMAL[self.half.dtype]
        return 2 * (unit * scores + underflow) + TIE * (size + origin + largest) ** 2

    def _largest_competitor(self, size: float) -> float:
        """The largest |centred| of a centroid that can be the nearest of a row of norm `size`. For
        |c| >= 4 size a score is at least |c|^2 / 4. The score of the smallest centroid is at most
        (size + its |c|)^2, so beyond 4 (size + its |c|) no error of a score matters.
        """
        if self.largest_norm < 4 * size:
            return self.largest_norm
        active = self.norms[int((self.norms < 0).sum()) :]
        least = float(active[0])
        return float(active[active <= max(least, 4 * (size + least))][-1])

    @property
    def max_row_norm(self) -> float:
        """No score of a row with a norm below this leaves the range of its dtype, nor do its
        terms.
        """
        limit = LARGEST[self.half.dtype] / 4
        if self.origin_norm >= limit:
            return 0.0
        if not self.largest_norm:
            return limit
        return min(limit, limit / self.largest_norm - self.largest_norm - self.origin_norm)


def tables_of(
    centroids: Tensor, shift: Tensor | None, mask: Tensor | None, like: Tensor
) -> list[CentroidTable]:
    """The tables of centroids [P, K, D] of several problems. A shift of rows and centroids changes
    no label. It is subtracted from the rows only where it is large beside the spread of the
    centroids: scores would lose digits there.
    """
    dtype, exact = compute_dtype(like.dtype), centroids.double()
    active = exact.isfinite().all(-1)
    if mask is not None:
        active = active & ~mask
    finite = torch.where(active[..., None], exact, 0.0)
    mean = finite.sum(1) / active.sum(1).clamp(min=1)[:, None]
    origin = mean if shift is None else shift.double()
    origin = torch.where(origin.isfinite(), origin, 0.0).to(dtype).double()
    centred = torch.where(active[..., None], exact - origin[:, None], 0.0)
    norms = torch.where(active, centred.norm(dim=-1), -1.0)
    spread = norms.amax(1)
    if shift is None and bool((spread.square() > OUTLIER_FACTOR * norms.square().mean(1)).any()):
        origin = centre_of(finite, active[..., None])[:, 0].to(dtype).double()
        centred = torch.where(active[..., None], exact - origin[:, None], 0.0)
        norms = torch.where(active, centred.norm(dim=-1), -1.0)
        spread = norms.median(1).values
    largest_norm, origin_norm = norms.amax(1).tolist(), origin.norm(dim=-1).tolist()
    shifts_rows = (origin.norm(dim=-1) > 4 * spread).tolist()
    half = centred.square().sum(-1) / 2
    unshifted = half + (centred @ origin[..., None])[..., 0]
    half = torch.where(active.new_tensor(shifts_rows)[:, None], half, unshifted)
    half = torch.where(active, half, torch.inf).to(dtype)
    narrow, origin = centred.to(dtype), origin.to(dtype)
    return [
        CentroidTable(
            exact[p], active[p], narrow[p], half[p], origin[p] if shifts_rows[p] else None,
            largest_norm[p], 0.0 if shifts_rows[p] else origin_norm[p], norms[p].sort().values,
        )
        for p in range(len(exact))
    ]  # fmt: skip


def table_of(
    centroids: Tensor, shift: Tensor | None, mask: Tensor | None, like: Tensor
) -> CentroidTable:
    """The table of centroids [K, D] of one problem."""
    origin, masked = (None if o is None else o[None] for o in (shift, mask))
    return tables_of(centroids[None], origin, masked, like)[0]


def tile_rows(k: int) -> int:
    """Rows of one chunk for K centroids."""
    rows = 1 << max(0, (TILE_ENTRIES // k).bit_length() - 1)
    return max(FEWEST_ROWS, min(rows_within(KMEANS_ROWS, rows), MAX_TILE_ENTRIES // k))


class UndecidedRows:
    """Rows that scores do not decide, and the candidates of each; float64 decides them."""

    def __init__(self, x: Tensor, table: CentroidTable, out: Tensor, base: int) -> None:
        self.x, self.table, self.out, self.base = x, table, out, base
        self.pieces: list[tuple[Tensor, Tensor, Tensor]] = []
        self.size = 0

    def add(self, rows: Tensor, near: Tensor) -> None:
        """Add rows, by index [n], and their candidates `near` [K, n], bool."""
        limit = max(1, FLOAT64_ENTRIES // len(near))
        for part in row_chunks(len(rows), limit):
            centroid, row = near[:, part].nonzero(as_tuple=True)
            self.pieces.append((centroid, row, rows[part]))
            self.size += len(centroid)
            if self.size >= FLOAT64_ENTRIES:
                self.decide()

    def decide(self) -> None:
        """Write label + base of the added rows; the label is -1 if no candidate is active and
        finite.
        """
        if not self.pieces:
            return
        centroid = torch.cat([piece[0] for piece in self.pieces])
        starts = [0]
        for piece in self.pieces:
            starts.append(starts[-1] + len(piece[2]))
        pairs = zip(self.pieces, starts, strict=False)
        row = torch.cat([piece[1] + start for piece, start in pairs])
        rows = torch.cat([piece[2] for piece in self.pieces])
        self.pieces, self.size = [], 0
        self.out[rows] = self._nearest(centroid, row, rows) + self.base

    def _nearest(self, centroid: Tensor, row: Tensor, rows: Tensor) -> Tensor:
        """Labels [len(rows)] of candidate pairs: centroid [m], and row [m] as an index into
        rows.
        """
        table, (k, d), n = self.table, self.table.exact.shape, len(rows)
        sqdist = torch.empty(len(row), dtype=torch.float64, device=row.device)
        for part in row_chunks(len(row), max(1, FLOAT64_ENTRIES // d)):
            difference = self.x[rows[row[part]]].double().sub_(table.exact[centroid[part]])
            sqdist[part] = difference.square_().sum(-1)
        sqdist = torch.where(sqdist.isfinite() & table.active[centroid], sqdist, torch.inf)
        best = sqdist.new_full((n,), torch.inf).scatter_reduce_(0, row, sqdist, "amin")
        tied = (sqdist <= best[row] * (1 + TIE)) & sqdist.isfinite()
        first = torch.where(tied, centroid, k)
        labels = first.new_full((n,), k).scatter_reduce_(0, row, first, "amin")
        return torch.where(labels == k, -1, labels)


class Scorer:
    """Tiles of scores of one problem, and the labels that they decide."""

    def __init__(self, table: CentroidTable, x: Tensor, labels: Tensor) -> None:
        k, dtype = len(table.exact), compute_dtype(x.dtype)
        self.table, self.x, self.out, self.dtype = table, x, labels, dtype
        self.tile_rows = min(tile_rows(k), max(len(x), 1))
        self.scratch = torch.empty(k * self.tile_rows, dtype=dtype, device=x.device)
        self.row_scratch = torch.empty(2, self.tile_rows, dtype=dtype, device=x.device)
        # a row's code is the sum of k + base over its candidates k: below 2 base it has only one
        self.base = 1 << (k - 1).bit_length()
        self.codes = torch.arange(self.base, self.base + k, dtype=dtype, device=x.device)
        self.half, self.unit = table.half[:, None], torch.finfo(dtype).eps / 2
        self.sqrt_features, self.max_row_norm = x.shape[-1] ** 0.5, table.max_row_norm
        self.views = self._views(self.tile_rows)
        self.undecided = UndecidedRows(x, table, labels, self.base)

    def _views(self, n: int) -> tuple[Tensor, ...]:
        """Scratch for n rows: scores [K, n], and two vectors [n]."""
        k = len(self.half)
        return (self.scratch[: k * n].view(k, n), *self.row_scratch[:, :n].unbind())

    def run(self) -> None:
        """Write the label of every row."""
        if self.table.is_empty:
            self.out.fill_(-1)
            return
        for part in row_chunks(len(self.x), self.tile_rows):
            self._label(part)
        self.undecided.decide()
        self.out -= self.base

    def _label(self, part: slice) -> None:
        """Write label + base of some rows, and add the undecided ones."""
        rows, out, origin = self.x[part], self.out[part], self.table.origin
        x = rows if rows.dtype == self.dtype else rows.to(self.dtype)
        if origin is not None:
            x = x - origin
        size = self._size(x)
        if size < self.max_row_norm:
            self._decide(x, size, out, part.start)
            return
        # False where a row is not finite
        in_range = x.abs().amax(-1) * self.sqrt_features < self.max_row_norm
        x = torch.where(in_range[:, None], x, 0.0)
        self._decide(x, self._size(x), out, part.start, in_range)
        finite = rows.isfinite().all(-1)
        out[~finite] = self.base - 1
        long = (finite & ~in_range).nonzero()[:, 0]
        every = torch.ones(1, dtype=torch.bool, device=rows.device)
        self.undecided.add(long + part.start, every.expand(len(self.half), len(long)))

    def _size(self, x: Tensor) -> float:
        """A bound on the norms of the rows, `sqrt(D) max |x|`."""
        low, high = torch.aminmax(x)
        return max(-float(low), float(high)) * self.sqrt_features

    def _decide(
        self, x: Tensor, size: float, out: Tensor, start: int, in_range: Tensor | None = None
    ) -> None:
        """Write label + base of the rows that their scores decide; add the others if they are
        `in_range`.
        """
        n = len(x)
        score, least, code = self.views if n == self.tile_rows else self._views(n)
        torch.addmm(self.half, self.table.centred, x.mT, alpha=-1, out=score)
        torch.amin(score, 0, out=least)
        near = score.le_(least.add_(self.table.slack(size, self.unit)))
        torch.mv(near.mT, self.codes, out=code)
        out.copy_(code)
        low, high = torch.aminmax(code)
        if self.base <= float(low) and float(high) < 2 * self.base:
            return  # one candidate in every row
        undecided = code.div_(self.base).floor_().ne_(1) != 0
        some = (undecided if in_range is None else undecided & in_range).nonzero()[:, 0]
        candidates = near[:, some] != 0
        candidates |= ~candidates.any(0)  # where scores are NaN, every centroid is a candidate
        self.undecided.add(some + start, candidates)
