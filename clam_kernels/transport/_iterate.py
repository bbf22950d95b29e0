# SPDX-License-Identifier: Apache-2.0
"""The Sinkhorn iteration, pass by pass: to a tolerance, accelerated, or over several processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._facts import EMPTY, FINE
from ._anderson import Anderson
from ._passes import Pass, Passes

# Passes between two reads of the error from a GPU; on a CPU it is read after each pass.
CHECK_INTERVAL = 16


class IterationResult(NamedTuple):
    """Potentials, error, status and iterations [...] of each problem."""

    f: Tensor
    g: Tensor
    err: Tensor
    status: Tensor
    n_iter: Tensor


class _PrototypesFirst:
    """Prototypes first: a pass makes the rows exact and returns the error of the columns."""

    f: Tensor

    def __init__(self, passes: Passes, accelerate: bool) -> None:
        self.passes = passes
        self.anderson = Anderson() if accelerate else None

    def error(self, result: Pass, done: Tensor) -> Tensor:
        """L1 error of the columns; stores f."""
        self.f = result.f
        return self.passes.column_error(result.log_mass)

    def next_g(self, g: Tensor, result: Pass, err: Tensor) -> Tensor:
        """The g after the columns' half-step, accelerated with `accelerate`."""
        passes = self.passes
        step = passes.residual(result.log_mass)
        if self.anderson is None:
            return g + step
        finite_g = torch.where(passes.masked, 0.0, g)
        value = result.row_value + (passes.log_b.exp() * finite_g).sum(-1)
        # where f was large, its sum has lost digits: NaN compares as neither larger nor smaller
        value = torch.where(result.common[..., 0] == 0, value, torch.nan)
        return passes.mask_columns(self.anderson.next_g(finite_g, step, err, value))


class _RowsFirst:
    """Rows first: the row error is known one pass later, from the difference of the two f."""

    f: Tensor

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.last_f: Tensor | None = None

    def error(self, result: Pass, done: Tensor) -> Tensor:
        """L1 error of the rows at the f of the pass before; inf in the first pass."""
        if self.last_f is None:
            self.f = self.last_f = result.f
            return torch.full_like(result.row_value, torch.inf)
        self.f = torch.where(done[..., None], self.f, self.last_f)
        self.last_f = result.f
        return self.passes.row_error(self.f, result.f)

    def next_g(self, g: Tensor, result: Pass, err: Tensor) -> Tensor:
        """The g after the columns' half-step."""
        self.last_f = subtract_common(result.f, result.common)
        return g + self.passes.residual(result.log_mass)


def iterate(
    passes: Passes,
    init: Tensor | None,
    max_iter: int,
    tol: float | None,
    prototype_first: bool,
    accelerate: bool,
) -> IterationResult:
    """At most max_iter iterations. A problem whose error is at most tol stays constant while the
    others continue.
    """
    columns = prototype_first or max_iter == 0
    g = passes.start(columns and max_iter > 0) if init is None else passes.mask_columns(init)
    # the first pass counts as no iteration where g is given, or where the rows come first
    extra_passes = int(init is not None or not columns or max_iter == 0)
    order = _PrototypesFirst(passes, accelerate) if columns else _RowsFirst(passes)
    done = torch.zeros((), dtype=torch.bool, device=g.device)
    count = torch.zeros((), dtype=torch.int64, device=g.device)
    for index in range(max_iter + extra_passes):
        result = passes.step(g)
        err = torch.where(result.status == EMPTY, 0.0, order.error(result, done))
        count = torch.where(done, count, index + 1 - extra_passes)
        count = torch.where(result.status == EMPTY, 0, count)
        done = done | (result.status != FINE)
        done = done if tol is None else done | (err <= tol)
        last = index + 1 == max_iter + extra_passes
        if last or ((g.is_cpu or (index + 1) % CHECK_INTERVAL == 0) and bool(done.all())):
            break
        g = torch.where(done[..., None], g, order.next_g(g + result.common, result, err))
    f = subtract_common(order.f, result.common)
    return IterationResult(f, g + result.common, err, result.status, count)


def subtract_common(f: Tensor, common: Tensor) -> Tensor:
    """`f - common`: the caller adds `common` to g."""
    return (f.double() - common).to(f.dtype)
