# SPDX-License-Identifier: Apache-2.0
"""DEC's runs repeat; after Ctrl-C in any phase they resume to the same result; bad checkpoints are
refused.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _dec_case import K, Pair, X, dec, noisy, same
from torch import Tensor, nn

from clam_kernels import DEC, serialize
from clam_kernels.exceptions import ModelFileError

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
PRETRAIN = 20 * 2  # steps: epochs of 2 batches
CLUSTER = 3 * 4


class Interrupting:
    """`noisy` that raises KeyboardInterrupt at one of its calls."""

    __qualname__ = noisy.__qualname__

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return noisy(batch, generator)


@pytest.fixture(scope="module")
def model() -> DEC:
    return dec(augment=noisy).fit(X)


def test_a_seed_repeats_and_no_global_generator_moves(model):
    legacy = np.random.get_state
    states = torch.get_rng_state(), legacy()[1].copy(), random.getstate()
    same(model, dec(augment=noisy).fit(X))
    free = dec(augment=noisy, random_state=None).fit(X)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(legacy()[1], states[1])
    assert random.getstate() == states[2]
    torch.manual_seed(123)
    same(model, dec(augment=noisy).fit(X))
    assert not np.array_equal(free.cluster_centers_, model.cluster_centers_)


def test_fits_in_threads_repeat():
    """Dropout draws from torch's global generator, which all threads share."""
    alone = dec(encoder=Pair()).fit(X)
    models = [dec(encoder=Pair()) for _ in range(3)]  # a Pair draws its weights: not in a thread
    with ThreadPoolExecutor(2) as pool:
        for one in pool.map(lambda model: model.fit(X), models):
            same(alone, one)


@pytest.mark.parametrize("at", [3, PRETRAIN + 5])
def test_ctrl_c_leaves_the_object_as_it_was(model, at):
    fresh = dec(augment=Interrupting(at))
    before = dict(fresh.__dict__)
    with pytest.raises(KeyboardInterrupt):
        fresh.fit(X)
    assert fresh.__dict__ == before
    fitted = dec(augment=noisy).fit(X)
    fitted.augment = Interrupting(at)
    before = dict(fitted.__dict__)
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(X[:100])
    assert fitted.__dict__ == before
    np.testing.assert_array_equal(fitted.labels_, model.labels_)


# in pretraining, at its end, at the first step of clustering, before and after refreshes
@pytest.mark.parametrize(("at", "every"), [(0, 1), (1, 1), (17, 4), (PRETRAIN - 1, 1),
                                           (PRETRAIN, None), (PRETRAIN + 1, 1),
                                           (PRETRAIN + 5, 1), (PRETRAIN + 6, 1),
                                           (PRETRAIN + 7, 2), (PRETRAIN + 11, 1)])  # fmt: skip
def test_interrupted_and_resumed_is_uninterrupted(model, tmp_path, at, every):
    rest = {"checkpoint": tmp_path / "run", "checkpoint_every": every}
    with pytest.raises(KeyboardInterrupt):
        dec(augment=Interrupting(at)).fit(X, **rest)
    torch.manual_seed(at)
    same(model, dec(augment=Interrupting(1000)).fit(X, resume=True, **rest))
    content = (tmp_path / "run").read_bytes()
    same(model, dec(augment=Interrupting(0)).fit(X, resume=True, **rest))
    assert (tmp_path / "run").read_bytes() == content, "a finished run is not written again"


CASES: dict[str, dict[str, Any]] = {
    "idec": {"variant": "idec"},
    "self": {"target": "self"},
    "minibatch": {"target": "minibatch"},
    "short interval": {"interval": 1},
    "many clusters, which need the rows": {"n_clusters": 9, "interval": 3},
    "sdae": {"pretrain": "sdae", "hidden": (16, 12), "pretrain_epochs": 60},
    "paper": {"recipe": "paper", "pretrain": "ae", "pretrain_learning_rate": 0.05},
    "own": {"encoder": Pair(), "variant": "idec"},
    "optimizer": {"optimizer": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True)},
}


