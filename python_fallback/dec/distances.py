# SPDX-License-Identifier: Apache-2.0
"""Scaled squared distances of a chunk of rows to the centroids of one problem.

A tile is [K, rows]: a sum over centroids then adds whole lines of rows. Rows are padded to a
multiple of `GROUP`, so that a row has the same bits wherever it stands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.chunk import DEC_ROWS, FLOAT64_TILE_ENTRIES, round_up, rows_within

# Rows that are summed together in the compute dtype before float64.
GROUP = 32
# A float64 product of centred values may be off by PRODUCT (|z| + max |mu|)^2; a row for which that
# is more than ALLOWED (min(alpha, 1) + its smallest distance) is computed from differences.
PRODUCT, ALLOWED = 64 * 2.0**-52, 2.0**-26
# Scaled distances above this are set to it: the assignment is below 1e-30 of the largest.
FARTHEST = 1e30


def tile_rows(k: int) -> int:
    """Rows of one chunk for K centroids, the same for every number of rows."""
    rows = rows_within(DEC_ROWS, FLOAT64_TILE_ENTRIES // max(k, 1))
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
        self.is_void = math.isnan(alpha) or not bool(wide.isfinite().all())
        self.centre = torch.zeros_like(wide[0]) if self.is_void else wide.mean(0)
        self.centred = wide - self.centre  # [K, D]
        norms = self.centred.square().sum(1, keepdim=True)  # [K, 1]
        self.reach = float(norms.amax().sqrt())
        self.left = torch.cat([-2 * self.centred, norms, torch.ones_like(norms)], 1)  # [K, D + 2]
        self.limit = tile_rows(self.size)
        width = min(self.limit, round_up(max(len(rows), 1), GROUP))
        self.right = wide.new_empty((self.features + 2) * width)  # scratch of [D + 2, rows]
        self.wide = wide.new_empty(self.size * width)  # scratch of [K, rows], float64
        self.narrow = self.wide
        if dtype is not None:
            self.narrow = torch.empty(self.size * width, dtype=dtype, device=mu.device)
        self.irregular: Tensor | None = None
        self.nearest = self.scale = self.points = self.right

    def load(self, part: slice) -> Tensor:
        """The tile y of some rows, [K, padded rows]. Rows that are not finite count as 0, and
        `irregular` marks them.
        """
        n = part.stop - part.start
        width = round_up(n, GROUP)
        side = self.right[: (self.features + 2) * width].view(-1, width)  # [D + 2, rows]
        self.points = points = side[: self.features]
        points[:, n:] = 0.0
        points[:, :n] = self.rows[part].mT
        points[:, :n] -= self.centre[:, None]
        norms, size = self._sizes(points)
        most = float(size.amax())
        tile = self.wide_tile(width)
        if self.rows.dtype == torch.float64:
            differences(self.centred, points, tile)
        else:
            side[-2], side[-1] = 1.0, norms
            torch.mm(self.left, side, out=tile)
            if most * PRODUCT > ALLOWED * min(self.alpha, 1.0):
                self._settle(part, tile, size)
        y = self.narrow[: self.size * width].view(self.size, width)
        if y.dtype == torch.float64:
            return self._scaled(tile, tile.amin(0), y)
        nearest = y.copy_(tile).amin(0).double()
        if most <= FARTHEST:
            return self._scaled(y, nearest, y)
        far = size > FARTHEST  # these rows leave float32
        nearest = torch.where(far, tile.amin(0), nearest)
        exact = self._scaled(tile, nearest, torch.empty_like(tile))
        return torch.where(far, exact.to(y.dtype), self._scaled(y, nearest, y))

    def wide_tile(self, width: int) -> Tensor:
        """The float64 tile, [K, rows]. After `load` it has squared distances, which rounding may
        leave below 0; with `dtype` None it has y.
        """
        return self.wide[: self.size * width].view(self.size, width)

    def _sizes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """`|z - centre|^2` and `(|z - centre| + reach)^2` of the chunk, [rows] each; sets rows that
        are not finite to 0.
        """
        norms = points.square().sum(0)
        self.irregular = None
        if not math.isfinite(float(norms.sum())):
            regular = points.isfinite().all(0)
            self.irregular = ~regular
            points.copy_(torch.where(regular, points, 0.0))
            norms = points.square().sum(0)
        return norms, norms.sqrt().add_(self.reach).square_()

    def _scaled(self, tile: Tensor, nearest: Tensor, out: Tensor) -> Tensor:
        """The tile y [K, rows] from squared distances; `nearest` are the least ones."""
        self.nearest = nearest.clamp(min=0.0)  # [rows]
        self.scale = torch.ones_like(nearest) if self.is_gaussian else self.alpha + self.nearest
        torch.sub(tile, nearest.to(tile.dtype), out=out)
        return out.mul_(self.scale.reciprocal().to(tile.dtype)).clamp_(max=FARTHEST)

    def _settle(self, part: slice, tile: Tensor, size: Tensor) -> None:
        """Compute the distances of the rows in doubt from differences."""
        doubt = PRODUCT * size > ALLOWED * (min(self.alpha, 1.0) + tile.amin(0).clamp(min=0.0))
        if self.irregular is not None:
            doubt &= ~self.irregular
        index = doubt[: part.stop - part.start].nonzero()[:, 0]
        rows = self.rows[part][index].double().mT  # [D, rows in doubt]
        tile[:, index] = differences(self.mu, rows, tile.new_empty(self.size, len(index)))


def differences(mu: Tensor, points: Tensor, out: Tensor) -> Tensor:
    """`sum_d (mu_jd - z_di)^2`, [K, rows], feature by feature."""
    out.zero_()
    gap = torch.empty_like(out)
    for centroid, point in zip(mu.mT, points, strict=True):
        torch.sub(centroid[:, None], point, out=gap)
        out.addcmul_(gap, gap)
    return out
