# SPDX-License-Identifier: Apache-2.0
"""Associative memory: the recursion, its energy, the nearest memory.

`equations` is the truth; `forward` and `backward` are the CPU backend. `problem` has the memories
of one cell, `trajectory` the states of a chunk, `doubt` the rule that says which rows are in doubt,
`exact` computes these rows in float64, `hard` the recursion at beta = inf.
"""

from .backward import (
    am_energy_backward,
    am_recursion_backward,
    am_step_backward,
)
from .equations import (
    am_assign,
    am_energy,
    am_recursion,
    am_step,
    am_weights,
)
from .forward import (
    am_assign_forward,
    am_energy_forward,
    am_recursion_forward,
    am_step_forward,
    am_step_saved,
)

__all__ = [
    "am_assign",
    "am_assign_forward",
    "am_energy",
    "am_energy_backward",
    "am_energy_forward",
    "am_recursion",
    "am_recursion_backward",
    "am_recursion_forward",
    "am_step",
    "am_step_backward",
    "am_step_forward",
    "am_step_saved",
    "am_weights",
]
