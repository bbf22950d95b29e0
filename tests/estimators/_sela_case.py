# SPDX-License-Identifier: Apache-2.0
"""A small SeLa: data, encoder, augmentation, and the comparison of two runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clam_kernels import SeLa

N, D, K, H = 100, 6, 4, 3
RANDOM = np.random.default_rng(0)
Y = np.arange(N) % K
X = (3 * np.eye(D)[Y] + RANDOM.normal(size=(N, D))).astype(np.float32)
QUICK = {"n_heads": H, "n_epochs": 4, "batch_size": 33, "n_relabels": 4, "max_iter": 4000}


def encoder() -> nn.Module:
    """An encoder that is hard to resume: BatchNorm has buffers, and dropout draws from the global
    generator.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = (nn.Linear(D, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        return nn.Sequential(*layers)


def noisy(batch: Tensor, generator: torch.Generator) -> Tensor:
    return batch + 0.3 * torch.randn(batch.shape, generator=generator, device=batch.device)


def sela(**rest: Any) -> SeLa:
    return SeLa(
        encoder(),
        **{"n_clusters": K, "augment": noisy, "random_state": 0, **QUICK, **rest},
    )


def same(a: SeLa, b: SeLa) -> None:
    """Whether labels, weights, potentials and history are equal bit for bit."""
    assert np.array_equal(np.asarray(a.labels_), np.asarray(b.labels_))
    for one, other in ((a.encoder_, b.encoder_), (a.heads_, b.heads_)):
        left, right = one.state_dict(), other.state_dict()
        assert list(left) == list(right)
        for name in left:
            assert torch.equal(left[name], right[name]), name
    assert a.history_["loss"] == b.history_["loss"]
    for name, column in a.history_["relabellings"].items():
        np.testing.assert_array_equal(column, b.history_["relabellings"][name])
    assert a.n_steps_ == b.n_steps_


KILL_STEPS = 60


def kill_case(path: str | None = None) -> SeLa:
    """A run of about a second with a checkpoint after each of its KILL_STEPS batches."""
    model = sela(n_epochs=12, n_relabels=8, batch_size=20)
    rest = {"checkpoint": path, "checkpoint_every": 1, "resume": True} if path else {}
    return model.fit(X, **rest)


def die_at(place: str, count: int) -> None:
    """From here on SIGKILL ends this process when it comes to a place for the `count`-th time:
    "batch" is a draw of an augmented batch, "written" a checkpoint that has no name yet, "renamed"
    a checkpoint that has its name. "nowhere" does not occur.
    """
    countdown = count

    def dies(call: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def run(*args: Any, **rest: Any) -> Any:
            nonlocal countdown
            countdown -= 1
            result = call(*args, **rest) if after or countdown else None
            if countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        run.__qualname__ = call.__qualname__  # an augmentation is known by it
        return run

    if place == "batch":
        globals()["noisy"] = dies(noisy, after=False)
    elif place == "written":
        os.fsync = dies(os.fsync, after=True)
    elif place == "renamed":
        os.replace = dies(os.replace, after=True)
