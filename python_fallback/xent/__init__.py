# SPDX-License-Identifier: Apache-2.0
"""Cross-entropies over prototypes without logits: hard labels, and the codes of a teacher.

`equations` is the truth; `nce` and `swapped` are the CPU backend, with gradients by hand. `sums`
adds up the gradients of prototypes.
"""

from .equations import proto_nce_losses
from .nce import proto_nce_losses_backward, proto_nce_losses_forward, proto_nce_losses_saved

__all__ = [
    "proto_nce_losses",
    "proto_nce_losses_backward",
    "proto_nce_losses_forward",
    "proto_nce_losses_saved",
]
