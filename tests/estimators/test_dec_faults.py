# SPDX-License-Identifier: Apache-2.0
"""Faults that are common in public code of deep embedded clustering, each with a test that catches
it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from _dec_case import D, K, N, Pair, X, dec, noisy
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from clam_kernels import DEC, KMeans, dec_target
from clam_kernels.estimators.dec import clustering
from clam_kernels.testing import peak_bytes

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


class Calls:
    """The calls of `dec_loss` in a fit: rows of the target, the target, and the loss."""

    def __init__(self) -> None:
        self.index: list[Tensor] = []
        self.targets: list[Any] = []
        self.losses: list[float] = []
        self.sizes: list[int] = []

    def __call__(self, z: Tensor, mu: Tensor, target: Any, index: Any, **rest: Any) -> Tensor:
        loss = PLAIN(z, mu, target, index, **rest)
        self.index.append(index)
        self.targets.append(target)
        self.losses.append(float(loss.detach()))
        self.sizes.append(len(z))
        return loss


PLAIN = clustering.dec_loss


@pytest.fixture
def calls(monkeypatch) -> Calls:
    spy = Calls()
    monkeypatch.setattr(clustering, "dec_loss", spy)
    return spy


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [(30, [30] * 4), (40, [40] * 3), (120, [120]),
                                                (7, [7] * 16 + [8]), (500, [120])])  # fmt: skip
def test_each_epoch_has_every_row_once_in_a_new_order(calls, size, expected):
    """A public implementation trained on an empty batch where N is a multiple of the batch size,
    and on the same rows together in every epoch.
    """
    model = dec(batch_size=size, n_epochs=2).fit(X)
    assert calls.sizes == expected * 2
    assert model.n_steps_ == 2 * len(expected)
    first, second = (torch.cat(calls.index[i * len(expected) :][: len(expected)]) for i in (0, 1))
    for order in (first, second):
        assert torch.equal(order.sort().values, torch.arange(N))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(N))


# ---- the target ----------------------------------------------------------------------------------


def test_the_target_is_frozen_between_refreshes(calls):
    model = dec(interval=3, n_epochs=3).fit(X)
    assert len(calls.targets) == 12
    for i, target in enumerate(calls.targets):
        assert target is calls.targets[i - i % 3]
    assert len({id(target) for target in calls.targets}) == 4
    moved = (calls.targets[0].shares() - calls.targets[3].shares()).abs().max()
    assert moved > 1e-4
    assert model.history_["step"].tolist() == [0, 3, 6, 9, 12]


def test_the_target_is_that_of_clean_rows(calls):
    """q sees augmented rows; p is computed from clean ones in eval mode."""
    model = dec(encoder=Pair(), augment=noisy, n_epochs=1).fit(X)
    start = torch.from_numpy(model.init_embedding_)
    target = dec_target(start, calls.targets[0].mu0)
    torch.testing.assert_close(calls.targets[0].shares(), target.shares())


@pytest.mark.parametrize("target", ["minibatch", "self"])
def test_other_targets_follow_the_batch(calls, target):
    model = dec(target=target, n_epochs=1).fit(X)
    assert all(index is None for index in calls.index)
    assert (calls.targets[0] is None) == (target == "minibatch")
    if target == "self":
        counts = calls.targets[0].log_counts.exp()
        assert float(counts.sum()) == pytest.approx(N)
        assert calls.targets[0].z0 is calls.targets[0].p is None
    assert np.isfinite(model.cluster_centers_).all()


def test_the_three_targets_have_the_same_first_step(calls):
    """On one batch of all rows without augmentation, all of them are the same."""
    for target in ("frozen", "minibatch", "self"):
        dec(target=target, n_epochs=1, batch_size=N).fit(X)
    np.testing.assert_allclose(calls.losses, calls.losses[0], rtol=1e-4)


# ---- the loss ------------------------------------------------------------------------------------


def _kl(z: np.ndarray, mu: np.ndarray) -> float:
    """sum_j p_ij log(p_ij / q_ij), mean over the rows, in float64."""
    t = 1.0 / (1.0 + ((z[:, None].astype(np.float64) - mu) ** 2).sum(-1))
    q = t / t.sum(1, keepdims=True)
    p = q**2 / q.sum(0)
    p /= p.sum(1, keepdims=True)
    return float((p * np.log(p / q)).sum(1).mean())


def test_the_kl_is_a_mean_over_rows(calls):
    """Not over rows and clusters, by which gamma would be gamma / K, and no cross entropy."""
    model = dec(n_epochs=1, batch_size=N, learning_rate=1e-12).fit(X)
    expected = _kl(model.init_embedding_, model.cluster_centers_)
    assert model.history_["loss"][-1] == pytest.approx(expected, rel=1e-4)
    twice = dec(n_epochs=1, batch_size=2 * N, learning_rate=1e-12, encoder=model.pretrained_,
                pretrain="none", z_scale=model.code_scale_).fit(np.concatenate([X, X]))  # fmt: skip
    assert twice.history_["loss"][-1] == pytest.approx(expected, rel=1e-3)


def test_the_terms_of_idec(calls):
    """reconstruction + gamma KL, with each term in the history."""
    settings = {"variant": "idec", "n_epochs": 1, "batch_size": N, "learning_rate": 1e-12}
    scalars: dict[str, float] = {}

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            scalars[tag] = value

    model = dec(**settings, gamma=0.3, writer=Writer()).fit(X)
    x = torch.from_numpy(X / np.abs(X).max())
    rows = model.decoder_(model.encoder_(x))
    mean_square = float((rows - x).square().mean().detach())
    assert model.history_["reconstruction"][-1] == pytest.approx(mean_square, rel=1e-4)
    kl = _kl(model.init_embedding_, model.cluster_centers_)
    assert scalars["dec/cluster/loss"] == pytest.approx(mean_square + 0.3 * kl, rel=1e-3)


def test_gamma_0_moves_no_centroid_and_dec_no_decoder():
    model = dec(variant="idec", gamma=0.0).fit(X)
    assert not _equal(model.decoder_, model.pretrained_.decoder)
    plain = dec().fit(X)
    assert _equal(plain.decoder_, plain.pretrained_.decoder)
    assert not _equal(plain.encoder_, plain.pretrained_.encoder)
    at_start = dec(n_epochs=0).fit(X).cluster_centers_
    np.testing.assert_array_equal(model.cluster_centers_, at_start)
    assert not np.allclose(plain.cluster_centers_, at_start, atol=1e-4), "centroids train"


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---- the start -----------------------------------------------------------------------------------


def test_the_first_labels_are_those_of_k_means():
    """In the order of its centroids, so that the first share of changed labels is 0."""
    model = dec().fit(X)
    centers = dec(n_epochs=0).fit(X).cluster_centers_
    nearest = KMeans(K, init=centers, n_init=1, max_iter=1).fit(model.init_embedding_)
    np.testing.assert_array_equal(model.init_labels_, nearest.labels_)
    assert model.history_["changed"][0] == 0.0
    assert model.history_["step"][0] == 0


def test_the_scale_of_the_codes():
    """q has a length of its own: with small codes it is uniform, and clusters empty."""
    model = dec(n_epochs=0).fit(X)
    assert model.inertia_ / N == pytest.approx(4.0, rel=1e-4)
    assert model.code_scale_ != 1.0
    raw = dec(n_epochs=0, z_scale=1.0).fit(X)
    assert raw.code_scale_ == 1.0
    np.testing.assert_allclose(raw.transform(X) * model.code_scale_, model.transform(X), rtol=1e-5)
    for one in (model, raw):  # the decoder gets codes that are not scaled
        rows = one.decoder_(torch.from_numpy(one.transform(X) / one.code_scale_)).detach()
        loss = float((rows - torch.from_numpy(X / np.abs(X).max())).square().mean())
        assert loss < 0.5 * (X / np.abs(X).max()).var()


def test_a_uniform_start_warns():
    with pytest.warns(UserWarning, match=r"the mean largest q is 0\.2.*, nearly 1/K = 0\.25, so"):
        dec(z_scale=1e-3, n_epochs=1).fit(X)


# ---- the stop rule -------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "steps"), [(1, 5), (2, 6), (3, 9), (4, 8), (8, 16)])
def test_two_checks_with_old_labels_end_the_run(interval, steps):
    """An epoch has 4 steps; every check passes. The first check with labels that are at least an
    epoch and an interval old comes at the first refresh from step max(4, interval) on.
    """
    model = dec(tol=1.0, interval=interval, n_epochs=9, learning_rate=1e-9).fit(X)
    assert (model.stop_reason_, model.n_steps_) == ("tol", steps)
    assert model.converged_
    assert model.history_["step"].tolist() == list(range(0, steps + 1, interval))


def test_a_run_that_changes_labels_does_not_stop_early():
    """With a refresh at every step few labels change from one to the next, whatever the state."""
    model = dec(interval=1, n_epochs=6, learning_rate=0.01, tol=1e-3).fit(X)
    changed = model.history_["changed"]
    assert changed[0] == 0.0
    if model.converged_:
        assert (changed[-2:] < 1e-3).all()
    assert model.n_steps_ > 5


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:DEC. ")
def test_no_array_has_a_number_for_each_row_and_cluster():
    """The code of the seed of this method has several such arrays at once."""
    x = np.random.default_rng(0).normal(size=(8000, D)).astype(np.float32)
    settings = {"n_epochs": 1, "n_init": 1, "batch_size": 500, "random_state": 0}
    encoder = nn.Linear(D, 2)
    peak = peak_bytes(lambda: DEC(1000, encoder, pretrain="none", **settings).fit(x))
    assert peak < 8e6, "8000 x 1000 float32 numbers are 32 MB"


# ---- layers that die -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (5, r"layer 1 learns, got 5, with which 15 of its 16 units are 0 for all rows"),
        (1e-9, r"layer 1 learns, got 1e-09, with which it explains .*% of the variance"),
    ],
)
def test_a_layer_of_sdae_that_learned_nothing_raises(rate, text):
    """A constant output has a small loss, and no later layer can repair it."""
    model = dec(pretrain="sdae", optimizer="sgd", pretrain_learning_rate=rate)
    with pytest.raises(
        ValueError, match=f"pretrain_learning_rate: expected a rate at which {text}"
    ):
        model.fit(np.abs(X))


def test_a_loss_that_overflows_names_its_rate():
    with pytest.raises(FloatingPointError, match=r"got inf .* lower pretrain_learning_rate"):
        dec(optimizer="sgd", pretrain_learning_rate=1e4).fit(X)
    with pytest.raises(FloatingPointError, match=r"lower learning_rate|or learning_rate"):
        dec(variant="idec", learning_rate=1e9, optimizer="sgd").fit(X)


def test_an_autoencoder_that_learned_nothing_warns():
    with pytest.warns(UserWarning, match=r"explains -?\d+\.\d% of the variance of X, so its codes"):
        dec(pretrain_learning_rate=1e-9, n_epochs=0).fit(X)


class Dead(nn.Module):
    """Codes with noise beside a ReLU layer all of whose units are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Linear(D, 8), nn.ReLU()
        nn.init.constant_(self.first.weight, 0.0)
        nn.init.constant_(self.first.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + self.relu(self.first(x)).sum(1, keepdim=True)


def test_a_dead_layer_of_an_own_encoder_warns():
    with pytest.warns(UserWarning, match="the units of layer relu of the encoder are 0 for all"):
        dec(encoder=Dead(), pretrain="none", n_epochs=0).fit(X)


# ---- other warnings ------------------------------------------------------------------------------


def test_a_cluster_that_empties_warns():
    """Centroids that coincide get no rows: labels are of the lowest index."""
    x = np.repeat(X[:4], 30, axis=0)
    with pytest.warns(ConvergenceWarning, match="4 of 6 clusters have rows at the end"):
        dec(n_clusters=6, n_epochs=1).fit(x)


def test_labels_that_still_change_warn():
    noise = np.random.default_rng(0).normal(size=(200, 6))
    with pytest.warns(ConvergenceWarning, match="% of the labels changed in the last epoch: raise"):
        dec(n_epochs=1, learning_rate=0.1).fit(noise)


def test_bad_codes_are_named():
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(len(x))[:, None] == 3, math.nan, x)

    text = "encoder: expected finite codes, got NaN or infinity for row 3"
    with pytest.raises(FloatingPointError, match=text):
        dec(encoder=Bad(), pretrain="none").fit(X)


def test_empty_clusters_have_a_warning_of_their_own():
    """The rate is so high that the codes collapse."""
    with pytest.warns(ConvergenceWarning, match="of 4 clusters have rows at the end"):
        model = dec(learning_rate=30.0, regroup=False).fit(X)
    assert len(np.unique(model.labels_)) < K
