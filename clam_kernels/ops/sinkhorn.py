# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling: sinkhorn and sinkhorn_pass, and both of features. Equations:
docs/ops/sinkhorn.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import python_fallback

from .._core import checks
from .._core.backend import PRECISIONS
from .._core.registry import Gradient, op

# ---- checks and fakes: argument for argument those of the schemas ------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_vectors(
    first: str, x: Tensor, vectors: list[tuple[str, Tensor | None, Any, str]]
) -> None:
    """Vectors [..., size] of any float dtype that belong to rows or columns."""
    for name, value, size, match in vectors:
        if value is None:
            continue
        checks.floating(name, value)
        checks.same_device(name, value, first, x)
        ok = value.ndim >= 1 and value.shape[-1] == size
        checks.shape(name, value, f"[..., {size}]", ok, match)


def _check_scores(logits: Tensor, vectors: dict[str, Tensor | None], precision: str | None) -> None:
    checks.floating("logits", logits)
    checks.device("logits", logits)
    checks.shape("logits", logits, "[..., N, K]", logits.ndim >= 2)
    checks.non_empty("logits", logits, -1, "K")
    match = f"logits {checks.spell(*logits.shape)}"
    n, k = logits.shape[-2:]
    sized = [(name, v, n if name == "log_row" else k, match) for name, v in vectors.items()]
    _check_vectors("logits", logits, sized)
    _batch(logits, **vectors)
    checks.one_of("precision", precision, PRECISIONS)


def _check_sinkhorn(
    logits: Tensor,
    n_iter: Any,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    precision: str | None,
) -> None:
    _check_scores(logits, {"log_row": log_row, "log_col": log_col, "init": init}, precision)
    checks.at_least("n_iter", n_iter, 0)


def _check_pass(logits: Tensor, g: Tensor, log_row: Tensor | None, precision: str | None) -> None:
    _check_scores(logits, {"g": g, "log_row": log_row}, precision)


def _batch(logits: Tensor, **vectors: Tensor | None) -> list[Any]:
    return checks.broadcast([("logits", logits, 2), *((n, v, 1) for n, v in vectors.items())])


def _check_both(
    z: Tensor, prototypes: Tensor, vectors: dict[str, Tensor | None], precision: str | None
) -> None:
    for name, x in (("z", z), ("prototypes", prototypes)):
        checks.floating(name, x)
        checks.device(name, x)
    checks.same_dtype("prototypes", prototypes, "z", z)
    checks.same_device("prototypes", prototypes, "z", z)
    checks.shape("z", z, "[..., N, D]", z.ndim >= 2)
    checks.shape("prototypes", prototypes, "[..., K, D]", prototypes.ndim >= 2)
    checks.non_empty("z", z, -1, "D")
    rows, columns = (
        f"{n} {checks.spell(*x.shape)}" for n, x in (("z", z), ("prototypes", prototypes))
    )
    same = prototypes.shape[-1] == z.shape[-1]
    checks.shape("prototypes", prototypes, f"[..., K, {z.shape[-1]}]", same, rows)
    checks.non_empty("prototypes", prototypes, -2, "K")
    n, k = z.shape[-2], prototypes.shape[-2]
    sized = [
        (name, v, n, rows) if name == "log_row" else (name, v, k, columns)
        for name, v in vectors.items()
    ]
    _check_vectors("z", z, sized)
    _batch_features(z, prototypes, **vectors)
    checks.one_of("precision", precision, PRECISIONS)


def _check_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: Any,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    precision: str | None,
) -> None:
    vectors = {"bias": bias, "log_row": log_row, "log_col": log_col, "init": init}
    _check_both(z, prototypes, vectors, precision)
    checks.at_least("n_iter", n_iter, 0)


def _check_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    precision: str | None,
) -> None:
    _check_both(z, prototypes, {"g": g, "bias": bias, "log_row": log_row}, precision)


def _batch_features(z: Tensor, prototypes: Tensor, **vectors: Tensor | None) -> list[Any]:
    given = [(name, v, 1) for name, v in vectors.items()]
    return checks.broadcast([("z", z, 2), ("prototypes", prototypes, 2), *given])


def _results(like: Tensor, batch: list[Any], n: Any, k: Any) -> tuple[Tensor, ...]:
    wide = _wide(like)
    f, g = (like.new_empty([*batch, size], dtype=wide) for size in (n, k))
    return f, g, like.new_empty(batch, dtype=wide), like.new_empty(batch, dtype=torch.int64)


