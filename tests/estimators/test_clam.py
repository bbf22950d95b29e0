# SPDX-License-Identifier: Apache-2.0
"""ClAM: scikit-learn's conventions, results, repeatability, containers and dtypes."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from clam_kernels import ClAM
from clam_kernels.estimators.clam import completion as _completion
from clam_kernels.estimators.clam import estimator as clam
from clam_kernels.estimators.clam import points as _points

QUICK = {"n_init": 2, "max_iter": 4, "random_state": 0}


def _expected_failures(estimator: ClAM) -> dict[str, str]:
    reason = "a row of weight 2 draws k-means++ starts otherwise than two shuffled rows do"
    return {
        f"check_sample_weight_equivalence_on_{kind}_data": reason for kind in ("dense", "sparse")
    }


@pytest.fixture(scope="module")
def iris() -> np.ndarray:
    return StandardScaler().fit_transform(load_iris().data)


@pytest.fixture(scope="module")
def fitted(iris: np.ndarray) -> ClAM:
    return ClAM(3, **QUICK).fit(iris)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [ClAM(n_init=2, max_iter=3), ClAM(n_init=2, max_iter=3, recipe="paper")],
    expected_failed_checks=_expected_failures,
)
def test_scikit_learn_checks(estimator: ClAM, check: object) -> None:
    check(estimator)


# ---- results -------------------------------------------------------------------------------------


def test_three_blobs_are_found() -> None:
    rng = np.random.default_rng(0)
    centers = np.array([[0, 0], [8, 0], [0, 8.0]])
    truth = rng.integers(3, size=300)
    x = centers[truth] + rng.normal(size=(300, 2)) * 0.5
    model = ClAM(3, random_state=0).fit(x)
    assert adjusted_rand_score(truth, model.labels_) == 1.0
    nearest = np.sort(model.cluster_centers_.round(0), axis=0)
    np.testing.assert_array_equal(nearest, np.sort(centers, axis=0))


@pytest.mark.parametrize(("load", "k"), [(load_iris, 3), (load_wine, 3)])
def test_silhouette_near_that_of_k_means(load: object, k: int) -> None:
    x = StandardScaler().fit_transform(load().data)
    ours = silhouette_score(x, ClAM(k, random_state=0).fit_predict(x))
    theirs = silhouette_score(x, KMeans(k, n_init=20, random_state=0).fit_predict(x))
    assert ours > theirs - 0.01


def test_paper_recipe_clusters_iris(iris: np.ndarray) -> None:
    model = ClAM(3, recipe="paper", max_iter=40, random_state=0).fit(iris)
    assert model.n_clusters_used_ == 3
    assert silhouette_score(iris, model.labels_) > 0.43
    assert model.beta_ in (0.55, 0.75, 0.95, 1.2)


def test_paper_labels_are_those_of_the_recursion(iris: np.ndarray) -> None:
    model = ClAM(3, recipe="paper", max_iter=5, random_state=0).fit(iris)
    x, rho = torch.from_numpy(iris), torch.from_numpy(model.cluster_centers_)
    for _ in range(10):
        p = torch.softmax(-model.beta_ * torch.cdist(x, rho).square(), 1)
        x = x + 0.1 * (p @ rho - x)
    np.testing.assert_array_equal(torch.cdist(x, rho).argmin(1).numpy(), model.labels_)


@pytest.mark.parametrize("exponent", [-8, 5])
def test_paper_schedule_is_in_the_units_of_the_data(
    iris: np.ndarray, monkeypatch: pytest.MonkeyPatch, exponent: int
) -> None:
    """The result does not depend on the frame in which the fit runs."""
    settings = {"recipe": "paper", "n_init": 2, "max_iter": 40, "batch_size": 50, "random_state": 0}
    plain = ClAM(3, **settings).fit(iris)
    real_frame, factor = clam.frame_of, 2.0**exponent

    def other(*rows: object) -> clam.Frame:
        frame = real_frame(*rows)
        return dataclasses.replace(
            frame,
            width=frame.width * factor,
            deviation=frame.deviation / factor,
            unit=frame.unit + exponent,
            one=frame.one / factor,
        )

    monkeypatch.setattr(clam, "frame_of", other)
    moved = ClAM(3, **settings).fit(iris)
    np.testing.assert_allclose(moved.loss_curve_, plain.loss_curve_, rtol=1e-6)
    np.testing.assert_allclose(moved.cluster_centers_, plain.cluster_centers_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_inside_no_grad(iris: np.ndarray, fitted: ClAM, mode: type) -> None:
    with mode():
        model = ClAM(3, **QUICK).fit(torch.from_numpy(iris))
    np.testing.assert_array_equal(model.labels_.numpy(), fitted.labels_)


def test_loss_falls(iris: np.ndarray) -> None:
    """From k-means centroids on: they do not give the best completion."""
    model = ClAM(3, n_init=1, max_iter=60, am_share=1.0, random_state=0).fit(iris)
    curve = model.loss_curve_
    assert len(curve) == model.n_iter_ == 60
    assert np.mean(curve[-10:]) < 0.97 * np.mean(curve[:3])


def test_attributes_fit_together(iris: np.ndarray, fitted: ClAM) -> None:
    labels = fitted.predict(iris)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, fitted.labels_)
    distances = fitted.transform(iris)
    np.testing.assert_array_equal(distances.argmin(1), labels)
    assert fitted.inertia_ == pytest.approx((distances.min(1) ** 2).sum())
    assert fitted.score(iris) == pytest.approx(-fitted.inertia_)
    assert fitted.beta_ == pytest.approx(3 / fitted.gap_)
    assert fitted.n_clusters_used_ == len(set(labels)) == 3
    assert fitted.device_ == "cpu"
    assert fitted.backend_ == "reference"
    assert fitted.n_iter_ == 4 == len(fitted.loss_curve_)
    z = -fitted.beta_ * distances**2
    energy = -np.log(np.exp(z).sum(1)) / fitted.beta_
    np.testing.assert_allclose(fitted.energy(iris), energy, atol=1e-10)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_probabilities_agree_with_labels(iris: np.ndarray, recipe: str) -> None:
    model = ClAM(3, recipe=recipe, **QUICK).fit(iris.astype(np.float32))
    p = model.predict_proba(iris.astype(np.float32))
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(p.argmax(1), model.labels_)


def test_twin_memories_keep_probabilities_and_labels_together() -> None:
    x = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    twins = np.array([[0.1, 0.0], [0.1 + 1e-7, 0.0], [0.1, 1e-7]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = ClAM(3, init=twins, learning_rate=1e-12, **QUICK).fit(x)
    np.testing.assert_array_equal(model.predict_proba(x).argmax(1), model.predict(x))


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_rows_alone_in_batches_and_together_agree_bit_for_bit(recipe: str) -> None:
    x = (load_digits().data / 16).astype(np.float32)[:300]
    model = ClAM(10, recipe=recipe, n_init=1, max_iter=1, random_state=0).fit(x)
    for method in (model.predict, model.energy):
        whole = method(x)
        np.testing.assert_array_equal(
            np.concatenate([method(x[i : i + 7]) for i in range(0, 300, 7)]), whole
        )
        np.testing.assert_array_equal(
            np.concatenate([method(x[i : i + 1]) for i in range(20)]), whole[:20]
        )


# ---- repeatability -------------------------------------------------------------------------------


def test_one_seed_gives_the_same_bits(iris: np.ndarray) -> None:
    first, second = (ClAM(3, **QUICK).fit(iris) for _ in range(2))
    np.testing.assert_array_equal(first.cluster_centers_, second.cluster_centers_)
    np.testing.assert_array_equal(first.loss_curve_, second.loss_curve_)
    other = ClAM(3, **{**QUICK, "random_state": 1}).fit(iris)
    assert not np.array_equal(first.cluster_centers_, other.cluster_centers_)


def test_one_seed_gives_the_same_bits_in_another_process(iris: np.ndarray) -> None:
    code = (
        "import sys, numpy as np\nfrom clam_kernels import ClAM\n"
        "from sklearn.datasets import load_iris\nfrom sklearn.preprocessing import StandardScaler\n"
        "x = StandardScaler().fit_transform(load_iris().data)\n"
        f"sys.stdout.write(ClAM(3, **{QUICK}).fit(x).cluster_centers_.tobytes().hex())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == ClAM(3, **QUICK).fit(iris).cluster_centers_.tobytes().hex()


def test_threads_do_not_change_labels(iris: np.ndarray) -> None:
    threads, labels = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            labels.append(ClAM(3, **QUICK).fit(iris).labels_)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*labels)


def test_the_number_of_threads_is_restored(iris: np.ndarray) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(4) as pool:
            fits = list(
                pool.map(lambda seed: ClAM(3, n_init=2, random_state=0).fit(iris), range(4))
            )
        assert torch.get_num_threads() == 2
        for fit in fits[1:]:
            np.testing.assert_array_equal(fit.cluster_centers_, fits[0].cluster_centers_)
    finally:
        torch.set_num_threads(threads)


def test_a_replica_does_not_depend_on_how_many_there_are(iris: np.ndarray) -> None:
    z = torch.from_numpy(iris)
    start = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def train(replicas: int) -> _completion.TrainingResult:
        beta = torch.full((replicas, 1), 0.5, dtype=torch.float64)
        plan = _completion.CompletionPlan(beta, 1, 1.0, 0.2, True, 0.05, 32, 3, 1.0, False, None, 0)
        return _completion.train(_points.points_of(z, None, None), start[:replicas], plan)

    torch.testing.assert_close(train(6).last[:2], train(2).last, atol=1e-12, rtol=0)


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [2, 3, 16])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.99])
def test_each_row_has_hidden_and_observed_entries(features: int, ratio: float) -> None:
    masks = _completion.draw_masks(500, features, ratio, torch.Generator().manual_seed(0))
    assert masks.any(1).all()
    assert not masks.all(1).any()
    assert masks.any(0).all()
    if features == 16 and ratio == 0.2:
        assert masks.float().mean() == pytest.approx(0.2, abs=0.02)


def test_a_single_feature_is_not_hidden() -> None:
    assert not _completion.draw_masks(9, 1, 0.5, torch.Generator()).any()
    x = np.r_[np.zeros(20), np.ones(20) * 9].reshape(-1, 1) + np.linspace(0, 0.1, 40)[:, None]
    labels = ClAM(2, random_state=0).fit_predict(x)
    assert len(set(labels[:20])) == len(set(labels[20:])) == 1
    assert labels[0] != labels[-1]


# ---- completion ----------------------------------------------------------------------------------


def test_complete_recalls_hidden_entries_and_keeps_the_others() -> None:
    x = StandardScaler().fit_transform(load_wine().data)
    model = ClAM(12, random_state=0).fit(x)
    hidden = x.copy()
    missing = np.random.default_rng(0).random(x.shape) < 0.2
    hidden[missing] = np.nan
    completed = model.complete(hidden)
    np.testing.assert_array_equal(completed[~missing], x[~missing])
    assert np.isnan(hidden[missing]).all()
    error = np.sqrt(np.square(completed - x)[missing].mean())
    assert error < 0.85 * np.sqrt(np.square(x)[missing].mean())


def test_complete_of_a_row_without_any_entry_is_finite(fitted: ClAM, iris: np.ndarray) -> None:
    row = np.full((1, 4), np.nan)
    assert np.isfinite(fitted.complete(row)).all()
    np.testing.assert_array_equal(fitted.complete(iris), iris)
    with pytest.raises(ValueError, match=r"infinity.*row 0, column 2"):
        fitted.complete(np.array([[0, 1, np.inf, np.nan]]))


# ---- containers and dtypes -----------------------------------------------------------------------


def test_tensors_in_tensors_out(iris: np.ndarray, fitted: ClAM) -> None:
    x = torch.from_numpy(iris).requires_grad_()
    model = ClAM(3, **QUICK).fit(x)
    for result in (
        model.cluster_centers_,
        model.transform(x),
        model.predict_proba(x),
        model.energy(x),
    ):
        assert isinstance(result, torch.Tensor)
        assert not result.requires_grad
    assert model.labels_.dtype == model.predict(x).dtype == torch.int64
    np.testing.assert_array_equal(model.labels_.numpy(), fitted.labels_)
    np.testing.assert_array_equal(model.predict(iris), fitted.labels_)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_narrow_tensors_become_float32(dtype: torch.dtype) -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).mul(20).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert ClAM(2, **QUICK).fit(x).cluster_centers_.dtype == torch.float32


def test_int8_does_not_wrap_around() -> None:
    x = np.repeat(np.array([[-128, -128], [127, 127]], np.int8), 10, axis=0)
    model = ClAM(2, **QUICK).fit(x)
    np.testing.assert_allclose(np.sort(model.cluster_centers_, 0), [[-128] * 2, [127] * 2], atol=2)


@pytest.mark.parametrize(
    "kind", ["fortran", "reversed", "readonly", "big-endian", "list", "longdouble"]
)
def test_unusual_arrays_give_the_same_labels(iris: np.ndarray, fitted: ClAM, kind: str) -> None:
    readonly = iris.copy()
    readonly.flags.writeable = False
    x = {
        "fortran": np.asfortranarray(iris),
        "reversed": iris[::-1].copy()[::-1],
        "readonly": readonly,
        "big-endian": iris.astype(">f8"),
        "list": iris.tolist(),
        "longdouble": iris.astype(np.longdouble),
    }[kind]
    np.testing.assert_array_equal(ClAM(3, **QUICK).fit(x).labels_, fitted.labels_)


def test_frames_and_names(iris: np.ndarray, fitted: ClAM) -> None:
    frame = pd.DataFrame(iris, columns=list("abcd"))
    model = ClAM(3, **QUICK).fit(frame)
    np.testing.assert_array_equal(model.labels_, fitted.labels_)
    assert list(model.feature_names_in_) == list("abcd")
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[list("badc")])
    out = model.set_output(transform="pandas").transform(frame)
    assert list(out.columns) == ["clam0", "clam1", "clam2"]


def test_float32_fits_predict_float64_and_back(iris: np.ndarray) -> None:
    single, double = ClAM(3, **QUICK).fit(iris.astype("f4")), ClAM(3, **QUICK).fit(iris)
    assert single.cluster_centers_.dtype == single.transform(iris.astype("f4")).dtype == np.float32
    np.testing.assert_array_equal(single.predict(iris), double.predict(iris.astype("f4")))


@pytest.mark.parametrize("power", [120, -120])
def test_powers_of_two_change_nothing_in_float32(iris: np.ndarray, power: int) -> None:
    x = iris.astype(np.float32)
    plain, far = ClAM(3, **QUICK).fit(x), ClAM(3, **QUICK).fit(x * np.float32(2.0**power))
    np.testing.assert_array_equal(plain.labels_, far.labels_)
    np.testing.assert_array_equal(
        far.cluster_centers_, plain.cluster_centers_ * np.float32(2.0**power)
    )


@pytest.mark.parametrize("size", [1e200, 1e-300])
def test_float64_extremes_stay_finite(iris: np.ndarray, fitted: ClAM, size: float) -> None:
    model = ClAM(3, **QUICK).fit(iris * size)
    np.testing.assert_array_equal(model.labels_, fitted.labels_)
    assert np.isfinite(model.cluster_centers_).all()
    np.testing.assert_allclose(model.predict_proba(iris * size).sum(1), 1)


def test_far_from_the_origin_float32_labels_equal_float64s(iris: np.ndarray) -> None:
    x = iris.astype(np.float32) + np.float32(1e5)
    single, double = ClAM(3, **QUICK).fit(x), ClAM(3, **QUICK).fit(x.astype(np.float64))
    assert adjusted_rand_score(single.labels_, double.labels_) == 1.0


# ---- composition ---------------------------------------------------------------------------------


def test_clone_pickle_pipeline_and_search(iris: np.ndarray, fitted: ClAM) -> None:
    assert clone(fitted).get_params() == fitted.get_params()
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(iris), fitted.labels_)
    pipe = make_pipeline(StandardScaler(), ClAM(3, **QUICK))
    assert len(set(pipe.fit_predict(load_iris().data))) == 3
    grid = GridSearchCV(ClAM(**QUICK), {"n_clusters": [1, 3]}, cv=2).fit(iris)
    assert grid.best_params_ == {"n_clusters": 3}


def test_callable_and_array_init(iris: np.ndarray) -> None:
    start = iris[[0, 60, 120]]
    by_array = ClAM(3, init=start, **QUICK).fit(iris)
    by_call = ClAM(3, init=lambda x, k, random_state: start, **QUICK).fit(iris)
    np.testing.assert_array_equal(by_array.cluster_centers_, by_call.cluster_centers_)


def test_prints_and_logs_nothing(iris: np.ndarray, capfd: pytest.CaptureFixture) -> None:
    ClAM(3, **QUICK).fit(iris).predict(iris)
    assert capfd.readouterr() == ("", "")


def test_verbose_shows_progress_on_stderr(iris: np.ndarray, capfd: pytest.CaptureFixture) -> None:
    ClAM(3, verbose=1, **QUICK).fit(iris)
    out, err = capfd.readouterr()
    assert out == ""
    assert "ClAM" in err
