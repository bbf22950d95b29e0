# SPDX-License-Identifier: Apache-2.0
"""KMeans with scikit-learn's interface, exact labels, and the same bits at every run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..._core.warn import warn
from ...metrics import refuse_masked_entries
from ..common import sparse_rows
from ..common.base import FitPredict, keeps_state_on_failure
from ..common.files import ModelFile
from ..common.numbers import as_numbers
from ..common.progress import print_line
from ..common.rows import Rows, backend_of, in_scale, normalise_rows, read_rows, read_weight
from ..common.scale import scale_number
from ..common.settings import check_enough_rows
from ..common.threads import small_on_one_thread, threads_for
from .lloyd import LloydResult, LloydRule, inertia_of, labels_of, lloyd, same_clustering
from .minibatch import minibatch
from .seeding import start
from .settings import CONSTRAINTS, KMeansSettings

# Largest magnitude of a start by the dtype of the rows: float64 holds its squared distances.
LARGEST = {torch.float32: 3e38, torch.float64: 1e150}


def _array_start(init: Any) -> Tensor:
    """The centroids of the parameter `init`, in float64."""
    if isinstance(init, Tensor):
        return init.detach().double()
    init = refuse_masked_entries("init", init.toarray() if hasattr(init, "toarray") else init)
    try:
        numbers = np.array(as_numbers("init", init), dtype=np.float64)
    except (TypeError, ValueError):
        text = f"init: expected numbers [K, D], got a {type(init).__name__} that has none"
        raise ValueError(text) from None
    if numbers.ndim != 2:
        shape = list(numbers.shape)
        raise ValueError(f"init: expected numbers [K, D], got {type(init).__name__} {shape}")
    return torch.from_numpy(numbers)


class KMeans(
    ModelFile,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    FitPredict,
    BaseEstimator,
):
    """k-means clustering: scikit-learn's KMeans on tensors, arrays and files, on CPU and GPU.

    Labels are those of float64, with the lowest index on ties, for every precision of the matrix
    products. Sums have a fixed order, so one seed gives the same bits.

    Parameters
    ----------
    n_clusters : int, default 8
        Number of centroids K.
    init : "k-means++", "k-means||", "random", array [K, D] or callable, default "k-means++"
        Start. "k-means++" is greedy and draws the rows that scikit-learn draws; beyond 1e11
        multiply-adds k-means|| replaces it. A callable is called as `init(X, n_clusters,
        random_state=...)`.
    n_init : "auto" or int, default "auto"
        Number of starts; the result is that of the least inertia. "auto" is 1 for k-means++,
        k-means|| and arrays, else 10 (3 for minibatch).
    max_iter : int, default 300
        Iterations of one start (minibatch: passes over the rows).
    tol : float >= 0, default 1e-4
        A start has converged when the sum of the centroids' squared moves is at most tol times the
        mean variance of the features. Minibatch does not use it.
    verbose : int, default 0
        1 prints iterations and their inertia, as scikit-learn does.
    random_state : int, RandomState or None, default None
        An int gives the same bits on the same device.
    copy_x : bool, default True
        Ignored: X is never changed and never copied.
    algorithm : "lloyd", "elkan" or "minibatch", default "lloyd"
        "elkan" runs "lloyd", which has the same results.
    metric : "euclidean" or "cosine", default "euclidean"
        "cosine" normalises rows and centroids (spherical k-means); a row of zeros has label 0 and
        weight 0.
    empty : "relocate", "split" or "keep", default "relocate"
        The new centroid of a cluster without rows: for "relocate" the row that is farthest from its
        own centroid, for "split" one of two centroids near that of a large cluster, for "keep" the
        old one. Minibatch relocates at its end, also for "split".
    batch_size : int, default 1024
        Rows of a step of minibatch.
    precision : "highest", "high", "medium" or None, default None
        Precision of the matrix products; labels do not depend on it. None is the setting of torch.
    device : str, default "auto"
        "auto" is the tensor's device, for arrays a GPU if there is one. A device that this machine
        does not have raises.
    chunk_rows : int or None, default None
        Rows that are read at once from a file, a sparse matrix or for the cosine metric; a number
        applies to all data.
    callbacks : callable, object or list of them, optional
        Called after every iteration as `callback(estimator, info)`, with a dict of start, iteration
        and shift; a true result ends the fit. Objects may have some of
        `on_fit_begin(estimator)`, `on_iteration(estimator, info)` and `on_fit_end(estimator)`.

    Attributes
    ----------
    cluster_centers_ : array [K, D]
        In the dtype of X if that is float32 or float64.
    labels_ : array [N]
        Label of each row: its nearest of `cluster_centers_`.
    inertia_ : float
        Sum of weighted squared distances to the centroid of the label (cosine: half of it, over
        unit rows); inf where no float holds it.
    n_iter_ : int
        Iterations of the start of the result.
    n_relocated_ : int
        Number of clusters without rows that were relocated or split off, over its iterations.
    device_, backend_ : str
        Device and backend of the fit.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from clam_kernels import KMeans
    >>> model = KMeans(n_clusters=3, random_state=0).fit(load_iris().data)
    >>> round(model.inertia_, 4)
    78.8557
    """

    _parameter_constraints = CONSTRAINTS

    _arrays = ("cluster_centers_", "labels_")
    _learned = ("n_features_in_", "inertia_", "n_iter_", "n_relocated_", "device_", "backend_")

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: Any = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
        metric: str = "euclidean",
        empty: str = "relocate",
        batch_size: int = 1024,
        precision: str | None = None,
        device: str = "auto",
        chunk_rows: int | None = None,
        callbacks: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.metric = metric
        self.empty = empty
        self.batch_size = batch_size
        self.precision = precision
        self.device = device
        self.chunk_rows = chunk_rows
        self.callbacks = callbacks

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # ---- fitting -------------------------------------------------------------------------------

    def _work(self, rows: int, features: int) -> int:
        """Multiply-adds of one pass."""
        return rows * features * int(self.n_clusters)

    @keeps_state_on_failure
    @small_on_one_thread
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Compute the centroids of X [N, D].

        Parameters
        ----------
        X : array-like, sparse matrix or Tensor [N, D]
            Finite values; a memory-mapped or read-only array is read block by block.
        y : ignored
        sample_weight : array-like [N], >= 0, optional
            How often each row counts; not used by arrays and callables as `init`.

        Returns
        -------
        KMeans
            The estimator.

        Raises
        ------
        ValueError
            X has NaN or inf (the message names the first), fewer rows than clusters, no feature; a
            parameter, a start or a weight does not fit.
        TypeError
            n_clusters is True, a callback is not callable, X is a sparse tensor.
        BackendUnavailableError
            This machine does not have the device.
        """
        self._validate_params()
        settings = self._settings()
        rows = self._read_rows(X, settings, reset=True)
        k = settings.n_clusters
        check_enough_rows(len(rows), k)
        weight = read_weight(sample_weight, rows)
        settings.warn_of_ignored()
        self._n_init = settings.starts  # scikit-learn's tests read it
        random = check_random_state(settings.random_state)
        with torch.no_grad():
            rows.frame()
            weight = rows.mask_zero_rows(weight)
            settings.callbacks.fit_begin()
            with threads_for(rows.tile_work(k)):
                result = _search(settings, X, rows, weight, random)
            self._store(settings, rows, result)
            settings.callbacks.fit_end()
        return self

    def _settings(self) -> KMeansSettings:
        """The parameters of one call; every method reads them anew."""
        return KMeansSettings.of(self)

    def _read_rows(self, X: Any, settings: KMeansSettings, *, reset: bool) -> Rows:
        return read_rows(
            self,
            X,
            reset=reset,
            device=settings.device,
            chunk_rows=settings.chunk_rows,
            unit_norm=settings.is_cosine,
        )

    def _store(self, settings: KMeansSettings, rows: Rows, result: LloydResult) -> None:
        """Store the attributes of a fit, in units of the data."""
        centroids = in_scale(result.centroids, -rows.exponent)
        self.cluster_centers_ = rows.give(centroids.to(rows.result))
        self.labels_ = rows.give_labels(result.labels)
        self.inertia_ = scale_number(result.inertia, -2 * rows.exponent)
        self.n_iter_ = result.n_iter
        self.n_relocated_ = result.relocated
        self._n_features_out = settings.n_clusters
        self.device_, self.backend_ = str(rows.device), backend_of("kmeans_assign", rows)
        distinct = len(result.labels.unique())
        if distinct < settings.n_clusters:
            why = "Possibly due to duplicate points in X."
            if settings.empty == "keep":
                why = "empty='keep' leaves a cluster without rows where it is."
            warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters"
                f" ({settings.n_clusters}). {why}",
                ConvergenceWarning,
            )

    # ---- use -----------------------------------------------------------------------------------

    def _read(self, X: Any, settings: KMeansSettings) -> tuple[Rows, Tensor]:
        """(rows, centroids) of one scale and dtype."""
        check_is_fitted(self, "cluster_centers_")
        rows = self._read_rows(X, settings, reset=False)
        centroids = self.cluster_centers_
        if not isinstance(centroids, Tensor):
            centroids = torch.from_numpy(np.array(centroids))
        centroids = centroids.to(rows.device)
        rows.dtype = rows.result = torch.promote_types(rows.dtype, centroids.dtype)
        rows.choose_scale(max(rows.top, float(centroids.abs().max())))
        centroids = in_scale(centroids.to(rows.dtype), rows.exponent)
        if rows.exponent < 0:
            rows.refuse_underflow(lambda x: x, centroids)
        return rows, centroids

    @small_on_one_thread
    def predict(self, X: Any) -> Any:
        """Label of each row: the index of the nearest centroid.

        Parameters
        ----------
        X : array-like, sparse matrix or Tensor [N, D]

        Returns
        -------
        array [N], int32, or for a tensor Tensor [N], int64, on its device
        """
        settings = self._settings()
        rows, centroids = self._read(X, settings)
        return rows.give_labels(_labels(settings, rows, centroids))

    @small_on_one_thread
    def transform(self, X: Any) -> Any:
        """Distance of each row to each centroid.

        Parameters
        ----------
        X : array-like, sparse matrix or Tensor [N, D]

        Returns
        -------
        array or Tensor [N, K], unit |x| (cosine: of unit rows)
        """
        rows, centroids = self._read(X, self._settings())
        exact = "donot_use_mm_for_euclid_dist"
        with torch.inference_mode():
            if rows.is_sparse:
                distances = sparse_rows.distances(rows, centroids, exact=True)
                distances = distances.sqrt_().mT.contiguous()
                return rows.give(in_scale(distances, -rows.exponent).to(rows.dtype))
            parts = [
                torch.cdist(x, centroids, compute_mode=exact)
                for _, block in rows.blocks()
                for x in block.split(1 << 14)
            ]
            distances = in_scale(torch.cat(parts), -rows.exponent)
            return rows.give(distances.to(rows.result))

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit, and the distances of the rows to the centroids.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.

        Returns
        -------
        array or Tensor [N, K]
        """
        return self.fit(X, sample_weight=sample_weight).transform(X)

    @small_on_one_thread
    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the weighted sum of squared distances to the nearest centroid.

        Parameters
        ----------
        X : array-like, sparse matrix or Tensor [N, D]
        y : ignored
        sample_weight : array-like [N], optional

        Returns
        -------
        float
        """
        settings = self._settings()
        rows, centroids = self._read(X, settings)
        weight = rows.mask_zero_rows(read_weight(sample_weight, rows))
        inertia = inertia_of(rows, weight, centroids, _labels(settings, rows, centroids))
        return -scale_number(inertia, -2 * rows.exponent)


