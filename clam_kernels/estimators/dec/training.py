# SPDX-License-Identifier: Apache-2.0
"""A fit of a DEC: its network, and its phases one after the other, with their checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from numbers import Integral
from os import PathLike
from typing import Any

import torch

from ... import serialize
from ..._core import checks
from ..common.progress import ProgressBar
from ..training.checkpoint import Checkpoint, CheckpointWriter, State, as_json, name_of, shapes_of
from ..training.inputs import Inputs, digest
from ..training.trainer import RunGenerators
from .clustering import Clustering
from .networks import DecNetwork, EncoderDecoder, batch_dtype, default_pair, pair_of, probe
from .phases import Context, Phase
from .pretraining import pretraining_phases
from .settings import DecSettings

# Parameters that must be equal in a checkpoint and in the fit that resumes from it.
SHARED = (
    "n_clusters", "hidden", "n_components", "variant", "target", "pretrain", "recipe", "z_scale",
    "alpha", "gamma", "pretrain_epochs", "pretrain_steps", "pretrain_batch_size",
    "pretrain_learning_rate", "n_epochs", "batch_size", "learning_rate", "optimizer", "interval",
    "tol", "regroup", "n_init",
)  # fmt: skip
KIND = "DEC checkpoint"
# Clustering runs at most so often.
ROUNDS = 4


class DecTraining:
    """The network and the phases of one fit."""

    def __init__(
        self,
        settings: DecSettings,
        inputs: Inputs,
        features: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.settings = settings
        random = RunGenerators(seed, device)
        pair = _pair(settings, features, device, seed)
        dtype = batch_dtype(pair)
        with random.turn():
            rows = torch.arange(min(2, len(inputs)), dtype=torch.int64, device="cpu")
            like = probe(pair, inputs.take(rows, device, dtype))
        network = DecNetwork(pair, settings.n_clusters, like)
        self.context = Context(settings, inputs, network, device, dtype, seed, random)
        self.makers: list[Callable[[], Phase]] = pretraining_phases(self.context)
        self.clustering: Clustering | None = None
        self.first = len(self.makers)  # number of the first phase of clustering
        self.makers.append(self._make_clustering)
        self.at = 0  # number of the phase
        self.phase: Phase | None = None  # the phase that a checkpoint restored
        self.losses: dict[str, list[float]] = {}  # mean of each epoch of each finished phase
        self.checkpoint: CheckpointWriter | None = None

    def _make_clustering(self) -> Clustering:
        return Clustering(self.context, self.at)

    # ---- the fit ---------------------------------------------------------------------------------

    def go(self) -> None:
        """Run all phases from the current state to the end."""
        while self.at < len(self.makers):
            phase, self.phase = self.phase, None
            is_done = phase is not None and phase.run.is_over
            if phase is None:
                phase = self.makers[self.at]()
                phase.begin()
            self._run(phase)
            if not is_done:  # else the checkpoint is that of the end of the phase
                phase.end()
            self.losses[phase.name] = list(phase.run.losses)
            if self.checkpoint is not None and not is_done:
                self.checkpoint.file.write(self.state(phase))
            self.at += 1
            if isinstance(phase, Clustering):
                self._add_round(phase)
        self.context.network.eval()

    def _add_round(self, phase: Clustering) -> None:
        """Clustering begins again, from the pretrained weights, if its clusters were regrouped."""
        self.clustering = phase
        labels, number = phase.next_labels, self.at
        if labels is not None and number - self.first < ROUNDS:
            self.makers.append(lambda: Clustering(self.context, number, phase, labels))

    def _run(self, phase: Phase) -> None:
        run, context, settings = phase.run, self.context, self.settings
        epochs = run.length.epochs
        with ProgressBar(settings.verbose, f"DEC {phase.name}", epochs, done=run.epoch) as bar:
            for rows in run.batches():
                phase.before_step()
                if run.is_stopped:
                    continue
                context.network.train()
                with context.random.turn():
                    run.step(phase.loss(rows), rows)
                if run.batch == 0:
                    figures = phase.figures()
                    shown = {"loss": f"{figures['loss']:.4f}"}
                    if "changed" in figures:
                        shown["changed"] = f"{figures['changed']:.4f}"
                    bar.advance(**shown)
                    run.is_stopped = settings.callbacks.iteration(figures)
                # after the callbacks, whose result is part of the state
                checkpoint = self.checkpoint
                if checkpoint and not run.is_over and run.steps % checkpoint.every == 0:
                    checkpoint.file.write(self.state(phase))

    # ---- checkpoint ------------------------------------------------------------------------------

    def use_checkpoint(self, path: str | PathLike[str], every: int | None, resume: bool) -> None:
        """Write checkpoints to a file every so many batches; `resume` restores its state first."""
        self.checkpoint = CheckpointWriter(
            Checkpoint(path, KIND, self.shared_settings(), resume), self._every(every)
        )
        state = self.checkpoint.file.read() if resume else None
        if state is None:
            return
        with serialize.reading(path):
            at = int(state[1]["phase"])
            most = self.first + (ROUNDS if self.settings.regroup else 1)
            serialize.expect(0 <= at < most, "no such phase in this fit")
            losses = state[1]["phase_losses"].items()
            self.losses = {str(name): [float(x) for x in column] for name, column in losses}
        self.at = at
        self.makers += [self._make_clustering] * (at + 1 - len(self.makers))
        self.phase = self.makers[at]()
        with serialize.reading(path):
            self.phase.restore(state)

    def _every(self, every: int | None) -> int:
        """Batches between two writes; those of an epoch of clustering by default."""
        if every is not None:
            return int(every)
        return max(1, -(-len(self.context.inputs) // self.settings.batch_size))

    def shared_settings(self) -> dict[str, Any]:
        """What must be equal in a checkpoint and in the fit that resumes from it."""
        settings, context = self.settings, self.context
        seed = settings.random_state
        modules = (context.network.encoder, context.network.decoder)
        layers = [None if module is None else shapes_of(module) for module in modules]
        return {
            **{name: as_json(_plain(getattr(settings, name))) for name in SHARED},
            "augment": name_of(settings.augment),
            "random_state": int(seed) if isinstance(seed, Integral) else None,
            "device": context.device.type,
            "data": context.inputs.mark(),
            "encoder": digest(json.dumps(layers).encode()),
        }

    def state(self, phase: Phase) -> State:
        """The state that a checkpoint has."""
        tensors, numbers = phase.state()
        return tensors, {**numbers, "phase": self.at, "phase_losses": self.losses}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _pair(settings: DecSettings, features: int, device: torch.device, seed: int) -> EncoderDecoder:
    """The encoder and the decoder of a fit: copies of the user's, or the default layers."""
    if settings.encoder is None:
        generator = torch.Generator().manual_seed(seed)
        is_paper = settings.pretrain == "sdae" and settings.recipe == "paper"
        sizes = settings.hidden, settings.n_components
        return default_pair(features, *sizes, device, generator, is_paper)
    pair = pair_of(settings.encoder, settings.decoder).to(device)
    if pair.decoder is None:
        words = "a module to go with encoder (or an encoder with methods encode and decode)"
        for name, is_needed in (
            (f"pretrain='{settings.pretrain}'", settings.pretrain != "none"),
            ("variant='idec'", settings.variant == "idec"),
        ):
            checks.expect(not is_needed, "decoder", f"{words}, which {name} needs", None)
    return pair
