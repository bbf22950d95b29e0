# SPDX-License-Identifier: Apache-2.0
"""SeLa: labels of equal shares, kinds of data, runs that repeat, refusals."""

from __future__ import annotations

import copy
import doctest
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _sela_case import QUICK, D, H, K, N, X, Y, encoder, noisy, same, sela
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

import clam_kernels.estimators.sela.estimator
from clam_kernels import SeLa, serialize
from clam_kernels.estimators.sela import labelling as _labelling
from clam_kernels.estimators.training import trainer as _trainer
from clam_kernels.exceptions import DataFileError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> SeLa:
    return sela().fit(X)


# ---- results -------------------------------------------------------------------------------------


def test_labels_have_equal_shares_and_follow_the_classes(model):
    assert model.labels_.shape == (H, N)
    assert model.labels_.dtype == np.int32
    for row in model.labels_:
        assert np.abs(np.bincount(row, minlength=K) - N / K).max() <= 4
    assert not np.array_equal(model.labels_[0], model.labels_[1])
    far = (X + 3 * np.eye(D)[Y]).astype(np.float32)
    for row in sela(n_epochs=20).fit(far).labels_:
        assert normalized_mutual_info_score(Y, row) > 0.9


def test_history(model):
    """Relabellings at (E + 1.01) N linspace(0, 1, n)^2 rows, each before the next batch."""
    table = model.history_["relabellings"]
    assert list(table) == ["seen", "head", "n_iter", "err", "converged", "changed"]
    assert table["head"].tolist() == list(range(H)) * 4
    # batches of 33, 33 and 34 rows: a last batch of one row joins the one before
    assert table["seen"][::H].tolist() == [0, 66, 233, 400]
    assert model.n_steps_ == 12
    assert bool(table["converged"].all())
    assert float(table["err"].max()) <= 1e-3
    assert len(model.history_["loss"]) == 4
    assert model.history_["loss"][-1] < model.history_["loss"][0]


def test_equal_times_are_one_relabelling():
    table = sela(n_relabels=60).fit(X).history_["relabellings"]
    rows_seen = table["seen"][::H].tolist()
    assert rows_seen == sorted(set(rows_seen))
    assert len(rows_seen) == 13  # before each of 12 batches and at the end
    assert sela(n_relabels=1).fit(X).history_["relabellings"]["seen"].tolist() == [0] * H


def test_the_encoder_argument_does_not_change():
    own = encoder()
    before = copy.deepcopy(own.state_dict())
    model = SeLa(own, K, augment=noisy, random_state=0, **QUICK).fit(X)
    assert model.encoder is own
    assert model.encoder_ is not own
    assert not model.encoder_.training
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())
    assert not torch.equal(model.encoder_[0].weight, own[0].weight)


def test_frozen_parameters_stay():
    own = encoder()
    own[0].requires_grad_(False)
    model = SeLa(own, K, random_state=0, **QUICK).fit(X)
    assert torch.equal(model.encoder_[0].weight, own[0].weight)
    assert not torch.equal(model.encoder_[1].weight, own[1].weight)


def test_transform_and_predict(model):
    features, labels = model.transform(X), model.predict(X, head=1)
    assert features.shape == (N, 16)
    assert features.dtype == np.float32
    assert labels.dtype == np.int32
    with torch.no_grad():
        z = model.encoder_(torch.from_numpy(X))
        scores = 25 * model.heads_(z)[1].log_softmax(1) + model.heads_.g[1].float()
    np.testing.assert_array_equal(features, z.numpy())
    np.testing.assert_array_equal(labels, scores.argmax(1).numpy())
    assert (labels == model.labels_[1]).mean() > 0.8
    one = model.predict(X[3:4], head=1)
    assert one.tolist() == [labels[3]]
    x = torch.from_numpy(X)
    assert torch.equal(model.transform(x), z)
    assert model.predict(x).dtype == torch.int64
    for call in (sela().transform, sela().predict):
        with pytest.raises(NotFittedError):
            call(X)
    with pytest.raises(NotFittedError):
        sela().export_labels("labels.npz")