def _search(
    settings: KMeansSettings,
    X: Any,
    rows: Rows,
    weight: Tensor | None,
    random: np.random.RandomState,
) -> LloydResult:
    """The best of all starts."""
    k, count = settings.n_clusters, settings.starts
    if settings.algorithm == "minibatch":

        def seed(sample: Rows, weight_of_sample: Tensor | None) -> Tensor:
            return _start(settings, X, sample, weight_of_sample, random)

        rule = _rule(settings, 0.0)
        return minibatch(rows, weight, seed, k, count, settings.batch_size, rule, random)
    starts = []
    for _ in range(count):
        starts.append(_start(settings, X, rows, weight, random))
        if settings.verbose:
            print_line("Initialization complete")
    rule = _rule(settings, settings.tol * rows.variance)
    best: LloydResult | None = None
    for result in lloyd(rows, weight, torch.stack(starts), rule, random):
        # rounding alone may make the inertia of the same clusters a little smaller
        if best is None or (
            result.inertia < best.inertia and not same_clustering(result.labels, best.labels, k)
        ):
            best = result
    assert best is not None
    return best


def _rule(settings: KMeansSettings, tolerance: float) -> LloydRule:
    callbacks = settings.callbacks

    def on_iteration(start_number: int, iteration: int, shift: float) -> bool:
        info = {"start": start_number, "iteration": iteration, "shift": shift}
        return callbacks.iteration(info)

    return LloydRule(
        settings.max_iter,
        tolerance,
        settings.empty,
        settings.precision,
        print_line if settings.verbose else None,
        on_iteration if callbacks else None,
    )


