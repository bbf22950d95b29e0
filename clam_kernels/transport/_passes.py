# SPDX-License-Identifier: Apache-2.0
"""One pass: the rows' half-step, and the masses of all columns after it, on one process or over
several.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..ops._facts import EMPTY, FINE, INFEASIBLE, LARGE_LOGIT
from ._problem import ProblemOps

# Rows of the sample whose median estimates the common part of all row potentials.
SAMPLE_SIZE = 31


class Pass(NamedTuple):
    """The result of one pass: f has the rows of this process, the other fields use the rows of all
    processes.
    """

    f: Tensor  # [..., N]
    log_mass: Tensor  # [..., K] float64, logarithms of the column masses
    status: Tensor  # [...]
    row_value: Tensor  # [...] float64, sum_i a_i f_i
    common: Tensor  # [..., 1] float64, the part that most f share if it is large, else 0


def sample_median(f: Tensor) -> Tensor:
    """The median [..., 1] of the finite row potentials of a sample; NaN if there are none."""
    n = f.shape[-1]
    if n == 0:
        return f.new_full((*f.shape[:-1], 1), torch.nan, dtype=torch.float64)
    index = torch.arange(SAMPLE_SIZE, dtype=torch.int64, device=f.device) * n // SAMPLE_SIZE
    sample = f.detach().index_select(-1, index).double()
    return torch.where(sample.isfinite(), sample, torch.nan).nanmedian(-1, keepdim=True).values


def large_part(median: Tensor) -> Tensor:
    """The median where it exceeds LARGE_LOGIT, else 0. The caller moves it from the row potentials
    to the column potentials: that changes no plan, and float32 row potentials keep more digits.
    """
    return torch.where(median.abs() > LARGE_LOGIT, median, 0.0)


class Passes:
    """The passes of a batch of problems; g is float64."""

    def __init__(self, ops: ProblemOps) -> None:
        self.ops = ops
        problem = ops.problem
        self.device, k = problem.first.device, problem.n_prototypes
        uniform = torch.full((k,), -math.log(k), dtype=torch.float64, device=self.device)
        self.log_b = uniform if problem.log_col is None else problem.log_col.double()
        self.log_row = problem.log_row
        self.masked = self.log_b == -torch.inf
        self.start_status: Tensor | None = None

    def mask_columns(self, g: Tensor) -> Tensor:
        """The g, -inf for masked columns and only there: another -inf becomes the least finite
        g.
        """
        g = g.double()
        least = torch.where(g.isfinite(), g, torch.inf).amin(-1, keepdim=True)
        least = torch.where(least.isfinite(), least, 0.0)
        return torch.where(self.masked, -torch.inf, torch.where(g == -torch.inf, least, g))

    def start(self, prototype_first: bool) -> Tensor:
        """The g before the first pass: the columns' half-step from f = 0, or 0 if the rows come
        first.
        """
        if not prototype_first:
            return self.mask_columns(torch.zeros_like(self.log_b))
        _, g, _, self.start_status = self.ops.iterate(1, None, True)
        return self.mask_columns(g)

    def step(self, g: Tensor) -> Pass:
        """The pass at g."""
        f, log_mass, status = self.ops.one_pass(g, self.log_row)
        status = self.checked_status(log_mass, status)
        return Pass(f, log_mass.double(), status, self.row_value(f), large_part(sample_median(f)))

    def checked_status(self, log_mass: Tensor, status: Tensor) -> Tensor:
        """The status, INFEASIBLE where a column with mass got none. A failed start keeps its
        status.
        """
        stuck = ((log_mass == -torch.inf) & ~self.masked).any(-1) | self.masked.all(-1)
        status = torch.where((status == FINE) & stuck, INFEASIBLE, status)
        if self.start_status is None:
            return status
        return torch.where(
            (self.start_status > FINE) & (status != EMPTY), self.start_status, status
        )

    def row_value(self, f: Tensor) -> Tensor:
        """The sum of a_i f_i [...]; the mean of f for uniform masses."""
        if self.log_row is None:
            return f.double().mean(-1)
        mass = self.log_row.double().exp()
        return torch.where(mass > 0, mass * f.double(), 0.0).sum(-1)

    def row_error(self, f: Tensor, exact: Tensor) -> Tensor:
        """L1 error of the row sums at f, where `exact` would make them exact: sum_i a_i (|exp(f_i -
        exact_i) - 1| + rounding of a large f_i), because both potentials have that rounding.
        """
        error = torch.expm1(f.double() - exact.double()).abs()
        unit = torch.finfo(f.dtype).eps / 2
        error = error + torch.where(f.abs() > LARGE_LOGIT, f.double().abs() * unit, 0.0)
        if self.log_row is None:
            return error.mean(-1) if error.shape[-1] else error.sum(-1)
        mass = self.log_row.double().exp()
        return torch.where(mass > 0, mass * error, 0.0).sum(-1)

    def column_error(self, log_mass: Tensor) -> Tensor:
        """L1 error of the column sums."""
        return (log_mass.exp() - self.log_b.exp()).abs().sum(-1)

    def residual(self, log_mass: Tensor) -> Tensor:
        """`log b - log_mass`: the columns' half-step adds it to g."""
        return torch.where(self.masked, 0.0, self.log_b - log_mass)


class Sharded(Passes):
    """The passes where each process of a group has some of the rows and all prototypes. A pass
    exchanges K + 3 numbers. All processes decide from the same bits.
    """

    def __init__(self, ops: ProblemOps, group: Any) -> None:
        super().__init__(ops)
        self.group = group

    def start(self, prototype_first: bool) -> Tensor:
        if not prototype_first:
            return super().start(False)
        # rows whose masses are their own sums get f = 0: this pass has the column masses at f = 0
        assert self.log_row is not None
        masked = self.log_row == -torch.inf
        zero = torch.zeros_like(self.log_b)
        rows = torch.zeros_like(self.log_row, dtype=torch.float32).masked_fill(masked, -torch.inf)
        f, _, _ = self.ops.one_pass(zero, rows)
        _, log_mass, status = self.ops.one_pass(zero, torch.where(masked, -torch.inf, -f.double()))
        log_mass, status, *_ = self.merge(log_mass, status, f)
        self.start_status = self.checked_status(log_mass, status)
        return self.mask_columns(self.residual(log_mass))

    def step(self, g: Tensor) -> Pass:
        f, log_mass, status = self.ops.one_pass(g, self.log_row)
        log_mass, status, value, common = self.merge(log_mass, status, f)
        return Pass(f, log_mass, self.checked_status(log_mass, status), value, common)

    def merge(
        self, log_mass: Tensor, status: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log_mass, status, row value, common) of the rows of all processes."""
        numbers = [status[..., None].double(), self.row_value(f)[..., None], sample_median(f)]
        table = distributed.gather(torch.cat([log_mass.double(), *numbers], -1), self.group)
        masses, statuses, values = table[..., :-3], table[..., -3], table[..., -2]
        common = large_part(table[..., -1:].nanmedian(0).values)
        worst = torch.where(statuses == EMPTY, 0.0, statuses).amax(0)
        status = torch.where((statuses == EMPTY).all(0), EMPTY, worst).long()
        is_fine = (statuses == FINE)[..., None]
        total = torch.where(is_fine, masses, -torch.inf).logsumexp(0)
        total = torch.where((worst > 0)[..., None], torch.nan, total)
        return total, status, torch.where(statuses == EMPTY, 0.0, values).sum(0), common

    def row_error(self, f: Tensor, exact: Tensor) -> Tensor:
        return distributed.gather(super().row_error(f, exact), self.group).sum(0)
