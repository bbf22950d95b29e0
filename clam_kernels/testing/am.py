# SPDX-License-Identifier: Apache-2.0
"""Samples and workloads of the associative-memory family."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops._facts import compute_dtype
from . import (
    FLOATS,
    BadRow,
    Sample,
    Workload,
    _eager,
    argument_names,
    constants,
    spec_of,
    zeros,
)
from ._draw import Draw

B, N, K, D = 2, 5, 4, 3


class AmCase:
    """A call whose arguments fit all ops of the family."""

    def __init__(
        self,
        name: str,
        v: Tensor,
        rho: Tensor,
        beta: float | Tensor = 0.7,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        step: float = 0.8,
        steps: int = 3,
        kinks: tuple[str, ...] = (),
        dtypes: tuple[torch.dtype, ...] | None = None,
    ) -> None:
        self.name, self.v, self.rho, self.beta = name, v, rho, beta
        self.mask, self.weights, self.step, self.steps = mask, weights, step, steps
        self.kinks, self.dtypes = kinks, dtypes

    def sample(self, op: str, args: tuple[Any, ...], names: tuple[str, ...]) -> Sample:
        tensors = [
            name
            for name, a in zip(names, args, strict=True)
            if isinstance(a, Tensor) and a.is_floating_point()
        ]
        smooth = tuple(name for name in tensors if name not in self.kinks)
        kinks = tuple(name for name in tensors if name in self.kinks)
        dtypes = {} if self.dtypes is None else {"dtypes": self.dtypes}
        return Sample(op, self.name, args, smooth, kinks, **dtypes)


def _shared(draw: Draw) -> list[AmCase]:
    """Calls of all four ops: shapes, batches and log-weights."""
    inf = math.inf
    one_masked = draw.normal(K)
    one_masked[1] = -inf
    one_all_masked = draw.normal(B, K)
    one_all_masked[0] = -inf
    one_all_masked[1, 2] = -inf
    without_half = (torch.float64, torch.float32, torch.bfloat16)
    return [
        AmCase("plain", draw.normal(N, D), draw.normal(K, D)),
        AmCase("one-memory", draw.normal(N, D), draw.normal(1, D)),
        AmCase("no-rows", draw.normal(0, D), draw.normal(K, D)),
        AmCase("one-row", draw.normal(1, D), draw.normal(K, D)),
        AmCase("one-dim", draw.normal(N, 1), draw.normal(K, 1)),
        AmCase("wide", draw.normal(67, 17), draw.normal(33, 17), 0.1),
        AmCase("on-a-memory", torch.eye(K, D).double(), torch.eye(K, D).double()),
        AmCase("offset", 1000 + draw.normal(N, D), 1000 + draw.normal(K, D), dtypes=without_half),
        AmCase("batch", draw.normal(B, N, D), draw.normal(B, K, D)),
        AmCase("batch-of-states", draw.normal(B, N, D), draw.normal(K, D)),
        AmCase("batch-of-memories", draw.normal(N, D), draw.normal(B, K, D)),
        AmCase("batch-crossed", draw.normal(B, 1, N, D), draw.normal(3, K, D)),
        AmCase("no-batch", draw.normal(0, N, D), draw.normal(K, D)),
        AmCase("log-weights", draw.normal(N, D), draw.normal(K, D), weights=draw.normal(K)),
        AmCase("log-weights-one", draw.normal(N, D), draw.normal(K, D), weights=draw.normal(1)),
        AmCase("log-weights-0d", draw.normal(N, D), draw.normal(K, D), weights=draw.normal()),
        AmCase(
            "log-weights-one-offset",
            1000 + draw.normal(N, D),
            1000 + draw.normal(33, D),
            weights=draw.normal(1),
            dtypes=without_half,
        ),
        AmCase("one-masked", draw.normal(N, D), draw.normal(K, D), weights=one_masked),
        AmCase(
            "all-masked",
            draw.normal(N, D),
            draw.normal(K, D),
            weights=torch.full((K,), -inf).double(),
        ),
        AmCase(
            "all-masked-in-one-problem",
            draw.normal(N, D),
            draw.normal(K, D),
            weights=one_all_masked,
        ),
    ]


def _shared_beta(draw: Draw) -> list[AmCase]:
    """Calls of the three differentiable ops: a tensor with one beta for all memories."""
    v, rho = draw.normal(N, D), draw.normal(K, D)
    masked = torch.tensor([[0.0, -math.inf, 0.3, -0.2]], dtype=torch.float64)
    return [
        AmCase("beta-0d", v, rho, draw.uniform()),
        AmCase("beta-1", v, rho, draw.uniform(1)),
        AmCase("beta-batch", v, rho, draw.uniform(B, 1)),
        AmCase("beta-batch-crossed", draw.normal(B, 1, N, D), rho, draw.uniform(3, 1)),
        AmCase(
            "beta-batch-weights", draw.normal(3, 1, N, D), rho, draw.uniform(B, 1), weights=masked
        ),
        AmCase("beta-one-memory", v, draw.normal(1, D), draw.uniform(1)),
        AmCase("beta-huge", v, rho, 1e6),
        AmCase("beta-huge-tensor", v, rho, torch.tensor(3e4, dtype=torch.float64)),
    ]


def _moving(draw: Draw) -> list[AmCase]:
    """Calls of step and recursion: a beta for each memory, beta 0 and inf, masks, steps."""
    v, rho, inf = draw.normal(N, D), draw.normal(K, D), math.inf
    weights = draw.normal(K)
    weights[3] = -inf
    everything = AmCase(
        "everything",
        draw.normal(B, 1, N, D),
        draw.normal(3, K, D),
        draw.uniform(B, 1, K),
        mask=draw.uniform(3, N, D, low=0.0, high=1.0),
        weights=draw.normal(3, K),
    )
    beta_zero = AmCase(
        "beta-0-tensor", v, rho, torch.zeros(K, dtype=torch.float64), kinks=("beta",)
    )
    masks = {
        "mask-bool": draw.bits(N, D),
        "mask-0-1": draw.bits(N, D).double(),
        "mask-fractional": draw.uniform(N, D, low=0.0, high=1.0),
        "mask-dim": draw.uniform(D, low=0.0, high=1.0),
        "mask-row": draw.bits(N, 1),
        "mask-one": draw.uniform(1, 1, low=0.0, high=1.0),
        "mask-0d": draw.uniform(low=0.0, high=1.0),
        "mask-batch": draw.uniform(B, N, D, low=0.0, high=1.0),
        "mask-closed": torch.zeros(N, D, dtype=torch.float64),
    }
    return [
        AmCase("beta-0", v, rho, 0.0),
        beta_zero,
        AmCase("beta-k", v, rho, draw.uniform(K)),
        AmCase("beta-batch-k", v, rho, draw.uniform(B, K)),
        AmCase("beta-k-weights", draw.normal(B, N, D), rho, draw.uniform(K), weights=weights),
        AmCase("beta-inf", v, rho, inf),
        AmCase("beta-inf-weights", v, rho, inf, weights=weights),
        AmCase("beta-inf-mask", v, rho, inf, mask=draw.bits(N, D)),
        *(AmCase(name, v, rho, draw.uniform(K), mask=mask) for name, mask in masks.items()),
        AmCase("mask-bool-weights", v, rho, mask=draw.bits(B, N, D), weights=weights),
        AmCase("step-0", v, rho, draw.uniform(), step=0.0),
        AmCase("step-1", v, rho, draw.uniform(), step=1.0),
        AmCase("step-2", v, rho, draw.uniform(), step=2.0),
        everything,
    ]


def samples(op: str, seed: int = 0) -> list[Sample]:
    """The samples of an op of this family."""
    draw = Draw(seed)
    calls = _shared(draw)
    if op == "am_assign":
        rows = [c.sample(op, (c.v, c.rho, c.weights), ("v", "rho", "log_weights")) for c in calls]
        # log-weights only mask memories, and there is no gradient
        return [Sample(op, r.name, r.args, dtypes=r.dtypes) for r in rows]
    calls += _shared_beta(draw)
    names: tuple[str, ...] = ("v", "rho", "beta", "log_weights")
    if op == "am_energy":
        for call in calls:
            if call.name.startswith("all-masked"):  # E = +inf has no finite differences
                call.kinks = names
        return [c.sample(op, (c.v, c.rho, c.beta, c.weights), names) for c in calls]
    calls += _moving(draw)
    names = ("v", "rho", "beta", "step", "update_mask", "log_weights")
    if op == "am_step":
        return [c.sample(op, (c.v, c.rho, c.beta, c.step, c.mask, c.weights), names) for c in calls]
    plain = draw.normal(N, D), draw.normal(K, D), draw.uniform(K)
    mask = draw.uniform(N, D, low=0.0, high=1.0)
    for steps in (0, 1, 9):
        calls.append(AmCase(f"T-{steps}", *plain, steps=steps, step=0.5))
        calls.append(AmCase(f"T-{steps}-mask", *plain, steps=steps, mask=mask))
    names = (*names[:3], "steps", *names[3:])
    return [
        c.sample(op, (c.v, c.rho, c.beta, c.steps, c.step, c.mask, c.weights), names) for c in calls
    ]


# ---- workloads ----------------------------------------------------------------------------------


def _points(n: int, d: int, k: int) -> Callable[[int], tuple[Tensor, Tensor, float]]:
    """Points around k Gaussian memories, and a beta of about 3 over the difference of the two least
    squared distances.
    """

    def make(seed: int) -> tuple[Tensor, Tensor, float]:
        generator = torch.Generator().manual_seed(seed)
        rho = torch.randn(k, d, generator=generator, dtype=torch.float32)
        index = torch.randint(k, (n,), generator=generator)
        noise = torch.randn(n, d, generator=generator, dtype=torch.float32)
        return rho[index] + 0.5 * noise, rho, 3.0 / d

    return make


def _workload(op: str, size: str, n: int, d: int, k: int, steps: int | None = None) -> Workload:
    """`flops`: 2 per multiply-add of the matrix products. `bytes`: inputs and outputs once."""
    points = _points(n, d, k)
    products, out = {"am_energy": (1, n), "am_assign": (1, 3 * n)}.get(op, (2, n * d))
    tail = () if steps is None else (steps,)

    def make(seed: int) -> tuple[Any, ...]:
        v, rho, beta = points(seed)
        return (v, rho) if op == "am_assign" else (v, rho, beta, *tail)

    name = f"{op}/{size}-{d}-{k}{'' if steps is None else f'-T{steps}'}-fp32"
    return Workload(
        name, op, make, 4 * (n * d + k * d + out), 2 * products * n * k * d * (steps or 1)
    )


def workloads() -> list[Workload]:
    """Calls that the benches time, named `op/rows-D-K-[T-]dtype`. They never change, so that
    versions can be compared.
    """
    return [
        _workload("am_recursion", "100k", 100_000, 16, 64, 10),
        _workload("am_recursion", "50k", 50_000, 16, 1000, 3),
        _workload("am_recursion", "200k", 200_000, 2, 8, 10),
        _workload("am_step", "1m", 1_000_000, 16, 1000),
        _workload("am_step", "100k", 100_000, 16, 64),
        _workload("am_energy", "100k", 100_000, 16, 64),
        _workload("am_assign", "100k", 100_000, 16, 64),
    ]


# ---- the values of this family that the contract tests read --------------------------------------

STEP_LIKE = ("am_step", "am_recursion")
WITH_BETA = (*STEP_LIKE, "am_energy")
EVERY = (*WITH_BETA, "am_assign")
ROW_ARGUMENTS = ("v",)
COUPLED = ()
_DIFFERENTIATED = ("plain", "beta-batch-weights", "everything", "one-masked", "beta-inf-mask")
EAGER = {
    "am_step": _eager.am_step,
    "am_recursion": _eager.am_recursion,
    "am_energy": _eager.am_energy,
}
SELECTIONS = {
    "traced": (
        "plain", "no-rows", "batch-crossed", "one-masked", "beta-batch", "beta-inf", "mask-bool",
        "everything", "T-0",
    ),
    "compiled": ("plain", "beta-batch-weights", "everything"),
    "exported": ("plain", "beta-batch"),
    "laid": (
        "plain", "batch", "batch-crossed", "one-masked", "beta-batch-k", "mask-bool", "mask-batch",
        "everything", "wide",
    ),
    "mapped": (
        "plain", "batch-crossed", "one-masked", "beta-0d", "beta-1", "beta-batch", "beta-batch-k",
        "mask-bool", "mask-dim", "mask-0d", "log-weights-0d", "everything", "beta-inf-mask",
        "all-masked-in-one-problem", "no-rows", "T-0-mask",
    ),
    "nested": ("plain", "beta-batch"),
    "autocast": ("plain", "beta-0d", "log-weights"),
    "differentiated": _DIFFERENTIATED,
    "batched gradients": (*_DIFFERENTIATED, "batch-crossed", "beta-0d", "T-0"),
    "twice": ("plain", "everything", "beta-0d"),
    "hessian": ("plain", "one-masked", "beta-0d"),
    "frozen": ("everything", "beta-batch-weights", "one-masked"),
    "views": ("everything", "beta-batch"),
}  # fmt: skip


def problem(op: str, n: int, k: int, d: int, seed: int) -> Sample:
    """Normal states and memories; beta is a number."""
    generator = torch.Generator().manual_seed(seed)
    rho, v = (
        torch.randn(rows, d, generator=generator, dtype=torch.float32).double() for rows in (k, n)
    )
    rest = {"beta": 1.5 / d, "steps": 3}
    args = (v, rho, *(rest[name] for name in argument_names(op) if name in rest))
    return Sample(op, "problem", args, ("v", "rho") if spec_of(op).gradient else ())


def large(op: str, n: int, k: int, d: int, offset: float, seed: int) -> Sample:
    """States around k memories; beta is a tensor."""
    draw = Draw(seed)
    rho = draw.normal(k, d)
    index = torch.randint(k, (n,), generator=draw.generator)
    values: dict[str, Any] = {
        "v": rho[index] + 0.6 * draw.normal(n, d) + offset,
        "rho": rho + offset,
        "beta": 3.0 / d * torch.ones((), dtype=torch.float64),
        "steps": 5,
        "step": 0.5,
        "log_weights": None,
        "update_mask": None,
    }
    names = argument_names(op)[:-1]
    tensors = (
        tuple(x for x in names if isinstance(values[x], Tensor)) if spec_of(op).gradient else ()
    )
    return Sample(op, "large", tuple(values[x] for x in names), tensors)


def result_dtypes(op: str, dtype: torch.dtype) -> list[torch.dtype]:
    """States have the dtype of v; energies and distances are float32 unless v is float64."""
    score = compute_dtype(dtype)
    return {"am_energy": [score], "am_assign": [torch.int64, score]}.get(op, [dtype])


# ---- calls that must raise -----------------------------------------------------------------------

PLAIN: dict[str, Callable[[], Any]] = {
    "v": lambda: torch.zeros(5, 3),
    "rho": lambda: torch.ones(4, 3),
    "beta": lambda: 1.0,
    "steps": lambda: 2,
    "step": lambda: 1.0,
    "update_mask": lambda: None,
    "log_weights": lambda: None,
    "precision": lambda: None,
}


_ROWS: list[BadRow] = [
    ("v int64", EVERY, TypeError, f"v: expected {FLOATS}, got int64",
        {"v": zeros(5, 3, dtype=torch.int64)}),
    ("rho bool", EVERY, TypeError, f"rho: expected {FLOATS}, got bool",
        {"rho": zeros(4, 3, dtype=torch.bool)}),
    ("v complex", EVERY, TypeError, f"v: expected {FLOATS}, got complex64",
        {"v": zeros(5, 3, dtype=torch.complex64)}),
    ("rho float64", EVERY, TypeError, "rho: expected dtype float32 to match v, got float64",
        {"rho": zeros(4, 3, dtype=torch.float64)}),
    ("v bfloat16", EVERY, TypeError, "rho: expected dtype bfloat16 to match v, got float32",
        {"v": zeros(5, 3, dtype=torch.bfloat16)}),
    ("v 1-d", EVERY, ValueError, "v: expected shape [..., N, D], got [3]", {"v": zeros(3)}),
    ("v 0-d", EVERY, ValueError, "v: expected shape [..., N, D], got []", {"v": zeros()}),
    ("rho 1-d", EVERY, ValueError, "rho: expected shape [..., K, D], got [3]",
        {"rho": zeros(3)}),
    ("D 0", EVERY, ValueError, "v: expected D >= 1, got [5, 0]",
        {"v": zeros(5, 0), "rho": zeros(4, 0)}),
    ("K 0", EVERY, ValueError, "rho: expected K >= 1, got [0, 3]", {"rho": zeros(0, 3)}),
    ("D differs", EVERY, ValueError,
        "rho: expected shape [..., K, 3] to match v [5, 3], got [4, 8]", {"rho": zeros(4, 8)}),
    ("D differs, batch", EVERY, ValueError,
        "rho: expected shape [..., K, 16] to match v [2, 5, 16], got [4, 8]",
        {"v": zeros(2, 5, 16), "rho": zeros(4, 8)}),
    ("D 1", EVERY, ValueError,
        "rho: expected shape [..., K, 3] to match v [5, 3], got [4, 1]", {"rho": zeros(4, 1)}),
    ("leading dims", EVERY, ValueError,
        "rho: expected leading dims that broadcast to match v [2, 5, 3], got [7, 4, 3]",
        {"v": zeros(2, 5, 3), "rho": zeros(7, 4, 3)}),
    ("leading dims of log_weights", EVERY, ValueError,
        "log_weights: expected leading dims that broadcast to match v [2, 5, 3], got [3, 4]",
        {"v": zeros(2, 5, 3), "log_weights": zeros(3, 4)}),
    ("leading dims of an inner batch", EVERY, ValueError,
        "rho: expected leading dims that broadcast to match v [2, 3, 5, 3], got [2, 4, 3]",
        {"v": zeros(2, 3, 5, 3), "rho": zeros(2, 4, 3)}),
    ("log_weights shape", EVERY, ValueError,
        "log_weights: expected shape broadcastable to [..., 4] (K) to match rho [4, 3], got [5]",
        {"log_weights": zeros(5)}),
    ("log_weights int", EVERY, TypeError, f"log_weights: expected {FLOATS}, got int32",
        {"log_weights": zeros(4, dtype=torch.int32)}),
    ("precision", EVERY, ValueError,
        "precision: expected 'highest', 'high', 'medium' or None, got 'fast'",
        constants(precision="fast")),
    ("beta shape", STEP_LIKE, ValueError,
        "beta: expected shape broadcastable to [..., 4] (K) to match rho [4, 3], got [5]",
        {"beta": zeros(5)}),
    ("beta batch without a last dim of 1", STEP_LIKE, ValueError,
        "beta: expected shape broadcastable to [..., 4] (K) to match rho [2, 4, 3], got [2]",
        {"rho": zeros(2, 4, 3), "beta": zeros(2)}),
    ("beta int", WITH_BETA, TypeError, f"beta: expected {FLOATS}, got int64",
        {"beta": zeros(1, dtype=torch.int64)}),
    ("beta -1", STEP_LIKE, ValueError, "beta: expected a number >= 0, got -1.0",
        constants(beta=-1.0)),
    ("beta NaN", STEP_LIKE, ValueError, "beta: expected a number >= 0, got nan",
        constants(beta=math.nan)),
    ("beta leading dims", WITH_BETA, ValueError,
        "beta: expected leading dims that broadcast to match v [2, 5, 3], got [3, 1]",
        {"v": zeros(2, 5, 3), "beta": lambda: torch.ones(3, 1)}),
    ("energy at beta 0", ("am_energy",), ValueError,
        "beta: expected a finite number > 0, got 0.0", constants(beta=0.0)),
    ("energy at beta inf", ("am_energy",), ValueError,
        "beta: expected a finite number > 0, got inf", constants(beta=math.inf)),
    ("energy at beta NaN", ("am_energy",), ValueError,
        "beta: expected a finite number > 0, got nan", constants(beta=math.nan)),
    ("energy with a beta a memory", ("am_energy",), ValueError,
        "beta: expected shape [] or [..., 1] (one for all memories), got [4]",
        {"beta": lambda: torch.ones(4)}),
    ("steps", ("am_recursion",), ValueError, "steps: expected an int >= 0, got -1",
        constants(steps=-1)),
    ("step < 0", STEP_LIKE, ValueError, "step: expected a finite number >= 0, got -0.5",
        constants(step=-0.5)),
    ("step inf", STEP_LIKE, ValueError, "step: expected a finite number >= 0, got inf",
        constants(step=math.inf)),
    ("step NaN", STEP_LIKE, ValueError, "step: expected a finite number >= 0, got nan",
        constants(step=math.nan)),
    ("update_mask shape", STEP_LIKE, ValueError,
        "update_mask: expected shape broadcastable to [..., 5, 3] (N, D) to match v [5, 3], "
        "got [4, 3]", {"update_mask": zeros(4, 3)}),
    ("update_mask a row too few dims", STEP_LIKE, ValueError,
        "update_mask: expected shape broadcastable to [..., 5, 3] (N, D) to match v [5, 3], "
        "got [5]",
        {"update_mask": zeros(5)}),
    ("update_mask int", STEP_LIKE, TypeError, f"update_mask: expected {FLOATS}, got int64",
        {"update_mask": zeros(5, 3, dtype=torch.int64)}),
    ("update_mask leading dims", STEP_LIKE, ValueError,
        "update_mask: expected leading dims that broadcast to match v [2, 5, 3], got [3, 5, 3]",
        {"v": zeros(2, 5, 3), "update_mask": zeros(3, 5, 3)}),
]  # fmt: skip
_VALUES: list[BadRow] = [
    ("beta", STEP_LIKE, ValueError, "beta: expected values >= 0, got -1.0",
        {"beta": lambda: torch.tensor([-1.0])}),
    ("one beta of many", STEP_LIKE, ValueError, "beta: expected values >= 0, got -2.0",
        {"beta": lambda: torch.tensor([0.5, -2.0, 1.0, math.nan])}),
    ("NaN among betas", STEP_LIKE, ValueError, "beta: expected values >= 0, got nan",
        {"beta": lambda: torch.tensor([1.0, math.nan, 1.0, 1.0])}),
    *(
        (f"energy at {value}", ("am_energy",), ValueError,
            f"beta: expected finite values > 0, got {value}",
            {"beta": partial(torch.tensor, [value])})
        for value in (-1.0, 0.0, math.inf, math.nan)
    ),
]  # fmt: skip
_NO_BETA: tuple[Any, ...] = ("1", None, True, [])
_TYPES: list[BadRow] = [
    ("v list", EVERY, TypeError, "v: expected a Tensor, got list", constants(v=[[0.0]])),
    ("v array", EVERY, TypeError, "v: expected a Tensor, got ndarray",
        {"v": lambda: torch.zeros(5, 3).numpy()}),
    ("rho None", EVERY, TypeError, "rho: expected a Tensor, got NoneType", constants(rho=None)),
    ("rho int", EVERY, TypeError, "rho: expected a Tensor, got int", constants(rho=3)),
    *(
        (f"beta {value!r}", WITH_BETA, TypeError,
            f"beta: expected a number or a Tensor, got {type(value).__name__}",
            constants(beta=value))
        for value in _NO_BETA
    ),
    ("update_mask list", STEP_LIKE, TypeError, "update_mask: expected a Tensor or None, got list",
        constants(update_mask=[1])),
    *(
        (f"log_weights {value!r}", EVERY, TypeError,
            f"log_weights: expected a Tensor or None, got {type(value).__name__}",
            constants(log_weights=value))
        for value in (0.5, [1], (0.0,))
    ),
    *(
        (f"steps {value!r}", ("am_recursion",), TypeError,
            f"steps: expected an int >= 0, got {value!r}", constants(steps=value))
        for value in (3.0, "3", True)
    ),
    *(
        (f"step {type(value).__name__}", STEP_LIKE, TypeError,
            f"step: expected a number, got {type(value).__name__}", constants(step=value))
        for value in ("1", None, True, [1.0])
    ),
    ("step Tensor", STEP_LIKE, TypeError, "step: expected a number, got Tensor",
        {"step": lambda: torch.tensor(0.5)}),
]  # fmt: skip
BAD_CALLS = {"op": _ROWS, "values": _VALUES, "function": _TYPES}
