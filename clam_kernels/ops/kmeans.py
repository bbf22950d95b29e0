# SPDX-License-Identifier: Apache-2.0
"""k-means: kmeans_assign, kmeans_update, kmeans_step. Equations: docs/ops/kmeans.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import python_fallback

from .._core import checks
from .._core.backend import PRECISIONS
from .._core.install import op
from ._facts import compute_dtype

# ---- checks and fakes, with the arguments of the ops in the order of the schemas -----------------


def _check_rows(x: Tensor) -> None:
    checks.floating("x", x)
    checks.device("x", x)
    checks.shape("x", x, "[..., N, D]", x.ndim >= 2)
    checks.non_empty("x", x, -1, "D")


def _check_dtype(
    name: str, value: Tensor, allowed: tuple[torch.dtype, ...], match: str = ""
) -> None:
    """One of a few dtypes; the error lists each once."""
    words = " or ".join(dict.fromkeys(str(t).removeprefix("torch.") for t in allowed))
    got = str(value.dtype).removeprefix("torch.")
    checks.type_error(
        value.dtype in allowed, lambda: checks.wording(name, f"dtype {words}", got, match)
    )


def _check_vector(name: str, value: Tensor, size: Any, match: str) -> None:
    """A vector [..., size]."""
    ok = value.ndim >= 1 and value.shape[-1] == size
    checks.shape(name, value, f"[..., {size}]", ok, match)


def _check_features(name: str, value: Tensor | None, x: Tensor) -> None:
    """A vector [..., D] for the rows, of any float dtype."""
    if value is not None:
        checks.floating(name, value)
        checks.same_device(name, value, "x", x)
        _check_vector(name, value, x.shape[-1], f"x {checks.spell(*x.shape)}")


def _check_assign(
    x: Tensor,
    centroids: Tensor,
    shift: Tensor | None,
    mask: Tensor | None,
    distances: bool,
    precision: str | None,
) -> None:
    _check_nearest(x, centroids, shift, mask)
    _assign_batch(x, centroids, shift, mask)
    checks.one_of("precision", precision, PRECISIONS)


def _check_nearest(x: Tensor, centroids: Tensor, shift: Tensor | None, mask: Tensor | None) -> None:
    """The checks of an assignment, except for the leading dims."""
    _check_rows(x)
    checks.floating("centroids", centroids)
    # callers keep centroids in the compute dtype, also for rows in half precision
    _check_dtype("centroids", centroids, (compute_dtype(x.dtype), x.dtype), "x")
    checks.same_device("centroids", centroids, "x", x)
    checks.shape("centroids", centroids, "[..., K, D]", centroids.ndim >= 2)
    pattern, ok = f"[..., K, {x.shape[-1]}]", centroids.shape[-1] == x.shape[-1]
    checks.shape("centroids", centroids, pattern, ok, f"x {checks.spell(*x.shape)}")
    checks.non_empty("centroids", centroids, -2, "K")
    _check_features("shift", shift, x)
    if mask is not None:
        _check_dtype("mask", mask, (torch.bool,))
        checks.same_device("mask", mask, "x", x)
        match = f"centroids {checks.spell(*centroids.shape)}"
        _check_vector("mask", mask, centroids.shape[-2], match)


def _assign_batch(
    x: Tensor, centroids: Tensor, shift: Tensor | None, mask: Tensor | None
) -> list[Any]:
    options = [("shift", shift, 1), ("mask", mask, 1)]
    return checks.broadcast([("x", x, 2), ("centroids", centroids, 2), *options])


def _check_mask_values(
    x: Tensor, centroids: Tensor, shift: Tensor | None, mask: Tensor | None, *_: Any
) -> None:
    if mask is not None and mask.device.type == "cpu" and bool(mask.all(-1).any()):
        raise ValueError(checks.wording("mask", "an active centroid in every problem", "all True"))


def _fake_assign(
    x: Tensor,
    centroids: Tensor,
    shift: Tensor | None,
    mask: Tensor | None,
    distances: bool,
    precision: str | None,
) -> tuple[Tensor, Tensor]:
    sizes = [*_assign_batch(x, centroids, shift, mask), x.shape[-2]]
    shape = sizes if distances else [*sizes[:-1], 0]
    sqdist = x.new_empty(shape, dtype=compute_dtype(x.dtype))
    return x.new_empty(sizes, dtype=torch.int64), sqdist


def _check_update(
    x: Tensor, labels: Tensor, k: Any, weight: Tensor | None, shift: Tensor | None
) -> None:
    _check_rows(x)
    _check_dtype("labels", labels, (torch.int64,))
    if weight is not None:
        checks.floating("weight", weight)
    for name, value in (("labels", labels), ("weight", weight)):
        if value is not None:
            checks.same_device(name, value, "x", x)
            _check_vector(name, value, x.shape[-2], f"x {checks.spell(*x.shape)}")
    checks.at_least("k", k, 1)
    _check_features("shift", shift, x)
    _update_batch(x, labels, weight, shift)


def _update_batch(
    x: Tensor, labels: Tensor, weight: Tensor | None, shift: Tensor | None
) -> list[Any]:
    options = [("weight", weight, 1), ("shift", shift, 1)]
    return checks.broadcast([("x", x, 2), ("labels", labels, 1), *options])


def _fake_update(
    x: Tensor, labels: Tensor, k: Any, weight: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    sizes = [*_update_batch(x, labels, weight, shift), k]
    counted = torch.int64 if weight is None else torch.float64
    sums = x.new_empty([*sizes, x.shape[-1]], dtype=torch.float64)
    return sums, x.new_empty(sizes, dtype=counted)


def _step_batch(
    x: Tensor, centroids: Tensor, weight: Tensor | None, shift: Tensor | None, mask: Tensor | None
) -> list[Any]:
    options = [("weight", weight, 1), ("shift", shift, 1), ("mask", mask, 1)]
    return checks.broadcast([("x", x, 2), ("centroids", centroids, 2), *options])


def _check_step(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    precision: str | None,
) -> None:
    _check_nearest(x, centroids, shift, mask)
    if weight is not None:
        checks.floating("weight", weight)
        checks.same_device("weight", weight, "x", x)
        _check_vector("weight", weight, x.shape[-2], f"x {checks.spell(*x.shape)}")
    _step_batch(x, centroids, weight, shift, mask)
    checks.one_of("precision", precision, PRECISIONS)


def _check_step_values(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    *_: Any,
) -> None:
    _check_mask_values(x, centroids, shift, mask)


def _fake_step(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    precision: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, k = _step_batch(x, centroids, weight, shift, mask), centroids.shape[-2]
    labels = x.new_empty([*batch, x.shape[-2]], dtype=torch.int64)
    sums = x.new_empty([*batch, k, x.shape[-1]], dtype=torch.float64)
    counted = torch.int64 if weight is None else torch.float64
    return labels, sums, x.new_empty([*batch, k], dtype=counted)


# ---- the documented functions ------------------------------------------------------------------


def kmeans_assign(
    x: Tensor,
    centroids: Tensor,
    *,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    distances: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each row, as in float64 at every precision, and its distance.

        d_nk    = sum_j (x_nj - c_kj)^2 in float64 for the stored values
        label_n = min {k : d_nk <= (1 + 2^-40) min_j d_nj}       (eqs. 1-2 of docs/ops/kmeans.md)

    Parameters
    ----------
    x : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows. Leading dims of all arguments broadcast: restarts are centroids [R, K, D].
    centroids : Tensor [..., K, D], float32 (float64 for float64), or dtype of x
        A centroid that is not finite is never the nearest.
    shift : Tensor [..., D], optional
        A point near the data that is subtracted before scores are computed; default the mean of the
        centroids. It changes no label, only how many rows are computed again in float64.
    mask : Tensor [..., K], bool, optional
        True: the centroid is masked. Each problem needs an active centroid; checked on a CPU.
    distances : bool
        Whether to compute the distances.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products that decide most rows; None is
        torch.get_float32_matmul_precision(). Labels do not depend on it.

    Returns
    -------
    labels : Tensor [..., N], int64
        The lowest index of a tie; -1 where x has NaN or inf, or no centroid is active and finite.
    sqdist : Tensor [..., N], float32 (float64 for float64), unit |x|^2
        From the difference to the nearest centroid. NaN where x has NaN or inf, +inf where no
        centroid is active and finite; shape [..., 0] if `distances` is False. No gradient.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape or device that does not fit, or a problem without an active centroid (on a CPU).

    Examples
    --------
    >>> import torch, clam_kernels
    >>> x, centroids = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
    >>> clam_kernels.kmeans_assign(x, centroids)  # the second row is a tie
    (tensor([0, 0, 1]), tensor([0., 1., 1.]))
    """
    checks.tensor("x", x)
    checks.tensor("centroids", centroids)
    checks.tensor("shift", shift, optional=True)
    checks.tensor("mask", mask, optional=True)
    checks.type_error(
        isinstance(distances, bool),
        lambda: checks.wording("distances", "a bool", type(distances).__name__),
    )
    checks.text("precision", precision)
    labels, sqdist = torch.ops.clam.kmeans_assign(x, centroids, shift, mask, distances, precision)
    return labels, sqdist


