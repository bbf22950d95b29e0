# SPDX-License-Identifier: Apache-2.0
"""The gradients of `swapped_prediction` on a CPU, written by hand: row chunks, in place.

With the symbols of `swapped` and u the gradient of the loss:

    dS'_vik = u h_vi (r_vi exp(S'_vik - lse_vi) - t_vik)
    dz_vi = sum_k dS'_vik c_k / temperature,   dc_k = sum_vi dS'_vik z_vi / temperature
    db_k  = sum_vi dS'_vik / temperature

The targets t are constants. Where a chunk has all prototypes, forward computes these gradients for
u = 1, and backward multiplies them; elsewhere backward computes the scores of each tile again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.problems import part_index
from ..common.score import EXP_FLOOR, exp_
from .sums import RowSums
from .swapped import (
    RowFold,
    SwappedCall,
    SwappedChunk,
    SwappedProblem,
    SwappedState,
    fold_tiles,
    loss_of,
)


class SwappedTotals:
    """The gradients of z, prototypes and bias of one call, summed over the problems that share
    them.
    """

    def __init__(self, call: SwappedCall, needs: Sequence[bool]) -> None:
        self.call, self.needs = call, needs
        self.dtype = dtype = call.dtype
        z, prototypes, bias = call.z, call.prototypes, call.bias
        self.z = torch.zeros_like(z, dtype=dtype).contiguous() if needs[0] else None
        self.prototypes = (
            torch.zeros_like(prototypes, dtype=dtype).contiguous() if needs[1] else None
        )
        self.bias = None
        if needs[4] and bias is not None:
            self.bias = torch.zeros_like(bias, dtype=torch.float64).contiguous()
        self.sums: dict[tuple[int, ...], RowSums] = {}

    @property
    def is_needed(self) -> bool:
        return self.z is not None or self.prototypes is not None or self.bias is not None

    def row_sums(self, at: tuple[int, ...]) -> RowSums | None:
        """The sums for the prototypes of one problem."""
        if self.prototypes is None:
            return None
        index = part_index(self.prototypes, at, 2)
        if index not in self.sums:
            self.sums[index] = RowSums(self.prototypes[index])
        return self.sums[index]

    def finish(self) -> list[Tensor | None]:
        """The gradients of z, prototypes and bias."""
        for sums in self.sums.values():
            sums.result()
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return [self.z, self.prototypes, bias]


class SwappedGradients:
    """The gradients of one problem."""

    def __init__(
        self, one: SwappedProblem, totals: SwappedTotals, at: tuple[int, ...], upstream: Tensor
    ) -> None:
        self.one, self.upstream = one, upstream
        self.z = None if totals.z is None else totals.z[part_index(totals.z, at, 3)]
        bias = totals.bias
        self.bias = None if bias is None else bias[part_index(bias, at, 1)]
        self.sums = totals.row_sums(at)

    def add(
        self,
        chunk: SwappedChunk,
        state: SwappedState,
        gap: Tensor,
        sums: Tensor,
        codes: Tensor,
        tile: slice,
    ) -> None:
        """Add the gradients of one tile. `gap` [rows, V, tile] has the softmax of the scores times
        `sums` [rows, V]. This overwrites `gap` and `codes`.
        """
        one, total = self.one, state.total
        used = (chunk.share != 0) & ~state.bad & (total != 0)
        missing = ~state.mass.isfinite()
        if bool(missing.any()):
            codes.masked_fill_(missing[..., None], 0.0)
        inverse = torch.where(used, sums / total, 0.0)
        # (r / sums) (gap - (sums / r) t), so that r and the sums need no pass over the tile
        gap.baddbmm_(one.pairs * inverse[..., None], codes, alpha=-1)
        if not bool(used.all()):
            gap.masked_fill_(~used[..., None], 0.0)
        factor = torch.where(used, chunk.share * total / sums, 0.0)
        factor = factor * self.upstream / one.temperature
        factor, flat = factor.flatten()[:, None], gap.flatten(0, 1)
        if self.z is not None:
            out = torch.mm(flat, one.student.prototypes[tile]).mul_(factor).view_as(chunk.rows)
            if bool(state.bad.any()):
                out[state.bad] = torch.nan
            self.z[:, chunk.part] += out.transpose(0, 1)
        if self.bias is not None:
            self.bias[tile] += torch.mv(flat.t(), factor[:, 0])
        if self.sums is not None:
            if one.masked is not None:  # a code may have mass there
                flat.masked_fill_(one.masked[tile], 0.0)
            self.sums.add(tile, flat, chunk.rows.flatten(0, 1) * factor)


def one_pass(
    one: SwappedProblem, chunk: SwappedChunk, gradients: SwappedGradients | None
) -> tuple[SwappedState, Tensor]:
    """The state and the losses of a chunk with all prototypes, and its gradients."""
    fold, tile = RowFold(one, chunk), slice(0, one.k)
    scores, codes = one.load(chunk, tile)
    fold.add(scores, codes, tile)
    state, losses = fold.finish(chunk)
    if gradients is not None:
        gradients.add(chunk, state, scores, fold.sums, codes, tile)
    return state, losses


def add_tiles(
    one: SwappedProblem, chunk: SwappedChunk, state: SwappedState, gradients: SwappedGradients
) -> None:
    """Add the gradients of a chunk, tile by tile, from its state."""
    ones = torch.ones_like(state.lse)
    for tile in one.tiles():
        scores, codes = one.load(chunk, tile)
        exp_(scores.sub_(state.lse[..., None]), EXP_FLOOR[scores.dtype])
        gradients.add(chunk, state, scores, ones, codes, tile)


def swapped_prediction_saved(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: float,
    epsilon: float,
    bias: Tensor | None,
    target_z: Tensor | None,
    target_prototypes: Tensor | None,
    target_bias: Tensor | None,
    pairs: Tensor | None,
    weight: Tensor | None,
    precision: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The loss, the log-sum-exps [*, V, B] and the masses [*, A, B] of the rows; and, on a CPU
    where a chunk has all prototypes, the gradients of z, prototypes and bias.
    """
    target = (target_z, target_prototypes, target_bias)
    call = SwappedCall(z, prototypes, f, g, temperature, epsilon, bias, *target, pairs, weight)
    batch, dtype = call.batch, call.dtype
    out = z.new_zeros(batch, dtype=torch.float64)
    lse = z.new_empty((*batch, *z.shape[-3:-1]), dtype=dtype)
    mass = z.new_empty((*batch, *f.shape[-2:]), dtype=dtype)
    is_early = z.is_cpu and call.has_one_tile
    totals = SwappedTotals(call, needs if is_early else [False] * len(needs))
    one_number = torch.ones((), dtype=dtype, device=z.device)
    for at, one in call.problems():
        gradients = SwappedGradients(one, totals, at, one_number) if totals.is_needed else None
        for chunk in one.chunks():
            if gradients is None:
                state, losses = fold_tiles(one, chunk)
            else:
                state, losses = one_pass(one, chunk, gradients)
            out[at] += loss_of(chunk, losses)
            lse[at][:, chunk.part] = state.lse.mT
            mass[at][:, chunk.part] = state.mass.mT
    saved = [z.new_empty(0, dtype=dtype) if x is None else x for x in totals.finish()]
    return out.to(dtype), lse, mass, *saved


