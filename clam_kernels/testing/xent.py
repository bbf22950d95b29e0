# SPDX-License-Identifier: Apache-2.0
"""Samples and workloads of the cross-entropies over prototypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops._facts import compute_dtype
from ..ops.sinkhorn import sinkhorn_potentials_features
from . import DTYPES, BadRow, Sample, Workload, constants, spec_of, zeros
from . import _xent_swapped as swapped
from ._draw import Draw
from ._xent_swapped import SWAPPED

B, N, K, D = 2, 5, 4, 3
WIDE = (torch.float64, torch.float32)
NCE = ("proto_nce_losses",)
ALL = NCE + SWAPPED


def _positive(draw: Draw, *shape: int) -> Tensor:
    """Uniform in [0.25, 1.75), float64."""
    return draw.uniform(*shape, low=0.25, high=1.75)


def _labels(draw: Draw, k: int, *shape: int) -> Tensor:
    """Labels in [0, k)."""
    return torch.randint(k, shape, generator=draw.generator)


# ---- proto_nce_losses ----------------------------------------------------------------------------


def _nce(
    name: str,
    z: Tensor,
    prototypes: Tensor,
    phi: float | Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    offsets: list[int] | None = None,
    smooth: bool = True,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Sample:
    args = (z, prototypes, phi, labels, bias, offsets)
    names = ("z", "prototypes", "phi", "bias")
    values = (z, prototypes, phi, bias)
    tensors = tuple(n for n, x in zip(names, values, strict=True) if isinstance(x, Tensor))
    first, rest = (tensors, ()) if smooth else ((), tensors)
    return Sample(NCE[0], name, args, first, rest, dtypes)


def _nce_shapes(draw: Draw) -> list[Sample]:
    """Shapes, batches and temperatures."""
    z, c, labels = draw.normal(N, D), draw.normal(K, D), _labels(draw, K, 1, N)
    z2, c2 = draw.normal(B, N, D), draw.normal(B, K, D)
    many = _labels(draw, K, B, 1, N)
    return [
        _nce("one-prototype", z.clone(), draw.normal(1, D), 0.5, 0 * labels),
        _nce("no-rows", draw.normal(0, D), c.clone(), 0.5, labels[:, :0]),
        _nce("one-row", draw.normal(1, D), c.clone(), 0.5, labels[:, :1]),
        _nce("one-dim", draw.normal(N, 1), draw.normal(K, 1), 0.5, labels.clone()),
        _nce("wide", draw.normal(67, 17), draw.normal(33, 17), 2.0, _labels(draw, 33, 1, 67)),
        _nce("features", draw.normal(N, 100), draw.normal(K, 100), 5.0, labels.clone()),
        _nce("phi-0d", z.clone(), c.clone(), _positive(draw), labels.clone()),
        _nce("phi-1", z.clone(), c.clone(), _positive(draw, 1), labels.clone()),
        _nce("phi-each", z.clone(), c.clone(), _positive(draw, K), labels.clone()),
        _nce("phi-batch", z.clone(), c.clone(), _positive(draw, B, K), labels.clone()),
        _nce("batch", z2.clone(), c2.clone(), 0.5, many.clone()),
        _nce("batch-of-rows", z2.clone(), c.clone(), 0.5, many.clone()),
        _nce("batch-of-prototypes", z.clone(), c2.clone(), 0.5, labels.clone()),
        _nce("batch-of-labels", z.clone(), c.clone(), _positive(draw, K), many.clone()),
        _nce("batch-crossed", draw.normal(B, 1, N, D), draw.normal(3, K, D), 0.5, labels.clone()),
        _nce("no-batch", draw.normal(0, N, D), c.clone(), 0.5, labels.clone()),
    ]


def _nce_parts(draw: Draw) -> list[Sample]:
    """Biases, masked prototypes, ignored rows and several clusterings."""
    z, c, labels, phi = draw.normal(N, D), draw.normal(K, D), _labels(draw, K, 1, N), 0.5
    bias, masked = draw.normal(K), draw.normal(K)
    masked[2] = -math.inf
    others = torch.tensor([[0, 3, 1, 0, 3]])
    hidden = c.clone()
    hidden[2, 1] = math.nan
    ignored = torch.tensor([[0, -1, 3, 3, -1]])
    two = torch.stack([_labels(draw, K, N), _labels(draw, 3, N)])
    two[1, 2] = -1
    more, each = draw.normal(K + 3, D), _positive(draw, K + 3)
    ends, gone = [0, K, K + 3], draw.normal(K + 3)
    gone[K:] = -math.inf
    first = two.clone()
    first[1] = -1
    batch = torch.stack([two, two.flip(-1)])
    return [
        _nce("bias", z.clone(), c.clone(), phi, labels.clone(), bias),
        _nce("masked", z.clone(), c.clone(), _positive(draw, K), others.clone(), masked.clone()),
        _nce("masked-nan", z.clone(), hidden, _positive(draw, K), others.clone(), masked.clone(),
             smooth=False),
        _nce("ignored", z.clone(), c.clone(), _positive(draw, 1), ignored),
        _nce("all-ignored", z.clone(), c.clone(), _positive(draw, K), 0 * others - 1, bias.clone()),
        _nce("clusterings", z.clone(), more.clone(), each.clone(), two, draw.normal(K + 3), ends),
        _nce("clusterings-phi-0d", z.clone(), more.clone(), _positive(draw), two.clone(), None,
             list(ends)),
        _nce("clustering-masked", z.clone(), more.clone(), each.clone(), first, gone, list(ends)),
        _nce("everything", draw.normal(B, 1, N, D), draw.normal(3, K + 3, D),
             _positive(draw, 3, K + 3), batch[:, None], draw.normal(K + 3), list(ends)),
    ]  # fmt: skip


def _nce_values(draw: Draw) -> list[Sample]:
    """Rows and prototypes that are not finite, and large scores."""
    z, c, labels = draw.normal(N, D), draw.normal(K, D), _labels(draw, K, 1, N)
    irregular, undefined = z.clone(), c.clone()
    irregular[1, 1], irregular[3, 0], irregular[4] = math.nan, math.inf, math.nan
    undefined[1, 0] = math.nan
    some = labels.clone()
    some[0, 4] = -1
    phi = _positive(draw, K)
    return [
        _nce("not-finite-rows", irregular, c.clone(), phi.clone(), some, draw.normal(K),
             smooth=False),
        _nce("not-finite-prototype", z.clone(), undefined, 0.5, labels.clone(), smooth=False),
        _nce("saturated", 30 * z, c.clone(), 0.1, labels.clone(), smooth=False, dtypes=WIDE),
    ]  # fmt: skip


def samples(op: str, seed: int) -> list[Sample]:
    """Calls of an op of this family."""
    draw = Draw(seed)
    if op in SWAPPED:
        return swapped.SwappedSamples(draw).all()
    plain = _nce("plain", draw.normal(N, D), draw.normal(K, D), 0.5, _labels(draw, K, 1, N))
    return [plain, *_nce_shapes(draw), *_nce_parts(draw), *_nce_values(draw)]


# ---- workloads -----------------------------------------------------------------------------------


def unit_rows(generator: torch.Generator, *shape: int) -> Tensor:
    """Unit rows of random directions, float32."""
    rows = torch.randn(shape, generator=generator, dtype=torch.float32)
    return rows / rows.norm(dim=-1, keepdim=True)


def nce_problem(seed: int, n: int, d: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit rows and prototypes, temperatures around 0.1, and labels [1, n]."""
    generator = torch.Generator().manual_seed(seed)
    z, c = unit_rows(generator, n, d), unit_rows(generator, k, d)
    phi = 0.05 + 0.1 * torch.rand(k, generator=generator, dtype=torch.float32)
    return z, c, phi, torch.randint(k, (1, n), generator=generator)


