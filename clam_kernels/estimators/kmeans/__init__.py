# SPDX-License-Identifier: Apache-2.0
"""k-means with the interface of scikit-learn."""

from .estimator import KMeans as KMeans
