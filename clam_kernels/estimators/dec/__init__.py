# SPDX-License-Identifier: Apache-2.0
"""DEC: an autoencoder, and centroids of its codes that train with its encoder."""

from .estimator import DEC as DEC
