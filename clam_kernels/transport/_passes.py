# SPDX-License-Identifier: Apache-2.0
"""One step of the rows and what all columns weigh after it, on one process or over several."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ._problem import FAR, Calls

# Rows that tell what the potentials of most have in common.
SAMPLE = 31
FINE, NOT_CONVERGED, NOT_FINITE, INFEASIBLE, EMPTY = range(5)


class Pass(NamedTuple):
    """f [..., N] of this process's rows; of all rows the logarithms of the columns' masses
    [..., K] float64, the status [...], sum_i a_i f_i [...] float64, and what most f have in common
    [..., 1] float64 if that is large.
    """

    f: Tensor
    log_mass: Tensor
    status: Tensor
    row_value: Tensor
    common: Tensor


def middle_of(f: Tensor) -> Tensor:
    """The median [..., 1] of a sample of the rows' potentials that are finite, NaN of none."""
    n = f.shape[-1]
    if n == 0:
        return f.new_full((*f.shape[:-1], 1), torch.nan, dtype=torch.float64)
    places = torch.arange(SAMPLE, dtype=torch.int64, device=f.device) * n // SAMPLE
    some = f.detach().index_select(-1, places).double()
    return torch.where(some.isfinite(), some, torch.nan).nanmedian(-1, keepdim=True).values


def common_of(middle: Tensor) -> Tensor:
    """A median that is large, else 0. Moved from all rows' potentials to the columns' it changes no
    plan, and the columns' keep the digits that float32 would lose beside it.
    """
    return torch.where(middle.abs() > FAR, middle, 0.0)


class Passes:
    """The passes of a problem, batched; g in and out is float64."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        given = calls.problem
        self.device, k = given.first.device, given.n_prototypes
        even = torch.full((k,), -math.log(k), dtype=torch.float64, device=self.device)
        self.log_b = even if given.log_col is None else given.log_col.double()
        self.log_row = given.log_row
        self.dead = self.log_b == -torch.inf
        self.begun: Tensor | None = None  # status of the start

    def put(self, g: Tensor) -> Tensor:
        """-inf where a column has no mass, and only there."""
        g = g.double()
        least = torch.where(g.isfinite(), g, torch.inf).amin(-1, keepdim=True)
        least = torch.where(least.isfinite(), least, 0.0)
        return torch.where(self.dead, -torch.inf, torch.where(g == -torch.inf, least, g))

    def start(self, prototype_first: bool) -> Tensor:
        """The g before the first pass: the columns' step from f = 0, or 0."""
        if not prototype_first:
            return self.put(torch.zeros_like(self.log_b))
        _, g, _, self.begun = self.calls.iterated(1, None, True)
        return self.put(g)

    def step(self, g: Tensor) -> Pass:
        """The pass at g."""
        f, log_mass, status = self.calls.one_pass(g, self.log_row)
        status = self.judged(log_mass, status)
        return Pass(f, log_mass.double(), status, self.row_value(f), common_of(middle_of(f)))

    def judged(self, log_mass: Tensor, status: Tensor) -> Tensor:
        """Infeasible where a column with mass has none; what the start was that failed."""
        stuck = ((log_mass == -torch.inf) & ~self.dead).any(-1) | self.dead.all(-1)
        status = torch.where((status == FINE) & stuck, INFEASIBLE, status)
        if self.begun is None:
            return status
        return torch.where((self.begun > FINE) & (status != EMPTY), self.begun, status)

    def row_value(self, f: Tensor) -> Tensor:
        if self.log_row is None:
            return f.double().mean(-1)
        mass = self.log_row.double().exp()
        return torch.where(mass > 0, mass * f.double(), 0.0).sum(-1)

    def row_error(self, f: Tensor, exact: Tensor) -> Tensor:
        """L1 error of the sums of rows whose potential is f where `exact` would be; with what the
        rounding of a large potential does to them, which their difference does not show.
        """
        gap = torch.expm1(f.double() - exact.double()).abs()
        unit = torch.finfo(f.dtype).eps / 2
        gap = gap + torch.where(f.abs() > FAR, f.double().abs() * unit, 0.0)
        if self.log_row is None:
            return gap.mean(-1) if gap.shape[-1] else gap.sum(-1)
        mass = self.log_row.double().exp()
        return torch.where(mass > 0, mass * gap, 0.0).sum(-1)

    def column_error(self, log_mass: Tensor) -> Tensor:
        """L1 error of the columns' sums."""
        return (log_mass.exp() - self.log_b.exp()).abs().sum(-1)

    def residual(self, log_mass: Tensor) -> Tensor:
        """What the columns' step adds to g."""
        return torch.where(self.dead, 0.0, self.log_b - log_mass)


class Sharded(Passes):
    """Rows spread over the processes of a group, prototypes on all: each pass exchanges K + 3
    numbers. What is decided is decided from the same bits everywhere.
    """

    def __init__(self, calls: Calls, group: Any) -> None:
        super().__init__(calls)
        self.group = group

    def start(self, prototype_first: bool) -> Tensor:
        if not prototype_first:
            return super().start(False)
        # rows as heavy as their sums have f = 0: their columns' step is that from f = 0
        assert self.log_row is not None
        dead = self.log_row == -torch.inf
        zero = torch.zeros_like(self.log_b)
        rows = torch.zeros_like(self.log_row, dtype=torch.float32).masked_fill(dead, -torch.inf)
        f, _, _ = self.calls.one_pass(zero, rows)
        _, log_mass, status = self.calls.one_pass(zero, torch.where(dead, -torch.inf, -f.double()))
        merged, status, *_ = self.merged(log_mass, status, f)
        self.begun = self.judged(merged, status)
        return self.put(self.residual(merged))

    def step(self, g: Tensor) -> Pass:
        f, log_mass, status = self.calls.one_pass(g, self.log_row)
        merged, status, value, common = self.merged(log_mass, status, f)
        return Pass(f, merged, self.judged(merged, status), value, common)

    def merged(
        self, log_mass: Tensor, status: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masses, status, value and what is common of all rows."""
        numbers = [status[..., None].double(), self.row_value(f)[..., None], middle_of(f)]
        found = distributed.gathered(torch.cat([log_mass.double(), *numbers], -1), self.group)
        masses, statuses, values = found[..., :-3], found[..., -3], found[..., -2]
        common = common_of(found[..., -1:].nanmedian(0).values)
        some = torch.where(statuses == EMPTY, 0.0, statuses).amax(0)
        status = torch.where((statuses == EMPTY).all(0), EMPTY, some).long()
        alive = (statuses == FINE)[..., None]
        merged = torch.where(alive, masses, -torch.inf).logsumexp(0)
        merged = torch.where((some > 0)[..., None], torch.nan, merged)
        return merged, status, torch.where(statuses == EMPTY, 0.0, values).sum(0), common

    def row_error(self, f: Tensor, exact: Tensor) -> Tensor:
        return distributed.gathered(super().row_error(f, exact), self.group).sum(0)
