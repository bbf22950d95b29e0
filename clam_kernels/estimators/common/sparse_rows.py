# SPDX-License-Identifier: Apache-2.0
"""Sparse rows on a CPU: labels, sums and distances by products with their nonzero entries alone.

A squared distance is |x|^2 + |c|^2 - 2 x.c in float64. Where a bound on its error does not decide a
label, the row is made dense and goes the way of dense rows. Where digits cancel, the distance is
computed from differences at the nonzero entries and the rest of |c|^2, which sums on a grid keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.sparsefuncs import mean_variance_axis
from torch import Tensor

from ...ops.kmeans import kmeans_assign
from .scale import scaled

Array = np.ndarray[Any, Any]

# Most scores, and about the most nonzero entries, of a tile; entries of dense rows at once.
TILE_SCORES, TILE_NONZERO, DENSE_ENTRIES = 1 << 16, 1 << 15, 1 << 18
# Squared distances are equal within this share, as in `kmeans_assign`.
TIE = 2.0**-40
# Below this share of |x|^2 + |c|^2 a distance is computed from differences.
CANCELLED = 2.0**-20
UNIT = 2.0**-52


class Rows(Protocol):
    """Sparse rows [N, D]; `rows.Rows` is one."""

    source: Any  # a CSR matrix
    dtype: torch.dtype
    exponent: int
    unit_norm: bool
    chunk_rows: int | None

    def __len__(self) -> int: ...

    @property
    def features(self) -> int: ...

    @property
    def squares(self) -> Tensor: ...

    def take(self, index: Tensor) -> Tensor: ...


@dataclass
class Tile:
    """Some sparse rows: their nonzero entries in float64, scaled and normalised as the rows are."""

    part: slice
    values: Array  # [M]; may be the user's own array
    columns: Array  # [M]
    ends: Array  # [n + 1] where the entries of each row begin
    features: int

    @property
    def counts(self) -> Array:
        """How many nonzero entries each row has."""
        return np.diff(self.ends).astype(np.int64, copy=False)

    @property
    def owner(self) -> Array:
        """The row of each nonzero entry, counted from the first of the tile."""
        return np.repeat(np.arange(len(self.ends) - 1), self.counts)

    @property
    def matrix(self) -> Any:
        """The rows as a matrix [n, D]."""
        shape = len(self.ends) - 1, self.features
        return sparse.csr_array((self.values, self.columns, self.ends), shape=shape)

    def some(self, index: Tensor) -> Tile:
        """Some of the rows, as a tile that is no part of the rows of a matrix."""
        found = self.matrix[index.numpy()]
        part = slice(0, len(index))
        return Tile(part, found.data, found.indices, found.indptr, self.features)

    def products(self, table: Array) -> Tensor:
        """Products [n, K] of the rows with a table [D, K]."""
        return torch.from_numpy(self.matrix @ table)

    def sums(self, terms: Array) -> Array:
        """The sum [n] over each row of one term an entry, in the order of the entries."""
        shape = len(self.ends) - 1, self.features
        found: Array = sparse.csr_array((terms, self.columns, self.ends), shape=shape) @ np.ones(
            self.features
        )
        return found

    def places(self, labels: Tensor) -> Array:
        """Where in a flat table [K, D] each entry's column of the row's label stands."""
        place = np.repeat(labels.numpy() * self.features, self.counts)
        place += self.columns
        return place


def tiles(rows: Rows, width: int) -> Iterator[Tile]:
    """All rows, in tiles for results of `width` numbers a row."""
    source, n = rows.source, len(rows)
    step = max(1, min(TILE_SCORES // width, TILE_NONZERO * n // max(1, source.nnz)))
    step = min(step, rows.chunk_rows or step)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        ends = source.indptr[part.start : part.stop + 1]
        inside = slice(ends[0], ends[-1])
        x = np.asarray(source.data[inside], dtype=np.float64)
        if rows.exponent:
            x = scaled(torch.from_numpy(np.array(x)), rows.exponent).numpy()
        tile = Tile(part, x, source.indices[inside], ends - ends[0], rows.features)
        if rows.unit_norm:
            _normalise(tile, np.float32 if rows.dtype == torch.float32 else np.float64)
        yield tile


def _normalise(tile: Tile, dtype: type) -> None:
    """Give the rows of a tile unit norm, rounded to a dtype; a row of zeros stays."""
    owner = tile.owner
    top = np.zeros(len(tile.ends) - 1)
    np.maximum.at(top, owner, np.abs(tile.values))
    x = tile.values / np.where(top > 0, top, 1.0)[owner]  # squares neither overflow nor vanish
    norm = np.sqrt(tile.sums(x * x))
    tile.values = (x / np.where(norm > 0, norm, 1.0)[owner]).astype(dtype).astype(np.float64)


def dense(rows: Rows) -> Tensor:
    """All rows [N, D] in their dtype, scaled and normalised."""
    out = torch.empty(len(rows), rows.features, dtype=rows.dtype, device="cpu")
    for tile in tiles(rows, rows.features):
        out[tile.part] = torch.from_numpy(tile.matrix.toarray())
    return out


def squares(rows: Rows) -> Tensor:
    """|x|^2 [N] in float64."""
    found = [tile.sums(tile.values * tile.values) for tile in tiles(rows, 1)]
    return torch.from_numpy(np.concatenate(found))


def moments(rows: Rows) -> tuple[Tensor, float]:
    """(mean [D] of the features in float64, the mean of their variances)."""
    if rows.unit_norm:  # nothing cancels but in rows of one direction
        one = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
        mean = sums(rows, one, 1, None)[0][0] / len(rows)
        spread = rows.squares.mean() - mean.square().sum()
        return mean, max(0.0, float(spread) / rows.features)
    x = rows.source
    if rows.exponent or (x.dtype == np.float32 and rows.dtype == torch.float64):
        data = scaled(torch.from_numpy(np.array(x.data, dtype=np.float64)), rows.exponent).numpy()
        x = sparse.csr_array((data, x.indices, x.indptr), shape=x.shape)
    mean, variance = mean_variance_axis(x, axis=0)
    return torch.from_numpy(mean).double(), float(variance.mean(dtype=np.float64))


def _dense(rows: Rows, some: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(index, values) of some rows, few enough for differences from k centres."""
    if len(some):
        for index in some.split(max(1, DENSE_ENTRIES // (rows.features * k))):
            yield index, rows.take(index)


def _noise(tile: Tile) -> Tensor:
    """Bound [n] on the error of a squared distance in units of (|x| + |c|)^2."""
    return torch.from_numpy((tile.counts + 64) * UNIT)


def _norms(centres: Tensor) -> Tensor:
    """|c|^2 [K] in float64."""
    step = max(1, DENSE_ENTRIES // centres.shape[1])
    return torch.cat([part.double().square().sum(1) for part in centres.split(step)])


def _table(centres: Tensor) -> Array:
    """The centres as the right factor [D, K] of a product."""
    return np.array(centres.numpy().T, dtype=np.float64, order="C")


def _without_copies(centres: Tensor, norms: Tensor) -> Tensor:
    """|c|^2, infinite for a centre that is equal to an earlier one: rows would tie for nothing."""
    norms, first = norms.clone(), dict[float, list[int]]()
    for k, norm in enumerate(norms.tolist()):
        earlier = first.setdefault(norm, [])
        if any(torch.equal(centres[k], centres[other]) for other in earlier):
            norms[k] = torch.inf
        else:
            earlier.append(k)
    return norms


def _first(score: Tensor, limit: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(the first index [n] of scores [n, K] within a limit, whether that is sure)."""
    inside = score <= (limit - noise)[:, None]
    sure = inside.sum(1) == (score <= (limit + noise)[:, None]).sum(1)
    return inside.to(torch.uint8).argmax(1), sure & inside.any(1)


def assign(rows: Rows, centres: Tensor, precision: str | None) -> tuple[Tensor, Tensor]:
    """(labels [N], squared distances [N] in float64 to the nearest of centres [K, D])."""
    norms = _norms(centres)
    reach = float(norms.max()) ** 0.5
    norms, table = _without_copies(centres, norms), _table(centres)
    table *= -2.0
    labels = torch.empty(len(rows), dtype=torch.int64, device="cpu")
    far = torch.empty(len(rows), dtype=torch.float64, device="cpu")
    doubts = []
    for tile in tiles(rows, len(centres)):
        size = rows.squares[tile.part]
        score = tile.products(table).add_(norms)  # the squared distance less |x|^2
        noise = (size.sqrt() + reach).square_() * _noise(tile) * 2
        best, found = score.min(1)
        place, near = found[:, None], (best + size).clamp_(min=0)
        limit = best + near * TIE
        second = score.scatter_(1, place, torch.inf).amin(1)
        some = (second <= limit + noise).nonzero()[:, 0]
        if len(some):
            score.scatter_(1, place, best[:, None])
            first, sure = _first(score[some], limit[some], noise[some])
            found[some] = first
            doubts.append(some[~sure] + tile.part.start)
        labels[tile.part], far[tile.part] = found, near
    for index, x in _dense(rows, torch.cat(doubts), len(centres)) if doubts else ():
        labels[index] = kmeans_assign(x, centres, distances=False, precision=precision)[0]
    return labels, far


def sums(rows: Rows, labels: Tensor, k: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sums [K, D] of the rows of each label, their weights [K]), in float64."""
    out = np.zeros(k * rows.features)
    for tile in tiles(rows, 1):
        x = tile.values
        if weight is not None:
            x = x * np.repeat(weight[tile.part].numpy(), tile.counts)
        np.add.at(out, tile.places(labels[tile.part]), x)
    held = torch.bincount(labels, weight, minlength=k).double()
    return torch.from_numpy(out).view(k, rows.features), held


def distances(rows: Rows, centres: Tensor, *, exact: bool) -> Tensor:
    """Squared distances [L, N] in float64 to every one of the centres [L, D].

    Those that cancel are 0 where the error is as large as they are; `exact` computes them from
    differences.
    """
    norms, table = _norms(centres), _table(centres)
    points = Points(centres) if exact else None
    out = torch.empty(len(centres), len(rows), dtype=torch.float64, device="cpu")
    for tile in tiles(rows, len(centres)):
        whole = rows.squares[tile.part, None] + norms
        far = tile.products(table).mul_(-2.0).add_(whole)
        small = (far < whole * CANCELLED) if points else None
        far.masked_fill_(far <= whole * _noise(tile)[:, None], 0.0)
        while points and small is not None and bool(small.any()):
            some = small.any(1).nonzero()[:, 0]  # one centre of each
            label = small[some].to(torch.uint8).argmax(1)
            far[some, label] = points.distances(tile.some(some), label)
            small[some, label] = False
        out[:, tile.part] = far.mT
    return out


def pair_distances(rows: Rows, centres: Tensor, labels: Tensor) -> Tensor:
    """|x_n - c_label|^2 [N] in float64, from differences."""
    points = Points(centres)
    found = [points.distances(tile, labels[tile.part]) for tile in tiles(rows, 1)]
    return torch.cat(found)


class Points:
    """Centres [K, D] that distances are computed to from differences.

    |x - c|^2 is the sum of (x_j - c_j)^2 over the nonzero entries of x and of c_j^2 over all
    others, which is |c|^2 less the c_j^2 at the nonzero entries. Each c_j^2 is cut into multiples
    of two powers of two, so large that sums of D of them are exact in any order: what is left over
    of each is below D^2 2^-103 of the largest.
    """

    def __init__(self, centres: Tensor) -> None:
        k, features = centres.shape
        self.flat = centres.numpy().reshape(-1)
        self.bits = 53 - features.bit_length()
        self.grid = np.ones(k)
        self.totals = np.zeros((2, k))
        step = max(1, (DENSE_ENTRIES >> 4) // features)
        for start in range(0, k, step):
            part = slice(start, min(start + step, k))
            squares = centres[part].double().square().numpy()
            # a power of two is above the least normal number
            power = np.maximum(np.frexp(squares.max(1))[1] - self.bits, -900)
            self.grid[part] = np.ldexp(1.0, power)
            for total, cut in zip(
                self.totals, self._cut(squares, self.grid[part, None]), strict=True
            ):
                total[part] = cut.sum(1)

    def _cut(self, squares: Array, grid: Array) -> tuple[Array, Array]:
        """Two parts of squares, multiples of the grid and of a finer one."""
        high = np.floor(squares / grid) * grid
        fine = grid * 2.0**-self.bits
        return high, np.floor((squares - high) / fine) * fine

    def distances(self, tile: Tile, labels: Tensor) -> Tensor:
        """Squared distances [n] of the rows of a tile to the centres of their labels."""
        own = labels.numpy()
        c = self.flat[tile.places(labels)].astype(np.float64)
        far = tile.sums(np.square(tile.values - c))
        cuts = self._cut(np.square(c, out=c), np.repeat(self.grid[own], tile.counts))
        for total, cut in zip(self.totals, cuts, strict=True):
            far += total[own] - tile.sums(cut)
        return torch.from_numpy(far)
