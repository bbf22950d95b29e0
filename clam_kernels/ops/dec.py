# SPDX-License-Identifier: Apache-2.0
"""Deep embedded clustering: student_t_stats, dec_losses, and on them dec_target and dec_loss.
Equations: docs/ops/dec.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import python_fallback

from .._core import checks
from .._core.install import op
from .._core.spec import Gradient
from . import _dec as _parts
from ._dec_target import DecTarget as DecTarget
from ._dec_target import dec_loss as dec_loss
from ._dec_target import dec_target as dec_target

_ALPHA = {"alpha_tensor": {"alpha": "Tensor alpha"}, "": {"alpha": "float alpha=1.0"}}


# ---- the documented functions ------------------------------------------------------------------


def student_t_stats(
    z: Tensor,
    mu: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    weight: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Soft assignment of rows to centroids: log-sum-exp, label, soft counts, in one pass over z.

        s_ij = -(alpha + 1)/2 log(1 + |z_i - mu_j|^2 / alpha),  L_i = logsumexp_j s_ij
        q_ij = exp(s_ij - L_i),  f_j = sum_i w_i q_ij           (eqs. 1-3 of docs/ops/dec.md)

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows: embeddings. Leading dims of all arguments broadcast.
    mu : Tensor [..., K, D], dtype and device of z
        Centroids. If one is not finite, every result of its problem is NaN and every label -1.
    alpha : float or Tensor [] or [..., 1], > 0, unit |z|^2
        Degrees of freedom. The number inf is a Gaussian of variance 1; inf in a tensor gives NaN.
    weight : Tensor [..., N], any float dtype, optional
        Of each row in the soft counts; 1 by default.
    precision : "highest", "high" or "medium", optional
        Of the matrix products; None follows torch.get_float32_matmul_precision(). On a CPU all
        modes are the same.

    Returns
    -------
    lse : Tensor [..., N], float32 (float64 for float64)
        L_i; NaN for a row that is not finite.
    labels : Tensor [..., N], int64
        Nearest centroid as of `kmeans_assign`: exact, the lowest index on ties; -1 for a row that
        is not finite.
    counts : Tensor [..., K], float64
        Soft counts f over the finite rows.
    bad : Tensor [...], int64
        Number of rows that are not finite.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit; values are checked on numbers and CPU tensors.

    Notes
    -----
    Memory O(N + K D), never N x K. No result has a gradient. The result repeats bit for bit.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> z, mu = torch.tensor([[0.0], [3.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    >>> lse, labels, counts, bad = clam_kernels.student_t_stats(z, mu)
    >>> labels.tolist(), counts.round(decimals=6).tolist(), int(bad)
    ([0, 1, 0], [1.5, 1.5], 0)
    """
    alpha = _checked((("z", z), ("mu", mu)), alpha, (("weight", weight),), precision)
    packet = torch.ops.clam.student_t_stats
    call: Any = packet.alpha_tensor if isinstance(alpha, Tensor) else packet.default
    lse, labels, counts, bad = call(z, mu, alpha, weight, precision)
    return lse, labels, counts, bad


