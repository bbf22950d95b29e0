# SPDX-License-Identifier: Apache-2.0
"""The labels of a data set: the result of a relabelling, the marginals, and the first labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._core import checks


@dataclass(frozen=True)
class Relabelling:
    """The result of a relabelling of one head.

    Attributes
    ----------
    head : int
        Index of the head.
    n_iter : int
        Iterations of Sinkhorn scaling.
    err : float
        L1 error of the label shares.
    converged : bool
        Whether err <= tol; the labels are usable even if it is not.
    changed : float
        Fraction of the rows whose label changed.
    counts : Tensor [K], int64
        Number of rows of each label.
    """

    head: int
    n_iter: int
    err: float
    converged: bool
    changed: float
    counts: Tensor


def check_settings(strict: object, dtype: object) -> None:
    """The types of the settings `strict` and `dtype` of a layer."""
    checks.boolean("strict", strict)
    if dtype is not None:
        checks.float_dtype("dtype", dtype)


def normalised_marginal(name: str, mass: Any, size: int) -> Tensor | None:
    """A marginal divided by its sum, float64 on the CPU; None for None."""
    if mass is None:
        return None
    checks.tensor(name, mass)
    checks.floating(name, mass)
    checks.shape(name, mass, f"[{size}]", list(mass.shape) == [size])
    checks.has_values(name, mass)
    mass64 = mass.detach().cpu().double()
    checks.values(name, mass64, 0.0, finite=True, strict=True)
    return mass64 / mass64.sum()


def _outside(labels: Tensor, clusters: int) -> int:
    """The first label that is not in [0, clusters)."""
    return int(labels[(labels < 0) | (labels >= clusters)][0])


def first_labels(start: Any, heads: int, rows: int, clusters: int) -> Tensor | None:
    """A copy on the CPU of the labels in `start`; None for "balanced" labels, which are drawn."""
    if isinstance(start, str) and start == "balanced":
        return None
    words = f"'balanced' or an int64 Tensor [{heads}, {rows}]"
    got = repr(start) if isinstance(start, str) else type(start).__name__
    ok = isinstance(start, Tensor) and start.dtype == torch.int64
    error = ValueError if isinstance(start, str) else TypeError
    if not ok:
        raise error(checks.wording("start", words, got))
    fits = list(start.shape) in ([heads, rows], [rows])
    checks.shape("start", start, f"[{heads}, {rows}]", fits)
    checks.has_values("start", start)
    in_range = bool(((start >= 0) & (start < clusters)).all())
    words = f"labels from 0 to {clusters - 1}"
    checks.value_error(in_range, lambda: checks.wording("start", words, _outside(start, clusters)))
    return start.detach().to("cpu", copy=True)
