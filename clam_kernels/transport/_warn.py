# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's warning of what did not converge."""

from __future__ import annotations

from .._core import warn


def not_converged(text: str) -> None:
    """A ConvergenceWarning; scikit-learn is imported for it alone."""
    from sklearn.exceptions import ConvergenceWarning

    warn.warn(text, ConvergenceWarning)
