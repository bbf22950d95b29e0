# SPDX-License-Identifier: Apache-2.0
"""The reference: every op of clam_kernels in plain torch; it imports nothing else.

`<family>.<op>` is the equation, on any device, differentiable any number of times; it may need an
N x K array. `<family>.<op>_forward` and `<family>.<op>_backward` are the CPU backend: row chunks,
in place, never N x K.
"""

from . import am as am
from . import dec as dec
from . import kmeans as kmeans
from . import sinkhorn as sinkhorn
from . import xent as xent