def kmeans_update(
    x: Tensor,
    labels: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums and counts of the rows of each label, the same bits at every call.

        sums_k = sum_{n: label_n = k} w_n (x_n - shift),  counts_k = sum_{n: label_n = k} w_n
                                                                 (eq. 3 of docs/ops/kmeans.md)

    Parameters
    ----------
    x : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows. Leading dims of all arguments broadcast.
    labels : Tensor [..., N], int64
        A row whose label is not in [0, k) is masked, and may be NaN.
    k : int, >= 1
        Number of labels.
    weight : Tensor [..., N], any float dtype, optional
        Weight of each row; default 1.
    shift : Tensor [..., D], any float dtype, optional
        Subtracted from every row; default 0. For data far from the origin, sums of x - shift keep
        more digits.

    Returns
    -------
    sums : Tensor [..., k, D], float64
        Added in float64; a GPU may add a few hundred rows in float32 first.
    counts : Tensor [..., k], int64, float64 with weights
        0 for a label without rows.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape, device or value that does not fit.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> x = torch.tensor([[1.0], [2.0], [5.0], [7.0]])
    >>> clam_kernels.kmeans_update(x, torch.tensor([0, 0, 1, -1]), 2)
    (tensor([[3.],
            [5.]], dtype=torch.float64), tensor([2, 1]))
    """
    checks.tensor("x", x)
    checks.tensor("labels", labels)
    checks.tensor("weight", weight, optional=True)
    checks.tensor("shift", shift, optional=True)
    k = checks.whole("k", k, 1)
    sums, counts = torch.ops.clam.kmeans_update(x, labels, k, weight, shift)
    return sums, counts


def kmeans_step(
    x: Tensor,
    centroids: Tensor,
    *,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of all rows and sums of the rows of each label: `kmeans_assign`, then `kmeans_update`.

    On a GPU of compute capability 9 both are one pass over the rows for K <= 64 and D <= 32 without
    weights. A Lloyd iteration is

        centroids <- shift + sums / counts                      (eqs. 1-3 of docs/ops/kmeans.md)

    Parameters
    ----------
    x : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows. Leading dims of all arguments broadcast.
    centroids : Tensor [..., K, D], float32 (float64 for float64), or dtype of x
        A centroid that is not finite is never the nearest.
    weight : Tensor [..., N], any float dtype, optional
        Weight of each row; default 1.
    shift : Tensor [..., D], any float dtype, optional
        A point near the data that is subtracted from the rows of the sums; default 0.
    mask : Tensor [..., K], bool, optional
        True: the centroid is masked. Each problem needs an active centroid; checked on a CPU.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products that decide most rows. Labels do not depend on it.

    Returns
    -------
    labels : Tensor [..., N], int64
        As in `kmeans_assign`.
    sums : Tensor [..., K, D], float64
        Sums of x - shift, as in `kmeans_update`.
    counts : Tensor [..., K], int64, float64 with weights
        0 for a centroid without rows.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape or device that does not fit, or a problem without an active centroid (on a CPU).

    Examples
    --------
    >>> import torch, clam_kernels
    >>> x, centroids = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
    >>> labels, sums, counts = clam_kernels.kmeans_step(x, centroids)
    >>> labels.tolist(), (sums / counts[:, None]).tolist()
    ([0, 0, 1], [[0.5], [3.0]])
    """
    checks.tensor("x", x)
    checks.tensor("centroids", centroids)
    for name, value in (("weight", weight), ("shift", shift), ("mask", mask)):
        checks.tensor(name, value, optional=True)
    checks.text("precision", precision)
    labels, sums, counts = torch.ops.clam.kmeans_step(x, centroids, weight, shift, mask, precision)
    return labels, sums, counts


# ---- the declarations --------------------------------------------------------------------------

_truth = python_fallback.kmeans

op(
    name="kmeans_assign",
    arguments="Tensor x, Tensor centroids, Tensor? shift=None, Tensor? mask=None, "
    "bool distances=True, str? precision=None",
    returns="(Tensor, Tensor)",
    check=_check_assign,
    check_values=_check_mask_values,
    fake=_fake_assign,
    truth=_truth.kmeans_assign,
    reference=_truth.kmeans_assign_forward,
    kernels={"triton": "clam_kernels.kernels.kmeans.assign:kmeans_assign"},
    limits={"triton": "clam_kernels.kernels.common.launch:why_not"},
    function=kmeans_assign,
    same_dtype=("x", "centroids"),
    core={"x": 2, "centroids": 2, "shift": 1, "mask": 1},
)

op(
    name="kmeans_update",
    arguments="Tensor x, Tensor labels, SymInt k, Tensor? weight=None, Tensor? shift=None",
    returns="(Tensor, Tensor)",
    check=_check_update,
    fake=_fake_update,
    truth=_truth.kmeans_update,
    reference=_truth.kmeans_update_forward,
    kernels={"triton": "clam_kernels.kernels.kmeans.assign:kmeans_update"},
    limits={"triton": "clam_kernels.kernels.common.launch:why_not"},
    function=kmeans_update,
    core={"x": 2, "labels": 1, "weight": 1, "shift": 1},
)

op(
    name="kmeans_step",
    arguments="Tensor x, Tensor centroids, Tensor? weight=None, Tensor? shift=None, "
    "Tensor? mask=None, str? precision=None",
    returns="(Tensor, Tensor, Tensor)",
    check=_check_step,
    check_values=_check_step_values,
    fake=_fake_step,
    truth=_truth.kmeans_step,
    reference=_truth.kmeans_step_forward,
    kernels={"triton": "clam_kernels.kernels.kmeans.step:kmeans_step"},
    limits={"triton": "clam_kernels.kernels.common.launch:why_not"},
    function=kmeans_step,
    same_dtype=("x", "centroids"),
    core={"x": 2, "centroids": 2, "weight": 1, "shift": 1, "mask": 1},
)
