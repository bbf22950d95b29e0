# SPDX-License-Identifier: Apache-2.0
"""Scaled squared distances of a chunk of rows to the centroids of one problem.

A tile is [K, rows]: a sum over centroids then adds whole lines of rows. Rows are padded to a
multiple of `GROUP`, so that a row has the same bits wherever it stands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.chunk import padded
from ..common.score import centre_of

# Entries of one tile, about a second-level cache, and the bounds on the rows of a chunk.
TILE_ENTRIES, MIN_ROWS, MAX_ROWS = 1 << 17, 32, 4096
# Rows that are summed together in the compute dtype before float64.
GROUP = 32
# A float64 product of centred values may be off by PRODUCT (|z| + max |mu|)^2; a row for which that
# is more than ALLOWED (min(alpha, 1) + its smallest distance) is computed from differences.
PRODUCT, ALLOWED = 64 * 2.0**-52, 2.0**-26
# Scaled distances above this are set to it: the assignment is below 1e-30 of the largest.
FARTHEST = 1e30


def tile_rows(k: int) -> int:
    """Rows of one chunk for K centroids, the same for every number of rows."""
    rows = max(MIN_ROWS, min(MAX_ROWS, TILE_ENTRIES // max(k, 1)))
    return rows // GROUP * GROUP


class Distances:
    """The centroids of one problem, centred, and the chunk of rows that was loaded last.

    After `load`, with g_i = alpha + min_j d2_ij (1 for alpha = inf):

        y_ij = (d2_ij - min_j d2_ij) / g_i,   so that   1 + y_ij = (alpha + d2_ij) / g_i
    """

    def __init__(
        self, rows: Tensor, mu: Tensor, alpha: float, dtype: torch.dtype | None = None
    ) -> None:
        """`dtype` is that of y; None: y is float64 and takes the place of the distances."""
        wide = mu.double()
        self.rows, self.mu, self.alpha = rows, wide, alpha
        self.is_gaussian = math.isinf(alpha)
        self.size, self.features = mu.shape
        self.is_lost = not bool(wide.isfinite().all()) or math.isnan(alpha)
        self.centre = centre_of(wide, None)[0] if not self.is_lost else torch.zeros_like(wide[0])
        self.centred = torch.where(wide.isfinite(), wide - self.centre, 0.0)  # [K, D]
        norms = self.centred.square().sum(1, keepdim=True)  # [K, 1]
        self.reach = float(norms.amax().sqrt())
        self.left = torch.cat([-2 * self.centred, norms, torch.ones_like(norms)], 1)  # [K, D + 2]
        self.limit = tile_rows(self.size)
        width = min(self.limit, padded(max(len(rows), 1), GROUP))
        self.right = wide.new_empty((self.features + 2) * width)  # scratch of [D + 2, rows]
        self.wide = wide.new_empty(self.size * width)  # scratch of [K, rows], float64
        self.narrow = self.wide
        if dtype is not None:
            self.narrow = torch.empty(self.size * width, dtype=dtype, device=mu.device)
        self.lost: Tensor | None = None
        self.nearest = self.scale = self.points = self.right

    def load(self, part: slice) -> Tensor:
        """y of some rows, [K, padded rows]. Rows that are not finite are
        computed as rows of 0, and `lost` marks them.
        """
        n = part.stop - part.start
        width = padded(n, GROUP)
        side = self.right[: (self.features + 2) * width].view(-1, width)  # [D + 2, rows]
        self.points = points = side[: self.features]
        points[:, n:] = 0.0
        torch.sub(self.rows[part].mT, self.centre[:, None], out=points[:, :n])
        norms = self._norms(points)
        tile = self.wide[: self.size * width].view(self.size, width)  # [K, rows]
        if self.rows.dtype == torch.float64:
            differences(self.centred, points, tile)
            nearest = tile.amin(0)
        else:
            side[-2], side[-1] = 1.0, norms
            torch.mm(self.left, side, out=tile)
            nearest = self._settle(part, tile, tile.amin(0), norms)
        self.nearest = nearest.clamp(min=0.0)  # [rows]
        self.scale = torch.ones_like(nearest) if self.is_gaussian else self.alpha + self.nearest
        tile.sub_(nearest).mul_(self.scale.reciprocal())
        far = (norms.sqrt() + self.reach).square() / self.scale
        if not float(far.amax()) <= FARTHEST:
            tile.clamp_(max=FARTHEST)
        if self.narrow is self.wide:
            return tile
        return self.narrow[: self.size * width].view(self.size, width).copy_(tile)

    def wide_tile(self, width: int) -> Tensor:
        """The float64 tile, [K, rows]; it holds y until something else is written to it."""
        return self.wide[: self.size * width].view(self.size, width)

    def _norms(self, points: Tensor) -> Tensor:
        """|z - centre|^2 of the chunk, [rows]; sets rows that are not finite to 0."""
        norms = points.square().sum(0)
        self.lost = None
        if not math.isfinite(float(norms.sum())):
            regular = points.isfinite().all(0)
            self.lost = ~regular
            points.copy_(torch.where(regular, points, 0.0))
            norms = points.square().sum(0)
        return norms

    def _settle(self, part: slice, tile: Tensor, nearest: Tensor, norms: Tensor) -> Tensor:
        """Compute the distances of the rows in doubt from differences; the smallest of each row."""
        bound = PRODUCT * (norms.sqrt() + self.reach).square()
        doubt = bound > ALLOWED * (min(self.alpha, 1.0) + nearest.clamp(min=0.0))
        if not bool(doubt.any()):
            return nearest
        if self.lost is not None:
            doubt &= ~self.lost
        index = doubt[: part.stop - part.start].nonzero()[:, 0]
        rows = self.rows[part][index].double().mT  # [D, rows in doubt]
        exact = differences(self.mu, rows, tile.new_empty(self.size, len(index)))
        tile[:, index] = exact
        nearest[index] = exact.amin(0)
        return nearest


def differences(mu: Tensor, points: Tensor, out: Tensor) -> Tensor:
    """`sum_d (mu_jd - z_di)^2`, [K, rows], feature by feature."""
    out.zero_()
    gap = torch.empty_like(out)
    for centroid, point in zip(mu.mT, points, strict=True):
        torch.sub(centroid[:, None], point, out=gap)
        out.addcmul_(gap, gap)
    return out
