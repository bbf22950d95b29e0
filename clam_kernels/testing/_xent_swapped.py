# SPDX-License-Identifier: Apache-2.0
"""Samples and bad calls of `swapped_prediction`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops._facts import compute_dtype
from . import DTYPES, BadRow, Sample, constants, spec_of, zeros
from ._draw import Draw

B, V, N, K, D = 2, 2, 5, 4, 3
SWAPPED = ("swapped_prediction",)
WIDE = (torch.float64, torch.float32)
# K of a call whose chunks do not have all prototypes.
MANY = 33_000


class SwappedSamples:
    """Draws calls: potentials of order 1, so that no code is near 0. Finite differences confirm the
    gradients of a call with a teacher; without one, the rows and prototypes also change the codes,
    which the gradient leaves out.
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def call(
        self,
        name: str,
        z: Tensor,
        prototypes: Tensor,
        assigned: int = V,
        *,
        f: Tensor | None = None,
        own: bool = False,
        smooth: bool = True,
        dtypes: tuple[torch.dtype, ...] = DTYPES,
        temperature: float = 0.5,
        epsilon: float = 1.0,
        **tensors: Tensor,
    ) -> Sample:
        """A call with random potentials, and with a teacher unless `own`; `tensors` are the
        optional arguments.
        """
        draw, (n, d), k = self.draw, z.shape[-2:], prototypes.shape[-2]
        f = draw.normal(assigned, n) if f is None else f
        if not own:
            tensors.setdefault("target_z", draw.normal(assigned, n, d))
            tensors.setdefault("target_prototypes", draw.normal(k, d) / math.sqrt(d))
            if "bias" in tensors:
                tensors.setdefault("target_bias", draw.normal(k))
        names = ("bias", "target_z", "target_prototypes", "target_bias", "pairs", "weight")
        rest = [tensors.get(x) for x in names]
        args = (z, prototypes, f, draw.normal(assigned, k), temperature, epsilon, *rest)
        leaves = ("z", "prototypes", *(["bias"] if "bias" in tensors else []))
        first, kinks = (leaves, ()) if smooth and not own else ((), leaves)
        return Sample(SWAPPED[0], name, args, first, kinks, dtypes)

    def pair(self, *batch: int) -> tuple[Tensor, Tensor]:
        """Rows and prototypes of ordinary sizes."""
        return self.draw.normal(*batch, V, N, D), self.draw.normal(K, D)

    def shapes(self) -> list[Sample]:
        """Sizes, views, batches."""
        draw, call, pair = self.draw, self.call, self.pair
        normal = draw.normal
        one = torch.ones(1, 1, dtype=torch.float64)
        return [
            call("one-view", normal(1, N, D), normal(K, D), 1, pairs=one),
            call("crops", normal(4, N, D), normal(K, D)),
            call("no-rows", normal(V, 0, D), normal(K, D)),
            call("one-row", normal(V, 1, D), normal(K, D)),
            call("one-prototype", normal(V, N, D), normal(1, D)),
            call("one-dim", normal(V, N, 1), normal(K, 1)),
            call("wide", normal(V, 67, 17), normal(33, 17), temperature=2.0, epsilon=3.0),
            call("temperatures", *pair(), temperature=0.25, epsilon=0.75),
            call("batch", normal(B, V, N, D), normal(B, K, D)),
            call("batch-of-rows", *pair(B)),
            call("batch-of-prototypes", normal(V, N, D), normal(B, K, D)),
            call("batch-of-potentials", *pair(), f=normal(B, V, N)),
            call("batch-crossed", normal(B, 1, V, N, D), normal(3, K, D)),
            call("no-batch", normal(0, V, N, D), normal(K, D)),
            call("many-prototypes", normal(1, 3, 1), normal(MANY, 1), 1, pairs=one.clone(),
                 bias=normal(MANY), f=normal(1, 3) - 10, dtypes=WIDE),
        ]  # fmt: skip

    def options(self) -> list[Sample]:
        """Biases, teachers, pairs and weights."""
        draw, call, pair = self.draw, self.call, self.pair
        normal = draw.normal
        masked, views = normal(K), draw.uniform(V, N)
        masked[1] = -math.inf
        views[0, 2] = views[1, 4] = 0.0
        light = draw.uniform(N)
        light[3] = 0.0
        hidden_z, hidden_c = pair()
        hidden_z[0, 3, 1], hidden_c[1] = math.nan, math.nan
        part = draw.uniform(V, V)
        part[0, 1] = 0.0
        return [
            call("own", *pair(), own=True),
            call("own-crops", normal(4, N, D), normal(K, D), own=True),
            call("own-rows", *pair(), own=True, target_prototypes=normal(K, D), bias=normal(K)),
            call("own-prototypes", *pair(), own=True, target_z=normal(V, N, D)),
            call("own-bias", *pair(), own=True, bias=normal(K), weight=light.clone()),
            call("own-masked", *pair(), own=True, bias=masked.clone()),
            call("hidden", hidden_z, hidden_c, own=True, bias=masked.clone(), weight=light.clone()),
            call("bias", *pair(), bias=normal(K)),
            call("masked", *pair(), bias=masked, target_bias=masked.clone()),
            call("teacher", *pair(), target_z=normal(V, N, 2), target_prototypes=normal(K, 2),
                 target_bias=normal(K)),
            call("pairs", *pair(), own=True, pairs=part),
            call("weight", *pair(), weight=light),
            call("weight-row", *pair(), weight=light.clone()[None]),
            call("weight-views", *pair(), weight=views),
            call("weights-0", *pair(), weight=0 * light),
            call("everything", normal(B, 1, V, N, D), normal(3, K, D), f=normal(3, V, N),
                 bias=normal(B, 1, K), target_z=normal(V, N, 2), target_prototypes=normal(3, K, 2),
                 target_bias=normal(K), pairs=draw.uniform(V, V), weight=draw.uniform(3, V, N)),
        ]  # fmt: skip

    def values(self) -> list[Sample]:
        """Rows, teachers and codes that are not finite; a code with mass on a masked prototype."""
        draw, call = self.draw, self.call
        z, c = self.pair()
        irregular, undefined, broken = z.clone(), draw.normal(V, N, D), draw.normal(V, N)
        irregular[0, 1, 1], irregular[1, 3, 0] = math.nan, math.inf
        undefined[0, 2, 0], broken[1, 4] = math.nan, math.nan
        masked, void = draw.normal(K), c.clone()
        masked[1], void[2, 0] = -math.inf, math.nan
        one = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        return [
            call("not-finite-rows", irregular, c.clone(), own=True),
            call("not-finite-teacher", z.clone(), c.clone(), target_z=undefined, smooth=False),
            call("not-finite-codes", z.clone(), c.clone(), f=broken, smooth=False),
            call("not-finite-elsewhere", z.clone(), c.clone(), f=broken.clone(), pairs=one),
            call("not-finite-prototype", z.clone(), void, own=True),
            call("mass-on-masked", z.clone(), c.clone(), bias=masked, smooth=False),
        ]

    def all(self) -> list[Sample]:
        plain = self.call("plain", *self.pair())
        return [plain, *self.shapes(), *self.options(), *self.values()]


