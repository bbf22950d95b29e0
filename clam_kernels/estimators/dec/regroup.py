# SPDX-License-Identifier: Apache-2.0
"""Clusters are regrouped by the graph of nearest rows: two clusters that share a class become one,
and a cluster of two classes is divided. No label is used. Equations: docs/dec.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

# Neighbours of a row in the graph.
NEIGHBOURS = 15
# Two clusters share a class where their boundary is at least so deep, 1 being no gap at all.
JOINED = 0.7
# A division must have at most this part of the depth of the boundary that it replaces.
RATIO = 0.85
# Most moves of a call; pairs whose boundary is measured: those with the largest cut.
MOST_MOVES, PAIRS = 4, 6
# The smaller part of a division has at least this share of its cluster.
LEAST_SHARE = 0.15
# A boundary is searched at this distance, as a share of the rows, around the place of the labels.
WINDOW = 0.08
# Clusters of fewer rows are not divided.
LEAST_ROWS = 60
# Eigenvectors along which a cluster may be divided; steps that smooth the labels of a pair.
DIRECTIONS, STEPS = 3, 10
# New versions of scipy draw from the system's entropy where the iteration needs a new vector.
_SEED = {"rng": 0} if "rng" in inspect.signature(eigsh).parameters else {}
# Rows of a tile of distances.
TILE_ROWS = 256


class Division(NamedTuple):
    """A cut of some rows in two."""

    depth: float
    side: np.ndarray  # [n] bool


def neighbour_graph(codes: Tensor, draws: Sequence[Tensor], neighbours: int = NEIGHBOURS) -> Any:
    """Graph of nearest rows: a symmetric scipy matrix [N, N] of weights 0, 1/2 and 1.

    The distance from row i to row j is the least from the code of i or of its augmented draws
    [N, D] to the code of j, so that the graph does not see what the augmentation changes.
    """
    count = len(codes)
    neighbours = min(neighbours, count - 1)
    squares = codes.square().sum(1)
    rows = []
    for start in range(0, count, TILE_ROWS):
        part = slice(start, min(start + TILE_ROWS, count))
        tiles = [_sqdist(z[part], codes, squares) for z in (codes, *draws)]
        nearest = torch.stack(tiles).amin(0)
        nearest[:, part].fill_diagonal_(torch.inf)
        rows.append(nearest.topk(neighbours, largest=False).indices.cpu())
    ends = torch.cat(rows).numpy().ravel()
    starts = np.repeat(np.arange(count), neighbours)
    graph = sparse.csr_matrix((np.ones(len(ends)), (starts, ends)), shape=(count, count))
    return ((graph + graph.T) / 2).tocsr()


def _sqdist(z: Tensor, codes: Tensor, squares: Tensor) -> Tensor:
    return (squares - 2 * z @ codes.T + z.square().sum(1, keepdim=True)).clamp_(min=0)


def regroup(graph: Any, labels: np.ndarray, n_clusters: int) -> tuple[np.ndarray, int]:
    """(labels after the moves, the number of moves).

    A move joins the two clusters of the deepest boundary, and divides the cluster, or their union,
    that has the least deep division.
    """
    groups = _Groups(graph, labels.copy(), n_clusters)
    moves = 0
    while moves < MOST_MOVES and groups.move():
        moves += 1
    return groups.labels, moves


class _Groups:
    """Labels, and the best division of each cluster."""

    def __init__(self, graph: Any, labels: np.ndarray, n_clusters: int) -> None:
        self.graph, self.labels, self.k = graph, labels, n_clusters
        self.divisions: dict[int, Division] = {}
        self._measure(range(n_clusters))

    def _part(self, *clusters: int) -> tuple[np.ndarray, Any]:
        """(the rows of some clusters, their part of the graph)."""
        rows = np.flatnonzero(np.isin(self.labels, clusters))
        return rows, self.graph[rows][:, rows]

    def _measure(self, changed: Sequence[int]) -> None:
        for cluster in changed:
            self.divisions[cluster] = best_division(self._part(cluster)[1])

    def move(self) -> bool:
        """Make the best move; False where there is none."""
        pairs = np.stack(np.triu_indices(self.k, 1), 1)
        cuts = normalised_cuts(self.graph, self.labels, self.k)[pairs[:, 0], pairs[:, 1]]
        depths = {}
        for pair in map(tuple, pairs[np.argsort(-cuts, kind="stable")[:PAIRS]].tolist()):
            rows, part = self._part(*pair)
            depths[pair] = boundary_depth(part, self.labels[rows] == pair[0])
        if not depths:
            return False
        a, b = max(depths, key=lambda pair: depths[pair])
        depth = depths[a, b]
        union, part = self._part(a, b)
        again = best_division(part)
        rest = [c for c in range(self.k) if c not in (a, b)]
        best = min(rest, key=lambda c: self.divisions[c].depth, default=a)
        least = min(again.depth, self.divisions[best].depth if rest else np.inf)
        if depth < JOINED or least >= RATIO * depth:
            return False
        changed = {a, b}
        if least == again.depth:
            self.labels[union] = np.where(again.side, a, b)
        else:
            rows, _ = self._part(best)
            self.labels[union] = a
            self.labels[rows[self.divisions[best].side]] = b
            changed.add(best)
        self._measure(sorted(changed))
        return True


def normalised_cuts(graph: Any, labels: np.ndarray, n_clusters: int) -> np.ndarray:
    """Of each pair of clusters the normalised cut (Shi and Malik 2000), [K, K]; 2 where a cluster
    is empty.

    W_ab / (W_aa + W_ab) + W_ab / (W_bb + W_ab), with W_ab the edges from cluster a to cluster b
    """
    edges = graph.tocoo()
    code = labels[edges.row].astype(np.int64) * n_clusters + labels[edges.col]
    weight = np.bincount(code, edges.data, n_clusters**2).reshape(n_clusters, n_clusters)
    inside = np.diag(weight)[:, None] + weight
    share = np.divide(weight, inside, out=np.full_like(weight, 2.0), where=inside > 0)
    return share + share.T


def boundary_depth(graph: Any, side: np.ndarray) -> float:
    """Depth of the boundary between two clusters, along their labels smoothed over the graph; 2 for
    a cluster without rows.
    """
    share = float(np.mean(~side)) if len(side) else 0.0
    if not 0 < share < 1:
        return 2.0
    values, degrees = np.where(side, 1.0, -1.0), _degrees(graph)
    for _ in range(STEPS):
        values = (values + graph @ values / degrees) / 2
    width = WINDOW * min(1.0, 2 * share, 2 * (1 - share))
    return _cut_along(graph, values, share - width, share + width).depth


def best_division(graph: Any) -> Division:
    """The least deep cut along the first eigenvectors of the normalised Laplacian; the largest
    component where it leaves enough rows; of infinite depth for few rows, or where the eigenvectors
    do not converge.
    """
    count = graph.shape[0]
    if count < LEAST_ROWS:
        return Division(np.inf, np.zeros(count, dtype=bool))
    _, component = connected_components(graph, directed=False)
    sizes = np.bincount(component)
    if sizes.max() <= (1 - LEAST_SHARE) * count:
        return Division(0.0, component == sizes.argmax())
    root = 1 / np.sqrt(_degrees(graph))
    scaled = sparse.diags(root) @ graph @ sparse.diags(root)
    options = {"v0": np.ones(count), "tol": 1e-3, **_SEED}
    try:
        values, vectors = eigsh(scaled, k=DIRECTIONS + 1, which="LA", **options)
    except ArpackNoConvergence:
        return Division(np.inf, np.zeros(count, dtype=bool))
    order = np.argsort(-values)[1:]
    ends = LEAST_SHARE, 1 - LEAST_SHARE
    cuts = [_cut_along(graph, vectors[:, j] * root, *ends) for j in order]
    return min(cuts, key=lambda cut: cut.depth)


def _cut_along(graph: Any, values: np.ndarray, low: float, high: float) -> Division:
    """The cut of fewest edges between two level sets of `values`, with a share of the rows from
    `low` to `high` below it. Its depth is that number over the most edges across a cut at its left
    or its right, of the two the smaller: 1 where there is no gap.
    """
    order = np.argsort(values, kind="stable")
    count = len(order)
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    edges = sparse.triu(graph, 1).tocoo()
    ends = np.sort([rank[edges.row], rank[edges.col]], axis=0)
    steps = np.bincount(ends[0], edges.data, count) - np.bincount(ends[1], edges.data, count)
    cut = np.cumsum(steps)[:-1]  # cut[i]: the edges between the first i + 1 rows and the others
    first, last = (min(max(int(share * count), 1), count - 1) - 1 for share in (low, high))
    at = first + int(np.argmin(cut[first : last + 1]))
    around = min(cut[: at + 1].max(), cut[at:].max())
    side = np.zeros(count, dtype=bool)
    side[order[: at + 1]] = True
    return Division(float(cut[at] / around) if around > 0 else 0.0, side)


def _degrees(graph: Any) -> np.ndarray:
    degrees: np.ndarray = np.asarray(graph.sum(1)).ravel()
    return np.maximum(degrees, 1e-9)
