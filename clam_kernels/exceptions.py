# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings with a name of their own."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """The device or backend asked for is not on this machine."""


class ModelFileError(ValueError):
    """A model file that is truncated, damaged, foreign, or written by a newer version."""


class DataFileError(ValueError):
    """A data file that is damaged, of a kind not read here, or holds text where numbers belong."""


def needs(what: str, package: str, extra: str) -> str:
    """Wording of an error where a package is missing that an extra of this one installs."""
    return f"{what} needs {package}, which the extra {extra} brings: pip install {package}"
