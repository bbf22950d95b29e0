# SPDX-License-Identifier: Apache-2.0
"""Samples and workloads of the sinkhorn family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops._facts import compute_dtype
from . import DTYPES, FLOATS, BadRow, Sample, Workload, constants, zeros
from ._draw import Draw

B, N, K, D = 2, 7, 4, 3
T = 3
WIDE = (torch.float64, torch.float32)
SCORES, FEATURES = "sinkhorn_potentials", "sinkhorn_potentials_features"
SCORES_PASS, FEATURES_PASS = "sinkhorn_pass", "sinkhorn_features_pass"


@dataclass(frozen=True)
class SinkhornCase:
    """A call of an op. A features op gets z and prototypes instead of the logits. A pass has no
    n_iter, and `init` is its g.
    """

    name: str
    logits: Tensor
    n_iter: int = T
    log_row: Tensor | None = None
    log_col: Tensor | None = None
    init: Tensor | None = None
    first: bool = True
    dtypes: tuple[torch.dtype, ...] = DTYPES
    bias: bool = False
    scale: Tensor | None = None

    def arguments(self, op: str, draw: Draw) -> tuple[Any, ...]:
        """The arguments for an op, in schema order."""
        rest = (self.log_row, self.log_col, self.init, self.first)
        *batch, n, k = self.logits.shape
        if op in (SCORES, SCORES_PASS):
            last = (draw.normal(k) if self.bias else None, self.scale)
            if op == SCORES:
                return (self.logits, self.n_iter, *rest, *last)
            return (self.logits, self.init, self.log_row, *last)
        z, c = draw.normal(*batch, n, D), draw.normal(k, D)
        if n and bool(self.logits[..., 0, 0].isnan().any()):
            z[..., 0, 0] = torch.nan
        if self.name == "zero-masses":
            z[2], c[1] = torch.nan, torch.inf
        bias = draw.normal(k) if self.bias else None
        if op == FEATURES_PASS:
            return (z, c, self.init, bias, self.log_row, self.scale)
        return (z, c, self.n_iter, bias, *rest, self.scale)


def scale(value: Any) -> Tensor:
    """A `scale` of one problem, or of each problem of a batch."""
    return torch.tensor(value, dtype=torch.float64)


def _calls(draw: Draw) -> list[SinkhornCase]:
    """Calls of the ops with iterations."""

    def x(*shape: int) -> Tensor:
        return 2 * draw.normal(*shape)

    masked_row, masked_col = draw.log_masses(N), draw.log_masses(K)
    masked_row[2], masked_col[1] = -math.inf, -math.inf
    not_finite = x(N, K)
    not_finite[0, 0] = torch.nan
    a, b = draw.log_masses(N), draw.log_masses(K)
    masked = x(N, K)
    masked[2], masked[:, 1] = math.nan, math.inf
    forbidden = x(N, K)
    forbidden[0, 1] = forbidden[3, 2] = -math.inf
    return [
        SinkhornCase("plain", x(N, K)),
        SinkhornCase("no-iterations", x(N, K), 0),
        SinkhornCase("no-iterations-init", x(N, K), 0, init=draw.normal(K)),
        SinkhornCase("one-iteration", x(N, K), 1),
        SinkhornCase("ten-iterations", x(N, K), 10),
        SinkhornCase("rows-first", x(N, K), first=False),
        SinkhornCase("one-column", x(N, 1)),
        SinkhornCase("one-row", x(1, K)),
        SinkhornCase("no-rows", x(0, K)),
        SinkhornCase("wide", x(67, 33)),
        SinkhornCase("row-masses", x(N, K), log_row=a),
        SinkhornCase("column-masses", x(N, K), log_col=b),
        SinkhornCase(
            "masses-rows-first", x(N, K), log_row=a.clone(), log_col=b.clone(), first=False
        ),
        SinkhornCase(
            "masses-batch", x(N, K), log_row=draw.log_masses(B, N), log_col=draw.log_masses(K)
        ),
        SinkhornCase("init", x(N, K), init=draw.normal(K)),
        SinkhornCase("init-batch", x(N, K), init=draw.normal(B, K)),
        SinkhornCase("init-rows-first", x(N, K), init=draw.normal(K), first=False),
        SinkhornCase(
            "zero-masses", masked, log_row=masked_row, log_col=masked_col, dtypes=WIDE,
            scale=scale(0.8),
        ),
        SinkhornCase("sharp", 8 * x(N, K), dtypes=WIDE),
        SinkhornCase("batch", x(B, N, K)),
        SinkhornCase("batch-crossed", x(B, 1, N, K), log_col=draw.log_masses(3, K)),
        SinkhornCase("no-batch", x(0, N, K)),
        SinkhornCase("bias", x(N, K), bias=True),
        SinkhornCase("not-finite", not_finite, dtypes=WIDE, scale=scale(0.5)),
        SinkhornCase("scale", x(N, K), scale=scale(0.4)),
        SinkhornCase("scale-rows-first", x(N, K), first=False, scale=scale(2.5)),
        SinkhornCase("scale-batch", x(N, K), scale=scale([0.5, 2.0]), init=draw.normal(K)),
        SinkhornCase("scale-forbidden", forbidden, scale=scale(1.5), dtypes=WIDE),
        SinkhornCase(
            "everything", x(B, 1, N, K), 2, draw.log_masses(N), draw.log_masses(3, K),
            draw.normal(K), bias=True, scale=scale([[0.7], [1.3]]),
        ),
    ]  # fmt: skip


def _passes(draw: Draw) -> list[SinkhornCase]:
    """Calls of the passes."""

    def call(name: str, *shape: int, g: Tensor | None = None, **rest: Any) -> SinkhornCase:
        start = draw.normal(shape[-1]) if g is None else g
        return SinkhornCase(name, 2 * draw.normal(*shape), init=start, **rest)

    not_finite = call("not-finite", N, K, dtypes=WIDE)
    not_finite.logits[0, 0] = torch.nan
    masked_row, masked_g = draw.log_masses(N), draw.normal(K)
    masked_row[2], masked_g[1] = -math.inf, -math.inf
    masked = call(
        "zero-masses", N, K, g=masked_g, log_row=masked_row, dtypes=WIDE, scale=scale(0.8)
    )
    masked.logits[2], masked.logits[:, 1] = math.nan, math.inf
    forbidden = call("scale-forbidden", N, K, scale=scale(1.5), dtypes=WIDE)
    forbidden.logits[0, 1] = forbidden.logits[3, 2] = -math.inf
    return [
        masked,
        call("plain", N, K),
        call("one-column", N, 1),
        call("one-row", 1, K),
        call("no-rows", 0, K),
        call("no-batch", 0, N, K),
        not_finite,
        call("sharp-start", N, K, g=30 * draw.normal(K), dtypes=WIDE),
        call("wide", 67, 33),
        call("row-masses", N, K, log_row=draw.log_masses(N)),
        call("heavy-rows", N, K, log_row=20 * draw.normal(N), dtypes=WIDE),
        call("batch", B, N, K),
        call("batch-crossed", B, 1, N, K, g=draw.normal(3, K)),
        call("bias", N, K, bias=True),
        call("scale", N, K, scale=scale(0.4)),
        call("scale-batch", N, K, scale=scale([0.5, 2.0])),
        forbidden,
        call(
            "everything",
            B,
            1,
            N,
            K,
            g=draw.normal(3, K),
            log_row=draw.log_masses(N),
            bias=True,
            scale=scale([[0.7], [1.3]]),
        ),
    ]


NAMES = {
    SCORES_PASS: ("logits", "g", "log_row", "bias", "scale"),
    FEATURES_PASS: ("z", "prototypes", "g", "bias", "log_row", "scale"),
    SCORES: (
        "logits", "n_iter", "log_row", "log_col", "init", "prototype_first", "bias", "scale",
    ),
    FEATURES: (
        "z", "prototypes", "n_iter", "bias", "log_row", "log_col", "init", "prototype_first",
        "scale",
    ),
}  # fmt: skip
# Potentials or masses of these samples are not finite, so finite differences do not exist.
BORDERS = ("zero-masses", "not-finite", "scale-forbidden")
BORDERS_OF_PASSES = (*BORDERS, "no-rows")


def samples(op: str, seed: int) -> list[Sample]:
    """The samples of an op of this family."""
    draw = Draw(seed)
    result = []
    borders = BORDERS_OF_PASSES if op in PASSES else BORDERS
    for call in _passes(draw) if op in PASSES else _calls(draw):
        args = call.arguments(op, draw)
        tensors = tuple(n for n, a in zip(NAMES[op], args, strict=True) if isinstance(a, Tensor))
        smooth, kinks = ((), tensors) if call.name in borders else (tensors, ())
        result.append(Sample(op, call.name, args, smooth, kinks, call.dtypes))
    return result


def workloads() -> list[Workload]:
    """Calls that the benches time."""
    result = []
    for n, k, d in ((20_000, 300, 128), (4_000, 3000, 128)):

        def scores(seed: int, n: int = n, k: int = k, d: int = d) -> tuple[Any, ...]:
            z, c = _unit_rows(seed, n, k, d)
            return z @ c.T, 10, None, None, None, True

        def features(seed: int, n: int = n, k: int = k, d: int = d) -> tuple[Any, ...]:
            return (*_unit_rows(seed, n, k, d), 10)

        def scores_pass(seed: int, n: int = n, k: int = k, d: int = d) -> tuple[Any, ...]:
            z, c = _unit_rows(seed, n, k, d)
            return z @ c.T, torch.zeros(k)

        def features_pass(seed: int, n: int = n, k: int = k, d: int = d) -> tuple[Any, ...]:
            return (*_unit_rows(seed, n, k, d), torch.zeros(k))

        size = f"{n // 1000}k"
        result += [
            Workload(f"{SCORES}/{size}-{k}-{k}-T10-fp32", SCORES, scores, 44 * n * k, 40 * n * k),
            Workload(
                f"{FEATURES}/{size}-{d}-{k}-T10-fp32", FEATURES, features,
                44 * (n + k) * d, 11 * n * k * (2 * d + 4),
            ),
            Workload(f"{SCORES_PASS}/{size}-{k}-{k}-fp32", SCORES_PASS, scores_pass,
                4 * (n * k + k * k + n), 4 * n * k),
            Workload(
                f"{FEATURES_PASS}/{size}-{d}-{k}-fp32", FEATURES_PASS, features_pass,
                4 * ((n + k) * d + n), n * k * (2 * d + 4),
            ),
        ]  # fmt: skip
    return result


def _unit_rows(seed: int, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Features of norm 1, and prototypes of norm 1 / 0.05, for epsilon = 0.05."""
    generator = torch.Generator().manual_seed(seed)
    z, c = (torch.randn(size, d, generator=generator, dtype=torch.float32) for size in (n, k))
    normal = torch.nn.functional.normalize
    return normal(z, dim=1), normal(c, dim=1) / 0.05


