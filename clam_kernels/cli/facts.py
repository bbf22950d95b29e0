# SPDX-License-Identifier: Apache-2.0
"""Facts of a fitted model, for --json and for messages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..estimators import DEC, ClAM, KMeans


def facts_of(model: ClAM | KMeans | DEC) -> dict[str, Any]:
    """Facts of a fitted model, for --json."""
    algo = getattr(model, "variant", type(model).__name__.lower())
    facts = {
        "algo": algo,
        "k": model.n_clusters,
        "clusters_used": len(set(model.labels_.tolist())),
        "inertia": model.inertia_,
    }
    if algo in ("clam", "kmeans"):
        facts["partition_inertia"] = _partition_inertia(model)
    if hasattr(model, "stop_reason_"):
        facts["steps"], facts["stop_reason"] = model.n_steps_, model.stop_reason_
    facts["device"] = model.device_
    if hasattr(model, "backend_"):
        facts["backend"] = model.backend_
    return facts


def _partition_inertia(model: Any) -> float:
    """Inertia about the means of the labels.

    Memories of `ClAM` may lie outside the range of their rows. They are the means of their rows if
    the search took a sample, or if there was no search.
    """
    from ..estimators.clam.settings import ClAMSettings
    from ..estimators.clam.whole import searches_all

    inertia = getattr(model, "candidates_", {"inertia": []})["inertia"]
    if not len(inertia) or not searches_all(ClAMSettings.of(model), len(model.labels_)):
        return float(model.inertia_)
    return float(inertia[model.candidates_["chosen"]][0])


def plain(value: Any) -> Any:
    """A fact as JSON has it: a number that is not finite is null, an array is a list."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
