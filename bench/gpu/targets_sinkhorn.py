# SPDX-License-Identifier: Apache-2.0
"""The Sinkhorn family on a GPU: its targets, its calls, and the memory that they may use."""

from __future__ import annotations

from typing import Any

import torch

from .cases import PERIOD, Family, Goal, Invocation, Target, Work
from .contests_sinkhorn import EPSILON, codes, features, iterations, relabelling, unit_rows

MIB = 1 << 20
STEPS = 3


def make(op: str, shape: tuple[int, ...], device: str, seed: int) -> Invocation:
    """A call of an op: with every optional argument if N is small, with none if N is large. A large
    call repeats PERIOD rows, so that equal rows must have equal results.
    """
    n, k, d = shape
    z, c = unit_rows(min(n, PERIOD), k, d, device, seed)
    z = z.repeat(-(-n // PERIOD), 1)[:n] if n > PERIOD else z
    generator = torch.Generator(device).manual_seed(seed + 1)

    def masses(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).log_softmax(0)

    rich = n < 1000
    a, b, bias = (masses(size) if rich else None for size in (n, k, k))
    start = masses(k)
    by_features = "features" in op
    first: list[Any] = [z, c] if by_features else [_logits(z, c, n)]
    if op.endswith("pass"):
        args = [*first, start, *([bias] if by_features else []), a]
    else:
        init = start if rich else None
        args = [*first, STEPS, *([bias] if by_features else []), a, b, init, not rich]
    lines = tuple(i for i, x in enumerate(args) if x is a and x is not None)
    wanted = tuple(i for i, x in enumerate(args) if isinstance(x, torch.Tensor))
    return Invocation(op, tuple(args), (0,), wanted, lines)


def _logits(z: torch.Tensor, c: torch.Tensor, n: int) -> torch.Tensor:
    """Products of the first PERIOD rows, repeated for all n rows."""
    few = z[:PERIOD] @ c.T
    return few.repeat(-(-n // PERIOD), 1)[:n] if n > PERIOD else few


def allowance(call: Invocation, backward: bool) -> int:
    """Potentials and the state of each step, chunks of column sums, and a fixed workspace; with
    gradients twice the size of the arguments more.
    """
    kept_bytes = 64 * sum(call.n if i == 0 else x.shape[-2] for i, x in _matrices(call))
    argument_bytes = sum(4 * x.numel() for _, x in _matrices(call)) if backward else 0
    return (
        (2 * argument_bytes + 4 * kept_bytes + 512 * MIB)
        if backward
        else (2 * kept_bytes + 128 * MIB)
    )


def _matrices(call: Invocation) -> list[tuple[int, torch.Tensor]]:
    return [
        (i, x) for i, x in enumerate(call.args) if isinstance(x, torch.Tensor) and x.ndim > 1
    ]  # fmt: skip


# ---- the table of targets -------------------------------------------------------------------

N, K, D = 1_281_167, 3000, 128


def _stored() -> Target:
    work = Work(4.0 * N * K, 0.0, "fp32", 1.0 * N * K)
    goal = Goal(4.8, {"eager": 4.5, "products": 1.6})
    return Target(
        "9", "sinkhorn 1.28M x3000, an iteration", "sinkhorn_potentials", "highest",
        {"n": N, "d": D, "k": K, "steps": 20}, work, goal, iterations,
    )  # fmt: skip


def _features() -> Target:
    work = Work(2.0 * 2 * (N + K) * D, 2.0 * 2 * N * K * D, "bf16", 2.0 * N * K)
    goal = Goal(5.5, {"flash": 1.0, "geomloss": 1.0, "eager": 1.0}, peak_bytes=100e6)
    return Target(
        "10", "sinkhorn_potentials_features 1.28M x3000 d128, an iteration",
        "sinkhorn_potentials_features", "highest",
        {"n": N, "d": D, "k": K, "steps": 20}, work, goal, features, dtype="bfloat16",
        note="two products an iteration",
    )  # fmt: skip


def _relabelling() -> Target:
    work = Work(4.0 * N * K * 50, 0.0, "fp32", 50.0 * N * K)
    return Target(
        "11", "SeLa relabelling 1.28M x3000, to tol 1e-3", "sinkhorn_pass", "highest",
        {"n": N, "d": D, "k": K, "steps": 1}, work, Goal(1000.0, {}), relabelling, kind="host",
        note=f"epsilon {EPSILON}, accelerated",
    )  # fmt: skip


def _codes(kind: str) -> Target:
    n = 2 * 4096
    work = Work(4.0 * n * K * 5, 0.0, "fp32", 4.0 * n * K)
    launches = 12 if kind == "device" else None
    goal = Goal(0.2, {"eager": 4.0, "compile": 1.0}, launches=launches)
    return Target(
        "12" if kind == "device" else "12g", f"SwAV codes 2 x4096 x3000 T3, {kind}",
        "sinkhorn_potentials", "highest", {"n": n, "d": D, "k": K, "steps": 3},
        work, goal, codes, kind,
    )  # fmt: skip


FAMILY = Family(
    name="sinkhorn",
    targets=(_stored(), _features(), _relabelling(), _codes("device"), _codes("graph")),
    make=make,
    tiny=((70, 13, 5), (1, 13, 5), (70, 1, 5), (70, 64, 16), (70, 13, 40), (70, 13, 200)),
    small=(1001, 33, 16),
    large=((400_000, 1024, 16),),
    wide=((800_000, 3000, 32),),
    allowance=allowance,
    captured=("sinkhorn_potentials", "sinkhorn_potentials_features"),
    compiled=("sinkhorn_potentials",),
    coupled=(
        "sinkhorn_potentials",
        "sinkhorn_potentials_features",
        "sinkhorn_pass",
        "sinkhorn_features_pass",
    ),
)
