# SPDX-License-Identifier: Apache-2.0
"""What fitted memories tell of rows: labels, weights, distances, energies, missing entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.base import TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ...ops.am import am_energy, am_recursion
from ...ops.kmeans import kmeans_assign
from ..common.frame import Frame
from ..common.rows import Rows, read_rows, read_weight
from ..common.scale import rescaled, scaled
from ..common.threads import small_on_one_thread
from .container import in_container
from .points import masked_distances
from .search import resolved

# Beta of `complete` in units of 1/gap: of 1, 1.5, 2 and 3 the one that is near the least error on
# every table of bench/completion.py.
RECALL_STEPS, COMPLETION = 10, 1.5


class Recall(TransformerMixin):
    """Mixin of an estimator with memories in a frame."""

    recipe: str
    precision: str | None
    cluster_centers_: Any
    _frame: Frame
    _sharpness: list[float]

    def _read(self, X: Any) -> Rows:
        check_is_fitted(self, "cluster_centers_")
        return read_rows(self, X, reset=False)

    def _centers(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memories in the frame."""
        centers = self.cluster_centers_
        if not isinstance(centers, Tensor):
            centers = torch.from_numpy(np.require(centers, requirements=["C", "W"]))
        return self._frame.states(centers.to(device), dtype)

    def _pair(self, part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(states of some rows, memories), of one dtype: float64 where one of them needs it."""
        z = self._frame.states(part, dtype)
        centers = self._centers(z.dtype, z.device)
        return z.to(centers.dtype), centers

    def _dtype(self, rows: Rows) -> torch.dtype:
        """What distances are computed in, but for values that only float64 has room for."""
        name = str(self.cluster_centers_.dtype).removeprefix("torch.")
        fitted = torch.float64 if name == "float64" else torch.float32
        return torch.float64 if rows.dtype == torch.float64 else fitted

    def _by_pieces(self, rows: Rows, function: Callable[[Tensor, Tensor], Any]) -> list[Any]:
        """`function(states, memories)` for each chunk of rows, without gradients."""
        dtype = self._dtype(rows)
        results = []
        with torch.inference_mode():
            for _, part in rows.pieces():
                results.append(function(*self._pair(part, dtype)))
        return results

    def _recalled(self, z: Tensor, centers: Tensor) -> Tensor:
        """States whose nearest memory gives the label: the paper's are those after the recursion,
        which fills what is missing.
        """
        if self.recipe != "paper":
            return z
        steps, step = resolved(self, "steps"), float(resolved(self, "step"))
        start = z.nan_to_num(0.0)
        return am_recursion(
            start, centers, self._beta(), steps, step=step, precision=self.precision
        )

    def _beta(self) -> float:
        """beta_ in the frame."""
        return self._sharpness[0]

    def _nearest(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(labels, squared distances in the frame from the rows to the memory of their label)."""

        def label(z: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
            recalled = self._recalled(z, centers)
            labels, sqdist = kmeans_assign(recalled, centers, precision=self.precision)
            if recalled is not z:
                sqdist = (z - centers[labels]).square().sum(-1)
            if rows.missing:
                some = z.isnan().any(1).nonzero()[:, 0]
                far = masked_distances(z[some], centers)
                if recalled is z:
                    labels[some] = far.argmin(1)
                sqdist[some] = far.gather(1, labels[some, None])[:, 0]
                sqdist[z.isnan().all(1)] = 0.0  # nothing observed, nothing missed
            return labels, sqdist

        labels, sqdist = zip(*self._by_pieces(rows, label), strict=True)
        return torch.cat(labels), torch.cat(sqdist)

    def _distances(self, rows: Rows) -> Tensor:
        """Distances [N, K] in the frame, by direct differences."""

        def measured(z: Tensor, centers: Tensor) -> Tensor:
            mode = "donot_use_mm_for_euclid_dist"
            recalled = self._recalled(z, centers)
            far = torch.cdist(recalled, centers, compute_mode=mode)
            if rows.missing and recalled is z:
                some = z.isnan().any(1).nonzero()[:, 0]
                far[some] = masked_distances(z[some], centers).sqrt_()
            return far

        return torch.cat(self._by_pieces(rows, measured))

    @small_on_one_thread
    def predict(self, X: Any) -> Any:
        """Label of each row: its nearest memory (paper: that of the row after the recursion).

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN stands for a missing entry: the distance is that of the others.

        Returns
        -------
        array [N], int32, or for a tensor Tensor [N], int64, on its device
        """
        rows = self._read(X)
        return rows.give_labels(self._nearest(rows)[0])

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
    def predict_proba(self, X: Any) -> Any:
        """softmax_k(-beta_ |x - rho_k|^2) of each row (paper: of the row after the recursion).

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN stands for a missing entry.

        Returns
        -------
        array or Tensor [N, K]
            Rows sum to 1; the largest entry is at the row's label.
        """
        rows = self._read(X)
        labels = self._nearest(rows)[0][:, None]
        p = torch.softmax(self._distances(rows).square_().mul_(-self._beta()), -1)
        # two memories so close that their weights round to the same number: the label's is the
        # larger
        top = p.amax(-1, keepdim=True)
        tied = p.argmax(-1, keepdim=True) != labels
        raised = torch.nextafter(top, torch.full_like(top, 2.0))
        p = p.scatter(-1, labels, torch.where(tied, raised, p.gather(-1, labels)))
        return rows.give(p.to(self._dtype(rows)))

    @small_on_one_thread
    def transform(self, X: Any) -> Any:
        """Distance of each row to each memory (paper: of the row after the recursion).

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN stands for a missing entry: the squared distance is that of the others times D /
            their number.

        Returns
        -------
        array or Tensor [N, K], unit |x|, |(x - rho_k) / scale_|
        """
        rows = self._read(X)
        far = scaled(self._distances(rows).double(), self._frame.unit)
        return rows.give(far.to(self._dtype(rows)))

    @small_on_one_thread
    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the weighted sum of squared distances of the rows to the memory of their label.

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN stands for a missing entry.
        y : ignored
        sample_weight : array-like [N], optional

        Returns
        -------
        float
        """
        rows = self._read(X)
        weight = read_weight(sample_weight, rows)
        return -rescaled(total(self._nearest(rows)[1], weight), 2 * self._frame.unit)

    @small_on_one_thread
    def energy(self, X: Any) -> Any:
        """Energy of each row at beta_: -(1/beta_) logsumexp_k(-beta_ |x - rho_k|^2).

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN stands for a missing entry.

        Returns
        -------
        array or Tensor [N], unit |x|^2
            Low where a row is close to a memory.
        """
        rows = self._read(X)
        beta = self._beta()

        def measured(z: Tensor, centers: Tensor) -> Tensor:
            energy = am_energy(z, centers, beta, precision=self.precision)
            if rows.missing:
                some = z.isnan().any(1).nonzero()[:, 0]
                logits = masked_distances(z[some], centers).mul_(-beta)
                energy[some] = logits.logsumexp(1).div_(-beta).to(energy.dtype)
            return energy

        energies = torch.cat(self._by_pieces(rows, measured))
        energies = scaled(energies.double(), 2 * self._frame.unit)
        return rows.give(energies.to(self._dtype(rows)))

    @small_on_one_thread
    def complete(
        self, X: Any, *, beta: float | None = None, steps: int = RECALL_STEPS, step: float = 1.0
    ) -> Any:
        """X with its NaN entries recalled from the memories; every other entry keeps its bits.

        Where `set_output` asks for a data frame, it has the names and the index of X, and a column
        of X without a missing entry keeps its dtype. A
        recalled entry is inside the range that the fit observed in its column.

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN stands for a missing entry.
        beta : float > 0, unit 1/|x|^2, default 1.5 / gap_
            Sharpness of the recall.
        steps : int, default 10
        step : float, default 1.0

        Returns
        -------
        array, Tensor or data frame [N, D]
        """
        rows = self._read(X)
        for name, value, most in (("beta", beta, math.inf), ("step", step, 2.0)):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= most):
                bound = "a number in (0, 2]" if most == 2 else "a number > 0"
                raise ValueError(f"{name}: expected {bound}, got {value!r}")
        squared = 2 * self._frame.unit
        sharp = self._sharpness[1] if beta is None else rescaled(beta, squared)
        done = []
        with torch.inference_mode():
            for _, part in rows.pieces():
                hidden = part.isnan()
                z, centers = self._pair(part, part.dtype)
                out = am_recursion(
                    z.masked_fill(hidden, 0.0),
                    centers,
                    sharp,
                    steps,
                    step=step,
                    update_mask=hidden,
                    precision=self.precision,
                )
                done.append(torch.where(hidden, self._frame.data(out).to(part.dtype), part))
        return in_container(self, X, rows.give(torch.cat(done)))


def total(values: Tensor, weight: Tensor | None) -> float:
    """Weighted sum in float64."""
    return float(values.double().sum() if weight is None else values.double() @ weight)
