# SPDX-License-Identifier: Apache-2.0
"""The training of a SeLa: steps on the current labels, and relabelling at fixed times."""

from __future__ import annotations

import copy
import json
from numbers import Integral
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import serialize
from ...nn.self_labeller import Relabelling, SelfLabeller
from ..common.progress import ProgressBar
from ..training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    State,
    as_json,
    name_of,
    shapes_of,
)
from ..training.inputs import Inputs, digest
from ..training.optimisers import SGD, Optimiser, checked_optimiser
from ..training.trainer import (
    RunGenerators,
    RunLength,
    TrainingRun,
    augment_batch,
    batches_of,
    dtype_of,
    encode_batch,
)
from .settings import RECIPES, SeLaSettings

# Parameters that must be equal in a checkpoint and in the fit that resumes from it; so must those
# of a recipe.
SHARED = ("n_clusters", "n_heads", "lam", "learning_rate", "momentum", "strict")
COLUMNS = ("seen", "head", "n_iter", "err", "converged", "changed")
KIND = "SeLa checkpoint"


class Training:
    """The encoder, the heads and the training run of one fit."""

    def __init__(
        self, settings: SeLaSettings, inputs: Inputs, device: torch.device, seed: int
    ) -> None:
        self.settings, self.inputs, self.device, self.seed = settings, inputs, device, seed
        self.random = RunGenerators(seed, device)
        self.encoder: nn.Module = copy.deepcopy(settings.encoder).to(device)
        self.dtype = dtype_of(self.encoder)
        self.tol = settings.tolerance(len(inputs))
        with self.random.turn():
            self.heads = self._heads()
            optimiser = self._optimiser()
        epochs = settings.n_epochs
        length = RunLength(len(inputs), settings.batch_size, epochs, settings.learning_rate_factor)
        modules = {"encoder": self.encoder, "heads": self.heads}
        self.run = TrainingRun(
            modules, optimiser, length, seed, self.random, settings.writer, "sela"
        )
        times = np.linspace(0.0, 1.0, settings.n_relabels) ** 2
        # rows of training before each relabelling
        self.times = (epochs + 1.01) * len(inputs) * times
        self.due = 0  # index of the next of these times
        self.rows: list[tuple[float, ...]] = []  # figures of each relabelling of a head
        self.changed = 1.0
        self.checkpoint: CheckpointWriter | None = None

    def _heads(self) -> SelfLabeller:
        """New heads for the features of the encoder, whose number the first rows show."""
        settings, count = self.settings, len(self.inputs)
        self.encoder.eval()
        with torch.no_grad():
            first = torch.arange(min(2, count), dtype=torch.int64, device="cpu")
            probe = self.inputs.take(first, self.device, self.dtype)
            features = encode_batch(self.encoder, probe)
        col, row = (
            None if mass is None else torch.as_tensor(mass, dtype=torch.float64, device="cpu")
            for mass in (settings.col_marginal, settings.row_marginal)
        )
        return SelfLabeller(
            features.shape[1], int(settings.n_clusters), count, int(settings.n_heads),
            lam=float(settings.lam), tol=self.tol, max_iter=int(settings.max_iter),
            col_marginal=col, row_marginal=row, strict=bool(settings.strict),
            generator=torch.Generator().manual_seed(self.seed + 2), device=self.device,
            dtype=features.dtype,
        )  # fmt: skip

    def _optimiser(self) -> Optimiser:
        both = [*self.encoder.parameters(), *self.heads.parameters()]
        parameters = [p for p in both if p.requires_grad]
        settings = self.settings
        if settings.optimizer is not None:
            return checked_optimiser(settings.optimizer(parameters))
        return SGD(
            parameters,
            float(settings.learning_rate),
            float(settings.momentum),
            float(settings.weight_decay),
        )

    # ---- the run ---------------------------------------------------------------------------------

    def go(self) -> None:
        """Run from the current state to the end."""
        run = self.run
        if run.is_over and self.due == len(self.times):
            return  # the checkpoint is that of a finished run: do not write it again
        epochs = self.settings.n_epochs
        with ProgressBar(self.settings.verbose, "SeLa", epochs, done=run.epoch) as bar:
            for rows in run.batches():
                if self.due < len(self.times) and self.times[self.due] <= run.seen:
                    self.relabel()
                self._step(rows)
                if run.batch == 0:
                    bar.advance(loss=f"{run.losses[-1]:.4f}", changed=f"{self.changed:.4f}")
                    run.is_stopped = self._after_epoch()
                # after the callbacks, whose result is part of the state
                checkpoint = self.checkpoint
                if checkpoint and (run.is_stopped or run.steps % checkpoint.every == 0):
                    checkpoint.file.write(self.state())
            if self.due < len(self.times):
                self.relabel()
        if self.checkpoint is not None:
            self.checkpoint.file.write(self.state())

    def _step(self, rows: Tensor) -> None:
        self.encoder.train()
        with self.random.turn():
            loss = self.heads.loss(self._draw(rows), rows.to(self.device))
            self.run.step(loss, rows)

    def _draw(self, rows: Tensor) -> Tensor:
        """Features of an augmented draw of some rows."""
        batch = self.inputs.take(rows, self.device, self.dtype)
        generator = self.run.generators["augment"]
        return encode_batch(self.encoder, augment_batch(self.settings.augment, batch, generator))

    def _after_epoch(self) -> bool:
        """Call the callbacks after an epoch; return whether one of them ends the training."""
        run = self.run
        info = {"epoch": run.epoch - 1, "loss": run.losses[-1], "changed": self.changed}
        return self.settings.callbacks.iteration(info)

    def relabel(self) -> None:
        """Relabel every head, and choose the next time of a relabelling."""
        self.run.read_losses()
        features = self._features()
        results = [self.heads.relabel_features(features, h) for h in range(self.heads.n_heads)]
        self.rows += [_row(self.run.seen, result) for result in results]
        self.changed = float(np.mean([result.changed for result in results]))
        self.run.scalar("changed", self.changed)
        self.run.scalar("err", max(result.err for result in results))
        self.run.scalar("n_iter", float(np.mean([result.n_iter for result in results])))
        last = len(self.times) - 1
        while self.due <= last and (self.times[self.due] <= self.run.seen or self.run.is_over):
            self.due += 1

    @torch.no_grad()
    def _features(self) -> Tensor:
        """Mean features [N, D] of all rows over augmented draws.

        Heads are linear, so the mean of the features gives the mean of their log-probabilities.
        The encoder is in training mode, where BatchNorm has the statistics of each batch: rows are
        in random order, as their own order may be class by class.
        """
        self.encoder.train()
        draws = 1 if self.settings.augment is None else self.settings.n_augment
        size = self.run.length.batch_size
        weight = self.heads.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros(len(self.inputs), weight.shape[2], dtype=dtype, device=self.device)
        for _ in range(draws):
            order = self.run.permutation()
            for rows in batches_of(order, size):
                with self.random.turn():
                    total[rows.to(self.device)] += self._draw(rows)
        self.inputs.is_checked = True  # every row was in a batch
        return total.div_(draws).to(weight.dtype)

    # ---- checkpoint ------------------------------------------------------------------------------

    def use_checkpoint(self, path: str | PathLike[str], every: int | None, resume: bool) -> None:
        """Write checkpoints to a file every so many batches; `resume` restores its state first."""
        every = self.run.length.steps_per_epoch if every is None else int(every)
        file = Checkpoint(path, KIND, self.shared_settings(), resume)
        self.checkpoint = CheckpointWriter(file, every)
        state = file.read() if resume else None
        if state is not None:
            with serialize.reading(path):
                self._restore(state)

    def shared_settings(self) -> dict[str, Any]:
        """What must be equal in a checkpoint and in the fit that resumes from it."""
        settings = self.settings
        names = (*SHARED, *RECIPES[settings.recipe])
        shared = {name: as_json(getattr(settings, name)) for name in names}
        shared["tol"] = self.tol
        shared |= {name: name_of(getattr(settings, name)) for name in ("augment", "optimizer")}
        for name in ("col_marginal", "row_marginal"):
            mass = getattr(self.heads, name)
            shared[name] = None if mass is None else digest(mass.cpu().numpy().tobytes())
        seed = settings.random_state
        return {
            **shared,
            "random_state": int(seed) if isinstance(seed, Integral) else None,
            "device": self.device.type,
            "data": self.inputs.mark(),
            "encoder": digest(json.dumps(shapes_of(self.encoder)).encode()),
        }

    def state(self) -> State:
        """The state that a checkpoint has."""
        tensors, numbers = self.run.state()
        tensors["relabellings"] = torch.tensor(self.rows, dtype=torch.float64, device="cpu")
        return tensors, {**numbers, "due": self.due, "changed": self.changed}

    def _restore(self, state: State) -> None:
        tensors, numbers = state
        self.run.restore(state)
        self.rows = [tuple(row) for row in tensors["relabellings"].tolist()]
        self.due, self.changed = int(numbers["due"]), float(numbers["changed"])

    def table(self) -> dict[str, np.ndarray]:
        """The relabellings by columns."""
        rows = np.array(self.rows, dtype=np.float64).reshape(-1, len(COLUMNS))
        table = dict(zip(COLUMNS, rows.T, strict=True))
        for name in ("seen", "head", "n_iter"):
            table[name] = table[name].astype(np.int64)
        table["converged"] = table["converged"].astype(bool)
        return table


def _row(seen: int, result: Relabelling) -> tuple[float, ...]:
    return (seen, result.head, result.n_iter, result.err, result.converged, result.changed)
