# SPDX-License-Identifier: Apache-2.0
"""Samples and workloads of deep embedded clustering."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.dec import dec_target
from . import DTYPES, FLOATS, BadRow, Sample, Workload, constants, spec_of, zeros
from ._draw import Draw

B, N, K, D = 2, 5, 4, 3
WIDE = (torch.float64, torch.float32)
STATS, LOSSES = ("student_t_stats",), ("dec_losses",)
ALL = STATS + LOSSES


def _positive(draw: Draw, *shape: int) -> Tensor:
    """Uniform in [0.25, 1.75), float64."""
    return draw.uniform(*shape, low=0.25, high=1.75)


class _Call:
    """One call before it is spelled out for an op."""

    def __init__(
        self,
        name: str,
        z: Tensor,
        mu: Tensor,
        alpha: float | Tensor = 1.0,
        weight: Tensor | None = None,
        alpha0: float = 1.0,
        wide: bool = False,
    ) -> None:
        self.name, self.z, self.mu, self.alpha = name, z, mu, alpha
        self.weight, self.alpha0 = weight, alpha0
        self.dtypes = WIDE if wide else DTYPES

    def stats(self) -> Sample:
        args = (self.z, self.mu, self.alpha, self.weight)
        return Sample("student_t_stats", self.name, args, dtypes=self.dtypes)

    def losses(self, draw: Draw) -> Sample:
        """The call with a frozen target, from rows and centroids a little apart."""
        z0, mu0 = (x + 0.3 * draw.normal(*x.shape) for x in (self.z, self.mu))
        log_counts = draw.normal(*self.mu.shape[:-1])
        frozen = (log_counts, z0, mu0, self.alpha0, None, None)
        return self._sample((self.z, self.mu, self.alpha, self.weight, *frozen), True)

    def of_target(self, name: str, smooth: bool, *frozen: Any) -> Sample:
        """The call with (log_counts, z0, mu0, alpha0, log_norm, p)."""
        return self._sample((self.z, self.mu, self.alpha, self.weight, *frozen), smooth, name)

    def _sample(self, args: tuple[Any, ...], smooth: bool, name: str = "") -> Sample:
        """`smooth`: p does not depend on what is differentiated."""
        names = ("z", "mu", *(["alpha"] if isinstance(self.alpha, Tensor) else []))
        first, rest = (names, ()) if smooth else ((), names)
        return Sample("dec_losses", name or self.name, args, first, rest, self.dtypes)


def _regular(draw: Draw) -> list[_Call]:
    """Shapes, batches, weights and degrees of freedom."""
    inf = math.inf
    z, mu = draw.normal(N, D), draw.normal(K, D)
    light = _positive(draw, N)
    light[3] = 0.0
    return [
        _Call("one-centroid", draw.normal(N, D), draw.normal(1, D)),
        _Call("no-rows", draw.normal(0, D), draw.normal(K, D)),
        _Call("one-row", draw.normal(1, D), draw.normal(K, D)),
        _Call("one-dim", draw.normal(N, 1), draw.normal(K, 1)),
        _Call("wide", draw.normal(67, 17), draw.normal(33, 17)),
        _Call("features", draw.normal(N, 100), draw.normal(K, 100)),
        _Call("on-centroids", torch.eye(K, D).double(), torch.eye(K, D).double()),
        _Call("offset", 1000 + draw.normal(N, D), 1000 + draw.normal(K, D), wide=True),
        _Call("batch", draw.normal(B, N, D), draw.normal(B, K, D)),
        _Call("batch-of-rows", draw.normal(B, N, D), mu.clone()),
        _Call("batch-of-centroids", z.clone(), draw.normal(B, K, D)),
        _Call("batch-crossed", draw.normal(B, 1, N, D), draw.normal(3, K, D)),
        _Call("no-batch", draw.normal(0, N, D), mu.clone()),
        _Call("weight", z.clone(), mu.clone(), weight=light),
        _Call("weight-batch", z.clone(), mu.clone(), weight=_positive(draw, B, N)),
        _Call("weights-0", z.clone(), mu.clone(), weight=torch.zeros(N, dtype=torch.float64)),
        _Call("alpha-half", z.clone(), mu.clone(), 0.5, alpha0=0.5),
        _Call("alpha-3", z.clone(), mu.clone(), 3.0),
        _Call("alpha-1000", z.clone(), mu.clone(), 1e3, alpha0=1e3),
        _Call("alpha-inf", z.clone(), mu.clone(), inf, alpha0=inf),
        _Call("alpha-0d", z.clone(), mu.clone(), _positive(draw)),
        _Call("alpha-1", z.clone(), mu.clone(), _positive(draw, 1)),
        _Call("alpha-batch", z.clone(), mu.clone(), _positive(draw, B, 1), alpha0=3.0),
        _Call("alpha-one-centroid", z.clone(), draw.normal(1, D), _positive(draw, 1)),
        _Call(
            "everything", draw.normal(B, 1, N, D), draw.normal(3, K, D), _positive(draw, B, 1, 1),
            _positive(draw, 3, N), alpha0=2.0,
        ),
    ]  # fmt: skip


def _irregular(draw: Draw) -> list[_Call]:
    """Rows and centroids that are not finite, or far."""
    irregular, undefined, far = draw.normal(N, D), draw.normal(K, D), draw.normal(K, D)
    irregular[2, 1], irregular[4, 0] = math.nan, math.inf
    undefined[1, 0], far[2] = math.nan, 1e4
    equal = draw.normal(1, D).expand(K, D).clone()
    return [
        _Call("not-finite-rows", irregular, draw.normal(K, D)),
        _Call("not-finite-centroid", draw.normal(N, D), undefined),
        _Call("far-centroid", draw.normal(N, D), far, 100.0, alpha0=100.0),
        _Call("equal-centroids", draw.normal(N, D), equal),
    ]


def _targets(draw: Draw) -> list[Sample]:
    """Calls with each other source of a target."""
    inf = math.inf
    z, mu, logs = draw.normal(N, D), draw.normal(K, D), draw.normal(K)
    z0, norm = draw.normal(N, D), draw.normal(N)
    p = draw.normal(N, K).softmax(1)
    sparse = p * torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    call, alpha = _Call("", z, mu), _Call("", z, mu, _positive(draw))
    irregular = z0.clone()
    irregular[1, 0] = math.nan
    none = (None, None, 1.0, None)
    weighted = _Call("", z, mu, weight=_positive(draw, N))
    heads = _Call("", draw.normal(B, N, D), draw.normal(B, K, D), 2.0)
    far = torch.tensor([0.0, -87.0, 3.0, 10.0], dtype=torch.float64)
    return [
        call.of_target("frozen", True, logs, z0, mu + 0.1, 1.0, None, None),
        call.of_target("frozen-norm", True, logs, z0, mu + 0.1, 1.0, norm, None),
        call.of_target("frozen-norm-2", True, logs, z0, mu + 0.1, 2.0, norm, None),
        call.of_target("frozen-inf", True, logs, z0, mu + 0.1, inf, None, None),
        alpha.of_target("frozen-alpha", True, logs, z0, mu + 0.1, 1.0, norm, None),
        call.of_target("frozen-dead", True, far, z0, mu + 0.1, 1.0, None, None),
        call.of_target("frozen-not-finite", False, logs, irregular, mu + 0.1, 1.0, norm, None),
        call.of_target("dense", True, None, *none, p),
        call.of_target("dense-norm", True, None, None, None, 1.0, 0.1 * norm, sparse),
        alpha.of_target("dense-alpha", True, None, *none, sparse),
        heads.of_target("dense-batch", True, None, *none, p),
        call.of_target("dense-not-finite", False, None, *none, p.log().clamp(min=-2).sqrt()),
        call.of_target("self", False, logs, *none, None),
        alpha.of_target("self-alpha", False, logs, *none, None),
        heads.of_target("self-batch", False, logs, *none, None),
        call.of_target("self-dead", False, far, *none, None),
        call.of_target("minibatch", False, None, *none, None),
        alpha.of_target("minibatch-alpha", False, None, *none, None),
        weighted.of_target("minibatch-weight", False, None, *none, None),
        heads.of_target("minibatch-batch", False, None, *none, None),
    ]


def samples(op: str, seed: int) -> list[Sample]:
    """Calls of an op of this family."""
    draw = Draw(seed)
    plain = _Call("plain", draw.normal(N, D), draw.normal(K, D))
    calls, odd = _regular(draw), _irregular(draw)
    if op in STATS:
        return [call.stats() for call in [plain, *calls, *odd]]
    p = draw.normal(1, K).softmax(1)
    result = [plain.of_target("plain", True, None, None, None, 1.0, None, p)]
    result += [call.losses(draw) for call in calls]
    for call in odd:
        smooth = not call.name.startswith("not-finite")
        one = call.losses(draw)
        if not smooth:
            one = replace(one, differentiable=(), kinks=one.differentiable)
        result.append(one)
    return result + _targets(draw)


# ---- workloads -----------------------------------------------------------------------------------


def _blobs(seed: int, n: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows around k Gaussian centroids."""
    generator = torch.Generator().manual_seed(seed)
    mu = 3 * torch.randn(k, d, generator=generator, dtype=torch.float32)
    z = torch.randn(n, d, generator=generator, dtype=torch.float32)
    return z + mu[torch.randint(k, (n,), generator=generator)], mu


