# SPDX-License-Identifier: Apache-2.0
"""A small DEC: data, encoders, augmentation, and the comparison of two runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clam_kernels import DEC

N, D, K = 120, 6, 4
RANDOM = np.random.default_rng(0)
Y = np.arange(N) % K
X = (3 * np.eye(D)[Y] + RANDOM.normal(size=(N, D))).astype(np.float32)
QUICK: dict[str, Any] = {
    "hidden": (16,), "n_components": 3, "pretrain_epochs": 20, "pretrain_learning_rate": 0.01,
    "n_epochs": 3, "batch_size": 32, "interval": 4, "n_init": 2, "random_state": 0, "tol": 0.0,
}  # fmt: skip


def noisy(batch: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
    return batch + 0.1 * noise


def dec(**rest: Any) -> DEC:
    return DEC(**{"n_clusters": K, **QUICK, **rest})


class Pair(nn.Module):
    """An autoencoder that is hard to resume: BatchNorm has buffers, and dropout draws from the
    global generator.
    """

    def __init__(self, features: int = D, size: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            first = (nn.Linear(features, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
            self.down = nn.Sequential(*first, nn.Linear(16, size))
            self.up = nn.Sequential(nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, features))

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x)

    def decode(self, codes: Tensor) -> Tensor:
        return self.up(codes)


def same(a: DEC, b: DEC) -> None:
    """Whether labels, weights, codes and history are equal bit for bit."""
    for name in ("labels_", "init_labels_", "cluster_centers_", "soft_counts_", "init_embedding_"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for one, other in ((a._network, b._network), (a.pretrained_, b.pretrained_)):
        left, right = one.state_dict(), other.state_dict()
        assert list(left) == list(right)
        for name in left:
            assert torch.equal(left[name], right[name]), name
    assert a.history_["pretraining"] == b.history_["pretraining"]
    np.testing.assert_array_equal(a._table, b._table)
    for name in ("n_steps_", "n_iter_", "stop_reason_", "inertia_", "code_scale_"):
        assert getattr(a, name) == getattr(b, name), name
