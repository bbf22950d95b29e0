# SPDX-License-Identifier: Apache-2.0
"""One chunk's states, walked forward and back, and the sums that the gradients need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.chunk import KEPT_ENTRIES, Cell, GradientSum, padded, take
from ..common.score import softmax_backward_
from .exact import ExactSums
from .problem import ROWS, Gauge, Problem, Side, advance, either, problem_of


class Sums:
    """What the gradients of the memories' side sum over rows: within a chunk, then in float64."""

    def __init__(self, p: Problem, cell: Cell) -> None:
        # h^T w, x^T gz, 1^T gz, (|x|^2)^T gz, each [b, ., K]: products run faster this way round
        heights = (p.narrow, p.narrow, 1, 1)
        self.chunk = [
            p.rho.new_zeros((cell.size, height, p.wide), dtype=p.dtype) for height in heights
        ]
        self.total = [torch.zeros_like(part, dtype=torch.float64) for part in self.chunk]
        self.warmth = p.rho.new_zeros((cell.size, 1), dtype=torch.float64)  # of a shared beta

    def fold(self) -> None:
        for part, total in zip(self.chunk, self.total, strict=True):
            total += part
            part.zero_()

    def gradients(self, side: Side) -> tuple[Tensor, Tensor, Tensor]:
        """(rho [b, K, D], beta [b, K], log_weights [b, K])."""
        pull, cross, mass, spread = self.total
        rho, norms = side.flipped.double(), side.norms.double()
        lean = 2 * side.beta.double() * (cross - mass * rho)
        beta = self.warmth
        if side.per_memory:
            beta = (2 * (rho * cross).sum(1, keepdim=True) - norms * mass - spread)[:, 0]
        return (pull + lean).mT, beta, mass[:, 0]