def dec_losses(
    z: Tensor,
    mu: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    weight: Tensor | None = None,
    log_counts: Tensor | None = None,
    z0: Tensor | None = None,
    mu0: Tensor | None = None,
    alpha0: float = 1.0,
    log_norm: Tensor | None = None,
    p: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Loss KL(p_i || q_i) of each row against a target p that has no gradient.

        p_ij = exp(2 s_ij - log f_j - R_i),  R_i = logsumexp_j(2 s_ij - log f_j)
        l_i  = sum_j p_ij (log p_ij - log q_ij)                 (eqs. 4-6 of docs/ops/dec.md)

    `dec_loss` calls this op with a `DecTarget` and reduces its result. The arguments say where p
    comes from: `p` itself; else the frozen rows z0; else the rows z with `log_counts`; else the
    rows z with the soft counts of this call.

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows: embeddings. Leading dims of all arguments broadcast.
    mu : Tensor [..., K, D], dtype and device of z
        Centroids.
    alpha : float or Tensor [] or [..., 1], > 0, unit |z|^2
        Degrees of freedom of q; the number inf is a Gaussian of variance 1.
    weight : Tensor [..., N], any float dtype, optional
        Of each row in the soft counts of this call; no loss is multiplied by it.
    log_counts : Tensor [..., K], any float dtype, optional
        log f. A constant added to all of its entries changes no result without `log_norm`.
    z0 : Tensor [..., N, D], any float dtype, optional
        The same rows when the target was frozen; needs mu0 and log_counts.
    mu0 : Tensor [..., K, D], any float dtype, optional
        Centroids when the target was frozen.
    alpha0 : float, > 0
        Degrees of freedom when the target was frozen.
    log_norm : Tensor [..., N], any float dtype, optional
        R of each frozen row, without which each row of p sums to 1; with `p`, each of its rows is
        divided by exp(log_norm).
    p : Tensor [..., N, K] or [..., 1, K], any float dtype, optional
        The target itself, or one for all rows.
    precision : "highest", "high" or "medium", optional
        Of the matrix products; see `student_t_stats`.

    Returns
    -------
    Tensor [..., N], float32 (float64 for float64)
        Not weighted. NaN for a row that is not finite, or whose z0 or p is not.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit; a part of a frozen target is missing.

    Notes
    -----
    Memory O(N D + K D), never N x K. Backward is written by hand for z, mu and alpha; every other
    argument gets zeros. A row that is not finite has no influence on the gradients of mu and
    alpha. Double backward raises NotImplementedError; torch.func transforms and forward-mode AD
    run `python_fallback.dec.dec_losses`, which computes an N x K x D array.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> z = torch.tensor([[0.0], [1.0]])
    >>> clam_kernels.ops.dec.dec_losses(z, z.clone())
    tensor([0.0437, 0.0437])
    """
    frozen = (("log_counts", log_counts), ("z0", z0), ("mu0", mu0), ("log_norm", log_norm))
    options = (("weight", weight), *frozen, ("p", p))
    alpha = _checked((("z", z), ("mu", mu)), alpha, options, precision)
    alpha0 = checks.real("alpha0", alpha0)
    packet = torch.ops.clam.dec_losses
    call: Any = packet.alpha_tensor if isinstance(alpha, Tensor) else packet.default
    out: Tensor = call(z, mu, alpha, weight, log_counts, z0, mu0, alpha0, log_norm, p, precision)
    return out


def _checked(
    tensors: tuple[tuple[str, object], ...],
    alpha: Any,
    options: tuple[tuple[str, object], ...],
    precision: object,
) -> Any:
    """Check the types that the dispatcher would refuse in other words; return alpha, a number as a
    Python float.
    """
    for name, value in tensors:
        checks.tensor(name, value)
    if not isinstance(alpha, Tensor):
        alpha = checks.real("alpha", alpha, "a number or a Tensor")
    for name, value in options:
        checks.tensor(name, value, optional=True)
    checks.text("precision", precision)
    return alpha


# ---- the declarations --------------------------------------------------------------------------

_truth = python_fallback.dec
_TARGET = (
    "Tensor? log_counts=None, Tensor? z0=None, Tensor? mu0=None, float alpha0=1.0, "
    "Tensor? log_norm=None, Tensor? p=None"
)
_CORE = {"z": 2, "mu": 2, "alpha": 1, "weight": 1}
_KERNELS = "clam_kernels.kernels.dec"
_LIMITS = {"triton": f"{_KERNELS}.call:why_not"}

op(
    name="student_t_stats",
    arguments="Tensor z, Tensor mu, {alpha}, Tensor? weight=None, str? precision=None",
    returns="(Tensor, Tensor, Tensor, Tensor)",
    overloads=_ALPHA,
    check=_parts.check_stats,
    check_values=_parts.check_values,
    fake=_parts.fake_stats,
    truth=_truth.student_t_stats,
    reference=_truth.student_t_stats_forward,
    function=student_t_stats,
    kernels={"triton": f"{_KERNELS}.stats:student_t_stats"},
    limits=_LIMITS,
    same_dtype=("z", "mu"),
    core=_CORE,
)

op(
    name="dec_losses",
    arguments=f"Tensor z, Tensor mu, {{alpha}}, Tensor? weight=None, {_TARGET}, "
    "str? precision=None",
    returns="Tensor",
    overloads=_ALPHA,
    check=_parts.check_losses,
    check_values=_parts.check_values,
    fake=_parts.fake_losses,
    truth=_truth.dec_losses,
    reference=_truth.dec_losses_forward,
    function=dec_losses,
    kernels={"triton": f"{_KERNELS}.losses:dec_losses"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.dec_losses_backward,
        kernels={"triton": f"{_KERNELS}.backward:dec_losses_backward"},
        output_dims=1,
    ),
    same_dtype=("z", "mu"),
    core={**_CORE, "log_counts": 1, "z0": 2, "mu0": 2, "log_norm": 1, "p": 2},
)
