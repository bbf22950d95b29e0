# SPDX-License-Identifier: Apache-2.0
"""ClAM: clustering by the recursion of an associative memory, trained by completing masked rows."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..._core.backend import PRECISIONS
from ..._core.warn import warn
from ..common.base import keeps_state_on_failure
from ..common.frame import Frame
from ..common.progress import ProgressBar
from ..common.rows import Rows, backend_of, read_rows, read_weight, weighted_sum
from ..common.scale import rescaled
from ..common.threads import small_on_one_thread, threads_for
from . import streaming as streaming
from .columns import WARNED_CONTRAST, frame_of
from .model_file import ClamFile
from .points import Points
from .progress import BatchProgress, FitProgress
from .recall import COMPLETION, Recall
from .search import SearchResult, search
from .selection import COLUMNS, ROLES, SILHOUETTE_ROWS
from .settings import RECIPES, ClAMSettings
from .start import gap_of
from .whole import sampled, through_all


class ClAM(Recall, ClamFile, ClassNamePrefixFeaturesOutMixin, ClusterMixin, BaseEstimator):
    """Clustering with associative memories.

    The memories rho_k are trained so that the recursion v <- v + step (softmax_k(-beta |v -
    rho_k|^2) @ rho - v), started from rows with hidden entries, restores those entries (Saha,
    Krotov, Zaki, Ram 2023, arXiv 2306.03209). Columns in different units are standardised inside
    (`standardize`), and results are in the units of X.

    Parameters
    ----------
    n_clusters : int, default 8
        Number of memories K.
    recipe : "default" or "paper", default "default"
        What the arguments below that are None stand for. "default" searches without labels: k-means
        starts, rounds of training and of Lloyd's iterations, choice by silhouette among partitions
        that use all clusters and are nearly as compact as the most compact one. "paper" is the
        published procedure (normal random start, 10 steps of .1, batches of 8, its learning-rate
        schedule, labels by the recursion), with its numbers in absolute units: in deviations of the
        columns where the fit standardises, else in those of X.
    init : "k-means++", "random", "normal", array [K, D] or callable, default by recipe
        Start: k-means++ seeding, random rows, the paper's normal(.1, .1) around the mean, given
        memories, or `init(X, n_clusters, random_state)`.
    n_init : int, default by recipe (32; paper 4)
        Replicas, trained together as leading dims of one op call.
    max_iter : int, default by recipe (50; paper 200)
        Epochs. Those of the default recipe make five rounds; between rounds the best replicas are
        copied, and in most copies one memory jumps to a far row.
    am_share : float in [0, 1], default .5
        Share of the replicas of the default recipe that train by completion; the others go on with
        Lloyd's iterations, their limit of beta to infinity.
    batch_size : int, default by recipe (512; paper 8)
        Rows of a training batch; of the default recipe about, all are of one size.
    beta : float > 0, unit 1/|x|^2, default by recipe
        Inverse temperature of training and of `beta_`. Default: 1, 3 and 10 over the gap of the
        data in turn (paper: .55, .75, .95, 1.2).
    steps, step : int >= 1 and float in (0, 2], default by recipe (1 and 1.0; paper 10 and .1)
        The recursion in training, and in the labels of the paper's recipe.
    mask_ratio : float in (0, 1), default by recipe (.2)
        Share of entries hidden in training, at least one of each row.
    clamp : bool, default True
        Whether visible entries are held while hidden ones evolve.
    learning_rate : float > 0, default by recipe (.05; paper .01)
        Of Adam, in units of each column's deviation (paper: absolute, the same for all columns).
    select : "silhouette", "inertia" or "loss", default "silhouette"
        Which restart is kept. In the default recipe a restart counts only if all clusters are used
        and, for "silhouette", if its inertia is at most `inertia_guard` times the lowest.
    inertia_guard : float >= 1 or None, default 1.05
        See `select`: it keeps a choice by silhouette from small clusters of outliers. None turns it
        off. The paper's recipe has none.
    min_cluster_size : int or float > 0, default 1
        Rows (weight; in units of the least one if that is below 1) that a cluster must have to
        count as used. A ConvergenceWarning says when no partition that was tried has only such
        clusters.
    precision : "highest", "high", "medium" or None, default None
        Of the matrix products; None follows torch.
    standardize : "auto", True or False, default "auto"
        Whether a column counts by its deviations instead of its units. "auto" standardises where
        the spread of one column is more than 256 times that of another, as in tables of different
        units: pixels of 8 bits stay as they are. The spread of a column is its deviation, or the
        median distance of its entries from its median, whichever differs less between the columns.
        With False a fit warns where columns differ by more than 1000. Set True where columns have
        different units that differ less than that.
    search_rows : int >= 1, default 20000
        Of more rows than this, and than 100 K, the default recipe searches a sample of so many; the
        winner then goes through all rows with Lloyd's iterations.
    device : str, default "auto"
        "auto" is the tensor's device, for arrays a GPU if there is one. A device that is not there
        raises, it never falls back.
    random_state : int, RandomState or None, default None
        An int gives the same bits on the same device.
    verbose : int, default 0
        1 shows a progress bar over epochs, or over the batches of a `partial_fit`, on stderr (needs
        tqdm).
    callbacks : callable, object or list of them, optional
        Called after every epoch as `callback(estimator, info)`, info a dict of round, epoch, loss
        (mean over the replicas that train) and candidates (scored so far); returning what is true
        ends the fit there. `partial_fit` calls it after every batch: epoch counts all batches so
        far, round and candidates are 0, and what is true ends the call there. Objects may have some
        of `on_fit_begin(estimator)`, `on_iteration(estimator, info)` and `on_fit_end(estimator)`.

    Attributes
    ----------
    cluster_centers_ : array [K, D]
        The memories: the means of their rows, or, where those would score worse, memories that
        stand beyond their rows (docs/clam.md). In units of X, and inside the observed range of
        each column.
    scale_ : array [D], float64
        What a distance divides each column by, 1 where nothing is standardised. Where it is, the
        column's deviation over the root mean square of all deviations. Every distance of the model,
        also in `inertia_`, `gap_`, `beta_` and `candidates_`, is |(x - rho_k) / scale_|.
    labels_ : array [N]
        Label of each training row.
    inertia_ : float
        Weighted sum of squared distances of the rows to the memory of their label. It is above the
        inertia of the partition, which is about the means of the labels, where the memories stand
        beyond their rows: `candidates_["inertia"][candidates_["chosen"]]`.
    candidates_ : dict of arrays [C]
        Every replica each time it was scored: round (0 the start), replica, role ("start", "lloyd",
        "am"), beta, loss, silhouette (on one fixed sample), inertia (about the means of its own
        labels), clusters_used, counts (all clusters used, inside the guard), chosen.
    beta_ : float
        Inverse temperature of `predict_proba` and `energy`: 3 / gap_ unless given (paper: that of
        the restart kept).
    gap_ : float
        Median over rows of second-nearest minus nearest squared distance.
    n_clusters_used_ : int
        Number of distinct labels; a ConvergenceWarning says when it is below n_clusters.
    loss_curve_ : array [n_iter_]
        Mean loss over the replicas that train, epoch by epoch (paper: loss of the one kept).
    n_iter_ : int
        Epochs run.
    device_, backend_ : str
        What ran.
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

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "recipe": [StrOptions(set(RECIPES))],
        "init": [StrOptions({"k-means++", "random", "normal"}), callable, "array-like", None],
        "n_init": [Interval(Integral, 1, None, closed="left"), None],
        "max_iter": [Interval(Integral, 1, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "beta": [Interval(Real, 0, None, closed="neither"), None],
        "steps": [Interval(Integral, 1, None, closed="left"), None],
        "step": [Interval(Real, 0, 2, closed="right"), None],
        "mask_ratio": [Interval(Real, 0, 1, closed="neither"), None],
        "clamp": ["boolean"],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), None],
        "select": [StrOptions({"silhouette", "inertia", "loss"})],
        "inertia_guard": [Interval(Real, 1, None, closed="left"), None],
        "am_share": [Interval(Real, 0, 1, closed="both")],
        "min_cluster_size": [Interval(Real, 0, None, closed="neither")],
        "standardize": [StrOptions({"auto"}), "boolean"],
        "search_rows": [Interval(Integral, 1, None, closed="left")],
        "precision": [StrOptions(set(PRECISIONS)), None],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "callbacks": "no_validation",  # type: ignore[dict-item]
    }

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
            n_clusters is True, a callback is none, X is sparse.
        BackendUnavailableError
            The device is not there.
        """
        self._validate_params()
        settings = self._settings()
        rows = read_rows(self, X, device=settings.device, reset=True)
        _check_rows(rows, settings)
        weight = read_weight(sample_weight, rows)
        seed = settings.draw_seed()
        names = getattr(self, "feature_names_in_", None)
        frame = frame_of(rows, weight, names, settings.standardize)
        _warn_of_units(frame)
        points, is_whole = sampled(settings, rows, weight, frame, seed)
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
        """Train the memories on one more batch X [N, D].

        The first call chooses memories among its rows, of which it needs as many as clusters; then
        every `batch_size` rows are one step of two lines, running means of the rows that a memory
        wins and training by completion. The second is the answer where its silhouette is better and
        its inertia inside `inertia_guard`. The estimator keeps a sample of all rows so far (2,000,
        or 100 for each cluster), measures both lines on it and moves both where a search on it
        gives better memories, so that rows may come in any order. The scale of the columns is that
        of the sample, within a factor of 2.
        After `fit` or `load` it goes on from there. `labels_` and `inertia_` are those of the
        batch, `n_iter_` and `loss_curve_` of all steps; `n_clusters_used_` is of the sample.

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
            _check_rows(rows, settings)
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
            _warn_of_units(stream.frame)
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
    ) -> streaming.Stream:
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
        self.loss_curve_ = np.array([rescaled(loss, squared) for loss in result.curve])
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
        self.gap_, self.beta_ = rescaled(gap, squared), rescaled(beta, -squared)

    def _store_labels(self, settings: ClAMSettings, rows: Rows, weight: Tensor | None) -> None:
        self.device_, self.backend_ = str(rows.device), backend_of("am_recursion", rows)
        self._n_features_out = settings.n_clusters
        labels, sqdist = self._nearest(rows, settings)
        self.labels_ = rows.give_labels(labels)
        weights = np.ones(len(rows)) if weight is None else weight.cpu().numpy()
        won = np.bincount(labels.cpu().numpy(), weights, minlength=settings.n_clusters)
        self._held = np.repeat(won[:, None], rows.features, axis=1)
        self.inertia_ = rescaled(weighted_sum(sqdist, weight), 2 * self._frame.unit)
        self.n_clusters_used_ = len(labels.unique())


def _check_rows(rows: Rows, settings: ClAMSettings) -> None:
    """ValueError unless there are as many rows as clusters."""
    if len(rows) < settings.n_clusters:
        raise ValueError(f"n_samples={len(rows)} should be >= n_clusters={settings.n_clusters}.")


def _has_small_clusters(settings: ClAMSettings, result: SearchResult) -> bool:
    """Whether the chosen partition has clusters below `min_cluster_size`."""
    required = 1 if settings.is_published else settings.n_clusters
    (chosen,) = result.table[result.table[:, COLUMNS.index("counts")] == 2]
    return bool(chosen[COLUMNS.index("clusters_used")] < required)


def _warn_of_units(frame: Frame) -> None:
    """Warn where nothing standardises columns whose spreads differ much."""
    if not frame.standard and frame.contrast > WARNED_CONTRAST:
        warn(
            f"standardize=False: the spread of one column of X is {frame.contrast:.0e} times that"
            " of another: columns of large spread alone decide the labels.",
            UserWarning,
        )
