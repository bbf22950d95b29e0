# SPDX-License-Identifier: Apache-2.0
"""What fitted memories compute of rows: labels, weights, distances, energies, missing entries."""

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
from ..common.base import computed_dtype
from ..common.frame import Frame
from ..common.rows import Rows, read_rows, read_weight, weighted_sum
from ..common.scale import scale_number, scale_tensor
from ..common.threads import small_on_one_thread
from .container import in_container
from .points import masked_distances
from .settings import ClAMSettings

# Beta of `complete` in units of 1/gap: of 1, 1.5, 2 and 3, 1.5 has an error near the least one on
# every table of bench/completion.py.
RECALL_STEPS, COMPLETION = 10, 1.5


class Recall(TransformerMixin):
    """Mixin of an estimator with memories in a frame."""

    cluster_centers_: Any
    _frame: Frame
    _sharpness: list[float]

    def _settings(self) -> ClAMSettings:
        """The parameters of one call; every method reads them anew."""
        return ClAMSettings.of(self)

    def _read(self, X: Any, settings: ClAMSettings) -> Rows:
        check_is_fitted(self, "cluster_centers_")
        return read_rows(self, X, device=settings.device, reset=False)

    def _memories(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memories in the frame."""
        memories = self.cluster_centers_
        if not isinstance(memories, Tensor):
            memories = torch.from_numpy(np.require(memories, requirements=["C", "W"]))
        return self._frame.states(memories.to(device), dtype)

    def _pair(self, part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(states of some rows, memories), both in float64 where one of them needs it."""
        z = self._frame.states(part, dtype)
        memories = self._memories(z.dtype, z.device)
        return z.to(memories.dtype), memories

    def _dtype(self, rows: Rows) -> torch.dtype:
        """The dtype of distances: float64 where the rows or the memories have it."""
        fitted = computed_dtype(self.cluster_centers_)
        return torch.float64 if rows.dtype == torch.float64 else fitted

    def _for_each_chunk(self, rows: Rows, function: Callable[[Tensor, Tensor], Any]) -> list[Any]:
        """`function(states, memories)` for each chunk of rows, without gradients."""
        dtype = self._dtype(rows)
        results = []
        with torch.inference_mode():
            for _, part in rows.pieces():
                results.append(function(*self._pair(part, dtype)))
        return results

    def _recall_states(self, z: Tensor, memories: Tensor, settings: ClAMSettings) -> Tensor:
        """States whose nearest memories are the labels. Those of the paper's recipe are states
        after the recursion, which starts with missing entries at 0.
        """
        if not settings.is_published:
            return z
        return am_recursion(
            z.nan_to_num(0.0),
            memories,
            self._beta(),
            settings.steps,
            step=settings.step,
            precision=settings.precision,
        )

    def _beta(self) -> float:
        """beta_ in the frame."""
        return self._sharpness[0]

    def _nearest(self, rows: Rows, settings: ClAMSettings) -> tuple[Tensor, Tensor]:
        """(labels, squared distances in the frame to the memories of the labels)."""

        def label(z: Tensor, memories: Tensor) -> tuple[Tensor, Tensor]:
            states = self._recall_states(z, memories, settings)
            labels, sqdist = kmeans_assign(states, memories, precision=settings.precision)
            if states is not z:
                sqdist = (z - memories[labels]).square().sum(-1)
            if rows.has_missing:
                some = z.isnan().any(1).nonzero()[:, 0]
                distances = masked_distances(z[some], memories)
                if states is z:
                    labels[some] = distances.argmin(1)
                sqdist[some] = distances.gather(1, labels[some, None])[:, 0]
                sqdist[z.isnan().all(1)] = 0.0  # no observed entry, no distance
            return labels, sqdist

        labels, sqdist = zip(*self._for_each_chunk(rows, label), strict=True)
        return torch.cat(labels), torch.cat(sqdist)

    def _distances(self, rows: Rows, settings: ClAMSettings) -> Tensor:
        """Distances [N, K] in the frame, from differences."""

        def distances(z: Tensor, memories: Tensor) -> Tensor:
            mode = "donot_use_mm_for_euclid_dist"
            states = self._recall_states(z, memories, settings)
            out = torch.cdist(states, memories, compute_mode=mode)
            if rows.has_missing and states is z:
                some = z.isnan().any(1).nonzero()[:, 0]
                out[some] = masked_distances(z[some], memories).sqrt_()
            return out

        return torch.cat(self._for_each_chunk(rows, distances))

    @small_on_one_thread
    def predict(self, X: Any) -> Any:
        """Label of each row: its nearest memory (paper: that of the row after the recursion).

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN is a missing entry: the distance is that of the other entries.

        Returns
        -------
        array [N], int32, or for a tensor Tensor [N], int64, on its device
        """
        settings = self._settings()
        rows = self._read(X, settings)
        return rows.give_labels(self._nearest(rows, settings)[0])

    @small_on_one_thread
    def predict_proba(self, X: Any) -> Any:
        """softmax_k(-beta_ |x - rho_k|^2) of each row (paper: of the row after the recursion).

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN is a missing entry.

        Returns
        -------
        array or Tensor [N, K]
            Rows sum to 1; the largest entry is at the row's label.
        """
        settings = self._settings()
        rows = self._read(X, settings)
        labels = self._nearest(rows, settings)[0][:, None]
        p = torch.softmax(self._distances(rows, settings).square_().mul_(-self._beta()), -1)
        # weights of two close memories may round to the same number: raise that of the label
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
            NaN is a missing entry: the squared distance is that of the m other entries times
            D / m.

        Returns
        -------
        array or Tensor [N, K], unit |x|, |(x - rho_k) / scale_|
        """
        settings = self._settings()
        rows = self._read(X, settings)
        distances = scale_tensor(self._distances(rows, settings).double(), self._frame.unit)
        return rows.give(distances.to(self._dtype(rows)))

    @small_on_one_thread
    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the weighted sum of squared distances of the rows to the memory of their label.

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN is a missing entry.
        y : ignored
        sample_weight : array-like [N], optional

        Returns
        -------
        float
        """
        settings = self._settings()
        rows = self._read(X, settings)
        weight = read_weight(sample_weight, rows)
        inertia = weighted_sum(self._nearest(rows, settings)[1], weight)
        return -scale_number(inertia, 2 * self._frame.unit)

    @small_on_one_thread
    def energy(self, X: Any) -> Any:
        """Energy of each row at beta_: -(1/beta_) logsumexp_k(-beta_ |x - rho_k|^2).

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN is a missing entry.

        Returns
        -------
        array or Tensor [N], unit |x|^2
            Low where a row is close to a memory.
        """
        settings = self._settings()
        rows = self._read(X, settings)
        beta = self._beta()

        def energies(z: Tensor, memories: Tensor) -> Tensor:
            energy = am_energy(z, memories, beta, precision=settings.precision)
            if rows.has_missing:
                some = z.isnan().any(1).nonzero()[:, 0]
                logits = masked_distances(z[some], memories).mul_(-beta)
                energy[some] = logits.logsumexp(1).div_(-beta).to(energy.dtype)
            return energy

        energy = torch.cat(self._for_each_chunk(rows, energies))
        energy = scale_tensor(energy.double(), 2 * self._frame.unit)
        return rows.give(energy.to(self._dtype(rows)))

    @small_on_one_thread
    def complete(
        self, X: Any, *, beta: float | None = None, steps: int = RECALL_STEPS, step: float = 1.0
    ) -> Any:
        """X with its NaN entries recalled from the memories; every other entry keeps its bits.

        Where `set_output` chooses a data frame, it has the names and the index of X, and a column
        of X without a missing entry keeps its dtype. A recalled entry is inside the range that the
        fit observed in its column.

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN is a missing entry.
        beta : float > 0, unit 1/|x|^2, default 1.5 / gap_
            Sharpness of the recall.
        steps : int, default 10
        step : float, default 1.0

        Returns
        -------
        array, Tensor or data frame [N, D]
        """
        settings = self._settings()
        rows = self._read(X, settings)
        for name, value, most in (("beta", beta, math.inf), ("step", step, 2.0)):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= most):
                bound = "a number in (0, 2]" if most == 2 else "a number > 0"
                raise ValueError(f"{name}: expected {bound}, got {value!r}")
        squared = 2 * self._frame.unit
        frame_beta = self._sharpness[1] if beta is None else scale_number(beta, squared)
        parts = []
        with torch.inference_mode():
            for _, part in rows.pieces():
                is_missing = part.isnan()
                z, memories = self._pair(part, part.dtype)
                states = am_recursion(
                    z.masked_fill(is_missing, 0.0),
                    memories,
                    frame_beta,
                    steps,
                    step=step,
                    update_mask=is_missing,
                    precision=settings.precision,
                )
                values = self._frame.data(states).to(part.dtype)
                parts.append(torch.where(is_missing, values, part))
        return in_container(self, X, rows.give(torch.cat(parts)))
