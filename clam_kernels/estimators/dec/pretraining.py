# SPDX-License-Identifier: Apache-2.0
"""Pretraining of a DEC: the autoencoder learns to reconstruct its rows, all layers together or
layer by layer with dropout. Equations: docs/dec.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._core import checks
from ..._core.warn import warn
from .networks import blocks_of
from .phases import MOMENTUM, Context, Phase
from .settings import DecSettings

# Probability of a 0 in the published layer-wise training.
DROPOUT = 0.2
# Steps over which the published momentum rises from 0.
RAMP = 1000
# The published rate is a tenth after each 20 000 of the 50 000 steps of a layer.
DROPS = 2.5
# A layer fails above this share of dead units, or below this share of explained variance.
MOST_DEAD, LEAST_EXPLAINED = 0.5, 0.05


def reconstruction_loss(rows: Tensor, target: Tensor) -> Tensor:
    """Mean square of the differences, over all entries: mean |x - y|^2 / features."""
    target = target.flatten(1)
    words = f"rows of {target.shape[1]} numbers from it"
    checks.expect(rows.shape == target.shape, "decoder", words, list(rows.shape))
    return functional.mse_loss(rows, target)


def _schedule(settings: DecSettings, factor: int) -> Callable[[float], float]:
    """The factor of the rate by the progress: the paper's steps, else 1."""
    if settings.recipe != "paper":
        return lambda progress: 1.0
    return lambda progress: 0.1 ** int(DROPS * factor * progress)


class _Pretraining(Phase):
    """A phase whose published momentum rises from 0 in the first steps."""

    def start_pretraining(self, parameters: Iterable[nn.Parameter], factor: int) -> None:
        """Set the run; `factor` is its length in published lengths of a layer."""
        settings = self.context.settings
        self.run = self.start_run(
            parameters,
            settings.pretrain_learning_rate,
            settings.pretrain_batch_size,
            settings.pretrain_length(len(self.context.inputs), factor),
            _schedule(settings, factor),
        )
        self.run.rate = "pretrain_learning_rate"

    def before_step(self) -> None:
        settings = self.context.settings
        if settings.recipe == "paper" and settings.optimizer == "sgd":
            for group in self.run.optimiser.param_groups:
                group["momentum"] = MOMENTUM * min(1.0, self.run.steps / RAMP)


class WholePretraining(_Pretraining):
    """Encoder and decoder train together on |decoder(encoder(x)) - x|^2, x an augmented row."""

    def __init__(self, context: Context, number: int) -> None:
        super().__init__(context, number)
        settings, network = context.settings, context.network
        assert network.decoder is not None
        layers = settings.pretrain == "sdae"
        self.name = "finetune" if layers else "pretrain"
        parameters = [*network.encoder.parameters(), *network.decoder.parameters()]
        # all layers together have twice the published steps of one
        self.start_pretraining(parameters, 2 if layers else 1)

    def loss(self, rows: Tensor) -> Tensor:
        x = self.context.draw(rows, self.run.generators["augment"])
        network = self.context.network
        return reconstruction_loss(network.decode(network.encode(x)), x)

    def end(self) -> None:
        context, network = self.context, self.context.network
        x = context.probe()
        network.eval()
        with torch.no_grad(), context.random.turn():
            rows = network.decode(network.encode(x))
        explained = explained_variance(rows, x)
        if explained < LEAST_EXPLAINED:
            rate = context.settings.pretrain_learning_rate
            warn(
                f"DEC: after pretraining the autoencoder explains {explained:.1%} of the variance"
                " of X, so its codes say little: raise pretrain_epochs, or choose another"
                f" pretrain_learning_rate than {rate:g}"
            )


