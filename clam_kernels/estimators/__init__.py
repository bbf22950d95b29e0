# SPDX-License-Identifier: Apache-2.0
"""scikit-learn estimators built on the ops."""

from .clam import ClAM as ClAM
from .kmeans import KMeans as KMeans
