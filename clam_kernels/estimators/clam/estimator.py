# SPDX-License-Identifier: Apache-2.0
"""ClAM: clustering by the recursion of an associative memory, trained by completing masked rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..._core.warn import warn
from ..common.base import FitPredict, keeps_state_on_failure
from ..common.columns import WARNED_CONTRAST, frame_of, warn_of_units
from ..common.frame import Frame
from ..common.progress import ProgressBar
from ..common.rows import Rows, backend_of, read_rows, read_weight, weighted_sum
from ..common.scale import scale_number
from ..common.settings import check_enough_rows
from ..common.threads import small_on_one_thread, threads_for
from . import streaming as streaming
from .model_file import ClamFile
from .points import Points
from .progress import BatchProgress, FitProgress
from .recall import COMPLETION, Recall
from .search import SearchResult, search
from .selection import COLUMNS, ROLES, SILHOUETTE_ROWS
from .settings import CONSTRAINTS, ClAMSettings
from .start import gap_of
from .whole import points_of_search, through_all


class ClAM(Recall, ClamFile, ClassNamePrefixFeaturesOutMixin, FitPredict, BaseEstimator):
    """Clustering with associative memories.

    The memories rho_k are trained so that the recursion v <- v + step (softmax_k(-beta |v -
    rho_k|^2) @ rho - v), started from rows with hidden entries, restores those entries (Saha,
    Krotov, Zaki, Ram 2023, arXiv 2306.03209). The fit standardises columns in different units
    (`standardize`); results are in the units of X.

    Parameters
    ----------
    n_clusters : int, default 8
        Number of memories K.
    recipe : "default" or "paper", default "default"
        The values of parameters that are None. "default" has k-means starts, rounds of training and
        of Lloyd's iterations, and a choice by silhouette among partitions that use all clusters and
        whose inertia is near the least one. "paper" is the published procedure (normal random
        start, 10 steps of .1, batches of 8, the published learning-rate schedule, labels by the
        recursion). Its numbers are in absolute units: in deviations of the columns where the fit
        standardises, else in units of X.
    init : "k-means++", "random", "normal", array [K, D] or callable, default by recipe
        Start: k-means++ seeding, random rows, the paper's normal(.1, .1) around the mean, an array
        of memories, or `init(X, n_clusters, random_state)`.
    n_init : int, default by recipe (32; paper 4)
        Number of replicas, which are leading dims of one op call.
    max_iter : int, default by recipe (50; paper 200)
        Number of epochs. The default recipe divides them into five rounds; between rounds it copies
        the best replicas, and in most copies one memory jumps to a far row.
    am_share : float in [0, 1], default .5
        Share of the replicas of the default recipe that train by completion. The others run Lloyd's
        iterations, the limit of the training for beta to infinity.
    batch_size : int, default by recipe (512; paper 8)
        Rows of a training batch; about so many in the default recipe, whose batches have one size.
    beta : float > 0, unit 1/|x|^2, default by recipe
        Inverse temperature of training and of `beta_`. Default: replicas use 1, 3 and 10 divided by
        the gap of the data in turn (paper: .55, .75, .95, 1.2).
    steps, step : int >= 1 and float in (0, 2], default by recipe (1 and 1.0; paper 10 and .1)
        Number and size of the steps of the recursion in training, and of the labels of the paper's
        recipe.
    mask_ratio : float in (0, 1), default by recipe (.2)
        Share of the entries that training hides, at least one of each row.
    clamp : bool, default True
        Whether the recursion of the training updates hidden entries alone.
    learning_rate : float > 0, default by recipe (.05; paper .01)
        Learning rate of Adam, in units of each column's deviation (paper: absolute, the same for
        all columns).
    select : "silhouette", "inertia" or "loss", default "silhouette"
        The figure by which one replica is chosen. In the default recipe a replica counts only if it
        uses all clusters and, for "silhouette", if its inertia is at most `inertia_guard` times the
        least one.
    inertia_guard : float >= 1 or None, default 1.05
        Limit of the inertia in a choice by silhouette (see `select`), which may choose small
        clusters of outliers without it. None is no limit, as in the paper's recipe.
    min_cluster_size : int or float > 0, default 1
        Least number of rows of a cluster that counts as used (least weight, in units of the least
        weight of a row if that is below 1). A ConvergenceWarning says that every partition that was
        tried has smaller clusters.
    precision : "highest", "high", "medium" or None, default None
        Precision of the matrix products; None is the setting of torch.
    standardize : "auto", True or False, default "auto"
        Whether distances divide each column by its deviation. "auto" standardises where the spread
        of one column is more than 256 times that of another, as in tables of different units, but
        not for pixels of 8 bits. The spread of a column is its deviation, or the median distance of
        its entries from its median, whichever differs less between the columns. With False a fit
        warns where spreads differ by a factor of more than 1000. Set True where columns have
        different units but similar spreads.
    search_rows : int >= 1, default 20000
        For more rows than this, and than 100 K, the default recipe searches on a sample of that
        size, and then runs Lloyd's iterations of all rows from the memories of the search.
    device : str, default "auto"
        "auto" is the tensor's device, for arrays a GPU if there is one. A device that this machine
        does not have raises.
    random_state : int, RandomState or None, default None
        An int gives the same bits on the same device.
    verbose : int, default 0
        1 shows a progress bar over epochs, or over the batches of a `partial_fit`, on stderr (needs
        tqdm).
    callbacks : callable, object or list of them, optional
        Called after every epoch as `callback(estimator, info)`; a true result ends the fit. `info`
        is a dict of round, epoch, loss (mean over the replicas that train) and candidates (number
        so far). `partial_fit` calls it after every batch: epoch counts all batches so far, round
        and candidates are 0, and a true result ends the call. Objects may have some of
        `on_fit_begin(estimator)`, `on_iteration(estimator, info)` and `on_fit_end(estimator)`.

    Attributes
    ----------
    cluster_centers_ : array [K, D]
        The memories: the means of their rows, or, where the means have a lower score, memories
        beyond their rows (docs/clam.md). In units of X, and inside the observed range of each
        column.
    scale_ : array [D], float64
        The divisor of each column in distances: the column's deviation divided by the root mean
        square of all deviations where the fit standardises, else 1. Every distance of the model,
        also in `inertia_`, `gap_`, `beta_` and `candidates_`, is |(x - rho_k) / scale_|.
    labels_ : array [N]
        Label of each training row.
    inertia_ : float
        Weighted sum of squared distances of the rows to the memory of their label. Where memories
        are beyond their rows, it is larger than the inertia about the means of the labels, which is
        `candidates_["inertia"][candidates_["chosen"]]`.
    candidates_ : dict of arrays [C]
        Every replica each time it was measured: round (0 is the start), replica, role ("start",
        "lloyd", "am"), beta, loss, silhouette (on one fixed sample), inertia (about the means of
        its own labels), clusters_used, counts (uses all clusters, inside the guard), chosen.
    beta_ : float
        Inverse temperature of `predict_proba` and `energy`: the parameter, or 3 / gap_ (paper: that
        of the chosen replica).
    gap_ : float
        Median over rows of second-nearest minus nearest squared distance.
    n_clusters_used_ : int
        Number of distinct labels; a ConvergenceWarning says when it is below n_clusters.
    loss_curve_ : array [n_iter_]
        Mean loss over the replicas that train, for each epoch (paper: loss of the chosen replica).
    n_iter_ : int
        Epochs run.
    device_, backend_ : str
        Device and backend of the fit.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.preprocessing import StandardScaler
    >>> from clam_kernels import ClAM
    >>> X = StandardScaler().fit_transform(load_iris().data)
    >>> model = ClAM(n_clusters=3, random_state=0).fit(X)
    >>> model.n_clusters_used_
    3
    >>> model.predict_proba(X[:1]).shape
    (1, 3)
    """

    _parameter_constraints = CONSTRAINTS

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        recipe: str = "default",
        init: Any = None,
        n_init: int | None = None,
        max_iter: int | None = None,
        batch_size: int | None = None,
        beta: float | None = None,
        steps: int | None = None,
        step: float | None = None,
        mask_ratio: float | None = None,
        clamp: bool = True,
        learning_rate: float | None = None,
        select: str = "silhouette",
        inertia_guard: float | None = 1.05,
        min_cluster_size: float = 1,
        am_share: float = 0.5,
        standardize: str | bool = "auto",
        search_rows: int = 20_000,
        precision: str | None = None,
        device: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
        callbacks: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.recipe = recipe
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.beta = beta
        self.steps = steps
        self.step = step
        self.mask_ratio = mask_ratio
        self.clamp = clamp
        self.learning_rate = learning_rate
        self.select = select
        self.inertia_guard = inertia_guard
        self.min_cluster_size = min_cluster_size
        self.am_share = am_share
        self.standardize = standardize
        self.search_rows = search_rows
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.callbacks = callbacks

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def candidates_(self) -> dict[str, np.ndarray]:
        """The table of candidates by columns: every replica each time it was scored."""
        check_is_fitted(self, "cluster_centers_")
        rows = np.asarray(self._candidates)
        table = dict(zip(COLUMNS, rows.T, strict=True))
        squared = 2 * self._frame.unit
        for name, power in (("beta", -squared), ("loss", squared), ("inertia", squared)):
            table[name] = np.ldexp(table[name], power)
        for name in ("round", "replica", "clusters_used"):
            table[name] = table[name].astype(np.int64)
        table["role"] = np.array(ROLES)[table["role"].astype(np.int64)]
        table["chosen"] = table["counts"] == 2
        table["counts"] = table["counts"] > 0
        return table

    @property
    def scale_(self) -> Any:
        """The divisor of each column in a distance between two rows."""
        check_is_fitted(self, "cluster_centers_")
        centers, scale = self.cluster_centers_, self._frame.scale
        return scale.to(centers.device) if isinstance(centers, Tensor) else scale.cpu().numpy()

    # ---- fitting -------------------------------------------------------------------------------

    def _work(self, rows: int, features: int) -> int:
        """Multiply-adds of the largest product of a fit, maybe that of the silhouettes."""
        return rows * features * max(int(self.n_clusters), min(rows, SILHOUETTE_ROWS))

    @keeps_state_on_failure
    @small_on_one_thread
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> ClAM:
        """Train the memories of X [N, D].

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            Finite values, NaN for a missing entry; every column needs an observed one. A
            memory-mapped or read-only array is read block by block.
        y : ignored
        sample_weight : array-like [N], >= 0, optional
            How often each row counts.

        Returns
        -------
        ClAM
            The estimator.

        Raises
        ------
        ValueError
            X has inf (the message names the first) or a column without observed entry, fewer rows
            than clusters, no feature; a parameter or a weight does not fit.
        TypeError
            n_clusters is True, a callback is not callable, X is sparse.
        BackendUnavailableError
            This machine does not have the device.
        """
        self._validate_params()
        settings = self._settings()
        rows = read_rows(self, X, device=settings.device, reset=True)
        check_enough_rows(len(rows), settings.n_clusters)
        weight = read_weight(sample_weight, rows)
        seed = settings.draw_seed()
        names = getattr(self, "feature_names_in_", None)
        frame = frame_of(rows, weight, names, settings.standardize)
        warn_of_units(frame)
        points, is_whole = points_of_search(settings, rows, weight, frame, seed)
        settings.callbacks.fit_begin()
        with ProgressBar(settings.verbose, "ClAM", settings.max_iter) as bar:
            progress = FitProgress(bar, settings.callbacks, frame.unit)
            result = search(settings, points, frame, X, seed, progress)
        if not is_whole:
            result = through_all(settings, result, rows, weight, frame)
        self._store(settings, rows, weight, frame, points, result)
        settings.callbacks.fit_end()
        return self

    @keeps_state_on_failure
    @small_on_one_thread
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> ClAM:
        """Train the memories on another batch X [N, D].

        The first call needs at least as many rows as clusters, and computes memories from them.
        Then every `batch_size` rows update two sets of memories: one is the running means of the
        rows that each memory wins, the other trains by completion. The second is the answer where
        its silhouette is better and its inertia inside `inertia_guard`. The estimator stores a
        sample of all rows so far (2,000, or 100 for each cluster), measures both sets on it, and
        replaces both where a search on it gives better memories: the order of the rows does not
        matter. The scale of the columns is that of the sample, within a factor of 2.

        After `fit` or `load` the memories are those of the model. `labels_` and `inertia_` are
        those of the batch, `n_iter_` and `loss_curve_` of all steps; `n_clusters_used_` is of the
        sample.

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            As in `fit`.
        y : ignored
        sample_weight : array-like [N], >= 0, optional
            How often each row counts.

        Returns
        -------
        ClAM
            The estimator.

        Raises
        ------
        ValueError, TypeError, BackendUnavailableError
            As in `fit`; the first batch has fewer rows than clusters.
        """
        self._validate_params()
        settings = self._settings()
        is_fitted = hasattr(self, "cluster_centers_")
        rows = read_rows(self, X, device=settings.device, reset=not is_fitted)
        weight = read_weight(sample_weight, rows)
        if not is_fitted:
            check_enough_rows(len(rows), settings.n_clusters)
        elif len(self.cluster_centers_) != settings.n_clusters:
            raise ValueError(
                f"n_clusters: expected {len(self.cluster_centers_)}, as it was fitted, got"
                f" {settings.n_clusters}; fit anew"
            )
        stream = self._stream_so_far(settings, rows, weight, X)
        losses_before = list(self.loss_curve_) if is_fitted else []
        settings.callbacks.fit_begin()
        size = settings.batch_size
        with (
            ProgressBar(settings.verbose, "ClAM", -(-len(rows) // size), "batch") as bar,
            threads_for(stream.won.numel() * size),
        ):
            progress = BatchProgress(bar, settings.callbacks, len(losses_before))
            stream, losses = streaming.advance(settings, stream, rows, weight, progress)
        self._stream = stream
        if not is_fitted or self._frame.contrast <= WARNED_CONTRAST:
            warn_of_units(stream.frame)
        self._store_memories(settings, rows, stream.frame, stream.answer(), stream.gap)
        self.loss_curve_ = np.array([*losses_before, *losses])
        self._candidates = np.zeros((0, len(COLUMNS)))
        self.n_iter_ = len(self.loss_curve_)
        self._store_labels(settings, rows, weight)
        self._held = stream.won.cpu().numpy()
        self.n_clusters_used_ = stream.used
        settings.callbacks.fit_end()
        return self

    def _stream_so_far(
        self, settings: ClAMSettings, rows: Rows, weight: Tensor | None, X: Any
    ) -> streaming.StreamState:
        """The stream of the last call, or a new one: from a fit, else from the first batch."""
        if hasattr(self, "_stream"):
            return self._stream
        if not hasattr(self, "cluster_centers_"):
            names = getattr(self, "feature_names_in_", None)
            return streaming.begin(settings, rows, weight, X, names)
        memories = self._memories(rows.dtype, rows.device)
        won = torch.from_numpy(np.array(self._held)).to(memories.device)
        gap = COMPLETION / self._sharpness[1]
        return streaming.resume(settings.draw_seed(), memories, self._frame, won, gap)

    def _store(
        self,
        settings: ClAMSettings,
        rows: Rows,
        weight: Tensor | None,
        frame: Frame,
        points: Points,
        result: SearchResult,
    ) -> None:
        """Store the attributes of a fit; labels are those of `predict`."""
        self.__dict__.pop("_stream", None)
        squared = 2 * frame.unit  # exponent of a squared length
        gap = gap_of(points, result.memories[None], 0)
        self._store_memories(settings, rows, frame, result.memories, gap, result.beta)
        self.loss_curve_ = np.array([scale_number(loss, squared) for loss in result.curve])
        self._candidates = result.table
        self.n_iter_ = len(result.curve)
        self._store_labels(settings, rows, weight)
        if self.n_clusters_used_ < settings.n_clusters:
            warn(
                f"{self.n_clusters_used_} of n_clusters={settings.n_clusters} clusters are used: X"
                " has too few distinct rows, or no partition that was tried uses more.",
                ConvergenceWarning,
            )
        elif _has_small_clusters(settings, result):
            warn(
                f"min_cluster_size={settings.min_cluster_size}: no partition that was tried has"
                f" n_clusters={settings.n_clusters} clusters of this size; the chosen one has"
                " smaller clusters.",
                ConvergenceWarning,
            )

    def _store_memories(
        self,
        settings: ClAMSettings,
        rows: Rows,
        frame: Frame,
        memories: Tensor,
        gap: float,
        published_beta: float | None = None,
    ) -> None:
        """Store memories that are in a frame, and the betas: by the gap unless the parameter or
        the published procedure has one.
        """
        self.cluster_centers_ = rows.give(frame.data(memories).to(rows.result))
        self._frame = frame
        if settings.beta is None and not settings.is_published:
            beta = 3.0 / gap
        elif settings.beta is None and published_beta is not None:
            beta = published_beta
        else:
            beta = settings.betas(frame)[0]
        # in the frame, as betas in units of the data may be 0 or inf
        self._sharpness = [beta, COMPLETION / gap]
        squared = 2 * frame.unit
        self.gap_, self.beta_ = scale_number(gap, squared), scale_number(beta, -squared)

    def _store_labels(self, settings: ClAMSettings, rows: Rows, weight: Tensor | None) -> None:
        self.device_, self.backend_ = str(rows.device), backend_of("am_recursion", rows)
        self._n_features_out = settings.n_clusters
        labels, sqdist = self._nearest(rows, settings)
        self.labels_ = rows.give_labels(labels)
        weights = np.ones(len(rows)) if weight is None else weight.cpu().numpy()
        won = np.bincount(labels.cpu().numpy(), weights, minlength=settings.n_clusters)
        self._held = np.repeat(won[:, None], rows.features, axis=1)
        self.inertia_ = scale_number(weighted_sum(sqdist, weight), 2 * self._frame.unit)
        self.n_clusters_used_ = len(labels.unique())


def _has_small_clusters(settings: ClAMSettings, result: SearchResult) -> bool:
    """Whether the chosen partition has clusters below `min_cluster_size`."""
    required = 1 if settings.is_published else settings.n_clusters
    (chosen,) = result.table[result.table[:, COLUMNS.index("counts")] == 2]
    return bool(chosen[COLUMNS.index("clusters_used")] < required)
