# SPDX-License-Identifier: Apache-2.0
"""The memories' side of a call, prepared by one launch: centred rows and what their logits need."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.halves import halves, power, reach_of
from ..common.operands import arrange, batch_of, in_rows
from ..common.score import load_rows
from ..common.sweep import NUMBERS, offset
from .doubt import MOST

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
# Memories of one program, and what tables of halves are filled up to.
PROTOS = 64
# The centre is a median of at most so many memories, of a tile of the next power of two.
SAMPLE = tl.constexpr(31)
SAMPLE_TILE = tl.constexpr(32)


class Memories(NamedTuple):
    """Tables of every problem of the memories' batch; rows of `stride` floats."""

    table: Tensor  # [*batch, K, stride] float32, less the centre; 0 where log_weight is -inf
    side: Tensor  # [*batch, 4, K]: scale, bias (base 2), log_weights (base 2), |rho|^2
    centre: Tensor  # [*batch, stride]; see `store_centre`
    beta: Tensor | float
    log_weights: Tensor | None

    @property
    def stride(self) -> int:
        return self.table.shape[-1]

    @property
    def size(self) -> int:
        return self.table.shape[-2]

    @property
    def per_memory(self) -> bool:
        return isinstance(self.beta, Tensor) and self.beta.ndim > 0 and self.beta.shape[-1] > 1

    @property
    def hard(self) -> bool:
        return not isinstance(self.beta, Tensor) and self.beta == float("inf")


@triton.jit
def lifts_of(WEIGHTS, k, live, weights_k, HAS_WEIGHTS: tl.constexpr):
    """(log-weights of memories, whether each takes part)."""
    lift = tl.zeros((k.shape[0],), tl.float32)
    if HAS_WEIGHTS:
        lift = tl.load(WEIGHTS + k.to(tl.int64) * weights_k, mask=live, other=0.0).to(tl.float32)
    return lift, live & (lift != float("-inf"))


@triton.jit
def sample_of(WEIGHTS, count, weights_k, HAS_WEIGHTS: tl.constexpr):
    """(the memories of the sample, which take part, how many do)."""
    i = tl.arange(0, SAMPLE_TILE)
    size = tl.minimum(count, SAMPLE)
    k = i.to(tl.int64) * count // size
    alive = lifts_of(WEIGHTS, k, i < size, weights_k, HAS_WEIGHTS)[1]
    return k, alive, tl.sum(alive.to(tl.int32), 0)