# ---- the values of this family that the contract tests read --------------------------------------

BOTH, PASSES = (SCORES, FEATURES), (SCORES_PASS, FEATURES_PASS)
COUPLED = (*BOTH, *PASSES)
ROW_ARGUMENTS = ("logits", "z", "log_row")
# potentials are sums of logarithms; the error is a difference of masses of total 1
SCALES = (1.0, 1.0, 1.0, 0.0)
SELECTIONS = {
    "traced": ("plain", "batch-crossed", "rows-first", "init", "everything"),
    "compiled": ("plain", "masses-batch", "rows-first", "scale", "everything"),
    "exported": ("plain", "row-masses", "init"),
    "laid": ("plain", "batch", "batch-crossed", "wide", "everything"),
    "mapped": ("plain", "batch-crossed", "init-rows-first", "bias", "scale", "everything"),
    "nested": ("plain", "init"),
    "autocast": ("plain", "bias", "scale"),
    "frozen": ("plain", "everything"),
    "views": ("plain", "batch", "everything"),
    "differentiated": ("plain", "rows-first", "masses-batch", "bias", "scale"),
    "hessian": ("plain",),
    "batched gradients": ("plain", "batch-crossed", "bias", "scale"),
    "twice": ("plain", "init", "bias", "scale"),
}


