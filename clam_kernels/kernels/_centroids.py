# SPDX-License-Identifier: Apache-2.0
"""The centroids of a call, prepared for its sweep: less an origin near them, and their norms."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._operands import arrange, batch_of
from ._score import load_rows
from ._sweep import offset

# Centroids that an origin is the mean of, at most twice as many: it only has to be near them.
SAMPLE = 1024
PROTOS = 64


class Centroids(NamedTuple):
    """Tables of every problem of the batch of (centroids, shift, mask)."""

    given: Tensor  # [*own batch, K, D], dense rows
    table: Tensor  # [*batch, K, stride] float32, less the origin; 0 where dead
    side: Tensor  # [*batch, 3, K]: 1; -|c|^2 / 2, -inf where dead; |c|, -1 where dead
    origin: Tensor  # [*batch, D] float32
    reach: Tensor  # [*batch, 1]: the largest |c|, -1 where all are dead


@triton.jit(do_not_specialize=["count", "inner", "every"])
def origin_kernel(
    C, GONE, ORIGIN, count, inner, every, c_o, c_i, gone_o, gone_i, gone_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Mean over `every`-th centroid, DIM features a program; 0 where it overflows."""
    problem, d0 = tl.program_id(0), tl.program_id(1) * DIM
    C += offset(problem, inner, c_o, c_i)
    GONE += offset(problem, inner, gone_o, gone_i)
    total, met = tl.zeros((DIM,), tl.float32), tl.zeros((DIM,), tl.float32)
    for k0 in range(0, count, PROTOS * every):
        k = (k0 + tl.arange(0, PROTOS) * every).to(tl.int64)
        live = k < count
        if MASK:
            live = live & (tl.load(GONE + k * gone_k, mask=live, other=1) == 0)
        c = load_rows(C, k, live, d0, D, D, DIM)
        real = live[:, None] & (c * 0.0 == 0.0)
        total += tl.sum(tl.where(real, c, 0.0), 0)
        met += tl.sum(real.to(tl.float32), 0)
    mean = total / tl.maximum(met, 1.0)
    d = d0 + tl.arange(0, DIM)
    at = ORIGIN + problem.to(tl.int64) * D + d
    tl.store(at, tl.where(mean * 0.0 == 0.0, mean, 0.0), mask=d < D)


@triton.jit(do_not_specialize=["count", "inner", "blocks"])
def centroids_kernel(
    C, GONE, ORIGIN, TABLE, SIDE, count, inner, blocks, c_o, c_i, gone_o, gone_i, gone_k,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Table and side of PROTOS centroids."""
    pid = tl.program_id(0)
    problem, k = pid // blocks, (pid % blocks) * PROTOS + tl.arange(0, PROTOS)
    C += offset(problem, inner, c_o, c_i)
    GONE += offset(problem, inner, gone_o, gone_i)
    ORIGIN += problem.to(tl.int64) * D
    TABLE += problem.to(tl.int64) * count * STRIDE
    SIDE += problem.to(tl.int64) * 3 * count
    live, at = k < count, k.to(tl.int64)
    poison = tl.zeros((PROTOS,), tl.float32)
    for d0 in range(0, D, DIM):
        poison += tl.sum(load_rows(C, at, live, d0, D, D, DIM) * 0.0, 1)
    alive = live & (poison == 0.0)
    if MASK:
        alive = alive & (tl.load(GONE + at * gone_k, mask=live, other=1) == 0)
    norm = tl.zeros((PROTOS,), tl.float64)
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        origin = tl.load(ORIGIN + d, mask=d < D, other=0.0)[None, :]
        given = load_rows(C, at, alive, d0, D, D, DIM)
        gap = tl.where(alive[:, None], given.to(tl.float64) - origin.to(tl.float64), 0.0)
        norm += tl.sum(gap * gap, 1)
        where = TABLE + at[:, None] * STRIDE + d[None, :]
        tl.store(where, gap.to(tl.float32), mask=live[:, None] & (d < STRIDE)[None, :])
    half = tl.where(alive, -0.5 * norm, float("-inf"))
    tl.store(SIDE + k, tl.full((PROTOS,), 1.0, tl.float32), mask=live)
    tl.store(SIDE + count + k, half.to(tl.float32), mask=live)
    tl.store(SIDE + 2 * count + k, tl.where(alive, tl.sqrt(norm), -1.0).to(tl.float32), mask=live)


def centroids(given: Tensor, shift: Tensor | None, mask: Tensor | None) -> Centroids:
    """Prepare them: a launch for the origin unless the shift is it, one for the tables."""
    given = _launch.rows(given)
    count, d = given.shape[-2:]
    gone = given if mask is None else mask.view(torch.uint8)
    operands = [(given, 2)]
    operands += [] if shift is None else [(shift, 1)]
    operands += [] if mask is None else [(gone, 1)]
    batch = batch_of(operands)
    stride = -(-d // 4) * 4
    table, side = (
        _launch.empty((*batch, *core), torch.float32, given.device)
        for core in ((count, stride), (3, count))
    )
    c, gone = arrange(batch, [(given, 2), (gone, 2 if mask is None else 1)])
    inner, problems = c.shape[1], c.shape[0] * c.shape[1]
    gone_k = gone.stride(2) if mask is not None else 0
    lost = (*gone.stride()[:2], gone_k)
    options = {"MASK": mask is not None, "PROTOS": PROTOS, "num_warps": 4, "num_stages": 1}
    options |= {"D": d, "DIM": min(32, _launch.dim(d)), "maxnreg": 255}
    if shift is None:
        origin = _launch.empty((*batch, d), torch.float32, given.device)
        grid = (problems, triton.cdiv(d, options["DIM"]))
        every = max(1, count // SAMPLE)
        _launch.launch(
            origin_kernel, grid, given.device, c, gone, origin, count, inner, every,
            *c.stride()[:2], *lost, **options,
        )  # fmt: skip
    else:
        origin = torch.nan_to_num(shift.float(), 0.0, 0.0, 0.0).expand(*batch, d).contiguous()
    blocks = triton.cdiv(count, PROTOS)
    _launch.launch(
        centroids_kernel, (problems * blocks,), given.device, c, gone, origin, table, side,
        count, inner, blocks, *c.stride()[:2], *lost, **options, STRIDE=stride,
    )  # fmt: skip
    return Centroids(given, table, side, origin, side[..., 2, :].amax(-1, True))