def workloads() -> list[Workload]:
    """Calls worth timing."""
    result = []
    for n, d, k in ((200_000, 10, 64), (200_000, 10, 10)):
        size = f"{n // 1000}k-{d}-{k}-fp32"

        def stats(seed: int, n: int = n, d: int = d, k: int = k) -> tuple[Any, ...]:
            return _blobs(seed, n, d, k)

        def losses(seed: int, n: int = n, d: int = d, k: int = k) -> tuple[Any, ...]:
            z, mu = _blobs(seed, n, d, k)
            t = dec_target(z, mu, store="recompute")
            moved = z + 0.1 * z.roll(1, 0), mu + 0.05 * mu.roll(1, 0)
            return *moved, 1.0, None, t.log_counts, t.z0, t.mu0, t.alpha0, t.log_norm, None

        rows, products = 4 * (n * d + k * d), 2 * n * k * d
        result += [
            Workload(f"student_t_stats/{size}", STATS[0], stats, rows + 12 * n, products),
            Workload(f"dec_losses/{size}", LOSSES[0], losses, 2 * rows + 8 * n, 2 * products),
        ]
    return result


# ---- what the contract asks of this family -------------------------------------------------------

ROW_ARGUMENTS = ("z", "weight", "z0", "log_norm")
COUPLED = STATS
SCALES = (1.0, 0.0, 0.0, 0.0)
_DIFFERENTIATED = ("plain", "frozen-norm", "alpha-batch", "everything", "dense-alpha", "alpha-inf")
SELECTIONS = {
    "traced": (
        "plain", "no-rows", "batch-crossed", "alpha-batch", "alpha-inf", "everything",
        "frozen-norm", "self", "minibatch",
    ),
    "compiled": ("plain", "weight", "everything", "frozen-norm", "dense", "minibatch"),
    "exported": ("plain", "weight", "frozen-norm", "minibatch"),
    "laid": (
        "plain", "batch", "batch-crossed", "wide", "alpha-batch", "weight-batch", "everything",
        "frozen-norm", "dense-batch",
    ),
    "mapped": (
        "plain", "batch-crossed", "alpha-0d", "alpha-batch", "weight-batch", "no-rows", "dense",
        "self-alpha", "minibatch-weight",
    ),
    "nested": ("plain", "alpha-batch"),
    "autocast": ("plain", "weight", "alpha-0d", "frozen-norm"),
    "differentiated": _DIFFERENTIATED,
    "batched gradients": (*_DIFFERENTIATED, "batch-crossed", "alpha-0d"),
    "twice": ("plain", "everything", "alpha-0d"),
    "hessian": ("plain", "frozen-norm", "alpha-0d"),
    "frozen": ("everything", "alpha-batch", "dense-alpha"),
    "views": ("everything", "alpha-batch"),
}  # fmt: skip


