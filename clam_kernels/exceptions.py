# SPDX-License-Identifier: Apache-2.0
"""The error classes of this package."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """The requested device or backend is not on this machine."""


class ModelFileError(ValueError):
    """A model file is truncated, damaged, of another kind, or written by a newer version."""


class DataFileError(ValueError):
    """A data file is damaged, of an unknown kind, or has text where numbers belong."""


def needs(what: str, package: str, extra: str) -> str:
    """The text of an error about a missing package, which an extra of this package installs."""
    return f"{what} needs {package}, which the extra {extra} brings: pip install {package}"
