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

from . import DTYPES, Bad, Row, Sample, Workload, given, refusals, zeros

B, N, K, D = 2, 7, 4, 3
T = 3
WIDE = (torch.float64, torch.float32)
SCORES, FEATURES = "sinkhorn_potentials", "sinkhorn_potentials_features"
SCORES_PASS, FEATURES_PASS = "sinkhorn_pass", "sinkhorn_features_pass"


@dataclass(frozen=True)
class _Call:
    """A call of an op; the features form takes z and prototypes for the logits. That of a pass has
    no number of iterations, and starts at `init`.
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

    def arguments(self, op: str, draw: _Draw) -> tuple[Any, ...]:
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


class _Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def masses(self, *shape: int) -> Tensor:
        """Logarithms of marginals."""
        return self.normal(*shape).log_softmax(-1)


def scale(value: Any) -> Tensor:
    """What the scores of a problem, or of each of a batch, are multiplied by."""
    return torch.tensor(value, dtype=torch.float64)


def _calls(draw: _Draw) -> list[_Call]:
    def x(*shape: int) -> Tensor:
        return 2 * draw.normal(*shape)

    dead_row, dead_col = draw.masses(N), draw.masses(K)
    dead_row[2], dead_col[1] = -math.inf, -math.inf
    lost = x(N, K)
    lost[0, 0] = torch.nan
    a, b = draw.masses(N), draw.masses(K)
    buried = x(N, K)
    buried[2], buried[:, 1] = math.nan, math.inf
    shut = x(N, K)
    shut[0, 1] = shut[3, 2] = -math.inf
    return [
        _Call("plain", x(N, K)),
        _Call("no-iterations", x(N, K), 0),
        _Call("no-iterations-init", x(N, K), 0, init=draw.normal(K)),
        _Call("one-iteration", x(N, K), 1),
        _Call("ten-iterations", x(N, K), 10),
        _Call("rows-first", x(N, K), first=False),
        _Call("one-column", x(N, 1)),
        _Call("one-row", x(1, K)),
        _Call("no-rows", x(0, K)),
        _Call("wide", x(67, 33)),
        _Call("row-masses", x(N, K), log_row=a),
        _Call("column-masses", x(N, K), log_col=b),
        _Call("masses-rows-first", x(N, K), log_row=a.clone(), log_col=b.clone(), first=False),
        _Call("masses-batch", x(N, K), log_row=draw.masses(B, N), log_col=draw.masses(K)),
        _Call("init", x(N, K), init=draw.normal(K)),
        _Call("init-batch", x(N, K), init=draw.normal(B, K)),
        _Call("init-rows-first", x(N, K), init=draw.normal(K), first=False),
        _Call(
            "zero-masses", buried, log_row=dead_row, log_col=dead_col, dtypes=WIDE, scale=scale(0.8)
        ),
        _Call("sharp", 8 * x(N, K), dtypes=WIDE),
        _Call("batch", x(B, N, K)),
        _Call("batch-crossed", x(B, 1, N, K), log_col=draw.masses(3, K)),
        _Call("no-batch", x(0, N, K)),
        _Call("bias", x(N, K), bias=True),
        _Call("lost", lost, dtypes=WIDE, scale=scale(0.5)),
        _Call("scale", x(N, K), scale=scale(0.4)),
        _Call("scale-rows-first", x(N, K), first=False, scale=scale(2.5)),
        _Call("scale-batch", x(N, K), scale=scale([0.5, 2.0]), init=draw.normal(K)),
        _Call("scale-forbidden", shut, scale=scale(1.5), dtypes=WIDE),
        _Call(
            "everything", x(B, 1, N, K), 2, draw.masses(N), draw.masses(3, K), draw.normal(K),
            bias=True, scale=scale([[0.7], [1.3]]),
        ),
    ]  # fmt: skip


def _passes(draw: _Draw) -> list[_Call]:
    def call(name: str, *shape: int, g: Tensor | None = None, **rest: Any) -> _Call:
        start = draw.normal(shape[-1]) if g is None else g
        return _Call(name, 2 * draw.normal(*shape), init=start, **rest)

    lost = call("lost", N, K, dtypes=WIDE)
    lost.logits[0, 0] = torch.nan
    dead_row, dead_g = draw.masses(N), draw.normal(K)
    dead_row[2], dead_g[1] = -math.inf, -math.inf
    buried = call("zero-masses", N, K, g=dead_g, log_row=dead_row, dtypes=WIDE, scale=scale(0.8))
    buried.logits[2], buried.logits[:, 1] = math.nan, math.inf
    shut = call("scale-forbidden", N, K, scale=scale(1.5), dtypes=WIDE)
    shut.logits[0, 1] = shut.logits[3, 2] = -math.inf
    return [
        buried,
        call("plain", N, K),
        call("one-column", N, 1),
        call("one-row", 1, K),
        call("no-rows", 0, K),
        call("no-batch", 0, N, K),
        lost,
        call("sharp-start", N, K, g=30 * draw.normal(K), dtypes=WIDE),
        call("wide", 67, 33),
        call("row-masses", N, K, log_row=draw.masses(N)),
        call("heavy-rows", N, K, log_row=20 * draw.normal(N), dtypes=WIDE),
        call("batch", B, N, K),
        call("batch-crossed", B, 1, N, K, g=draw.normal(3, K)),
        call("bias", N, K, bias=True),
        call("scale", N, K, scale=scale(0.4)),
        call("scale-batch", N, K, scale=scale([0.5, 2.0])),
        shut,
        call(
            "everything",
            B,
            1,
            N,
            K,
            g=draw.normal(3, K),
            log_row=draw.masses(N),
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
# Potentials or masses of these are not finite: no finite difference is.
BORDERS = ("zero-masses", "lost", "scale-forbidden")
BORDERS_OF_PASSES = (*BORDERS, "no-rows")


def samples(op: str, seed: int) -> list[Sample]:
    """Calls of an op of this family."""
    draw = _Draw(seed)
    found = []
    borders = BORDERS_OF_PASSES if op in PASSES else BORDERS
    for call in _passes(draw) if op in PASSES else _calls(draw):
        args = call.arguments(op, draw)
        tensors = tuple(n for n, a in zip(NAMES[op], args, strict=True) if isinstance(a, Tensor))
        smooth, kinks = ((), tensors) if call.name in borders else (tensors, ())
        found.append(Sample(op, call.name, args, smooth, kinks, call.dtypes))
    return found


def workloads() -> list[Workload]:
    """Calls worth timing."""
    found = []
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
        found += [
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
    return found


def _unit_rows(seed: int, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Unit features, and unit prototypes over epsilon .05."""
    generator = torch.Generator().manual_seed(seed)
    z, c = (torch.randn(size, d, generator=generator, dtype=torch.float32) for size in (n, k))
    normal = torch.nn.functional.normalize
    return normal(z, dim=1), normal(c, dim=1) / 0.05


