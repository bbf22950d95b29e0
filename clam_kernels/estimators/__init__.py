# SPDX-License-Identifier: Apache-2.0
"""Estimators built on the ops: scikit-learn's kind, and trainers of an encoder.

One package for each estimator; `common` is what all share, `training` what trainers of an encoder
share.
"""

from .clam import ClAM as ClAM
from .clam import ClAMImputer as ClAMImputer
from .dec import DEC as DEC
from .kmeans import KMeans as KMeans
from .sela import SeLa as SeLa