def _start(
    settings: KMeansSettings,
    X: Any,
    rows: Rows,
    weight: Tensor | None,
    random: np.random.RandomState,
) -> Tensor:
    """One start [K, D] in the scale of the rows."""
    k, init = settings.n_clusters, settings.init
    if isinstance(init, str):
        return start(rows, weight, k, str(init), random)
    if callable(init):
        init = init(X, k, random_state=random)
    centroids = _array_start(init).to(rows.device)
    for size, expected, what in (
        (centroids.shape[0], k, "number of clusters"),
        (centroids.shape[-1], rows.features, "number of features of the data"),
    ):
        if centroids.ndim != 2 or size != expected:
            raise ValueError(
                f"The shape of the initial centers {tuple(centroids.shape)} does not match the"
                f" {what} {expected}."
            )
    if not bool(centroids.isfinite().all()):
        raise ValueError("init: expected finite values, got NaN or infinity")
    centroids = in_scale(centroids, rows.exponent)
    top, limit = float(centroids.abs().max()), LARGEST[rows.dtype]
    if top > limit and not rows.unit_norm:
        got = scale_number(top, -rows.exponent)
        limit = scale_number(limit, -rows.exponent)
        raise ValueError(f"init: expected magnitudes up to {limit:.3g} for these X, got {got:.3g}")
    return (normalise_rows(centroids) if rows.unit_norm else centroids).to(rows.dtype)


def _labels(settings: KMeansSettings, rows: Rows, centroids: Tensor) -> Tensor:
    with torch.inference_mode(), threads_for(rows.tile_work(len(centroids))):
        return labels_of(rows, centroids[None], settings.precision)[0]
