# SPDX-License-Identifier: Apache-2.0
"""Cross-entropies over prototypes: proto_nce_losses, and on it proto_nce; swapped_prediction.
Equations: docs/ops/xent.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import python_fallback

from .._core import checks
from .._core.install import op
from .._core.spec import Gradient
from . import _xent as _parts
from ._concentration import cluster_concentration as cluster_concentration
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


def swapped_prediction(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    bias: Tensor | None = None,
    target_z: Tensor | None = None,
    target_prototypes: Tensor | None = None,
    target_bias: Tensor | None = None,
    pairs: Tensor | None = None,
    weight: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Cross-entropy of the rows of each view and the codes of other views (SwAV, DINO, iBOT).

        S_vik = z_vi . c_k + b_k,  lse_vi = logsumexp_k(S_vik / temperature)
                                                                     (eq. 4 of docs/ops/xent.md)
        q_aik = exp(S^t_aik / epsilon + f_ai + g_ak),  t_vik = sum_a pairs_av q_aik
                                                                     (eqs. 5-6)
        L = sum_vi h_vi sum_k t_vik (lse_vi - S_vik / temperature),  h_vi = w_vi / sum_j w_vj
                                                                     (eq. 7)

    The codes q come from their potentials tile by tile; no array of N x K entries exists.

    Parameters
    ----------
    z : Tensor [..., V, N, D], float16, bfloat16, float32 or float64
        Rows of V views of N samples. Leading dims of all arguments broadcast.
    prototypes : Tensor [..., K, D], dtype and device of z
        Prototypes.
    f : Tensor [..., A, N], any float dtype
        Potentials of the rows of the A views that have codes. Rows of q sum to 1 for
        -logsumexp_k(S^t / epsilon + g): `code_potentials` of a `sinkhorn` result.
    g : Tensor [..., A, K], any float dtype
        Potentials of the prototypes. DINO's centred targets: -centre / epsilon.
    temperature : float, > 0
        Of the scores of the rows.
    epsilon : float, > 0
        Temperature of the codes.
    bias : Tensor [..., K], any float dtype, optional
        Added to the scores of a prototype; -inf masks it, and it may then hold NaN.
    target_z : Tensor [..., A, N, D_t], any float dtype, optional
        Rows of the teacher; default the first A views.
    target_prototypes : Tensor [..., K, D_t], any float dtype, optional
        Prototypes of the teacher; default `prototypes`.
    target_bias : Tensor [..., K], any float dtype, optional
        Bias of the teacher; default `bias`.
    pairs : Tensor [..., A, V], any float dtype, optional
        Weight of predicting the code of view a from view v. Default 1 / (A (V - 1)) for v != a and
        0 for v = a, which needs V >= 2.
    weight : Tensor [N], [..., 1, N] or [..., V, N], any float dtype, >= 0, optional
        Of each row; the loss of each view is divided by the sum of its weights. A row of weight 0
        has no influence, whatever it contains.
    precision : "highest", "high" or "medium", optional
        Of the matrix products; None follows torch.get_float32_matmul_precision(). On a CPU all
        modes are the same.

    Returns
    -------
    Tensor [...], float32 (float64 for float64)
        0 where all weights are 0. NaN with a row of positive weight that is not finite, or whose
        code is not; +inf where a code has mass on a prototype that `bias` masks.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit; one view without `pairs`. The values of
        `weight` are checked on a CPU.

    Notes
    -----
    Gradients for z, prototypes and bias are written by hand; q is a constant, and f, g, the
    teacher, pairs and weight get none. On a CPU the forward computes the gradients, if any is
    needed and K is at most 32,768, and the backward scales them; for larger K the backward computes
    the scores again. A row that is not finite has no influence on the gradients of prototypes and
    bias. Double backward raises NotImplementedError; torch.func transforms and forward-mode AD run
    `python_fallback.xent.swapped_prediction`, which computes N x K arrays.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> z = torch.nn.functional.normalize(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]] * 2), dim=-1)
    >>> prototypes = torch.eye(2)
    >>> codes = clam_kernels.sinkhorn((z, prototypes), epsilon=0.05, n_iter=3)
    >>> clam_kernels.swapped_prediction(z, prototypes, *codes.code_potentials())
    tensor(0.0119)
    """
    tensors = (("z", z), ("prototypes", prototypes), ("f", f), ("g", g))
    for name, value in tensors:
        checks.tensor(name, value)
    temperature = checks.real("temperature", temperature)
    epsilon = checks.real("epsilon", epsilon)
    constants = {
        "target_z": target_z, "target_prototypes": target_prototypes, "target_bias": target_bias,
        "pairs": pairs, "weight": weight,
    }  # fmt: skip
    for name, constant in {"bias": bias, **constants}.items():
        checks.tensor(name, constant, optional=True)
    checks.text("precision", precision)
    fixed = [None if x is None else x.detach() for x in constants.values()]
    f, g = f.detach(), g.detach()
    out: Tensor = torch.ops.clam.swapped_prediction(
        z, prototypes, f, g, temperature, epsilon, bias, *fixed, precision
    )
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

op(
    name="swapped_prediction",
    arguments="Tensor z, Tensor prototypes, Tensor f, Tensor g, float temperature=0.1, "
    "float epsilon=0.05, Tensor? bias=None, Tensor? target_z=None, "
    "Tensor? target_prototypes=None, Tensor? target_bias=None, Tensor? pairs=None, "
    "Tensor? weight=None, str? precision=None",
    returns="Tensor",
    check=_parts.check_swapped,
    check_values=_parts.check_weight_values,
    fake=_parts.fake_swapped,
    truth=_truth.swapped_prediction,
    reference=_truth.swapped_prediction_forward,
    function=swapped_prediction,
    gradient=Gradient(
        reference=_truth.swapped_prediction_backward,
        saved=(_truth.swapped_prediction_saved, _parts.fake_swapped_saved),
        saved_dims=(2, 2, 3, 2, 1),
        saved_for_needs=True,
        output_dims=0,
    ),
    same_dtype=("z", "prototypes"),
    core={
        "z": 3, "prototypes": 2, "f": 2, "g": 2, "bias": 1, "target_z": 3,
        "target_prototypes": 2, "target_bias": 1, "pairs": 2, "weight": 2,
    },
)  # fmt: skip
