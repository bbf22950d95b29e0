# SPDX-License-Identifier: Apache-2.0
"""k-means: the nearest centroid of every row, and sums of rows by label. Equations:
docs/ops/kmeans.md.

Labels are those of float64 on the stored values, lowest index where squared distances agree within
`TIE`: float32 scores decide where a bound on their error says that they can, float64 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ._chunk import cells, lift, row_chunks, take
from ._score import compute_dtype

# Squared distances this close, relative to the smaller one, are a tie.
TIE = 2.0**-40
# Entries of one K x rows tile of scores, about a second-level cache. Rows of a chunk stay between
# these whatever K is, but for a tile of more than `MOST_ENTRIES`.
TILE_ENTRIES, MIN_ROWS, MAX_ROWS, MOST_ENTRIES = 1 << 18, 256, 4096, 1 << 23
TINY, MOST = (
    {t: getattr(torch.finfo(t), word) for t in (torch.float32, torch.float64)}
    for word in ("tiny", "max")
)
# float64 entries that are worked on at once, and N x K x D entries of a small problem.
WIDE_ENTRIES, FEW_ENTRIES = 1 << 18, 1 << 15


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
    batch = torch.broadcast_shapes(labels.shape, weight.shape)
    return labels.expand(batch).contiguous()


def _batch(*operands: Tensor | None) -> torch.Size:
    """Broadcast of the leading dims of (x or labels' owner, centroids, shift, mask)."""
    core = (2, 2, 1, 1)
    shapes = [o.shape[: o.ndim - c] for o, c in zip(operands, core, strict=True) if o is not None]
    return torch.broadcast_shapes(*shapes)


# ---- assignment in row chunks --------------------------------------------------------------------


class Table(NamedTuple):
    """Centroids of one problem, prepared: score = half - x . centred, least for the nearest."""

    exact: Tensor  # [K, D] float64, as given
    alive: Tensor  # [K] bool
    centred: Tensor  # [K, D], less the origin; 0 where not alive
    half: Tensor  # [K]: |centred|^2 / 2 (+ origin . centred where rows stay as they are), or inf
    origin: Tensor | None  # [D] that is subtracted from rows, if anything is
    reach: float  # the largest |centred|, -1 where no centroid is alive
    lean: float  # |origin| where it is not subtracted

    @property
    def is_dead(self) -> bool:
        """Whether no centroid can win."""
        return self.reach < 0

    def slack(self, size: float, unit: float) -> float:
        """Twice the error of a score of rows of norm `size`, and the width of a tie."""
        d = self.exact.shape[-1]
        scores = (d + 6) * size * self.reach + 2 * self.reach**2 + 3 * self.lean * self.reach
        lost = (d + 4) * TINY[self.half.dtype]  # what underflows
        return 2 * (unit * scores + lost) + TIE * (size + self.lean + self.reach) ** 2

    @property
    def cap(self) -> float:
        """Norm of rows below which no score, nor a part of it, leaves its dtype's range."""
        most = MOST[self.half.dtype] / 4
        if self.lean >= most:
            return 0.0
        return min(most, most / self.reach - self.reach - self.lean if self.reach else most)


def tables_of(
    centroids: Tensor, shift: Tensor | None, mask: Tensor | None, like: Tensor
) -> list[Table]:
    """Prepare centroids [P, K, D] of several problems. A shift of both sides changes no label; it
    is subtracted from the rows only where it is large beside the centroids' spread, for scores lose
    digits then.
    """
    dtype, exact = compute_dtype(like), centroids.double()
    alive = exact.isfinite().all(-1)
    if mask is not None:
        alive = alive & ~mask
    kept = torch.where(alive[..., None], exact, 0.0)
    middle = kept.sum(1) / alive.sum(1).clamp(min=1)[:, None]
    origin = middle if shift is None else shift.double()
    origin = torch.where(origin.isfinite(), origin, 0.0).to(dtype).double()
    centred = torch.where(alive[..., None], exact - origin[:, None], 0.0)
    sizes = torch.where(alive, centred.norm(dim=-1), -1.0)
    reach, lean = sizes.amax(1).tolist(), origin.norm(dim=-1).tolist()
    far = [away > 4 * size for size, away in zip(reach, lean, strict=True)]
    half = centred.square().sum(-1) / 2
    near = half + (centred @ origin[..., None])[..., 0]
    half = torch.where(alive.new_tensor(far)[:, None], half, near)
    half = torch.where(alive, half, torch.inf).to(dtype)
    narrow, origin = centred.to(dtype), origin.to(dtype)
    return [
        Table(
            exact[p], alive[p], narrow[p], half[p], origin[p] if far[p] else None, reach[p],
            0.0 if far[p] else lean[p],
        )
        for p in range(len(exact))
    ]  # fmt: skip


def table_of(centroids: Tensor, shift: Tensor | None, mask: Tensor | None, like: Tensor) -> Table:
    """Prepare centroids [K, D] of one problem."""
    origin, gone = (None if o is None else o[None] for o in (shift, mask))
    return tables_of(centroids[None], origin, gone, like)[0]


def tile_rows(k: int) -> int:
    """Rows of one chunk for K centroids."""
    rows = 1 << max(0, (TILE_ENTRIES // k).bit_length() - 1)
    return max(16, min(max(MIN_ROWS, min(MAX_ROWS, rows)), MOST_ENTRIES // k))


class Pairs:
    """Rows that scores cannot decide, each with its candidates; settled in float64."""

    def __init__(self, x: Tensor, table: Table, out: Tensor, base: int) -> None:
        self.x, self.table, self.out, self.base = x, table, out, base
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.size = 0

    def add(self, rows: Tensor, near: Tensor) -> None:
        """Candidates near [K, n] of some rows, by index."""
        limit = max(1, WIDE_ENTRIES // len(near))
        for part in row_chunks(len(rows), limit):
            memory, row = near[:, part].nonzero(as_tuple=True)
            self.found.append((memory, row, rows[part]))
            self.size += len(memory)
            if self.size >= WIDE_ENTRIES:
                self.settle()

    def settle(self) -> None:
        """Write label + base of the rows so far; the label is -1 where no candidate is left."""
        if not self.found:
            return
        memory = torch.cat([one[0] for one in self.found])
        starts = [0]
        for one in self.found:
            starts.append(starts[-1] + len(one[2]))
        row = torch.cat([one[1] + at for one, at in zip(self.found, starts, strict=False)])
        rows = torch.cat([one[2] for one in self.found])
        self.found, self.size = [], 0
        self.out[rows] = self._nearest(memory, row, rows) + self.base

    def _nearest(self, memory: Tensor, row: Tensor, rows: Tensor) -> Tensor:
        table, (k, d), n = self.table, self.table.exact.shape, len(rows)
        far = torch.empty(len(row), dtype=torch.float64, device=row.device)
        for part in row_chunks(len(row), max(1, WIDE_ENTRIES // d)):
            gap = self.x[rows[row[part]]].double().sub_(table.exact[memory[part]])
            far[part] = gap.square_().sum(-1)
        far = torch.where(far.isfinite() & table.alive[memory], far, torch.inf)
        best = far.new_full((n,), torch.inf).scatter_reduce_(0, row, far, "amin")
        tied = (far <= best[row] * (1 + TIE)) & far.isfinite()
        first = torch.where(tied, memory, k)
        labels = first.new_full((n,), k).scatter_reduce_(0, row, first, "amin")
        return torch.where(labels == k, -1, labels)


class Scorer:
    """Tiles of scores of one problem, and the labels they give."""

    def __init__(self, table: Table, x: Tensor, labels: Tensor) -> None:
        k, dtype = len(table.exact), compute_dtype(x)
        self.table, self.x, self.out, self.dtype = table, x, labels, dtype
        self.rows = min(tile_rows(k), max(len(x), 1))
        self.tile = torch.empty(k * self.rows, dtype=dtype, device=x.device)
        self.lines = torch.empty(2, self.rows, dtype=dtype, device=x.device)
        # a code is the sum of k + base over the candidates: below 2 base there is only one
        self.base = 1 << (k - 1).bit_length()
        self.codes = torch.arange(self.base, self.base + k, dtype=dtype, device=x.device)
        self.half, self.unit = table.half[:, None], torch.finfo(dtype).eps / 2
        self.length, self.cap = x.shape[-1] ** 0.5, table.cap
        self.views = self._views(self.rows)
        self.open = Pairs(x, table, labels, self.base)

    def _views(self, n: int) -> tuple[Tensor, ...]:
        """Scratch for n rows: scores [K, n], two lines [n]."""
        k = len(self.half)
        return (self.tile[: k * n].view(k, n), *self.lines[:, :n].unbind())

    def run(self) -> None:
        """Label every row."""
        if self.table.is_dead:
            self.out.fill_(-1)
            return
        for part in row_chunks(len(self.x), self.rows):
            self._fill(part)
        self.open.settle()
        self.out -= self.base

    def _fill(self, part: slice) -> None:
        """Write label + base of some rows, and keep those that are open."""
        given, out, origin = self.x[part], self.out[part], self.table.origin
        x = given if given.dtype == self.dtype else given.to(self.dtype)
        if origin is not None:
            x = x - origin
        size = self._size(x)
        if size < self.cap:
            self._decide(x, size, out, part.start)
            return
        held = x.abs().amax(-1) * self.length < self.cap  # not so where a row is not finite
        x = torch.where(held[:, None], x, 0.0)
        self._decide(x, self._size(x), out, part.start, held)
        finite = given.isfinite().all(-1)
        out[~finite] = self.base - 1
        long = (finite & ~held).nonzero()[:, 0]
        every = torch.ones(1, dtype=torch.bool, device=given.device)
        self.open.add(long + part.start, every.expand(len(self.half), len(long)))

    def _size(self, x: Tensor) -> float:
        """The largest norm that a row can have."""
        low, high = torch.aminmax(x)
        return max(-float(low), float(high)) * self.length

    def _decide(
        self, x: Tensor, size: float, out: Tensor, start: int, held: Tensor | None = None
    ) -> None:
        """Write label + base of rows whose scores decide; the others that are `held` are open."""
        n = len(x)
        score, least, code = self.views if n == self.rows else self._views(n)
        torch.addmm(self.half, self.table.centred, x.mT, alpha=-1, out=score)
        torch.amin(score, 0, out=least)
        near = score.le_(least.add_(self.table.slack(size, self.unit)))
        torch.mv(near.mT, self.codes, out=code)
        out.copy_(code)
        low, high = torch.aminmax(code)
        if self.base <= float(low) and float(high) < 2 * self.base:
            return  # one candidate in every row
        undecided = code.div_(self.base).floor_().ne_(1) != 0
        some = (undecided if held is None else undecided & held).nonzero()[:, 0]
        candidates = near[:, some] != 0
        candidates |= ~candidates.any(0)  # scores that are NaN decide nothing
        self.open.add(some + start, candidates)


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
        place = place + torch.arange(0, len(centroids) * size, size, device=place.device)[:, None]
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
    batch = torch.broadcast_shapes(*leads)
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
