# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings with a name of their own."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """The device or backend asked for is not on this machine."""


class ModelFileError(ValueError):
    """A model file that is truncated, damaged, foreign, or written by a newer version."""


class DataFileError(ValueError):
    """A data file that is damaged, of a kind not read here, or holds text where numbers belong."""