@triton.jit
def sampled_median(
    RHO, WEIGHTS, count, d0, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The lower median of features [d0, d0 + DIM) over the sample; 0 where none takes part."""
    k, alive, met = sample_of(WEIGHTS, count, weights_k, HAS_WEIGHTS)
    i = tl.arange(0, SAMPLE_TILE)
    mine = load_rows(RHO, k, alive, d0, D, D, DIM)
    mine = tl.where(alive[:, None], mine, float("inf"))
    rank = tl.zeros((SAMPLE_TILE, DIM), tl.int32)
    size = tl.minimum(count, SAMPLE)
    for j in range(0, size):
        other = tl.zeros((1,), tl.int64) + tl.cast(j, tl.int64) * count // size
        takes = lifts_of(WEIGHTS, other, other >= 0, weights_k, HAS_WEIGHTS)[1]
        theirs = load_rows(RHO, other, takes, d0, D, D, DIM)
        theirs = tl.where(takes[:, None], theirs, float("inf"))
        before = (theirs < mine) | ((theirs == mine) & (j < i)[:, None])
        rank += before.to(tl.int32)
    middle = alive[:, None] & (rank == (met - 1) // 2)
    return tl.sum(tl.where(middle, mine, 0.0), 0)


@triton.jit
def from_centre(RHO, CENTRE, k, alive, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of memories less what CENTRE has, in float64; 0 where dead."""
    d = d0 + tl.arange(0, DIM)
    c = tl.load(CENTRE + d, mask=d < D, other=0.0).to(tl.float64)
    row = load_rows(RHO, k, alive, d0, D, D, DIM).to(tl.float64)
    return tl.where(alive[:, None], row - c[None, :], 0.0)


@triton.jit
def reach_of_centre(
    RHO, WEIGHTS, CENTRE, count, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Memories count for the centre up to this squared distance from the median: 16 times the
    median of the distances. All do where none of the sample takes part.
    """
    k, alive, met = sample_of(WEIGHTS, count, weights_k, HAS_WEIGHTS)
    i = tl.arange(0, SAMPLE_TILE)
    far = tl.zeros((SAMPLE_TILE,), tl.float64)
    for d0 in range(0, D, DIM):
        gap = from_centre(RHO, CENTRE, k, alive, d0, D, DIM)
        far += tl.sum(gap * gap, 1)
    far = tl.minimum(tl.where(alive, far, float("inf")), MOST).to(tl.float32)
    behind = far[None, :] < far[:, None]
    behind = (behind | ((far[None, :] == far[:, None]) & (i[None, :] < i[:, None]))) & alive[
        None, :
    ]
    rank = tl.sum(behind.to(tl.int32), 1)
    middle = alive & (rank == (met - 1) // 2)
    reach = tl.minimum(16.0 * tl.sum(tl.where(middle, far, 0.0), 0), MOST)
    return tl.where(met > 0, reach, MOST)


@triton.jit
def store_centre(
    RHO, WEIGHTS, FAR, CENTRE, count, poison, weights_k,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The centre: the mean of the memories that are not far from their median, so that a few far
    ones cannot move it. What is not finite beside the memories poisons it. FAR is scratch.
    """
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        c = sampled_median(RHO, WEIGHTS, count, d0, weights_k, D, DIM, HAS_WEIGHTS)
        tl.store(CENTRE + d, tl.where(c * 0.0 == 0.0, c, 0.0), mask=d < D)
    tl.debug_barrier()
    reach = reach_of_centre(RHO, WEIGHTS, CENTRE, count, weights_k, D, DIM, HAS_WEIGHTS)
    near = tl.zeros((1,), tl.float32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        alive = lifts_of(WEIGHTS, k, k < count, weights_k, HAS_WEIGHTS)[1]
        far = tl.zeros((PROTOS,), tl.float64)
        for d0 in range(0, D, DIM):
            gap = from_centre(RHO, CENTRE, k.to(tl.int64), alive, d0, D, DIM)
            far += tl.sum(gap * gap, 1)
        far = tl.minimum(far, MOST).to(tl.float32)
        near += tl.sum((alive & (far <= reach)).to(tl.float32), 0)
        tl.store(FAR + k, tl.where(alive, far, float("inf")), mask=k < count)
    tl.debug_barrier()
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        total, bad = tl.zeros((DIM,), tl.float64), tl.zeros((DIM,), tl.float32)
        for k0 in range(0, count, PROTOS):
            k = k0 + tl.arange(0, PROTOS)
            far = tl.load(FAR + k, mask=k < count, other=float("inf"))
            alive = far < float("inf")
            bad += tl.sum(load_rows(RHO, k.to(tl.int64), alive, d0, D, D, DIM) * 0.0, 0)
            total += tl.sum(from_centre(RHO, CENTRE, k.to(tl.int64), far <= reach, d0, D, DIM), 0)
        c = tl.load(CENTRE + d, mask=d < D, other=0.0).to(tl.float64)
        c = (c + total / tl.maximum(near, 1.0)).to(tl.float32) + bad + poison
        tl.debug_barrier()
        tl.store(CENTRE + d, tl.where(d < D, c, 0.0), mask=d < STRIDE)
    tl.debug_barrier()


@triton.jit(do_not_specialize=NUMBERS)
def memories_kernel(
    RHO, BETA, WEIGHTS, TABLE, SIDE, CENTRE,
    count, inner, beta,
    rho_o, rho_i, beta_o, beta_i, beta_k, weights_o, weights_i, weights_k,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """One problem a program. What is not finite beside the memories poisons the centre, and with it
    every row: max skips NaN, so no logit could be relied on to carry it. Tables are finite: what is
    beyond float32 makes rows doubtful (`am/doubt.py`), and 0 times it stays 0.
    """
    problem = tl.program_id(0)
    m = problem.to(tl.int64)
    RHO += offset(problem, inner, rho_o, rho_i) * D
    BETA += offset(problem, inner, beta_o, beta_i)
    WEIGHTS += offset(problem, inner, weights_o, weights_i)
    TABLE += m * count * STRIDE
    SIDE += m * 4 * count
    CENTRE += m * STRIDE

    poison = 0.0
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        lift, alive = lifts_of(WEIGHTS, k, k < count, weights_k, HAS_WEIGHTS)
        here = tl.where(alive, lift * 0.0, 0.0)
        if HAS_BETA:
            scale = tl.load(BETA + k.to(tl.int64) * beta_k, mask=k < count, other=0.0).to(
                tl.float32
            )
            here += tl.where(alive, scale * 0.0, 0.0)
        poison += tl.sum(here, 0)
    store_centre(
        RHO, WEIGHTS, SIDE + 3 * count, CENTRE, count, poison, weights_k,
        D, STRIDE, DIM, PROTOS, HAS_WEIGHTS,
    )  # fmt: skip

    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        lift, alive = lifts_of(WEIGHTS, k, k < count, weights_k, HAS_WEIGHTS)
        norm = tl.zeros((PROTOS,), tl.float64)
        for d0 in range(0, D, DIM):
            d = d0 + tl.arange(0, DIM)
            c = tl.load(CENTRE + d, mask=d < D, other=0.0)
            row = load_rows(RHO, k.to(tl.int64), alive, d0, D, D, DIM)
            row = tl.where(alive[:, None], row - c[None, :], 0.0)
            row = tl.minimum(tl.maximum(row, -MOST), MOST)
            norm += tl.sum(row.to(tl.float64) * row.to(tl.float64), 1)
            at = TABLE + k.to(tl.int64)[:, None] * STRIDE + d[None, :]
            tl.store(at, row, mask=(k < count)[:, None] & (d < STRIDE)[None, :])
        if HARD:
            scale = tl.full((PROTOS,), 1.0, tl.float32)
            bias = -0.5 * norm
        else:
            scale = tl.zeros((PROTOS,), tl.float32) + beta
            if HAS_BETA:
                scale = tl.load(BETA + k.to(tl.int64) * beta_k, mask=k < count, other=0.0).to(
                    tl.float32
                )
                scale = tl.where(alive | (beta_k == 0), scale, 0.0)
            # of the scale as it is rounded: what the two are off by moves all rows alike
            scale = tl.minimum(2.0 * scale * _LOG2E, MOST)
            bias = lift.to(tl.float64) * _LOG2E - 0.5 * scale.to(tl.float64) * norm
        live = k < count
        bias = tl.maximum(bias, -MOST)  # a bias of -inf is for those that take no part
        tl.store(SIDE + k, scale, mask=live)
        tl.store(SIDE + count + k, tl.where(alive, bias, float("-inf")), mask=live)
        tl.store(SIDE + 2 * count + k, lift * _LOG2E, mask=live)
        tl.store(SIDE + 3 * count + k, tl.minimum(norm, MOST), mask=live)


@triton.jit(do_not_specialize=NUMBERS)
def memory_halves_kernel(
    TABLE, SIDE, HALVES, count, blocks, size,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
):  # fmt: skip
    """PROTOS memories of a table in two parts of half precision, rows and features padded by 0."""
    pid = tl.program_id(0)
    problem, k = (pid // blocks).to(tl.int64), (pid % blocks) * PROTOS + tl.arange(0, PROTOS)
    at = k.to(tl.int64)
    reach = reach_of(SIDE + problem * 4 * count, count, PROTOS)
    rho = load_rows(TABLE + problem * count * STRIDE, at, k < count, 0, D, STRIDE, DIM)
    high, low = halves(rho * power(reach))
    where = HALVES + problem * 2 * size * DIM + at[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(where, high)
    tl.store(where + tl.cast(size, tl.int64) * DIM, low)


def memory_halves(found: Memories, d: int) -> Tensor:
    """Parts [*batch, 2, size, DIM] of the memories, for rows that registers hold."""
    batch, width = found.table.shape[:-2], launch.dim(d)
    blocks = triton.cdiv(found.size, PROTOS)
    parts = launch.empty((*batch, 2, blocks * PROTOS, width), torch.float16, found.table.device)
    launch.launch(
        memory_halves_kernel, (batch.numel() * blocks,), found.table.device,
        found.table, found.side, parts, found.size, blocks, blocks * PROTOS,
        D=d, STRIDE=found.stride, DIM=width, PROTOS=PROTOS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return parts


def memories(rho: Tensor, beta: float | Tensor, log_weights: Tensor | None) -> Memories:
    """Prepare the tables; one launch, whose program count is the memories' batch."""
    count, d = rho.shape[-2:]
    operands = [(launch.rows(rho), 2)]
    operands += [(x, 1) for x in (beta, log_weights) if isinstance(x, Tensor)]
    batch = batch_of(operands)
    given = iter(arrange(batch, operands))
    first = next(given)
    betas = next(given) if isinstance(beta, Tensor) else first
    weights = next(given) if log_weights is not None else first
    stride = -(-d // 4) * 4
    shapes = ((*batch, count, stride), (*batch, 4, count), (*batch, stride))
    table, side, centre = (launch.empty(s, torch.float32, rho.device) for s in shapes)
    found = Memories(table, side, centre, beta, log_weights)
    problems = first.shape[0] * first.shape[1]
    launch.launch(
        memories_kernel, (problems,), rho.device,
        first, betas, weights, found.table, found.side, found.centre,
        count, first.shape[1], 0.0 if isinstance(beta, Tensor) else min(float(beta), 3e38),
        *in_rows(first, d),
        *betas.stride()[:2], betas.stride(2) if betas.shape[2] > 1 else 0,
        *weights.stride()[:2], weights.stride(2) if weights.shape[2] > 1 else 0,
        D=d, STRIDE=stride, DIM=min(64, launch.dim(d)), PROTOS=PROTOS,
        HAS_BETA=isinstance(beta, Tensor), HAS_WEIGHTS=log_weights is not None, HARD=found.hard,
        num_warps=4 if d <= 32 else 8, num_stages=1, maxnreg=255,
    )  # fmt: skip
    return found
