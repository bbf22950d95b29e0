# SPDX-License-Identifier: Apache-2.0
"""`proto_nce_losses` on a CPU, with gradients written by hand: row chunks, in place, never N x K.

With c'_j = c_j / phi_j, p_ij = exp(s_ij - lse_i) over the prototypes of one clustering, g_i the
gradient of the loss of row i, and w_ij = g_i (p_ij - [j = label_i]):

    dz_i   = sum_j w_ij c'_j                 dc_j = (1 / phi_j) sum_i w_ij z_i
    dphi_j = -<dc_j, c_j> / phi_j            db_j = sum_i w_ij
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.chunk import chunk_rows, row_chunks
from ..common.problems import part_index, problems
from ..common.score import compute_dtype, softmax_
from .equations import Number, batch_of, is_regular
from .sums import RowSums

# Scores of a row that differ by more than this may underflow in its softmax.
SPREAD = 60.0


class NceCall(NamedTuple):
    """The arguments of `proto_nce_losses`."""

    z: Tensor  # [*, N, D]
    prototypes: Tensor  # [*, Kt, D]
    phi: Number  # a number, [], [*, 1] or [*, Kt]
    labels: Tensor  # [*, M, N]
    bias: Tensor | None  # [*, Kt]
    offsets: Sequence[int] | None

    @property
    def segments(self) -> list[slice]:
        """The prototypes of each clustering."""
        ends = self.offsets or (0, self.prototypes.shape[-2])
        return [slice(a, b) for a, b in pairwise(ends)]

    @property
    def operands(self) -> tuple[tuple[Tensor | None, int], ...]:
        """The tensors, each with its dims in one problem."""
        phi = self.phi if isinstance(self.phi, Tensor) else None
        return (self.z, 2), (self.prototypes, 2), (phi, 1), (self.labels, 2), (self.bias, 1)

    @property
    def batch(self) -> torch.Size:
        return batch_of(*self.operands)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.z.dtype)

    def totals(self, needs: Sequence[bool], clusterings: int) -> list[Tensor | None]:
        """Zeros for the gradients of z [*, clusterings, N, D], the prototypes, phi [*, Kt] and the
        bias; None where there is no need.
        """
        k = self.prototypes.shape[-2]
        shapes: list[list[int] | None] = [
            [*self.z.shape[:-2], clusterings, *self.z.shape[-2:]],
            [*self.prototypes.shape],
            [*self.phi.shape[:-1], k] if isinstance(self.phi, Tensor) else None,
            None if self.bias is None else [*self.bias.shape],
        ]
        wanted = (needs[0], needs[1], needs[2], needs[4])
        return [
            self.z.new_zeros(shape, dtype=self.dtype) if need and shape is not None else None
            for need, shape in zip(wanted, shapes, strict=True)
        ]


class NceChunk(NamedTuple):
    """Some rows, for one clustering."""

    m: int  # the clustering
    part: slice  # the rows
    rows: Tensor  # [rows, D]; a row that is not finite is 0
    shares: Tensor  # [rows, K], the softmax
    label: Tensor  # [rows], 0 for an ignored row
    ignored: Tensor  # [rows]
    irregular: Tensor  # [rows], which rows are not finite and not ignored


class NceProblem:
    """One problem: its rows, its prototypes divided by phi, and its labels."""

    def __init__(self, call: NceCall, tensors: list[Tensor]) -> None:
        self.z, self.prototypes, phi, self.labels, self.bias = tensors
        dtype, k = call.dtype, len(self.prototypes)
        self.phi = torch.full((k,), call.phi, dtype=dtype, device=self.z.device) \
            if phi is None else phi.to(dtype).expand(k)  # fmt: skip
        self.scaled = self.prototypes.to(dtype) / self.phi[:, None]  # [Kt, D]
        if self.bias is not None:
            self.bias = self.bias.to(dtype)
            self.scaled.masked_fill_((self.bias == -torch.inf)[:, None], 0.0)
        self.segments = call.segments
        self.widest = max(part.stop - part.start for part in self.segments)
        self.reach = float(torch.linalg.vector_norm(self.scaled, dim=1).amax())

    def chunks(self, losses: Tensor | None) -> Iterator[NceChunk]:
        """Each chunk of rows for each clustering; `losses` [M, N] receives the losses."""
        n, dtype = len(self.z), self.scaled.dtype
        limit = min(chunk_rows(self.widest, self.widest), max(n, 1))
        scratch = self.scaled.new_empty(limit * self.widest)
        for part in row_chunks(n, limit):
            rows = self.z[part].to(dtype)
            irregular = ~is_regular(rows)
            if bool(irregular.any()):
                rows = rows.masked_fill(irregular[:, None], 0.0)
            farthest = float(torch.linalg.vector_norm(rows, dim=1).amax())
            underflows = 2 * farthest * self.reach > SPREAD
            for m, columns in enumerate(self.segments):
                scores = scratch[: len(rows) * (columns.stop - columns.start)].view(len(rows), -1)
                label = self.labels[m, part]
                ignored = label < 0
                chunk = NceChunk(
                    m, part, rows, scores, label.clamp(min=0), ignored, irregular & ~ignored
                )
                loss = self._fill(chunk, columns, underflows)
                if losses is not None:
                    losses[m, part] = loss
                yield chunk

    def _fill(self, chunk: NceChunk, columns: slice, underflows: bool) -> Tensor:
        """Compute the shares of a chunk; return the losses, [rows]."""
        scores, factor = chunk.shares, self.scaled[columns].t()
        if self.bias is None:
            torch.mm(chunk.rows, factor, out=scores)
        else:
            torch.addmm(self.bias[columns], chunk.rows, factor, out=scores)
        top = scores.amax(1)
        positive = scores.gather(1, chunk.label[:, None])[:, 0]
        softmax_(scores, underflows)
        # the largest share is at least 1 / K, and never underflows
        loss = top - scores.amax(1).log() - positive
        loss = loss.masked_fill(chunk.ignored, 0.0)
        return loss.masked_fill(chunk.irregular, torch.nan)


class NceGradients:
    """The gradients of one problem, chunk after chunk; `is_alone` says that no other problem has
    its prototypes.
    """

    def __init__(
        self,
        one: NceProblem,
        at: tuple[int, ...],
        totals: list[Tensor | None],
        grad: Tensor | None,
        is_alone: bool,
    ) -> None:
        cores = (3, 2, 1, 1)
        self.z, self.prototypes, self.phi, self.bias = (
            None if total is None else total[part_index(total, at, core)]
            for total, core in zip(totals, cores, strict=True)
        )
        self.one, self.grad = one, grad
        self.is_needed = any(total is not None for total in totals)
        self.products: RowSums | None = None
        if self.prototypes is not None and is_alone:
            self.products = RowSums(self.prototypes)
        elif self.prototypes is not None or self.phi is not None:
            self.products = RowSums(torch.zeros_like(one.scaled))
        self.masses = one.scaled.new_zeros(len(one.scaled), dtype=torch.float64)

    def add(self, chunk: NceChunk) -> None:
        """Add the gradients of one chunk; this overwrites its shares."""
        if not self.is_needed:
            return
        one, (m, part, rows, gap, label, ignored, irregular) = self.one, chunk
        columns = one.segments[m]
        gap.scatter_add_(1, label[:, None], gap.new_full((1, 1), -1.0).expand(len(rows), 1))
        unused = ignored | irregular
        if bool(unused.any()):
            gap.masked_fill_(unused[:, None], 0.0)
        factor = None if self.grad is None else self.grad[m, part].to(gap.dtype)[:, None]
        if self.z is not None:
            out = torch.mm(gap, one.scaled[columns])
            out = out if factor is None else out.mul_(factor)
            if bool(irregular.any()):
                out[irregular] = torch.nan
            target = self.z[min(m, len(self.z) - 1), part]
            target += out
        if factor is not None:
            rows = rows * factor
        if self.products is not None:
            self.products.add(columns, gap, rows)
        if self.bias is not None:
            ones = gap.new_ones(len(rows)) if factor is None else factor[:, 0]
            self.masses[columns] += torch.mv(gap.t(), ones)

    def finish(self) -> None:
        """Add the gradients of the prototypes, of phi and of the bias to the totals."""
        one = self.one
        if self.products is not None:
            slope = self.products.result().div_(one.phi[:, None])  # [Kt, D], dc
            if self.phi is not None:
                fixed = one.prototypes.to(slope.dtype)
                if one.bias is not None:
                    fixed = fixed.masked_fill((one.bias == -torch.inf)[:, None], 0.0)
                self.phi -= torch.linalg.vecdot(slope, fixed).div_(one.phi)
            if self.prototypes is not None and slope is not self.prototypes:
                self.prototypes += slope
        if self.bias is not None:
            self.bias += self.masses.to(self.bias.dtype)


def _add_up(
    call: NceCall, losses: Tensor | None, totals: list[Tensor | None], grad: Tensor | None
) -> None:
    """Fill `losses` [*, M, N] and add the gradients to `totals`, for the upstream gradient `grad`
    [*, M, N] or ones.
    """
    is_alone = call.prototypes.shape[:-2].numel() == call.batch.numel()
    for at, tensors in problems(call.batch, *call.operands):
        one = NceProblem(call, tensors)
        upstream = None if grad is None else grad[at]
        gradients = NceGradients(one, at, totals, upstream, is_alone)
        for chunk in one.chunks(None if losses is None else losses[at]):
            gradients.add(chunk)
        gradients.finish()


def _new_losses(call: NceCall) -> Tensor:
    shape = [*call.batch, len(call.segments), call.z.shape[-2]]
    return call.z.new_empty(shape, dtype=call.dtype)


def proto_nce_losses_forward(
    z: Tensor,
    prototypes: Tensor,
    phi: Number,
    labels: Tensor,
    bias: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    precision: str | None = None,
) -> Tensor:
    """`proto_nce_losses` in row chunks."""
    call = NceCall(z, prototypes, phi, labels, bias, offsets)
    losses = _new_losses(call)
    _add_up(call, losses, [None] * 4, None)
    return losses


def proto_nce_losses_saved(
    z: Tensor,
    prototypes: Tensor,
    phi: Number,
    labels: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int] | None,
    precision: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The losses, and on a CPU the gradients for an upstream gradient of ones: of z for each
    clustering, of the prototypes, of phi for each prototype, of the bias.
    """
    call = NceCall(z, prototypes, phi, labels, bias, offsets)
    losses = _new_losses(call)
    wanted = needs if z.is_cpu else [False] * len(needs)
    totals = call.totals(wanted, len(call.segments))
    _add_up(call, losses, totals, None)
    empty = (z.new_empty(0, dtype=call.dtype) for _ in totals)
    return losses, *(e if t is None else t for t, e in zip(totals, empty, strict=True))


