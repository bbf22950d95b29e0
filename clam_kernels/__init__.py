# SPDX-License-Identifier: Apache-2.0
"""Clustering ops and estimators for PyTorch; `torch.ops.clam.*` after import."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from . import ops as ops
from ._core.backend import backend as backend
from ._core.spec import all_ops as all_ops
from ._core.spec import choice as choice
from ._core.spec import explain as explain
from ._version import __version__ as __version__
from .ops.am import am_assign as am_assign
from .ops.am import am_energy as am_energy
from .ops.am import am_recursion as am_recursion
from .ops.am import am_step as am_step
from .ops.dec import DecTarget as DecTarget
from .ops.dec import dec_loss as dec_loss
from .ops.dec import dec_target as dec_target
from .ops.dec import student_t_stats as student_t_stats
from .ops.kmeans import kmeans_assign as kmeans_assign
from .ops.kmeans import kmeans_step as kmeans_step
from .ops.kmeans import kmeans_update as kmeans_update
from .ops.xent import cluster_concentration as cluster_concentration
from .ops.xent import proto_nce as proto_nce
from .ops.xent import swapped_prediction as swapped_prediction
from .transport import sela_labels as sela_labels
from .transport import sinkhorn as sinkhorn
from .transport import swav_codes as swav_codes

if TYPE_CHECKING:
    from . import nn as nn
    from .estimators import DEC as DEC
    from .estimators import ClAM as ClAM
    from .estimators import ClAMImputer as ClAMImputer
    from .estimators import KMeans as KMeans
    from .estimators import SeLa as SeLa

__all__ = [
    "DEC",
    "ClAM",
    "ClAMImputer",
    "DecTarget",
    "KMeans",
    "SeLa",
    "all_ops",
    "am_assign",
    "am_energy",
    "am_recursion",
    "am_step",
    "backend",
    "choice",
    "cluster_concentration",
    "dec_loss",
    "dec_target",
    "explain",
    "kmeans_assign",
    "kmeans_step",
    "kmeans_update",
    "list_estimators",
    "list_ops",
    "nn",
    "proto_nce",
    "sela_labels",
    "sinkhorn",
    "student_t_stats",
    "swapped_prediction",
    "swav_codes",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())

_ESTIMATORS = ("ClAM", "ClAMImputer", "DEC", "KMeans", "SeLa")
_ROOMS = ("nn",)
_LAZY = dict.fromkeys(_ESTIMATORS, ".estimators")


def list_ops() -> list[str]:
    """Names of the ops under `torch.ops.clam`."""
    return [spec.name for spec in all_ops()]


def list_estimators() -> list[str]:
    """Names of the estimators."""
    return list(_ESTIMATORS)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
