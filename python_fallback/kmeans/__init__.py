# SPDX-License-Identifier: Apache-2.0
"""k-means: the nearest centroid of every row, and sums of rows by label.

`equations` is the truth; `assign` and `update` are the CPU backend; `nearest` computes the labels.
"""

from .assign import kmeans_assign_forward, pair_distances
from .equations import (
    kmeans_assign,
    kmeans_step,
    kmeans_update,
)
from .update import kmeans_step_forward, kmeans_update_forward

__all__ = [
    "kmeans_assign",
    "kmeans_assign_forward",
    "kmeans_step",
    "kmeans_step_forward",
    "kmeans_update",
    "kmeans_update_forward",
    "pair_distances",
]
