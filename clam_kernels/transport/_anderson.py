# SPDX-License-Identifier: Apache-2.0
"""Anderson's acceleration of a fixed-point iteration g <- g + r(g), for a batch of them."""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 5
# Share of the Gram matrix's trace that is added to its diagonal.
RIDGE = 1e-10
# The history is forgotten where the error is this many times the least so far.
WORSE = 2.0
# The objective may fall by this share of its size: its own rounding.
SLACK = 1e-6


class Anderson:
    """The next g is the combination of the last ones whose r is least by their differences.

    The objective is that which plain steps raise: a g where it has fallen is given up, and the
    plain step from the g before it taken. Nothing is read back from the device.
    """

    def __init__(self) -> None:
        self.moves: list[Tensor] = []  # differences of g, zero where forgotten
        self.turns: list[Tensor] = []  # differences of r
        self.seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def following(self, g: Tensor, step: Tensor, err: Tensor, value: Tensor) -> Tensor:
        """The next g [..., K] after the step r [..., K] was seen at g, with the error and the
        objective [...] there.
        """
        if self.seen is None:
            self.seen = (g, step, err, value)
            return g + step
        last_g, last_step, least, last_value = self.seen
        fell = value < last_value - SLACK * (1 + last_value.abs())
        lost = fell | (err > WORSE * least)
        self._remember(g - last_g, step - last_step, lost)
        g = torch.where(fell[..., None], last_g, g)
        step = torch.where(fell[..., None], last_step, step)
        least = torch.where(lost & ~fell, err, torch.minimum(least, err))
        self.seen = (g, step, least, torch.where(fell, last_value, value))
        return g + step - self._correction(step)

    def _remember(self, move: Tensor, turn: Tensor, lost: Tensor) -> None:
        forget = lost[..., None]
        self.moves, self.turns = (
            [torch.where(forget, 0.0, x) for x in (*old[-(DEPTH - 1) :], new)]
            for old, new in ((self.moves, move), (self.turns, turn))
        )

    def _correction(self, step: Tensor) -> Tensor:
        """What the differences take off the plain step."""
        turns, moves = torch.stack(self.turns, -2), torch.stack(self.moves, -2)  # [..., M, K]
        gram = turns @ turns.mT
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        ridge = torch.where(trace > 0, RIDGE * trace, 1.0)
        gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        share = torch.linalg.solve_ex(gram, turns @ step[..., None])[0]
        return ((turns + moves).mT @ share)[..., 0]
