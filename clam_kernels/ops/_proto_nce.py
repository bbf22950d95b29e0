# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy over prototypes with a reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import checks

REDUCTIONS = ("mean", "sum", "none")
_LISTED = ", ".join(f"'{word}'" for word in REDUCTIONS)


def proto_nce(
    z: Tensor,
    prototypes: Tensor,
    phi: float | Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    reduction: str = "mean",
    precision: str | None = None,
) -> Tensor:
    """Cross-entropy of rows and the prototypes of their labels, without N x K logits (PCL).

        s_ij = z_i . c_j / phi_j + b_j                               (eq. 1 of docs/ops/xent.md)
        l_mi = logsumexp_{j in m} s_ij - s_i,label                   (eq. 2)
        loss = 1/M sum_m sum_i l_mi / n_m                            (eq. 3)

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows: embeddings. Leading dims of all arguments broadcast.
    prototypes : Tensor [..., K, D], dtype and device of z
        Prototypes of all M clusterings, one after another.
    phi : float or Tensor [], [..., 1] or [..., K], > 0
        Temperature: one, or one for each prototype; PCL's concentration.
    labels : Tensor [N] or [..., M, N], int64
        The prototype of each row, counted from the first of its clustering; -1: the row is ignored.
    bias : Tensor [..., K], any float dtype, optional
        Added to the scores of a prototype; -inf masks it.
    offsets : ints [M + 1], optional
        The first prototype of each clustering, and K: (0, K_1, K_1 + K_2, ...). Default (0, K).
    reduction : "mean", "sum" or "none"
        "mean" divides the sum of each clustering by its number n_m of labels above -1, and the sum
        over clusterings by M; a clustering without such a label counts as 0.
    precision : "highest", "high" or "medium", optional
        Of the matrix products; None follows torch.get_float32_matmul_precision(). On a CPU all
        modes are the same.

    Returns
    -------
    Tensor [...], or [..., M, N] for "none" ([..., N] for labels [N]), float32 (float64 for float64)
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
    Memory O(N D + K D), never N x K. Gradients for z, prototypes, phi and bias are written by hand.
    On a CPU the forward computes them, if any is needed, and the backward scales them; an upstream
    gradient that differs from row to row makes the backward compute them again. A row that is not
    finite has no influence on the gradients of the other arguments.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> clam_kernels.proto_nce(z, torch.eye(2), 0.5, torch.tensor([0, -1]))
    tensor(0.1269)
    """
    phi, offsets = checked_nce(z, prototypes, phi, labels, bias, offsets, precision)
    checks.expect(reduction in REDUCTIONS, "reduction", _LISTED, repr(reduction))
    is_one = labels.ndim == 1
    rows = labels[None] if is_one else labels
    packet = torch.ops.clam.proto_nce_losses
    call: Any = packet.phi_tensor if isinstance(phi, Tensor) else packet.default
    losses: Tensor = call(z, prototypes, phi, rows, bias, offsets, precision)
    if reduction == "none":
        return losses[..., 0, :] if is_one else losses
    if reduction == "sum":
        return losses.sum((-2, -1))
    counts = (rows >= 0).sum(-1).clamp(min=1)
    return (losses.sum(-1) / counts).mean(-1)


def checked_nce(
    z: object,
    prototypes: object,
    phi: Any,
    labels: object,
    bias: object,
    offsets: Any,
    precision: object,
) -> tuple[Any, list[int] | None]:
    """Check the types that the dispatcher would refuse in other words; return phi, a number as a
    Python float, and the offsets as a list.
    """
    for name, value in (("z", z), ("prototypes", prototypes), ("labels", labels)):
        checks.tensor(name, value)
    if not isinstance(phi, Tensor):
        phi = checks.real("phi", phi, "a number or a Tensor")
    checks.tensor("bias", bias, optional=True)
    checks.text("precision", precision)
    if offsets is None:
        return phi, None
    ok = isinstance(offsets, Sequence) and all(checks.is_whole(x) for x in offsets)
    checks.type_error(ok, lambda: checks.wording("offsets", "a list of ints or None", offsets))
    return phi, list(offsets)
