# SPDX-License-Identifier: Apache-2.0
"""Deep embedded clustering on a CPU: row chunks, in place, never N x K."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kmeans
from ..common.chunk import row_chunks
from ..common.problems import problems
from ..common.score import compute_dtype
from .distances import GROUP, Distances
from .equations import Alpha, batch_of, is_regular
from .shares import (
    LogCounts,
    Ratios,
    TargetTile,
    divergence,
    exact_alpha,
    largest_scores,
    log_counts_of,
    ratios_of,
    target_of,
)


def filled(x: Tensor | None, part: slice, width: int, like: Tensor) -> Tensor:
    """Some entries of a vector as a float64 line [width], 0 beyond them; ones for None."""
    line = like.new_zeros(width, dtype=torch.float64)
    line[: part.stop - part.start] = 1.0 if x is None else x[part]
    return line


def soft_counts(
    z: Tensor, mu: Tensor, alpha: float, weight: Tensor | None, lse: Tensor | None = None
) -> tuple[Tensor, int]:
    """`f_j = sum_i w_i q_ij`, [K], and the number of rows that are not finite. The sums are float64
    sums of GROUP rows, added one after the other, so that rows of weight 0 at the end change no
    bit. `lse` [N] receives the log-sum-exp of each row.
    """
    d, bad = Distances(z, mu, alpha), 0
    total = d.mu.new_zeros(d.size)
    for part in row_chunks(len(d.rows), d.limit):
        r = ratios_of(d, d.load(part)).r
        n, width = part.stop - part.start, r.shape[1]
        sums = r.sum(0)
        share = filled(weight, part, width, total)
        if d.irregular is not None:
            share[d.irregular], bad = 0.0, bad + int(d.irregular.sum())
        r.mul_(share / sums)
        groups = r.view(d.size, -1, GROUP).sum(2)  # [K, groups]
        total = torch.cat([total[:, None], groups], 1).cumsum(1)[:, -1]
        if lse is not None:
            line = sums.log_().add_(largest_scores(d))
            if d.irregular is not None:
                line[d.irregular] = torch.nan
            lse[part] = line[:n]
    return (total.fill_(torch.nan) if d.is_void else total), bad


def student_t_stats_forward(
    z: Tensor,
    mu: Tensor,
    alpha: Alpha = 1.0,
    weight: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`student_t_stats` in row chunks."""
    operands = ((z, 2), (mu, 2), (alpha if isinstance(alpha, Tensor) else None, 1), (weight, 1))
    batch, rows, dtype = batch_of(*operands), z.shape[-2], compute_dtype(z.dtype)
    lse = z.new_empty((*batch, rows), dtype=dtype)
    counts = z.new_empty((*batch, mu.shape[-2]), dtype=torch.float64)
    nearest, _ = kmeans.kmeans_assign_forward(z, mu, None, None, False)
    labels = torch.empty_like(lse, dtype=torch.int64).copy_(nearest)
    bad = z.new_empty(batch, dtype=torch.int64)
    for at, (rows_of, centroids, freedom, share) in problems(batch, *operands):
        number = exact_alpha(alpha if freedom is None else freedom)
        counts[at], bad[at] = soft_counts(rows_of, centroids, number, share, lse[at])
        if math.isnan(number) or not bool(centroids.isfinite().all()):
            lse[at], labels[at] = torch.nan, -1
    return lse, labels, counts, bad


class LossChunk(NamedTuple):
    """A chunk of rows of one problem: its distances, its assignments and its target."""

    part: slice  # the rows
    now: Distances  # of z, loaded
    ratios: Ratios  # of z
    total: Tensor  # [rows], the sum of the ratios
    target: TargetTile
    irregular: Tensor | None  # [rows], which rows of z or of the target are not finite


class LossCall:
    """The problems of a call of `dec_losses`, in chunks."""

    def __init__(
        self,
        z: Tensor,
        mu: Tensor,
        alpha: Alpha,
        weight: Tensor | None,
        log_counts: Tensor | None,
        z0: Tensor | None,
        mu0: Tensor | None,
        alpha0: float,
        log_norm: Tensor | None,
        p: Tensor | None,
    ) -> None:
        freedom = alpha if isinstance(alpha, Tensor) else None
        first = ((z, 2), (mu, 2), (freedom, 1), (weight, 1), (log_counts, 1))
        self.operands = (*first, (z0, 2), (mu0, 2), (log_norm, 1), (p, 2))
        self.alpha, self.alpha0 = alpha, alpha0
        self.batch = batch_of(*self.operands)
        self.rows, self.size, self.dtype = z.shape[-2], mu.shape[-2], compute_dtype(z.dtype)
        self.z = z

    def problems(self) -> Iterator[tuple[tuple[int, ...], LossProblem]]:
        """Each problem, by index."""
        for at, tensors in problems(self.batch, *self.operands):
            yield at, LossProblem(self, tensors)


