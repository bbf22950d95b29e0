# SPDX-License-Identifier: Apache-2.0
"""The centroids of a call, prepared for its sweep: less an origin near them, and their norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.halves import halves, power
from ..common.operands import arrange, batch_of, in_rows
from ..common.score import load_rows
from ..common.sweep import NUMBERS, offset

# Centroids that an origin is the mean of, at most twice as many: it only has to be near them.
SAMPLE = 1024
PROTOS = 64
# In the place of a score of one that cannot win: finite, so that its bits may be changed.
DEAD = tl.constexpr(-1e38)


class Centroids(NamedTuple):
    """Tables of every problem of the batch of (centroids, shift, mask); `size` is K, full tiles."""

    given: Tensor  # [*own batch, K, D], dense rows
    halves: Tensor  # [*batch, 2, size, stride] float16: c less the origin, scaled, in two parts
    side: Tensor  # [*batch, 2, size]: -|c|^2 / 2, DEAD where it cannot win; |c|, -1 where dead
    origin: Tensor  # [*batch, D] float32
    reach: Tensor  # [*batch, 1]: the largest |c|, -1 where all are dead

    @property
    def size(self) -> int:
        return self.side.shape[-1]


@triton.jit(do_not_specialize=NUMBERS)
def origin_kernel(
    C, GONE, ORIGIN, count, inner, every, c_o, c_i, gone_o, gone_i, gone_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Mean over `every`-th centroid, DIM features a program; 0 where it overflows."""
    problem, d0 = tl.program_id(0), tl.program_id(1) * DIM
    C += offset(problem, inner, c_o, c_i) * D
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


@triton.jit
def there_of(GONE, at, live, gone_k, MASK: tl.constexpr):
    """Which centroids are there, finite or not."""
    there = live
    if MASK:
        there = there & (tl.load(GONE + at * gone_k, mask=live, other=1) == 0)
    return there


@triton.jit
def alive_of(C, GONE, at, live, gone_k, D: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr):
    """Which centroids are there and finite."""
    poison = tl.zeros((at.shape[0],), tl.float32)
    for d0 in range(0, D, DIM):
        poison += tl.sum(load_rows(C, at, live, d0, D, D, DIM) * 0.0, 1)
    return there_of(GONE, at, live & (poison == 0.0), gone_k, MASK)


@triton.jit
def gap_of(C, ORIGIN, at, alive, d0, D: tl.constexpr, DIM: tl.constexpr):
    """Features [d0, d0 + DIM) of centroids less the origin, in float64; 0 where dead."""
    d = d0 + tl.arange(0, DIM)
    origin = tl.load(ORIGIN + d, mask=d < D, other=0.0)[None, :]
    given = load_rows(C, at, alive, d0, D, D, DIM)
    return tl.where(alive[:, None], given.to(tl.float64) - origin.to(tl.float64), 0.0)


@triton.jit(do_not_specialize=NUMBERS)
def norms_kernel(
    C, GONE, ORIGIN, SIDE, count, inner, blocks, size, c_o, c_i, gone_o, gone_i, gone_k,
    D: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr, MASK: tl.constexpr,
    STRICT: tl.constexpr,
):  # fmt: skip
    """Side of PROTOS centroids. STRICT: the norm of one that is there and not finite is NaN, and
    with it the largest norm and every row's result.
    """
    pid = tl.program_id(0)
    problem, k = pid // blocks, (pid % blocks) * PROTOS + tl.arange(0, PROTOS)
    C += offset(problem, inner, c_o, c_i) * D
    GONE += offset(problem, inner, gone_o, gone_i)
    ORIGIN += problem.to(tl.int64) * D
    SIDE += problem.to(tl.int64) * 2 * size
    at = k.to(tl.int64)
    alive = alive_of(C, GONE, at, k < count, gone_k, D, DIM, MASK)
    norm = tl.zeros((PROTOS,), tl.float64)
    for d0 in range(0, D, DIM):
        gap = gap_of(C, ORIGIN, at, alive, d0, D, DIM)
        norm += tl.sum(gap * gap, 1)
    tl.store(SIDE + k, tl.where(alive, -0.5 * norm, DEAD).to(tl.float32))
    length = tl.where(alive, tl.sqrt(norm), -1.0)
    if STRICT:
        there = there_of(GONE, at, k < count, gone_k, MASK)
        length = tl.where(there & ~alive, float("nan"), length)
    tl.store(SIDE + size + k, length.to(tl.float32))


