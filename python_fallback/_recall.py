# SPDX-License-Identifier: Apache-2.0
"""Chunked machinery of a softmax over memories: the centred memories of a cell, the problem with
its batch dims spelled out, one chunk's trajectory and the sums that the gradients need.

Everything works in place on 3-D tiles [problems, rows, .] of `_chunk`; nothing is N x K. Tiles are
padded (rows to ROWS, D and K to 4) and a product's second factor is contiguous: CPU libraries take
other kernels at ragged edges, and only so has a row the same bits wherever it stands, alone or in a
batch. Padding rows and features are 0, padding memories have logits of -inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._chunk import KEPT_ENTRIES, Cell, GradientSum, cells, chunk_rows, lift, take
from ._score import (
    FLOOR_OF_SOFTMAX,
    alive_memories,
    centred,
    compute_dtype,
    first_max_,
    softmax_,
    softmax_backward_,
)

Beta = float | Tensor
# Rows of a tile are a multiple of this: of 16 for the library's kernels, of 32 so that no product
# falls below the 400 multiply-adds under which torch runs a loop of its own.
ROWS = 32


def result_shape(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
) -> tuple[int, ...]:
    """[*batch, N, D] with batch the broadcast of all leading dims."""
    batch = [v.shape[:-2], rho.shape[:-2]]
    batch += [b.shape[:-1] for b in (beta, log_weights) if isinstance(b, Tensor)]
    batch += [update_mask.shape[:-2]] if update_mask is not None else []
    return (*torch.broadcast_shapes(*batch), *v.shape[-2:])


class Side(NamedTuple):
    """The memories of one cell, centred: logits are `bias + x @ keys`, less beta |x|^2 per memory.

    Shapes are padded but for that of `centre`; b is 1 or the problems of the cell, n the latter.
    """

    centre: Tensor  # [b, 1, D]
    rho: Tensor  # [n, K, D]; memories that take no part are 0
    flipped: Tensor  # [n, D, K], rho transposed
    norms: Tensor  # [b, 1, K]
    beta: Tensor | None  # [b, 1, K or 1]; None: hard assignment
    bias: Tensor  # [b, 1, K]
    keys: Tensor  # [n, D, K]
    shift: Tensor | None  # [b, 1, K], the log-weights
    alive: Tensor | None  # [b, 1, 1], 0 where no memory takes part
    sharp: bool  # whether weights underflow where the rows lie among the memories

    @property
    def per_memory(self) -> bool:
        return self.beta is not None and self.beta.shape[-1] > 1

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        torch.baddbmm(self.bias, x, self.keys, out=out)
        if self.per_memory:
            out.addcmul_(x.square().sum(-1, keepdim=True), self.beta, value=-1)  # type: ignore[arg-type]
        return out

    def weights(self, x: Tensor, out: Tensor) -> Tensor:
        """Softmax over the memories of x, one-hot if hard."""
        self.logits(x, out)
        if self.beta is not None:
            return softmax_(out, self.sharp)
        top, index = first_max_(out)
        # a row that is not finite stays visible
        return out.zero_().scatter_(-1, index.clamp(max=out.shape[-1] - 1), top * 0 + 1)


def _is_sharp(norms: Tensor, scale: float | Tensor) -> bool:
    """Whether logits of a row at one memory reach below the floor, from the memories alone: a row
    has the same bits in any company. On a GPU nothing is read back.
    """
    if not norms.is_cpu or norms.numel() == 0:
        return False
    return bool((4 * norms * scale > -FLOOR_OF_SOFTMAX[norms.dtype]).any())


class Problem:
    """One call: operands with all batch dims spelled out, never expanded."""

    def __init__(
        self,
        v: Tensor,
        rho: Tensor,
        beta: Beta,
        mask: Tensor | None = None,
        log_weights: Tensor | None = None,
    ) -> None:
        self.dtype = compute_dtype(v)
        self.shape = result_shape(v, rho, beta, mask, log_weights)
        self.batch, self.rows, self.features = self.shape[:-2], v.shape[-2], v.shape[-1]
        self.size = rho.shape[-2]
        self.wide, self.narrow = padded(self.size, 4), padded(self.features, 4)
        dims = len(self.batch)
        self.operands = (v, rho, beta, mask, log_weights)
        self.v, self.rho = lift(v, dims, 2), lift(rho, dims, 2)
        self.beta = lift(beta, dims, 1) if isinstance(beta, Tensor) else float(beta)
        self.mask = None if mask is None else lift(mask, dims, 2)
        self.log_weights = None if log_weights is None else lift(log_weights, dims, 1)

    def parts(self, kept: int = 0) -> Iterator[tuple[Cell, Side, int]]:
        """Cells with their memories and the rows of a chunk, when `kept` entries a row are held."""
        limit = chunk_rows(self.wide, kept)
        core = self.wide * self.narrow
        for cell in cells(self.batch, self.rows, limit, core):
            yield cell, self._side(cell), max(1, min(limit, self.rows))

    def _side(self, cell: Cell) -> Side:
        weights = None if self.log_weights is None else take(self.log_weights, cell).to(self.dtype)
        alive = alive_memories(weights)
        rho, c = centred(take(self.rho, cell).to(self.dtype), alive)
        more_features, more = self.narrow - self.features, self.wide - self.size
        rho = pad(rho, (0, more_features, 0, more))
        norms, flipped = rho.square().sum(-1)[:, None, :], rho.mT.contiguous()
        beta: Tensor | None = None
        if isinstance(self.beta, Tensor):
            beta = take(self.beta, cell).to(self.dtype)[:, None, :]
            beta = pad(beta, (0, more)) if beta.shape[-1] > 1 else beta
        elif not math.isinf(self.beta):
            beta = rho.new_full((1, 1, 1), self.beta)
        scale = 1.0 if beta is None else beta
        bias, shift, some = norms * -scale, None, None
        if weights is not None and alive is not None:
            some = alive.any(-1)[:, None, None]
            given = weights if beta is not None else torch.where(alive, 0.0, -torch.inf)
            shift = given.expand(-1, self.size)[:, None, :]
            shift = pad(shift, (0, more), value=-torch.inf)
            bias, some = torch.where(some, bias + shift, 0.0), some.to(self.dtype)
        if more:
            bias = bias.index_fill(
                -1, torch.arange(self.size, self.wide, device=rho.device), -torch.inf
            )
        factors = (rho, flipped, flipped * (2 * scale))
        rho, flipped, keys = (t.expand(cell.size, -1, -1) for t in factors)
        return Side(c, rho, flipped, norms, beta, bias, keys, shift, some, _is_sharp(norms, scale))

    def tile(self, cell: Cell, rows: int, width: int) -> Tensor:
        """Scratch [problems of the cell, padded rows, width], not initialised."""
        return self.rho.new_empty((cell.size, padded(rows, ROWS), width), dtype=self.dtype)

    def load(self, cell: Cell, rows: slice, side: Side, x: Tensor) -> Tensor:
        """Fill x with the centred states and padding; returns the block of v as it is."""
        block = take(self.v, cell, rows)
        self.fill(x, block).sub_(side.centre)
        return block

    def fill(self, x: Tensor, block: Tensor) -> Tensor:
        """Fill x with a block and padding; returns the part of x that holds the block."""
        n, d = block.shape[1], self.features
        x[:, n:].zero_()
        x[:, :, d:].zero_()
        return x[:, :n, :d].copy_(block)

    def gain(self, cell: Cell, rows: slice, side: Side, step: float) -> Tensor | None:
        """`step * update_mask`, 0 where no memory takes part; None stands for the number `step`."""
        gain = None if self.mask is None else take(self.mask, cell, rows).to(self.dtype) * step
        if gain is not None and gain.shape[-1] > 1:
            gain = pad(gain, (0, self.narrow - self.features))
        if side.alive is None:
            return gain
        return side.alive * (step if gain is None else gain)


def padded(size: int, to: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // to) * to


def advance(
    x: Tensor,
    into: Tensor,
    n: int,
    side: Side,
    weights: Tensor,
    step: float,
    gain: Tensor | None,
    xb: Tensor,
) -> None:
    """`into = x + gain * (weights @ rho - x)`; into may be x, its rows past n are padding and xb is
    scratch.
    """
    if gain is None and step == 1:
        torch.bmm(weights, side.rho, out=into)
        return
    # x stays out of the product: summed onto it there, the increment would lose digits
    torch.bmm(weights, side.rho, out=xb)
    if gain is None:
        torch.lerp(x, xb, step, out=into)
        return
    torch.addcmul(x[:, :n], xb.sub_(x)[:, :n], gain, out=into[:, :n])


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
        if side.beta is None:
            return pull.mT, mass[:, 0], mass[:, 0]
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
        self.warms = warms and side.beta is not None and not side.per_memory
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

    def run(self, rows: slice) -> None:
        """Forward over one chunk."""
        self.rows, self.n = rows, rows.stop - rows.start
        self._shape(padded(self.n, ROWS))
        self.p.load(self.cell, rows, self.side, self.states[0])
        self.gain = self.p.gain(self.cell, rows, self.side, self.step)
        for t in range(self.steps):
            weights = self.side.weights(self.states[t], self.kept[t])
            if t + 1 < self.steps:
                now, following = self.states[t : t + 2]
                following[:, self.n :].zero_()  # a gain leaves them as they were
                advance(now, following, self.n, self.side, weights, self.step, self.gain, self.xb)

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
        if side.beta is None:
            g.sub_(h)
            return
        torch.bmm(h, side.flipped, out=scores)
        softmax_backward_(scores, weights)
        cross.baddbmm_(x.mT, scores)
        mass.add_(scores.sum(1, keepdim=True))
        torch.bmm(scores, self.returns, out=pulled)
        if side.per_memory:
            g.sub_(h).add_(pulled).addcmul_(scores @ side.beta.mT, x, value=-2)
            spread.baddbmm_(x.square().sum(-1, keepdim=True).mT, scores)
            return
        if h is g:
            torch.mul(pulled, side.beta, out=g)
        else:
            g.sub_(h).addcmul_(pulled, side.beta)
        if self.warms:
            # -gz |x - rho|^2 row by row: a row of gz sums to 0, and what its distances share
            # must go before rows add up
            torch.bmm(scores, self.ones, out=self.row)
            self.heat.addcmul_(pulled.addcmul_(x, self.row, value=-1), x)
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


def extended(rows: Tensor, problems: int, height: int, value: float) -> Tensor:
    """[b, n, 1] as [problems, height, 1], filled up with `value`."""
    full = rows.new_full((problems, height, 1), value)
    full[:, : rows.shape[1]] = rows
    return full
