# SPDX-License-Identifier: Apache-2.0
"""The second launch of an associative-memory call: it computes the rows whose flag is set again.

A fast kernel sets the flags (`am/doubt.py`). The kernels here compute everything of such a row from
differences of the caller's rows and memories, in float64, one row at a time. A program without a
flagged row reads its flags and nothing else. Any fast kernel may come before this launch, if it
writes one byte for each row of the output.
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
from ..common.fold import NO_INDEX
from ..common.operands import arrange, batch_of, by_name, in_rows, of_each
from ..common.sweep import UNSPECIALISED, of_problem, offset, rows_of
from ..kmeans.nearest import TIE

# Float64 numbers in the strips of scratch of all programs of a launch (64 MB).
STRIPS = 1 << 23
# Rows of a block: few, so that a short call has many blocks; more for a call of over LONG rows.
SHORT_BLOCK, LONG_BLOCK, LONG = 32, 1024, 1 << 19
# Entries of a tile in float64.
TILE = 2048


# ---- one row -------------------------------------------------------------------------------------


@triton.jit
def number(bits):
    """The float64 with these bits."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)


@triton.jit
def sides(
    BETA, WEIGHTS, k, count, beta_bits, beta_k, weights_k,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """(betas, log-weights, which are active) of the memories k [PROTOS], in float64."""
    valid, at = k < count, k.to(tl.int64)
    beta = tl.zeros((k.shape[0],), tl.float64) + number(beta_bits)
    lift = tl.zeros((k.shape[0],), tl.float64)
    if HAS_BETA:
        beta = tl.load(BETA + at * beta_k, mask=valid, other=0.0).to(tl.float64)
    if HAS_WEIGHTS:
        lift = tl.load(WEIGHTS + at * weights_k, mask=valid, other=0.0).to(tl.float64)
    return beta, lift, valid & (lift != float("-inf"))


@triton.jit
def gaps(X, RHO, k, active, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of rho_k - x, [PROTOS, DIM], 0 beyond the edges; X is in float64."""
    d = d0 + tl.arange(0, DIM)
    inside = active[:, None] & (d < D)[None, :]  # [PROTOS, DIM]
    # [PROTOS, DIM]
    rho = tl.load(RHO + k.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
    x = tl.load(X + d, mask=d < D, other=0.0)
    return tl.where(inside, rho.to(tl.float64) - x[None, :], 0.0)


@triton.jit
def peak(
    X, RHO, BETA, WEIGHTS, FAR, count, beta_bits, beta_k, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, HARD: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """(top, total) of a row: z_k = log_weight_k - beta_k |rho_k - x|^2, top = max_k z_k, total =
    sum_k exp(z_k - top). FAR [count] takes the squared distances. HARD: z_k = -|rho_k - x|^2.
    """
    tl.debug_barrier()
    top = tl.full((1,), float("-inf"), tl.float64)
    total = tl.zeros((1,), tl.float64)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        beta, lift, active = sides(
            BETA, WEIGHTS, k, count, beta_bits, beta_k, weights_k, HAS_BETA, HAS_WEIGHTS
        )
        far = tl.zeros((PROTOS,), tl.float64)
        for d0 in range(0, D, DIM):
            t = gaps(X, RHO, k, active, d0, D, DIM)  # [PROTOS, DIM]
            far += tl.sum(t * t, 1)
        tl.store(FAR + k, far, mask=k < count)
        z = -far if HARD else lift - beta * far
        z = tl.where(active, z, float("-inf"))
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
    """(weights, betas, squared distances, which are active) of the memories k [PROTOS]; `chosen` is
    the largest logit, or the index of the nearest memory.
    """
    beta, lift, active = sides(
        BETA, WEIGHTS, k, count, beta_bits, beta_k, weights_k, HAS_BETA, HAS_WEIGHTS
    )
    far = tl.load(FAR + k, mask=k < count, other=0.0)
    if HARD:
        p = tl.where(k == chosen, 1.0, 0.0).to(tl.float64)
    else:
        p = tl.where(active, tl.exp(lift - beta * far - chosen) / total, 0.0)
    return p, beta, far, active


@triton.jit
def first_nearest(
    FAR, BETA, WEIGHTS, count, least, weights_k,
    PROTOS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The lowest index of the active memories with distance <= least (1 + TIE)."""
    index = tl.full((1,), NO_INDEX, tl.int32)
    for k0 in range(0, count, PROTOS):
        k = k0 + tl.arange(0, PROTOS)
        _beta, _lift, active = sides(BETA, WEIGHTS, k, count, 0, 0, weights_k, False, HAS_WEIGHTS)
        far = tl.load(FAR + k, mask=k < count, other=0.0)
        tied = active & (far <= least + least * TIE)
        index = tl.minimum(index, tl.min(tl.where(tied, k, NO_INDEX), 0))
    return index


@triton.jit
def chosen_of(
    X, RHO, BETA, WEIGHTS, FAR, count, beta_bits, beta_k, weights_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, HARD: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """(largest logit or index of the nearest, sum of weights) of a row, for `weights_of`."""
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
    """Store x + gain sum_k p_k (rho_k - x) to NEXT, with x from X; both may be the same place."""
    chosen, total = chosen_of(
        X, RHO, BETA, WEIGHTS, FAR, count, beta_bits, beta_k, weights_k,
        D, DIM, PROTOS, HARD, HAS_BETA, HAS_WEIGHTS,
    )  # fmt: skip
    for d0 in range(0, D, DIM):
        d = d0 + tl.arange(0, DIM)
        pull = tl.zeros((DIM,), tl.float64)
        for k0 in range(0, count, PROTOS):
            k = k0 + tl.arange(0, PROTOS)
            p, _, _, active = weights_of(
                FAR, BETA, WEIGHTS, k, count, chosen, total, beta_bits, beta_k, weights_k,
                HARD, HAS_BETA, HAS_WEIGHTS,
            )  # fmt: skip
            pull += tl.sum(p[:, None] * gaps(X, RHO, k, active, d0, D, DIM), 0)
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
        raw = tl.load(V + tl.cast(one, tl.int64) * D + d, mask=d < D, other=0.0)
        tl.store(X + d, raw.to(tl.float64), mask=d < D)


@triton.jit
def memories_and_rows(RHO, V, problem, inner, rho_o, rho_i, v_o, v_i, D: tl.constexpr):
    """Where the memories and the rows of a problem begin."""
    return RHO + offset(problem, inner, rho_o, rho_i) * D, V + offset(problem, inner, v_o, v_i) * D


@triton.jit
def flags_of(FLAG, block, blocks, rows, ROWS: tl.constexpr):
    """(problem, rows [ROWS] whose flag is set, else -1, how many are) of a block."""
    problem, row = rows_of(block, 0, blocks, ROWS)
    at = FLAG + problem.to(tl.int64) * rows + row
    left = tl.load(at, mask=row < rows, other=0) != 0
    return problem, tl.where(left, row, -1), tl.sum(left.to(tl.int32), 0)


# ---- forward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALISED)
def exact_recursion_kernel(
    FLAG, V, U, RHO, BETA, WEIGHTS, OUT, STRIP,
    rows, count, inner, blocks, every, steps, step_bits, beta_bits,
    v_o, v_i, u_o, u_i, u_row, u_feature, rho_o, rho_i, b_o, b_i, b_k, w_o, w_i, w_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    HARD: tl.constexpr, MASK: tl.constexpr, HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """All steps x <- x + gain sum_k p_k (rho_k - x) of the rows whose flag is set, in `every`
    blocks of ROWS rows; p_k = exp(z_k - top) / total, with z, top and total as in `peak`.
    """
    pid = tl.program_id(0)
    X = STRIP + pid.to(tl.int64) * (D + count)
    FAR = X + D
    for block in range(pid, every, tl.num_programs(0)):
        problem, left, flag_count = flags_of(FLAG, block, blocks, rows, ROWS)
        rho, raw = memories_and_rows(RHO, V, problem, inner, rho_o, rho_i, v_o, v_i, D)
        beta = of_problem(BETA, problem, inner, b_o, b_i, HAS_BETA)
        weights = of_problem(WEIGHTS, problem, inner, w_o, w_i, HAS_WEIGHTS)
        mask = of_problem(U, problem, inner, u_o, u_i, MASK)
        for _ in range(0, flag_count):
            one = tl.max(left, 0)
            left = tl.where(left == one, -1, left)
            load_row(X, raw, one, D, DIM)
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


@triton.jit(do_not_specialize=UNSPECIALISED)
def exact_energy_kernel(
    FLAG, V, RHO, BETA, WEIGHTS, OUT, STRIP,
    rows, count, inner, blocks, every, beta_bits,
    v_o, v_i, rho_o, rho_i, b_o, b_i, b_k, w_o, w_i, w_k,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PROTOS: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Energy -log(sum_k exp(z_k)) / beta of the rows whose flag is set; z as in `peak`."""
    pid = tl.program_id(0)
    X = STRIP + pid.to(tl.int64) * (D + count)
    for block in range(pid, every, tl.num_programs(0)):
        problem, left, flag_count = flags_of(FLAG, block, blocks, rows, ROWS)
        rho, raw = memories_and_rows(RHO, V, problem, inner, rho_o, rho_i, v_o, v_i, D)
        beta = of_problem(BETA, problem, inner, b_o, b_i, HAS_BETA)
        weights = of_problem(WEIGHTS, problem, inner, w_o, w_i, HAS_WEIGHTS)
        for _ in range(0, flag_count):
            one = tl.max(left, 0)
            left = tl.where(left == one, -1, left)
            load_row(X, raw, one, D, DIM)
            top, total = peak(
                X, rho, beta, weights, X + D, count, beta_bits, b_k, w_k,
                D, DIM, PROTOS, False, HAS_BETA, HAS_WEIGHTS,
            )  # fmt: skip
            first = tl.arange(0, 1)
            sharp, _lift, _active = sides(
                beta, weights, first, count, beta_bits, b_k, w_k, HAS_BETA, HAS_WEIGHTS
            )
            energy = -(top + tl.log(total)) / sharp
            place = OUT + problem.to(tl.int64) * rows + one
            tl.store(place + first, energy.to(tl.float32))


# ---- launches ------------------------------------------------------------------------------------


def bits_of(value: float) -> int:
    """The bits of a float64 as a whole number: triton passes a float to a kernel in float32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", float(value)))
    return int(bits)


class Operands(NamedTuple):
    """The arguments of a call as the kernels here read them: views [O, I, ...] of the caller's
    tensors, in float32 or less.
    """

    batch: tuple[int, ...]
    v: Tensor
    mask: Tensor | None
    rho: Tensor
    beta: Tensor | None
    weights: Tensor | None
    beta_bits: int
    hard: bool
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

    def arguments(self) -> dict[str, Any]:
        """The rows and the memories; their batch strides are in rows."""
        return {
            "V": self.v,
            **by_name(("v_o", "v_i"), in_rows(self.v, self.features)),
            "RHO": self.rho,
            **by_name(("rho_o", "rho_i"), in_rows(self.rho, self.features)),
            "BETA": self.beta,
            **by_name(("b_o", "b_i", "b_k"), of_each(self.beta)),
            "WEIGHTS": self.weights,
            **by_name(("w_o", "w_i", "w_k"), of_each(self.weights)),
            "rows": self.v.shape[2],
            "count": self.memories,
            "inner": self.v.shape[1],
            "beta_bits": self.beta_bits,
            "HAS_BETA": self.beta is not None,
            "HAS_WEIGHTS": self.weights is not None,
        }

    def update_mask(self) -> dict[str, Any]:
        """The update mask, if the call has one."""
        strides = None if self.mask is None else self.mask.stride()
        names = ("u_o", "u_i", "u_row", "u_feature")
        return {"U": self.mask, **by_name(names, strides), "MASK": self.mask is not None}

    def tile(self) -> dict[str, Any]:
        """Constants and options of a kernel over these operands."""
        blocks_of = LONG_BLOCK if self.problems * self.v.shape[2] > LONG else SHORT_BLOCK
        width = min(64, launch.dim(self.features))
        tile = {"DIM": width, "ROWS": blocks_of, "PROTOS": TILE // width}
        if launch.INTERPRETED:  # the interpreter pays for each operation, not for each entry
            tile = {"DIM": 256, "ROWS": 256, "PROTOS": min(256, launch.dim(self.memories))}
        tile["DIM"] = min(tile["DIM"], launch.dim(self.features))
        warps = 4 if self.features <= 128 else 8  # the backward would spill
        return {
            "D": self.features, **tile, "num_warps": warps, "num_stages": 1, "maxnreg": 255,
        }  # fmt: skip


def operands(
    v: Tensor, rho: Tensor, beta: float | Tensor, mask: Tensor | None, log_weights: Tensor | None
) -> Operands:
    """The operands of a call. Without a batch of memories all rows are one problem, where strides
    allow it. The mask has N rows of D features.
    """
    large = [launch.rows(v)] + ([] if mask is None else [mask])
    small = [(launch.rows(rho), 2)]
    small += [(launch.plain(x), 1) for x in (beta, log_weights) if isinstance(x, Tensor)]
    batch = batch_of([*((x, 2) for x in large), *small])
    own = batch_of(small)
    merged = (*batch, v.shape[-2])
    flat = arrange(merged, [(x, 1) for x in large]) if math.prod(own) == 1 else []
    if flat and flat[0].shape[0] == 1 and flat[0].stride(1) == v.shape[-1]:
        views = [x[None] for x in flat]
        views += [x.reshape(1, 1, *x.shape[max(x.ndim - core, 0) :]) for x, core in small]
        views = [x if x.ndim > 2 else x[None] for x in views]
        lead: tuple[int, ...] = (1, 1)
    else:  # strides of an empty tensor tell along which dims the memories have a batch
        marks = torch.empty((*own, 1), dtype=torch.float32, device="meta")
        *views, marks = arrange(batch, [*((x, 2) for x in large), *small, (marks, 1)])
        lead = tuple(n if marks.stride(i) else 1 for i, n in enumerate(marks.shape[:2]))
    number = 0.0 if isinstance(beta, Tensor) else float(beta)
    queue = iter(views)
    return Operands(
        batch=batch,
        v=next(queue),
        mask=None if mask is None else next(queue),
        rho=next(queue),
        beta=next(queue) if isinstance(beta, Tensor) else None,
        weights=None if log_weights is None else next(queue),
        beta_bits=bits_of(number),
        hard=math.isinf(number),
        memory_batch=own,
        lead=lead,
    )


def programs_of(a: Operands, rows: int, block: int, size: int) -> tuple[int, int, int]:
    """(blocks of a problem, blocks of all, programs); a program has `size` numbers of scratch."""
    blocks = triton.cdiv(rows, block)
    every = blocks * a.problems
    return blocks, every, max(1, min(every, launch.PROGRAMS, STRIPS // size)) if every else 0


def recursion(a: Operands, steps: int, step: float, flags: Tensor, out: Tensor) -> None:
    """Overwrite in `out` the rows whose flag is set. One launch."""
    raw = launch.plain(out)
    rows, tile = a.v.shape[2], a.tile()
    blocks, every, programs = programs_of(a, rows, tile["ROWS"], a.features + a.memories)
    strip = launch.empty((programs * (a.features + a.memories),), torch.float64, a.v.device)
    launch.launch(
        exact_recursion_kernel, (programs,), a.v.device,
        **a.arguments(), **a.update_mask(), FLAG=flags, OUT=raw, STRIP=strip,
        blocks=blocks, every=every, steps=steps, step_bits=bits_of(step), **tile, HARD=a.hard,
    )  # fmt: skip
    if raw is not out:
        out.copy_(raw)


def energy(a: Operands, flags: Tensor, out: Tensor) -> None:
    """Overwrite in `out` the energy of the rows whose flag is set. One launch."""
    rows, tile = a.v.shape[2], a.tile()
    blocks, every, programs = programs_of(a, rows, tile["ROWS"], a.features + a.memories)
    strip = launch.empty((programs * (a.features + a.memories),), torch.float64, a.v.device)
    launch.launch(
        exact_energy_kernel, (programs,), a.v.device,
        **a.arguments(), FLAG=flags, OUT=out, STRIP=strip, blocks=blocks, every=every, **tile,
    )  # fmt: skip