@triton.jit(do_not_specialize=NUMBERS)
def halves_kernel(
    C, ORIGIN, SIDE, REACH, HALVES, inner, blocks, size, c_o, c_i,
    D: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, PROTOS: tl.constexpr,
):  # fmt: skip
    """Both parts of PROTOS centroids, scaled by the largest norm of all."""
    pid = tl.program_id(0)
    problem, k = pid // blocks, (pid % blocks) * PROTOS + tl.arange(0, PROTOS)
    C += offset(problem, inner, c_o, c_i) * D
    ORIGIN += problem.to(tl.int64) * D
    SIDE += problem.to(tl.int64) * 2 * size
    HALVES += problem.to(tl.int64) * 2 * size * STRIDE
    at = k.to(tl.int64)
    alive = tl.load(SIDE + size + k) >= 0.0
    grow = power(tl.load(REACH + problem))
    for d0 in range(0, STRIDE, DIM):
        gap = gap_of(C, ORIGIN, at, alive, d0, D, DIM).to(tl.float32)
        high, low = halves(gap * grow)
        where = HALVES + at[:, None] * STRIDE + (d0 + tl.arange(0, DIM))[None, :]
        tl.store(where, high)
        tl.store(where + tl.cast(size, tl.int64) * STRIDE, low)


def _origin(
    given: Tensor, shift: Tensor | None, batch: tuple[int, ...], views: tuple[Any, ...]
) -> Tensor:
    """The shift, or a point near the centroids."""
    d = given.shape[-1]
    if shift is not None:
        return torch.nan_to_num(shift.float(), 0.0, 0.0, 0.0).expand(*batch, d).contiguous()
    c, gone, strides, options = views
    origin = launch.empty((*batch, d), torch.float32, given.device)
    every = max(1, given.shape[-2] // SAMPLE)
    grid = (c.shape[0] * c.shape[1], triton.cdiv(d, options["DIM"]))
    launch.launch(
        origin_kernel, grid, given.device, c, gone, origin, given.shape[-2], c.shape[1], every,
        *strides, **options,
    )  # fmt: skip
    return origin


def centroids(
    given: Tensor, shift: Tensor | None, mask: Tensor | None, width: int, strict: bool = False
) -> Centroids:
    """Prepare them, in rows of whole pieces of `width` features: a launch for the origin unless the
    shift is it, one for the norms, one for the parts. `strict`: a centroid that takes part and is
    not finite leaves no row a label.
    """
    given = launch.rows(given)
    count, d = given.shape[-2:]
    gone = given if mask is None else mask.view(torch.uint8)
    operands = [(given, 2)]
    operands += [] if shift is None else [(shift, 1)]
    operands += [] if mask is None else [(gone, 1)]
    batch = batch_of(operands)
    c, gone = arrange(batch, [(given, 2), (gone, 2 if mask is None else 1)])
    lost = (*gone.stride()[:2], gone.stride(2) if mask is not None else 0)
    options = {"MASK": mask is not None, "PROTOS": PROTOS, "num_warps": 4, "num_stages": 1}
    options |= {"D": d, "DIM": min(32, launch.dim(d)), "maxnreg": 255}
    origin = _origin(given, shift, batch, (c, gone, (*in_rows(c, d), *lost), options))
    blocks, stride = triton.cdiv(count, PROTOS), triton.cdiv(d, width) * width
    size = blocks * PROTOS
    side = launch.empty((*batch, 2, size), torch.float32, given.device)
    parts = launch.empty((*batch, 2, size, stride), torch.float16, given.device)
    grid, shape = (c.shape[0] * c.shape[1] * blocks,), (c.shape[1], blocks, size)
    launch.launch(
        norms_kernel, grid, given.device, c, gone, origin, side, count, *shape,
        *in_rows(c, d), *lost, **options, STRICT=strict,
    )  # fmt: skip
    reach = side[..., 1, :].amax(-1, True)
    del options["MASK"]
    launch.launch(
        halves_kernel, grid, given.device, c, origin, side, reach, parts, *shape,
        *in_rows(c, d), **options, STRIDE=stride,
    )  # fmt: skip
    return Centroids(given, parts, side, origin, reach)