# ---- what the contract asks of this family -------------------------------------------------------

BOTH, PASSES = (SCORES, FEATURES), (SCORES_PASS, FEATURES_PASS)
COUPLED = (*BOTH, *PASSES)
ROW_ARGUMENTS = ("logits", "z", "log_row")
# potentials are sums of logarithms, the error a difference of masses of total 1
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
    """Normal logits, or features and prototypes whose products are such."""
    draw = _Draw(seed)
    more = draw.normal(k) if op in PASSES else 3
    if op in (SCORES, SCORES_PASS):
        return Sample(op, "problem", (draw.normal(n, k), more))
    return Sample(op, "problem", (draw.normal(n, d), draw.normal(k, d) / math.sqrt(d), more))


def large(op: str, n: int, k: int, d: int, offset: float, seed: int) -> Sample:
    """Rows around k prototypes; the offset is one of all logits, or of a feature."""
    draw = _Draw(seed)
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
    """Potentials and error in float32 unless the rows are float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [wide, wide, *(() if op in PASSES else (wide,)), torch.int64]


# ---- calls that must be refused ------------------------------------------------------------------

_PLAIN: dict[str, Callable[[], Any]] = {
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
_FLOATS = "dtype float16, bfloat16, float32 or float64"
_S, _F = (SCORES, SCORES_PASS), (FEATURES, FEATURES_PASS)
_STARTED, _WITH_START = (SCORES,), (FEATURES,)
_ROWS: list[Row] = [
    ("logits int", _S, TypeError, f"logits: expected {_FLOATS}, got int64",
        {"logits": zeros(5, 4, dtype=torch.int64)}),
    ("logits complex", _S, TypeError, f"logits: expected {_FLOATS}, got complex64",
        {"logits": zeros(5, 4, dtype=torch.complex64)}),
    ("logits 1-d", _S, ValueError, "logits: expected shape [..., N, K], got [4]",
        {"logits": zeros(4)}),
    ("K 0", _S, ValueError, "logits: expected K >= 1, got [5, 0]", {"logits": zeros(5, 0)}),
    ("rows' masses", _S, ValueError,
        "log_row: expected shape [..., 5] to match logits [5, 4], got [4]", {"log_row": zeros(4)}),
    ("logits bool", _S, TypeError, f"logits: expected {_FLOATS}, got bool",
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
    ("z int", _F, TypeError, f"z: expected {_FLOATS}, got int64",
        {"z": zeros(5, 3, dtype=torch.int64)}),
    ("prototypes float64", _F, TypeError,
        "prototypes: expected dtype float32 to match z, got float64",
        {"prototypes": zeros(4, 3, dtype=torch.float64)}),
    ("z complex", _F, TypeError, f"z: expected {_FLOATS}, got complex64",
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
    ("scale int", COUPLED, TypeError, f"scale: expected {_FLOATS}, got int64",
        {"scale": zeros(dtype=torch.int64)}),
    ("leading dims of the scale", _S, ValueError,
        "scale: expected leading dims that broadcast to match logits [2, 5, 4], got [3]",
        {"logits": zeros(2, 5, 4), "scale": zeros(3)}),
    ("leading dims of the scale of features", _F, ValueError,
        "scale: expected leading dims that broadcast to match z [2, 5, 3], got [3]",
        {"z": zeros(2, 5, 3), "scale": zeros(3)}),
    ("row masses of features", _F, ValueError,
        "log_row: expected shape [..., 5] to match z [5, 3], got [4]", {"log_row": zeros(4)}),
    ("masses int", BOTH, TypeError, f"log_col: expected {_FLOATS}, got int64",
        {"log_col": zeros(4, dtype=torch.int64)}),
    ("start bool", BOTH, TypeError, f"init: expected {_FLOATS}, got bool",
        {"init": zeros(4, dtype=torch.bool)}),
    ("iterations", BOTH, ValueError, "n_iter: expected an int >= 0, got -1", given(n_iter=-1)),
    ("g of another K", (SCORES_PASS,), ValueError,
        "g: expected shape [..., 4] to match logits [5, 4], got [5]", {"g": zeros(5)}),
    ("g of features of another K", (FEATURES_PASS,), ValueError,
        "g: expected shape [..., 4] to match prototypes [4, 3], got [5]", {"g": zeros(5)}),
    ("g int", PASSES, TypeError, f"g: expected {_FLOATS}, got int64",
        {"g": zeros(4, dtype=torch.int64)}),
    ("g 0-d", (SCORES_PASS,), ValueError,
        "g: expected shape [..., 4] to match logits [5, 4], got []", {"g": zeros()}),
    ("g of features 0-d", (FEATURES_PASS,), ValueError,
        "g: expected shape [..., 4] to match prototypes [4, 3], got []", {"g": zeros()}),
    ("g complex", PASSES, TypeError, f"g: expected {_FLOATS}, got complex64",
        {"g": zeros(4, dtype=torch.complex64)}),
    ("row masses int", COUPLED, TypeError, f"log_row: expected {_FLOATS}, got int64",
        {"log_row": zeros(5, dtype=torch.int64)}),
    ("leading dims of g", (SCORES_PASS,), ValueError,
        "g: expected leading dims that broadcast to match logits [2, 5, 4], got [3, 4]",
        {"logits": zeros(2, 5, 4), "g": zeros(3, 4)}),
    ("precision", COUPLED, ValueError,
        "precision: expected 'highest', 'high', 'medium' or None, got 'fast'",
        given(precision="fast")),
]  # fmt: skip
_VALUES: list[Row] = [
    (f"scale {value}", COUPLED, ValueError, f"scale: expected finite values > 0, got {value}",
        {"scale": partial(torch.tensor, value)})
    for value in (0.0, -1.0, math.nan, math.inf)
]  # fmt: skip
_TYPES: list[Row] = [
    ("logits list", _S, TypeError, "logits: expected a Tensor, got list", given(logits=[[1.0]])),
    ("z list", _F, TypeError, "z: expected a Tensor, got list", given(z=[[1.0]])),
    ("n_iter float", BOTH, TypeError, "n_iter: expected an int >= 0, got 2.5", given(n_iter=2.5)),
    ("n_iter bool", BOTH, TypeError, "n_iter: expected an int >= 0, got True",
        given(n_iter=True)),
    ("g number", PASSES, TypeError, "g: expected a Tensor, got float", given(g=0.0)),
    ("init number", BOTH, TypeError, "init: expected a Tensor or None, got float",
        given(init=0.0)),
    ("scale number", COUPLED, TypeError, "scale: expected a Tensor or None, got float",
        given(scale=20.0)),
    ("order", BOTH, TypeError, "prototype_first: expected a bool, got str",
        given(prototype_first="yes")),
    ("precision number", COUPLED, TypeError, "precision: expected a str or None, got int",
        given(precision=3)),
]  # fmt: skip


def bad_calls() -> list[Bad]:
    """Calls that must be refused."""
    return refusals(_PLAIN, {"op": _ROWS, "values": _VALUES, "function": _TYPES})
