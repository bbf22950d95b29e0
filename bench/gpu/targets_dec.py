# SPDX-License-Identifier: Apache-2.0
"""Deep embedded clustering on a GPU: its target, its calls, and the memory that they may use."""

from __future__ import annotations

from typing import Any

import torch

from .cases import PERIOD, Family, Goal, Invocation, Target, Work
from .contests_dec import embeddings, trained

MIB = 1 << 20


def make(op: str, shape: tuple[int, ...], device: str, seed: int) -> Invocation:
    """A call of an op with every optional argument in use where N is small; of a large call of
    the coupled op the rows are the same few again and again.
    """
    n, k, d = shape
    z, mu = embeddings(n, d, k, device, seed)
    if op == "student_t_stats" and n > PERIOD:
        z = z[:PERIOD].repeat(-(-n // PERIOD), 1)[:n]
    generator = torch.Generator(device).manual_seed(seed + 1)
    rich = n < 1000
    alpha = torch.tensor(1.5 if rich else 1.0, device=device)
    weight = torch.rand(n, generator=generator, device=device) if rich else None
    if op == "student_t_stats":
        return Invocation(op, (z, mu, alpha, weight), (0,), (), (3,) if rich else ())
    counts = torch.randn(k, generator=generator, device=device)
    z0 = z + 0.1 * torch.randn(n, d, generator=generator, device=device)
    norm = torch.randn(n, generator=generator, device=device) if rich else None
    args: tuple[Any, ...] = (z, mu, alpha, weight, counts, z0, mu + 0.1, 1.0, norm, None)
    return Invocation(op, args, (0, 5), (0, 1, 2), (3, 8) if rich else ())


def allowance(call: Invocation, backward: bool) -> int:
    """16 bytes a row, the gradients where there are some, 64 an entry of the centroids, and a
    fixed workspace.
    """
    n, d = call.args[0].shape[-2:]
    k = call.args[1].shape[-2]
    return int((16 + 16 * d * backward) * n + 64 * k * d) + 256 * MIB


def _loss() -> Target:
    n, d, k = 1_000_000, 10, 10
    # z, p and dz once; Student-t: a reciprocal, a logarithm in the loss, three products
    work = Work(4.0 * n * (2 * d + k + 1), 2.0 * 3 * n * k * d, "fp32", 2.0 * n * k)
    goal = Goal(0.1, {"eager": 8.0, "compile": 1.0})
    return Target(
        "15", "dec_losses fwd+bwd 1M x10 K10", "dec_losses", "highest", {"n": n, "d": d, "k": k},
        work, goal, trained, note="a dense frozen target",
    )  # fmt: skip


FAMILY = Family(
    name="dec",
    targets=(_loss(),),
    make=make,
    tiny=((70, 13, 5), (1, 13, 5), (70, 1, 5), (70, 64, 16), (70, 13, 40), (70, 13, 200)),
    small=(1001, 33, 16),
    large=((2_000_000, 64, 10),),
    wide=((40_000_000, 8, 64),),
    allowance=allowance,
    coupled=("student_t_stats",),
    sums=("student_t_stats",),
)
