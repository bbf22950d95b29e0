# SPDX-License-Identifier: Apache-2.0
"""The run of a SeLa: steps on the current labels, relabelling when it is due."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import serialize
from ..._core import checks
from ...nn.self_labeller import Relabelling, SelfLabeller
from ..common import callbacks
from ..training.checkpoint import Checkpoint, State, of_module
from ..training.inputs import Inputs, digest
from ..training.optimisers import SGD, Optimiser
from ..training.trainer import (
    SCHEDULES,
    Bar,
    OwnRandom,
    Plan,
    Run,
    augmented,
    batches_of,
    dtype_of,
    encoded,
)

# What arguments that are None stand for.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "n_epochs": 40,
        "batch_size": 128,
        "schedule": "cosine",
        "weight_decay": 1e-4,
        "n_relabels": 12,
        "n_augment": 4,
        "tol": 1e-3,
        "max_iter": 400,
    },
    "paper": {
        "n_epochs": 400,
        "batch_size": 256,
        "schedule": "steps",
        "weight_decay": 1e-5,
        "n_relabels": 100,
        "n_augment": 1,
        "tol": None,  # a tenth of a row: 0.1 / N
        "max_iter": 2000,
    },
}
# Least tolerance that float32 potentials can meet.
LEAST_TOL = 1e-6
# Settings that a checkpoint must share with the fit that goes on from it, beside those of a recipe.
SHARED = ("n_clusters", "n_heads", "lam", "learning_rate", "momentum", "strict")
COLUMNS = ("seen", "head", "n_iter", "err", "converged", "changed")
KIND = "SeLa checkpoint"


def resolved(sela: Any, name: str) -> Any:
    """A parameter of a SeLa, by its recipe where it is None."""
    given = getattr(sela, name)
    return RECIPES[sela.recipe][name] if given is None else given


@dataclass
class Kept:
    """A checkpoint, and how many batches lie between two writes."""

    file: Checkpoint
    every: int


class Training:
    """Everything of one fit."""

    def __init__(self, sela: Any, inputs: Inputs, device: torch.device, seed: int) -> None:
        self.sela, self.inputs, self.device, self.seed = sela, inputs, device, seed
        self.random = OwnRandom(seed, device)
        self.encoder: nn.Module = copy.deepcopy(sela.encoder).to(device)
        self.dtype = dtype_of(self.encoder)
        tol = resolved(sela, "tol")
        self.tol = max(0.1 / len(inputs), LEAST_TOL) if tol is None else float(tol)
        with self.random.turn():
            self.heads = self._heads()
            optimiser = self._optimiser()
        epochs = resolved(sela, "n_epochs")
        schedule = resolved(sela, "schedule")
        schedule = SCHEDULES.get(schedule, schedule) if isinstance(schedule, str) else schedule
        plan = Plan(len(inputs), resolved(sela, "batch_size"), epochs, schedule)
        modules = {"encoder": self.encoder, "heads": self.heads}
        self.run = Run(modules, optimiser, plan, seed, self.random, sela.writer, "sela")
        times = np.linspace(0.0, 1.0, resolved(sela, "n_relabels")) ** 2
        self.times = (epochs + 1.01) * len(inputs) * times
        self.due = 0  # index of the next of these times
        self.rows: list[tuple[float, ...]] = []
        self.changed = 1.0
        self.kept: Kept | None = None

    def _heads(self) -> SelfLabeller:
        """New heads for what the encoder makes of the first rows."""
        sela, count = self.sela, len(self.inputs)
        self.encoder.eval()
        with torch.no_grad():
            first = torch.arange(min(2, count), dtype=torch.int64, device="cpu")
            probe = self.inputs.take(first, self.device, self.dtype)
            features = encoded(self.encoder, probe)
        wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        masses = {
            name: None if mass is None else torch.as_tensor(mass, **wide)
            for name, mass in (("col", sela.col_marginal), ("row", sela.row_marginal))
        }
        return SelfLabeller(
            features.shape[1], int(sela.n_clusters), count, int(sela.n_heads),
            lam=float(sela.lam), tol=self.tol, max_iter=int(resolved(sela, "max_iter")),
            col_marginal=masses["col"], row_marginal=masses["row"], strict=bool(sela.strict),
            generator=torch.Generator().manual_seed(self.seed + 2), device=self.device,
            dtype=features.dtype,
        )  # fmt: skip

    def _optimiser(self) -> Optimiser:
        both = [*self.encoder.parameters(), *self.heads.parameters()]
        learning = [p for p in both if p.requires_grad]
        sela = self.sela
        if sela.optimizer is None:
            decay = resolved(sela, "weight_decay")
            return SGD(learning, float(sela.learning_rate), float(sela.momentum), float(decay))
        return _stepping(sela.optimizer(learning))

    # ---- the run ---------------------------------------------------------------------------------

    def go(self) -> None:
        """From wherever the run stands to its end."""
        run = self.run
        if run.over and self.due == len(self.times):
            return  # it was at its end when it was written: the file stays as it is
        with Bar(self.sela.verbose, "SeLa", run) as bar:
            for rows in run.batches():
                if self.due < len(self.times) and self.times[self.due] <= run.seen:
                    self.relabel()
                self._step(rows)
                if run.batch == 0:
                    bar.epoch(loss=run.losses[-1], changed=self.changed)
                    run.stopped = self._told()
                # only now: what the callbacks answer is part of the state
                kept = self.kept
                if kept is not None and (run.stopped or run.steps % kept.every == 0):
                    kept.file.write(self.state())
            if self.due < len(self.times):
                self.relabel()
        if self.kept is not None:
            self.kept.file.write(self.state())

    def _step(self, rows: Tensor) -> None:
        self.encoder.train()
        with self.random.turn():
            loss = self.heads.loss(self._draw(rows), rows.to(self.device))
            self.run.step(loss, rows)

    def _draw(self, rows: Tensor) -> Tensor:
        """Features of an augmented draw of some rows."""
        batch = self.inputs.take(rows, self.device, self.dtype)
        generator = self.run.generators["augment"]
        return encoded(self.encoder, augmented(self.sela.augment, batch, generator))

    def _told(self) -> bool:
        """Callbacks hear of an epoch; whether one asks to stop."""
        run = self.run
        info = {"epoch": run.epoch - 1, "loss": run.losses[-1], "changed": self.changed}
        listeners = callbacks.each(self.sela.callbacks)
        return callbacks.call(listeners, "on_iteration", self.sela, info)

    def relabel(self) -> None:
        """New labels of every head, and on to the next time that is not over yet."""
        self.run.look()
        features = self._features()
        done = [self.heads.relabel_features(features, h) for h in range(self.heads.n_heads)]
        self.rows += [_row(self.run.seen, one) for one in done]
        self.changed = float(np.mean([one.changed for one in done]))
        self.run.scalar("changed", self.changed)
        self.run.scalar("err", max(one.err for one in done))
        self.run.scalar("n_iter", float(np.mean([one.n_iter for one in done])))
        last = len(self.times) - 1
        while self.due <= last and (self.times[self.due] <= self.run.seen or self.run.over):
            self.due += 1

    @torch.no_grad()
    def _features(self) -> Tensor:
        """Features of all rows, mean over augmented draws: heads are linear, so that is all that
        the mean of their log-probabilities needs. In training mode, and so in random batches: rows
        in their order may come class by class, which the statistics of BatchNorm would tell.
        """
        self.encoder.train()
        draws = 1 if self.sela.augment is None else resolved(self.sela, "n_augment")
        size = self.run.plan.batch_size
        weight = self.heads.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros(len(self.inputs), weight.shape[2], dtype=wide, device=self.device)
        for _ in range(draws):
            order = self.run.permutation()
            for rows in batches_of(order, size):
                with self.random.turn():
                    total[rows.to(self.device)] += self._draw(rows)
        self.inputs.known = True  # each row has been taken
        return total.div_(draws).to(weight.dtype)

    # ---- checkpoint ------------------------------------------------------------------------------

    def keep(self, path: str | PathLike[str], every: int | None, resume: bool) -> None:
        """Write the run to a file as it goes on, or go on from what is there."""
        every = self.run.plan.steps_per_epoch if every is None else int(every)
        file = Checkpoint(path, KIND, self.settings(), resume)
        self.kept = Kept(file, every)
        state = file.read() if resume else None
        if state is not None:
            with serialize.reading(path):
                self._restore(state)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must share with the fit that goes on from it."""
        sela = self.sela
        shared = {name: _plain(getattr(sela, name)) for name in SHARED}
        shared |= {name: _plain(resolved(sela, name)) for name in RECIPES[sela.recipe]}
        shared["tol"] = self.tol
        shared |= {name: _called(getattr(sela, name)) for name in ("augment", "optimizer")}
        for name in ("col_marginal", "row_marginal"):
            mass = getattr(self.heads, name)
            shared[name] = None if mass is None else digest(mass.cpu().numpy().tobytes())
        layers = [[name, *t.shape] for name, t in of_module("encoder", self.encoder).items()]
        seed = sela.random_state
        return {
            **shared,
            "random_state": int(seed) if isinstance(seed, Integral) else None,
            "device": self.device.type,
            "data": self.inputs.mark(),
            "encoder": digest(json.dumps(layers).encode()),
        }

    def state(self) -> State:
        """All that changes, as a checkpoint holds it."""
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
        found = dict(zip(COLUMNS, rows.T, strict=True))
        for name in ("seen", "head", "n_iter"):
            found[name] = found[name].astype(np.int64)
        found["converged"] = found["converged"].astype(bool)
        return found


def _stepping(found: Any) -> torch.optim.Optimizer:
    """What a function made for an optimiser, if it is one that steps on the gradients it finds."""
    kind = type(found).__name__
    if not isinstance(found, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected it to return a torch Optimizer, got {kind}")
    try:
        inspect.signature(found.step).bind()
    except TypeError:
        words = "it to return an Optimizer whose step needs no closure"
        raise TypeError(checks.wording("optimizer", words, kind)) from None
    return found


def _row(seen: int, one: Relabelling) -> tuple[float, ...]:
    return (seen, one.head, one.n_iter, one.err, one.converged, one.changed)


def _plain(value: Any) -> Any:
    """A setting as JSON; a callable by its name."""
    value = value.item() if isinstance(value, np.generic) else value
    return _called(value) if callable(value) else value


def _called(function: Any) -> str | None:
    """A callable's name, which is all that one process can know of another's."""
    if function is None:
        return None
    return str(getattr(function, "__qualname__", type(function).__qualname__))
