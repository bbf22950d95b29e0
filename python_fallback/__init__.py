# SPDX-License-Identifier: Apache-2.0
"""The reference: every op of clam_kernels in plain torch, and nothing but torch.

`<family>.<op>` is the equation, differentiable any number of times and on any device; it may hold
an N x K array. `<family>.<op>_forward` and `<family>.<op>_backward` are the CPU backend: row
chunks, in place, never N x K.
"""

from . import am as am
from . import dec as dec
from . import kmeans as kmeans
from . import sinkhorn as sinkhorn
