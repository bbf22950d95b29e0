# SPDX-License-Identifier: Apache-2.0
"""ClAM as a step of a pipeline that fills missing entries."""

from __future__ import annotations

from typing import Any

from sklearn.base import OneToOneFeatureMixin

from .estimator import ClAM


class ClAMImputer(OneToOneFeatureMixin, ClAM):
    """ClAM whose `transform` fills missing entries: a step of a scikit-learn Pipeline.

    It is a `ClAM` with the same parameters, attributes and methods, but for `transform`, which is
    `complete` with its defaults (`ClAM.transform` gives distances), and `get_feature_names_out`,
    which gives the names of the input columns.

    Parameters
    ----------
    n_clusters, recipe, init, standardize, n_init, max_iter, am_share, batch_size, beta, steps, \
step, mask_ratio, clamp, learning_rate, select, inertia_guard, min_cluster_size, search_rows, \
precision, device, random_state, verbose, callbacks
        As of `ClAM`. More clusters than classes complete better: 32 for a few hundred rows.

    Attributes
    ----------
    cluster_centers_, labels_, n_features_in_, feature_names_in_ and the others
        As of `ClAM`.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from clam_kernels import ClAMImputer
    >>> X = load_iris().data
    >>> X[::5, 2] = np.nan
    >>> steps = make_pipeline(StandardScaler(), ClAMImputer(n_clusters=8, random_state=0))
    >>> filled = steps.fit_transform(X)
    >>> filled.shape, bool(np.isfinite(filled).all())
    ((150, 4), True)
    """

    def transform(self, X: Any) -> Any:
        """X with its NaN entries filled; every other entry keeps its bits.

        Parameters
        ----------
        X : array-like or Tensor [N, D]
            NaN is a missing entry.

        Returns
        -------
        array or Tensor [N, D]
            A data frame where `set_output` chooses one: it has the names and the index of X, and a
            column of X without a missing entry keeps its dtype.
        """
        return self.complete(X)
