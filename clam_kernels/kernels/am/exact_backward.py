# SPDX-License-Identifier: Apache-2.0
"""Gradients of the rows whose flag is set, from differences in float64: the second launch of a
backward. Equations (8) and (9) of docs/ops/am.md with t_k = rho_k - x. `am/exact.py` has the
forward.

A program adds up the gradients of memories, betas and log-weights over its rows in a part of its
own, and marks the part as used. The next launch adds the used parts in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.sweep import UNSPECIALISED, of_problem
from .exact import (
    STRIPS,
    Operands,
    advance,
    bits_of,
    chosen_of,
    flags_of,
    gain_at,
    gaps,
    load_row,
    memories_and_rows,
    number,
    peak,
    sides,
    weights_of,
)

# Float64 numbers in all parts of a launch (128 MB), and in one tile of their sum.
PARTS = 1 << 24
TILE = 1024


# ---- the recursion -------------------------------------------------------------------------------


@triton.jit
def begin_part(PART, fresh):
    """Zero the first `fresh` numbers."""
    for i0 in range(0, fresh, 1024):
        i = i0 + tl.arange(0, 1024)
        tl.store(PART + i, tl.zeros((1024,), tl.float64), mask=i < fresh)
    tl.debug_barrier()


@triton.jit
def add_to(PLACE, more, mask):
    """Add to numbers of one program; each number belongs to the same thread in every call."""
    tl.store(PLACE, tl.load(PLACE, mask=mask, other=0.0) + more, mask=mask)


@triton.jit
def slopes(
    X, H, FAR, SLOPE, RHO, BETA, WEIGHTS, count, chosen, total, beta_bits, beta_k, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, HARD: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Store s_k = h (rho_k - x) of all memories to SLOPE; returns sum_k p_k s_k."""
    mean = tl.zeros((1,), tl.float64)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        p, _, _, active = weights_of(
            FAR, BETA, WEIGHTS, k, count, chosen, total, beta_bits, beta_k, weights_k,
            HARD, HAS_BETA, HAS_WEIGHTS,
        )  # fmt: skip
        s = tl.zeros((PROTOS,), tl.float64)
        for d0 in range(0, D, DIM):
            d = d0 + tl.arange(0, DIM)
            h = tl.load(H + d, mask=d < D, other=0.0)
            s += tl.sum(h[None, :] * gaps(X, RHO, k, active, d0, D, DIM), 1)
        tl.store(SLOPE + k, s, mask=k < count)
        mean += tl.sum(p * s, 0)
    tl.debug_barrier()
    return mean