def proto_nce_losses_backward(
    grad: Tensor,
    z: Tensor,
    prototypes: Tensor,
    phi: Number,
    labels: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int] | None,
    saved_z: Tensor,
    saved_prototypes: Tensor,
    saved_phi: Tensor,
    saved_bias: Tensor,
    needs: Sequence[bool],
    precision: str | None = None,
) -> tuple[Tensor, ...]:
    """Gradients for z, prototypes, phi, labels (zeros) and bias: those of forward times the
    upstream gradient if it is one number for each clustering, else computed again (not those of z,
    which are a product in any case).
    """
    call = NceCall(z, prototypes, phi, labels, bias, offsets)
    factors = _factors(grad) if z.is_cpu and grad.numel() else None
    if factors is None:
        # the gradient of a row has one upstream number for each clustering, unless problems share z
        is_scaled = needs[0] and z.is_cpu and z.shape[:-2].numel() == call.batch.numel()
        totals = call.totals([needs[0] and not is_scaled, *needs[1:]], 1)
        if any(total is not None for total in totals):
            _add_up(call, None, totals, grad)
        if is_scaled:
            weights = grad.to(call.dtype).reshape(*saved_z.shape[:-1], 1)  # [*, M, N, 1]
            totals[0] = (saved_z * weights).sum(-3, keepdim=True)
        return _results(call, needs, totals)
    factors = factors.to(call.dtype)  # [M]
    sizes = [part.stop - part.start for part in call.segments]
    columns = torch.cat([f.expand(n) for f, n in zip(factors, sizes, strict=True)])  # [Kt]
    if len(factors) == 1:
        of_z = saved_z * factors
    elif needs[0]:
        of_z = torch.tensordot(factors, saved_z, dims=([0], [z.ndim - 2])).unsqueeze(-3)
    else:
        of_z = saved_z
    scaled = [
        of_z if needs[0] else None,
        saved_prototypes * columns[:, None] if needs[1] else None,
        saved_phi * columns if needs[2] else None,
        saved_bias * columns if needs[4] else None,
    ]
    return _results(call, needs, scaled)


def _factors(grad: Tensor) -> Tensor | None:
    """The upstream gradient of each clustering, [M]; None if it differs between rows or
    problems.
    """
    first = grad.reshape(-1, *grad.shape[-2:])[0, :, 0]
    return first if bool((grad == first[:, None]).all()) else None


def _results(
    call: NceCall, needs: Sequence[bool], totals: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """One gradient for each tensor argument, from totals that have one clustering."""
    of_z, of_prototypes, of_phi, of_bias = totals
    results = []
    gradients = (of_z, of_prototypes, of_phi, None, of_bias)
    for (x, _), total, need in zip(call.operands, gradients, needs, strict=True):
        if not need or x is None:
            results.append(call.z.new_empty(0))
        elif total is None:
            results.append(torch.zeros_like(x, memory_format=torch.contiguous_format))
        else:
            reduced = total.squeeze(-3) if total is of_z else _reduced(total, x)
            results.append(reduced.to(x.dtype))
    return tuple(results)


def _reduced(total: Tensor, x: Tensor) -> Tensor:
    """A gradient per prototype as the gradient of `x`, which may have one value for all."""
    if total.shape == x.shape:
        return total
    result = total.double().sum(-1, keepdim=x.ndim > 0)
    return result.reshape(x.shape)