@pytest.mark.parametrize("strict", [False, True])
def test_marginals(strict):
    share = [2.0, 1.0, 1.0, 1.0]
    mass = np.ones(N)
    model = sela(col_marginal=share, row_marginal=mass, strict=strict).fit(X)
    for row in model.labels_:
        off = np.abs(np.bincount(row, minlength=K) - np.array([40, 20, 20, 20]))
        assert off.max() <= (0 if strict else 2)
    heavy = sela(row_marginal=np.where(Y == 0, 5.0, 1.0)).fit(X).labels_
    assert all(np.bincount(row[Y == 0], minlength=K).max() < 25 for row in heavy)


def test_without_augmentation_and_with_another_optimiser():
    model = sela(augment=None, optimizer=lambda p: torch.optim.Adam(p, 0.01)).fit(X)
    assert model.history_["loss"][-1] < model.history_["loss"][0]
    assert np.abs(np.bincount(model.labels_[0], minlength=K) - N / K).max() <= 2


def test_recipes_and_schedules():
    assert set(_labelling.RECIPES["paper"]) == set(_labelling.RECIPES["default"])
    quick = {"n_epochs": 2, "n_relabels": 3, "n_heads": 1, "batch_size": 50}
    model = SeLa(encoder(), K, recipe="paper", augment=noisy, random_state=0, **quick).fit(X)
    assert float(model.history_["relabellings"]["err"].max()) <= 0.1 / N
    factors = [_trainer.SCHEDULES["steps"](e / 400) for e in (0, 149, 150, 299, 300, 349, 350, 399)]
    np.testing.assert_allclose(factors, [1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])
    assert [_trainer.cosine(x) for x in (0.0, 1.0)] == [1.0, 0.0]
    rates = []
    sela(schedule=lambda progress: (rates.append(progress), 1.0)[1]).fit(X)
    np.testing.assert_allclose(rates, np.arange(12) / 12)


def test_writer_callbacks_and_bar(capfd):
    class Writer:
        def __init__(self) -> None:
            self.rows: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.rows.append((tag, value, step))

    writer, calls = Writer(), []

    def stop(estimator: SeLa, info: dict[str, float]) -> bool:
        calls.append((estimator, info["epoch"], info["loss"], info["changed"]))
        return info["epoch"] == 1

    model = sela(writer=writer, callbacks=stop, verbose=1).fit(X)
    assert [row[1] for row in calls] == [0, 1]
    assert model.history_["loss"] == [row[2] for row in calls]
    assert model.history_["relabellings"]["seen"][-1] == 200, "labels of the last weights"
    losses = [row for row in writer.rows if row[0] == "sela/loss"]
    assert [row[2] for row in losses] == list(range(1, 7))
    assert np.mean([row[1] for row in losses[:3]]) == pytest.approx(calls[0][2])
    tags = {row[0] for row in writer.rows}
    assert tags == {f"sela/{n}" for n in ("loss", "learning_rate", "changed", "err", "n_iter")}
    out, err = capfd.readouterr()
    assert out == ""
    assert "SeLa" in err
    sela(n_epochs=1).fit(X)
    assert capfd.readouterr() == ("", "")


def test_a_warning_where_the_last_labels_are_not_of_the_shares():
    with pytest.warns(
        ConvergenceWarning, match=r"SeLa: 3 of 3 heads were last relabelled with"
    ) as w:
        sela(max_iter=1, tol=1e-7, n_epochs=1).fit(X)
    assert w[0].filename == __file__


# ---- kinds of data -------------------------------------------------------------------------------


class LabelledItems:
    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.from_numpy(X[row]), int(Y[row])


def test_the_same_rows_in_any_form_give_the_same_labels(model, tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "one.npz", X)
    np.savez(tmp_path / "two.npz", x=X, y=Y)
    memory = np.load(tmp_path / "x.npy", mmap_mode="r")
    forms = [
        tmp_path / "x.npy", str(tmp_path / "one.npz"), tmp_path / "two.npz", memory,
        LabelledItems(), X.tolist(), np.asfortranarray(X), X.astype(">f8"),
        X.astype(np.longdouble), X[::-1][::-1],
    ]  # fmt: skip
    for form in forms:
        same(sela().fit(form), model)
    tensor = torch.from_numpy(X).requires_grad_()
    result = sela().fit(tensor)
    assert result.labels_.dtype == torch.int64
    same(result, model)