def workloads() -> list[Workload]:
    """Calls worth timing."""
    result = []
    for n, d, k in ((2000, 128, 3000), (1000, 128, 20_000), (4000, 32, 1000)):
        name = f"{NCE[0]}/{n // 1000}k-{d}-{k}-fp32"
        make = partial(nce_problem, n=n, d=d, k=k)
        size = 4 * (n * d + k * d + 3 * n + k)
        result.append(Workload(name, NCE[0], make, size, 2 * n * k * d))
    for views, n, d, k in ((8, 250, 128, 1000), (2, 500, 128, 3000)):
        count = views * n
        name = f"{SWAPPED[0]}/{count // 1000}k-{d}-{k}-fp32"
        problem = partial(swapped_problem, views=views, n=n, d=d, k=k)
        size = 4 * (count * d + k * d + 2 * n + 2 * k + count)
        result.append(Workload(name, SWAPPED[0], problem, size, 2 * count * k * d))
    return result


def swapped_problem(seed: int, views: int, n: int, d: int, k: int) -> tuple[Tensor, ...]:
    """Unit rows [views, n, d] and prototypes, and the potentials of codes of the first two
    views.
    """
    generator = torch.Generator().manual_seed(seed)
    z, c = unit_rows(generator, views, n, d), unit_rows(generator, k, d)
    f, g = sinkhorn_potentials_features(z[:2] / 0.05, c, 3)[:2]
    return z, c, f + math.log(n), g


