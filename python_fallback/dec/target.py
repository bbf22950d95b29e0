# SPDX-License-Identifier: Apache-2.0
"""The numbers that a frozen target stores for each row, in row chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.chunk import row_chunks
from ..common.problems import problems
from ..common.score import compute_dtype
from .distances import Distances
from .equations import batch_of
from .forward import filled
from .shares import LogCounts, Ratios, norms_of, ratios_of, target_of


def _chunks(
    z: Tensor, mu: Tensor, alpha: float, log_counts: Tensor
) -> Iterator[tuple[tuple[int, ...], slice, Distances, Ratios, LogCounts]]:
    """Each chunk of rows of each problem: index, rows, distances, ratios, log counts."""
    batch = batch_of((z, 2), (mu, 2), (log_counts, 1))
    for at, (rows, centroids, logs) in problems(batch, (z, 2), (mu, 2), (log_counts, 1)):
        dtype = compute_dtype(z.dtype) if alpha == 1.0 else torch.float64
        d, counts = Distances(rows, centroids, alpha, dtype), LogCounts(logs, dtype)
        for part in row_chunks(len(rows), d.limit):
            yield at, part, d, ratios_of(d, d.load(part)), counts


def target_norms(z: Tensor, mu: Tensor, alpha: float, log_counts: Tensor) -> Tensor:
    """`R_i = logsumexp_j(2 s_ij - log f_j)`, [..., N] in the compute dtype; NaN for a row that is
    not finite.
    """
    batch = batch_of((z, 2), (mu, 2), (log_counts, 1))
    out = z.new_empty((*batch, z.shape[-2]), dtype=compute_dtype(z.dtype))
    for at, part, d, ratios, counts in _chunks(z, mu, alpha, log_counts):
        norms = norms_of(d, ratios, counts)
        if d.irregular is not None:
            norms[d.irregular] = torch.nan
        out[at][part] = torch.nan if d.is_void else norms[: part.stop - part.start].to(out.dtype)
    return out


def target_shares(
    z: Tensor,
    mu: Tensor,
    alpha: float,
    log_counts: Tensor,
    dtype: torch.dtype | None = None,
    log_norm: Tensor | None = None,
) -> Tensor:
    """`p_ij = exp(2 s_ij - log f_j - R_i)`, [..., N, K] in a dtype, else the compute dtype; with
    log_norm for R if it is there, else so that each row sums to 1.
    """
    batch = batch_of((z, 2), (mu, 2), (log_counts, 1))
    norms = None if log_norm is None else log_norm.expand(*batch, z.shape[-2])
    shape = (*batch, z.shape[-2], mu.shape[-2])
    out = z.new_empty(shape, dtype=dtype or compute_dtype(z.dtype))
    for at, part, d, ratios, counts in _chunks(z, mu, alpha, log_counts):
        norm = None
        if norms is not None:
            norm = filled(norms[at], part, ratios.r.shape[1], norms)
            norm = norm if d.irregular is None else norm.masked_fill(d.irregular, 0.0)
        p = target_of(d, ratios, counts, norm).p
        if d.irregular is not None:
            p[:, d.irregular] = torch.nan
        n = part.stop - part.start
        out[at][part] = torch.nan if d.is_void else p[:, :n].mT.to(out.dtype)
    return out
