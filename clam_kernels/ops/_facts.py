# SPDX-License-Identifier: Apache-2.0
"""Facts of the reference that rooms above the ops use too."""

from python_fallback.common.chunk import broadcast_shapes as broadcast_shapes
from python_fallback.common.score import compute_dtype as compute_dtype
from python_fallback.kmeans.nearest import TIE as TIE
from python_fallback.sinkhorn.scaling import EMPTY as EMPTY
from python_fallback.sinkhorn.scaling import FINE as FINE
from python_fallback.sinkhorn.scaling import INFEASIBLE as INFEASIBLE
from python_fallback.sinkhorn.scaling import LARGE_LOGIT as LARGE_LOGIT
from python_fallback.sinkhorn.scaling import LARGE_POTENTIAL as LARGE_POTENTIAL
from python_fallback.sinkhorn.scaling import NOT_CONVERGED as NOT_CONVERGED
from python_fallback.sinkhorn.scaling import NOT_FINITE as NOT_FINITE