class Items:
    """A dataset whose items a function makes from rows."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        return self.make(X[row])


def test_items_get_the_dtype_of_the_encoder(model):
    for dtype in (np.float64, np.float32):
        same(sela().fit(Items(lambda x, dtype=dtype: x.astype(dtype))), model)
    same(sela().fit(Items(lambda x: torch.from_numpy(x).double())), model)
    table = nn.Sequential(nn.Embedding(9, 4), nn.Flatten())  # accepts whole numbers only
    words = Items(lambda x: (x > 0).astype(np.int64))
    assert SeLa(table, K, random_state=0, **QUICK).fit(words).transform(words).shape == (N, 4 * D)


def _picture(x: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(x[None].astype(np.uint8))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: {"x": x}, "dict in row 0"),
        (lambda x: ({"x": x}, 1), "dict in row 0"),
        (lambda x: "text", "str in row 0"),
        (lambda x: x.astype(object), "ndarray of dtype object in row 0"),
        (_picture, "Image in row 0"),
    ],
)
def test_items_that_are_no_numbers(make, kind):
    with pytest.raises(TypeError, match=f"data: expected a Dataset whose items are, .* got {kind}"):
        sela().fit(Items(make))


def test_float64_and_whole_numbers():
    wide = SeLa(encoder().double(), K, augment=noisy, random_state=0, **QUICK).fit(X)
    assert wide.transform(X).dtype == np.float64
    whole = np.round(10 * X).astype(np.int16)
    same(sela(augment=None).fit(whole), sela(augment=None).fit(torch.from_numpy(whole)))


def _images(folder: Path, mode: str, count: int = 24, side: int = 8) -> np.ndarray:
    from PIL import Image

    rng = np.random.default_rng(0)
    shape = (count, side, side, 3) if mode == "RGB" else (count, side, side)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    for i, image in enumerate(pixels):
        where = folder / f"class{i % 2}"
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(where / f"{i:03d}.png")
    return pixels


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_folder_of_images(tmp_path, mode):
    pixels = _images(tmp_path, mode)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.png").write_bytes(b"no image")
    (tmp_path / "readme.txt").write_text("not an image")
    channels = 3 if mode == "RGB" else 1
    small = nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, 8), nn.ReLU())
    model = SeLa(small, 2, random_state=0, **QUICK).fit(tmp_path)
    order = sorted(range(24), key=lambda i: (i % 2, i))
    assert model.files_ == [f"class{i % 2}/{i:03d}.png" for i in order]
    array = pixels.reshape(24, 8, 8, channels).transpose(0, 3, 1, 2)[order] / np.float32(255)
    same(model, SeLa(small, 2, random_state=0, **QUICK).fit(array))
    model.export_labels(tmp_path / "labels.npz")
    with np.load(tmp_path / "labels.npz") as arrays:
        assert arrays["files"].tolist() == model.files_


def test_a_folder_is_grey_only_if_every_image_is(tmp_path):
    _images(tmp_path / "a", "L", 6)
    pixels = _images(tmp_path / "b", "RGB", 6)
    small = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    model = SeLa(small, 2, random_state=0, **QUICK).fit(tmp_path)
    assert model.files_[0].startswith("a/")
    array = pixels[::2].transpose(0, 3, 1, 2) / np.float32(255)
    np.testing.assert_array_equal(
        model.transform(tmp_path / "b" / "class0"), model.transform(array)
    )


def test_images_of_another_folder_get_the_size_of_the_fit(tmp_path):
    _images(tmp_path / "grey", "L", 6, 10)
    _images(tmp_path / "colour", "RGB", 6, 10)
    for fitted, other, channels in (("grey", "colour", 1), ("colour", "grey", 3)):
        small = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 8))
        model = SeLa(small, 2, image_size=4, **QUICK).fit(tmp_path / fitted)
        model.set_params(image_size=5)  # of the next fit
        assert model.predict(tmp_path / other).shape == (6,)
        assert model.transform(tmp_path / other).shape == (6, 8)


def test_images_of_several_sizes(tmp_path):
    _images(tmp_path / "a", "RGB", 6, 8)
    _images(tmp_path / "b", "RGB", 6, 10)
    small = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    with pytest.raises(DataFileError, match=r"png: expected \[3, 8, 8\] as in .* image_size"):
        SeLa(nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), 2, **QUICK).fit(tmp_path)
    assert SeLa(small, 2, image_size=4, **QUICK).fit(tmp_path).labels_.shape == (H, 12)


def test_bad_folders_and_files(tmp_path, monkeypatch):
    with pytest.raises(DataFileError, match="expected images"):
        sela().fit(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataFileError, match=r"a\.png"):
        sela().fit(tmp_path)
    with pytest.raises(DataFileError, match="no such file"):
        sela().fit(tmp_path / "missing.npy")
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(DataFileError, match=r"expected a file of numbers as \.npy or \.npz"):
        sela().fit(tmp_path / "x.csv")
    np.savez(tmp_path / "many.npz", a=X, b=X)
    with pytest.raises(DataFileError, match="holds a, b, and none is called x"):
        sela().fit(tmp_path / "many.npz")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataFileError, match="pickle"):
        sela().fit(tmp_path / "pickled.npy")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="reading images needs pillow, which the extra images br"):
        sela().fit(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz", ".parquet", ".npy", ".npz"])
def test_exported_labels(model, tmp_path, suffix):
    path = tmp_path / f"labels{suffix}"
    model.export_labels(path)
    if suffix == ".npz":
        with np.load(path) as arrays:
            np.testing.assert_array_equal(arrays["labels"], model.labels_)
            np.testing.assert_array_equal(arrays["g"], model.heads_.g.numpy())
    elif suffix == ".npy":
        np.testing.assert_array_equal(np.load(path), model.labels_)
    else:
        values, names = clam_kernels.tables.read(path)
        assert names == ["head_0", "head_1", "head_2"]
        np.testing.assert_array_equal(values, model.labels_.T)
    text = r"expected an output \.npz, \.csv, \.tsv \(also with \.gz\), .* got '\.txt'"
    with pytest.raises(DataFileError, match=text):
        model.export_labels(tmp_path / "labels.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"encoder": 3}, ValueError, "The 'encoder' parameter of SeLa must be an instance of"),
        ({"n_clusters": 0}, ValueError, r"The 'n_clusters' parameter of SeLa must be an int in"),
        ({"recipe": "best"}, ValueError, "The 'recipe' parameter of SeLa must be a str among"),
        ({"batch_size": 1}, ValueError, r"The 'batch_size' parameter of SeLa must be an int in"),
        ({"lam": 0}, ValueError, "The 'lam' parameter of SeLa must be a float in the range"),
        ({"callbacks": 3}, TypeError, "callbacks: expected callables or objects with"),
        ({"device": "tpu"}, ValueError, "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ({"n_clusters": N + 1}, ValueError, "n_samples=100 should be >= n_clusters=101."),
        ({"col_marginal": [1.0]}, ValueError, r"col_marginal: expected shape \[4\], got \[1\]"),
        ({"row_marginal": -np.ones(N)}, ValueError, "row_marginal: expected finite values > 0"),
        ({"optimizer": lambda p: 3}, TypeError, "optimizer: expected it to return a torch Optim"),
        (
            {"optimizer": torch.optim.LBFGS},
            TypeError,
            "Optimizer whose step needs no closure, got L",
        ),
        ({"augment": lambda b, g: 3}, TypeError, "augment: expected it to return a Tensor, got in"),
        ({"augment": lambda b, g: b[1:]}, ValueError, "augment: expected a batch of 33 rows from"),
        ({"encoder": nn.Unflatten(1, (2, 3))}, ValueError, r"encoder: expected features \[2, D\]"),
    ],
)
def test_refused_parameters(change, error, text):
    with pytest.raises(error, match=text):
        sela().set_params(**change).fit(X)


def test_training_of_the_heads_alone():
    assert SeLa(nn.Identity(), K, random_state=0, **QUICK).fit(X).labels_.shape == (H, N)


class RowStream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(X)


def _with(value: float) -> np.ndarray:
    x = X.copy()
    x[41, 2] = value
    return x


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (_with(np.nan), ValueError, r"data: expected finite values, got NaN in row 41 at \[2\]"),
        (torch.from_numpy(_with(np.inf)), ValueError, r"got infinity in row 41 at \[2\]"),
        (_with(1).astype(np.float64) * 1e300, ValueError, "data: expected finite values, got inf"),
        (X[:0], ValueError, r"data: expected shape \[N, \.\.\.\] with N >= 1, got \[0, 6\]"),
        (np.float32(3), ValueError, r"data: expected shape \[N, \.\.\.\] with N >= 1, got \[\]"),
        (np.array(["a"]), ValueError, "data: expected numbers, got dtype <U1"),
        (np.ma.masked_less(X, 0), ValueError, "data: expected an array without masked entries"),
        (torch.zeros(3, device="meta"), ValueError, "data: expected a tensor with values, got one"),
        (torch.eye(3).to_sparse(), TypeError, "data: expected a dense tensor, got one of layout"),
        (torch.eye(3) + 1j, ValueError, "data: expected real numbers, got a complex tensor"),
        (3, TypeError, "data: expected a Tensor, an array, a path to .* got int"),
        (RowStream(), TypeError, "got an iterable dataset, which has no row"),
    ],
)
def test_refused_data(data, error, text):
    with pytest.raises(error, match=text):
        sela().fit(data)


def test_refused_calls():
    for every in (0, 2.5, True):
        with pytest.raises(ValueError, match="checkpoint_every: expected an int >= 1, got"):
            sela().fit(X, checkpoint="x", checkpoint_every=every)
    with pytest.raises(ValueError, match="resume: expected a checkpoint to go with it, got None"):
        sela().fit(X, resume=True)
    with pytest.raises(ValueError, match="checkpoint_every: expected a checkpoint to go with it"):
        sela().fit(X, checkpoint_every=1)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    calls = []

    def breaking(batch: Tensor, generator: torch.Generator) -> Tensor:
        calls.append(1)
        return batch * (torch.nan if len(calls) == 17 else 1.0)

    model = sela(augment=breaking, n_relabels=1)
    # calls 1 to 12 are of the relabelling, 13 to 15 of epoch 0
    text = "loss: expected finite values, got nan in batch 1 of epoch 1; lower learning_rate"
    with pytest.raises(FloatingPointError, match=text):
        model.fit(X, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert not hasattr(model, "labels_")
    _, _, tensors = serialize.load(tmp_path / "run", "SeLa checkpoint")
    assert all(bool(t.isfinite().all()) for t in tensors.values()), "nothing broken was written"


def test_features_that_are_not_finite_end_the_run():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / torch.zeros(())

    with pytest.raises(FloatingPointError, match=r"head 0: .* got NaN"):
        SeLa(Broken(), K, **QUICK).fit(X)


def test_parameters_are_stored_as_they_are():
    own = encoder()
    model = SeLa(own, -1, recipe="nonsense", n_epochs="many")
    assert model.get_params()["encoder"] is own
    assert (model.n_clusters, model.recipe, model.n_epochs) == (-1, "nonsense", "many")
    assert "SeLa(" in repr(model)


def test_examples_run():
    result = doctest.testmod(clam_kernels.estimators.sela.estimator)
    assert not result.failed
    assert result.attempted


@pytest.mark.slow
def test_the_digits_meet_their_bars(tmp_path):
    """Section 6 of the specification, for one seed."""
    report = tmp_path / "report.json"
    script = ROOT / "examples" / "self_labelling.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, "--seed", "0", "--json", report], check=True, env=env)
    figures = json.loads(report.read_text())
    assert figures["nmi"] >= max(0.82, figures["nmi_untrained"] + 0.03)
    assert figures["linear"] >= max(0.83, figures["linear_untrained"] + 0.03)
    assert figures["counts_least"] >= 0.75 * figures["counts_equal_share"]
    assert figures["counts_most"] <= 1.25 * figures["counts_equal_share"]
