# SPDX-License-Identifier: Apache-2.0
"""Layers that use the ops."""

from .am import AssociativeMemory as AssociativeMemory
from .self_labeller import Relabelling as Relabelling
from .self_labeller import SelfLabeller as SelfLabeller

__all__ = ["AssociativeMemory", "Relabelling", "SelfLabeller"]
