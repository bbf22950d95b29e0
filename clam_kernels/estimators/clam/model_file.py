# SPDX-License-Identifier: Apache-2.0
"""The content of a model file of `ClAM`, and the checks of a load."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import serialize
from ..common.files import ModelFile
from .selection import COLUMNS, ROLES


class ClamFile(ModelFile):
    """Mixin of `ClAM`: memories in a frame, and the replicas of the search."""

    _has_frame = True
    loss_curve_: np.ndarray[Any, Any]
    n_iter_: int
    _candidates: np.ndarray[Any, Any]
    _held: np.ndarray[Any, Any]  # [K, D] weight of the entries that each memory won
    _sharpness: list[float]  # betas in the frame: of `predict_proba`, of `complete`
    _arrays = ("cluster_centers_", "labels_", "loss_curve_", "_candidates", "_held")
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

    def _check_restored(self) -> None:
        super()._check_restored()
        curve, won, betas = self.loss_curve_, self._held, self._sharpness
        fits = curve.dtype.kind == "f" and curve.shape == (self.n_iter_,)
        serialize.expect(fits, "its losses are not those of its iterations")
        fits = won.dtype.kind == "f" and won.shape == self.cluster_centers_.shape
        serialize.expect(fits and _is_mass(won), "weights of clusters are not finite and >= 0")
        known = isinstance(betas, list) and len(betas) == 2
        known = known and all(type(x) in (int, float) and x >= 0 for x in betas)
        serialize.expect(known, "betas are not two numbers >= 0")
        serialize.expect(_is_search(self._candidates), "candidates are not those of a search")


def _is_mass(x: np.ndarray) -> bool:
    return bool((np.isfinite(x) & (x >= 0)).all())


def _is_search(table: np.ndarray) -> bool:
    """Whether a table is one of candidates with one chosen row; `partial_fit` has no rows."""
    if table.dtype != np.float64 or table.shape != (len(table), len(COLUMNS)):
        return False
    columns = {name: table[:, i] for i, name in enumerate(COLUMNS)}
    whole = all(_is_mass(columns[name]) for name in ("round", "replica", "clusters_used"))
    roles, counts = columns["role"], columns["counts"]
    known = np.isin(roles, range(len(ROLES))).all() and np.isin(counts, (0, 1, 2)).all()
    return whole and bool(known) and int((counts == 2).sum()) == min(len(table), 1)
