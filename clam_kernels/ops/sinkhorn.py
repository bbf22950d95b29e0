# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling: sinkhorn_potentials and sinkhorn_pass, of scores and of features. Equations:
docs/ops/sinkhorn.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

import python_fallback

from .._core import checks
from .._core.install import op
from .._core.spec import Gradient
from . import _sinkhorn as _parts

# ---- the documented functions ------------------------------------------------------------------


def sinkhorn_potentials(
    logits: Tensor,
    n_iter: int,
    *,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials f, g for which exp(L + f + g) has given row and column sums, by Sinkhorn scaling.

        L_ij = scale * logits_ij + bias_j                            (eq. 0 of docs/ops/sinkhorn.md)
        g_j = log_col_j - logsumexp_i(L_ij + f_i)                    (eq. 1)
        f_i = log_row_i - logsumexp_j(L_ij + g_j)                    (eq. 2)

    Parameters
    ----------
    logits : Tensor [..., N, K], float16, bfloat16, float32 or float64
        Scores of N rows for K prototypes, divided by epsilon, unless scale = 1 / epsilon. -inf
        forbids a pair. Leading dims of all arguments broadcast.
    n_iter : int, >= 0
        Number of iterations, (1) and (2) each; 0 computes only f from the first g.
    log_row : Tensor [..., N], any float dtype, optional
        Logarithm of each row's mass; -inf masks the row, which may then be NaN. Default 1/N each.
    log_col : Tensor [..., K], any float dtype, optional
        Logarithm of each prototype's mass, with the same total; default 1/K each.
    init : Tensor [..., K], any float dtype, optional
        The first g, for example that of an earlier call; default 0. With `prototype_first`, (2)
        runs once before the iterations.
    prototype_first : bool
        Whether (1) runs before (2) in each iteration. For small n_iter the order matters.
    bias : Tensor [..., K], any float dtype, optional
        Added to the scaled logits of each prototype.
    scale : Tensor [...], any float dtype, finite, > 0, optional
        Factor of the logits of each problem, applied as they are loaded: no array of the products
        exists. Default 1.
    precision : "highest", "high" or "medium", optional
        No effect: there is no matrix product.

    Returns
    -------
    f : Tensor [..., N], float32 (float64 for float64)
        -inf for masked rows.
    g : Tensor [..., K], float32 (float64 for float64)
        The codes of the rows are softmax_j(L + g).
    err : Tensor [...], float32 (float64 for float64)
        L1 error of the marginal sums of the side whose half-step was not the last (eq. 3). No
        gradient.
    status : Tensor [...], int64
        0: fine. 2: NaN or +inf in an active entry. 3: a row or prototype with mass has no pair
        above -inf. 4: no active row. f, g and err are NaN for 2 and 3.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape, device or value that does not fit.

    Notes
    -----
    Each iteration reads each entry once and computes one exponential of it; memory O(N + K) without
    the arguments. Hand-written gradients through all iterations for all tensors; double backward
    raises NotImplementedError.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.ops.sinkhorn import sinkhorn_potentials
    >>> logits = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> f, g, err, status = sinkhorn_potentials(logits, 1)
    >>> torch.softmax(logits + g, -1)
    tensor([[0.5938, 0.4062],
            [0.3498, 0.6502]])
    """
    checks.tensor("logits", logits)
    _check_rule(n_iter, prototype_first, precision)
    _check_tensors(log_row=log_row, log_col=log_col, init=init, bias=bias, scale=scale)
    f, g, err, status = torch.ops.clam.sinkhorn_potentials(
        logits, n_iter, log_row, log_col, init, prototype_first, bias, scale, precision
    )
    return f, g, err, status


def sinkhorn_potentials_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    *,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn_potentials` of the scores z @ prototypes^T, which are computed for each tile.

        L_ij = scale * (z_i . prototypes_j) + bias_j                 (eq. 4 of docs/ops/sinkhorn.md)

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Features. Leading dims of all arguments broadcast.
    prototypes : Tensor [..., K, D], dtype and device of z
        Prototypes, divided by epsilon unless scale = 1 / epsilon.
    n_iter : int, >= 0
        Number of iterations. This and the arguments from log_row on are as in
        `sinkhorn_potentials`.
    bias : Tensor [..., K], any float dtype, optional
        Added to the scaled scores of each prototype.
    log_row : Tensor [..., N], optional
        Logarithm of each row's mass.
    log_col : Tensor [..., K], optional
        Logarithm of each prototype's mass.
    init : Tensor [..., K], optional
        The first g.
    prototype_first : bool
        Whether the half-step of the prototypes is the first of an iteration.
    scale : Tensor [...], any float dtype, finite, > 0, optional
        Factor of the scores of each problem, applied after the product. Default 1.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products; None is torch.get_float32_matmul_precision().

    Returns
    -------
    f, g, err, status : Tensors
        As in `sinkhorn_potentials`.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape, device or value that does not fit.

    Notes
    -----
    Memory O(N D + K D), never N x K. Hand-written gradients for all tensors.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.ops.sinkhorn import sinkhorn_potentials, sinkhorn_potentials_features
    >>> z, prototypes = torch.eye(3)[:2], torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    >>> g = sinkhorn_potentials_features(z, prototypes, 3)[1]
    >>> torch.equal(g, sinkhorn_potentials(z @ prototypes.T, 3)[1])
    True
    """
    checks.tensor("z", z)
    checks.tensor("prototypes", prototypes)
    _check_rule(n_iter, prototype_first, precision)
    _check_tensors(bias=bias, log_row=log_row, log_col=log_col, init=init, scale=scale)
    f, g, err, status = torch.ops.clam.sinkhorn_potentials_features(
        z, prototypes, n_iter, bias, log_row, log_col, init, prototype_first, scale, precision
    )
    return f, g, err, status


def sinkhorn_pass(
    logits: Tensor,
    g: Tensor,
    *,
    log_row: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The half-step of the rows, and the column masses after it.

    An iteration needs no more of the N x K entries, also with acceleration or several processes.

        L_ij = scale * logits_ij + bias_j                            (eq. 0 of docs/ops/sinkhorn.md)
        f_i = log_row_i - logsumexp_j(L_ij + g_j)                    (eq. 2)
        log_mass_j = g_j + logsumexp_i(L_ij + f_i)                   (eq. 5)

    Parameters
    ----------
    logits : Tensor [..., N, K], float16, bfloat16, float32 or float64
        As in `sinkhorn_potentials`. Leading dims of all arguments broadcast.
    g : Tensor [..., K], any float dtype
        Potentials of the prototypes; -inf masks the column, which may then be NaN.
    log_row : Tensor [..., N], any float dtype, optional
        Logarithm of each row's mass; -inf masks the row. Default 1/N each.
    bias : Tensor [..., K], any float dtype, optional
        Added to the scaled logits of each prototype.
    scale : Tensor [...], any float dtype, finite, > 0, optional
        Factor of the logits of each problem. Default 1.
    precision : "highest", "high" or "medium", optional
        No effect: there is no matrix product.

    Returns
    -------
    f : Tensor [..., N], float32 (float64 for float64)
        -inf for masked rows.
    log_mass : Tensor [..., K], float32 (float64 for float64)
        Logarithm of each column's sum of exp(L + f + g); -inf where that is 0. The half-step of the
        prototypes is g + log_col - log_mass.
    status : Tensor [...], int64
        0: fine. 2: NaN or +inf in an active entry. 3: a row with mass has no pair above -inf. 4: no
        active row. f and log_mass are NaN for 2 and 3.

    Raises
    ------
    TypeError, ValueError
        As in `sinkhorn_potentials`.

    Notes
    -----
    Reads each entry once and computes one exponential of it. Hand-written gradients for all
    tensors.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.ops.sinkhorn import sinkhorn_pass
    >>> f, log_mass, status = sinkhorn_pass(torch.zeros(2, 2), torch.tensor([0.0, 1.0]))
    >>> log_mass.exp()
    tensor([0.2689, 0.7311])
    """
    checks.tensor("logits", logits)
    checks.tensor("g", g)
    _check_tensors(log_row=log_row, bias=bias, scale=scale)
    checks.text("precision", precision)
    f, log_mass, status = torch.ops.clam.sinkhorn_pass(logits, g, log_row, bias, scale, precision)
    return f, log_mass, status


def sinkhorn_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    *,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_pass` of the scores z @ prototypes^T, which are computed for each tile.

        L_ij = scale * (z_i . prototypes_j) + bias_j                 (eq. 4 of docs/ops/sinkhorn.md)

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Features. Leading dims of all arguments broadcast.
    prototypes : Tensor [..., K, D], dtype and device of z
        Prototypes, divided by epsilon unless scale = 1 / epsilon.
    g : Tensor [..., K], any float dtype
        Potentials of the prototypes.
    bias : Tensor [..., K], any float dtype, optional
        Added to the scaled scores of each prototype.
    log_row : Tensor [..., N], any float dtype, optional
        Logarithm of each row's mass.
    scale : Tensor [...], any float dtype, finite, > 0, optional
        Factor of the scores of each problem, applied after the product. Default 1.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products; None is torch.get_float32_matmul_precision().

    Returns
    -------
    f, log_mass, status : Tensors
        As in `sinkhorn_pass`.

    Raises
    ------
    TypeError, ValueError
        As in `sinkhorn_potentials_features`.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.ops.sinkhorn import sinkhorn_features_pass
    >>> f, log_mass, status = sinkhorn_features_pass(torch.eye(2), torch.eye(2), torch.zeros(2))
    >>> log_mass.exp()
    tensor([0.5000, 0.5000])
    """
    checks.tensor("z", z)
    checks.tensor("prototypes", prototypes)
    checks.tensor("g", g)
    _check_tensors(bias=bias, log_row=log_row, scale=scale)
    checks.text("precision", precision)
    f, log_mass, status = torch.ops.clam.sinkhorn_features_pass(
        z, prototypes, g, bias, log_row, scale, precision
    )
    return f, log_mass, status


def _check_tensors(**optional: object) -> None:
    """Check types whose errors the dispatcher would word differently."""
    for name, value in optional.items():
        checks.tensor(name, value, optional=True)


def _check_rule(n_iter: object, prototype_first: object, precision: object) -> None:
    """Check the types of the settings."""
    checks.whole("n_iter", n_iter, 0)
    checks.type_error(
        isinstance(prototype_first, bool),
        lambda: checks.wording("prototype_first", "a bool", type(prototype_first).__name__),
    )
    checks.text("precision", precision)


# ---- the ops -----------------------------------------------------------------------------------

_truth = python_fallback.sinkhorn
_MASSES = "Tensor? log_row=None, Tensor? log_col=None, Tensor? init=None, bool prototype_first=True"
_LAST = "Tensor? scale=None, str? precision=None"
_KERNELS = "clam_kernels.kernels.sinkhorn"
_LIMITS = {"triton": "clam_kernels.kernels.common.launch:why_not"}
_VECTORS = {"bias": 1, "log_row": 1, "log_col": 1, "init": 1, "g": 1, "scale": 0}

op(
    name="sinkhorn_potentials",
    arguments=f"Tensor logits, SymInt n_iter, {_MASSES}, Tensor? bias=None, {_LAST}",
    returns="(Tensor, Tensor, Tensor, Tensor)",
    check=_parts.check_sinkhorn,
    check_values=_parts.check_scale_values,
    fake=_parts.fake_sinkhorn,
    truth=_truth.sinkhorn_potentials,
    reference=_truth.sinkhorn_potentials_forward,
    function=sinkhorn_potentials,
    kernels={"triton": f"{_KERNELS}.solver:sinkhorn_potentials"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.sinkhorn_potentials_backward,
        kernels={"triton": f"{_KERNELS}.backward:sinkhorn_potentials_backward"},
        output_dims=(1, 1),
    ),
    core={"logits": 2, **_VECTORS},
)

op(
    name="sinkhorn_potentials_features",
    arguments=f"Tensor z, Tensor prototypes, SymInt n_iter, Tensor? bias=None, {_MASSES}, {_LAST}",
    returns="(Tensor, Tensor, Tensor, Tensor)",
    check=_parts.check_features,
    check_values=_parts.check_scale_values,
    fake=_parts.fake_features,
    truth=_truth.sinkhorn_potentials_features,
    reference=_truth.sinkhorn_potentials_features_forward,
    function=sinkhorn_potentials_features,
    kernels={"triton": f"{_KERNELS}.solver:sinkhorn_potentials_features"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.sinkhorn_potentials_features_backward,
        kernels={"triton": f"{_KERNELS}.backward:sinkhorn_potentials_features_backward"},
        output_dims=(1, 1),
    ),
    same_dtype=("z", "prototypes"),
    core={"z": 2, "prototypes": 2, **_VECTORS},
)

op(
    name="sinkhorn_pass",
    arguments=f"Tensor logits, Tensor g, Tensor? log_row=None, Tensor? bias=None, {_LAST}",
    returns="(Tensor, Tensor, Tensor)",
    check=_parts.check_pass,
    check_values=_parts.check_scale_values,
    fake=_parts.fake_pass,
    truth=_truth.sinkhorn_pass,
    reference=_truth.sinkhorn_pass_forward,
    function=sinkhorn_pass,
    kernels={"triton": f"{_KERNELS}.solver:sinkhorn_pass"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.sinkhorn_pass_backward,
        kernels={"triton": f"{_KERNELS}.backward:sinkhorn_pass_backward"},
        output_dims=(1, 1),
    ),
    core={"logits": 2, **_VECTORS},
)

op(
    name="sinkhorn_features_pass",
    arguments="Tensor z, Tensor prototypes, Tensor g, Tensor? bias=None, Tensor? log_row=None,"
    f" {_LAST}",
    returns="(Tensor, Tensor, Tensor)",
    check=_parts.check_features_pass,
    check_values=_parts.check_scale_values,
    fake=_parts.fake_features_pass,
    truth=_truth.sinkhorn_features_pass,
    reference=_truth.sinkhorn_features_pass_forward,
    function=sinkhorn_features_pass,
    kernels={"triton": f"{_KERNELS}.solver:sinkhorn_features_pass"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.sinkhorn_features_pass_backward,
        kernels={"triton": f"{_KERNELS}.backward:sinkhorn_features_pass_backward"},
        output_dims=(1, 1),
    ),
    same_dtype=("z", "prototypes"),
    core={"z": 2, "prototypes": 2, **_VECTORS},
)
