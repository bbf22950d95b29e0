# SPDX-License-Identifier: Apache-2.0
"""The centroids of a call, prepared for its sweep: minus an origin near them, and their norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.halves import halves, power
from ..common.operands import arrange, batch_of, by_name, in_rows
from ..common.score import load_rows
from ..common.sweep import UNSPECIALISED, of_problem, offset, rows_of

# The origin is the mean of at least so many centroids and at most twice as many: near them
# suffices.
SAMPLE = 1024
PROTOS = 64
# The score of a masked centroid: finite, because `ranks_fold` changes bits of it.
MASKED_SCORE = tl.constexpr(-1e38)


class Centroids(NamedTuple):
    """Tables of every problem of the batch of (centroids, shift, mask); `size` is K, full tiles."""

    rows: Tensor  # [*own batch, K, D], the caller's, dense
    halves: Tensor  # [*batch, 2, size, stride] float16: c minus the origin, scaled, in two parts
    side: Tensor  # [*batch, 2, size]: -|c|^2 / 2, MASKED_SCORE where masked; |c|, -1 where masked
    origin: Tensor  # [*batch, D] float32
    reach: Tensor  # [*batch, 1]: the largest |c|, -1 where all are masked

    @property
    def size(self) -> int:
        return self.side.shape[-1]


@triton.jit(do_not_specialize=UNSPECIALISED)
def origin_kernel(
    C, MASKED, ORIGIN, count, inner, every, c_o, c_i, masked_o, masked_i, masked_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """ORIGIN = sum_k c_k / sum_k 1 over every `every`-th centroid that is active, each feature
    over its finite values, DIM features a program; 0 where it overflows. The kernel reads MASKED, 1
    where a centroid is masked, if MASK.
    """
    problem, d0 = tl.program_id(0), tl.program_id(1) * DIM
    C += offset(problem, inner, c_o, c_i) * D
    MASKED = of_problem(MASKED, problem, inner, masked_o, masked_i, MASK)
    total, finite_count = tl.zeros((DIM,), tl.float32), tl.zeros((DIM,), tl.float32)
    for k0 in range(0, count, PROTOS * every):
        k = (k0 + tl.arange(0, PROTOS) * every).to(tl.int64)
        valid = k < count
        if MASK:
            valid = valid & (tl.load(MASKED + k * masked_k, mask=valid, other=1) == 0)
        c = load_rows(C, k, valid, d0, D, D, DIM)  # [PROTOS, DIM]
        real = valid[:, None] & (c * 0.0 == 0.0)  # [PROTOS, DIM]
        total += tl.sum(tl.where(real, c, 0.0), 0)
        finite_count += tl.sum(real.to(tl.float32), 0)
    mean = total / tl.maximum(finite_count, 1.0)
    d = d0 + tl.arange(0, DIM)
    at = ORIGIN + problem.to(tl.int64) * D + d
    tl.store(at, tl.where(mean * 0.0 == 0.0, mean, 0.0), mask=d < D)


@triton.jit
def block_of(
    C, ORIGIN, SIDE, inner, blocks, size, c_o, c_i, D: tl.constexpr, PROTOS: tl.constexpr
):  # fmt: skip
    """(problem, k [PROTOS], C, ORIGIN, SIDE): a program's problem, its centroids, and where the
    operands of the problem begin.
    """
    problem, k = rows_of(tl.program_id(0), 0, blocks, PROTOS)
    C += offset(problem, inner, c_o, c_i) * D
    p = problem.to(tl.int64)
    return problem, k, C, ORIGIN + p * D, SIDE + p * 2 * size


@triton.jit
def active_of(MASKED, at, valid, masked_k, MASK: tl.constexpr):
    """Which centroids are active, finite or not."""
    active = valid
    if MASK:
        active = active & (tl.load(MASKED + at * masked_k, mask=valid, other=1) == 0)
    return active


@triton.jit
def finite_of(
    C, MASKED, at, valid, masked_k, D: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr
):
    """Which centroids are active and finite."""
    poison = tl.zeros((at.shape[0],), tl.float32)
    for d0 in range(0, D, DIM):
        poison += tl.sum(load_rows(C, at, valid, d0, D, D, DIM) * 0.0, 1)
    return active_of(MASKED, at, valid & (poison == 0.0), masked_k, MASK)


@triton.jit
def gap_of(C, ORIGIN, at, active, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of centroids minus the origin, in float64; 0 where not `active`."""
    d = d0 + tl.arange(0, DIM)
    origin = tl.load(ORIGIN + d, mask=d < D, other=0.0)[None, :]  # [1, DIM]
    raw = load_rows(C, at, active, d0, D, D, DIM)  # [PROTOS, DIM]
    return tl.where(active[:, None], raw.to(tl.float64) - origin.to(tl.float64), 0.0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norms_kernel(
    C, MASKED, ORIGIN, SIDE, count, inner, blocks, size, c_o, c_i, masked_o, masked_i, masked_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, MASK: tl.constexpr,
    STRICT: tl.constexpr,
):  # fmt: skip
    """SIDE of PROTOS centroids: -|c|^2 / 2 and |c|, with c minus the origin; MASKED_SCORE and -1
    where masked or not finite. STRICT: the norm of an active centroid that is not finite is NaN,
    and with it the largest norm and every row's result.
    """
    problem, k, C, ORIGIN, SIDE = block_of(
        C, ORIGIN, SIDE, inner, blocks, size, c_o, c_i, D, PROTOS
    )
    MASKED = of_problem(MASKED, problem, inner, masked_o, masked_i, MASK)
    at = k.to(tl.int64)
    active = finite_of(C, MASKED, at, k < count, masked_k, D, DIM, MASK)
    norm = tl.zeros((PROTOS,), tl.float64)
    for d0 in range(0, D, DIM):
        gap = gap_of(C, ORIGIN, at, active, d0, D, DIM)  # [PROTOS, DIM]
        norm += tl.sum(gap * gap, 1)
    tl.store(SIDE + k, tl.where(active, -0.5 * norm, MASKED_SCORE).to(tl.float32))
    length = tl.where(active, tl.sqrt(norm), -1.0)
    if STRICT:
        unmasked = active_of(MASKED, at, k < count, masked_k, MASK)
        length = tl.where(unmasked & ~active, float("nan"), length)
    tl.store(SIDE + size + k, length.to(tl.float32))


@triton.jit(do_not_specialize=UNSPECIALISED)
def halves_kernel(
    C, ORIGIN, SIDE, REACH, HALVES, inner, blocks, size, c_o, c_i,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
):  # fmt: skip
    """Both parts of (c - origin) * power(reach) for PROTOS centroids; reach is the largest norm."""
    problem, k, C, ORIGIN, SIDE = block_of(
        C, ORIGIN, SIDE, inner, blocks, size, c_o, c_i, D, PROTOS
    )
    HALVES += problem.to(tl.int64) * 2 * size * STRIDE
    at = k.to(tl.int64)
    active = tl.load(SIDE + size + k) >= 0.0
    grow = power(tl.load(REACH + problem))
    for d0 in range(0, STRIDE, DIM):
        gap = gap_of(C, ORIGIN, at, active, d0, D, DIM).to(tl.float32)  # [PROTOS, DIM]
        high, low = halves(gap * grow)  # two of [PROTOS, DIM]
        where = HALVES + at[:, None] * STRIDE + (d0 + tl.arange(0, DIM))[None, :]  # [PROTOS, DIM]
        tl.store(where, high)
        tl.store(where + tl.cast(size, tl.int64) * STRIDE, low)


def _origin(
    problems: int, count: int, operands: dict[str, Any], batch: tuple[int, ...], device: Any
) -> Tensor:
    """A point near the centroids of every problem."""
    d = operands["D"]
    origin = launch.empty((*batch, d), torch.float32, device)
    launch.launch(
        origin_kernel, (problems, triton.cdiv(d, operands["DIM"])), device,
        **operands, ORIGIN=origin, count=count, every=max(1, count // SAMPLE),
    )  # fmt: skip
    return origin


def centroids(
    c: Tensor, shift: Tensor | None, mask: Tensor | None, width: int, strict: bool = False
) -> Centroids:
    """Prepare the centroids, in rows of whole pieces of `width` features: one launch for the norms,
    one for the parts, and one for the origin unless the shift is the origin. `strict`: if an active
    centroid is not finite, no row gets a label.
    """
    rows = launch.rows(c)
    (count, d), device = rows.shape[-2:], rows.device
    operands = [(rows, 2)]
    operands += [] if shift is None else [(shift, 1)]
    operands += [] if mask is None else [(mask.view(torch.uint8), 1)]
    batch = batch_of(operands)
    view, *masks = arrange(batch, [operands[0], *([] if mask is None else operands[-1:])])
    masked, problems = masks[0] if masks else None, view.shape[0] * view.shape[1]
    common = {
        "C": view, **by_name(("c_o", "c_i"), in_rows(view, d)), "inner": view.shape[1],
        "D": d, "DIM": min(32, launch.dim(d)), "PROTOS": PROTOS,
        "num_warps": 4, "num_stages": 1, "maxnreg": 255,
    }  # fmt: skip
    mask_arguments = {"MASKED": masked, "MASK": masked is not None}
    mask_arguments |= by_name(
        ("masked_o", "masked_i", "masked_k"), None if masked is None else masked.stride()
    )
    if shift is None:
        origin = _origin(problems, count, common | mask_arguments, batch, device)
    else:
        origin = torch.nan_to_num(shift.float(), 0.0, 0.0, 0.0).expand(*batch, d).contiguous()
    blocks, stride = triton.cdiv(count, PROTOS), triton.cdiv(d, width) * width
    size = blocks * PROTOS
    side = launch.empty((*batch, 2, size), torch.float32, device)
    parts = launch.empty((*batch, 2, size, stride), torch.float16, device)
    common |= {"ORIGIN": origin, "SIDE": side, "blocks": blocks, "size": size}
    launch.launch(
        norms_kernel, (problems * blocks,), device, **common, **mask_arguments,
        count=count, STRICT=strict,
    )  # fmt: skip
    reach = side[..., 1, :].amax(-1, True)
    launch.launch(
        halves_kernel, (problems * blocks,), device, **common,
        REACH=reach, HALVES=parts, STRIDE=stride,
    )  # fmt: skip
    return Centroids(rows, parts, side, origin, reach)