class Trajectory:
    """One chunk's states and weights, rebuilt from v and then walked back."""

    def __init__(
        self, p: Problem, cell: Cell, side: Side, limit: int, steps: int, step: float, warms: bool
    ) -> None:
        self.p, self.cell, self.side, self.steps, self.step = p, cell, side, steps, step
        self.warms = warms and not side.per_memory
        self.sums = Sums(p, cell)
        self.keep = keeps_weights(p, steps)
        held = max(steps if self.keep else 1, 1)
        self.narrow = [p.tile(cell, limit, p.narrow) for _ in range(5 + max(steps, 1))]
        self.wide = [p.tile(cell, limit, p.wide) for _ in range(1 + held)]
        self.thin = [p.tile(cell, limit, 1) for _ in range(2)]
        self.norms = side.norms.mT.expand(cell.size, -1, -1)
        self.ones = torch.ones_like(self.norms)
        self.returns = side.keys.mT.contiguous() if side.per_memory else 2 * side.rho
        self.height = 0
        self.doubt: Tensor | None = None
        self.gauge = Gauge(p, cell, limit)

    def run(self, rows: slice) -> None:
        """Forward over one chunk. `doubt` says which rows must be computed from differences."""
        self.rows, self.n = rows, rows.stop - rows.start
        self._shape(padded(self.n, ROWS))
        self.p.load(self.cell, rows, self.side, self.states[0])
        sleeps = self.side.watch.sleeps(self.states[0], self.step)
        self.gain = self.p.gain(self.cell, rows, self.side, self.step)
        self.doubt = None
        for t in range(self.steps):
            now, last = self.states[t], t + 1 == self.steps
            weights = self.side.weights(now, self.kept[t])
            whole = self.gain is None and self.step == 1 and not last
            recalled = self.states[t + 1] if whole else self.xb
            if sleeps and last:
                break
            torch.bmm(weights, self.side.rho, out=recalled)
            if not sleeps:
                measures = self.gauge(now, recalled, self.n)
                tiles = weights[:, : self.n], recalled[:, : self.n]
                warmth = self.gauge.warmth(self.side, now, weights, self.n)
                found = self.side.watch.doubts(*measures, *tiles, warmth)
                self.doubt = either(self.doubt, found)
            if not last:
                following = self.states[t + 1]
                if not whole:
                    following[:, self.n :].zero_()  # a gain leaves them as they were
                advance(now, recalled, following, self.n, self.step, self.gain)
        if self.doubt is not None:
            self.doubt = self.p.regular(self.cell, rows, self.side, self.doubt)
        if self.doubt is not None:
            self._leave_out(self.doubt)

    def _leave_out(self, doubt: Tensor) -> None:
        """Set states and weights of the rows in doubt to 0: what they hold may be NaN or inf, and
        0 * NaN is NaN.
        """
        gone = doubt[..., None]
        for tile in (*self.states, *(self.kept if self.keep else ())):
            tile[:, : self.n].masked_fill_(gone, 0.0)

    def _shape(self, height: int) -> None:
        """Views of the tiles for a chunk of this many rows; most chunks have the same."""
        if height == self.height:
            return
        self.height = height
        self.row, self.cold = (tile[:, :height] for tile in self.thin)
        self.g, self.h, self.xb, self.pulled, self.heat, *self.states = (
            tile[:, :height] for tile in self.narrow
        )
        self.scores, *self.kept = (tile[:, :height] for tile in self.wide)
        if not self.keep:
            self.kept = self.kept * self.steps

    def back(self, grad: Tensor, mask_total: GradientSum | None) -> Tensor:
        """Gradient of the chunk's rows of v; the sums and the mask's gradient grow."""
        g, h, n = self.g, self.h, self.n
        self.p.fill(g, take(grad, self.cell, self.rows))
        if self.doubt is not None:
            g[:, :n].masked_fill_(self.doubt[..., None], 0.0)
        if self.warms:
            self.heat.zero_()
            self.cold.zero_()
        for t in reversed(range(self.steps)):
            x, weights = self.states[t], self.kept[t]
            if not self.keep:
                self.side.weights(x, weights)
            if mask_total is not None:
                torch.bmm(weights, self.side.rho, out=self.xb)
                pull = self.xb.sub_(x).mul_(g)[:, :n, : self.p.features]
                live = self.step if self.side.alive is None else self.step * self.side.alive
                mask_total.add(self.cell, pull * live, self.rows)
            if self.gain is not None:
                h.copy_(g)[:, :n].mul_(self.gain)
            elif self.step != 1:
                torch.mul(g, self.step, out=h)
            self._step_back(x, weights, g if self.gain is None and self.step == 1 else h)
        self.sums.fold()
        if self.warms:
            rows = self.heat.sum(-1, dtype=torch.float64) - self.cold[..., 0]
            self.sums.warmth += rows.sum(-1, keepdim=True)
        return g[:, :n, : self.p.features]

    def _step_back(self, x: Tensor, weights: Tensor, h: Tensor) -> None:
        """Take g and the sums through one step whose input is x; h = gain * g, g itself if 1."""
        g, side, scores, pulled = self.g, self.side, self.scores, self.pulled
        pull, cross, mass, spread = self.sums.chunk
        pull.baddbmm_(h.mT, weights)
        torch.bmm(h, side.flipped, out=scores)
        softmax_backward_(scores, weights)
        cross.baddbmm_(x.mT, scores)
        mass.add_(scores.sum(1, keepdim=True))
        torch.bmm(scores, self.returns, out=pulled)
        if side.per_memory:
            g.sub_(h).add_(pulled).addcmul_(scores @ side.beta.mT, x, value=-2)
            spread.baddbmm_(x.square().sum(-1, keepdim=True).mT, scores)
            return
        # a row of gz sums to 0 but for rounding, and that times |rho| is much where rho - x is not
        torch.bmm(scores, self.ones, out=self.row)
        pulled.addcmul_(x, self.row, value=-2)
        if h is g:
            torch.mul(pulled, side.beta, out=g)
        else:
            g.sub_(h).addcmul_(pulled, side.beta)
        if self.warms:
            # -gz |x - rho|^2 row by row: what its distances share must go before rows add up
            self.heat.addcmul_(pulled.addcmul_(x, self.row), x)
            self.cold.baddbmm_(scores, self.norms)


def keeps_weights(p: Problem, steps: int) -> bool:
    """Whether the weights of all steps are kept for a chunk, rather than computed again."""
    return steps * p.wide * 16 <= KEPT_ENTRIES


