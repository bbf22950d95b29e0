# SPDX-License-Identifier: Apache-2.0
"""Warnings that name the line of the caller."""

from __future__ import annotations

import sys
import warnings

# Frames of these packages are never the caller: autograd calls a backward.
_INNER = ("clam_kernels", "torch")


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the nearest line of the call stack outside this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inner(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def _is_inner(module: str) -> bool:
    return module.partition(".")[0] in _INNER
