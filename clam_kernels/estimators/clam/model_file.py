# SPDX-License-Identifier: Apache-2.0
"""What a model file of `ClAM` holds, and what a load checks of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import serialize
from ..common.files import ModelFile
from .selection import COLUMNS, ROLES


class ClamFile(ModelFile):
    """Mixin of `ClAM`: memories in a frame, and the replicas of the search."""

    _framed = True
    loss_curve_: np.ndarray[Any, Any]
    n_iter_: int
    _candidates: np.ndarray[Any, Any]
    _held: np.ndarray[Any, Any]
    _sharpness: list[float]
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

    def _restored(self) -> None:
        super()._restored()
        curve, held, betas = self.loss_curve_, self._held, self._sharpness
        fits = curve.dtype.kind == "f" and curve.shape == (self.n_iter_,)
        serialize.expect(fits, "its losses are not those of its iterations")
        fits = held.dtype.kind == "f" and held.shape == self.cluster_centers_.shape
        serialize.expect(fits and _is_mass(held), "weights of clusters are not finite and >= 0")
        known = isinstance(betas, list) and len(betas) == 2
        known = known and all(type(x) in (int, float) and x >= 0 for x in betas)
        serialize.expect(known, "betas are not two numbers >= 0")
        serialize.expect(_is_search(self._candidates), "candidates are not those of a search")


def _is_mass(x: np.ndarray) -> bool:
    return bool((np.isfinite(x) & (x >= 0)).all())


def _is_search(table: np.ndarray) -> bool:
    """Whether the rows are replicas, one of them chosen; `partial_fit` has none."""
    if table.dtype != np.float64 or table.shape != (len(table), len(COLUMNS)):
        return False
    at = {name: table[:, i] for i, name in enumerate(COLUMNS)}
    whole = all(_is_mass(at[name]) for name in ("round", "replica", "clusters_used"))
    known = np.isin(at["role"], range(len(ROLES))).all() and np.isin(at["counts"], (0, 1, 2)).all()
    return whole and bool(known) and int((at["counts"] == 2).sum()) == min(len(table), 1)