class LossProblem:
    """One problem: its rows, and the source of its target."""

    def __init__(self, call: LossCall, tensors: list[Tensor]) -> None:
        z, mu, freedom, weight, log_counts, z0, mu0, self.log_norm, self.p = tensors
        alpha = exact_alpha(call.alpha if freedom is None else freedom)
        # reciprocals are safe in float32; logarithms and exponentials of other alphas are float64
        is_plain = alpha == 1.0 and (z0 is None or call.alpha0 == 1.0)
        dtype = call.dtype if is_plain else torch.float64
        self.now = Distances(z, mu, alpha, dtype)
        self.inputs = [x for x in (z, z0 if self.p is None else self.p) if x is not None]
        self.then: Distances | None = None
        self.counts: LogCounts | None = None
        self.is_void = self.now.is_void
        if self.p is not None or self.is_void or call.size == 1:
            return
        if z0 is not None:
            self.then = Distances(z0, mu0, call.alpha0, dtype)
            self.is_void = self.then.is_void
        if log_counts is None:
            log_counts = log_counts_of(soft_counts(z, mu, alpha, weight)[0])
        self.counts = LogCounts(log_counts, dtype)

    def regular(self) -> Tensor:
        """Which rows are finite, with their target, [N]."""
        return torch.stack(torch.broadcast_tensors(*map(is_regular, self.inputs))).all(0)

    def chunks(self) -> Iterator[LossChunk]:
        """Each chunk of rows with its assignments and its target."""
        for part in row_chunks(len(self.now.rows), self.now.limit):
            target, irregular = self._frozen(part)
            ratios = ratios_of(self.now, self.now.load(part))
            if target is None and self.counts is not None:
                target = target_of(self.now, ratios, self.counts, None)
            other = self.now.irregular
            if other is not None:
                irregular = other if irregular is None else irregular | other
            assert target is not None
            yield LossChunk(part, self.now, ratios, ratios.r.sum(0), target, irregular)

    def _frozen(self, part: slice) -> tuple[TargetTile | None, Tensor | None]:
        """(target of some rows, their irregular rows); the target is None if it follows from z."""
        n, then, counts = part.stop - part.start, self.then, self.counts
        if self.p is not None:
            p = self.now.narrow.new_zeros(self.now.size, -(-n // GROUP) * GROUP)  # [K, rows]
            p[:, :n] = (self.p if len(self.p) == 1 else self.p[part]).mT
            if self.log_norm is not None:
                p[:, :n] /= self.log_norm[part].to(p.dtype).exp()
            total = p.sum(0)
            if bool(total.isfinite().all()):
                return TargetTile(p, None, total), None
            irregular = ~p.isfinite().all(0)
            p = torch.where(irregular, 0.0, p)
            return TargetTile(p, None, p.sum(0)), irregular
        if then is None or counts is None:
            return None, None
        ratios = ratios_of(then, then.load(part))
        norm = self.log_norm
        if norm is not None:
            norm = filled(norm, part, ratios.r.shape[1], norm)
            if then.irregular is not None:
                norm[then.irregular] = 0.0
        return target_of(then, ratios, counts, norm), then.irregular


def dec_losses_forward(
    z: Tensor,
    mu: Tensor,
    alpha: Alpha = 1.0,
    weight: Tensor | None = None,
    log_counts: Tensor | None = None,
    z0: Tensor | None = None,
    mu0: Tensor | None = None,
    alpha0: float = 1.0,
    log_norm: Tensor | None = None,
    p: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`dec_losses` in row chunks."""
    call = LossCall(z, mu, alpha, weight, log_counts, z0, mu0, alpha0, log_norm, p)
    out = z.new_empty((*call.batch, call.rows), dtype=call.dtype)
    for at, one in call.problems():
        if one.is_void:
            out[at] = torch.nan
        elif call.size == 1:
            out[at] = torch.where(one.regular(), 0.0, torch.nan).to(out.dtype)
        else:
            for chunk in one.chunks():
                losses = divergence(chunk.ratios, chunk.total, chunk.target)
                if chunk.irregular is not None:
                    losses[chunk.irregular] = torch.nan
                out[at][chunk.part] = losses[: chunk.part.stop - chunk.part.start]
    return out
