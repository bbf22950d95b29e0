# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling in the log domain.

`equations` is the truth; `forward` and `backward` are the CPU backend. `scaling` has the steps of
one problem, `scaling_batch` those of a batch.
"""

from .backward import (
    sinkhorn_features_pass_backward,
    sinkhorn_pass_backward,
    sinkhorn_potentials_backward,
    sinkhorn_potentials_features_backward,
)
from .equations import (
    sinkhorn_features_pass,
    sinkhorn_pass,
    sinkhorn_potentials,
    sinkhorn_potentials_features,
)
from .forward import (
    sinkhorn_features_pass_forward,
    sinkhorn_pass_forward,
    sinkhorn_potentials_features_forward,
    sinkhorn_potentials_forward,
)

__all__ = [
    "sinkhorn_features_pass",
    "sinkhorn_features_pass_backward",
    "sinkhorn_features_pass_forward",
    "sinkhorn_pass",
    "sinkhorn_pass_backward",
    "sinkhorn_pass_forward",
    "sinkhorn_potentials",
    "sinkhorn_potentials_backward",
    "sinkhorn_potentials_features",
    "sinkhorn_potentials_features_backward",
    "sinkhorn_potentials_features_forward",
    "sinkhorn_potentials_forward",
]
