# SPDX-License-Identifier: Apache-2.0
"""What trainers of an encoder share: random numbers of their own, batches, steps, schedules,
scalars, a bar, and a state that goes into a checkpoint and back.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn

from ... import serialize
from ..common.base import progress_bar
from . import checkpoint as checkpoints
from .checkpoint import State
from .optimisers import Optimiser

# Steps between two looks at the losses: each look waits for the device.
LOOK = 16


def seed_of(random_state: Any) -> int:
    """A seed: an int's own, drawn from a RandomState, or from the system's entropy for None, so
    that numpy's global generator is left alone.
    """
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


# Torch has one global generator a device for all threads: runs take turns with them.
_turn = threading.RLock()


class OwnRandom:
    """States of torch's global generators that belong to one run.

    Layers draw from these generators (dropout), and cannot be given others. In its turn a run finds
    them as its last turn left them, and the caller never notices. Other runs wait meanwhile, so
    that each of several threads has the draws that it would have alone.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        places = {"global": torch.device("cpu")}
        if device.type == "cuda":
            places["device"] = device
        self.states = {
            name: torch.Generator(place).manual_seed(seed).get_state()
            for name, place in places.items()
        }

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The global generators are this run's inside the block."""
        with _turn:
            before = self._read()
            self._set(self.states)
            try:
                yield
            finally:
                self.states = self._read()
                self._set(before)

    def _read(self) -> dict[str, Tensor]:
        states = {"global": torch.get_rng_state()}
        if "device" in self.states:
            states["device"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["global"])
        if "device" in states:
            torch.cuda.set_rng_state(states["device"], self.device)


def constant(progress: float) -> float:
    """The learning rate as it is."""
    return 1.0


