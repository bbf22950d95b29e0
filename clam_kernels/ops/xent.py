# SPDX-License-Identifier: Apache-2.0
"""Cross-entropies over prototypes: proto_nce_losses, and on it proto_nce. Equations:
docs/ops/xent.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import python_fallback

from .._core.install import op
from .._core.spec import Gradient
from . import _xent as _parts
from ._proto_nce import checked_nce as _checked_nce
from ._proto_nce import proto_nce as proto_nce

_PHI = {"phi_tensor": {"phi": "Tensor phi"}, "": {"phi": "float phi"}}


# ---- the documented functions ------------------------------------------------------------------


def proto_nce_losses(
    z: Tensor,
    prototypes: Tensor,
    phi: float | Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    precision: str | None = None,
) -> Tensor:
    """Cross-entropy of each row and the prototype of its label, for M clusterings in one call.

        s_ij = z_i . c_j / phi_j + b_j                               (eq. 1 of docs/ops/xent.md)
        l_mi = logsumexp_{j in m} s_ij - s_i,label                   (eq. 2)

    `proto_nce` calls this op and reduces its result.

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows: embeddings. Leading dims of all arguments broadcast.
    prototypes : Tensor [..., K, D], dtype and device of z
        Prototypes of all M clusterings, one after another.
    phi : float or Tensor [], [..., 1] or [..., K], > 0
        Temperature: one, or one for each prototype.
    labels : Tensor [..., M, N], int64
        The prototype of each row, counted from the first of its clustering; -1: the row is ignored.
    bias : Tensor [..., K], any float dtype, optional
        Added to the scores of a prototype; -inf masks it, and it may then hold NaN.
    offsets : ints [M + 1], optional
        The first prototype of each clustering, and K: (0, K_1, K_1 + K_2, ...). Default (0, K).
    precision : "highest", "high" or "medium", optional
        Of the matrix products; see `proto_nce`.

    Returns
    -------
    Tensor [..., M, N], float32 (float64 for float64)
        0 for an ignored row, NaN for another row that is not finite.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit; on a CPU also a label outside its clustering, or
        of a masked prototype (elsewhere its loss is +inf).

    Notes
    -----
    Memory O(N D + K D), never N x K; gradients as in `proto_nce`. Double backward raises
    NotImplementedError; torch.func transforms and forward-mode AD run
    `python_fallback.xent.proto_nce_losses`, which computes an N x K array.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> clam_kernels.ops.xent.proto_nce_losses(z, torch.eye(2), 0.5, torch.tensor([[0, 0]]))
    tensor([[0.1269, 2.1269]])
    """
    phi, offsets = _checked_nce(z, prototypes, phi, labels, bias, offsets, precision)
    packet = torch.ops.clam.proto_nce_losses
    call: Any = packet.phi_tensor if isinstance(phi, Tensor) else packet.default
    out: Tensor = call(z, prototypes, phi, labels, bias, offsets, precision)
    return out


# ---- the declarations --------------------------------------------------------------------------

_truth = python_fallback.xent

op(
    name="proto_nce_losses",
    arguments="Tensor z, Tensor prototypes, {phi}, Tensor labels, Tensor? bias=None, "
    "int[]? offsets=None, str? precision=None",
    returns="Tensor",
    overloads=_PHI,
    check=_parts.check_nce,
    check_values=_parts.check_nce_values,
    fake=_parts.fake_nce,
    truth=_truth.proto_nce_losses,
    reference=_truth.proto_nce_losses_forward,
    function=proto_nce_losses,
    gradient=Gradient(
        reference=_truth.proto_nce_losses_backward,
        saved=(_truth.proto_nce_losses_saved, _parts.fake_nce_saved),
        saved_dims=(3, 2, 1, 1),
        saved_for_needs=True,
        output_dims=2,
    ),
    same_dtype=("z", "prototypes"),
    core={"z": 2, "prototypes": 2, "phi": 1, "labels": 2, "bias": 1},
)
