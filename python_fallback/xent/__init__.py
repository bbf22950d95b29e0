# SPDX-License-Identifier: Apache-2.0
"""Cross-entropies over prototypes without logits: hard labels, and the codes of a teacher.

`equations` is the truth; `nce`, `swapped` and `swapped_backward` are the CPU backend, with
gradients by hand. `sums` adds up the gradients of prototypes.
"""

from .equations import proto_nce_losses, swapped_prediction
from .nce import proto_nce_losses_backward, proto_nce_losses_forward, proto_nce_losses_saved
from .swapped import fits_one_tile, swapped_prediction_forward
from .swapped_backward import swapped_prediction_backward, swapped_prediction_saved

__all__ = [
    "fits_one_tile",
    "proto_nce_losses",
    "proto_nce_losses_backward",
    "proto_nce_losses_forward",
    "proto_nce_losses_saved",
    "swapped_prediction",
    "swapped_prediction_backward",
    "swapped_prediction_forward",
    "swapped_prediction_saved",
]
