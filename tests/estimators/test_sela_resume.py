# SPDX-License-Identifier: Apache-2.0
"""SeLa's runs repeat; after Ctrl-C and kill -9 they resume to the same result; bad checkpoints are
refused.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _children import ended
from _sela_case import KILL_STEPS, D, K, X, encoder, kill_case, noisy, same, sela
from torch import Tensor, nn

import clam_kernels
from clam_kernels import SeLa, serialize
from clam_kernels.exceptions import ModelFileError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> SeLa:
    return sela().fit(X)


# ---- runs that repeat ----------------------------------------------------------------------------


def test_a_seed_repeats_and_no_global_generator_moves(model):
    legacy = np.random.get_state
    states = torch.get_rng_state(), legacy()[1].copy(), random.getstate()
    again = sela().fit(X)
    free = sela(random_state=None).fit(X)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(legacy()[1], states[1])
    assert random.getstate() == states[2]
    same(model, again)
    torch.manual_seed(123)
    same(model, sela().fit(X))
    assert not np.array_equal(free.labels_, model.labels_)
    assert not np.array_equal(sela(random_state=1).fit(X).labels_, model.labels_)
    shared = np.random.RandomState(3)
    first, second = (sela(random_state=shared).fit(X).labels_ for _ in range(2))
    assert not np.array_equal(first, second)


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


def test_ctrl_c_leaves_the_object_as_it_was(tmp_path):
    fresh = sela(augment=Interrupting(30))
    before = dict(fresh.__dict__)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fresh.fit(X, checkpoint=tmp_path / "c", checkpoint_every=1)
    assert fresh.__dict__ == before
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "c").is_file(), "the last checkpoint stays"
    fitted = sela().fit(X)
    before = dict(fitted.__dict__)
    labels = fitted.labels_.copy()
    fitted.augment = before["augment"] = Interrupting(30)
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(X[:50])
    assert fitted.__dict__ == before
    np.testing.assert_array_equal(fitted.labels_, labels)


# 12 draws before the first batch: 4 of 3 batches
@pytest.mark.parametrize(("at", "every"), [(5, 1), (12, 1), (13, 1), (15, 2), (28, 1), (29, 5),
                                           (40, None), (47, 1), (50, 1), (59, 1)])  # fmt: skip
def test_interrupted_and_resumed_is_uninterrupted(model, tmp_path, at, every):
    """Stops before the first checkpoint, while relabelling, within an epoch, and at its end."""
    path = tmp_path / "run"
    rest = {"checkpoint": path, "checkpoint_every": every}
    with pytest.raises(KeyboardInterrupt):
        sela(augment=Interrupting(at)).fit(X, **rest)
    torch.manual_seed(at)
    resumed = sela(augment=Interrupting(1000)).fit(X, resume=True, **rest)
    same(model, resumed)
    done = sela(augment=Interrupting(0)).fit(X, resume=True, **rest)
    same(model, done)


def _in_epoch_1(estimator: SeLa, info: dict[str, float]) -> bool:
    return info["epoch"] == 1


# draws 30 to 41 are of the relabelling after the stop
@pytest.mark.parametrize(("at", "every"), [(28, 1), (30, None), (41, None), (35, 5)])
def test_a_run_that_a_callback_ended_stays_ended(tmp_path, at, every):
    whole = sela(callbacks=_in_epoch_1).fit(X)
    rest = {"checkpoint": tmp_path / "run", "checkpoint_every": every}
    with pytest.raises(KeyboardInterrupt):
        sela(callbacks=_in_epoch_1, augment=Interrupting(at)).fit(X, **rest)
    callback = _in_epoch_1 if at < 30 else None  # a run that has ended needs no callback
    same(whole, sela(callbacks=callback).fit(X, resume=True, **rest))
    content = (tmp_path / "run").read_bytes()
    same(whole, sela().fit(X, resume=True, **rest))
    assert (tmp_path / "run").read_bytes() == content


def test_draws_of_a_callback_are_in_the_checkpoint(tmp_path):
    def drawing(estimator: SeLa, info: dict[str, float]) -> None:
        torch.rand(3)

    whole = sela(callbacks=drawing).fit(X)
    with pytest.raises(KeyboardInterrupt):
        sela(callbacks=drawing, augment=Interrupting(28)).fit(X, checkpoint=tmp_path / "run")
    same(whole, sela(callbacks=drawing).fit(X, checkpoint=tmp_path / "run", resume=True))


class Centred(nn.Module):
    """Buffers that no state_dict has: a running mean, the mean of the first batch, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D), persistent=False)
        self.register_buffer("first", None, persistent=False)
        self.register_buffer("ones", torch.ones(1).expand(D), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
            if self.first is None:
                self.first = x[0].clone()
        return x * self.ones - self.mean - (0 if self.first is None else self.first)


def test_buffers_that_are_not_persistent_are_resumed(tmp_path):
    layers = nn.Sequential(Centred(), encoder())
    assert not any(name.startswith("0.") for name in layers.state_dict())
    whole = sela().set_params(encoder=layers).fit(X)
    rest = {"checkpoint": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        sela(augment=Interrupting(40)).set_params(encoder=layers).fit(X, **rest)
    resumed = sela().set_params(encoder=layers).fit(X, resume=True, **rest)
    same(whole, resumed)
    for name, buffer in whole.encoder_.named_buffers():
        assert torch.equal(buffer, resumed.encoder_.get_buffer(name)), name
    settings, learned, tensors = serialize.load(tmp_path / "run", "SeLa checkpoint")
    del tensors["encoder.0.mean"]
    serialize.save(tmp_path / "run", "SeLa checkpoint", settings, learned, tensors)
    with pytest.raises(ModelFileError, match=r"run: no buffer 0\.mean"):
        sela().set_params(encoder=layers).fit(X, resume=True, **rest)


def test_the_state_of_other_optimisers_is_resumed(tmp_path):
    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, 0.01, betas=(0.8, 0.9), amsgrad=True)

    whole = sela(optimizer=adam, strict=True, col_marginal=[1.0, 1.0, 1.0, 2.0]).fit(X)
    rest = {"checkpoint": tmp_path / "run", "checkpoint_every": 1}
    settings = {"optimizer": adam, "strict": True, "col_marginal": [1.0, 1.0, 1.0, 2.0]}
    with pytest.raises(KeyboardInterrupt):
        sela(augment=Interrupting(40), **settings).fit(X, **rest)
    same(whole, sela(**settings).fit(X, resume=True, **rest))


def test_the_first_write_may_fail_once(model, tmp_path, monkeypatch):
    real, calls = serialize.save, []

    def flaky(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        real(*args)

    monkeypatch.setattr(serialize, "save", flaky)
    same(model, sela().fit(X, checkpoint=tmp_path / "run"))
    assert len(calls) == 1 + 4 + 1  # an epoch each, and the end


# ---- kill -9 -------------------------------------------------------------------------------------


NURSERY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import _sela_case
_sela_case.kill_case()  # so that the children need not import what a first fit does
for line in sys.stdin:
    place, count = line.split()
    child = os.fork()
    if child == 0:
        _sela_case.die_at(place, int(count))
        _sela_case.kill_case(sys.argv[2])
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def _kills(path: Path, places: list[tuple[str, int]]) -> list[int]:
    """Kill one run in turn at each place and resume it, then run it to its end; returns the steps
    done at each kill. A place after the end of the run kills nothing.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(Path(__file__).parent), str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    steps: list[int] = []
    with ended(nursery):
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for place, count in [*places, ("nowhere", 0)]:
            print(place, count, file=nursery.stdin, flush=True)
            status = int(nursery.stdout.readline())
            if status == 0:
                return steps
            assert status == signal.SIGKILL
            steps.append(_steps_in(path))
    raise AssertionError("the run did not come to its end")


def _steps_in(path: Path) -> int:
    """Steps done when a checkpoint was written, old or new but whole; 0 without a checkpoint."""
    if not path.exists():
        return 0
    _, learned, _ = serialize.load(path, "SeLa checkpoint")
    return int(json.loads(learned["state"])["at"][-1])


def test_killed_and_resumed_is_uninterrupted(tmp_path):
    path = tmp_path / "run"
    places = [
        ("batch", 5),
        ("written", 1),
        ("renamed", 7),
        ("batch", 30),
        ("written", 12),
        ("renamed", 9),
    ]
    steps = _kills(path, places)
    assert steps[:2] == [0, 0], "the first two fell before the first checkpoint"
    assert len(steps) == len(places)
    assert steps[2:] == sorted(steps[2:])
    assert all(0 < done < KILL_STEPS for done in steps[2:])
    same(kill_case(), kill_case(str(path)))
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "strays of killed writes are gone"


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    whole, draw = kill_case(), random.Random(0)
    killed: list[int] = []
    for run in itertools.count():
        path = tmp_path / f"run{run}"
        places = [
            (draw.choice(("batch", "written", "renamed")), draw.randint(1, 20)) for _ in range(8)
        ]
        killed += _kills(path, places)
        same(whole, kill_case(str(path)))
        if len(killed) >= 100:
            break
    assert len(set(killed)) > 20


# ---- checkpoints that are refused ----------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written") / "run"
    sela().fit(X, checkpoint=path)
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n_heads": 2}, "was written with n_heads=3, this fit has n_heads=2; give it the same"),
        ({"n_epochs": 5}, "was written with n_epochs=4, this fit has n_epochs=5"),
        ({"random_state": 1}, "was written with random_state=0, this fit has random_state=1"),
        ({"augment": None}, "was written with augment='noisy', this fit has augment=None"),
        ({"lam": 10}, "was written with lam=25.0, this fit has lam=10"),
        ({"col_marginal": [1.0] * K}, "was written with col_marginal=None, this fit has"),
        ({"encoder": nn.Linear(D, 16)}, "was written with encoder='.*', this fit has encoder='"),
    ],
)
def test_other_settings(written, change, text):
    model = sela().set_params(**change)
    with pytest.raises(ValueError, match=f"checkpoint: {written} {text}"):
        model.fit(X, checkpoint=written, resume=True)


def test_other_data(written):
    text = f"checkpoint: {written} was written with data="
    for other in (X[:-1], X.astype(np.float64), X + 1, torch.from_numpy(X + 1)):
        with pytest.raises(ValueError, match=text):
            sela().fit(other, checkpoint=written, resume=True)


def test_damaged_and_foreign_files(written, tmp_path):
    content = written.read_bytes()
    path = tmp_path / "run"
    for damaged in (b"", content[:4], content[:200], content[:-4], b"\x80\x04pickle" + content):
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError, match=str(path)):
            sela().fit(X, checkpoint=path, resume=True)
        assert path.read_bytes() == damaged
    settings, learned, tensors = serialize.load(written, "SeLa checkpoint")
    serialize.save(
        path, "SeLa checkpoint", settings, learned, {**tensors, "order": torch.arange(3)}
    )
    with pytest.raises(ModelFileError, match="order of the rows does not fit the data"):
        sela().fit(X, checkpoint=path, resume=True)
    nowhere = {"state": learned["state"].replace('"at": [4, 0, ', '"at": [4, 1, ')}
    assert nowhere != learned
    serialize.save(path, "SeLa checkpoint", settings, nowhere, tensors)
    with pytest.raises(ModelFileError, match="epoch and batch lie outside this run"):
        sela().fit(X, checkpoint=path, resume=True)
    del tensors["heads.g"]
    serialize.save(path, "SeLa checkpoint", settings, learned, tensors)
    with pytest.raises(ModelFileError, match="Missing key"):
        sela().fit(X, checkpoint=path, resume=True)
    clam_kernels.KMeans(2, n_init=1).fit(X).save(path)
    with pytest.raises(ModelFileError, match="holds a KMeans, not a SeLa checkpoint"):
        sela().fit(X, checkpoint=path, resume=True)
    with pytest.raises(ModelFileError, match="holds a SeLa checkpoint, not a KMeans"):
        clam_kernels.KMeans.load(written)


def test_long_names_are_read(tmp_path):
    """Names as long as those of an encoder of thousands of layers."""
    deep = encoder()
    deep.register_parameter("w" * (1 << 20), nn.Parameter(torch.zeros(1)))
    model = sela(n_epochs=1).set_params(encoder=deep)
    whole = copy.copy(model).fit(X, checkpoint=tmp_path / "run")
    same(whole, model.fit(X, checkpoint=tmp_path / "run", resume=True))


def test_a_checkpoint_that_would_not_load_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(serialize, "MAX_HEADER_BYTES", 1000)
    text = r"run: expected names and settings of at most 1000 bytes, got \d+: the file could not"
    with pytest.raises(ModelFileError, match=text):
        sela().fit(X, checkpoint=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_overwritten_on_request_only(written, tmp_path):
    content = written.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True continues it, or remove it"):
        sela().fit(X, checkpoint=written)
    assert written.read_bytes() == content
    with pytest.raises(FileNotFoundError, match="No such folder"):
        sela().fit(X, checkpoint=tmp_path / "missing" / "run")
    stray = tmp_path / ".run.abc.tmp"
    stray.write_bytes(b"half")
    sela(n_epochs=1).fit(X, checkpoint=tmp_path / "run", resume=True)
    assert not stray.exists()


def test_a_checkpoint_contains_no_code(written):
    content = written.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert content[8:9] == b"{"
    assert content[7 + length : 8 + length].strip() in (b"}", b"")
    assert b"cpickle" not in content.lower()
