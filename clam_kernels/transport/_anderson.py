# SPDX-License-Identifier: Apache-2.0
"""Anderson acceleration of a fixed-point iteration g <- g + r(g), for a batch of problems."""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 5
# This part of the trace of the Gram matrix is added to its diagonal.
RIDGE = 1e-10
# The history restarts where the error is more than this many times the least error.
RESTART_RATIO = 2.0
# The objective may fall by this part of its size: that is rounding.
SLACK = 1e-6


class Anderson:
    """The next g for a history of points g_i with residuals r_i = r(g_i).

    With G and R the differences of the last DEPTH points and residuals, the next point is
    g + r - (G + R)^T c, where c minimises |r - R^T c|^2. Plain steps raise the objective: where it
    falls, that g is discarded and the iteration continues from the g before it by a plain step. No
    value is read back from the device.
    """

    def __init__(self) -> None:
        self.g_differences: list[Tensor] = []  # differences of g; 0 before a restart
        self.r_differences: list[Tensor] = []  # differences of r; 0 before a restart
        self.last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def next_g(self, g: Tensor, step: Tensor, err: Tensor, value: Tensor) -> Tensor:
        """The next g [..., K], for the step r [..., K], the error [...] and the objective [...] at
        g.
        """
        if self.last is None:
            self.last = (g, step, err, value)
            return g + step
        last_g, last_step, least, last_value = self.last
        fell = value < last_value - SLACK * (1 + last_value.abs())
        restarts = fell | (err > RESTART_RATIO * least)
        self._remember(g - last_g, step - last_step, restarts)
        g = torch.where(fell[..., None], last_g, g)
        step = torch.where(fell[..., None], last_step, step)
        least = torch.where(restarts & ~fell, err, torch.minimum(least, err))
        self.last = (g, step, least, torch.where(fell, last_value, value))
        return g + step - self._correction(step)

    def _remember(self, g_difference: Tensor, r_difference: Tensor, restarts: Tensor) -> None:
        """Append differences to the history; clear it where it restarts."""
        is_forgotten = restarts[..., None]
        self.g_differences, self.r_differences = (
            [torch.where(is_forgotten, 0.0, x) for x in (*old[-(DEPTH - 1) :], new)]
            for old, new in ((self.g_differences, g_difference), (self.r_differences, r_difference))
        )

    def _correction(self, step: Tensor) -> Tensor:
        """(G + R)^T c, which is subtracted from the plain step."""
        r_differences, g_differences = (
            torch.stack(self.r_differences, -2),
            torch.stack(self.g_differences, -2),
        )  # [..., M, K]
        gram = r_differences @ r_differences.mT
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        ridge = torch.where(trace > 0, RIDGE * trace, 1.0)
        gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        coefficients = torch.linalg.solve_ex(gram, r_differences @ step[..., None])[0]
        return ((r_differences + g_differences).mT @ coefficients)[..., 0]
