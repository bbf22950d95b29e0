# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's warning about an iteration that did not converge."""

from __future__ import annotations

from .._core import warn


def not_converged(text: str) -> None:
    """Warn with a ConvergenceWarning; only a warning imports scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning

    warn.warn(text, ConvergenceWarning)
