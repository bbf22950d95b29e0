# SPDX-License-Identifier: Apache-2.0
"""The nearest centroid of every row of one problem, exactly: float32 scores decide where a bound on
their error says that they can, differences in float64 elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.chunk import row_chunks
from ..common.score import centre_of, compute_dtype

# Squared distances this close, relative to the smaller one, are a tie.
TIE = 2.0**-40
# Entries of one K x rows tile of scores, about a second-level cache. Rows of a chunk stay between
# these whatever K is, but for a tile of more than `MOST_ENTRIES`.
TILE_ENTRIES, MIN_ROWS, MAX_ROWS, MOST_ENTRIES = 1 << 18, 256, 4096, 1 << 23
TINY, MOST = (
    {t: getattr(torch.finfo(t), word) for t in (torch.float32, torch.float64)}
    for word in ("tiny", "max")
)
# A few far centroids may drag the mean off where the largest squared distance from it is more than
# so many times the mean one: a centre that they cannot move takes its place.
DRAGGED = 4.0
# float64 entries that are worked on at once.
WIDE_ENTRIES = 1 << 18


class Table(NamedTuple):
    """Centroids of one problem, prepared: score = half - x . centred, least for the nearest."""

    exact: Tensor  # [K, D] float64, as given
    alive: Tensor  # [K] bool
    centred: Tensor  # [K, D], less the origin; 0 where not alive
    half: Tensor  # [K]: |centred|^2 / 2 (+ origin . centred where rows stay as they are), or inf
    origin: Tensor | None  # [D] that is subtracted from rows, if anything is
    reach: float  # the largest |centred|, -1 where no centroid is alive
    lean: float  # |origin| where it is not subtracted
    sizes: Tensor  # [K]: |centred|, -1 where not alive; sorted

    @property
    def is_dead(self) -> bool:
        """Whether no centroid can win."""
        return self.reach < 0

    def slack(self, size: float, unit: float) -> float:
        """Twice the error of a score of rows of norm `size`, and the width of a tie."""
        d, reach = self.exact.shape[-1], self._rivals(size + self.lean)
        scores = (d + 6) * size * reach + 2 * reach**2 + 3 * self.lean * reach
        lost = (d + 4) * TINY[self.half.dtype]  # what underflows
        return 2 * (unit * scores + lost) + TIE * (size + self.lean + reach) ** 2

    def _rivals(self, size: float) -> float:
        """The largest |centred| that can win a row of norm `size`. A score is at least |c|^2 / 4
        from |c| = 4 size on, and the score of the smallest centroid at most (size + |c|)^2: beyond
        4 (size + the least |c|) no error of a score matters.
        """
        if self.reach < 4 * size:
            return self.reach
        alive = self.sizes[int((self.sizes < 0).sum()) :]
        nearest = float(alive[0])
        return float(alive[alive <= max(nearest, 4 * (size + nearest))][-1])

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
    spread = sizes.amax(1)
    if shift is None and bool((spread.square() > DRAGGED * sizes.square().mean(1)).any()):
        origin = centre_of(kept, alive[..., None])[:, 0].to(dtype).double()
        centred = torch.where(alive[..., None], exact - origin[:, None], 0.0)
        sizes = torch.where(alive, centred.norm(dim=-1), -1.0)
        spread = sizes.median(1).values
    reach, lean = sizes.amax(1).tolist(), origin.norm(dim=-1).tolist()
    far = (origin.norm(dim=-1) > 4 * spread).tolist()
    half = centred.square().sum(-1) / 2
    near = half + (centred @ origin[..., None])[..., 0]
    half = torch.where(alive.new_tensor(far)[:, None], half, near)
    half = torch.where(alive, half, torch.inf).to(dtype)
    narrow, origin = centred.to(dtype), origin.to(dtype)
    return [
        Table(
            exact[p], alive[p], narrow[p], half[p], origin[p] if far[p] else None, reach[p],
            0.0 if far[p] else lean[p], sizes[p].sort().values,
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
