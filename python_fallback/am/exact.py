# SPDX-License-Identifier: Apache-2.0
"""Rows that `am/doubt.py` finds, computed again in float64.

`Differences` takes rho - x itself: it holds wherever rows and memories stand. `Expanded` takes
|x|^2 + |rho|^2 - 2 x.rho of centred data: these are products, several times as fast, and float64
has 29 bits more than float32. `ExactRows` takes the second for every row that keeps enough of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.chunk import padded, row_chunks
from ..common.score import FLOOR, exp_

# float64 entries of one tile: of differences, or of logits.
ENTRIES = 1 << 17
# An expanded logit is off by some units of 2^-53 times the heat beta |x|^2. That is at most 2^-24
# below the first heat. It is at most 2^-22 of the logits, and so of what a gradient makes of them,
# below the second times -sum_k p_k z_k.
TAME, TAME_OF_LOGITS = 2.0**26, 2.0**28
# A row keeps its digits less the centre where what it loses is this part of its squared length.
KEPT = 2.0**-60


class Differences:
    """Distances and gradients of rows x [m, D] from rho - x."""

    centre = 0.0

    def __init__(self, rho: Tensor) -> None:
        self.rho, (size, features) = rho, rho.shape
        # pieces depend on the shape of the memories alone: a row has the same bits in any company
        width = max(1, ENTRIES // features)
        self.pieces = list(row_chunks(size, width))
        self.limit = max(1, ENTRIES // (min(size, width) * features))

    def widened(self, x: Tensor) -> Tensor:
        """A tile [m, D] with its padding."""
        return x

    def trimmed(self, x: Tensor, rows: int) -> Tensor:
        """A tile without its padding."""
        return x

    def _gaps(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`rho_k - x_n` as [m, k, D], for one piece of the memories after the other."""
        for piece in self.pieces:
            yield piece, self.rho[piece] - x[:, None, :]

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances [m, K]."""
        return torch.cat([gap.square().sum(-1) for _, gap in self._gaps(x)], 1)

    def along(self, x: Tensor, h: Tensor) -> Tensor:
        """`<h, rho_k - x>` [m, K], up to a number that all memories of a row share."""
        return torch.cat([torch.bmm(gap, h[..., None])[..., 0] for _, gap in self._gaps(x)], 1)

    def recalled(self, p: Tensor) -> Tensor:
        """`sum_k p_k rho_k` [m, D]."""
        return torch.bmm(p[:, None], self.rho.expand(len(p), -1, -1))[:, 0]

    def pulled(self, p: Tensor, h: Tensor) -> Tensor:
        """`sum_n p_nk h_n` [K, D]."""
        return p.mT @ h

    def spread(self, x: Tensor, pulls: Tensor) -> tuple[Tensor, Tensor]:
        """`2 sum_k W_k (rho_k - x)` [m, D] for W = pulls [m, K], and `2 sum_n W_nk (x_n - rho_k)`
        [K, D].
        """
        total, back = torch.zeros_like(x), torch.empty_like(self.rho)
        for piece, gap in self._gaps(x):
            own = 2 * pulls[:, piece]
            total += torch.bmm(own[:, None], gap)[:, 0]
            back[piece] = -own.mT[:, None, :].matmul(gap.transpose(0, 1))[:, 0]
        return total, back


class Expanded:
    """As `Differences` from products of rows and memories less a centre. Rows, memories and
    features are padded with 0, so that products give a row the same bits in any company.
    """

    def __init__(self, rho: Tensor, centre: Tensor) -> None:
        self.centre, (self.size, self.features) = centre, rho.shape
        self.more = padded(self.size, 4) - self.size
        self.rho = pad(rho - centre, (0, padded(self.features, 4) - self.features, 0, self.more))
        self.flipped = self.rho.mT.contiguous()
        self.norms = self.rho.square().sum(-1)
        self.limit = max(32, ENTRIES // len(self.rho))

    def widened(self, x: Tensor) -> Tensor:
        rows, features = padded(len(x), 32) - len(x), self.rho.shape[-1] - self.features
        return pad(x, (0, features, 0, rows))

    def trimmed(self, x: Tensor, rows: int) -> Tensor:
        return x[:rows, : self.features]

    def distances(self, x: Tensor) -> Tensor:
        base = x.square().sum(-1, keepdim=True) + self.norms
        return torch.addmm(base, x, self.flipped, alpha=-2)[:, : self.size].clamp(min=0)

    def along(self, x: Tensor, h: Tensor) -> Tensor:
        return (h @ self.flipped)[:, : self.size]

    def recalled(self, p: Tensor) -> Tensor:
        return pad(p, (0, self.more)) @ self.rho

    def pulled(self, p: Tensor, h: Tensor) -> Tensor:
        return (p.mT @ h)[:, : self.features]

    def spread(self, x: Tensor, pulls: Tensor) -> tuple[Tensor, Tensor]:
        own = pad(2 * pulls, (0, self.more))
        total = (own @ self.rho).addcmul_(x, own.sum(-1, keepdim=True), value=-1)
        back = (own.mT @ x).addcmul_(self.rho, own.sum(0)[:, None], value=-1)
        return total, back[: self.size, : self.features]


class Part(NamedTuple):
    """A tile of rows on their way through the steps."""

    way: Differences | Expanded
    rows: Tensor  # [n], places of the rows
    served: Tensor  # [n] bool: the rows that this way serves
    states: list[Tensor]  # before each step, and after the last; less the centre, with padding
    gain: Tensor | float

    def store(self, out: Tensor, values: Tensor) -> None:
        """Write the values [n, ...] of the rows that are served."""
        out[self.rows[self.served]] = values[self.served]

    def load(self, values: Tensor) -> Tensor:
        """A tile of values [m, ...]; 0 for the rows that are not served: they add nothing."""
        own = torch.where(self.served[:, None], values[self.rows], 0.0)
        return self.way.widened(own)

    def trimmed(self, x: Tensor) -> Tensor:
        return self.way.trimmed(x, len(self.rows))


class ExactRows:
    """Rows [m, D] of one problem against its memories, all in float64."""

    def __init__(
        self, rho: Tensor, beta: Tensor, log_weights: Tensor | None, centre: Tensor | None = None
    ) -> None:
        """Rho [K, D]; beta and log_weights [K] or [1]. A centre [1, D] allows `Expanded`."""
        self.beta, self.per_memory = beta.double(), len(beta) > 1
        self.shift = None if log_weights is None else log_weights.double()
        self.rho = rho.double()
        if self.shift is not None:  # a memory that takes no part may hold NaN
            dead = self.shift == -torch.inf
            self.rho = torch.where(dead[:, None], 0.0, self.rho)
            self.beta = torch.where(dead, 0.0, self.beta) if self.per_memory else self.beta
        self.sharpest = self.beta.amax()
        self.differences = Differences(self.rho)
        self.expanded: Expanded | None = None
        if centre is not None and bool(_keep(self.rho, centre.double()).all()):
            self.expanded = Expanded(self.rho, centre.double())

    def parts(self, x: Tensor, gain: Tensor | float, steps: int) -> Iterator[Part]:
        """Tiles of rows x [m, D], each row served by one of them; gain is a number or [m, D]."""
        left = torch.arange(len(x), dtype=torch.int64, device=x.device)
        if self.expanded is not None:
            rest = []
            for rows in left.split(self.expanded.limit):
                part = self._part(self.expanded, x, rows, gain, steps)
                rest.append(rows[~part.served])
                yield part
            left = torch.cat(rest) if rest else left
        for rows in left.split(self.differences.limit) if len(left) else ():
            yield self._part(self.differences, x, rows, gain, steps)

    def _part(
        self, way: Differences | Expanded, x: Tensor, rows: Tensor, gain: Tensor | float, steps: int
    ) -> Part:
        own = way.widened(gain[rows]) if isinstance(gain, Tensor) else gain
        start = x[rows]
        states, served = [way.widened(start - way.centre)], torch.ones_like(rows, dtype=torch.bool)
        if isinstance(way, Expanded):
            served = _keep(start, way.centre)
        for _ in range(steps):
            p, far, _ = self.weights(way, states[-1])
            if isinstance(way, Expanded):
                served &= self._is_tame(states[-1], p, far)[: len(rows)]
            states.append(self.moved(way, states[-1], p, own))
        return Part(way, rows, served, states, own)

    def _is_tame(self, x: Tensor, p: Tensor, far: Tensor) -> Tensor:
        """[m] bool: rows whose expanded logits keep enough digits."""
        heat = x.square().sum(-1) * self.sharpest
        logits = (p * far * self.beta).sum(-1)
        return (heat <= TAME) & (heat <= TAME_OF_LOGITS * logits)

    def weights(self, way: Differences | Expanded, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weights, squared distances, logsumexp of the logits): [m, K], [m, K], [m, 1]."""
        far = way.distances(x)
        z = -self.beta * far
        z = z if self.shift is None else z + self.shift
        top = z.amax(-1, keepdim=True)
        p = exp_(z - top, FLOOR[torch.float64])
        mass = p.sum(-1, keepdim=True)
        return p.div_(mass), far, top + mass.log_()

    def moved(
        self, way: Differences | Expanded, x: Tensor, p: Tensor, gain: Tensor | float
    ) -> Tensor:
        """`x + gain * (sum_k p_k rho_k - x)`, exactly the sum at gain 1 and x at gain 0."""
        return gain * way.recalled(p) + (x - gain * x)

    def advance(self, x: Tensor, gain: Tensor | float, steps: int) -> Tensor:
        """The rows after `steps` steps."""
        out = torch.empty_like(x)
        for part in self.parts(x, gain, steps):
            part.store(out, part.trimmed(part.states[-1]) + part.way.centre)
        return out

    def energy(self, x: Tensor) -> Tensor:
        """`-(1/beta) logsumexp_k(log w_k - beta |x - rho_k|^2)`, [m]."""
        out = x.new_empty(len(x), 1)
        for part in self.parts(x, 1.0, 1):
            part.store(out, self.weights(part.way, part.states[0])[2][: len(part.rows)])
        return out[:, 0] / -self.beta