class LayerPretraining(_Pretraining):
    """One layer of the encoder and its mirror image in the decoder, with dropout.

    h = block(drop(x)), y = mirror(drop(h)), loss |y - x|^2 / features; x are the outputs of the
    layers before. The rows themselves and the codes have no dropout, as in the published code.
    """

    def __init__(self, context: Context, number: int) -> None:
        super().__init__(context, number)
        network = context.network
        assert network.decoder is not None
        encoder = blocks_of(network.encoder, "encoder")
        decoder = blocks_of(network.decoder, "decoder")
        fits = len(encoder) == len(decoder)
        checks.expect(
            fits, "decoder", f"as many layers as the encoder {len(encoder)}", len(decoder)
        )
        self.name = f"layer {number + 1}"
        self.before = encoder[:number]
        self.block, self.mirror = encoder[number], decoder[-1 - number]
        self.has_input_dropout = number > 0
        self.has_code_dropout = number < len(encoder) - 1
        self.start_pretraining([*self.block.parameters(), *self.mirror.parameters()], 1)

    def loss(self, rows: Tensor) -> Tensor:
        x = self._below(self.context.draw(rows, self.run.generators["augment"]))
        dropped = functional.dropout(x, DROPOUT) if self.has_input_dropout else x
        h = self.block(dropped)
        h = functional.dropout(h, DROPOUT) if self.has_code_dropout else h
        return reconstruction_loss(self.mirror(h).flatten(1), x)

    def _below(self, x: Tensor) -> Tensor:
        """The outputs of the layers below, which do not train now."""
        with torch.no_grad():
            for block in self.before:
                x = block(x)
        return x

    def end(self) -> None:
        """ValueError if the layer learned nothing, which no later layer can repair."""
        context = self.context
        context.network.eval()
        with torch.no_grad():
            x = self._below(context.probe())
            h = self.block(x)
            explained = explained_variance(self.mirror(h).flatten(1), x)
        is_linear = isinstance(self.block[-1], nn.Linear)
        dead = 0 if is_linear else int((h == 0).all(0).sum())
        rate, number = context.settings.pretrain_learning_rate, self.number + 1
        words = f"a rate at which layer {number} learns"
        with_dead = f"{rate:g}, with which {dead} of its {h.shape[1]} units are 0 for all rows"
        checks.expect(dead <= MOST_DEAD * h.shape[1], "pretrain_learning_rate", words, with_dead)
        with_little = f"{rate:g}, with which it explains {explained:.1%} of the variance"
        is_enough = explained >= LEAST_EXPLAINED
        checks.expect(is_enough, "pretrain_learning_rate", words, with_little)


def explained_variance(rows: Tensor, target: Tensor) -> float:
    """1 - |rows - target|^2 / |target - mean|^2 over all entries; 1 for a target of no variance."""
    target = target.flatten(1).double()
    total = float((target - target.mean(0)).square().sum())
    return 1.0 - float((rows.double() - target).square().sum()) / total if total > 0 else 1.0


def dead_layers(context: Context) -> list[str]:
    """Names of the ReLU layers more than half of whose units are 0 for all rows of a probe."""
    dead: list[str] = []
    handles = []
    modules = dict(context.network.encoder.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.ReLU):

            def look(_: nn.Module, __: object, out: Tensor, name: str = name) -> None:
                units = out.flatten(2).movedim(1, -1) if out.ndim > 2 else out
                share = float((units == 0).flatten(0, -2).all(0).double().mean())
                if share > MOST_DEAD:
                    dead.append(name or "encoder")

            handles.append(module.register_forward_hook(look))
    try:
        x = context.probe()
        context.network.eval()
        with torch.no_grad(), context.random.turn():
            context.network.encode(x)
    finally:
        for handle in handles:
            handle.remove()
    return dead


def pretraining_phases(context: Context) -> list[Callable[[], Phase]]:
    """The phases of pretraining, made when the fit comes to them."""
    settings, network = context.settings, context.network
    if settings.pretrain == "none":
        return []
    layers = 0
    if settings.pretrain == "sdae":
        assert network.decoder is not None
        layers = len(blocks_of(network.encoder, "encoder"))
    phases: list[Callable[[], Phase]] = [
        functools.partial(LayerPretraining, context, number) for number in range(layers)
    ]
    return [*phases, functools.partial(WholePretraining, context, layers)]