def totals_of(p: Problem, needs: Sequence[bool]) -> list[GradientSum | None]:
    """One sum for each of v, rho, beta, update_mask, log_weights that needs a gradient."""
    lifted = (p.v, p.rho, p.beta, p.mask, p.log_weights)
    widths = (p.dtype, torch.float64, torch.float64, p.dtype, torch.float64)
    return [
        GradientSum(t, like, width)
        if need and isinstance(t, Tensor) and isinstance(like, Tensor)
        else None
        for t, like, width, need in zip(p.operands, lifted, widths, needs, strict=True)
    ]


def results(p: Problem, totals: Sequence[GradientSum | None]) -> tuple[Tensor, ...]:
    return tuple(p.v.new_empty(0) if total is None else total.result() for total in totals)


def spread(
    p: Problem,
    totals: Sequence[GradientSum | None],
    cell: Cell,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add a cell's gradients of (rho, beta, log_weights), less their padding, to the totals."""
    rho, beta, weights = gradients
    trimmed = (rho[:, : p.size, : p.features], beta[:, : p.size], weights[:, : p.size])
    for total, value in zip((totals[1], totals[2], totals[4]), trimmed, strict=True):
        if total is not None:
            total.add(cell, value)


class ExactParts:
    """The exact rows of one cell: their problems, and the sums of their gradients."""

    def __init__(self, p: Problem, cell: Cell, side: Side, step: float) -> None:
        self.p, self.cell, self.step, self.centre = p, cell, step, side.centre
        self.sums: dict[int, ExactSums] = {}

    def _sums(self, index: int) -> ExactSums:
        if index not in self.sums:
            self.sums[index] = ExactSums(self.p.exact(self.cell, index, self.centre))
        return self.sums[index]

    def forward(self, rows: slice, doubt: Tensor, out: Tensor, steps: int) -> None:
        """Write the rows in doubt into out [cell, n, D]."""
        for index, places, x, gain in self.p.doubted(self.cell, rows, doubt, self.step):
            out[index, places] = self._sums(index).exact.advance(x, gain, steps).to(out.dtype)

    def energy(self, rows: slice, doubt: Tensor, out: Tensor) -> None:
        """Write the energy of the rows in doubt into out [cell, n, 1]."""
        for index, places, x, _ in self.p.doubted(self.cell, rows, doubt, 1.0):
            out[index, places, 0] = self._sums(index).exact.energy(x).to(out.dtype)

    def back(
        self, rows: slice, doubt: Tensor, grad: Tensor, out: Tensor, steps: int,
        mask_total: GradientSum | None,
    ) -> None:  # fmt: skip
        """Write the gradients of the rows in doubt into out [cell, n, D]; the sums grow."""
        grad = take(grad, self.cell, rows)
        opened = None if mask_total is None else torch.zeros_like(out, dtype=torch.float64)
        for index, places, x, gain in self.p.doubted(self.cell, rows, doubt, self.step):
            g = problem_of(grad, index)[places].double()
            into, own = self._sums(index).back(x, g, gain, steps)
            out[index, places] = into.to(out.dtype)
            if opened is not None:
                opened[index, places] = own * self.step
        if mask_total is not None and opened is not None:
            mask_total.add(self.cell, opened, rows)

    def energy_back(self, rows: slice, doubt: Tensor, grad: Tensor, out: Tensor) -> None:
        """As `back` for the energy, whose upstream gradient is [cell, n, 1]."""
        grad = take(grad, self.cell, rows)
        for index, places, x, _ in self.p.doubted(self.cell, rows, doubt, 1.0):
            g = problem_of(grad, index)[places, 0].double()
            out[index, places] = self._sums(index).energy_back(x, g).to(out.dtype)

    def spread(self, totals: Sequence[GradientSum | None]) -> None:
        """Add the sums to the totals of (rho, beta, log_weights)."""
        for index, sums in self.sums.items():
            start = self.cell.batch.start + index
            own = Cell(self.cell.lead, slice(start, start + 1))
            parts = (sums.rho[None], sums.beta[None], sums.log_weights[None])
            spread(self.p, totals, own, parts)


def extended(rows: Tensor, problems: int, height: int, value: float) -> Tensor:
    """[b, n, 1] as [problems, height, 1], filled up with `value`."""
    full = rows.new_full((problems, height, 1), value)
    full[:, : rows.shape[1]] = rows
    return full
