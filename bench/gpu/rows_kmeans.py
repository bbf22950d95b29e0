# SPDX-License-Identifier: Apache-2.0
"""The k-means family on a GPU: its target rows, its calls and what they may hold."""

from __future__ import annotations

import torch

from .bouts_kmeans import assignment, blobs, iteration, step
from .cases import Family, Invocation, Row, Target, Work

MIB = 1 << 20


def make(op: str, shape: tuple[int, ...], device: str, seed: int) -> Invocation:
    """A call of an op with every optional argument in use where N is small, none where it is
    large.
    """
    n, k, d = shape
    x, centroids = blobs(max(n, k), d, k, device, seed)
    x = x[:n]
    generator = torch.Generator(device).manual_seed(seed + 1)
    rich = n < 1000
    shift = centroids.mean(0) if rich else None
    gone = torch.zeros(k, dtype=torch.bool, device=device)
    gone[1::5] = True
    mask = gone if rich else None
    if op == "kmeans_assign":
        return Invocation(op, (x, centroids, shift, mask, True), (0,))
    labels = torch.randint(k, (n,), generator=generator, device=device)
    weight = torch.rand(n, generator=generator, device=device) if rich else None
    if op == "kmeans_step":
        return Invocation(op, (x, centroids, weight, shift, mask), (0,), (), (2,) if rich else ())
    lines = (1, 3) if rich else (1,)
    return Invocation(op, (x, labels, k, weight, shift), (0,), (), lines)


def allowance(call: Invocation, backward: bool) -> int:
    """16 bytes a row, 8 an entry of the centroids and their copies, and a fixed workspace; sums add
    order and pieces of the rows.
    """
    n, d = call.args[0].shape[-2:]
    adds = call.op in FAMILY.sums
    k = call.args[2] if call.op == "kmeans_update" else call.args[1].shape[-2]
    return int((16 + 24 * adds) * n + 64 * k * d) + 128 * MIB


def _iteration(mode: str, unit: str) -> Row:
    n, d, k = 10_000_000, 64, 256
    work = Work(8.0 * n * d, 2.0 * n * k * d, unit)
    target = Target(4.5, {"flash": 1.0, "fast_pytorch": 5.0, "cuml": 3.0}, error="labels")
    return Row(
        "7", "Lloyd iteration 10M x64 K256", "kmeans_assign", mode, {"n": n, "d": d, "k": k}, work,
        target, iteration, note="exact labels, sums in a fixed order",
    )  # fmt: skip


def _step() -> Row:
    n, d, k = 10_000_000, 16, 64
    work = Work(4.0 * n * d + 8.0 * n, 2.0 * n * k * d, "bf16x3")
    target = Target(0.6, {"two_ops": 1.0, "flash": 1.0}, error="labels")
    return Row(
        "7s", "kmeans_step 10M x16 K64", "kmeans_step", "high", {"n": n, "d": d, "k": k}, work,
        target, step, note="one pass over the rows",
    )  # fmt: skip


def _assignment() -> Row:
    n, d, k = 1_000_000, 128, 1024
    work = Work(2.0 * n * d, 2.0 * n * k * d, "bf16")
    target = Target(0.66, {"flash": 1.0, "eager": 1.0}, error="labels")
    return Row(
        "8", "kmeans_assign 1M x128 K1024, bf16 rows", "kmeans_assign", "medium",
        {"n": n, "d": d, "k": k}, work, target, assignment, dtype="bfloat16",
    )  # fmt: skip


FAMILY = Family(
    name="kmeans",
    rows=(
        _iteration("highest", "bf16x3"),
        _iteration("high", "bf16x3"),
        _step(),
        _assignment(),
    ),
    make=make,
    tiny=((70, 13, 5), (1, 13, 5), (70, 1, 5), (70, 64, 16), (70, 13, 40), (70, 13, 200)),
    small=(1001, 33, 16),
    large=((2_000_000, 1024, 16),),
    wide=((40_000_000, 8, 64),),
    allowance=allowance,
    captured=("kmeans_assign", "kmeans_update"),
    compiled=("kmeans_assign",),
    sums=("kmeans_update", "kmeans_step"),
)