def problem(op: str, n: int, k: int, d: int, seed: int) -> Sample:
    """Normal logits, or features and prototypes whose products have the same variance."""
    draw = Draw(seed)
    last = draw.normal(k) if op in PASSES else 3
    if op in (SCORES, SCORES_PASS):
        return Sample(op, "problem", (draw.normal(n, k), last))
    return Sample(op, "problem", (draw.normal(n, d), draw.normal(k, d) / math.sqrt(d), last))


def large(op: str, n: int, k: int, d: int, offset: float, seed: int) -> Sample:
    """Normal features and prototypes, or their products; `offset` is added to all logits."""
    draw = Draw(seed)
    z, c = draw.normal(n, d), draw.normal(k, d) / math.sqrt(d)
    names = NAMES[op]
    shift = torch.full((k,), offset, dtype=torch.float64)
    args: tuple[Any, ...] = {
        SCORES: (z @ c.T + offset, 3, None, None, None, True, None, scale(1.25)),
        FEATURES: (z, c, 3, shift, None, None, None, True, scale(1.25)),
        SCORES_PASS: (z @ c.T + offset, torch.zeros_like(shift), None, None, scale(1.25)),
        FEATURES_PASS: (z, c, torch.zeros_like(shift), shift, None, scale(1.25)),
    }[op]
    smooth = tuple(n for n, a in zip(names, args, strict=True) if isinstance(a, Tensor))
    return Sample(op, "large", args, smooth)


