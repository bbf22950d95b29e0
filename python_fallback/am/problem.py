# SPDX-License-Identifier: Apache-2.0
"""A softmax over memories in chunks: the centred memories of a cell, and the operands of a call
with their batch dims.

All functions compute in place on 3-D tiles [problems, rows, .] of `common/chunk.py`, never N x K.
Tiles are padded (rows to ROWS, D and K to 4) and the second factor of a product is contiguous: CPU
libraries use other kernels at ragged edges, and a row must have the same bits at every place in a
tile, alone or in a batch. Padding rows and features are 0, padding memories have logits of -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.chunk import (
    BatchCell,
    add_batch_dims,
    broadcast_shapes,
    cells,
    chunk_rows,
    round_up,
    take,
)
from ..common.score import SOFTMAX_FLOOR, active_memories, centre_memories, compute_dtype, softmax_
from .doubt import LARGEST_LOGIT, SMALL, DoubtRule
from .exact import ExactRows

Beta = float | Tensor
# Rows of a tile are a multiple of this: of 16 for the kernels of CPU libraries, of 32 because torch
# computes products of fewer than 400 multiply-adds in a loop of its own.
ROWS = 32


def result_shape(
    v: Tensor,
    rho: Tensor,
    beta: Beta,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
) -> tuple[int, ...]:
    """[*batch, N, D], where batch is the broadcast of all leading dims."""
    batch = [v.shape[:-2], rho.shape[:-2]]
    batch += [b.shape[:-1] for b in (beta, log_weights) if isinstance(b, Tensor)]
    batch += [update_mask.shape[:-2]] if update_mask is not None else []
    return (*broadcast_shapes(*batch), *v.shape[-2:])


class CellMemories(NamedTuple):
    """The centred memories of one cell. Logits are `bias + x @ keys`, and with a beta per memory
    also minus beta_k |x|^2: a term that all memories share cancels in the softmax.

    K and D are padded, except in `centre`. n counts the problems of the cell; b is 1 or n.
    """

    centre: Tensor  # [b, 1, D]
    rho: Tensor  # [n, K, D]; masked memories are 0
    flipped: Tensor  # [n, D, K], rho transposed
    norms: Tensor  # [b, 1, K], |rho|^2
    beta: Tensor  # [b, 1, K or 1]
    bias: Tensor  # [b, 1, K], log w - beta |rho|^2
    keys: Tensor  # [n, D, K], 2 beta rho transposed
    log_weights: Tensor | None  # [b, 1, K]
    any_active: Tensor | None  # [b, 1, 1], 1, or 0 where all memories are masked
    underflows: bool  # whether weights of rows near a memory underflow
    rule: DoubtRule  # decides which rows must be computed from differences

    @property
    def per_memory(self) -> bool:
        return self.beta.shape[-1] > 1

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        """`bias + x @ keys`, minus beta |x|^2 where the betas differ, in `out`."""
        torch.baddbmm(self.bias, x, self.keys, out=out)
        if self.per_memory:
            out.addcmul_(x.square().sum(-1, keepdim=True), self.beta, value=-1)
        return out

    def weights(self, x: Tensor, out: Tensor) -> Tensor:
        """softmax_k(logits) in `out`."""
        return softmax_(self.logits(x, out), self.underflows)


class RowProducts:
    """Norms and products of rows and their recalls; scratch for one cell."""

    def __init__(self, p: MemoryProblem, cell: BatchCell, limit: int) -> None:
        self.scratch = p.tile(cell, limit, p.padded_features)
        self.columns = [p.tile(cell, limit, 1) for _ in range(2)]
        self.ones = self.scratch.new_ones(cell.size, p.padded_features, 1)

    def __call__(self, x: Tensor, recalled: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(|x|^2 + |recalled|^2, <x, recalled>), [cell, n, 1] each."""
        scratch, *columns = (tile[:, : x.shape[1]] for tile in (self.scratch, *self.columns))
        torch.mul(x, x, out=scratch).addcmul_(recalled, recalled)
        size = torch.bmm(scratch, self.ones, out=columns[0])
        product = torch.bmm(torch.mul(x, recalled, out=scratch), self.ones, out=columns[1])
        return size[:, :n], product[:, :n]

    def rows_in_doubt(
        self, memories: CellMemories, x: Tensor, recalled: Tensor, weights: Tensor, n: int
    ) -> Tensor | None:
        """[cell, n] bool, or None: rows that one step from x puts in doubt."""
        return memories.rule.rows_in_doubt(
            *self(x, recalled, n),
            weights[:, :n],
            recalled[:, :n],
            self.mean_logit_size(memories, x, weights, n),
        )

    def mean_logit_size(
        self, memories: CellMemories, x: Tensor, weights: Tensor, n: int
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """A function that computes sum_k p_k beta_k (|x|^2 + |rho_k|^2) and sum_k p_k beta_k <x,
        rho_k>, [cell, n, 1] each, from weights [cell, padded rows, K].
        """

        def compute() -> tuple[Tensor, Tensor]:
            factors = torch.broadcast_tensors(memories.beta, memories.beta * memories.norms)
            scales = torch.cat(factors, 1).mT.expand(len(x), -1, -1)
            sums = torch.bmm(weights, scales.contiguous())
            size = x.square().sum(-1, keepdim=True) * sums[..., :1] + sums[..., 1:]
            product = torch.bmm(weights, memories.keys.mT.contiguous()).mul_(x)
            product = product.sum(-1, keepdim=True)
            return size[:, :n], product[:, :n] / 2  # keys are 2 beta rho

        return compute

    def norms(self, x: Tensor, n: int) -> Tensor:
        """|x|^2, [cell, n, 1]."""
        scratch, columns = (tile[:, : x.shape[1]] for tile in (self.scratch, self.columns[0]))
        return torch.bmm(torch.mul(x, x, out=scratch), self.ones, out=columns)[:, :n]


def _underflows(norms: Tensor, scale: Tensor) -> bool:
    """Whether a row at one memory has logits below the floor. The memories alone decide: other rows
    cannot change the bits of a row. False on a GPU: the host would wait for it.
    """
    if not norms.is_cpu or norms.numel() == 0:
        return False
    return bool((4 * norms * scale > -SOFTMAX_FLOOR[norms.dtype]).any())


class MemoryProblem:
    """The operands of one call, with all batch dims; shared dims have size 1, nothing is
    expanded.
    """

    def __init__(
        self,
        v: Tensor,
        rho: Tensor,
        beta: Beta,
        mask: Tensor | None = None,
        log_weights: Tensor | None = None,
    ) -> None:
        self.dtype = compute_dtype(v.dtype)
        self.shape = result_shape(v, rho, beta, mask, log_weights)
        self.batch, self.rows, self.features = self.shape[:-2], v.shape[-2], v.shape[-1]
        self.size = rho.shape[-2]
        self.padded_memories = round_up(self.size, 4)
        self.padded_features = round_up(self.features, 4)
        dims = len(self.batch)
        self.operands = (v, rho, beta, mask, log_weights)
        self.v, self.rho = add_batch_dims(v, dims, 2), add_batch_dims(rho, dims, 2)
        self.beta = add_batch_dims(beta, dims, 1) if isinstance(beta, Tensor) else float(beta)
        self.mask = None if mask is None else add_batch_dims(mask, dims, 2)
        self.log_weights = None if log_weights is None else add_batch_dims(log_weights, dims, 1)

    def cells_with_memories(self, saved: int = 0) -> Iterator[tuple[BatchCell, CellMemories, int]]:
        """Cells, their memories, and the rows of a chunk where a backward saves `saved` entries of
        each row.
        """
        limit = chunk_rows(self.padded_memories, saved)
        core = self.padded_memories * self.padded_features
        for cell in cells(self.batch, self.rows, limit, core):
            yield cell, self._cell_memories(cell), max(1, min(limit, self.rows))

    def _cell_memories(self, cell: BatchCell) -> CellMemories:
        weights = None if self.log_weights is None else take(self.log_weights, cell).to(self.dtype)
        active = active_memories(weights)
        rho, c = centre_memories(take(self.rho, cell).to(self.dtype), active)
        beta, zero_or_nan = self._betas(cell, rho, active)
        norms, largest = rho.square().sum(-1)[:, None, :], torch.finfo(self.dtype).max / 4
        beta = beta.clamp(max=largest)  # 0 * inf is NaN; a beta this large puts all rows in doubt
        has_small = (rho + c).square().sum(-1) * SMALL < c.square().sum(-1)
        has_small = (has_small if active is None else has_small & active).any(-1)
        rule = DoubtRule(rho, norms, active, beta, c, has_small)
        extra = self.padded_memories - self.size
        rho = pad(rho, (0, self.padded_features - self.features, 0, extra))
        norms, beta = pad(norms, (0, extra)), pad(beta, (0, extra)) if beta.shape[-1] > 1 else beta
        # finite, so that a row of zeros has weights; rounded once, because an error of the bias is
        # the same for all rows and would move borders and fixed points
        bias = (rho.double().square().sum(-1)[:, None, :] * -beta.double()).clamp(min=-largest)
        # the rows that are not in doubt give a memory that is so far away the weight 0
        in_range = norms < LARGEST_LOGIT[self.dtype]
        norms, rho = torch.where(in_range, norms, 0.0), torch.where(in_range.mT, rho, 0.0)
        flipped = rho.mT.contiguous()
        keys, shift, any_active = (flipped * (2 * beta)).clamp(-largest, largest), None, None
        if weights is not None and active is not None:
            any_active = active.any(-1)[:, None, None]
            shift = pad(weights.expand(-1, self.size)[:, None, :], (0, extra), value=-torch.inf)
            bias, any_active = torch.where(any_active, bias + shift, 0.0), any_active.to(self.dtype)
            finite = torch.where(active, weights * 0, 0.0).sum(-1)[:, None, None]
            zero_or_nan = zero_or_nan + finite
        bias = bias.to(self.dtype)
        if extra:
            index = torch.arange(
                self.size, self.padded_memories, dtype=torch.int64, device=rho.device
            )
            bias = bias.index_fill(-1, index, -torch.inf)
        underflows = _underflows(norms, beta)
        rho, flipped, keys = (t.expand(cell.size, -1, -1) for t in (rho, flipped, keys))
        return CellMemories(
            c + zero_or_nan,
            rho,
            flipped,
            norms,
            beta,
            bias,
            keys,
            shift,
            any_active,
            underflows,
            rule,
        )

    def _betas(self, cell: BatchCell, rho: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """(beta [b, 1, K or 1], 0 or NaN [b, 1, 1]): a beta that is not finite makes all rows NaN,
        unless its memory is masked.
        """
        if not isinstance(self.beta, Tensor):  # a number may be finite only in float64
            beta = rho.new_full((1, 1, 1), self.beta, dtype=torch.float64)
            return beta.to(self.dtype), rho.new_zeros(1, 1, 1)
        beta = take(self.beta, cell).to(self.dtype)[:, None, :]
        if active is not None and beta.shape[-1] > 1:
            beta = torch.where(active[:, None, :], beta, 0.0)
        return beta, (beta * 0).sum(-1, keepdim=True)

    def exact(self, cell: BatchCell, index: int, centre: Tensor) -> ExactRows:
        """One problem of a cell, for its rows in doubt; centre is that of the memories, [b, 1,
        D].
        """
        rho = problem_of(take(self.rho, cell), index)
        if isinstance(self.beta, Tensor):
            beta = problem_of(take(self.beta, cell), index)
        else:
            beta = torch.full((1,), self.beta, dtype=torch.float64, device=rho.device)
        weights = self.log_weights
        if weights is not None:
            weights = problem_of(take(weights, cell), index)
        part = problem_of(centre, index) if self.dtype == torch.float32 else None
        return ExactRows(rho, beta, weights, part)

    def exact_inputs(
        self, cell: BatchCell, rows: slice, doubt: Tensor, step: float
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor | float]]:
        """For each problem of the cell: (its index, the indices of its rows in doubt in the chunk,
        those rows [m, D] in float64, and their gain).
        """
        values = take(self.v, cell, rows)
        mask = None if self.mask is None else take(self.mask, cell, rows)
        for index in doubt.any(1).nonzero()[:, 0].tolist():
            places = doubt[index].nonzero()[:, 0]
            x = problem_of(values, index)[places].double()
            gain: Tensor | float = step
            if mask is not None:
                part = problem_of(mask, index)
                part = part[places] if len(part) > 1 else part
                gain = (part.double() * step).expand_as(x)
            yield index, places, x, gain

    def finite_rows_in_doubt(
        self, cell: BatchCell, rows: slice, memories: CellMemories, doubt: Tensor | None
    ) -> Tensor | None:
        """The rows in doubt that are finite and have finite memories; None if there are none."""
        if doubt is None:
            return None
        finite = ((take(self.v, cell, rows) - memories.centre) * 0).sum(-1) == 0
        doubt = doubt & finite
        if memories.any_active is not None:
            doubt = doubt & (memories.any_active[..., 0] > 0)
        return doubt if bool(doubt.any()) else None

    def distances(self, cell: BatchCell, values: Tensor, place: Tensor) -> Tensor:
        """|v_n - rho_k|^2 from differences, [cell, n, 1]; `place` has the memory k of each row."""
        rho = take(self.rho, cell).to(self.dtype)
        if len(rho) > 1:
            first = torch.arange(len(rho), dtype=torch.int64, device=rho.device) * self.size
            place = place + first[:, None, None]
        nearest = rho.reshape(-1, self.features).index_select(0, place.flatten())
        difference = values - nearest.view(*place.shape[:2], self.features)
        return difference.square_().sum(-1, keepdim=True)

    def tile(self, cell: BatchCell, rows: int, width: int) -> Tensor:
        """Scratch [problems of the cell, padded rows, width], not initialised."""
        return self.rho.new_empty((cell.size, round_up(rows, ROWS), width), dtype=self.dtype)

    def load(self, cell: BatchCell, rows: slice, memories: CellMemories, x: Tensor) -> Tensor:
        """Fill x with the centred rows of v and padding; return these rows of v."""
        values = take(self.v, cell, rows)
        self.fill(x, values).sub_(memories.centre)
        return values

    def fill(self, x: Tensor, values: Tensor) -> Tensor:
        """Fill x with values and padding; return the part of x without padding."""
        n, d = values.shape[1], self.features
        x[:, n:].zero_()
        x[:, :, d:].zero_()
        return x[:, :n, :d].copy_(values)

    def gain(
        self, cell: BatchCell, rows: slice, memories: CellMemories, step: float
    ) -> Tensor | None:
        """`step * update_mask`, 0 where all memories are masked; None means the number `step`."""
        gain = None if self.mask is None else take(self.mask, cell, rows).to(self.dtype) * step
        if gain is not None and gain.shape[-1] > 1:
            gain = pad(gain, (0, self.padded_features - self.features))
        if memories.any_active is None:
            return gain
        return memories.any_active * (step if gain is None else gain)


def problem_of(part: Tensor, index: int) -> Tensor:
    """The part of one problem, for a result of `take`; problems share a dim of size 1."""
    return part[index if len(part) > 1 else 0]


def mask_union(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """`a | b`; None means that all entries are False."""
    return b if a is None else a if b is None else a | b


def advance(
    x: Tensor, recalled: Tensor, out: Tensor, n: int, step: float, gain: Tensor | None
) -> None:
    """`out = x + gain * (recalled - x)`; gain None means the number `step`. `out` may be x or
    recalled; recalled is overwritten. Rows from n on are padding.
    """
    if gain is None:
        if step != 1:
            torch.lerp(x, recalled, step, out=out)
        elif out is not recalled:
            out.copy_(recalled)
        return
    # the product of the weights and rho does not start from x: the increment would lose digits
    torch.addcmul(x[:, :n], recalled.sub_(x)[:, :n], gain, out=out[:, :n])
