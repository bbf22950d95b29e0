# SPDX-License-Identifier: Apache-2.0
"""Estimators built on the ops: scikit-learn's kind, and trainers of an encoder."""

from .clam import ClAM as ClAM
from .imputer import ClAMImputer as ClAMImputer
from .kmeans import KMeans as KMeans
from .sela import SeLa as SeLa