def result_dtypes(op: str, dtype: torch.dtype) -> list[torch.dtype]:
    """Potentials and error are float32, or float64 for float64 rows."""
    dtype = compute_dtype(dtype)
    return [dtype, dtype, *(() if op in PASSES else (dtype,)), torch.int64]


# ---- calls that must raise -----------------------------------------------------------------------

PLAIN: dict[str, Callable[[], Any]] = {
    "logits": lambda: torch.zeros(5, 4),
    "z": lambda: torch.zeros(5, 3),
    "prototypes": lambda: torch.zeros(4, 3),
    "n_iter": lambda: 3,
    "g": lambda: torch.zeros(4),
    "bias": lambda: None,
    "log_row": lambda: None,
    "log_col": lambda: None,
    "init": lambda: None,
    "prototype_first": lambda: True,
    "scale": lambda: None,
    "precision": lambda: None,
}
_S, _F = (SCORES, SCORES_PASS), (FEATURES, FEATURES_PASS)
_STARTED, _WITH_START = (SCORES,), (FEATURES,)
_ROWS: list[BadRow] = [
    ("logits int", _S, TypeError, f"logits: expected {FLOATS}, got int64",
        {"logits": zeros(5, 4, dtype=torch.int64)}),
    ("logits complex", _S, TypeError, f"logits: expected {FLOATS}, got complex64",
        {"logits": zeros(5, 4, dtype=torch.complex64)}),
    ("logits 1-d", _S, ValueError, "logits: expected shape [..., N, K], got [4]",
        {"logits": zeros(4)}),
    ("K 0", _S, ValueError, "logits: expected K >= 1, got [5, 0]", {"logits": zeros(5, 0)}),
    ("rows' masses", _S, ValueError,
        "log_row: expected shape [..., 5] to match logits [5, 4], got [4]", {"log_row": zeros(4)}),
    ("logits bool", _S, TypeError, f"logits: expected {FLOATS}, got bool",
        {"logits": zeros(5, 4, dtype=torch.bool)}),
    ("logits 0-d", _S, ValueError, "logits: expected shape [..., N, K], got []",
        {"logits": zeros()}),
    ("start of another K", _STARTED, ValueError,
        "init: expected shape [..., 4] to match logits [5, 4], got [5]", {"init": zeros(5)}),
    ("rows' masses 0-d", _S, ValueError,
        "log_row: expected shape [..., 5] to match logits [5, 4], got []", {"log_row": zeros()}),
    ("columns' masses", _STARTED, ValueError,
        "log_col: expected shape [..., 4] to match logits [5, 4], got [5]", {"log_col": zeros(5)}),
    ("start", _STARTED, ValueError,
        "init: expected shape [..., 4] to match logits [5, 4], got [1]", {"init": zeros(1)}),
    ("leading dims", _STARTED, ValueError,
        "init: expected leading dims that broadcast to match logits [2, 5, 4], got [3, 4]",
        {"logits": zeros(2, 5, 4), "init": zeros(3, 4)}),
    ("z int", _F, TypeError, f"z: expected {FLOATS}, got int64",
        {"z": zeros(5, 3, dtype=torch.int64)}),
    ("prototypes float64", _F, TypeError,
        "prototypes: expected dtype float32 to match z, got float64",
        {"prototypes": zeros(4, 3, dtype=torch.float64)}),
    ("z complex", _F, TypeError, f"z: expected {FLOATS}, got complex64",
        {"z": zeros(5, 3, dtype=torch.complex64)}),
    ("z 0-d", _F, ValueError, "z: expected shape [..., N, D], got []", {"z": zeros()}),
    ("prototypes 1-d", _F, ValueError, "prototypes: expected shape [..., K, D], got [3]",
        {"prototypes": zeros(3)}),
    ("leading dims of prototypes", _F, ValueError,
        "prototypes: expected leading dims that broadcast to match z [2, 5, 3], got [7, 4, 3]",
        {"z": zeros(2, 5, 3), "prototypes": zeros(7, 4, 3)}),
    ("start of features", _WITH_START, ValueError,
        "init: expected shape [..., 4] to match prototypes [4, 3], got [5]", {"init": zeros(5)}),
    ("z 1-d", _F, ValueError, "z: expected shape [..., N, D], got [3]", {"z": zeros(3)}),
    ("D 0", _F, ValueError, "z: expected D >= 1, got [5, 0]",
        {"z": zeros(5, 0), "prototypes": zeros(4, 0)}),
    ("D differs", _F, ValueError,
        "prototypes: expected shape [..., K, 3] to match z [5, 3], got [4, 8]",
        {"prototypes": zeros(4, 8)}),
    ("no prototype", _F, ValueError, "prototypes: expected K >= 1, got [0, 3]",
        {"prototypes": zeros(0, 3)}),
    ("bias", _F, ValueError,
        "bias: expected shape [..., 4] to match prototypes [4, 3], got [5]", {"bias": zeros(5)}),
    ("bias of scores", _S, ValueError,
        "bias: expected shape [..., 4] to match logits [5, 4], got [5]", {"bias": zeros(5)}),
    ("scale int", COUPLED, TypeError, f"scale: expected {FLOATS}, got int64",
        {"scale": zeros(dtype=torch.int64)}),
    ("leading dims of the scale", _S, ValueError,
        "scale: expected leading dims that broadcast to match logits [2, 5, 4], got [3]",
        {"logits": zeros(2, 5, 4), "scale": zeros(3)}),
    ("leading dims of the scale of features", _F, ValueError,
        "scale: expected leading dims that broadcast to match z [2, 5, 3], got [3]",
        {"z": zeros(2, 5, 3), "scale": zeros(3)}),
    ("row masses of features", _F, ValueError,
        "log_row: expected shape [..., 5] to match z [5, 3], got [4]", {"log_row": zeros(4)}),
    ("masses int", BOTH, TypeError, f"log_col: expected {FLOATS}, got int64",
        {"log_col": zeros(4, dtype=torch.int64)}),
    ("start bool", BOTH, TypeError, f"init: expected {FLOATS}, got bool",
        {"init": zeros(4, dtype=torch.bool)}),
    ("iterations", BOTH, ValueError, "n_iter: expected an int >= 0, got -1", constants(n_iter=-1)),
    ("g of another K", (SCORES_PASS,), ValueError,
        "g: expected shape [..., 4] to match logits [5, 4], got [5]", {"g": zeros(5)}),
    ("g of features of another K", (FEATURES_PASS,), ValueError,
        "g: expected shape [..., 4] to match prototypes [4, 3], got [5]", {"g": zeros(5)}),
    ("g int", PASSES, TypeError, f"g: expected {FLOATS}, got int64",
        {"g": zeros(4, dtype=torch.int64)}),
    ("g 0-d", (SCORES_PASS,), ValueError,
        "g: expected shape [..., 4] to match logits [5, 4], got []", {"g": zeros()}),
    ("g of features 0-d", (FEATURES_PASS,), ValueError,
        "g: expected shape [..., 4] to match prototypes [4, 3], got []", {"g": zeros()}),
    ("g complex", PASSES, TypeError, f"g: expected {FLOATS}, got complex64",
        {"g": zeros(4, dtype=torch.complex64)}),
    ("row masses int", COUPLED, TypeError, f"log_row: expected {FLOATS}, got int64",
        {"log_row": zeros(5, dtype=torch.int64)}),
    ("leading dims of g", (SCORES_PASS,), ValueError,
        "g: expected leading dims that broadcast to match logits [2, 5, 4], got [3, 4]",
        {"logits": zeros(2, 5, 4), "g": zeros(3, 4)}),
    ("precision", COUPLED, ValueError,
        "precision: expected 'highest', 'high', 'medium' or None, got 'fast'",
        constants(precision="fast")),
]  # fmt: skip
_VALUES: list[BadRow] = [
    (f"scale {value}", COUPLED, ValueError, f"scale: expected finite values > 0, got {value}",
        {"scale": partial(torch.tensor, value)})
    for value in (0.0, -1.0, math.nan, math.inf)
]  # fmt: skip
_TYPES: list[BadRow] = [
    ("logits list", _S, TypeError, "logits: expected a Tensor, got list",
        constants(logits=[[1.0]])),
    ("z list", _F, TypeError, "z: expected a Tensor, got list", constants(z=[[1.0]])),
    ("n_iter float", BOTH, TypeError, "n_iter: expected an int >= 0, got 2.5",
        constants(n_iter=2.5)),
    ("n_iter bool", BOTH, TypeError, "n_iter: expected an int >= 0, got True",
        constants(n_iter=True)),
    ("g number", PASSES, TypeError, "g: expected a Tensor, got float", constants(g=0.0)),
    ("init number", BOTH, TypeError, "init: expected a Tensor or None, got float",
        constants(init=0.0)),
    ("scale number", COUPLED, TypeError, "scale: expected a Tensor or None, got float",
        constants(scale=20.0)),
    ("order", BOTH, TypeError, "prototype_first: expected a bool, got str",
        constants(prototype_first="yes")),
    ("precision number", COUPLED, TypeError, "precision: expected a str or None, got int",
        constants(precision=3)),
]  # fmt: skip
BAD_CALLS = {"op": _ROWS, "values": _VALUES, "function": _TYPES}
