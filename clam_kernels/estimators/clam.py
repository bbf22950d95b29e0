# SPDX-License-Identifier: Apache-2.0
"""ClAM: clustering by the recursion of an associative memory, trained by completing masked rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
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

from .._core.backend import PRECISIONS
from .._core.registry import explain
from ..ops.am import am_energy, am_recursion
from ._base import Data, keeps_state_on_failure, read
from ._files import ModelFile
from ._frame import Frame, chunks, rescaled, scaled
from ._search import RECIPES, resolved, search
from ._selection import Candidate, assigned
from ._start import gap_of

RECALL_STEPS = 10


class ClAM(
    ModelFile, ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator
):
    """Clustering with associative memories.

    The memories rho_k are trained so that the recursion v <- v + step (softmax_k(-beta |v -
    rho_k|^2) @ rho - v), started from rows with hidden entries, restores those entries (Saha,
    Krotov, Zaki, Ram 2023, arXiv 2306.03209). Scale the features first; fit only centres them.

    Parameters
    ----------
    n_clusters : int, default 8
        Number of memories K.
    recipe : "default" or "paper", default "default"
        What the arguments below that are None stand for. "paper" is the published procedure
        (normal random start, 10 steps of .1, batches of 8, its learning-rate schedule, labels by
        the recursion), with its numbers in absolute units: standardise the features.
    init : "k-means++", "random", "normal", array [K, D] or callable, default by recipe
        Start: k-means++ seeding, random rows, the paper's normal(.1, .1) around the mean, given
        memories, or `init(X, n_clusters, random_state)`.
    n_init : int, default by recipe (8; paper 4)
        Restarts, trained together as leading dims of one op call.
    max_iter : int, default by recipe (60; paper 200)
        Epochs.
    batch_size : int, default by recipe (512; paper 8)
        Rows of a training batch.
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
        Of Adam, in units of the data's root mean square (paper: absolute).
    select : "silhouette", "inertia" or "loss", default "silhouette"
        Which restart is kept. In the default recipe a restart counts only if all clusters are used
        and, for "silhouette", if its inertia is at most `inertia_guard` times the lowest.
    inertia_guard : float >= 1 or None, default 1.1
        See `select`; None turns it off. The paper's recipe has none.
    precision : "highest", "high", "medium" or None, default None
        Of the matrix products; None follows torch.
    device : str, default "auto"
        "auto" is the tensor's device, for arrays a GPU if there is one. A device that is not there
        raises, it never falls back.
    random_state : int, RandomState or None, default None
        An int gives the same bits on the same device.
    verbose : int, default 0
        1 shows a progress bar over epochs on stderr (needs tqdm).

    Attributes
    ----------
    cluster_centers_ : array [K, D]
        The memories.
    labels_ : array [N]
        Label of each training row.
    inertia_ : float
        Sum of squared distances of the rows to the memory of their label.
    beta_ : float
        Inverse temperature of `predict_proba` and `energy`: 3 / gap_ unless given (paper: that of
        the restart kept).
    gap_ : float
        Median over rows of second-nearest minus nearest squared distance.
    n_clusters_used_ : int
        Number of distinct labels; a ConvergenceWarning says when it is below n_clusters.
    loss_curve_ : array [n_iter_]
        Loss of the restart kept, epoch by epoch.
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
        "precision": [StrOptions(set(PRECISIONS)), None],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    _framed = True
    _arrays = ("cluster_centers_", "labels_", "loss_curve_")
    _learned = (
        "n_features_in_",
        "inertia_",
        "beta_",
        "gap_",
        "n_clusters_used_",
        "n_iter_",
        "device_",
        "backend_",
        "_sharpness",
    )

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
        inertia_guard: float | None = 1.1,
        precision: str | None = None,
        device: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
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
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    # ---- fitting -------------------------------------------------------------------------------

    @keeps_state_on_failure
    def fit(self, X: Any, y: Any = None) -> ClAM:
        """Train the memories on X [N, D].

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            Finite values.
        y : ignored

        Returns
        -------
        ClAM
            The estimator.

        Raises
        ------
        ValueError
            X has NaN or inf (the message names the first), fewer rows than clusters, no feature.
        """
        self._validate_params()
        data = read(self, X, reset=True)
        x = data.values
        if len(x) < self.n_clusters:
            raise ValueError(f"n_samples={len(x)} should be >= n_clusters={self.n_clusters}.")
        if isinstance(self.n_clusters, bool):
            raise TypeError("n_clusters: expected an int >= 1, got True")
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        frame = Frame.of(x)
        z = frame.states(x, x.dtype)
        chosen, epochs = search(self, z, frame, data, seed, self._progress())
        self._store(data, frame, z, chosen, epochs)
        return self

    def _store(self, data: Data, frame: Frame, z: Tensor, chosen: Candidate, epochs: int) -> None:
        """Learned state from the candidate kept; labels are those that predict gives."""
        squared = 2 * frame.unit  # exponent of a squared length
        centers = frame.data(chosen.memories).to(data.values.dtype)
        self.cluster_centers_ = data.give(centers)
        self._frame = frame
        gap = gap_of(z, chosen.memories[None], 0)
        beta = chosen.beta if self.recipe == "paper" or self.beta is not None else 3.0 / gap
        # beta and 1/gap in the frame: in units of the data they may be past the ends of the floats
        self._sharpness = [beta, 1.0 / gap]
        self.gap_, self.beta_ = rescaled(gap, squared), rescaled(beta, -squared)
        self.loss_curve_ = np.array([rescaled(loss, squared) for loss in chosen.losses])
        self.n_iter_ = epochs
        self.device_ = str(data.values.device)
        self.backend_ = explain("am_recursion", data.values).split(": ")[1].split(" at ")[0]
        self._n_features_out = self.n_clusters
        labels, sqdist = self._nearest(data)
        self.labels_ = data.give_labels(labels)
        self.inertia_ = rescaled(float(sqdist.double().sum()), squared)
        self.n_clusters_used_ = len(labels.unique())
        if self.n_clusters_used_ < self.n_clusters:
            warnings.warn(
                f"{self.n_clusters_used_} of n_clusters={self.n_clusters} clusters are used:"
                " X has too few distinct rows, or n_clusters is too large for it.",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _progress(self) -> Callable[[Iterable[int]], Iterable[int]]:
        if not self.verbose:
            return lambda epochs: epochs
        from tqdm.auto import tqdm

        return lambda epochs: tqdm(epochs, desc="ClAM", unit="epoch", leave=False)

    # ---- using ---------------------------------------------------------------------------------

    def _centers(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memories in the frame."""
        centers = self.cluster_centers_
        if not isinstance(centers, Tensor):
            centers = torch.from_numpy(np.require(centers, requirements=["C", "W"]))
        return self._frame.states(centers.to(device), dtype)

    def _by_chunks(self, data: Data, function: Callable[[Tensor, Tensor], Any]) -> list[Any]:
        """`function(states, memories)` for each chunk of rows, without gradients."""
        dtype = torch.float64 if data.values.dtype == torch.float64 else self._dtype()
        results = []
        with torch.inference_mode():
            for part in chunks(data.values):
                z = self._frame.states(part, dtype)
                results.append(function(z, self._centers(z.dtype, z.device)))
        return results

    def _recalled(self, z: Tensor, centers: Tensor) -> Tensor:
        """States whose nearest memory gives the label: the paper's are those after the
        recursion.
        """
        if self.recipe != "paper":
            return z
        steps, step = resolved(self, "steps"), float(resolved(self, "step"))
        return am_recursion(z, centers, self._beta(), steps, step=step, precision=self.precision)

    def _dtype(self) -> torch.dtype:
        name = str(self.cluster_centers_.dtype).removeprefix("torch.")
        return torch.float64 if name == "float64" else torch.float32

    def _beta(self) -> float:
        """beta_ in the frame."""
        return self._sharpness[0]

    def _nearest(self, data: Data) -> tuple[Tensor, Tensor]:
        """(labels, squared distances in the frame from the rows to the memory of their label)."""

        def label(z: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
            recalled = self._recalled(z, centers)
            return assigned(z, recalled, centers, self.precision)

        labels, sqdist = zip(*self._by_chunks(data, label), strict=True)
        return torch.cat(labels), torch.cat(sqdist)

    def _distances(self, data: Data) -> Tensor:
        """Distances [N, K] in the frame, by direct differences."""

        def measured(z: Tensor, centers: Tensor) -> Tensor:
            mode = "donot_use_mm_for_euclid_dist"
            return torch.cdist(self._recalled(z, centers), centers, compute_mode=mode)

        return torch.cat(self._by_chunks(data, measured))

    def predict(self, X: Any) -> Any:
        """Label of each row: its nearest memory (paper: that of the row after the recursion).

        Parameters
        ----------
        X : array-like or Tensor [N, D]

        Returns
        -------
        array [N], int32, or for a tensor Tensor [N], int64, on its device
        """
        check_is_fitted(self)
        data = read(self, X, reset=False)
        return data.give_labels(self._nearest(data)[0])

    def predict_proba(self, X: Any) -> Any:
        """softmax_k(-beta_ |x - rho_k|^2) of each row (paper: of the row after the recursion).

        Parameters
        ----------
        X : array-like or Tensor [N, D]

        Returns
        -------
        array or Tensor [N, K]
            Rows sum to 1; the largest entry is at the row's label.
        """
        check_is_fitted(self)
        data = read(self, X, reset=False)
        labels = self._nearest(data)[0][:, None]
        p = torch.softmax(self._distances(data).square_().mul_(-self._beta()), -1)
        # two memories so close that their weights round to the same number: the label's is the
        # larger
        top = p.amax(-1, keepdim=True)
        tied = p.argmax(-1, keepdim=True) != labels
        raised = torch.nextafter(top, torch.full_like(top, 2.0))
        return data.give(p.scatter(-1, labels, torch.where(tied, raised, p.gather(-1, labels))))

    def transform(self, X: Any) -> Any:
        """Distance of each row to each memory (paper: of the row after the recursion).

        Parameters
        ----------
        X : array-like or Tensor [N, D]

        Returns
        -------
        array or Tensor [N, K], unit |x|
        """
        check_is_fitted(self)
        data = read(self, X, reset=False)
        return data.give(scaled(self._distances(data), self._frame.unit))

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the sum of squared distances of the rows to the memory of their label.

        Parameters
        ----------
        X : array-like or Tensor [N, D]
        y : ignored

        Returns
        -------
        float
        """
        check_is_fitted(self)
        data = read(self, X, reset=False)
        inertia = float(self._nearest(data)[1].double().sum())
        return -rescaled(inertia, 2 * self._frame.unit)

    def energy(self, X: Any) -> Any:
        """Energy of each row at beta_: -(1/beta_) logsumexp_k(-beta_ |x - rho_k|^2).

        Parameters
        ----------
        X : array-like or Tensor [N, D]

        Returns
        -------
        array or Tensor [N], unit |x|^2
            Low where a row is close to a memory.
        """
        check_is_fitted(self)
        data = read(self, X, reset=False)
        beta = self._beta()
        parts = self._by_chunks(data, lambda z, c: am_energy(z, c, beta, precision=self.precision))
        return data.give(scaled(torch.cat(parts), 2 * self._frame.unit))

    def complete(
        self, X: Any, *, beta: float | None = None, steps: int = RECALL_STEPS, step: float = 1.0
    ) -> Any:
        """X with its NaN entries recalled from the memories; every other entry keeps its bits.

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN stands for a missing entry.
        beta : float > 0, unit 1/|x|^2, default 1 / gap_
            Sharpness of the recall.
        steps : int, default 10
        step : float, default 1.0

        Returns
        -------
        array or Tensor [N, D]
        """
        check_is_fitted(self)
        data = read(self, X, reset=False, allow_nan=True)
        squared = 2 * self._frame.unit
        sharp = self._sharpness[1] if beta is None else rescaled(beta, squared)
        rows = []
        with torch.inference_mode():
            for part in chunks(data.values):
                hidden = part.isnan()
                z = self._frame.states(part, part.dtype).masked_fill(hidden, 0.0)
                out = am_recursion(
                    z,
                    self._centers(z.dtype, z.device),
                    sharp,
                    steps,
                    step=step,
                    update_mask=hidden,
                    precision=self.precision,
                )
                rows.append(torch.where(hidden, self._frame.data(out).to(part.dtype), part))
        return data.give(torch.cat(rows))
