# SPDX-License-Identifier: Apache-2.0
"""ClAM: clustering and completion by an associative memory."""

from .estimator import ClAM as ClAM
from .imputer import ClAMImputer as ClAMImputer
