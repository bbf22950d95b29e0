# SPDX-License-Identifier: Apache-2.0
"""The associative-memory family on a GPU: its targets, its calls, and the memory that they
may use.
"""

from __future__ import annotations

from typing import Any

import torch

from .cases import Family, Goal, Invocation, Target, Work
from .contests_am import inference, points, recall, recall_trained, training

GIB = 1 << 30


def make(op: str, shape: tuple[int, ...], device: str, seed: int) -> Invocation:
    """A call of an op: with every optional argument if N is small, with none if N is large."""
    n, k, d = shape
    v, rho, number = points(n, d, k, device, seed)
    generator = torch.Generator(device).manual_seed(seed + 1)
    rich = n < 1000
    weights = torch.randn(k, generator=generator, device=device) if rich else None
    if op == "am_assign":
        return Invocation(op, (v, rho, weights), (0,))
    beta = torch.tensor(number, device=device)
    if op == "am_energy":
        return Invocation(op, (v, rho, beta, weights), (0,), (0, 1, 2, *([3] if rich else [])))
    beta = beta.expand(k).clone() if rich else beta
    mask = torch.rand(n, d, generator=generator, device=device) if rich else None
    tail: tuple[Any, ...] = (0.75, mask, weights)
    head = (v, rho, beta) if op == "am_step" else (v, rho, beta, 3)
    at = len(head) + 1
    rows, wanted = ((0, at), (0, 1, 2, at, at + 1)) if rich else ((0,), (0, 1, 2))
    return Invocation(op, (*head, *tail), rows, wanted)


def allowance(call: Invocation, backward: bool) -> int:
    """The result and the gradients, as much again for intermediate values, and scratch memory that
    does not grow with N.
    """
    results = 4 * int(call.args[0].numel())
    return (4 * results + 2 * GIB) if backward else (2 * results + GIB // 4)


# ---- the table of targets -------------------------------------------------------------------


def _recall(n: int, d: int, k: int, steps: int, unit: str, backward: bool = False) -> Work:
    """Work of the recursion. Forward: 2 products a step. Backward: it computes all but the last
    step again, 2 (T - 1) products, and takes 5 a step.
    """
    products = 2 * steps + (2 * (steps - 1) + 5 * steps if backward else 0)
    exps = n * k * (steps + (2 * steps - 1 if backward else 0))
    moved = n * d * 4 * (5 if backward else 2)
    return Work(moved, 2.0 * products * n * k * d, unit, exps)


def _small(id: str, mode: str, steps: int, ms: float, **more: Any) -> Target:
    """Targets 1 to 4: a million rows of 16 features, 64 memories."""
    backward = more.pop("backward", False)
    unit = more.pop("unit", {"high": "bf16x3", "highest": "bf16x6"}[mode])
    n, d, k = 1_000_000, 16, 64
    work = _recall(n, d, k, steps, unit, backward)
    if more.pop("lanes", False):
        work = Work(work.bytes, work.flops, work.unit, work.exps, 5.0 * n * k * steps)
    op = "am_step" if steps == 1 else "am_recursion"
    passes = "fwd+bwd" if backward else "fwd"
    times = "" if steps == 1 else f" T{steps}"
    return Target(
        id, f"{op} {passes} 1M x16 K64{times}", op, mode, {"n": n, "d": d, "k": k, "steps": steps},
        work, Goal(ms, **more), recall_trained if backward else recall,
    )  # fmt: skip


def _inference(mode: str, unit: str, ms: float, error: str) -> Target:
    n, d, k, steps = 10_000_000, 64, 256, 10
    shape = {"n": n, "d": d, "k": k, "steps": steps}
    goal = Goal(ms, {"eager": 4.0}, error=error)
    work = _recall(n, d, k, steps, unit)
    return Target(
        "5", "ClAM inference 10M x64 K256 T10", "am_recursion", mode, shape, work, goal, inference
    )


def _training() -> Target:
    n, d, k, steps = 10_000_000, 64, 256, 10
    work = Work(20.0 * n * d, 2.0 * 9 * steps * n * k * d, "tf32", 3.0 * n * k * steps)
    shape = {"n": n, "d": d, "k": k, "steps": steps, "batch": 1 << 18}
    return Target(
        "6", "ClAM epoch 10M x64 K256 T10", "am_recursion", "high", shape, work,
        Goal(350.0, {}, error="curve"), training,
        note="an epoch by the time of one batch of 2^18 rows",
    )  # fmt: skip


def _narrow() -> Target:
    n, d, k, steps = 1_000_000, 2, 8, 10
    shape = {"n": n, "d": d, "k": k, "steps": steps}
    goal = Goal(0.06, {"eager": 15.0}, error="exact")
    work = _recall(n, d, k, steps, "fp32")
    return Target(
        "16",
        "am_recursion fwd 1M x2 K8 T10",
        "am_recursion",
        "highest",
        shape,
        work,
        goal,
        recall,
    )


def _latency(id: str, kind: str, ms: float) -> Target:
    n, d, k, steps = 1000, 16, 64, 10
    shape = {"n": n, "d": d, "k": k, "steps": steps}
    work = _recall(n, d, k, steps, "bf16x6")
    goal = Goal(ms, error="exact", launches=1)
    name = f"latency N1000 x16 K64 T10, {'replay' if kind == 'graph' else 'call'}"
    return Target(id, name, "am_recursion", "highest", shape, work, goal, recall, kind)


TRAINED: dict[str, Any] = {"backward": True, "peak_bytes": GIB / 2}
TARGETS = (
    _small("1", "high", 1, 0.075, ratios={"eager": 5.0, "compile": 1.0, "sdpa": 1.0}),
    _small("1", "highest", 1, 0.15, ratios={"eager": 3.0}, error="exact"),
    _small("2", "high", 10, 0.45, ratios={"eager": 6.0, "compile": 5.0, "sdpa": 1.0}),
    _small("2", "highest", 10, 0.9, ratios={"eager": 3.0}, error="exact"),
    _small("3", "highest", 10, 1.4, ratios={"eager": 2.0}, error="exact", unit="fp32", lanes=True),
    _small("4", "high", 10, 2.3, ratios={"eager": 5.0, "compile": 1.0}, **TRAINED),
    _small("4", "highest", 10, 4.6, ratios={"eager": 3.0}, error="exact", **TRAINED),
    _inference("high", "bf16x3", 83.0, "accurate"),
    _inference("medium", "bf16", 28.0, "like"),
    _training(),
    _narrow(),
    _latency("17a", "graph", 0.015),
    _latency("17b", "host", 0.060),
)  # fmt: skip

FAMILY = Family(
    name="am",
    targets=TARGETS,
    make=make,
    tiny=((70, 13, 5), (1, 13, 5), (70, 1, 5), (70, 64, 16), (70, 13, 40), (70, 13, 200)),
    small=(1001, 33, 16),
    # the second shape of each fits the CUDA library's limits on memories and features
    large=((2_000_000, 1024, 16), (8_000_000, 200, 16)),
    wide=((40_000_000, 8, 64), (140_000_000, 8, 16)),
    allowance=allowance,
    captured=("am_recursion",),
    compiled=("am_step",),
)