def cosine(progress: float) -> float:
    """From 1 to 0 along a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def steps(progress: float) -> float:
    """The published one: a tenth from 150 and from 300 of 400 epochs, a thousandth from 350."""
    return 1e-3 if progress >= 0.875 else 0.1 ** int(progress / 0.375)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "cosine": cosine,
    "steps": steps,
}


def count_of(rows: int, size: int) -> int:
    """Batches of so many rows; a last row alone joins the batch before: BatchNorm needs two."""
    whole, rest = divmod(rows, size)
    return max(1, whole + (rest > 1))


def batches_of(order: Tensor, size: int) -> Iterator[Tensor]:
    """Rows batch by batch."""
    last = count_of(len(order), size) - 1
    for i in range(last + 1):
        yield order[i * size : None if i == last else (i + 1) * size]


def augmented(augment: Any, batch: Tensor, generator: torch.Generator) -> Tensor:
    """A batch after an augmented draw, which must keep its rows."""
    if augment is None:
        return batch
    found = augment(batch, generator)
    if not isinstance(found, Tensor):
        raise TypeError(f"augment: expected it to return a Tensor, got {type(found).__name__}")
    if found.ndim == 0 or len(found) != len(batch):
        got = list(found.shape)
        raise ValueError(f"augment: expected a batch of {len(batch)} rows from it, got {got}")
    return found


def encoded(encoder: nn.Module, batch: Tensor) -> Tensor:
    """Features [B, D]."""
    found = encoder(batch)
    if not isinstance(found, Tensor):
        raise TypeError(f"encoder: expected it to return a Tensor, got {type(found).__name__}")
    if found.ndim != 2 or len(found) != len(batch):
        got = list(found.shape)
        raise ValueError(f"encoder: expected features [{len(batch)}, D] from it, got shape {got}")
    return found


def dtype_of(encoder: nn.Module) -> torch.dtype:
    """What an encoder computes in."""
    floats = (p.dtype for p in encoder.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


@dataclass
class Plan:
    """How long a run is and how its rate falls."""

    rows: int
    batch_size: int
    epochs: int
    schedule: Callable[[float], float]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return count_of(self.rows, self.batch_size)


class Run:
    """A training run: everything in it that changes, and how that is written down.

    `batches` yields the rows of the next batch, from wherever the run stands; `step` is called once
    for each. The generators are `batches` on the CPU and `augment` on the device.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimiser: Optimiser,
        plan: Plan,
        seed: int,
        random: OwnRandom,
        writer: Any = None,
        name: str = "run",
    ) -> None:
        self.modules, self.optimiser, self.plan, self.random = modules, optimiser, plan, random
        self.writer, self.name = writer, name
        self.generators = {
            "batches": torch.Generator().manual_seed(seed),
            "augment": torch.Generator(random.device).manual_seed(seed + 1),
        }
        self.base = [float(group["lr"]) for group in optimiser.param_groups]
        self.epoch, self.batch, self.seen, self.steps = 0, 0, 0, 0
        self.stopped = False  # whether a callback ended it
        self.order: Tensor | None = None
        self.losses: list[float] = []  # means of the epochs
        self.sum = 0.0  # of this epoch's losses
        self._unread: list[Tensor] = []

    @property
    def over(self) -> bool:
        """Whether there is nothing left to train."""
        return self.stopped or self.epoch >= self.plan.epochs

    def batches(self) -> Iterator[Tensor]:
        """Rows of each batch until the run is over."""
        while not self.over:
            if self.order is None:
                self.order = self.permutation()
            start = self.batch * self.plan.batch_size
            last = self.batch == self.plan.steps_per_epoch - 1
            yield self.order[start : None if last else start + self.plan.batch_size]

    def permutation(self) -> Tensor:
        """All rows in a random order."""
        generator = self.generators["batches"]
        return torch.randperm(self.plan.rows, generator=generator, device="cpu")

    def step(self, loss: Tensor, rows: Tensor) -> None:
        """One step of the optimiser, and on to the next batch."""
        total = self.plan.epochs * self.plan.steps_per_epoch
        factor = self.plan.schedule(self.steps / total)
        for group, base in zip(self.optimiser.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self._unread.append(loss.detach())
        self.batch, self.steps, self.seen = self.batch + 1, self.steps + 1, self.seen + len(rows)
        if self.steps % LOOK == 0:
            self.look()
        if self.batch == self.plan.steps_per_epoch:
            self.look()
            self.losses.append(self.sum / self.batch)
            self.scalar("learning_rate", self.optimiser.param_groups[0]["lr"])
            self.epoch, self.batch, self.order, self.sum = self.epoch + 1, 0, None, 0.0

    def look(self) -> None:
        """Read the losses of the last steps; one that is not finite ends the run."""
        values = torch.stack(self._unread).double().tolist() if self._unread else []
        first = self.steps - len(values)
        self._unread = []
        for i, value in enumerate(values):
            if not math.isfinite(value):
                epoch, batch = divmod(first + i, self.plan.steps_per_epoch)
                raise FloatingPointError(
                    f"loss: expected finite values, got {value} in batch {batch} of epoch {epoch};"
                    " lower learning_rate, or see what augment and encoder make of the data"
                )
            self.sum += value
            self.scalar("loss", value, first + i + 1)

    def scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Tell the writer, if there is one."""
        if self.writer is not None:
            self.writer.add_scalar(
                f"{self.name}/{name}", value, self.steps if step is None else step
            )

    # ---- state -----------------------------------------------------------------------------------

    def state(self) -> State:
        """All of it; what a checkpoint holds."""
        self.look()
        tensors, numbers = checkpoints.of_optimiser(self.optimiser)
        for name, module in self.modules.items():
            tensors |= checkpoints.of_module(name, module)
        for name, generator in self.generators.items():
            tensors[f"generator.{name}"] = generator.get_state()
        for name, kept in self.random.states.items():
            tensors[f"generator.{name}"] = kept
        if self.order is not None:
            tensors["order"] = self.order
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64, device="cpu")
        at = [self.epoch, self.batch, self.seen, self.steps]
        ends = {"sum": self.sum, "stopped": self.stopped}
        return tensors, {"optimizer": numbers, "at": at, **ends}

    def restore(self, state: State) -> None:
        """Go on from a state."""
        tensors, numbers = state
        try:
            for name, module in self.modules.items():
                part = checkpoints.under(name, tensors)
                checkpoints.restore_module(module, part, self.random.device)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        checkpoints.restore_optimiser(self.optimiser, (tensors, numbers["optimizer"]))
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator.{name}"])
        for name in self.random.states:
            self.random.states[name] = tensors[f"generator.{name}"]
        self.order = tensors.get("order")
        everyone = torch.arange(self.plan.rows, dtype=torch.int64, device="cpu")
        fits = self.order is None or torch.equal(self.order.sort().values, everyone)
        serialize.expect(fits, "order of the rows does not fit the data")
        self.losses = tensors["losses"].tolist()
        self.epoch, self.batch, self.seen, self.steps = (int(x) for x in numbers["at"])
        place = self.epoch * self.plan.steps_per_epoch + self.batch
        inside = 0 <= self.batch < self.plan.steps_per_epoch and 0 <= self.epoch <= self.plan.epochs
        serialize.expect(inside and place == self.steps, "its place in the run is none")
        self.sum, self.stopped = float(numbers["sum"]), bool(numbers["stopped"])


class Bar:
    """A bar over epochs on stderr, where verbose."""

    def __init__(self, verbose: int, name: str, run: Run) -> None:
        self.bar: Any = None
        if verbose:
            self.bar = progress_bar(name, run.plan.epochs, done=run.epoch)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def epoch(self, **figures: float) -> None:
        """One epoch is over."""
        if self.bar is not None:
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()}, refresh=False)
            self.bar.update()