# ---- what the contract asks of this family -------------------------------------------------------

ROW_ARGUMENTS = {"z": -2, "labels": -1, "f": -1, "target_z": -2, "weight": -1}
COUPLED = ALL
_DIFFERENTIATED = (
    "plain", "phi-0d", "phi-batch", "bias", "everything", "clusterings", "teacher", "weight-views",
)  # fmt: skip
SELECTIONS = {
    "traced": (
        "plain", "no-rows", "batch-crossed", "phi-0d", "phi-each", "everything", "clusterings",
        "bias", "teacher", "pairs", "weight",
    ),
    "compiled": ("plain", "bias", "everything", "clusterings", "phi-each", "teacher", "weight"),
    "exported": ("plain", "bias", "clusterings", "teacher", "weight"),
    "laid": (
        "plain", "batch", "batch-crossed", "wide", "phi-batch", "bias", "everything", "teacher",
    ),
    "mapped": (
        "plain", "batch-crossed", "phi-0d", "phi-batch", "bias", "no-rows", "clusterings", "weight",
        "pairs",
    ),
    "nested": ("plain", "phi-each"),
    "autocast": ("plain", "bias", "phi-0d", "clusterings", "teacher", "weight"),
    "differentiated": _DIFFERENTIATED,
    "batched gradients": (*_DIFFERENTIATED, "batch-crossed"),
    "twice": ("plain", "everything", "phi-0d"),
    "hessian": ("plain", "phi-0d", "bias"),
    "frozen": ("everything", "phi-batch", "clusterings", "bias"),
    "views": ("everything", "phi-batch", "teacher"),
}  # fmt: skip


def problem(op: str, n: int, k: int, d: int, seed: int) -> Sample:
    """Normal rows and prototypes, one temperature; `swapped_prediction` has two views."""
    draw = Draw(seed)
    if op in SWAPPED:
        z, c = draw.normal(2, n, d), draw.normal(k, d) / math.sqrt(d)
        args = (z, c, draw.normal(2, n), draw.normal(2, k), 0.5, 1.0)
        return Sample(op, "problem", args, (), ("z", "prototypes"))
    z, c = draw.normal(n, d), draw.normal(k, d) / math.sqrt(d)
    return Sample(op, "problem", (z, c, 0.5, _labels(draw, k, 1, n)), (), ("z", "prototypes"))


