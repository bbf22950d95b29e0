# SPDX-License-Identifier: Apache-2.0
"""The data sets of scikit-learn, by name."""

from __future__ import annotations

import numpy as np
from sklearn import datasets


def data(name: str) -> np.ndarray:
    word = name.replace("_std", "").replace("_l2", "")
    x = getattr(datasets, f"load_{word}")().data.astype(float)
    if name.endswith("_std"):
        x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    return x / np.linalg.norm(x, axis=1, keepdims=True) if name.endswith("_l2") else x
