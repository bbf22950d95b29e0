# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling in the log domain.

`equations` is the truth; `forward` and `backward` are the CPU backend. `scaling` has the steps of
one problem, `scaling_batch` those of a batch.
"""

from .backward import (
    sinkhorn_backward,
    sinkhorn_features_backward,
    sinkhorn_features_pass_backward,
    sinkhorn_pass_backward,
)
from .equations import (
    sinkhorn,
    sinkhorn_features,
    sinkhorn_features_pass,
    sinkhorn_pass,
)
from .forward import (
    sinkhorn_features_forward,
    sinkhorn_features_pass_forward,
    sinkhorn_forward,
    sinkhorn_pass_forward,
)

__all__ = [
    "sinkhorn",
    "sinkhorn_backward",
    "sinkhorn_features",
    "sinkhorn_features_backward",
    "sinkhorn_features_forward",
    "sinkhorn_features_pass",
    "sinkhorn_features_pass_backward",
    "sinkhorn_features_pass_forward",
    "sinkhorn_forward",
    "sinkhorn_pass",
    "sinkhorn_pass_backward",
    "sinkhorn_pass_forward",
]