def eager_swapped(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    bias: Tensor | None = None,
    target_z: Tensor | None = None,
    target_prototypes: Tensor | None = None,
    target_bias: Tensor | None = None,
    pairs: Tensor | None = None,
    weight: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`swapped_prediction` in the dtype of the result, pair by pair; the truth itself where values
    are not finite.
    """
    target = (target_z, target_prototypes, target_bias)
    operands = (z, prototypes, f, g, bias, *target)
    if not all(bool(x.isfinite().all()) for x in operands if x is not None):
        truth: Callable[..., Tensor] = spec_of(SWAPPED[0]).truth
        return truth(z, prototypes, f, g, temperature, epsilon, bias, *target, pairs, weight)
    dtype, views, assigned = compute_dtype(z.dtype), z.shape[-3], f.shape[-2]

    def scores(rows: Tensor, points: Tensor, line: Tensor | None) -> Tensor:
        s = rows.to(dtype) @ points.to(dtype)[..., None, :, :].mT
        return s if line is None else s + line.to(dtype)[..., None, None, :]

    logs = (scores(z, prototypes, bias) / temperature).log_softmax(-1)
    rows = z[..., :assigned, :, :] if target_z is None else target_z
    points = prototypes if target_prototypes is None else target_prototypes
    s = scores(rows, points, bias if target_bias is None else target_bias).detach()
    q = (s / epsilon + f.to(dtype)[..., None] + g.to(dtype)[..., None, :]).exp()
    if weight is None:
        weight = z.new_ones(z.shape[-2])
    share = weight.to(dtype).expand(*weight.shape[:-2], views, z.shape[-2])
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    loss: Any = 0.0
    for a in range(assigned):
        for v in range(views):
            losses = -(q[..., a, :, :] * logs[..., v, :, :]).sum(-1)
            mean = (share[..., v, :] * losses).sum(-1)
            if pairs is not None:
                loss = loss + pairs.to(dtype)[..., a, v] * mean
            elif a != v:
                loss = loss + mean / (assigned * (views - 1))
    return loss


# ---- calls that must raise -----------------------------------------------------------------------

PLAIN: dict[str, Callable[[], Any]] = {
    "z": zeros(2, 5, 3),
    "prototypes": lambda: torch.ones(4, 3),
    "f": zeros(2, 5),
    "g": zeros(2, 4),
    **constants(temperature=0.1, epsilon=0.05, bias=None, target_z=None, target_prototypes=None),
    **constants(target_bias=None, pairs=None, weight=None, precision=None),
}

_FLOATS = "dtype float16, bfloat16, float32 or float64"
_Z, _C, _F = "z [2, 5, 3]", "prototypes [4, 3]", "f [2, 5]"
_T, _VE = TypeError, ValueError
_Short = tuple[str, type[Exception], str, dict[str, Callable[[], Any]]]
_SHORT: list[_Short] = [
    ("z int64", _T, f"z: expected {_FLOATS}, got int64", {"z": zeros(2, 5, 3, dtype=torch.int64)}),
    ("prototypes float64", _T, "prototypes: expected dtype float32 to match z, got float64",
        {"prototypes": zeros(4, 3, dtype=torch.float64)}),
    ("z 2-d", _VE, "z: expected shape [..., V, N, D], got [5, 3]", {"z": zeros(5, 3)}),
    ("no views", _VE, "z: expected V >= 1, got [0, 5, 3]", {"z": zeros(0, 5, 3)}),
    ("D 0", _VE, "z: expected D >= 1, got [2, 5, 0]",
        {"z": zeros(2, 5, 0), "prototypes": zeros(4, 0)}),
    ("K 0", _VE, "prototypes: expected K >= 1, got [0, 3]", {"prototypes": zeros(0, 3)}),
    ("D differs", _VE, f"prototypes: expected shape [..., K, 3] to match {_Z}, got [4, 8]",
        {"prototypes": zeros(4, 8)}),
    ("f 1-d", _VE, f"f: expected shape [..., A, 5] to match {_Z}, got [5]", {"f": zeros(5)}),
    ("f int", _T, f"f: expected {_FLOATS}, got int64", {"f": zeros(2, 5, dtype=torch.int64)}),
    ("no codes", _VE, "f: expected A >= 1, got [0, 5]", {"f": zeros(0, 5)}),
    ("codes of more views", _VE, f"f: expected shape [..., A <= 2, 5] to match {_Z}, got [3, 5]",
        {"f": zeros(3, 5), "g": zeros(3, 4)}),
    ("g of another K", _VE, f"g: expected shape [..., 2, 4] to match {_F} and {_C}, got [2, 5]",
        {"g": zeros(2, 5)}),
    ("g of one view", _VE, f"g: expected shape [..., 2, 4] to match {_F} and {_C}, got [4]",
        {"g": zeros(4)}),
    ("leading dims", _VE,
        "prototypes: expected leading dims that broadcast to match z [2, 2, 5, 3], got [7, 4, 3]",
        {"z": zeros(2, 2, 5, 3), "prototypes": zeros(7, 4, 3)}),
    ("leading dims of g", _VE,
        "g: expected leading dims that broadcast to match z [2, 2, 5, 3], got [3, 2, 4]",
        {"z": zeros(2, 2, 5, 3), "g": zeros(3, 2, 4)}),
    ("bias of another K", _VE, f"bias: expected shape [..., 4] to match {_C}, got [5]",
        {"bias": zeros(5)}),
    ("target_z of another N", _VE,
        f"target_z: expected shape [..., 2, 5, 3] to match {_Z} and f, got [2, 6, 3]",
        {"target_z": zeros(2, 6, 3)}),
    ("target_z of other features", _VE,
        f"target_z: expected shape [..., 2, 5, 3] to match {_Z} and f, got [2, 5, 8]",
        {"target_z": zeros(2, 5, 8)}),
    ("target_prototypes of another K", _VE,
        f"target_prototypes: expected shape [..., 4, 3] to match {_C}, got [5, 3]",
        {"target_prototypes": zeros(5, 3)}),
    ("target_prototypes int", _T, f"target_prototypes: expected {_FLOATS}, got int64",
        {"target_prototypes": zeros(4, 3, dtype=torch.int64)}),
    ("target_bias of another K", _VE,
        f"target_bias: expected shape [..., 4] to match {_C}, got [3]", {"target_bias": zeros(3)}),
    ("pairs of other views", _VE,
        f"pairs: expected shape [..., 2, 2] to match {_F} and z, got [2, 3]",
        {"pairs": zeros(2, 3)}),
    ("one view", _VE, "pairs: expected a Tensor: there is no other view to match z [1, 5, 3], got"
        " None", {"z": zeros(1, 5, 3), "f": zeros(1, 5), "g": zeros(1, 4)}),
    ("weight of another N", _VE,
        f"weight: expected shape [5], [..., 1, 5] or [..., 2, 5] to match {_Z}, got [4]",
        {"weight": zeros(4)}),
    ("weight of other views", _VE,
        f"weight: expected shape [5], [..., 1, 5] or [..., 2, 5] to match {_Z}, got [3, 5]",
        {"weight": zeros(3, 5)}),
    ("weight int", _T, f"weight: expected {_FLOATS}, got int64",
        {"weight": zeros(5, dtype=torch.int64)}),
    *(
        (f"{name} {value}", _VE, f"{name}: expected a finite number > 0, got {value}",
            constants(**{name: value}))
        for name in ("temperature", "epsilon")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    ("precision", _VE, "precision: expected 'highest', 'high', 'medium' or None, got 'fast'",
        constants(precision="fast")),
]  # fmt: skip
_SHORT_VALUES: list[_Short] = [
    (f"weight {value}", _VE, f"weight: expected finite values >= 0, got {value}",
        {"z": zeros(1, 2, 5, 3), "weight": partial(torch.full, (5,), value)})
    for value in (-1.0, math.nan, math.inf)
]  # fmt: skip
_SHORT_TYPES: list[_Short] = [
    ("z list", _T, "z: expected a Tensor, got list", constants(z=[[0.0]])),
    ("f None", _T, "f: expected a Tensor, got NoneType", constants(f=None)),
    ("temperature None", _T, "temperature: expected a number, got NoneType",
        constants(temperature=None)),
    ("epsilon tensor", _T, "epsilon: expected a number, got Tensor", {"epsilon": zeros()}),
    ("pairs list", _T, "pairs: expected a Tensor or None, got list", constants(pairs=[[1.0]])),
    ("precision int", _T, "precision: expected a str or None, got int", constants(precision=1)),
]  # fmt: skip


def _rows(short: list[_Short]) -> list[BadRow]:
    """Rows of the table: the plain arguments of this op, with those that differ."""
    return [
        (name, SWAPPED, error, text, {**PLAIN, **changed}) for name, error, text, changed in short
    ]


BAD_CALLS = {
    "op": _rows(_SHORT), "values": _rows(_SHORT_VALUES), "function": _rows(_SHORT_TYPES),
}  # fmt: skip