def problem(op: str, n: int, k: int, d: int, seed: int) -> Sample:
    """Normal rows and centroids; `dec_losses` computes its target from the same rows."""
    draw = Draw(seed)
    z, mu = draw.normal(n, d), draw.normal(k, d)
    if op in STATS:
        return Sample(op, "problem", (z, mu, 1.0))
    return Sample(op, "problem", (z, mu, 1.0, None, draw.normal(k)), (), ("z", "mu"))


def large(op: str, n: int, k: int, d: int, offset: float, seed: int) -> Sample:
    """Rows around k centroids, and a target frozen before the rows moved; alpha is a tensor."""
    draw = Draw(seed)
    centroids, near = draw.normal(k, d), torch.randint(k, (n,), generator=draw.generator)
    z = centroids[near] + 0.6 * draw.normal(n, d)
    moved = z + 0.2 * draw.normal(n, d), centroids + 0.1 * draw.normal(k, d)
    alpha = 1.5 * torch.ones((), dtype=torch.float64)
    first = (z + offset, centroids + offset, alpha, None)
    if op in STATS:
        return Sample(op, "large", first)
    frozen = (draw.normal(k), *(x + offset for x in moved), 1.0, None, None)
    return Sample(op, "large", (*first, *frozen), ("z", "mu", "alpha"))


