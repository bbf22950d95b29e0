# SPDX-License-Identifier: Apache-2.0
"""The second launch of an associative-memory call: rows whose flag is set, computed again.

A fast kernel sets the flags (`am/doubt.py`). The kernels here compute everything of such a row from
differences of the rows and memories as they were given, in float64, one row at a time. A program
that meets no flag reads its flags and nothing else. Any fast kernel can be used before: what is
asked for is one byte for each row of the output.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.operands import arrange, batch_of, in_rows
from ..common.sweep import NUMBERS, offset, rows_of
from ..kmeans.nearest import TIE

# Programs of a launch, and the float64 numbers that they may keep between their steps (64 MB).
PROGRAMS = 512
KEPT = 1 << 23
# Rows of a block, few enough that a short call is many blocks; of a long call, many.
FEW, MANY, LONG = 32, 1024, 1 << 19
# Entries of a tile in float64.
TILE = 2048


# ---- one row -------------------------------------------------------------------------------------


@triton.jit
def number(bits):
    """The float64 that a whole number has the bits of."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)


@triton.jit
def sides(
    BETA, WEIGHTS, k, count, beta_bits, beta_k, weights_k,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """(betas, log-weights, which take part) of memories, in float64."""
    live, at = k < count, k.to(tl.int64)
    beta = tl.zeros((k.shape[0],), tl.float64) + number(beta_bits)
    lift = tl.zeros((k.shape[0],), tl.float64)
    if HAS_BETA:
        beta = tl.load(BETA + at * beta_k, mask=live, other=0.0).to(tl.float64)
    if HAS_WEIGHTS:
        lift = tl.load(WEIGHTS + at * weights_k, mask=live, other=0.0).to(tl.float64)
    return beta, lift, live & (lift != float("-inf"))


@triton.jit
def gaps(X, RHO, k, alive, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of rho_k - x; X is a row in float64. 0 beyond the edges."""
    d = d0 + tl.arange(0, DIM)
    inside = alive[:, None] & (d < D)[None, :]
    rho = tl.load(RHO + k.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
    x = tl.load(X + d, mask=d < D, other=0.0)
    return tl.where(inside, rho.to(tl.float64) - x[None, :], 0.0)


@triton.jit
def peak(
    X, RHO, BETA, WEIGHTS, FAR, count, beta_bits, beta_k, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, HARD: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """(largest logit, sum of weights relative to it) of a row, whose distances go to FAR; the logit
    of a hard assignment is the distance, negated.
    """
    tl.debug_barrier()
    top = tl.full((1,), float("-inf"), tl.float64)
    total = tl.zeros((1,), tl.float64)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        beta, lift, alive = sides(
            BETA, WEIGHTS, k, count, beta_bits, beta_k, weights_k, HAS_BETA, HAS_WEIGHTS
        )
        far = tl.zeros((PROTOS,), tl.float64)
        for d0 in range(0, D, DIM):
            t = gaps(X, RHO, k, alive, d0, D, DIM)
            far += tl.sum(t * t, 1)
        tl.store(FAR + k, far, mask=k < count)
        z = -far if HARD else lift - beta * far
        z = tl.where(alive, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe), 0)
        top = higher
    tl.debug_barrier()
    return top, total


@triton.jit
def weights_of(
    FAR, BETA, WEIGHTS, k, count, chosen, total, beta_bits, beta_k, weights_k,
    HARD: tl.constexpr, HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """(weights, betas, distances, which take part) of memories; `chosen` is the largest logit, or
    the index of the nearest memory.
    """
    beta, lift, alive = sides(
        BETA, WEIGHTS, k, count, beta_bits, beta_k, weights_k, HAS_BETA, HAS_WEIGHTS
    )
    far = tl.load(FAR + k, mask=k < count, other=0.0)
    if HARD:
        p = tl.where(k == chosen, 1.0, 0.0).to(tl.float64)
    else:
        p = tl.where(alive, tl.exp(lift - beta * far - chosen) / total, 0.0)
    return p, beta, far, alive


@triton.jit
def first_nearest(
    FAR, BETA, WEIGHTS, count, least, weights_k,
    PROTOS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The lowest index of the memories in a tie with the nearest."""
    found = tl.full((1,), 2147483647, tl.int32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        alive = sides(BETA, WEIGHTS, k, count, 0, 0, weights_k, False, HAS_WEIGHTS)[2]
        far = tl.load(FAR + k, mask=k < count, other=0.0)
        tied = alive & (far <= least + least * TIE)
        found = tl.minimum(found, tl.min(tl.where(tied, k, 2147483647), 0))
    return found


@triton.jit
def chosen_of(
    X, RHO, BETA, WEIGHTS, FAR, count, beta_bits, beta_k, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, HARD: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """What `weights_of` needs of a row: (largest logit or index of the nearest, sum of weights)."""
    top, total = peak(
        X, RHO, BETA, WEIGHTS, FAR, count, beta_bits, beta_k, weights_k,
        D, DIM, PROTOS, HARD, HAS_BETA, HAS_WEIGHTS,
    )  # fmt: skip
    if HARD:
        chosen = first_nearest(FAR, BETA, WEIGHTS, count, -top, weights_k, PROTOS, HAS_WEIGHTS)
    else:
        chosen = top
    return chosen, total


@triton.jit
def gain_at(U, u_row, u_feature, one, d, step_bits, D: tl.constexpr, MASK: tl.constexpr):
    """The product step * update_mask of one row in float64."""
    gain = tl.zeros((d.shape[0],), tl.float64) + number(step_bits)
    if MASK:
        at = U + one.to(tl.int64) * u_row + d.to(tl.int64) * u_feature
        gain = gain * tl.load(at, mask=d < D, other=0.0).to(tl.float64)
    return gain


@triton.jit
def advance(
    X, NEXT, FAR, U, u_row, u_feature, one, step_bits,
    RHO, BETA, WEIGHTS, count, beta_bits, beta_k, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, HARD: tl.constexpr,
    MASK: tl.constexpr, HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Store to NEXT the state after the one in X, which may be in the same place."""
    chosen, total = chosen_of(
        X, RHO, BETA, WEIGHTS, FAR, count, beta_bits, beta_k, weights_k,
        D, DIM, PROTOS, HARD, HAS_BETA, HAS_WEIGHTS,
    )  # fmt: skip
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        pull = tl.zeros((DIM,), tl.float64)
        for k0 in range(0, count, PROTOS):
            k = k0 + tl.arange(0, PROTOS)
            p, _, _, alive = weights_of(
                FAR, BETA, WEIGHTS, k, count, chosen, total, beta_bits, beta_k, weights_k,
                HARD, HAS_BETA, HAS_WEIGHTS,
            )  # fmt: skip
            pull += tl.sum(p[:, None] * gaps(X, RHO, k, alive, d0, D, DIM), 0)
        x = tl.load(X + d, mask=d < D, other=0.0)
        gain = gain_at(U, u_row, u_feature, one, d, step_bits, D, MASK)
        tl.debug_barrier()
        tl.store(NEXT + d, x + gain * pull, mask=d < D)


@triton.jit
def load_row(X, V, one, D: tl.constexpr, DIM: tl.constexpr):
    """Copy row `one` to a strip in float64."""
    tl.debug_barrier()
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        given = tl.load(V + tl.cast(one, tl.int64) * D + d, mask=d < D, other=0.0)
        tl.store(X + d, given.to(tl.float64), mask=d < D)


@triton.jit
def flags_of(FLAG, block, blocks, rows, ROWS: tl.constexpr):
    """(problem, rows whose flag is set or -1, how many) of a block."""
    problem, row = rows_of(block, 0, blocks, ROWS)
    at = FLAG + problem.to(tl.int64) * rows + row
    left = tl.load(at, mask=row < rows, other=0) != 0
    return problem, tl.where(left, row, -1), tl.sum(left.to(tl.int32), 0)


# ---- forward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NUMBERS)
def exact_recursion_kernel(
    FLAG, V, U, RHO, BETA, WEIGHTS, OUT, STRIP,
    rows, count, inner, blocks, every, steps, step_bits, beta_bits,
    v_o, v_i, u_o, u_i, u_row, u_feature, rho_o, rho_i, b_o, b_i, b_k, w_o, w_i, w_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    HARD: tl.constexpr, MASK: tl.constexpr, HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """All steps of the rows whose flag is set, in `every` blocks of ROWS rows."""
    pid = tl.program_id(0)
    X = STRIP + pid.to(tl.int64) * (D + count)
    FAR = X + D
    for block in range(pid, every, tl.num_programs(0)):
        problem, left, met = flags_of(FLAG, block, blocks, rows, ROWS)
        rho = RHO + offset(problem, inner, rho_o, rho_i) * D
        beta = BETA + offset(problem, inner, b_o, b_i)
        weights = WEIGHTS + offset(problem, inner, w_o, w_i)
        mask = U + offset(problem, inner, u_o, u_i)
        given = V + offset(problem, inner, v_o, v_i) * D
        for _ in range(0, met):
            one = tl.max(left, 0)
            left = tl.where(left == one, -1, left)
            load_row(X, given, one, D, DIM)
            for _step in range(0, steps):
                advance(
                    X, X, FAR, mask, u_row, u_feature, one, step_bits,
                    rho, beta, weights, count, beta_bits, b_k, w_k,
                    D, DIM, PROTOS, HARD, MASK, HAS_BETA, HAS_WEIGHTS,
                )  # fmt: skip
            tl.debug_barrier()
            place = OUT + (problem.to(tl.int64) * rows + one) * D
            for d0 in range(0, D, DIM):
                d = d0 + tl.arange(0, DIM)
                x = tl.load(X + d, mask=d < D, other=0.0)
                tl.store(place + d, x.to(OUT.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=NUMBERS)
def exact_energy_kernel(
    FLAG, V, RHO, BETA, WEIGHTS, OUT, STRIP,
    rows, count, inner, blocks, every, beta_bits,
    v_o, v_i, rho_o, rho_i, b_o, b_i, b_k, w_o, w_i, w_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Energy of the rows whose flag is set."""
    pid = tl.program_id(0)
    X = STRIP + pid.to(tl.int64) * (D + count)
    for block in range(pid, every, tl.num_programs(0)):
        problem, left, met = flags_of(FLAG, block, blocks, rows, ROWS)
        rho = RHO + offset(problem, inner, rho_o, rho_i) * D
        beta = BETA + offset(problem, inner, b_o, b_i)
        weights = WEIGHTS + offset(problem, inner, w_o, w_i)
        given = V + offset(problem, inner, v_o, v_i) * D
        for _ in range(0, met):
            one = tl.max(left, 0)
            left = tl.where(left == one, -1, left)
            load_row(X, given, one, D, DIM)
            top, total = peak(
                X, rho, beta, weights, X + D, count, beta_bits, b_k, w_k,
                D, DIM, PROTOS, False, HAS_BETA, HAS_WEIGHTS,
            )  # fmt: skip
            first = tl.arange(0, 1)
            sharp = sides(beta, weights, first, count, beta_bits, b_k, w_k, HAS_BETA, HAS_WEIGHTS)[
                0
            ]
            energy = -(top + tl.log(total)) / sharp
            place = OUT + problem.to(tl.int64) * rows + one
            tl.store(place + first, energy.to(tl.float32))


# ---- launches ------------------------------------------------------------------------------------


def bits_of(value: float) -> int:
    """The bits of a float64 as a whole number: a kernel takes plain numbers in float32 only."""
    (bits,) = struct.unpack("<q", struct.pack("<d", float(value)))
    return int(bits)


class Operands(NamedTuple):
    """The arguments of a call as the kernels here read them: views [O, I, ...] in float32 or less,
    as they were given.
    """

    batch: tuple[int, ...]
    v: Tensor
    mask: Tensor
    rho: Tensor
    beta: Tensor
    weights: Tensor
    beta_bits: int
    flags: dict[str, bool]  # constants of the kernels
    memory_batch: tuple[int, ...]  # of memories, betas and weights together
    lead: tuple[int, ...]  # [O, I], 1 where all problems share one problem of that batch

    @property
    def problems(self) -> int:
        return self.v.shape[0] * self.v.shape[1]

    @property
    def features(self) -> int:
        return self.v.shape[-1]

    @property
    def memories(self) -> int:
        return self.rho.shape[-2]

    @property
    def memory_strides(self) -> tuple[int, ...]:
        """Batch strides of rho in rows; batch and last strides of beta and weights."""
        found = in_rows(self.rho, self.features)
        for x in (self.beta, self.weights):
            found += (*x.stride()[:2], x.stride(2) if x.shape[2] > 1 else 0)
        return found

    def tile(self) -> dict[str, Any]:
        """Constants and options of a kernel over these operands."""
        blocks_of = MANY if self.problems * self.v.shape[2] > LONG else FEW
        width = min(64, launch.dim(self.features))
        tile = {"DIM": width, "ROWS": blocks_of, "PROTOS": TILE // width}
        if launch.INTERPRETED:  # its cost is by the operation, not by the entry
            tile = {"DIM": 256, "ROWS": 256, "PROTOS": min(256, launch.dim(self.memories))}
        tile["DIM"] = min(tile["DIM"], launch.dim(self.features))
        warps = 4 if self.features <= 128 else 8  # the backward would spill
        return {
            "D": self.features, **tile, "num_warps": warps, "num_stages": 1, "maxnreg": 255,
        }  # fmt: skip


def operands(
    v: Tensor, rho: Tensor, beta: float | Tensor, mask: Tensor | None, log_weights: Tensor | None
) -> Operands:
    """Without a batch of memories all rows are one problem, where strides can say so. The mask has
    N rows of D features.
    """
    rows, memories = launch.rows(v), launch.rows(rho)
    u = rows if mask is None else mask
    sharp = launch.plain(beta) if isinstance(beta, Tensor) else memories
    lift = memories if log_weights is None else launch.plain(log_weights)
    small = [(memories, 2), (sharp, 1 if isinstance(beta, Tensor) else 2)]
    small += [(lift, 2 if log_weights is None else 1)]
    large = [(rows, 2), (u, 2)]
    batch = batch_of(large + small)
    own = batch_of(small)
    flat = arrange((*batch, v.shape[-2]), [(rows, 1), (u, 1)]) if math.prod(own) == 1 else []
    if flat and flat[0].shape[0] == 1 and flat[0].stride(1) == v.shape[-1]:
        views = [x[None] for x in flat]
        views += [x.reshape(1, 1, *x.shape[max(x.ndim - core, 0) :]) for x, core in small]
        views = [x if x.ndim > 2 else x[None] for x in views]
        lead: tuple[int, ...] = (1, 1)
    else:  # a tensor of no memory, whose strides say where the memories' batch goes on
        marks = torch.empty((*own, 1), dtype=torch.float32, device="meta")
        *views, marks = arrange(batch, [*large, *small, (marks, 1)])
        lead = tuple(n if marks.stride(i) else 1 for i, n in enumerate(marks.shape[:2]))
    number = 0.0 if isinstance(beta, Tensor) else float(beta)
    flags = {
        "HARD": math.isinf(number),
        "MASK": mask is not None,
        "HAS_BETA": isinstance(beta, Tensor),
        "HAS_WEIGHTS": log_weights is not None,
    }
    rows, u, memories, sharp, lift = views
    return Operands(batch, rows, u, memories, sharp, lift, bits_of(number), flags, own, lead)


def programs_of(a: Operands, rows: int, block: int, kept: int) -> tuple[int, int, int]:
    """(blocks a problem, blocks of all, programs): `kept` float64 numbers for each program."""
    blocks = triton.cdiv(rows, block)
    every = blocks * a.problems
    return blocks, every, max(1, min(every, PROGRAMS, KEPT // kept)) if every else 0


def recursion(a: Operands, steps: int, step: float, flags: Tensor, out: Tensor) -> None:
    """Write the result of the rows whose flag is set over `out`. One launch."""
    raw = launch.plain(out)
    rows, tile = a.v.shape[2], a.tile()
    blocks, every, programs = programs_of(a, rows, tile["ROWS"], a.features + a.memories)
    strip = launch.empty((programs * (a.features + a.memories),), torch.float64, a.v.device)
    launch.launch(
        exact_recursion_kernel, (programs,), a.v.device,
        flags, a.v, a.mask, a.rho, a.beta, a.weights, raw, strip,
        rows, a.memories, a.v.shape[1], blocks, every, steps, bits_of(step), a.beta_bits,
        *in_rows(a.v, a.features), *a.mask.stride(), *a.memory_strides, **tile, **a.flags,
    )  # fmt: skip
    if raw is not out:
        out.copy_(raw)


def energy(a: Operands, flags: Tensor, out: Tensor) -> None:
    """Write the energy of the rows whose flag is set over `out`. One launch."""
    rows, tile = a.v.shape[2], a.tile()
    blocks, every, programs = programs_of(a, rows, tile["ROWS"], a.features + a.memories)
    strip = launch.empty((programs * (a.features + a.memories),), torch.float64, a.v.device)
    known = {name: a.flags[name] for name in ("HAS_BETA", "HAS_WEIGHTS")}
    launch.launch(
        exact_energy_kernel, (programs,), a.v.device,
        flags, a.v, a.rho, a.beta, a.weights, out, strip,
        rows, a.memories, a.v.shape[1], blocks, every, a.beta_bits,
        *in_rows(a.v, a.features), *a.memory_strides, **tile, **known,
    )  # fmt: skip
