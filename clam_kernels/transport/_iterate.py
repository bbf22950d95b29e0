# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn's iteration pass by pass: to a tolerance, accelerated, or over several processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._anderson import Anderson
from ._passes import EMPTY, FINE, Pass, Passes

# Passes between two looks at a GPU's error; a CPU's is looked at after each.
BLOCK = 16


class Found(NamedTuple):
    """Potentials, error, status and iterations [...] of each problem."""

    f: Tensor
    g: Tensor
    err: Tensor
    status: Tensor
    n_iter: Tensor


class _Columns:
    """Prototypes first: a pass makes the rows exact and shows the columns' error."""

    f: Tensor

    def __init__(self, passes: Passes, accelerate: bool) -> None:
        self.passes = passes
        self.anderson = Anderson() if accelerate else None

    def error(self, found: Pass, done: Tensor) -> Tensor:
        self.f = found.f
        return self.passes.column_error(found.log_mass)

    def following(self, g: Tensor, found: Pass, err: Tensor) -> Tensor:
        passes = self.passes
        step = passes.residual(found.log_mass)
        if self.anderson is None:
            return g + step
        flat = torch.where(passes.dead, 0.0, g)
        value = found.row_value + (passes.log_b.exp() * flat).sum(-1)
        # f was large, and its sum has lost digits: NaN is above no other value and below none
        value = torch.where(found.common[..., 0] == 0, value, torch.nan)
        return passes.put(self.anderson.following(flat, step, err, value))


class _Rows:
    """Rows first: the error of the rows shows in the next pass, the potential of which is not
    theirs.
    """

    f: Tensor

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.newest: Tensor | None = None

    def error(self, found: Pass, done: Tensor) -> Tensor:
        if self.newest is None:
            self.f = self.newest = found.f
            return torch.full_like(found.row_value, torch.inf)
        self.f = torch.where(done[..., None], self.f, self.newest)
        self.newest = found.f
        return self.passes.row_error(self.f, found.f)

    def following(self, g: Tensor, found: Pass, err: Tensor) -> Tensor:
        self.newest = less(found.f, found.common)
        return g + self.passes.residual(found.log_mass)


def iterate(
    passes: Passes,
    init: Tensor | None,
    most: int,
    tol: float | None,
    prototype_first: bool,
    accelerate: bool,
) -> Found:
    """At most `most` iterations, fewer for a problem whose error is at most tol by then: it stays
    as it is while others go on.
    """
    columns = prototype_first or most == 0
    g = passes.start(columns and most > 0) if init is None else passes.put(init)
    # a pass at a given g, or of rows that come first, belongs to no iteration
    before = int(init is not None or not columns or most == 0)
    side = _Columns(passes, accelerate) if columns else _Rows(passes)
    done = torch.zeros((), dtype=torch.bool, device=g.device)
    count = torch.zeros((), dtype=torch.int64, device=g.device)
    for at in range(most + before):
        found = passes.step(g)
        err = torch.where(found.status == EMPTY, 0.0, side.error(found, done))
        count = torch.where(done, count, at + 1 - before)
        count = torch.where(found.status == EMPTY, 0, count)
        done = done | (found.status != FINE)
        done = done if tol is None else done | (err <= tol)
        last = at + 1 == most + before
        if last or ((g.is_cpu or (at + 1) % BLOCK == 0) and bool(done.all())):
            break
        g = torch.where(done[..., None], g, side.following(g + found.common, found, err))
    return Found(less(side.f, found.common), g + found.common, err, found.status, count)


def less(f: Tensor, common: Tensor) -> Tensor:
    """Potentials of the rows without what moves to those of the columns."""
    return (f.double() - common).to(f.dtype)