def result_dtypes(op: str, dtype: torch.dtype) -> list[torch.dtype]:
    """Scores and losses are float32 unless z is float64, soft counts are always float64."""
    score = torch.float64 if dtype == torch.float64 else torch.float32
    return [score, torch.int64, torch.float64, torch.int64] if op in STATS else [score]


# ---- plain torch as users write it: matrix products of centred data ------------------------------


def _scores(z: Tensor, mu: Tensor, alpha: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Student-t scores [..., N, K] in a dtype, from the expanded distance."""
    wide = mu.to(dtype)
    c = wide.detach().mean(-2, keepdim=True)
    x, m = z.to(dtype) - c, wide - c
    far = x.square().sum(-1, keepdim=True) + m.square().sum(-1)[..., None, :] - 2 * x @ m.mT
    far = far.clamp(min=0)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(dtype)[..., None] if alpha.ndim else alpha.to(dtype)
    elif math.isinf(alpha):
        return -far / 2
    return -(alpha + 1) / 2 * torch.log1p(far / alpha)


def _eager_losses(
    z: Tensor,
    mu: Tensor,
    alpha: float | Tensor = 1.0,
    weight: Tensor | None = None,
    log_counts: Tensor | None = None,
    z0: Tensor | None = None,
    mu0: Tensor | None = None,
    alpha0: float = 1.0,
    log_norm: Tensor | None = None,
    p: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`dec_losses` in the dtype of the result; the truth itself where rows are not finite."""
    if not all(bool(x.isfinite().all()) for x in (z, z0, p) if x is not None):
        truth: Callable[..., Tensor] = spec_of("dec_losses").truth
        return truth(z, mu, alpha, weight, log_counts, z0, mu0, alpha0, log_norm, p)
    dtype = result_dtypes("dec_losses", z.dtype)[0]
    s = _scores(z, mu, alpha, dtype)
    if p is None:
        old = s if z0 is None or mu0 is None else _scores(z0, mu0, alpha0, dtype)
        if log_counts is None:
            q = old.softmax(-1)
            q = q if weight is None else q * weight.to(dtype)[..., None]
            log_counts = q.sum(-2).log()
        t = 2 * old - log_counts.to(dtype)[..., None, :]
        norm = t.logsumexp(-1) if log_norm is None or z0 is None else log_norm.to(dtype)
        share = (t - norm[..., None]).exp()
    else:
        share = p.to(dtype)
        share = share if log_norm is None else share / log_norm.to(dtype).exp()[..., None]
    share = torch.ones_like(share) if mu.shape[-2] == 1 else share.detach()
    losses = (torch.xlogy(share, share) - share * s.log_softmax(-1)).sum(-1)
    batch = torch.broadcast_shapes(*([] if weight is None else [weight.shape]), losses.shape)
    return losses.expand(batch)


def _eager_stats(
    z: Tensor,
    mu: Tensor,
    alpha: float | Tensor = 1.0,
    weight: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, ...]:
    """`student_t_stats` in the dtype of its log-sum-exp."""
    s = _scores(z, mu, alpha, result_dtypes("student_t_stats", z.dtype)[0])
    q = torch.where(z.isfinite().all(-1)[..., None], s.softmax(-1), 0.0)
    q = q if weight is None else q * weight.to(q.dtype)[..., None]
    lse = s.logsumexp(-1)
    lse = lse if weight is None else lse.expand(torch.broadcast_shapes(lse.shape, weight.shape))
    labels = s.argmax(-1).expand(lse.shape)
    return lse, labels, q.sum(-2).double(), (~z.isfinite().all(-1)).sum(-1)


EAGER = {"student_t_stats": _eager_stats, "dec_losses": _eager_losses}


# ---- calls that must raise -----------------------------------------------------------------------

PLAIN: dict[str, Callable[[], Any]] = {
    "z": lambda: torch.zeros(5, 3),
    "mu": lambda: torch.ones(4, 3),
    "alpha": lambda: 1.0,
    "weight": lambda: None,
    "log_counts": lambda: None,
    "z0": lambda: None,
    "mu0": lambda: None,
    "alpha0": lambda: 1.0,
    "log_norm": lambda: None,
    "p": lambda: None,
    "precision": lambda: None,
}


_ONE = "shape [] or [..., 1] (one for all centroids)"
_ROWS: list[BadRow] = [
    ("z int64", ALL, TypeError, f"z: expected {FLOATS}, got int64",
        {"z": zeros(5, 3, dtype=torch.int64)}),
    ("mu bool", ALL, TypeError, f"mu: expected {FLOATS}, got bool",
        {"mu": zeros(4, 3, dtype=torch.bool)}),
    ("z complex", ALL, TypeError, f"z: expected {FLOATS}, got complex64",
        {"z": zeros(5, 3, dtype=torch.complex64)}),
    ("mu float64", ALL, TypeError, "mu: expected dtype float32 to match z, got float64",
        {"mu": zeros(4, 3, dtype=torch.float64)}),
    ("z bfloat16", ALL, TypeError, "mu: expected dtype bfloat16 to match z, got float32",
        {"z": zeros(5, 3, dtype=torch.bfloat16)}),
    ("z 1-d", ALL, ValueError, "z: expected shape [..., N, D], got [3]", {"z": zeros(3)}),
    ("mu 1-d", ALL, ValueError, "mu: expected shape [..., K, D], got [3]", {"mu": zeros(3)}),
    ("D 0", ALL, ValueError, "z: expected D >= 1, got [5, 0]",
        {"z": zeros(5, 0), "mu": zeros(4, 0)}),
    ("K 0", ALL, ValueError, "mu: expected K >= 1, got [0, 3]", {"mu": zeros(0, 3)}),
    ("D differs", ALL, ValueError,
        "mu: expected shape [..., K, 3] to match z [5, 3], got [4, 8]", {"mu": zeros(4, 8)}),
    ("leading dims", ALL, ValueError,
        "mu: expected leading dims that broadcast to match z [2, 5, 3], got [7, 4, 3]",
        {"z": zeros(2, 5, 3), "mu": zeros(7, 4, 3)}),
    ("leading dims of alpha", ALL, ValueError,
        "alpha: expected leading dims that broadcast to match z [2, 5, 3], got [3, 1]",
        {"z": zeros(2, 5, 3), "alpha": lambda: torch.ones(3, 1)}),
    ("leading dims of weight", ALL, ValueError,
        "weight: expected leading dims that broadcast to match z [2, 5, 3], got [7, 5]",
        {"z": zeros(2, 5, 3), "weight": zeros(7, 5)}),
    ("alpha int", ALL, TypeError, f"alpha: expected {FLOATS}, got int64",
        {"alpha": zeros(1, dtype=torch.int64)}),
    ("alpha for each centroid", ALL, ValueError, f"alpha: expected {_ONE}, got [4]",
        {"alpha": lambda: torch.ones(4)}),
    *(
        (f"alpha {value}", ALL, ValueError, f"alpha: expected a number > 0, got {value}",
            constants(alpha=value))
        for value in (0.0, -1.0, math.nan)
    ),
    ("weight int", ALL, TypeError, f"weight: expected {FLOATS}, got int64",
        {"weight": zeros(5, dtype=torch.int64)}),
    ("weight of another N", ALL, ValueError,
        "weight: expected shape [..., 5] to match z [5, 3], got [4]", {"weight": zeros(4)}),
    ("weight 0-d", ALL, ValueError,
        "weight: expected shape [..., 5] to match z [5, 3], got []", {"weight": zeros()}),
    ("precision", ALL, ValueError,
        "precision: expected 'highest', 'high', 'medium' or None, got 'fast'",
        constants(precision="fast")),
    ("alpha0 0", LOSSES, ValueError, "alpha0: expected a number > 0, got 0.0",
        constants(alpha0=0.0)),
    ("log_counts of another K", LOSSES, ValueError,
        "log_counts: expected shape [..., 4] to match mu [4, 3], got [5]",
        {"log_counts": zeros(5)}),
    ("log_counts int", LOSSES, TypeError, f"log_counts: expected {FLOATS}, got int64",
        {"log_counts": zeros(4, dtype=torch.int64)}),
    ("z0 of another N", LOSSES, ValueError,
        "z0: expected shape [..., 5, 3] to match z [5, 3], got [6, 3]", {"z0": zeros(6, 3)}),
    ("mu0 of another K", LOSSES, ValueError,
        "mu0: expected shape [..., 4, 3] to match mu [4, 3], got [5, 3]", {"mu0": zeros(5, 3)}),
    ("log_norm of another N", LOSSES, ValueError,
        "log_norm: expected shape [..., 5] to match z [5, 3], got [4]", {"log_norm": zeros(4)}),
    ("p of another K", LOSSES, ValueError,
        "p: expected shape [..., 5, 4] to match z [5, 3] and mu [4, 3], got [5, 3]",
        {"p": zeros(5, 3)}),
    ("p 1-d", LOSSES, ValueError,
        "p: expected shape [..., 5, 4] to match z [5, 3] and mu [4, 3], got [4]", {"p": zeros(4)}),
    ("z0 alone", LOSSES, ValueError, "mu0: expected a Tensor to match z0 [5, 3], got None",
        {"z0": zeros(5, 3)}),
    ("z0 without log_counts", LOSSES, ValueError,
        "log_counts: expected a Tensor to match z0 [5, 3], got None",
        {"z0": zeros(5, 3), "mu0": zeros(4, 3)}),
    ("mu0 alone", LOSSES, ValueError, "z0: expected a Tensor to match mu0 [4, 3], got None",
        {"mu0": zeros(4, 3)}),
    ("log_norm alone", LOSSES, ValueError, "z0: expected a Tensor to match log_norm [5], got None",
        {"log_norm": zeros(5)}),
    ("leading dims of p", LOSSES, ValueError,
        "p: expected leading dims that broadcast to match z [2, 5, 3], got [7, 5, 4]",
        {"z": zeros(2, 5, 3), "p": zeros(7, 5, 4)}),
]  # fmt: skip
_VALUES: list[BadRow] = [
    *(
        (f"alpha {value}", ALL, ValueError, f"alpha: expected values > 0, got {value}",
            {"alpha": partial(torch.tensor, [value])})
        for value in (0.0, -1.0, math.nan)
    ),
]  # fmt: skip
_NO_ALPHA: tuple[Any, ...] = ("1", None, True, [])
_TYPES: list[BadRow] = [
    ("z list", ALL, TypeError, "z: expected a Tensor, got list", constants(z=[[0.0]])),
    ("mu None", ALL, TypeError, "mu: expected a Tensor, got NoneType", constants(mu=None)),
    *(
        (f"alpha {value!r}", ALL, TypeError,
            f"alpha: expected a number or a Tensor, got {type(value).__name__}",
            constants(alpha=value))
        for value in _NO_ALPHA
    ),
    ("weight list", ALL, TypeError, "weight: expected a Tensor or None, got list",
        constants(weight=[1.0])),
    ("precision int", ALL, TypeError, "precision: expected a str or None, got int",
        constants(precision=1)),
    ("alpha0 None", LOSSES, TypeError, "alpha0: expected a number, got NoneType",
        constants(alpha0=None)),
    ("p array", LOSSES, TypeError, "p: expected a Tensor or None, got ndarray",
        {"p": lambda: torch.zeros(5, 4).numpy()}),
    ("z0 int", LOSSES, TypeError, "z0: expected a Tensor or None, got int", constants(z0=3)),
]  # fmt: skip


BAD_CALLS = {"op": _ROWS, "values": _VALUES, "function": _TYPES}