def large(op: str, n: int, k: int, d: int, offset: float, seed: int) -> Sample:
    """Normal rows and prototypes in two clusterings, or two views with a teacher; `offset` is added
    to all scores of the rows.
    """
    draw = Draw(seed)
    z, c = draw.normal(n, d), draw.normal(k, d) / math.sqrt(d)
    bias = draw.normal(k) + offset
    if op in SWAPPED:
        z = torch.stack([z, z + 0.1 * draw.normal(n, d)])
        target = (draw.normal(2, n, d), c + 0.1 * draw.normal(k, d), draw.normal(k))
        f = draw.normal(2, n) - math.log(k)
        rest = (*target, draw.uniform(2, 2), draw.uniform(2, n))
        swapped_args = (z, c, f, draw.normal(2, k), 0.5, 1.0, bias, *rest)
        return Sample(op, "large", swapped_args, ("z", "prototypes", "bias"))
    half = max(k // 2, 1)
    labels = torch.stack([_labels(draw, half, n), _labels(draw, k - half, n)])
    labels[0, ::5] = -1
    args = (z, c, _positive(draw, k), labels, bias, [0, half, k])
    return Sample(op, "large", args, ("z", "prototypes", "phi", "bias"))


def result_dtypes(op: str, dtype: torch.dtype) -> list[torch.dtype]:
    """Losses are float32 unless z is float64."""
    return [compute_dtype(dtype)]


# ---- plain torch as users write it ---------------------------------------------------------------


def _eager_nce(
    z: Tensor,
    prototypes: Tensor,
    phi: float | Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    precision: str | None = None,
) -> Tensor:
    """`proto_nce_losses` in the dtype of the result; the truth itself where values are not
    finite.
    """
    operands = [x for x in (z, prototypes, bias) if x is not None]
    if not all(bool(x.isfinite().all()) for x in operands):
        truth: Callable[..., Tensor] = spec_of(NCE[0]).truth
        return truth(z, prototypes, phi, labels, bias, offsets)
    dtype = compute_dtype(z.dtype)
    s = z.to(dtype) @ prototypes.to(dtype).mT
    s = s / (phi.to(dtype)[..., None, :] if isinstance(phi, Tensor) and phi.ndim else phi)
    s = s if bias is None else s + bias.to(dtype)[..., None, :]
    batch = torch.broadcast_shapes(s.shape[:-2], labels.shape[:-2])
    s, labels = s.expand(*batch, *s.shape[-2:]), labels.expand(*batch, *labels.shape[-2:])
    losses = []
    for m, (start, stop) in enumerate(pairwise(offsets or (0, s.shape[-1]))):
        label = labels[..., m, :]
        logs = s[..., start:stop].log_softmax(-1)
        loss = -logs.gather(-1, label.clamp(min=0)[..., None])[..., 0]
        losses.append(torch.where(label < 0, 0.0, loss))
    return torch.stack(losses, -2)


EAGER = {NCE[0]: _eager_nce, SWAPPED[0]: swapped.eager_swapped}


# ---- calls that must raise -----------------------------------------------------------------------


def _first_labels() -> Tensor:
    return torch.zeros(1, 5, dtype=torch.int64)


PLAIN: dict[str, Callable[[], Any]] = {
    **swapped.PLAIN,
    "z": lambda: torch.zeros(5, 3),
    "prototypes": lambda: torch.ones(4, 3),
    "phi": lambda: 0.5,
    "labels": _first_labels,
    "bias": lambda: None,
    "offsets": lambda: None,
    "precision": lambda: None,
}


_FLOATS = "dtype float16, bfloat16, float32 or float64"
_FOUR = "to match prototypes [4, 3]"
_ROWS: list[BadRow] = [
    ("z int64", NCE, TypeError, f"z: expected {_FLOATS}, got int64",
        {"z": zeros(5, 3, dtype=torch.int64)}),
    ("prototypes bool", NCE, TypeError, f"prototypes: expected {_FLOATS}, got bool",
        {"prototypes": zeros(4, 3, dtype=torch.bool)}),
    ("prototypes float64", NCE, TypeError,
        "prototypes: expected dtype float32 to match z, got float64",
        {"prototypes": zeros(4, 3, dtype=torch.float64)}),
    ("z bfloat16", NCE, TypeError, "prototypes: expected dtype bfloat16 to match z, got float32",
        {"z": zeros(5, 3, dtype=torch.bfloat16)}),
    ("z 1-d", NCE, ValueError, "z: expected shape [..., N, D], got [3]", {"z": zeros(3)}),
    ("prototypes 1-d", NCE, ValueError, "prototypes: expected shape [..., K, D], got [3]",
        {"prototypes": zeros(3)}),
    ("D 0", NCE, ValueError, "z: expected D >= 1, got [5, 0]",
        {"z": zeros(5, 0), "prototypes": zeros(4, 0)}),
    ("K 0", NCE, ValueError, "prototypes: expected K >= 1, got [0, 3]",
        {"prototypes": zeros(0, 3)}),
    ("D differs", NCE, ValueError,
        "prototypes: expected shape [..., K, 3] to match z [5, 3], got [4, 8]",
        {"prototypes": zeros(4, 8)}),
    ("leading dims", NCE, ValueError,
        "prototypes: expected leading dims that broadcast to match z [2, 5, 3], got [7, 4, 3]",
        {"z": zeros(2, 5, 3), "prototypes": zeros(7, 4, 3)}),
    ("bias int", NCE, TypeError, f"bias: expected {_FLOATS}, got int64",
        {"bias": zeros(4, dtype=torch.int64)}),
    ("bias of another K", NCE, ValueError, f"bias: expected shape [..., 4] {_FOUR}, got [5]",
        {"bias": zeros(5)}),
    ("precision", NCE, ValueError,
        "precision: expected 'highest', 'high', 'medium' or None, got 'fast'",
        constants(precision="fast")),
    ("phi int", NCE, TypeError, f"phi: expected {_FLOATS}, got int64",
        {"phi": zeros(1, dtype=torch.int64)}),
    ("phi of another K", NCE, ValueError,
        f"phi: expected shape [], [..., 1] or [..., 4] {_FOUR}, got [3]",
        {"phi": lambda: torch.ones(3)}),
    *(
        (f"phi {value}", NCE, ValueError, f"phi: expected a finite number > 0, got {value}",
            constants(phi=value))
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    ("leading dims of phi", NCE, ValueError,
        "phi: expected leading dims that broadcast to match z [2, 5, 3], got [3, 1]",
        {"z": zeros(2, 5, 3), "phi": lambda: torch.ones(3, 1)}),
    ("labels int32", NCE, TypeError, "labels: expected dtype int64, got int32",
        {"labels": zeros(1, 5, dtype=torch.int32)}),
    ("labels 1-d", NCE, ValueError, "labels: expected shape [..., 1, 5] to match z [5, 3], got [5]",
        {"labels": zeros(5, dtype=torch.int64)}),
    ("labels of another N", NCE, ValueError,
        "labels: expected shape [..., 1, 5] to match z [5, 3], got [1, 4]",
        {"labels": zeros(1, 4, dtype=torch.int64)}),
    ("labels of two clusterings", NCE, ValueError,
        "labels: expected shape [..., 1, 5] to match z [5, 3], got [2, 5]",
        {"labels": zeros(2, 5, dtype=torch.int64)}),
    ("leading dims of labels", NCE, ValueError,
        "labels: expected leading dims that broadcast to match z [2, 5, 3], got [3, 1, 5]",
        {"z": zeros(2, 5, 3), "labels": zeros(3, 1, 5, dtype=torch.int64)}),
    *(
        (f"offsets {ends}", NCE, ValueError,
            f"offsets: expected increasing ints from 0 to 4 {_FOUR}, got {ends}",
            constants(offsets=ends))
        for ends in ([0], [1, 4], [0, 2, 2, 4], [0, 5], [0, 3])
    ),
]  # fmt: skip


def _label(value: int) -> Callable[[], Tensor]:
    return lambda: torch.tensor([[0, 1, value, 0, 0]])


_VALUES: list[BadRow] = [
    *(
        (f"phi {value}", NCE, ValueError, f"phi: expected finite values > 0, got {value}",
            {"phi": partial(torch.tensor, [value])})
        for value in (0.0, -1.0, math.nan)
    ),
    *(
        (f"label {value}", NCE, ValueError, f"labels: expected values in [-1, 4), got {value}",
            {"labels": _label(value)})
        for value in (-2, 4)
    ),
    ("label of a masked prototype", NCE, ValueError,
        "labels: expected labels of prototypes with bias > -inf, got 1",
        {"labels": _label(0), "bias": lambda: torch.tensor([0.0, -math.inf, 0.0, 0.0])}),
]  # fmt: skip
_NO_PHI: tuple[Any, ...] = ("1", None, True, [])
_TYPES: list[BadRow] = [
    ("z list", NCE, TypeError, "z: expected a Tensor, got list", constants(z=[[0.0]])),
    ("prototypes None", NCE, TypeError, "prototypes: expected a Tensor, got NoneType",
        constants(prototypes=None)),
    *(
        (f"phi {value!r}", NCE, TypeError,
            f"phi: expected a number or a Tensor, got {type(value).__name__}", constants(phi=value))
        for value in _NO_PHI
    ),
    ("labels list", NCE, TypeError, "labels: expected a Tensor, got list", constants(labels=[0])),
    ("bias list", NCE, TypeError, "bias: expected a Tensor or None, got list",
        constants(bias=[1.0])),
    ("precision int", NCE, TypeError, "precision: expected a str or None, got int",
        constants(precision=1)),
    ("offsets of floats", NCE, TypeError, "offsets: expected a list of ints or None, got [0, 4.0]",
        constants(offsets=[0, 4.0])),
]  # fmt: skip


_TABLES = {"op": _ROWS, "values": _VALUES, "function": _TYPES}
BAD_CALLS = {where: rows + swapped.BAD_CALLS[where] for where, rows in _TABLES.items()}
