# SPDX-License-Identifier: Apache-2.0
"""The memories' side of a call, prepared by one launch: centred rows and what their logits need."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._halves import halves, power, reach_of
from ._operands import arrange, batch_of, in_rows
from ._score import load_rows
from ._sweep import NUMBERS, offset

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
# Memories of one program, and what tables of halves are filled up to.
PROTOS = 64


class Memories(NamedTuple):
    """Tables of every problem of the memories' batch; rows of `stride` floats."""

    table: Tensor  # [*batch, K, stride] float32, less the centre; 0 where log_weight is -inf
    side: Tensor  # [*batch, 4, K]: scale, bias (base 2), log_weights (base 2), |rho|^2
    centre: Tensor  # [*batch, stride], the mean of the memories that take part
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


@triton.jit(do_not_specialize=NUMBERS)
def memories_kernel(
    RHO, BETA, WEIGHTS, TABLE, SIDE, CENTRE,
    count, inner, beta,
    rho_o, rho_i, beta_o, beta_i, beta_k, weights_o, weights_i, weights_k,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """One problem a program. What is not finite beside the memories poisons the centre, and with it
    every row: max skips NaN, so no logit could be relied on to carry it.
    """
    problem = tl.program_id(0)
    m = problem.to(tl.int64)
    RHO += offset(problem, inner, rho_o, rho_i) * D
    BETA += offset(problem, inner, beta_o, beta_i)
    WEIGHTS += offset(problem, inner, weights_o, weights_i)
    TABLE += m * count * STRIDE
    SIDE += m * 4 * count
    CENTRE += m * STRIDE

    alive_count = 0.0
    poison = 0.0
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        lift = tl.zeros((PROTOS,), tl.float32)
        if HAS_WEIGHTS:
            lift = tl.load(WEIGHTS + k.to(tl.int64) * weights_k, mask=k < count, other=0.0).to(
                tl.float32
            )
        alive = (k < count) & (lift != float("-inf"))
        alive_count += tl.sum(alive.to(tl.float32), 0)
        here = tl.where(alive, lift * 0.0, 0.0)
        if HAS_BETA:
            scale = tl.load(BETA + k.to(tl.int64) * beta_k, mask=k < count, other=0.0).to(
                tl.float32
            )
            here += tl.where(alive, scale * 0.0, 0.0)
        poison += tl.sum(here, 0)

    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        total = tl.zeros((DIM,), tl.float32)
        for k0 in range(0, count, PROTOS):
            k = k0 + tl.arange(0, PROTOS)
            alive = k < count
            if HAS_WEIGHTS:
                lift = tl.load(
                    WEIGHTS + k.to(tl.int64) * weights_k, mask=alive, other=float("-inf")
                )
                alive = alive & (lift.to(tl.float32) != float("-inf"))
            total += tl.sum(load_rows(RHO, k.to(tl.int64), alive, d0, D, D, DIM), 0)
        c = total / tl.maximum(alive_count, 1.0) + poison
        tl.store(CENTRE + d, tl.where(d < D, c, 0.0), mask=d < STRIDE)
    tl.debug_barrier()

    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        lift = tl.zeros((PROTOS,), tl.float32)
        if HAS_WEIGHTS:
            lift = tl.load(WEIGHTS + k.to(tl.int64) * weights_k, mask=k < count, other=0.0).to(
                tl.float32
            )
        alive = (k < count) & (lift != float("-inf"))
        norm = tl.zeros((PROTOS,), tl.float64)
        for d0 in range(0, D, DIM):
            d = d0 + tl.arange(0, DIM)
            c = tl.load(CENTRE + d, mask=d < D, other=0.0)
            row = load_rows(RHO, k.to(tl.int64), alive, d0, D, D, DIM)
            row = tl.where(alive[:, None], row - c[None, :], 0.0)
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
            # of the scale as it is rounded: what the two are off by moves all rows alike
            scale = 2.0 * scale * _LOG2E
            bias = lift.to(tl.float64) * _LOG2E - 0.5 * scale.to(tl.float64) * norm
        live = k < count
        tl.store(SIDE + k, scale, mask=live)
        tl.store(SIDE + count + k, tl.where(alive, bias, float("-inf")), mask=live)
        tl.store(SIDE + 2 * count + k, lift * _LOG2E, mask=live)
        tl.store(SIDE + 3 * count + k, norm, mask=live)


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
    batch, width = found.table.shape[:-2], _launch.dim(d)
    blocks = triton.cdiv(found.size, PROTOS)
    parts = _launch.empty((*batch, 2, blocks * PROTOS, width), torch.float16, found.table.device)
    _launch.launch(
        memory_halves_kernel, (batch.numel() * blocks,), found.table.device,
        found.table, found.side, parts, found.size, blocks, blocks * PROTOS,
        D=d, STRIDE=found.stride, DIM=width, PROTOS=PROTOS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return parts


def memories(rho: Tensor, beta: float | Tensor, log_weights: Tensor | None) -> Memories:
    """Prepare the tables; one launch, whose program count is the memories' batch."""
    count, d = rho.shape[-2:]
    operands = [(_launch.rows(rho), 2)]
    operands += [(x, 1) for x in (beta, log_weights) if isinstance(x, Tensor)]
    batch = batch_of(operands)
    given = iter(arrange(batch, operands))
    first = next(given)
    betas = next(given) if isinstance(beta, Tensor) else first
    weights = next(given) if log_weights is not None else first
    stride = -(-d // 4) * 4
    shapes = ((*batch, count, stride), (*batch, 4, count), (*batch, stride))
    table, side, centre = (_launch.empty(s, torch.float32, rho.device) for s in shapes)
    found = Memories(table, side, centre, beta, log_weights)
    problems = first.shape[0] * first.shape[1]
    _launch.launch(
        memories_kernel, (problems,), rho.device,
        first, betas, weights, found.table, found.side, found.centre,
        count, first.shape[1], 0.0 if isinstance(beta, Tensor) else float(beta),
        *in_rows(first, d),
        *betas.stride()[:2], betas.stride(2) if betas.shape[2] > 1 else 0,
        *weights.stride()[:2], weights.stride(2) if weights.shape[2] > 1 else 0,
        D=d, STRIDE=stride, DIM=min(64, _launch.dim(d)), PROTOS=PROTOS,
        HAS_BETA=isinstance(beta, Tensor), HAS_WEIGHTS=log_weights is not None, HARD=found.hard,
        num_warps=4, num_stages=1, maxnreg=255,
    )  # fmt: skip
    return found
