# SPDX-License-Identifier: Apache-2.0
"""KMeans with scikit-learn's interface, exact labels and the same bits at every run."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..._core.backend import PRECISIONS
from ..._core.spec import explain
from ..._core.warn import warn
from ...metrics import unmasked
from ..common import callbacks, sparse_rows
from ..common.base import keeps_state_on_failure
from ..common.files import ModelFile
from ..common.numbers import as_numbers
from ..common.rows import Rows, in_scale, normalised, read_rows, read_weight
from ..common.scale import rescaled
from ..common.threads import small_on_one_thread, threads_for
from .lloyd import Rule, Run, inertia_of, labels_of, lloyd, same_clustering
from .minibatch import minibatch
from .seeding import start

STARTS = {"k-means++", "k-means||", "random"}
# Starts beyond these have no squared distances in float64.
LARGEST = {torch.float32: 3e38, torch.float64: 1e150}


def _numbers(given: Any) -> Tensor:
    """Centres that a user gave, in float64."""
    if isinstance(given, Tensor):
        return given.detach().double()
    given = unmasked("init", given.toarray() if hasattr(given, "toarray") else given)
    try:
        found = np.array(as_numbers("init", given), dtype=np.float64)
    except (TypeError, ValueError):
        text = f"init: expected numbers [K, D], got a {type(given).__name__} that has none"
        raise ValueError(text) from None
    if found.ndim != 2:
        shape = list(found.shape)
        raise ValueError(f"init: expected numbers [K, D], got {type(given).__name__} {shape}")
    return torch.from_numpy(found)


class KMeans(
    ModelFile, ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator
):
    """k-means clustering: scikit-learn's KMeans on tensors, arrays and files, on CPU and GPU.

    Labels are those of float64 on the given values, lowest index on ties, whatever the precision of
    the matrix products; sums are in a fixed order, so one seed gives the same bits.

    Parameters
    ----------
    n_clusters : int, default 8
        Number of centres K.
    init : "k-means++", "k-means||", "random", array [K, D] or callable, default "k-means++"
        Start. "k-means++" is the greedy one and draws the rows that scikit-learn's draws; beyond
        1e11 multiply-adds k-means|| takes its place. Callables are called as `init(X, n_clusters,
        random_state=...)`.
    n_init : "auto" or int, default "auto"
        Starts, of which the one with the least inertia is kept. "auto" is 1 for k-means++,
        k-means|| and arrays, else 10 (3 for minibatch).
    max_iter : int, default 300
        Iterations of one start (minibatch: passes over the rows).
    tol : float >= 0, default 1e-4
        Stops when the sum of the centres' squared moves is at most tol times the mean variance of
        the features. Minibatch has no use for it.
    verbose : int, default 0
        1 prints iterations and their inertia, as scikit-learn does.
    random_state : int, RandomState or None, default None
        An int gives the same bits on the same device.
    copy_x : bool, default True
        Accepted and ignored: X is never changed and never copied.
    algorithm : "lloyd", "elkan" or "minibatch", default "lloyd"
        "elkan" runs as "lloyd", whose results it has.
    metric : "euclidean" or "cosine", default "euclidean"
        "cosine" normalises rows and centres (spherical k-means); a row of zeros has label 0 and
        counts for nothing.
    empty : "relocate", "split" or "keep", default "relocate"
        What a cluster without rows gets: "relocate" the row that is farthest from its own centre,
        "split" one of two centres beside that of a large cluster, "keep" nothing. Minibatch
        relocates at its end, for "split" too.
    batch_size : int, default 1024
        Rows of a step of minibatch.
    precision : "highest", "high", "medium" or None, default None
        Of the matrix products; labels are the same in all. None follows torch.
    device : str, default "auto"
        "auto" is the tensor's device, for arrays a GPU if there is one. A device that is not there
        raises, it never falls back.
    chunk_rows : int or None, default None
        Rows that are read at once from a file, a sparse matrix or for the cosine metric; given, all
        data are read so.
    callbacks : callable, object or list of them, optional
        Called after every iteration as `callback(estimator, info)`, info a dict of start,
        iteration and shift; returning what is true ends the fit there. Objects may have some of
        `on_fit_begin(estimator)`, `on_iteration(estimator, info)` and `on_fit_end(estimator)`.

    Attributes
    ----------
    cluster_centers_ : array [K, D]
        In the dtype of X if that is float32 or float64.
    labels_ : array [N]
        Label of each row: its nearest of `cluster_centers_`.
    inertia_ : float
        Sum of weighted squared distances to the centre of the label (cosine: half of it, over unit
        rows); inf where that is beyond the floats.
    n_iter_ : int
        Iterations of the start that was kept.
    n_relocated_ : int
        Clusters without rows that were relocated or split off, over its iterations.
    device_, backend_ : str
        What ran.
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

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "init": [StrOptions(STARTS), callable, "array-like"],
        "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "random_state": ["random_state"],
        "copy_x": ["boolean"],
        "algorithm": [StrOptions({"lloyd", "elkan", "minibatch"})],
        "metric": [StrOptions({"euclidean", "cosine"})],
        "empty": [StrOptions({"relocate", "split", "keep"})],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "precision": [StrOptions(set(PRECISIONS)), None],
        "device": [str],
        "chunk_rows": [Interval(Integral, 1, None, closed="left"), None],
        "callbacks": "no_validation",  # type: ignore[dict-item]
    }

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
        """Find the centres of X [N, D].

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
            n_clusters is True, a callback is none, X is a sparse tensor.
        BackendUnavailableError
            The device is not there.
        """
        self._validate_params()
        if isinstance(self.n_clusters, bool):
            raise TypeError("n_clusters: expected an int >= 1, got True")
        callbacks.check(self.callbacks)
        rows = read_rows(self, X, reset=True)
        if len(rows) < self.n_clusters:
            raise ValueError(f"n_samples={len(rows)} should be >= n_clusters={self.n_clusters}.")
        weight = read_weight(sample_weight, rows)
        self._resolve()
        random = check_random_state(self.random_state)
        with torch.no_grad():
            rows.frame()
            weight = rows.directed(weight)
            listeners = callbacks.each(self.callbacks)
            callbacks.call(listeners, "on_fit_begin", self)
            with threads_for(rows.tile_work(self.n_clusters)):
                run = self._search(X, rows, weight, random)
            self._store(rows, run)
            callbacks.call(listeners, "on_fit_end", self)
        return self

    def _resolve(self) -> None:
        """The number of starts, and what scikit-learn warns of."""
        named = isinstance(self.init, str)
        given = not named and not callable(self.init)
        several = 3 if self.algorithm == "minibatch" else 10
        once = given or (named and self.init != "random")
        self._n_init = (1 if once else several) if self.n_init == "auto" else self.n_init
        if given and self._n_init != 1:
            warn(
                "Explicit initial center position passed: performing only one init in KMeans"
                f" instead of n_init={self._n_init}.",
                RuntimeWarning,
            )
            self._n_init = 1
        if self.algorithm == "elkan" and self.n_clusters == 1:
            warn(
                "algorithm='elkan' doesn't make sense for a single cluster. Using 'lloyd' instead.",
                RuntimeWarning,
            )

    def _search(
        self, X: Any, rows: Rows, weight: Tensor | None, random: np.random.RandomState
    ) -> Run:
        """The best of all starts."""
        if self.algorithm == "minibatch":
            rule = self._rule(0.0)

            def seed(some: Rows, own: Tensor | None) -> Tensor:
                return self._start(X, some, own, random)

            k, count = self.n_clusters, self._n_init
            return minibatch(rows, weight, seed, k, count, self.batch_size, rule, random)
        starts = []
        for _ in range(self._n_init):
            starts.append(self._start(X, rows, weight, random))
            if self.verbose:
                callbacks.tell("Initialization complete")
        rule = self._rule(self.tol * rows.variance)
        best: Run | None = None
        for run in lloyd(rows, weight, torch.stack(starts), rule, random):
            # rounding alone may make the inertia of the same clusters a little smaller
            if best is None or (
                run.inertia < best.inertia
                and not same_clustering(run.labels, best.labels, self.n_clusters)
            ):
                best = run
        assert best is not None
        return best

    def _rule(self, tolerance: float) -> Rule:
        listeners = callbacks.each(self.callbacks)

        def seen(number: int, iteration: int, shift: float) -> bool:
            info = {"start": number, "iteration": iteration, "shift": shift}
            return callbacks.call(listeners, "on_iteration", self, info)

        tell = callbacks.tell if self.verbose else None
        return Rule(
            self.max_iter, tolerance, self.empty, self.precision, tell, seen if listeners else None
        )

    def _start(
        self, X: Any, rows: Rows, weight: Tensor | None, random: np.random.RandomState
    ) -> Tensor:
        """One start [K, D] in the scale of the rows."""
        if isinstance(self.init, str):
            return start(rows, weight, self.n_clusters, str(self.init), random)
        given = self.init
        if callable(given):
            given = given(X, self.n_clusters, random_state=random)
        centres = _numbers(given).to(rows.device)
        for size, wanted, what in (
            (centres.shape[0], self.n_clusters, "number of clusters"),
            (centres.shape[-1], rows.features, "number of features of the data"),
        ):
            if centres.ndim != 2 or size != wanted:
                raise ValueError(
                    f"The shape of the initial centers {tuple(centres.shape)} does not match the"
                    f" {what} {wanted}."
                )
        if not bool(centres.isfinite().all()):
            raise ValueError("init: expected finite values, got NaN or infinity")
        centres = in_scale(centres, rows.exponent)
        top, most = float(centres.abs().max()), LARGEST[rows.dtype]
        if top > most and not rows.unit_norm:
            got = rescaled(top, -rows.exponent)
            most = rescaled(most, -rows.exponent)
            raise ValueError(
                f"init: expected magnitudes up to {most:.3g} for these X, got {got:.3g}"
            )
        return (normalised(centres) if rows.unit_norm else centres).to(rows.dtype)

    def _store(self, rows: Rows, run: Run) -> None:
        """Learned state in units of the data."""
        centres = in_scale(run.centres, -rows.exponent)
        self.cluster_centers_ = rows.give(centres.to(rows.result))
        self.labels_ = rows.give_labels(run.labels)
        self.inertia_ = rescaled(run.inertia, -2 * rows.exponent)
        self.n_iter_ = run.n_iter
        self.n_relocated_ = run.relocated
        self._n_features_out = self.n_clusters
        self.device_ = str(rows.device)
        probe = torch.zeros(1, rows.features, dtype=rows.dtype, device=rows.device)
        self.backend_ = explain("kmeans_assign", probe).split(": ")[1].split(" at ")[0]
        distinct = len(run.labels.unique())
        if distinct < self.n_clusters:
            why = "Possibly due to duplicate points in X."
            if self.empty == "keep":
                why = "empty='keep' leaves a cluster without rows where it is."
            warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters"
                f" ({self.n_clusters}). {why}",
                ConvergenceWarning,
            )

    # ---- using ---------------------------------------------------------------------------------

    def _read(self, X: Any) -> tuple[Rows, Tensor]:
        """(rows, centres) of one scale and dtype."""
        check_is_fitted(self, "cluster_centers_")
        rows = read_rows(self, X, reset=False)
        centres = self.cluster_centers_
        if not isinstance(centres, Tensor):
            centres = torch.from_numpy(np.array(centres))
        centres = centres.to(rows.device)
        rows.dtype = rows.result = torch.promote_types(rows.dtype, centres.dtype)
        rows.choose_scale(max(rows.top, float(centres.abs().max())))
        centres = in_scale(centres.to(rows.dtype), rows.exponent)
        if rows.exponent < 0:
            rows.refuse_lost(lambda x: x, centres)
        return rows, centres

    def _labels(self, rows: Rows, centres: Tensor) -> Tensor:
        with torch.inference_mode(), threads_for(rows.tile_work(len(centres))):
            return labels_of(rows, centres[None], self.precision)[0]

    @small_on_one_thread
    def predict(self, X: Any) -> Any:
        """Label of each row: the index of the nearest centre.

        Parameters
        ----------
        X : array-like, sparse matrix or Tensor [N, D]

        Returns
        -------
        array [N], int32, or for a tensor Tensor [N], int64, on its device
        """
        rows, centres = self._read(X)
        return rows.give_labels(self._labels(rows, centres))

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit, and the labels of the rows.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.

        Returns
        -------
        array [N], int32, or for a tensor Tensor [N], int64, on its device
            `labels_`.
        """
        return self.fit(X, sample_weight=sample_weight).labels_

    @small_on_one_thread
    def transform(self, X: Any) -> Any:
        """Distance of each row to each centre.

        Parameters
        ----------
        X : array-like, sparse matrix or Tensor [N, D]

        Returns
        -------
        array or Tensor [N, K], unit |x| (cosine: of unit rows)
        """
        rows, centres = self._read(X)
        exact = "donot_use_mm_for_euclid_dist"
        with torch.inference_mode():
            if rows.is_sparse:
                far = sparse_rows.distances(rows, centres, exact=True).sqrt_().mT.contiguous()
                return rows.give(in_scale(far, -rows.exponent).to(rows.dtype))
            parts = [
                torch.cdist(x, centres, compute_mode=exact)
                for _, block in rows.blocks()
                for x in block.split(1 << 14)
            ]
            far = in_scale(torch.cat(parts), -rows.exponent)
            return rows.give(far.to(rows.result))

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit, and the distances of the rows to the centres.

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
        """Minus the weighted sum of squared distances to the nearest centre.

        Parameters
        ----------
        X : array-like, sparse matrix or Tensor [N, D]
        y : ignored
        sample_weight : array-like [N], optional

        Returns
        -------
        float
        """
        rows, centres = self._read(X)
        weight = rows.directed(read_weight(sample_weight, rows))
        inertia = inertia_of(rows, weight, centres, self._labels(rows, centres))
        return -rescaled(inertia, -2 * rows.exponent)
