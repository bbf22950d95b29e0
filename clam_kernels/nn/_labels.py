# SPDX-License-Identifier: Apache-2.0
"""Labels of a data set: what a relabelling tells of them, their shares, and those given to start
from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._core import checks


@dataclass(frozen=True)
class Relabelling:
    """What happened when the labels of one head were found anew.

    Attributes
    ----------
    head : int
        Which.
    n_iter : int
        Iterations of Sinkhorn scaling.
    err : float
        L1 error of the label shares.
    converged : bool
        Whether that is within `tol`; labels are of use even where it is not.
    changed : float
        Share of the rows whose label is another one.
    counts : Tensor [K], int64
        Rows of each label.
    """

    head: int
    n_iter: int
    err: float
    converged: bool
    changed: float
    counts: Tensor


def shares_of(name: str, mass: Any, size: int) -> Tensor | None:
    """A marginal of sum 1 in float64."""
    if mass is None:
        return None
    checks.tensor(name, mass)
    checks.floating(name, mass)
    checks.shape(name, mass, f"[{size}]", list(mass.shape) == [size])
    _check_values(name, mass)
    wide = mass.detach().cpu().double()
    checks.values(name, wide, 0.0, finite=True, strict=True)
    return wide / wide.sum()


def _check_values(name: str, x: Tensor) -> None:
    checks.value_error(not x.is_meta, lambda: checks.wording(name, "values", "device meta"))


def start_of(start: Any, heads: int, rows: int, clusters: int) -> Tensor | None:
    """Labels to start from, a copy on the CPU; None where they are drawn."""
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
    _check_values("start", start)
    inside = bool(((start >= 0) & (start < clusters)).all())
    words = f"labels from 0 to {clusters - 1}"
    checks.value_error(inside, lambda: checks.wording("start", words, "others"))
    return start.detach().to("cpu", copy=True)