def _fake_sinkhorn(
    logits: Tensor,
    n_iter: Any,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return _results(
        logits, _batch(logits, log_row=log_row, log_col=log_col, init=init), *logits.shape[-2:]
    )


def _fake_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: Any,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    batch = _batch_features(z, prototypes, bias=bias, log_row=log_row, log_col=log_col, init=init)
    return _results(z, batch, z.shape[-2], prototypes.shape[-2])


def _pass_results(like: Tensor, batch: list[Any], n: Any, k: Any) -> tuple[Tensor, ...]:
    f, log_mass, _, status = _results(like, batch, n, k)
    return f, log_mass, status


def _fake_pass(
    logits: Tensor, g: Tensor, log_row: Tensor | None, precision: str | None
) -> tuple[Tensor, ...]:
    return _pass_results(logits, _batch(logits, g=g, log_row=log_row), *logits.shape[-2:])


def _fake_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    precision: str | None,
) -> tuple[Tensor, ...]:
    batch = _batch_features(z, prototypes, g=g, bias=bias, log_row=log_row)
    return _pass_results(z, batch, z.shape[-2], prototypes.shape[-2])


# ---- the documented functions ------------------------------------------------------------------


def sinkhorn(
    logits: Tensor,
    n_iter: int,
    *,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials that give exp(logits + f + g) its row and column sums, by Sinkhorn's iteration.

        g_j = log_col_j - logsumexp_i(logits_ij + f_i)               (eq. 1 of docs/ops/sinkhorn.md)
        f_i = log_row_i - logsumexp_j(logits_ij + g_j)               (eq. 2)

    Parameters
    ----------
    logits : Tensor [..., N, K], float16, bfloat16, float32 or float64
        Scores over epsilon, of N rows for K prototypes. -inf forbids a pair. Leading dims of all
        arguments broadcast.
    n_iter : int, >= 0
        Iterations of (1) and (2) each; 0 makes the rows exact at the start and no more.
    log_row : Tensor [..., N], any float dtype, optional
        Logarithm of each row's mass; -inf: the row takes no part, whatever it holds. 1/N each
        unless given.
    log_col : Tensor [..., K], any float dtype, optional
        Logarithm of each prototype's mass, the same total; 1/K each unless given.
    init : Tensor [..., K], any float dtype, optional
        A g to start from, that of an earlier call; 0 unless given. With `prototype_first` the rows
        are made exact at it once before the iterations.
    prototype_first : bool
        (1) before (2) in every iteration; another order is another result where `n_iter` is small.
    precision : "highest", "high" or "medium", optional
        There is no matrix product: the same in all.

    Returns
    -------
    f : Tensor [..., N], float32 (float64 for float64)
        -inf where the row takes no part.
    g : Tensor [..., K], float32 (float64 for float64)
        Codes of the rows are softmax_j(logits + g).
    err : Tensor [...], float32 (float64 for float64)
        L1 error of the sums of the side that was not made exact last (eq. 3). No gradient.
    status : Tensor [...], int64
        0 fine, 2 a NaN or +inf among what takes part, 3 a row or prototype with mass and no pair, 4
        no row. f, g and err of 2 and 3 are NaN.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit.

    Notes
    -----
    One read and one exponential an entry and iteration; memory O(N + K) beside the arguments.
    Differentiable through all iterations by hand for logits, log_row, log_col and init; double
    backward raises NotImplementedError.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.ops.sinkhorn import sinkhorn
    >>> logits = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> f, g, err, status = sinkhorn(logits, 1)
    >>> torch.softmax(logits + g, -1)
    tensor([[0.5938, 0.4062],
            [0.3498, 0.6502]])
    """
    checks.tensor("logits", logits)
    _check_types(n_iter, log_row, log_col, init, prototype_first, precision)
    f, g, err, status = torch.ops.clam.sinkhorn(
        logits, n_iter, log_row, log_col, init, prototype_first, precision
    )
    return f, g, err, status


def sinkhorn_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    *,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    log_col: Tensor | None = None,
    init: Tensor | None = None,
    prototype_first: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn` of z @ prototypes^T + bias, whose N x K entries are made anew tile by tile.

        logits_ij = z_i . prototypes_j + bias_j                      (eq. 4 of docs/ops/sinkhorn.md)

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Features. Leading dims of all arguments broadcast.
    prototypes : Tensor [..., K, D], dtype and device of z
        Prototypes over epsilon.
    n_iter : int, >= 0
        As of `sinkhorn`, and so are the arguments from log_row on.
    bias : Tensor [..., K], any float dtype, optional
        Added to the logits of each prototype.
    log_row : Tensor [..., N], optional
        Logarithm of each row's mass.
    log_col : Tensor [..., K], optional
        Logarithm of each prototype's mass.
    init : Tensor [..., K], optional
        A g to start from.
    prototype_first : bool
        Which side is made exact first.
    precision : "highest", "high" or "medium", optional
        Of the matrix products; None follows torch.get_float32_matmul_precision().

    Returns
    -------
    f, g, err, status : Tensors
        As of `sinkhorn`.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit.

    Notes
    -----
    Memory O(N D + K D), never N x K. Differentiable by hand for z, prototypes, bias, log_row,
    log_col and init.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.ops.sinkhorn import sinkhorn, sinkhorn_features
    >>> z, prototypes = torch.eye(3)[:2], torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    >>> torch.equal(sinkhorn_features(z, prototypes, 3)[1], sinkhorn(z @ prototypes.T, 3)[1])
    True
    """
    checks.tensor("z", z)
    checks.tensor("prototypes", prototypes)
    checks.tensor("bias", bias, optional=True)
    _check_types(n_iter, log_row, log_col, init, prototype_first, precision)
    f, g, err, status = torch.ops.clam.sinkhorn_features(
        z, prototypes, n_iter, bias, log_row, log_col, init, prototype_first, precision
    )
    return f, g, err, status


def sinkhorn_pass(
    logits: Tensor, g: Tensor, *, log_row: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the rows and the masses of the columns after it: all that an iteration, plain,
    accelerated or over several machines, needs of the N x K entries.

        f_i = log_row_i - logsumexp_j(logits_ij + g_j)               (eq. 2 of docs/ops/sinkhorn.md)
        log_mass_j = g_j + logsumexp_i(logits_ij + f_i)                                      (eq. 5)

    Parameters
    ----------
    logits : Tensor [..., N, K], float16, bfloat16, float32 or float64
        Scores over epsilon. Leading dims of all arguments broadcast.
    g : Tensor [..., K], any float dtype
        Potentials of the prototypes; -inf: the column takes no part, whatever it holds.
    log_row : Tensor [..., N], any float dtype, optional
        Logarithm of each row's mass; -inf: the row takes no part. 1/N each unless given.
    precision : "highest", "high" or "medium", optional
        There is no matrix product: the same in all.

    Returns
    -------
    f : Tensor [..., N], float32 (float64 for float64)
        -inf where the row takes no part.
    log_mass : Tensor [..., K], float32 (float64 for float64)
        Logarithm of each column's sum of exp(logits + f + g); -inf where there is none. Sinkhorn's
        step of the prototypes is g + log_col - log_mass.
    status : Tensor [...], int64
        0 fine, 2 a NaN or +inf among what takes part, 3 a row with mass and no pair, 4 no row; f
        and log_mass of 2 and 3 are NaN.

    Raises
    ------
    TypeError, ValueError
        As of `sinkhorn`.

    Notes
    -----
    One read and one exponential an entry. Differentiable by hand for logits, g and log_row.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.ops.sinkhorn import sinkhorn_pass
    >>> f, log_mass, status = sinkhorn_pass(torch.zeros(2, 2), torch.tensor([0.0, 1.0]))
    >>> log_mass.exp()
    tensor([0.2689, 0.7311])
    """
    checks.tensor("logits", logits)
    _check_tensors(precision, g=g, log_row=log_row)
    f, log_mass, status = torch.ops.clam.sinkhorn_pass(logits, g, log_row, precision)
    return f, log_mass, status


def sinkhorn_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    *,
    bias: Tensor | None = None,
    log_row: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_pass` of z @ prototypes^T + bias, whose entries are made anew tile by tile.

        logits_ij = z_i . prototypes_j + bias_j                      (eq. 4 of docs/ops/sinkhorn.md)

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Features. Leading dims of all arguments broadcast.
    prototypes : Tensor [..., K, D], dtype and device of z
        Prototypes over epsilon.
    g : Tensor [..., K], any float dtype
        Potentials of the prototypes.
    bias : Tensor [..., K], any float dtype, optional
        Added to the logits of each prototype.
    log_row : Tensor [..., N], any float dtype, optional
        Logarithm of each row's mass.
    precision : "highest", "high" or "medium", optional
        Of the matrix products; None follows torch.get_float32_matmul_precision().

    Returns
    -------
    f, log_mass, status : Tensors
        As of `sinkhorn_pass`.

    Raises
    ------
    TypeError, ValueError
        As of `sinkhorn_features`.

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
    checks.tensor("bias", bias, optional=True)
    _check_tensors(precision, g=g, log_row=log_row)
    f, log_mass, status = torch.ops.clam.sinkhorn_features_pass(
        z, prototypes, g, bias, log_row, precision
    )
    return f, log_mass, status


def _check_tensors(precision: object, g: object, log_row: object) -> None:
    checks.tensor("g", g)
    checks.tensor("log_row", log_row, optional=True)
    checks.text("precision", precision)


def _check_types(
    n_iter: object,
    log_row: object,
    log_col: object,
    init: object,
    prototype_first: object,
    precision: object,
) -> None:
    """The types the dispatcher would refuse in words of its own."""
    checks.whole("n_iter", n_iter, 0)
    for name, value in (("log_row", log_row), ("log_col", log_col), ("init", init)):
        checks.tensor(name, value, optional=True)
    checks.type_error(
        isinstance(prototype_first, bool),
        lambda: checks.wording("prototype_first", "a bool", type(prototype_first).__name__),
    )
    checks.text("precision", precision)


# ---- the ops -----------------------------------------------------------------------------------

_truth = python_fallback.sinkhorn
_REST = (
    "Tensor? log_row=None, Tensor? log_col=None, Tensor? init=None, bool prototype_first=True,"
    " str? precision=None"
)
_KERNELS = "clam_kernels.kernels.sinkhorn"
_LIMITS = {"triton": "clam_kernels.kernels._launch:why_not"}
_VECTORS = {"bias": 1, "log_row": 1, "log_col": 1, "init": 1, "g": 1}

SINKHORN = op(
    name="sinkhorn",
    arguments=f"Tensor logits, SymInt n_iter, {_REST}",
    returns="(Tensor, Tensor, Tensor, Tensor)",
    check=_check_sinkhorn,
    fake=_fake_sinkhorn,
    truth=_truth.sinkhorn,
    reference=_truth.sinkhorn_forward,
    function=sinkhorn,
    kernels={"triton": f"{_KERNELS}:sinkhorn"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.sinkhorn_backward,
        kernels={"triton": f"{_KERNELS}_backward:sinkhorn_backward"},
        output_dims=(1, 1),
    ),
    core={"logits": 2, **_VECTORS},
)

SINKHORN_FEATURES = op(
    name="sinkhorn_features",
    arguments=f"Tensor z, Tensor prototypes, SymInt n_iter, Tensor? bias=None, {_REST}",
    returns="(Tensor, Tensor, Tensor, Tensor)",
    check=_check_features,
    fake=_fake_features,
    truth=_truth.sinkhorn_features,
    reference=_truth.sinkhorn_features_forward,
    function=sinkhorn_features,
    kernels={"triton": f"{_KERNELS}:sinkhorn_features"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.sinkhorn_features_backward,
        kernels={"triton": f"{_KERNELS}_backward:sinkhorn_features_backward"},
        output_dims=(1, 1),
    ),
    same_dtype=("z", "prototypes"),
    core={"z": 2, "prototypes": 2, **_VECTORS},
)

SINKHORN_PASS = op(
    name="sinkhorn_pass",
    arguments="Tensor logits, Tensor g, Tensor? log_row=None, str? precision=None",
    returns="(Tensor, Tensor, Tensor)",
    check=_check_pass,
    fake=_fake_pass,
    truth=_truth.sinkhorn_pass,
    reference=_truth.sinkhorn_pass_forward,
    function=sinkhorn_pass,
    kernels={"triton": f"{_KERNELS}:sinkhorn_pass"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.sinkhorn_pass_backward,
        kernels={"triton": f"{_KERNELS}_backward:sinkhorn_pass_backward"},
        output_dims=(1, 1),
    ),
    core={"logits": 2, **_VECTORS},
)

SINKHORN_FEATURES_PASS = op(
    name="sinkhorn_features_pass",
    arguments="Tensor z, Tensor prototypes, Tensor g, Tensor? bias=None, Tensor? log_row=None,"
    " str? precision=None",
    returns="(Tensor, Tensor, Tensor)",
    check=_check_features_pass,
    fake=_fake_features_pass,
    truth=_truth.sinkhorn_features_pass,
    reference=_truth.sinkhorn_features_pass_forward,
    function=sinkhorn_features_pass,
    kernels={"triton": f"{_KERNELS}:sinkhorn_features_pass"},
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.sinkhorn_features_pass_backward,
        kernels={"triton": f"{_KERNELS}_backward:sinkhorn_features_pass_backward"},
        output_dims=(1, 1),
    ),
    same_dtype=("z", "prototypes"),
    core={"z": 2, "prototypes": 2, **_VECTORS},
)
