# SPDX-License-Identifier: Apache-2.0
"""What trainers of an encoder share: generators, batches, steps, schedules, scalars, and the state
that a checkpoint has.
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
from ..._core import checks
from . import checkpoint as checkpoints
from .checkpoint import State
from .inputs import Inputs
from .optimisers import Optimiser

# Steps between two reads of the losses: a read waits for the device.
READ_EVERY = 16


def seed_of(random_state: Any) -> int:
    """A seed from an int or a RandomState; from the system's entropy for None, so that numpy's
    global generator does not change.
    """
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


# torch has one global generator for each device, which all threads share: one run uses them at a
# time.
_turn = threading.RLock()


class RunGenerators:
    """States of torch's global generators for one run.

    Layers such as dropout draw from these generators and take no others. In its turn a run has the
    states after its last turn; the caller's states are restored at the end of the turn. Other runs
    wait meanwhile, so that each of several threads has the draws that it would have alone.
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
        """Inside the block the global generators have the states of this run."""
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
    """1: the learning rate does not change."""
    return 1.0


def cosine(progress: float) -> float:
    """(1 + cos(pi progress)) / 2: from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def steps(progress: float) -> float:
    """The published schedule: 1e-1 from epoch 150 of 400, 1e-2 from 300, 1e-3 from 350."""
    return 1e-3 if progress >= 0.875 else 0.1 ** int(progress / 0.375)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "cosine": cosine,
    "steps": steps,
}


def count_of(rows: int, size: int) -> int:
    """Number of batches; a single last row is part of the batch before, as BatchNorm needs two."""
    whole, rest = divmod(rows, size)
    return max(1, whole + (rest > 1))


def batches_of(order: Tensor, size: int) -> Iterator[Tensor]:
    """The rows of each batch."""
    last = count_of(len(order), size) - 1
    for i in range(last + 1):
        yield order[i * size : None if i == last else (i + 1) * size]


def augment_batch(augment: Any, batch: Tensor, generator: torch.Generator) -> Tensor:
    """An augmented draw of a batch; TypeError or ValueError unless it has as many rows."""
    if augment is None:
        return batch
    draw = augment(batch, generator)
    if not isinstance(draw, Tensor):
        raise TypeError(f"augment: expected it to return a Tensor, got {type(draw).__name__}")
    if draw.ndim == 0 or len(draw) != len(batch):
        got = list(draw.shape)
        raise ValueError(f"augment: expected a batch of {len(batch)} rows from it, got {got}")
    return draw


def encode_batch(encoder: nn.Module, batch: Tensor) -> Tensor:
    """The features [B, D] of a batch; TypeError or ValueError for another result."""
    features = encoder(batch)
    if not isinstance(features, Tensor):
        raise TypeError(f"encoder: expected it to return a Tensor, got {type(features).__name__}")
    if features.ndim != 2 or len(features) != len(batch):
        got = list(features.shape)
        raise ValueError(f"encoder: expected features [{len(batch)}, D] from it, got shape {got}")
    return features


@torch.no_grad()
def encode_rows(
    encoder: nn.Module, inputs: Inputs, device: torch.device, dtype: torch.dtype, size: int
) -> Tensor:
    """The features [N, D] of all rows in eval mode, without augmentation, in batches of a size."""
    before = encoder.training
    encoder.eval()
    try:
        rows = torch.arange(len(inputs), dtype=torch.int64, device="cpu")
        parts = [
            encode_batch(encoder, inputs.take(batch, device, dtype))
            for batch in batches_of(rows, size)
        ]
    finally:
        encoder.train(before)
    return torch.cat(parts)


def check_writer(writer: Any) -> None:
    """TypeError unless a writer is None or has `add_scalar`."""
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            checks.wording("writer", "an object with add_scalar", type(writer).__name__)
        )


def dtype_of(encoder: nn.Module) -> torch.dtype:
    """The dtype of an encoder's parameters; float32 without parameters."""
    floats = (p.dtype for p in encoder.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


@dataclass
class RunLength:
    """The batches and epochs of a run, and the factor of its learning rate by the progress."""

    rows: int
    batch_size: int
    epochs: int
    schedule: Callable[[float], float]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return count_of(self.rows, self.batch_size)


class TrainingRun:
    """The state of a training run, which a checkpoint stores and restores.

    `batches` yields the rows of each batch from the current state on; the caller calls `step` once
    for each of them. The generators are `batches` on the CPU and `augment` on the device.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimiser: Optimiser,
        length: RunLength,
        seed: int,
        random: RunGenerators,
        writer: Any = None,
        name: str = "run",
    ) -> None:
        self.modules, self.optimiser, self.length = modules, optimiser, length
        self.random = random
        self.writer, self.name = writer, name
        self.rate = "learning_rate"  # the parameter of the estimator that has the rate
        self.generators = {
            "batches": torch.Generator().manual_seed(seed),
            "augment": torch.Generator(random.device).manual_seed(seed + 1),
        }
        self.base = [float(group["lr"]) for group in optimiser.param_groups]
        self.epoch, self.batch, self.steps = 0, 0, 0
        self.seen = 0  # rows of training so far
        self.is_stopped = False  # whether a callback ended it
        self.order: Tensor | None = None
        self.losses: list[float] = []  # mean of each epoch
        self.sum = 0.0  # of the losses of this epoch
        self._unread: list[Tensor] = []

    @property
    def is_over(self) -> bool:
        """Whether the training has ended."""
        return self.is_stopped or self.epoch >= self.length.epochs

    def batches(self) -> Iterator[Tensor]:
        """Rows of each batch until the run is over."""
        while not self.is_over:
            if self.order is None:
                self.order = self.permutation()
            start = self.batch * self.length.batch_size
            last = self.batch == self.length.steps_per_epoch - 1
            yield self.order[start : None if last else start + self.length.batch_size]

    def permutation(self) -> Tensor:
        """All rows in a random order."""
        generator = self.generators["batches"]
        return torch.randperm(self.length.rows, generator=generator, device="cpu")

    def step(self, loss: Tensor, rows: Tensor) -> None:
        """One step of the optimiser with the gradients of a loss; go to the next batch."""
        total = self.length.epochs * self.length.steps_per_epoch
        factor = self.length.schedule(self.steps / total)
        for group, base in zip(self.optimiser.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self._unread.append(loss.detach())
        self.batch, self.steps, self.seen = self.batch + 1, self.steps + 1, self.seen + len(rows)
        if self.steps % READ_EVERY == 0:
            self.read_losses()
        if self.batch == self.length.steps_per_epoch:
            self.read_losses()
            self.losses.append(self.sum / self.batch)
            self.scalar("learning_rate", self.optimiser.param_groups[0]["lr"])
            self.epoch, self.batch, self.order, self.sum = self.epoch + 1, 0, None, 0.0

    def read_losses(self) -> None:
        """Read the losses of the last steps; FloatingPointError if one is not finite."""
        values = torch.stack(self._unread).double().tolist() if self._unread else []
        first = self.steps - len(values)
        self._unread = []
        for i, value in enumerate(values):
            if not math.isfinite(value):
                epoch, batch = divmod(first + i, self.length.steps_per_epoch)
                raise FloatingPointError(
                    f"loss: expected finite values, got {value} in batch {batch} of epoch {epoch};"
                    f" lower {self.rate}, or check the results of augment and encoder"
                )
            self.sum += value
            self.scalar("loss", value, first + i + 1)

    def scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Give a scalar to the writer, if there is one."""
        if self.writer is not None:
            self.writer.add_scalar(
                f"{self.name}/{name}", value, self.steps if step is None else step
            )

    # ---- state -----------------------------------------------------------------------------------

    def state(self) -> State:
        """The state as a checkpoint has it: tensors and numbers."""
        self.read_losses()
        tensors, numbers = checkpoints.of_optimiser(self.optimiser)
        for name, module in self.modules.items():
            tensors |= checkpoints.of_module(name, module)
        for name, generator in self.generators.items():
            tensors[f"generator.{name}"] = generator.get_state()
        for name, generator_state in self.random.states.items():
            tensors[f"generator.{name}"] = generator_state
        if self.order is not None:
            tensors["order"] = self.order
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64, device="cpu")
        counts = [self.epoch, self.batch, self.seen, self.steps]
        rest = {"sum": self.sum, "stopped": self.is_stopped}
        return tensors, {"optimizer": numbers, "at": counts, **rest}

    def restore(self, state: State) -> None:
        """Replace the state by that of a checkpoint."""
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
        rows = torch.arange(self.length.rows, dtype=torch.int64, device="cpu")
        is_order = self.order is None or torch.equal(self.order.sort().values, rows)
        serialize.expect(is_order, "order of the rows does not fit the data")
        self.losses = tensors["losses"].tolist()
        self.epoch, self.batch, self.seen, self.steps = (int(x) for x in numbers["at"])
        length = self.length
        is_inside = 0 <= self.batch < length.steps_per_epoch and 0 <= self.epoch <= length.epochs
        is_inside &= self.steps == self.epoch * length.steps_per_epoch + self.batch
        serialize.expect(is_inside, "epoch and batch lie outside this run")
        self.sum, self.is_stopped = float(numbers["sum"]), bool(numbers["stopped"])