def swapped_prediction_backward(
    grad: Tensor,
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: float,
    epsilon: float,
    bias: Tensor | None,
    target_z: Tensor | None,
    target_prototypes: Tensor | None,
    target_bias: Tensor | None,
    pairs: Tensor | None,
    weight: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    saved_z: Tensor,
    saved_prototypes: Tensor,
    saved_bias: Tensor,
    needs: Sequence[bool],
    precision: str | None = None,
) -> tuple[Tensor, ...]:
    """Gradients for z, prototypes and bias; zeros for the other tensors."""
    target = (target_z, target_prototypes, target_bias)
    call = SwappedCall(z, prototypes, f, g, temperature, epsilon, bias, *target, pairs, weight)
    wanted = [needs[0], needs[1], False, False, needs[4], *[False] * 5]
    is_early = z.is_cpu and call.has_one_tile and grad.numel() > 0
    if is_early and bool((grad == grad.reshape(-1)[0]).all()):
        upstream = grad.reshape(-1)[0].to(call.dtype)
        early = ((saved_z, needs[0]), (saved_prototypes, needs[1]), (saved_bias, needs[4]))
        gradients = [x * upstream if need else None for x, need in early]
    else:
        totals = SwappedTotals(call, wanted)
        for at, one in call.problems() if totals.is_needed else ():
            part = SwappedGradients(one, totals, at, grad[at].to(call.dtype))
            for chunk in one.chunks():
                rows = chunk.part
                state = one.state(chunk, lse[at][:, rows].mT, mass[at][:, rows].mT)
                add_tiles(one, chunk, state, part)
        gradients = totals.finish()
    of_z, of_prototypes, of_bias = gradients
    results = []
    slots = (of_z, of_prototypes, None, None, of_bias, *[None] * 5)
    for (x, _), total, need in zip(call.operands, slots, needs, strict=True):
        if not need or x is None:
            results.append(z.new_empty(0))
        elif total is None:
            results.append(torch.zeros_like(x, memory_format=torch.contiguous_format))
        else:
            results.append(total.to(x.dtype))
    return tuple(results)
