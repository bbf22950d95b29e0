# SPDX-License-Identifier: Apache-2.0
"""The memories of a call, prepared by one launch: centred rows, and the numbers of their logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.halves import halves, power, reach_of
from ..common.operands import arrange, batch_of, by_name, in_rows, of_each
from ..common.score import LOG2E, load_rows
from ..common.sweep import UNSPECIALISED, of_problem, offset
from .doubt import MOST

# Memories of one program; tables of halves are padded to a multiple of it.
PROTOS = 64
# The centre is a median over at most SAMPLE memories, in a tile of the next power of two.
SAMPLE = tl.constexpr(31)
SAMPLE_TILE = tl.constexpr(32)


class Memories(NamedTuple):
    """Tables of every problem of the memories' batch; rows of `stride` floats."""

    table: Tensor  # [*batch, K, stride] float32, minus the centre; 0 where log_weight is -inf
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
def memories_of(RHO, SIDE, problem, inner, m_o, m_i, count, STRIDE: tl.constexpr):
    """(m, RHO, SIDE): the index of a problem's memories in their batch, and their table."""
    m = offset(problem, inner, m_o, m_i)
    return m, RHO + m * count * STRIDE, SIDE + m * 4 * count


@triton.jit
def rows_and_memories_of(
    V, RHO, SIDE, CENTRE, problem, inner, v_o, v_i, m_o, m_i, count,
    D: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """(m, V, RHO, SIDE, CENTRE): as `memories_of`, and the rows and the centre of a problem."""
    m, RHO, SIDE = memories_of(RHO, SIDE, problem, inner, m_o, m_i, count, STRIDE)
    CENTRE += m * STRIDE
    return m, V + offset(problem, inner, v_o, v_i) * D, RHO, SIDE, CENTRE


@triton.jit
def lifts_of(WEIGHTS, k, valid, weights_k, HAS_WEIGHTS: tl.constexpr):
    """(log-weights [k] of memories, whether each is active)."""
    lift = tl.zeros((k.shape[0],), tl.float32)
    if HAS_WEIGHTS:
        lift = tl.load(WEIGHTS + k.to(tl.int64) * weights_k, mask=valid, other=0.0).to(tl.float32)
    return lift, valid & (lift != float("-inf"))


@triton.jit
def sample_of(WEIGHTS, count, weights_k, HAS_WEIGHTS: tl.constexpr):
    """(the memories of the sample, which are active, how many are)."""
    i = tl.arange(0, SAMPLE_TILE)
    size = tl.minimum(count, SAMPLE)
    k = i.to(tl.int64) * count // size
    _lift, active = lifts_of(WEIGHTS, k, i < size, weights_k, HAS_WEIGHTS)
    return k, active, tl.sum(active.to(tl.int32), 0)


@triton.jit
def sampled_median(
    RHO, WEIGHTS, count, d0, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The lower median of features [d0, d0 + DIM) over the active memories of the sample; 0 if none
    is active.
    """
    k, active, active_count = sample_of(WEIGHTS, count, weights_k, HAS_WEIGHTS)
    i = tl.arange(0, SAMPLE_TILE)
    mine = load_rows(RHO, k, active, d0, D, D, DIM)  # [SAMPLE_TILE, DIM]
    mine = tl.where(active[:, None], mine, float("inf"))  # [SAMPLE_TILE, DIM]
    rank = tl.zeros((SAMPLE_TILE, DIM), tl.int32)  # [SAMPLE_TILE, DIM]
    size = tl.minimum(count, SAMPLE)
    for j in range(0, size):
        other = tl.zeros((1,), tl.int64) + tl.cast(j, tl.int64) * count // size
        _lift, is_active = lifts_of(WEIGHTS, other, other >= 0, weights_k, HAS_WEIGHTS)
        theirs = load_rows(RHO, other, is_active, d0, D, D, DIM)  # [1, DIM]
        theirs = tl.where(is_active[:, None], theirs, float("inf"))  # [1, DIM]
        before = (theirs < mine) | ((theirs == mine) & (j < i)[:, None])  # [SAMPLE_TILE, DIM]
        rank += before.to(tl.int32)
    middle = active[:, None] & (rank == (active_count - 1) // 2)  # [SAMPLE_TILE, DIM]
    return tl.sum(tl.where(middle, mine, 0.0), 0)


@triton.jit
def from_centre(RHO, CENTRE, k, active, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of memories minus CENTRE, in float64; 0 where masked."""
    d = d0 + tl.arange(0, DIM)
    c = tl.load(CENTRE + d, mask=d < D, other=0.0).to(tl.float64)
    row = load_rows(RHO, k, active, d0, D, D, DIM).to(tl.float64)  # [k, DIM]
    return tl.where(active[:, None], row - c[None, :], 0.0)


@triton.jit
def reach_of_centre(
    RHO, WEIGHTS, CENTRE, count, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The squared distance from the median up to which memories count for the centre: 16 times the
    median of the squared distances. All count if none of the sample is active.
    """
    k, active, active_count = sample_of(WEIGHTS, count, weights_k, HAS_WEIGHTS)
    i = tl.arange(0, SAMPLE_TILE)
    far = tl.zeros((SAMPLE_TILE,), tl.float64)
    for d0 in range(0, D, DIM):
        gap = from_centre(RHO, CENTRE, k, active, d0, D, DIM)  # [SAMPLE_TILE, DIM]
        far += tl.sum(gap * gap, 1)
    far = tl.minimum(tl.where(active, far, float("inf")), MOST).to(tl.float32)
    tied = (far[None, :] == far[:, None]) & (i[None, :] < i[:, None])  # [SAMPLE_TILE, SAMPLE_TILE]
    behind = ((far[None, :] < far[:, None]) | tied) & active[None, :]  # [SAMPLE_TILE, SAMPLE_TILE]
    rank = tl.sum(behind.to(tl.int32), 1)
    middle = active & (rank == (active_count - 1) // 2)
    reach = tl.minimum(16.0 * tl.sum(tl.where(middle, far, 0.0), 0), MOST)
    return tl.where(active_count > 0, reach, MOST)


@triton.jit
def store_centre(
    RHO, WEIGHTS, FAR, CENTRE, count, poison, weights_k,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Store the centre: the mean of the memories within `reach_of_centre` of their median, so that
    a few far ones cannot move it. It is NaN where `poison` or an active memory is. FAR [count] is
    scratch for the squared distances.
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
        _lift, active = lifts_of(WEIGHTS, k, k < count, weights_k, HAS_WEIGHTS)
        far = tl.zeros((PROTOS,), tl.float64)
        for d0 in range(0, D, DIM):
            gap = from_centre(RHO, CENTRE, k.to(tl.int64), active, d0, D, DIM)  # [PROTOS, DIM]
            far += tl.sum(gap * gap, 1)
        far = tl.minimum(far, MOST).to(tl.float32)
        near += tl.sum((active & (far <= reach)).to(tl.float32), 0)
        tl.store(FAR + k, tl.where(active, far, float("inf")), mask=k < count)
    tl.debug_barrier()
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        total, bad = tl.zeros((DIM,), tl.float64), tl.zeros((DIM,), tl.float32)
        for k0 in range(0, count, PROTOS):
            k = k0 + tl.arange(0, PROTOS)
            far = tl.load(FAR + k, mask=k < count, other=float("inf"))
            active = far < float("inf")
            bad += tl.sum(load_rows(RHO, k.to(tl.int64), active, d0, D, D, DIM) * 0.0, 0)
            total += tl.sum(from_centre(RHO, CENTRE, k.to(tl.int64), far <= reach, d0, D, DIM), 0)
        c = tl.load(CENTRE + d, mask=d < D, other=0.0).to(tl.float64)
        c = (c + total / tl.maximum(near, 1.0)).to(tl.float32) + bad + poison
        tl.debug_barrier()
        tl.store(CENTRE + d, tl.where(d < D, c, 0.0), mask=d < STRIDE)
    tl.debug_barrier()


@triton.jit
def poison_of_all(
    BETA, WEIGHTS, count, beta_k, weights_k,
    PROTOS: tl.constexpr, HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """NaN where the beta or the log-weight of an active memory is not finite, else 0."""
    poison = 0.0
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        lift, active = lifts_of(WEIGHTS, k, k < count, weights_k, HAS_WEIGHTS)
        here = tl.where(active, lift * 0.0, 0.0)
        if HAS_BETA:
            scale = tl.load(BETA + k.to(tl.int64) * beta_k, mask=k < count, other=0.0)
            here += tl.where(active, scale.to(tl.float32) * 0.0, 0.0)
        poison += tl.sum(here, 0)
    return poison


@triton.jit
def scale_and_bias(
    BETA, beta, k, count, beta_k, active, lift, norm,
    PROTOS: tl.constexpr, HAS_BETA: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """(scale float32, bias float64) of memories of squared norms `norm`, as `memories_kernel` has
    them.
    """
    if HARD:
        scale = tl.full((PROTOS,), 1.0, tl.float32)
        bias = -0.5 * norm
    else:
        if HAS_BETA:
            scale = tl.load(BETA + k.to(tl.int64) * beta_k, mask=k < count, other=0.0)
            scale = tl.where(active | (beta_k == 0), scale.to(tl.float32), 0.0)
        else:
            scale = tl.zeros((PROTOS,), tl.float32) + beta
        # from the rounded scale: the error of both then moves all rows alike
        scale = tl.minimum(2.0 * scale * LOG2E, MOST)
        bias = lift.to(tl.float64) * LOG2E - 0.5 * scale.to(tl.float64) * norm
    return scale, bias


@triton.jit(do_not_specialize=UNSPECIALISED)
def memories_kernel(
    RHO, BETA, WEIGHTS, TABLE, SIDE, CENTRE,
    count, inner, beta,
    rho_o, rho_i, beta_o, beta_i, beta_k, weights_o, weights_i, weights_k,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """The tables of one problem: rho - centre, scale = 2 beta log2(e), bias = log2(e) log_weight -
    scale |rho - centre|^2 / 2, lift = log2(e) log_weight, |rho - centre|^2. HARD: scale 1, bias
    -|rho - centre|^2 / 2. A memory, beta or log-weight that is not finite makes the centre NaN, and
    with it every row: max skips NaN, so a logit would not carry it. Tables are finite: numbers
    beyond float32 become MOST, 0 times which stays 0, and their rows are in doubt (`am/doubt.py`).
    """
    problem = tl.program_id(0)
    m = problem.to(tl.int64)
    RHO += offset(problem, inner, rho_o, rho_i) * D
    BETA = of_problem(BETA, problem, inner, beta_o, beta_i, HAS_BETA)
    WEIGHTS = of_problem(WEIGHTS, problem, inner, weights_o, weights_i, HAS_WEIGHTS)
    TABLE += m * count * STRIDE
    SIDE += m * 4 * count
    CENTRE += m * STRIDE

    poison = poison_of_all(
        BETA, WEIGHTS, count, beta_k, weights_k, PROTOS, HAS_BETA, HAS_WEIGHTS
    )  # fmt: skip
    store_centre(
        RHO, WEIGHTS, SIDE + 3 * count, CENTRE, count, poison, weights_k,
        D, STRIDE, DIM, PROTOS, HAS_WEIGHTS,
    )  # fmt: skip

    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        lift, active = lifts_of(WEIGHTS, k, k < count, weights_k, HAS_WEIGHTS)
        norm = tl.zeros((PROTOS,), tl.float64)
        for d0 in range(0, D, DIM):
            d = d0 + tl.arange(0, DIM)
            c = tl.load(CENTRE + d, mask=d < D, other=0.0)
            row = load_rows(RHO, k.to(tl.int64), active, d0, D, D, DIM)  # [PROTOS, DIM]
            row = tl.where(active[:, None], row - c[None, :], 0.0)  # [PROTOS, DIM]
            row = tl.minimum(tl.maximum(row, -MOST), MOST)  # [PROTOS, DIM]
            norm += tl.sum(row.to(tl.float64) * row.to(tl.float64), 1)
            at = TABLE + k.to(tl.int64)[:, None] * STRIDE + d[None, :]  # [PROTOS, DIM]
            tl.store(at, row, mask=(k < count)[:, None] & (d < STRIDE)[None, :])
        scale, bias = scale_and_bias(
            BETA, beta, k, count, beta_k, active, lift, norm, PROTOS, HAS_BETA, HARD
        )  # fmt: skip
        valid = k < count
        bias = tl.maximum(bias, -MOST)  # only masked memories have a bias of -inf
        tl.store(SIDE + k, scale, mask=valid)
        tl.store(SIDE + count + k, tl.where(active, bias, float("-inf")), mask=valid)
        tl.store(SIDE + 2 * count + k, lift * LOG2E, mask=valid)
        tl.store(SIDE + 3 * count + k, tl.minimum(norm, MOST), mask=valid)


@triton.jit(do_not_specialize=UNSPECIALISED)
def memory_halves_kernel(
    TABLE, SIDE, HALVES, count, blocks, size,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
):  # fmt: skip
    """PROTOS memories of a table in two parts of half precision, padded with 0: the two parts of
    rho * power(max_k |rho_k|).
    """
    pid = tl.program_id(0)
    problem, k = (pid // blocks).to(tl.int64), (pid % blocks) * PROTOS + tl.arange(0, PROTOS)
    at = k.to(tl.int64)
    reach = reach_of(SIDE + problem * 4 * count, count, PROTOS)
    # [PROTOS, DIM]
    rho = load_rows(TABLE + problem * count * STRIDE, at, k < count, 0, D, STRIDE, DIM)
    high, low = halves(rho * power(reach))  # two of [PROTOS, DIM]
    # [PROTOS, DIM]
    where = HALVES + problem * 2 * size * DIM + at[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(where, high)
    tl.store(where + tl.cast(size, tl.int64) * DIM, low)


def memory_halves(tables: Memories, d: int) -> Tensor:
    """Parts [*batch, 2, size, DIM] of the memories, for rows that fit in registers."""
    batch, width = tables.table.shape[:-2], launch.dim(d)
    blocks = triton.cdiv(tables.size, PROTOS)
    parts = launch.empty((*batch, 2, blocks * PROTOS, width), torch.float16, tables.table.device)
    launch.launch(
        memory_halves_kernel, (batch.numel() * blocks,), tables.table.device,
        TABLE=tables.table, SIDE=tables.side, HALVES=parts,
        count=tables.size, blocks=blocks, size=blocks * PROTOS,
        D=d, STRIDE=tables.stride, DIM=width, PROTOS=PROTOS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return parts


def memories(rho: Tensor, beta: float | Tensor, log_weights: Tensor | None) -> Memories:
    """Prepare the tables: one launch, one program for each problem of the memories' batch."""
    count, d = rho.shape[-2:]
    operands = [(launch.rows(rho), 2)]
    operands += [(x, 1) for x in (beta, log_weights) if isinstance(x, Tensor)]
    batch = batch_of(operands)
    views = iter(arrange(batch, operands))
    first = next(views)
    betas = next(views) if isinstance(beta, Tensor) else None
    weights = next(views) if log_weights is not None else None
    stride = -(-d // 4) * 4
    shapes = ((*batch, count, stride), (*batch, 4, count), (*batch, stride))
    table, side, centre = (launch.empty(s, torch.float32, rho.device) for s in shapes)
    tables = Memories(table, side, centre, beta, log_weights)
    launch.launch(
        memories_kernel, (first.shape[0] * first.shape[1],), rho.device,
        RHO=first, **by_name(("rho_o", "rho_i"), in_rows(first, d)),
        BETA=betas, **by_name(("beta_o", "beta_i", "beta_k"), of_each(betas)),
        WEIGHTS=weights, **by_name(("weights_o", "weights_i", "weights_k"), of_each(weights)),
        TABLE=table, SIDE=side, CENTRE=centre, count=count, inner=first.shape[1],
        beta=None if isinstance(beta, Tensor) else min(float(beta), 3e38),
        D=d, STRIDE=stride, DIM=min(64, launch.dim(d)), PROTOS=PROTOS,
        HAS_BETA=betas is not None, HAS_WEIGHTS=weights is not None, HARD=tables.hard,
        num_warps=4 if d <= 32 else 8, num_stages=1, maxnreg=255,
    )  # fmt: skip
    return tables
