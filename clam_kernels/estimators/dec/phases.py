# SPDX-License-Identifier: Apache-2.0
"""What the phases of a fit share: rows, network and generators, and the methods of a phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..training.checkpoint import State
from ..training.inputs import Inputs
from ..training.optimisers import SGD, Adam, Optimiser, checked_optimiser
from ..training.trainer import (
    RunGenerators,
    RunLength,
    TrainingRun,
    augment_batch,
    constant,
    encode_rows,
)
from .networks import DecNetwork
from .settings import DecSettings

MOMENTUM = 0.9  # of the optimiser "sgd"
# Rows from which dead units and the explained variance are computed.
PROBED_ROWS = 1024


@dataclass
class Context:
    """The rows, the network and the generators of a fit."""

    settings: DecSettings
    inputs: Inputs
    network: DecNetwork
    device: torch.device
    dtype: torch.dtype  # of the rows that the encoder gets
    seed: int
    random: RunGenerators

    def take(self, rows: Tensor) -> Tensor:
        """Some rows as the encoder gets them."""
        return self.inputs.take(rows, self.device, self.dtype)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """An augmented draw of some rows."""
        return augment_batch(self.settings.augment, self.take(rows), generator)

    def probe(self) -> Tensor:
        """Some rows, at equal distances in the data."""
        count = len(self.inputs)
        ends = {"dtype": torch.float64, "device": "cpu"}
        places = torch.linspace(0, count - 1, min(count, PROBED_ROWS), **ends)  # type: ignore[call-overload]
        with self.random.turn():
            return self.take(places.long())

    def codes(self) -> Tensor:
        """Scaled codes [N, D] of all rows in eval mode, without augmentation."""
        size = self.settings.batch_size
        with self.random.turn():
            z = encode_rows(self.network, self.inputs, self.device, self.dtype, size)
        self.inputs.is_checked = True  # every row was in a batch
        return z

    def codes_of(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Codes of some rows in eval mode, of augmented draws with a generator."""
        self.network.eval()
        parts = []
        with torch.no_grad(), self.random.turn():
            for part in rows.split(self.settings.batch_size):
                x = self.take(part) if generator is None else self.draw(part, generator)
                parts.append(self.network(x))
        return torch.cat(parts)

    def optimiser(self, parameters: Iterable[nn.Parameter], rate: float) -> Optimiser:
        """The optimiser of a phase; modules may share parameters."""
        unique = {id(p): p for p in parameters if p.requires_grad}
        some = list(unique.values())
        kind = self.settings.optimizer
        if not isinstance(kind, str):
            with self.random.turn():
                return checked_optimiser(kind(some))
        return Adam(some, rate) if kind == "adam" else SGD(some, rate, MOMENTUM, 0.0)


class Phase:
    """A part of a fit: some epochs with one optimiser and one loss."""

    name: str

    def __init__(self, context: Context, number: int) -> None:
        """`number` counts the phases; each has random numbers of its own."""
        self.context, self.number = context, number

    def start_run(
        self,
        parameters: Iterable[nn.Parameter],
        rate: float,
        batch_size: int,
        epochs: int,
        schedule: Callable[[float], float] = constant,
    ) -> TrainingRun:
        """The run of this phase before its first step."""
        context = self.context
        length = RunLength(len(context.inputs), batch_size, epochs, schedule)
        return TrainingRun(
            {"network": context.network},
            context.optimiser(parameters, rate),
            length,
            context.seed + 3 * self.number,
            context.random,
            context.settings.writer,
            f"dec/{self.name}",
        )

    run: TrainingRun

    def begin(self) -> None:
        """Prepare the first step; a phase that a checkpoint restores does not begin again."""

    def before_step(self) -> None:
        """Called before each step; may end the run."""

    def loss(self, rows: Tensor) -> Tensor:
        """The loss of a batch, in training mode."""
        raise NotImplementedError

    def end(self) -> None:
        """Called after the last step, also of a run that a checkpoint restored."""

    def figures(self) -> dict[str, Any]:
        """What callbacks get after an epoch."""
        return {"phase": self.name, "epoch": self.run.epoch - 1, "loss": self.run.losses[-1]}

    def state(self) -> State:
        """The state that a checkpoint has."""
        return self.run.state()

    def restore(self, state: State) -> None:
        """Replace the state by that of a checkpoint."""
        self.run.restore(state)