def _keep(x: Tensor, centre: Tensor) -> Tensor:
    """[m] bool: rows that keep their digits less the centre."""
    lost = (x - centre) + centre - x
    return lost.square().sum(-1) <= KEPT * x.square().sum(-1)


class ExactSums:
    """Gradients of the memories' side of one problem, summed over its exact rows in float64."""

    def __init__(self, exact: ExactRows) -> None:
        self.exact = exact
        self.rho = torch.zeros_like(exact.rho)
        self.beta = exact.rho.new_zeros(len(exact.rho))
        self.log_weights = exact.rho.new_zeros(len(exact.rho))

    def back(
        self, x: Tensor, grad: Tensor, gain: Tensor | float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the rows x [m, D] before `steps` steps, and of the gain [m, D]."""
        into, opened = torch.empty_like(x), torch.empty_like(x)
        for part in self.exact.parts(x, gain, steps):
            g, total = self._back(part, part.load(grad))
            part.store(into, part.trimmed(g))
            part.store(opened, part.trimmed(total))
        return into, opened

    def _back(self, part: Part, g: Tensor) -> tuple[Tensor, Tensor]:
        exact, way, opened = self.exact, part.way, torch.zeros_like(g)
        for x in reversed(part.states[:-1]):
            p, far, _ = exact.weights(way, x)
            opened += g * (way.recalled(p) - x)
            h = part.gain * g
            s = way.along(x, h)
            gz = p * (s - (p * s).sum(-1, keepdim=True))
            into, back = way.spread(x, gz * exact.beta)
            self.rho += way.pulled(p, h) + back
            g = g - h + into
            # one beta for all: a row of gz sums to 0, and what its distances share must go first
            base = 0.0 if exact.per_memory else far.amin(-1, keepdim=True)
            self.beta -= (gz * (far - base)).sum(0)
            self.log_weights += gz.sum(0)
        return g, opened

    def energy_back(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the rows x [m, D] for the upstream gradient [m] of their energy."""
        into, exact = torch.empty_like(x), self.exact
        for part in exact.parts(x, 1.0, 1):
            state, g = part.states[0], part.load(grad[:, None])[:, :1]
            p, far, lse = exact.weights(part.way, state)
            q = p * g
            pull, back = part.way.spread(state, -q)
            part.store(into, part.trimmed(pull))
            self.rho += back
            self.beta += (q * (far + lse / exact.beta)).sum(0) / exact.beta
            self.log_weights -= q.sum(0) / exact.beta
        return into
