# SPDX-License-Identifier: Apache-2.0
"""SeLa: an encoder trained on labels of its own."""

from .estimator import SeLa as SeLa