@triton.jit
def step_back(
    X, G, H, FAR, SLOPE, PART, MASKED, U, u_row, u_feature, one, last, step_bits,
    RHO, BETA, WEIGHTS, count, beta_bits, beta_k, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, HARD: tl.constexpr,
    MASK: tl.constexpr, HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    MASK_GRAD: tl.constexpr, MEMORIES: tl.constexpr,
):  # fmt: skip
    """Replace the gradient G of a row by that before the step whose state is X: g - h + 2 sum_k
    beta_k gz_k t_k, with t_k = rho_k - x, h = gain g, gz_k = p_k (h t_k - mean). Adds to PART [k]
    p_k h - 2 beta_k gz_k t_k, gz_k and gz_k |t_k|^2, to MASKED step g sum_k p_k t_k.
    """
    chosen, total = chosen_of(
        X, RHO, BETA, WEIGHTS, FAR, count, beta_bits, beta_k, weights_k,
        D, DIM, PROTOS, HARD, HAS_BETA, HAS_WEIGHTS,
    )  # fmt: skip
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        gain = gain_at(U, u_row, u_feature, one, d, step_bits, D, MASK)
        tl.store(H + d, gain * tl.load(G + d, mask=d < D, other=0.0), mask=d < D)
    tl.debug_barrier()
    mean = tl.zeros((1,), tl.float64)
    if not HARD:
        mean = slopes(
            X, H, FAR, SLOPE, RHO, BETA, WEIGHTS, count, chosen, total, beta_bits, beta_k,
            weights_k, D, DIM, PROTOS, HARD, HAS_BETA, HAS_WEIGHTS,
        )  # fmt: skip
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        h = tl.load(H + d, mask=d < D, other=0.0)
        more, pull = tl.zeros((DIM,), tl.float64), tl.zeros((DIM,), tl.float64)
        for k0 in range(0, count, PROTOS):
            k = k0 + tl.arange(0, PROTOS)
            p, beta, far, active = weights_of(
                FAR, BETA, WEIGHTS, k, count, chosen, total, beta_bits, beta_k, weights_k,
                HARD, HAS_BETA, HAS_WEIGHTS,
            )  # fmt: skip
            t = gaps(X, RHO, k, active, d0, D, DIM)  # [PROTOS, DIM]
            pull += tl.sum(p[:, None] * t, 0)
            grad_rho = p[:, None] * h[None, :]  # [PROTOS, DIM]
            gz = tl.zeros((PROTOS,), tl.float64)
            if not HARD:
                gz = p * (tl.load(SLOPE + k, mask=k < count, other=0.0) - mean)
                pushed = (gz * beta)[:, None] * t  # [PROTOS, DIM]
                more += tl.sum(pushed, 0)
                grad_rho -= 2.0 * pushed
            if MEMORIES:
                place = PART + k.to(tl.int64) * (D + 2)
                inside = (k < count)[:, None] & (d < D)[None, :]  # [PROTOS, DIM]
                add_to(place[:, None] + d[None, :], grad_rho, inside)
                once = k < tl.where(d0 == 0, count, 0)
                add_to(place + D, gz, once)
                add_to(place + D + 1, gz * far, once)
        g = tl.load(G + d, mask=d < D, other=0.0)
        if MASK_GRAD:
            masked = tl.load(MASKED + d, mask=d < D, other=0.0).to(tl.float64)
            masked = tl.where(last, 0.0, masked) + number(step_bits) * g * pull
            tl.debug_barrier()
            tl.store(MASKED + d, masked.to(tl.float32), mask=d < D)
        tl.debug_barrier()
        tl.store(G + d, g - h + 2.0 * more, mask=d < D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def exact_backward_kernel(
    FLAG, GRAD, V, U, RHO, BETA, WEIGHTS, OUT, MASKED, STRIP, PART, USED,
    rows, count, inner, first, blocks, splits, share, steps, step_bits, beta_bits,
    v_o, v_i, u_o, u_i, u_row, u_feature, rho_o, rho_i, b_o, b_i, b_k, w_o, w_i, w_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    HARD: tl.constexpr, MASK: tl.constexpr, HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    MASK_GRAD: tl.constexpr, MEMORIES: tl.constexpr,
):  # fmt: skip
    """Program (problem, split): `share` blocks of rows of one problem. OUT takes g before the first
    step, with g <- g - h + 2 sum_k beta_k gz_k t_k, t_k = rho_k - x, h = gain g, gz_k = p_k (h t_k
    - sum_j p_j h t_j). PART [count, D + 2] takes the sums over rows and steps of p_k h - 2 beta_k
    gz_k t_k, of gz_k, and of gz_k |t_k|^2; MASKED takes sum_t step g sum_k p_k t_k.
    """
    pid = tl.program_id(0)
    problem = first + pid // splits
    X = STRIP + pid.to(tl.int64) * ((tl.cast(steps, tl.int64) + 2) * D + 2 * count)
    G = X + tl.cast(steps, tl.int64) * D
    FAR = G + 2 * D
    if MEMORIES:
        PART += pid.to(tl.int64) * count * (D + 2)
    rho, raw = memories_and_rows(RHO, V, problem, inner, rho_o, rho_i, v_o, v_i, D)
    beta = of_problem(BETA, problem, inner, b_o, b_i, HAS_BETA)
    weights = of_problem(WEIGHTS, problem, inner, w_o, w_i, HAS_WEIGHTS)
    mask = of_problem(U, problem, inner, u_o, u_i, MASK)
    used = 0
    begin = (pid % splits) * share
    for block in range(begin, tl.minimum(begin + share, blocks)):
        _own, left, flag_count = flags_of(FLAG, problem * blocks + block, blocks, rows, ROWS)
        if MEMORIES:
            begin_part(PART, tl.where((flag_count > 0) & (used == 0), count * (D + 2), 0))
        used = tl.where(flag_count > 0, 1, used)
        for _ in range(0, flag_count):
            one = tl.max(left, 0)
            left = tl.where(left == one, -1, left)
            row = (problem.to(tl.int64) * rows + one) * D
            load_row(X, raw, one, D, DIM)
            load_row(G, GRAD + row, 0, D, DIM)
            for t in range(0, steps - 1):
                here = X + tl.cast(t, tl.int64) * D
                advance(
                    here, here + D, FAR, mask, u_row, u_feature, one, step_bits,
                    rho, beta, weights, count, beta_bits, b_k, w_k,
                    D, DIM, PROTOS, HARD, MASK, HAS_BETA, HAS_WEIGHTS,
                )  # fmt: skip
            masked = MASKED + row if MASK_GRAD else 0
            for back in range(0, steps):
                here = X + tl.cast(steps - 1 - back, tl.int64) * D
                step_back(
                    here, G, G + D, FAR, FAR + count, PART, masked,
                    mask, u_row, u_feature, one, back == 0, step_bits,
                    rho, beta, weights, count, beta_bits, b_k, w_k,
                    D, DIM, PROTOS, HARD, MASK, HAS_BETA, HAS_WEIGHTS, MASK_GRAD, MEMORIES,
                )  # fmt: skip
            tl.debug_barrier()
            for d0 in range(0, D, DIM):
                d = d0 + tl.arange(0, DIM)
                g = tl.load(G + d, mask=d < D, other=0.0)
                tl.store(OUT + row + d, g.to(tl.float32), mask=d < D)
    tl.store(USED + pid, used)


# ---- the energy ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALISED)
def exact_energy_backward_kernel(
    FLAG, GRAD, V, RHO, BETA, WEIGHTS, OUT, STRIP, PART, USED,
    rows, count, inner, first, blocks, splits, share, beta_bits,
    v_o, v_i, rho_o, rho_i, b_o, b_i, b_k, w_o, w_i, w_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """As `exact_backward_kernel` for the energy E: OUT takes -2 sum_k q_k t_k, PART the sums over
    rows of 2 q t, of q, and of q (|x - rho|^2 - E), with q = p g and t = rho - x.
    """
    pid = tl.program_id(0)
    problem = first + pid // splits
    X = STRIP + pid.to(tl.int64) * (D + count)
    FAR = X + D
    PART += pid.to(tl.int64) * count * (D + 2)
    rho, raw = memories_and_rows(RHO, V, problem, inner, rho_o, rho_i, v_o, v_i, D)
    beta = of_problem(BETA, problem, inner, b_o, b_i, HAS_BETA)
    weights = of_problem(WEIGHTS, problem, inner, w_o, w_i, HAS_WEIGHTS)
    sharp, _lift, _active = sides(
        beta, weights, tl.arange(0, 1), count, beta_bits, b_k, w_k, HAS_BETA, HAS_WEIGHTS
    )
    used = 0
    begin = (pid % splits) * share
    for block in range(begin, tl.minimum(begin + share, blocks)):
        _own, left, flag_count = flags_of(FLAG, problem * blocks + block, blocks, rows, ROWS)
        begin_part(PART, tl.where((flag_count > 0) & (used == 0), count * (D + 2), 0))
        used = tl.where(flag_count > 0, 1, used)
        for _ in range(0, flag_count):
            one = tl.max(left, 0)
            left = tl.where(left == one, -1, left)
            row = problem.to(tl.int64) * rows + one
            upstream = tl.load(GRAD + row).to(tl.float64)
            load_row(X, raw, one, D, DIM)
            top, total = peak(
                X, rho, beta, weights, FAR, count, beta_bits, b_k, w_k,
                D, DIM, PROTOS, False, HAS_BETA, HAS_WEIGHTS,
            )  # fmt: skip
            energy = -(top + tl.log(total)) / sharp
            for d0 in range(0, D, DIM):
                d = d0 + tl.arange(0, DIM)
                pull = tl.zeros((DIM,), tl.float64)
                for k0 in range(0, count, PROTOS):
                    k = k0 + tl.arange(0, PROTOS)
                    p, _sharps, far, active = weights_of(
                        FAR, beta, weights, k, count, top, total, beta_bits, b_k, w_k,
                        False, HAS_BETA, HAS_WEIGHTS,
                    )  # fmt: skip
                    q = p * upstream
                    moved = q[:, None] * gaps(X, rho, k, active, d0, D, DIM)  # [PROTOS, DIM]
                    pull += tl.sum(moved, 0)
                    place = PART + k.to(tl.int64) * (D + 2)
                    inside = (k < count)[:, None] & (d < D)[None, :]  # [PROTOS, DIM]
                    add_to(place[:, None] + d[None, :], 2.0 * moved, inside)
                    once = k < tl.where(d0 == 0, count, 0)
                    add_to(place + D, q, once)
                    add_to(place + D + 1, tl.where(q == 0.0, 0.0, q * (far - energy)), once)
                tl.store(OUT + row * D + d, (-2.0 * pull).to(tl.float32), mask=d < D)
    tl.store(USED + pid, used)


# ---- the sums of the parts -----------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALISED)
def exact_sums_kernel(PART, USED, SUMS, every, pieces, size, TILE: tl.constexpr):
    """SUMS_i <- SUMS_i + sum_n PART_ni over the used parts n of `every`, in their order, for a tile
    of TILE numbers i. SUMS is [., size], PART [., every, size].
    """
    pid = tl.program_id(0)
    own, i = (pid // pieces).to(tl.int64), (pid % pieces) * TILE + tl.arange(0, TILE)
    inside = i < size
    some = 0
    for n0 in range(0, every, TILE):
        n = n0 + tl.arange(0, TILE)
        used = tl.load(USED + own * every + n, mask=n < every, other=0)
        some = tl.maximum(some, tl.max(used, 0))
    if some > 0:
        total = tl.load(SUMS + own * size + i, mask=inside, other=0.0)
        for n in range(0, every):
            here = tl.where(tl.load(USED + own * every + n) > 0, size, 0)
            part = PART + (own * every + n) * size + i
            total += tl.load(part, mask=i < here, other=0.0)
        tl.store(SUMS + own * size + i, total, mask=inside)


class Sums:
    """Sums for the gradients of memories, log-weights and betas, [O, I, K, D + 2] float64; a batch
    dim is 1 where all its problems share the memories.
    """

    def __init__(self, a: Operands) -> None:
        self.a = a
        wide: dict[str, Any] = {"dtype": torch.float64, "device": a.v.device}
        self.total = torch.zeros((*a.lead, a.memories, a.features + 2), **wide)

    def add(self, o: int, i: int, problems: int, splits: int, part: Tensor, used: Tensor) -> None:
        """Add the parts of `problems` problems (o, i), (o, i + 1), ... One launch."""
        total = self.total[o if self.a.lead[0] > 1 else 0]
        alone = self.a.lead[1] > 1 or self.a.v.shape[1] == 1
        total = total[i : i + problems] if alone else total
        size = self.a.memories * (self.a.features + 2)
        pieces = triton.cdiv(size, TILE)
        launch.launch(
            exact_sums_kernel, ((problems if alone else 1) * pieces,), part.device,
            PART=part, USED=used, SUMS=total, every=splits if alone else problems * splits,
            pieces=pieces, size=size, TILE=TILE, num_warps=4, num_stages=1,
        )  # fmt: skip

    def of_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums over the memories' own batch: the first D columns of PART [..., K, D], the last
        but one [..., K], the last [..., K].
        """
        batch, core = self.a.memory_batch, self.total.shape[2:]
        if math.prod(self.a.lead) == math.prod(batch):
            sums = self.total.reshape(*batch, *core)
        else:
            sums = self.total.reshape(*self.a.batch, *core).sum_to_size(*batch, *core)
        return sums[..., : self.a.features], sums[..., -2], sums[..., -1]


# ---- launches ------------------------------------------------------------------------------------


def _parts(a: Operands, block: int, size: int, memories: bool) -> tuple[int, int, int, int]:
    """(blocks of a problem, programs of a problem, blocks of each, problems of a launch); a program
    has `size` numbers of scratch.
    """
    blocks = triton.cdiv(a.v.shape[2], block)
    most = max(1, min(launch.PROGRAMS, STRIPS // size))
    if memories:
        most = max(1, min(most, PARTS // (a.memories * (a.features + 2))))
    splits = max(1, min(blocks, most // max(a.problems, 1)))
    share = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, share) if blocks else 0
    return blocks, splits, share, max(1, most // max(splits, 1))


def _launches(a: Operands, splits: int, run: int) -> Iterator[tuple[int, int, int, int]]:
    """(o, i, problems, the first problem) of each launch: problems of one outer index."""
    outer, inner = a.v.shape[:2]
    for o in range(outer if splits else 0):
        for i in range(0, inner, run):
            yield o, i, min(run, inner - i), o * inner + i


def recursion_backward(
    a: Operands,
    grad: Tensor,
    steps: int,
    step: float,
    flags: Tensor,
    out: Tensor,
    masked: Tensor | None,
    memories: bool,
) -> Sums | None:
    """Overwrite in `out` and `masked` the gradients of the rows whose flag is set; returns the sums
    for the memories if `memories`. `grad`, `out` and `masked` are dense.
    """
    tile, scratch = a.tile(), (steps + 2) * a.features + 2 * a.memories
    blocks, splits, share, run = _parts(a, tile["ROWS"], scratch, memories)
    run = min(run, a.v.shape[1])
    strip = launch.empty((run * splits * scratch,), torch.float64, a.v.device)
    size = a.memories * (a.features + 2)
    raw = launch.plain(out)
    part = launch.empty((run * splits * size,), torch.float64, a.v.device) if memories else None
    used = launch.empty((run * splits,), torch.int32, a.v.device)
    sums = Sums(a) if memories else None
    for o, i, problems, first in _launches(a, splits, run):
        launch.launch(
            exact_backward_kernel, (problems * splits,), a.v.device,
            **a.arguments(), **a.update_mask(), FLAG=flags, GRAD=grad, OUT=raw, MASKED=masked,
            STRIP=strip, PART=part, USED=used, first=first, blocks=blocks, splits=splits,
            share=share, steps=steps, step_bits=bits_of(step), **tile, HARD=a.hard,
            MASK_GRAD=masked is not None, MEMORIES=memories,
        )  # fmt: skip
        if sums is not None and part is not None:
            sums.add(o, i, problems, splits, part, used)
    if raw is not out:
        out.copy_(raw)
    return sums


def energy_backward(a: Operands, grad: Tensor, flags: Tensor, out: Tensor) -> Sums:
    """As `recursion_backward` for the energy; `grad` has one number for each row."""
    tile, scratch = a.tile(), a.features + a.memories
    blocks, splits, share, run = _parts(a, tile["ROWS"], scratch, True)
    run = min(run, a.v.shape[1])
    strip = launch.empty((run * splits * scratch,), torch.float64, a.v.device)
    size = a.memories * (a.features + 2)
    part = launch.empty((run * splits * size,), torch.float64, a.v.device)
    used = launch.empty((run * splits,), torch.int32, a.v.device)
    sums = Sums(a)
    for o, i, problems, first in _launches(a, splits, run):
        launch.launch(
            exact_energy_backward_kernel, (problems * splits,), a.v.device,
            **a.arguments(), FLAG=flags, GRAD=grad, OUT=out, STRIP=strip, PART=part, USED=used,
            first=first, blocks=blocks, splits=splits, share=share, **tile,
        )  # fmt: skip
        sums.add(o, i, problems, splits, part, used)
    return sums
