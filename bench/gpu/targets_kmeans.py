# SPDX-License-Identifier: Apache-2.0
"""The k-means family on a GPU: its targets, its calls, and the memory that they may use."""

from __future__ import annotations

import torch

from .cases import Family, Goal, Invocation, Target, Work
from .contests_kmeans import assignment, blobs, iteration, step

MIB = 1 << 20


def make(op: str, shape: tuple[int, ...], device: str, seed: int) -> Invocation:
    """A call of an op: with every optional argument if N is small, with none if N is large."""
    n, k, d = shape
    x, centroids = blobs(max(n, k), d, k, device, seed)
    x = x[:n]
    generator = torch.Generator(device).manual_seed(seed + 1)
    rich = n < 1000
    shift = centroids.mean(0) if rich else None
    masked = torch.zeros(k, dtype=torch.bool, device=device)
    masked[1::5] = True
    mask = masked if rich else None
    if op == "kmeans_assign":
        return Invocation(op, (x, centroids, shift, mask, True), (0,))
    labels = torch.randint(k, (n,), generator=generator, device=device)
    weight = torch.rand(n, generator=generator, device=device) if rich else None
    if op == "kmeans_step":
        return Invocation(op, (x, centroids, weight, shift, mask), (0,), (), (2,) if rich else ())
    lines = (1, 3) if rich else (1,)
    return Invocation(op, (x, labels, k, weight, shift), (0,), (), lines)


def allowance(call: Invocation, backward: bool) -> int:
    """16 bytes a row, 64 an entry of the centroids (they and their copies), and a fixed workspace;
    sums add 24 bytes a row for the order and the pieces.
    """
    n, d = call.args[0].shape[-2:]
    adds = call.op in FAMILY.sums
    k = call.args[2] if call.op == "kmeans_update" else call.args[1].shape[-2]
    return int((16 + 24 * adds) * n + 64 * k * d) + 128 * MIB


def _iteration(mode: str, unit: str) -> Target:
    n, d, k = 10_000_000, 64, 256
    work = Work(8.0 * n * d, 2.0 * n * k * d, unit)
    goal = Goal(4.5, {"flash": 1.0, "fast_pytorch": 5.0, "cuml": 3.0}, error="labels")
    return Target(
        "7", "Lloyd iteration 10M x64 K256", "kmeans_assign", mode, {"n": n, "d": d, "k": k}, work,
        goal, iteration, note="exact labels, sums in a fixed order",
    )  # fmt: skip


def _step() -> Target:
    n, d, k = 10_000_000, 16, 64
    work = Work(4.0 * n * d + 8.0 * n, 2.0 * n * k * d, "bf16x3")
    goal = Goal(0.6, {"two_ops": 1.0, "flash": 1.0}, error="labels")
    return Target(
        "7s", "kmeans_step 10M x16 K64", "kmeans_step", "high", {"n": n, "d": d, "k": k}, work,
        goal, step, note="one pass over the rows",
    )  # fmt: skip


def _assignment() -> Target:
    n, d, k = 1_000_000, 128, 1024
    work = Work(2.0 * n * d, 2.0 * n * k * d, "bf16")
    goal = Goal(0.66, {"flash": 1.0, "eager": 1.0}, error="labels")
    return Target(
        "8", "kmeans_assign 1M x128 K1024, bf16 rows", "kmeans_assign", "medium",
        {"n": n, "d": d, "k": k}, work, goal, assignment, dtype="bfloat16",
    )  # fmt: skip


FAMILY = Family(
    name="kmeans",
    targets=(
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
