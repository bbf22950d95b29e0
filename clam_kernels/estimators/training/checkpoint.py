# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: its state as tensors and numbers in one safetensors file.

A write replaces the file at once. A read raises where settings or data differ from those of the
run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import serialize
from ..._core import checks
from .optimisers import Optimiser

State = tuple[dict[str, Tensor], dict[str, Any]]


class Checkpoint:
    """The checkpoint file of a run, with the settings of the run."""

    def __init__(
        self, path: str | PathLike[str], kind: str, settings: Mapping[str, Any], resume: bool
    ) -> None:
        self.path, self.kind, self.settings = Path(path), kind, dict(settings)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(2, "No such folder", str(self.path.parent))
        if self.path.exists() and not resume:
            raise FileExistsError(
                17, "checkpoint exists; resume=True continues it, or remove it", str(path)
            )
        for stray in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # of a killed run
            with contextlib.suppress(OSError):
                stray.unlink()

    def write(self, state: State) -> None:
        """Replace the file; try a second time after an error, as on a busy network drive."""
        tensors, numbers = state
        learned = {"state": json.dumps(numbers)}
        try:
            serialize.save(self.path, self.kind, self.settings, learned, tensors)
        except OSError:
            serialize.save(self.path, self.kind, self.settings, learned, tensors)

    def read(self) -> State | None:
        """The last state written; None where there is no file."""
        if not self.path.exists():
            return None
        settings, learned, tensors = serialize.load(self.path, self.kind)
        for name in sorted({*settings, *self.settings}):
            before, now = settings.get(name), json.loads(json.dumps(self.settings.get(name)))
            if before != now:
                raise ValueError(
                    f"checkpoint: {self.path} was written with {name}={before!r}, this fit has"
                    f" {name}={now!r}; give it the same settings and data, or remove the file"
                )
        with serialize.reading(self.path):
            numbers = json.loads(learned["state"])
            serialize.expect(isinstance(numbers, dict), "damaged metadata")
        return tensors, numbers


@dataclass
class CheckpointWriter:
    """The checkpoint of a fit, and the number of batches between two writes."""

    file: Checkpoint
    every: int


def check_checkpoint(checkpoint: Any, every: Any, resume: bool) -> None:
    """ValueError unless the arguments of a fit with a checkpoint fit together."""
    if every is not None:
        fits = checks.is_whole(every) and every >= 1
        checks.expect(fits, "checkpoint_every", "an int >= 1", repr(every))
    if checkpoint is None and (resume or every is not None):
        name = "resume" if resume else "checkpoint_every"
        raise ValueError(f"{name}: expected a checkpoint to go with it, got None")


def as_json(value: Any) -> Any:
    """A setting as JSON has it; a callable is its name."""
    value = value.item() if isinstance(value, np.generic) else value
    return name_of(value) if callable(value) else value


def name_of(function: Any) -> str | None:
    """The name of a callable: another process can compare nothing else."""
    if function is None:
        return None
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def shapes_of(module: nn.Module) -> list[list[Any]]:
    """Name and shape of every tensor of a module: what identifies its layers in a checkpoint."""
    return [[name, *t.shape] for name, t in of_module("encoder", module).items()]


def of_module(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and extra state by name; also buffers that are not persistent, as a
    forward may change them.
    """
    state = {**dict(module.named_buffers(remove_duplicate=False)), **module.state_dict()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"{prefix}: its state_dict has a {kind} as {name}; expected tensors")
    return {f"{prefix}.{name}": value for name, value in state.items()}


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Replace the state of a module."""
    saved = module.state_dict().keys()
    buffers = dict(module.named_buffers(remove_duplicate=False))
    parts = dict(module.named_modules(remove_duplicate=False))
    module.load_state_dict({name: t for name, t in tensors.items() if name in saved})
    for name in sorted((tensors.keys() | buffers.keys()) - saved):
        serialize.expect(name in tensors, f"no buffer {name}")
        owner, _, leaf = name.rpartition(".")
        owned = parts[owner]._buffers
        serialize.expect(leaf in owned, f"unknown buffer {name}")
        old, new = owned[leaf], tensors[name]
        if old is None or old.shape != new.shape or old.dtype != new.dtype:
            owned[leaf] = new.to(device if old is None else old.device)
        elif not torch.equal(old, new.to(old.device)):  # a constant may be a view of one entry
            old.copy_(new)  # in place, as modules may share it


def of_optimiser(optimiser: Optimiser) -> State:
    """The state of an optimiser: its tensors, and its numbers and groups."""
    packed = optimiser.state_dict()
    tensors, numbers = {}, {}
    for index, entries in packed["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    try:
        json.dumps([numbers, packed["param_groups"]])
    except TypeError as error:
        raise TypeError(
            f"optimizer: its state cannot be written to a checkpoint ({error})"
        ) from None
    return tensors, {"numbers": numbers, "groups": packed["param_groups"]}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def restore_optimiser(optimiser: Optimiser, state: State) -> None:
    """Replace the state of an optimiser."""
    tensors, saved = state
    entries: dict[int, dict[str, Any]] = {}
    for key, value in [*under("optimizer", tensors).items(), *saved["numbers"].items()]:
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    groups = saved["groups"]
    for group, fresh in zip(groups, optimiser.param_groups, strict=True):
        for name, value in group.items():  # JSON has no tuples
            if isinstance(fresh.get(name), tuple):
                group[name] = tuple(value)
    optimiser.load_state_dict({"state": entries, "param_groups": groups})
