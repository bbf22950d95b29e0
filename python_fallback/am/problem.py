# SPDX-License-Identifier: Apache-2.0
"""Chunked machinery of a softmax over memories: the centred memories of a cell, and the problem
with its batch dims spelled out.

Everything works in place on 3-D tiles [problems, rows, .] of `common/chunk.py`; nothing is N x K.
Tiles are padded (rows to ROWS, D and K to 4) and a product's second factor is contiguous: CPU
libraries take other kernels at ragged edges, and only so has a row the same bits wherever it
stands, alone or in a batch. Padding rows and features are 0, padding memories have logits of -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.chunk import Cell, broadcast_shapes, cells, chunk_rows, lift, padded, take
from ..common.score import FLOOR_OF_SOFTMAX, alive_memories, centred, compute_dtype, softmax_
from .doubt import BARE, HOTTEST, Watch
from .exact import ExactRows

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
    return (*broadcast_shapes(*batch), *v.shape[-2:])


class Side(NamedTuple):
    """The memories of one cell, centred: logits are `bias + x @ keys`, less beta |x|^2 per memory.

    Shapes are padded but for that of `centre`; b is 1 or the problems of the cell, n the latter.
    """

    centre: Tensor  # [b, 1, D]
    rho: Tensor  # [n, K, D]; memories that take no part are 0
    flipped: Tensor  # [n, D, K], rho transposed
    norms: Tensor  # [b, 1, K]
    beta: Tensor  # [b, 1, K or 1]
    bias: Tensor  # [b, 1, K]
    keys: Tensor  # [n, D, K]
    shift: Tensor | None  # [b, 1, K], the log-weights
    alive: Tensor | None  # [b, 1, 1], 0 where no memory takes part
    sharp: bool  # whether weights underflow where the rows lie among the memories
    watch: Watch  # finds the rows that must be computed from differences

    @property
    def per_memory(self) -> bool:
        return self.beta.shape[-1] > 1

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        torch.baddbmm(self.bias, x, self.keys, out=out)
        if self.per_memory:
            out.addcmul_(x.square().sum(-1, keepdim=True), self.beta, value=-1)
        return out

    def weights(self, x: Tensor, out: Tensor) -> Tensor:
        """Softmax over the memories of x."""
        return softmax_(self.logits(x, out), self.sharp)


class Gauge:
    """Measures rows against what they recall; scratch for one cell."""

    def __init__(self, p: Problem, cell: Cell, limit: int) -> None:
        self.scratch = p.tile(cell, limit, p.narrow)
        self.thin = [p.tile(cell, limit, 1) for _ in range(2)]
        self.ones = self.scratch.new_ones(cell.size, p.narrow, 1)

    def __call__(self, x: Tensor, recalled: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(|x|^2 + |recalled|^2, <x, recalled>), [cell, n, 1] each."""
        scratch, *thin = (tile[:, : x.shape[1]] for tile in (self.scratch, *self.thin))
        torch.mul(x, x, out=scratch).addcmul_(recalled, recalled)
        size = torch.bmm(scratch, self.ones, out=thin[0])
        along = torch.bmm(torch.mul(x, recalled, out=scratch), self.ones, out=thin[1])
        return size[:, :n], along[:, :n]

    def warmth(
        self, side: Side, x: Tensor, weights: Tensor, n: int
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Computes sum_k p_k beta_k (|x|^2 + |rho_k|^2) and sum_k p_k beta_k <x, rho_k>, [cell, n,
        1] each, from weights [cell, padded rows, K].
        """

        def compute() -> tuple[Tensor, Tensor]:
            both = torch.broadcast_tensors(side.beta, side.beta * side.norms)
            hot = torch.cat(both, 1).mT.expand(len(x), -1, -1)
            sums = torch.bmm(weights, hot.contiguous())
            warm = x.square().sum(-1, keepdim=True) * sums[..., :1] + sums[..., 1:]
            along = torch.bmm(weights, side.keys.mT.contiguous()).mul_(x).sum(-1, keepdim=True)
            return warm[:, :n], along[:, :n] / 2  # keys hold 2 beta rho

        return compute

    def norms(self, x: Tensor, n: int) -> Tensor:
        """|x|^2, [cell, n, 1]."""
        scratch, thin = (tile[:, : x.shape[1]] for tile in (self.scratch, self.thin[0]))
        return torch.bmm(torch.mul(x, x, out=scratch), self.ones, out=thin)[:, :n]


def _is_sharp(norms: Tensor, scale: Tensor) -> bool:
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
        beta, poison = self._betas(cell, rho, alive)
        norms, most = rho.square().sum(-1)[:, None, :], torch.finfo(self.dtype).max / 4
        beta = beta.clamp(max=most)  # 0 * inf is NaN, and rows this hot are all in doubt
        bare = (rho + c).square().sum(-1) * BARE < c.square().sum(-1)
        bare = (bare if alive is None else bare & alive).any(-1)
        watch = Watch(rho, norms, alive, beta, c, bare)
        more = self.wide - self.size
        rho = pad(rho, (0, self.narrow - self.features, 0, more))
        norms, beta = pad(norms, (0, more)), pad(beta, (0, more)) if beta.shape[-1] > 1 else beta
        # finite, so that a row of zeros has weights; and rounded once, for the error of a bias is
        # the same for all rows and moves borders and fixed points
        bias = (rho.double().square().sum(-1)[:, None, :] * -beta.double()).clamp(min=-most)
        # a memory this far has weight 0 for all rows but those that are computed from differences
        reached = norms < HOTTEST[self.dtype]
        norms, rho = torch.where(reached, norms, 0.0), torch.where(reached.mT, rho, 0.0)
        flipped = rho.mT.contiguous()
        keys, shift, some = (flipped * (2 * beta)).clamp(-most, most), None, None
        if weights is not None and alive is not None:
            some = alive.any(-1)[:, None, None]
            shift = pad(weights.expand(-1, self.size)[:, None, :], (0, more), value=-torch.inf)
            bias, some = torch.where(some, bias + shift, 0.0), some.to(self.dtype)
            poison = poison + torch.where(alive, weights * 0, 0.0).sum(-1)[:, None, None]
        bias = bias.to(self.dtype)
        if more:
            padding = torch.arange(self.size, self.wide, dtype=torch.int64, device=rho.device)
            bias = bias.index_fill(-1, padding, -torch.inf)
        sharp = _is_sharp(norms, beta)
        rho, flipped, keys = (t.expand(cell.size, -1, -1) for t in (rho, flipped, keys))
        return Side(c + poison, rho, flipped, norms, beta, bias, keys, shift, some, sharp, watch)

    def _betas(self, cell: Cell, rho: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
        """(beta [b, 1, K or 1], 0 or NaN [b, 1, 1]): a beta that is not finite makes all rows NaN,
        unless its memory takes no part.
        """
        if not isinstance(self.beta, Tensor):  # a number may be finite in float64 alone
            wide = rho.new_full((1, 1, 1), self.beta, dtype=torch.float64)
            return wide.to(self.dtype), rho.new_zeros(1, 1, 1)
        beta = take(self.beta, cell).to(self.dtype)[:, None, :]
        if alive is not None and beta.shape[-1] > 1:
            beta = torch.where(alive[:, None, :], beta, 0.0)
        return beta, (beta * 0).sum(-1, keepdim=True)

    def exact(self, cell: Cell, index: int, centre: Tensor) -> ExactRows:
        """One problem of a cell, for the rows that are computed again. The centre [b, 1, D] is that
        of the memories.
        """
        rho = problem_of(take(self.rho, cell), index)
        if isinstance(self.beta, Tensor):
            beta = problem_of(take(self.beta, cell), index)
        else:
            beta = torch.full((1,), self.beta, dtype=torch.float64, device=rho.device)
        weights = self.log_weights
        if weights is not None:
            weights = problem_of(take(weights, cell), index)
        own = problem_of(centre, index) if self.dtype == torch.float32 else None
        return ExactRows(rho, beta, weights, own)

    def doubted(
        self, cell: Cell, rows: slice, doubt: Tensor, step: float
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor | float]]:
        """(problem of the cell, rows of the chunk, those rows [m, D] and their gain in float64)."""
        block = take(self.v, cell, rows)
        mask = None if self.mask is None else take(self.mask, cell, rows)
        for index in doubt.any(1).nonzero()[:, 0].tolist():
            places = doubt[index].nonzero()[:, 0]
            x = problem_of(block, index)[places].double()
            gain: Tensor | float = step
            if mask is not None:
                own = problem_of(mask, index)
                own = own[places] if len(own) > 1 else own
                gain = (own.double() * step).expand_as(x)
            yield index, places, x, gain

    def regular(self, cell: Cell, rows: slice, side: Side, doubt: Tensor) -> Tensor | None:
        """The rows in doubt that are finite and have finite memories; None if there are none."""
        finite = ((take(self.v, cell, rows) - side.centre) * 0).sum(-1) == 0
        doubt = doubt & finite
        if side.alive is not None:
            doubt = doubt & (side.alive[..., 0] > 0)
        return doubt if bool(doubt.any()) else None

    def distances(self, cell: Cell, block: Tensor, place: Tensor) -> Tensor:
        """|v_n - rho_k|^2 from differences, [cell, n, 1], for the memory of each row at `place`."""
        rho = take(self.rho, cell).to(self.dtype)
        if len(rho) > 1:
            first = torch.arange(len(rho), dtype=torch.int64, device=rho.device) * self.size
            place = place + first[:, None, None]
        chosen = rho.reshape(-1, self.features).index_select(0, place.flatten())
        gap = block - chosen.view(*place.shape[:2], self.features)
        return gap.square_().sum(-1, keepdim=True)

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


def problem_of(part: Tensor, index: int) -> Tensor:
    """One problem's part of what `take` returns; all problems share a single one."""
    return part[index if len(part) > 1 else 0]


def either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """`a | b`, where None stands for all False."""
    return b if a is None else a if b is None else a | b


def advance(
    x: Tensor, recalled: Tensor, into: Tensor, n: int, step: float, gain: Tensor | None
) -> None:
    """`into = x + gain * (recalled - x)`; into may be x or recalled, and recalled is scratch. Its
    rows past n are padding.
    """
    if gain is None:
        if step != 1:
            torch.lerp(x, recalled, step, out=into)
        elif into is not recalled:
            into.copy_(recalled)
        return
    # x stays out of the product: summed onto it there, the increment would lose digits
    torch.addcmul(x[:, :n], recalled.sub_(x)[:, :n], gain, out=into[:, :n])
