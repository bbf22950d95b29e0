# SPDX-License-Identifier: Apache-2.0
"""Deep embedded clustering: Student-t soft assignments, the sharpened target, the KL loss.

`equations` is the truth; `forward` and `backward` are the CPU backend. `distances` has the scaled
distances of a chunk, `shares` the assignments and targets of a chunk, `target` the numbers that a
frozen target stores.
"""

from .backward import dec_losses_backward
from .equations import dec_losses, student_t_stats
from .forward import dec_losses_forward, student_t_stats_forward
from .target import target_norms, target_shares

__all__ = [
    "dec_losses",
    "dec_losses_backward",
    "dec_losses_forward",
    "student_t_stats",
    "student_t_stats_forward",
    "target_norms",
    "target_shares",
]
