# SPDX-License-Identifier: Apache-2.0
"""Layers that stand on the ops."""

from .am import AssociativeMemory as AssociativeMemory

__all__ = ["AssociativeMemory"]
