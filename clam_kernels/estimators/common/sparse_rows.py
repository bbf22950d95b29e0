# SPDX-License-Identifier: Apache-2.0
"""Sparse rows on a CPU: labels, sums and distances from products with their nonzero entries alone.

A squared distance is |x|^2 + |c|^2 - 2 x.c in float64. Where the bound on its error does not decide
a label, the row becomes dense, and its label is that of a dense row. Where digits cancel, the
distance is computed from differences (`CentroidDifferences`).
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

from ...ops._facts import TIE
from ...ops.kmeans import kmeans_assign
from .scale import scale_tensor

Array = np.ndarray[Any, Any]

# Most scores, and about the most nonzero entries, of a chunk; entries of a chunk of dense rows.
CHUNK_SCORES, CHUNK_NONZERO, DENSE_ENTRIES = 1 << 16, 1 << 15, 1 << 18
# A distance below this share of |x|^2 + |c|^2 is computed from differences.
CANCELLED = 2.0**-20
UNIT = 2.0**-52


class SparseRows(Protocol):
    """The attributes of `rows.Rows` that the functions here use: sparse rows [N, D]."""

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
class SparseChunk:
    """n sparse rows: their M nonzero entries in float64, scaled and normalised as the rows are."""

    part: slice
    values: Array  # [M]; may be the user's own array
    columns: Array  # [M]
    ends: Array  # [n + 1] the place of the first entry of each row, then M
    features: int

    @property
    def counts(self) -> Array:
        """Number of nonzero entries of each row."""
        return np.diff(self.ends).astype(np.int64, copy=False)

    @property
    def owner(self) -> Array:
        """The row of each nonzero entry, counted from the first row of the chunk."""
        return np.repeat(np.arange(len(self.ends) - 1), self.counts)

    @property
    def matrix(self) -> Any:
        """The rows as a matrix [n, D]."""
        shape = len(self.ends) - 1, self.features
        return sparse.csr_array((self.values, self.columns, self.ends), shape=shape)

    def some(self, index: Tensor) -> SparseChunk:
        """Some of the rows, with numbers from 0."""
        rows = self.matrix[index.numpy()]
        part = slice(0, len(index))
        return SparseChunk(part, rows.data, rows.indices, rows.indptr, self.features)

    def products(self, table: Array) -> Tensor:
        """Products [n, K] of the rows with a table [D, K]."""
        return torch.from_numpy(self.matrix @ table)

    def sums(self, terms: Array) -> Array:
        """Sums [n] over the entries of each row, in their order, of one term for each entry."""
        return np.bincount(self.owner, terms, len(self.ends) - 1)

    def places(self, labels: Tensor) -> Array:
        """Places [M] in a flat table [K, D]: D times the label of the row, plus the column."""
        place = np.repeat(labels.numpy() * self.features, self.counts)
        place += self.columns
        return place


def sparse_chunks(rows: SparseRows, width: int) -> Iterator[SparseChunk]:
    """All rows in chunks, small enough for results of `width` numbers for each row."""
    source, n = rows.source, len(rows)
    step = max(1, min(CHUNK_SCORES // width, CHUNK_NONZERO * n // max(1, source.nnz)))
    step = min(step, rows.chunk_rows or step)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        ends = source.indptr[part.start : part.stop + 1]
        inside = slice(ends[0], ends[-1])
        x = np.asarray(source.data[inside], dtype=np.float64)
        if rows.exponent:
            x = scale_tensor(torch.from_numpy(np.array(x)), rows.exponent).numpy()
        chunk = SparseChunk(part, x, source.indices[inside], ends - ends[0], rows.features)
        if rows.unit_norm:
            _normalise(chunk, np.float32 if rows.dtype == torch.float32 else np.float64)
        yield chunk


def _normalise(chunk: SparseChunk, dtype: type) -> None:
    """Divide the rows of a chunk by their norms, rounded to a dtype; a row of zeros stays."""
    owner = chunk.owner
    top = np.zeros(len(chunk.ends) - 1)
    np.maximum.at(top, owner, np.abs(chunk.values))
    x = chunk.values / np.where(top > 0, top, 1.0)[owner]  # squares neither overflow nor vanish
    norm = np.sqrt(chunk.sums(x * x))
    chunk.values = (x / np.where(norm > 0, norm, 1.0)[owner]).astype(dtype).astype(np.float64)


def dense(rows: SparseRows) -> Tensor:
    """All rows [N, D] in their dtype, scaled and normalised."""
    out = torch.empty(len(rows), rows.features, dtype=rows.dtype, device="cpu")
    for chunk in sparse_chunks(rows, rows.features):
        out[chunk.part] = torch.from_numpy(chunk.matrix.toarray())
    return out


def squares(rows: SparseRows) -> Tensor:
    """|x|^2 [N] in float64."""
    parts = [chunk.sums(chunk.values * chunk.values) for chunk in sparse_chunks(rows, 1)]
    return torch.from_numpy(np.concatenate(parts))


def moments(rows: SparseRows) -> tuple[Tensor, float]:
    """(mean [D] of the features in float64, the mean of their variances)."""
    if rows.unit_norm:  # digits cancel only where all rows have nearly one direction
        one = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
        mean = sums(rows, one, 1, None)[0][0] / len(rows)
        spread = rows.squares.mean() - mean.square().sum()
        return mean, max(0.0, float(spread) / rows.features)
    x = rows.source
    if rows.exponent or (x.dtype == np.float32 and rows.dtype == torch.float64):
        data = scale_tensor(
            torch.from_numpy(np.array(x.data, dtype=np.float64)), rows.exponent
        ).numpy()
        x = sparse.csr_array((data, x.indices, x.indptr), shape=x.shape)
    mean, variance = mean_variance_axis(x, axis=0)
    return torch.from_numpy(mean).double(), float(variance.mean(dtype=np.float64))


def _dense(rows: SparseRows, some: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(index, values) of some rows, in chunks small enough for differences from k centroids."""
    if len(some):
        for index in some.split(max(1, DENSE_ENTRIES // (rows.features * k))):
            yield index, rows.take(index)


def _error_bound(chunk: SparseChunk) -> Tensor:
    """Bound [n] on the error of a squared distance, in units of (|x| + |c|)^2."""
    return torch.from_numpy((chunk.counts + 64) * UNIT)


def _norms(centroids: Tensor) -> Tensor:
    """|c|^2 [K] in float64."""
    step = max(1, DENSE_ENTRIES // centroids.shape[1])
    return torch.cat([part.double().square().sum(1) for part in centroids.split(step)])


def _table(centroids: Tensor) -> Array:
    """The centroids [K, D] as the right factor [D, K] of a product, in float64."""
    return np.array(centroids.numpy().T, dtype=np.float64, order="C")


def _without_copies(centroids: Tensor, norms: Tensor) -> Tensor:
    """|c|^2; inf for a copy of an earlier centroid, with which every row would tie."""
    norms, first = norms.clone(), dict[float, list[int]]()
    for k, norm in enumerate(norms.tolist()):
        earlier = first.setdefault(norm, [])
        if any(torch.equal(centroids[k], centroids[other]) for other in earlier):
            norms[k] = torch.inf
        else:
            earlier.append(k)
    return norms


def _first(score: Tensor, limit: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """(the first index [n] of scores [n, K] below a limit, whether the error bound decides it)."""
    is_below = score <= (limit - bound)[:, None]
    is_decided = is_below.sum(1) == (score <= (limit + bound)[:, None]).sum(1)
    return is_below.to(torch.uint8).argmax(1), is_decided & is_below.any(1)


def assign(rows: SparseRows, centroids: Tensor, precision: str | None) -> tuple[Tensor, Tensor]:
    """(labels [N], squared distances [N] in float64 to the nearest of centroids [K, D])."""
    norms = _norms(centroids)
    reach = float(norms.max()) ** 0.5
    norms, table = _without_copies(centroids, norms), _table(centroids)
    table *= -2.0
    labels = torch.empty(len(rows), dtype=torch.int64, device="cpu")
    sqdist = torch.empty(len(rows), dtype=torch.float64, device="cpu")
    doubtful = []
    for chunk in sparse_chunks(rows, len(centroids)):
        size = rows.squares[chunk.part]
        score = chunk.products(table).add_(norms)  # squared distance minus |x|^2
        bound = (size.sqrt() + reach).square_() * _error_bound(chunk) * 2
        best, label = score.min(1)
        place, nearest = label[:, None], (best + size).clamp_(min=0)
        limit = best + nearest * TIE
        second = score.scatter_(1, place, torch.inf).amin(1)
        close = (second <= limit + bound).nonzero()[:, 0]
        if len(close):
            score.scatter_(1, place, best[:, None])
            first, is_decided = _first(score[close], limit[close], bound[close])
            label[close] = first
            doubtful.append(close[~is_decided] + chunk.part.start)
        labels[chunk.part], sqdist[chunk.part] = label, nearest
    for index, x in _dense(rows, torch.cat(doubtful), len(centroids)) if doubtful else ():
        labels[index] = kmeans_assign(x, centroids, distances=False, precision=precision)[0]
    return labels, sqdist


def sums(rows: SparseRows, labels: Tensor, k: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sums [K, D] of the rows of each label, their weights [K]), in float64."""
    out = np.zeros(k * rows.features)
    for chunk in sparse_chunks(rows, 1):
        x = chunk.values
        if weight is not None:
            x = x * np.repeat(weight[chunk.part].numpy(), chunk.counts)
        np.add.at(out, chunk.places(labels[chunk.part]), x)
    masses = torch.bincount(labels, weight, minlength=k).double()
    return torch.from_numpy(out).view(k, rows.features), masses


def distances(rows: SparseRows, centroids: Tensor, *, exact: bool) -> Tensor:
    """Squared distances [L, N] in float64 to the centroids [L, D].

    A distance is 0 where the bound on its error is as large as itself; with `exact`, distances
    whose digits cancel are computed from differences.
    """
    norms, table = _norms(centroids), _table(centroids)
    differences = CentroidDifferences(centroids) if exact else None
    out = torch.empty(len(centroids), len(rows), dtype=torch.float64, device="cpu")
    for chunk in sparse_chunks(rows, len(centroids)):
        whole = rows.squares[chunk.part, None] + norms
        sqdist = chunk.products(table).mul_(-2.0).add_(whole)
        is_cancelled = (sqdist < whole * CANCELLED) if differences else None
        sqdist.masked_fill_(sqdist <= whole * _error_bound(chunk)[:, None], 0.0)
        while differences and is_cancelled is not None and bool(is_cancelled.any()):
            index = is_cancelled.any(1).nonzero()[:, 0]  # one centroid of each of these rows
            label = is_cancelled[index].to(torch.uint8).argmax(1)
            sqdist[index, label] = differences.distances(chunk.some(index), label)
            is_cancelled[index, label] = False
        out[:, chunk.part] = sqdist.mT
    return out


def pair_distances(rows: SparseRows, centroids: Tensor, labels: Tensor) -> Tensor:
    """|x_n - c_label|^2 [N] in float64, from differences."""
    differences = CentroidDifferences(centroids)
    parts = [differences.distances(chunk, labels[chunk.part]) for chunk in sparse_chunks(rows, 1)]
    return torch.cat(parts)


class CentroidDifferences:
    """Squared distances from sparse rows to centroids [K, D], from differences.

    |x - c|^2 is the sum of (x_j - c_j)^2 over the nonzero entries of x, and of c_j^2 over all
    others: |c|^2 minus the c_j^2 at the nonzero entries. Each c_j^2 is rounded to the sum of a
    multiple of one power of two and a multiple of a smaller one, so that sums of D of them are
    exact in any order; the rest of each is below D^2 2^-103 of the largest square.
    """

    def __init__(self, centroids: Tensor) -> None:
        k, features = centroids.shape
        self.flat = centroids.numpy().reshape(-1)
        self.bits = 53 - features.bit_length()
        self.grid = np.ones(k)
        self.totals = np.zeros((2, k))
        step = max(1, (DENSE_ENTRIES >> 4) // features)
        for start in range(0, k, step):
            part = slice(start, min(start + step, k))
            squares = centroids[part].double().square().numpy()
            # a power of two is above the least normal number
            power = np.maximum(np.frexp(squares.max(1))[1] - self.bits, -900)
            self.grid[part] = np.ldexp(1.0, power)
            for total, cut in zip(
                self.totals, self._cut(squares, self.grid[part, None]), strict=True
            ):
                total[part] = cut.sum(1)

    def _cut(self, squares: Array, grid: Array) -> tuple[Array, Array]:
        """(squares rounded down to multiples of the grid, the rest rounded down to those of a finer
        grid).
        """
        high = np.floor(squares / grid) * grid
        fine = grid * 2.0**-self.bits
        return high, np.floor((squares - high) / fine) * fine

    def distances(self, chunk: SparseChunk, labels: Tensor) -> Tensor:
        """Squared distances [n] of the rows of a chunk to the centroids of their labels."""
        own = labels.numpy()
        c = self.flat[chunk.places(labels)].astype(np.float64)
        sqdist = chunk.sums(np.square(chunk.values - c))
        cuts = self._cut(np.square(c, out=c), np.repeat(self.grid[own], chunk.counts))
        for total, cut in zip(self.totals, cuts, strict=True):
            sqdist += total[own] - chunk.sums(cut)
        return torch.from_numpy(sqdist)
