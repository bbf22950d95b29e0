# SPDX-License-Identifier: Apache-2.0
"""Codes and labels by optimal transport: Sinkhorn scaling of the scores of rows for prototypes.

Equations: docs/ops/sinkhorn.md.
"""

from ..ops._facts import FINE as FINE
from ..ops._facts import NOT_CONVERGED as NOT_CONVERGED
from ._problem import Scores as Scores
from ._result import Sinkhorn as Sinkhorn
from ._sinkhorn import sela_labels as sela_labels
from ._sinkhorn import sinkhorn as sinkhorn
from ._sinkhorn import swav_codes as swav_codes
