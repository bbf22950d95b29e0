# SPDX-License-Identifier: Apache-2.0
"""The rows in doubt of `am/doubt.py`, computed again in float64.

`Differences` computes rho - x itself: it is accurate for all rows and memories.
`ExpandedDistances` computes |x|^2 + |rho|^2 - 2 x.rho of centred data: matrix products, several
times as fast. float64 has 29 bits more than float32, and `ExactRows` expands the distances of every
row that keeps enough of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.chunk import FEWEST_ROWS_IN_DOUBT, FLOAT64_TILE_ENTRIES, round_up, row_chunks
from ..common.score import EXP_FLOOR, exp_

# The error of an expanded logit is some units of 2^-53 times the logit size beta |x|^2. Up to
# MAX_LOGIT_SIZE it is at most 2^-24. Up to MAX_LOGIT_RATIO times m = sum_k p_k beta_k |x - rho_k|^2
# it is at most 2^-22 of m, and a gradient has that relative error.
MAX_LOGIT_SIZE, MAX_LOGIT_RATIO = 2.0**26, 2.0**28
# A row keeps its digits when the centre is subtracted if the square of its error,
# (x - centre) + centre - x, is at most this part of |x|^2.
LOST_PART = 2.0**-60


class Differences:
    """Squared distances of rows x [m, D] from differences rho - x, and their gradients."""

    centre = 0.0

    def __init__(self, rho: Tensor) -> None:
        self.rho, (size, features) = rho, rho.shape
        # pieces depend only on the shape of the memories: other rows cannot change the bits of a
        # row
        width = max(1, FLOAT64_TILE_ENTRIES // features)
        self.pieces = list(row_chunks(size, width))
        self.limit = max(1, FLOAT64_TILE_ENTRIES // (min(size, width) * features))

    def pad_tile(self, x: Tensor) -> Tensor:
        """A tile [m, D] with padding, as the products need it."""
        return x

    def trim_tile(self, x: Tensor, rows: int) -> Tensor:
        """A tile without its padding."""
        return x

    def _differences(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`rho_k - x_n` as [m, k, D], for each piece of the memories in turn."""
        for piece in self.pieces:
            yield piece, self.rho[piece] - x[:, None, :]

    def squared_distances(self, x: Tensor) -> Tensor:
        """Squared distances [m, K]."""
        return torch.cat([gap.square().sum(-1) for _, gap in self._differences(x)], 1)

    def projections(self, x: Tensor, h: Tensor) -> Tensor:
        """`<h, rho_k - x>` [m, K], up to a constant of each row."""
        gaps = self._differences(x)
        return torch.cat([torch.bmm(gap, h[..., None])[..., 0] for _, gap in gaps], 1)

    def recall(self, p: Tensor) -> Tensor:
        """`sum_k p_k rho_k` [m, D]."""
        return torch.bmm(p[:, None], self.rho.expand(len(p), -1, -1))[:, 0]

    def weighted_rows(self, p: Tensor, h: Tensor) -> Tensor:
        """`sum_n p_nk h_n` [K, D]."""
        return p.mT @ h

    def gradients(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """`2 sum_k w_nk (rho_k - x_n)` [m, D] and `2 sum_n w_nk (x_n - rho_k)` [K, D] for w [m, K]:
        the gradients of -sum_nk w_nk |x_n - rho_k|^2.
        """
        grad_x, grad_rho = torch.zeros_like(x), torch.empty_like(self.rho)
        for piece, gap in self._differences(x):
            own = 2 * w[:, piece]
            grad_x += torch.bmm(own[:, None], gap)[:, 0]
            grad_rho[piece] = -own.mT[:, None, :].matmul(gap.transpose(0, 1))[:, 0]
        return grad_x, grad_rho


class ExpandedDistances:
    """The methods of `Differences`, by matrix products of rows and memories less a centre. Rows,
    memories and features are padded with 0, so that other rows cannot change the bits of a row.
    """

    def __init__(self, rho: Tensor, centre: Tensor) -> None:
        self.centre, (self.size, self.features) = centre, rho.shape
        self.more = round_up(self.size, 4) - self.size
        self.rho = pad(rho - centre, (0, round_up(self.features, 4) - self.features, 0, self.more))
        self.flipped = self.rho.mT.contiguous()
        self.norms = self.rho.square().sum(-1)
        self.limit = max(FEWEST_ROWS_IN_DOUBT, FLOAT64_TILE_ENTRIES // len(self.rho))

    def pad_tile(self, x: Tensor) -> Tensor:
        rows = round_up(len(x), FEWEST_ROWS_IN_DOUBT) - len(x)
        features = self.rho.shape[-1] - self.features
        return pad(x, (0, features, 0, rows))

    def trim_tile(self, x: Tensor, rows: int) -> Tensor:
        return x[:rows, : self.features]

    def squared_distances(self, x: Tensor) -> Tensor:
        base = x.square().sum(-1, keepdim=True) + self.norms
        return torch.addmm(base, x, self.flipped, alpha=-2)[:, : self.size].clamp(min=0)

    def projections(self, x: Tensor, h: Tensor) -> Tensor:
        return (h @ self.flipped)[:, : self.size]

    def recall(self, p: Tensor) -> Tensor:
        return pad(p, (0, self.more)) @ self.rho

    def weighted_rows(self, p: Tensor, h: Tensor) -> Tensor:
        return (p.mT @ h)[:, : self.features]

    def gradients(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        own = pad(2 * w, (0, self.more))
        grad_x = (own @ self.rho).addcmul_(x, own.sum(-1, keepdim=True), value=-1)
        grad_rho = (own.mT @ x).addcmul_(self.rho, own.sum(0)[:, None], value=-1)
        return grad_x, grad_rho[: self.size, : self.features]


Distances = Differences | ExpandedDistances


class ExactTile(NamedTuple):
    """A tile of rows, with its states in all steps."""

    method: Distances
    rows: Tensor  # [n], indices of the rows
    valid: Tensor  # [n] bool: the rows for which the method is accurate
    states: list[Tensor]  # before each step, and after the last; centred, with padding
    gain: Tensor | float

    def store(self, out: Tensor, values: Tensor) -> None:
        """Write the values [n, ...] of the valid rows."""
        out[self.rows[self.valid]] = values[self.valid]

    def load(self, values: Tensor) -> Tensor:
        """A tile of values [m, ...]; 0 for the rows that are not valid, so that they add
        nothing.
        """
        own = torch.where(self.valid[:, None], values[self.rows], 0.0)
        return self.method.pad_tile(own)

    def trim_tile(self, x: Tensor) -> Tensor:
        return self.method.trim_tile(x, len(self.rows))


class ExactRows:
    """The steps and the energy of rows [m, D] of one problem, in float64."""

    def __init__(
        self, rho: Tensor, beta: Tensor, log_weights: Tensor | None, centre: Tensor | None = None
    ) -> None:
        """Rho [K, D]; beta and log_weights [K] or [1]; with a centre [1, D], `ExpandedDistances`
        may serve.
        """
        self.beta, self.per_memory = beta.double(), len(beta) > 1
        self.shift = None if log_weights is None else log_weights.double()
        self.rho = rho.double()
        if self.shift is not None:  # masked memories may be NaN, and 0 * NaN is NaN
            masked = self.shift == -torch.inf
            self.rho = torch.where(masked[:, None], 0.0, self.rho)
            self.beta = torch.where(masked, 0.0, self.beta) if self.per_memory else self.beta
        self.largest_beta = self.beta.amax()
        self.differences = Differences(self.rho)
        self.expanded: ExpandedDistances | None = None
        if centre is not None and bool(_keeps_digits(self.rho, centre.double()).all()):
            self.expanded = ExpandedDistances(self.rho, centre.double())

    def tiles(self, x: Tensor, gain: Tensor | float, steps: int) -> Iterator[ExactTile]:
        """Tiles of rows x [m, D]; each row is valid in one tile. gain is a number or [m, D]."""
        remaining = torch.arange(len(x), dtype=torch.int64, device=x.device)
        if self.expanded is not None:
            invalid = []
            for rows in remaining.split(self.expanded.limit):
                tile = self._tile(self.expanded, x, rows, gain, steps)
                invalid.append(rows[~tile.valid])
                yield tile
            remaining = torch.cat(invalid) if invalid else remaining
        for rows in remaining.split(self.differences.limit) if len(remaining) else ():
            yield self._tile(self.differences, x, rows, gain, steps)

    def _tile(
        self, method: Distances, x: Tensor, rows: Tensor, gain: Tensor | float, steps: int
    ) -> ExactTile:
        """The states of some rows in all steps, and which rows the method serves."""
        own = method.pad_tile(gain[rows]) if isinstance(gain, Tensor) else gain
        start = x[rows]
        states = [method.pad_tile(start - method.centre)]
        valid = torch.ones_like(rows, dtype=torch.bool)
        if isinstance(method, ExpandedDistances):
            valid = _keeps_digits(start, method.centre)
        for _ in range(steps):
            p, sqdist, _ = self.weights(method, states[-1])
            if isinstance(method, ExpandedDistances):
                valid &= self._is_accurate(states[-1], p, sqdist)[: len(rows)]
            states.append(self.after_step(method, states[-1], p, own))
        return ExactTile(method, rows, valid, states, own)

    def _is_accurate(self, x: Tensor, p: Tensor, sqdist: Tensor) -> Tensor:
        """[m] bool: rows whose expanded logits keep enough digits."""
        logit_size = x.square().sum(-1) * self.largest_beta
        logits = (p * sqdist * self.beta).sum(-1)
        return (logit_size <= MAX_LOGIT_SIZE) & (logit_size <= MAX_LOGIT_RATIO * logits)

    def weights(self, method: Distances, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(softmax_k(z_k), |x - rho_k|^2, logsumexp_k(z_k)) with z_k = log w_k - beta_k |x -
        rho_k|^2: [m, K], [m, K], [m, 1].
        """
        sqdist = method.squared_distances(x)
        z = -self.beta * sqdist
        z = z if self.shift is None else z + self.shift
        top = z.amax(-1, keepdim=True)
        p = exp_(z - top, EXP_FLOOR[torch.float64])
        mass = p.sum(-1, keepdim=True)
        return p.div_(mass), sqdist, top + mass.log_()

    def after_step(self, method: Distances, x: Tensor, p: Tensor, gain: Tensor | float) -> Tensor:
        """`x + gain * (sum_k p_k rho_k - x)`; exactly the sum for gain 1, and exactly x for gain
        0.
        """
        return gain * method.recall(p) + (x - gain * x)

    def advance(self, x: Tensor, gain: Tensor | float, steps: int) -> Tensor:
        """The rows after `steps` steps."""
        out = torch.empty_like(x)
        for tile in self.tiles(x, gain, steps):
            tile.store(out, tile.trim_tile(tile.states[-1]) + tile.method.centre)
        return out

    def energy(self, x: Tensor) -> Tensor:
        """`-(1/beta) logsumexp_k(log w_k - beta |x - rho_k|^2)`, [m]."""
        out = x.new_empty(len(x), 1)
        for tile in self.tiles(x, 1.0, 1):
            tile.store(out, self.weights(tile.method, tile.states[0])[2][: len(tile.rows)])
        return out[:, 0] / -self.beta


def _keeps_digits(x: Tensor, centre: Tensor) -> Tensor:
    """[m] bool: rows that keep their digits when the centre is subtracted."""
    error = (x - centre) + centre - x
    return error.square().sum(-1) <= LOST_PART * x.square().sum(-1)


class ExactSums:
    """Gradients of rho, beta and log_weights of one problem: float64 sums over its exact rows."""

    def __init__(self, exact: ExactRows) -> None:
        self.exact = exact
        self.rho = torch.zeros_like(exact.rho)
        self.beta = exact.rho.new_zeros(len(exact.rho))
        self.log_weights = exact.rho.new_zeros(len(exact.rho))

    def backward(
        self, x: Tensor, grad: Tensor, gain: Tensor | float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the rows x [m, D] before `steps` steps, and of the gain [m, D], for the
        gradient of the rows after them.
        """
        grad_x, grad_gain = torch.empty_like(x), torch.empty_like(x)
        for tile in self.exact.tiles(x, gain, steps):
            g, total = self._backward_tile(tile, tile.load(grad))
            tile.store(grad_x, tile.trim_tile(g))
            tile.store(grad_gain, tile.trim_tile(total))
        return grad_x, grad_gain

    def _backward_tile(self, tile: ExactTile, g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the first states and of the gain, for the gradient g of the last states.

        Each step back: h = gain g; s_k = <h, rho_k - x>; gz_k = p_k (s_k - sum_j p_j s_j);
        g <- g - h + 2 sum_k beta_k gz_k (rho_k - x). It adds to the gradients of
        rho_k: sum_n p_k h + 2 beta_k gz_k (x - rho_k); of beta_k: -sum_n gz_k |x - rho_k|^2; of
        log w_k: sum_n gz_k.
        """
        exact, method, grad_gain = self.exact, tile.method, torch.zeros_like(g)
        for x in reversed(tile.states[:-1]):
            p, sqdist, _ = exact.weights(method, x)
            grad_gain += g * (method.recall(p) - x)
            h = tile.gain * g
            s = method.projections(x, h)
            gz = p * (s - (p * s).sum(-1, keepdim=True))
            grad_x, grad_rho = method.gradients(x, gz * exact.beta)
            self.rho += method.weighted_rows(p, h) + grad_rho
            g = g - h + grad_x
            # for one shared beta: rows of gz sum to 0, so distances less their minimum give the
            # same sum with smaller rounding errors
            base = 0.0 if exact.per_memory else sqdist.amin(-1, keepdim=True)
            self.beta -= (gz * (sqdist - base)).sum(0)
            self.log_weights += gz.sum(0)
        return g, grad_gain

    def energy_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the rows x [m, D], for the gradient [m] of their energy."""
        grad_x, exact = torch.empty_like(x), self.exact
        for tile in exact.tiles(x, 1.0, 1):
            state, g = tile.states[0], tile.load(grad[:, None])[:, :1]
            p, sqdist, lse = exact.weights(tile.method, state)
            q = p * g
            g_state, grad_rho = tile.method.gradients(state, -q)
            tile.store(grad_x, tile.trim_tile(g_state))
            self.rho += grad_rho
            self.beta += (q * (sqdist + lse / exact.beta)).sum(0) / exact.beta
            self.log_weights -= q.sum(0) / exact.beta
        return grad_x