@pytest.mark.filterwarnings("ignore:DEC. ")
@pytest.mark.parametrize("case", CASES)
def test_all_variants_resume(tmp_path, case):
    settings = CASES[case]
    calls: list[int] = []

    def counting(batch: Tensor, generator: torch.Generator) -> Tensor:
        calls.append(len(batch))
        return noisy(batch, generator)

    whole = dec(**settings, augment=counting).fit(X)
    for i, at in enumerate((len(calls) - 10, len(calls) - 7, len(calls) // 3)):
        every = 1 if len(calls) < 100 else 25
        rest = {"checkpoint": tmp_path / f"run{i}", "checkpoint_every": every}
        with pytest.raises(KeyboardInterrupt):
            dec(**settings, augment=Interrupting(at)).fit(X, **rest)
        same(whole, dec(**settings, augment=Interrupting(1000)).fit(X, resume=True, **rest))


def test_a_callback_ends_its_phase_also_after_a_resume(tmp_path):
    def short(estimator: DEC, info: dict[str, Any]) -> bool:
        return info["epoch"] == 1

    whole = dec(augment=noisy, callbacks=short).fit(X)
    assert whole.stop_reason_ == "callback"
    assert not whole.converged_
    assert whole.n_iter_ == 2
    assert len(whole.history_["pretraining"]["pretrain"]) == 2
    rest = {"checkpoint": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        dec(augment=Interrupting(4 + 6), callbacks=short).fit(X, **rest)
    same(whole, dec(augment=noisy, callbacks=short).fit(X, resume=True, **rest))
    same(whole, dec(augment=noisy).fit(X, resume=True, **rest))


# ---- checkpoints that are refused ----------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written") / "run"
    dec(augment=noisy).fit(X, checkpoint=path)
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n_clusters": 5}, "was written with n_clusters=4, this fit has n_clusters=5; give it"),
        ({"variant": "idec"}, "was written with variant='dec', this fit has variant='idec'"),
        ({"n_epochs": 5}, "was written with n_epochs=3, this fit has n_epochs=5"),
        ({"random_state": 1}, "was written with random_state=0, this fit has random_state=1"),
        ({"augment": None}, "was written with augment='noisy', this fit has augment=None"),
        ({"hidden": (8,)}, "was written with encoder='.*', this fit has encoder='"),
        ({"standardize": True}, "was written with data="),
    ],
)
def test_other_settings(written, change, text):
    with pytest.raises(ValueError, match=rf"checkpoint: {written} {text}"):
        dec(**{"augment": noisy, **change}).fit(X, checkpoint=written, resume=True)


def test_damaged_and_foreign_files(written, tmp_path):
    content = written.read_bytes()
    path = tmp_path / "run"
    for damaged in (b"", content[:4], content[:-4]):
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError, match=str(path)):
            dec(augment=noisy).fit(X, checkpoint=path, resume=True)
    settings, learned, tensors = serialize.load(written, "DEC checkpoint")
    for change, text in (
        ({"order": torch.arange(3)}, "order of the rows does not fit"),
        ({"network.centroids": torch.zeros(K, 2)}, "centroids"),
    ):
        serialize.save(path, "DEC checkpoint", settings, learned, {**tensors, **change})
        with pytest.raises(ModelFileError, match=text):
            dec(augment=noisy).fit(X, checkpoint=path, resume=True)
    with pytest.raises(ModelFileError, match="holds a DEC checkpoint, not a DEC"):
        DEC.load(written)
    with pytest.raises(FileExistsError, match="resume=True continues it, or remove it"):
        dec().fit(X, checkpoint=written)
    for bad in ({"resume": True}, {"checkpoint_every": 3}):
        with pytest.raises(ValueError, match="expected a checkpoint to go with it, got None"):
            dec().fit(X, **bad)


def test_a_pretrained_model_starts_another_fit(model):
    """The weights before clustering, so that two fits start from the same codes."""
    again = dec(encoder=model.pretrained_, pretrain="none").fit(X)
    start = model.init_embedding_ / model.code_scale_
    np.testing.assert_allclose(again.init_embedding_ / again.code_scale_, start, rtol=1e-4,
                               atol=1e-5)  # fmt: skip
    assert again.history_["pretraining"] == {}
    other = dec(encoder=model.pretrained_, pretrain="none", variant="idec").fit(X)
    np.testing.assert_array_equal(other.init_labels_, again.init_labels_)
    assert isinstance(model.pretrained_, nn.Module)
