# SPDX-License-Identifier: Apache-2.0
"""The frozen target of deep embedded clustering, and its loss with a reduction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import python_fallback

from .._core import checks

_MODES, _REDUCTIONS = ("frozen", "minibatch", "self"), ("mean", "sum", "none")
_STORES = ("auto", "dense", "recompute")
_reference = python_fallback.dec


@dataclass(frozen=True)
class DecTarget:
    """Target p of a set of rows, frozen; made by `dec_target`.

    It stores either p itself or the rows z0 and their log-normaliser, from which p is recomputed.

    Attributes
    ----------
    log_counts : Tensor [..., K], float64
        log f, with f at least the smallest normal number of float32.
    mu0 : Tensor [..., K, D]
        A copy of the centroids.
    alpha0 : float
        Degrees of freedom.
    z0 : Tensor [..., N, D] or None
        A copy of the rows, as stored.
    log_norm : Tensor [..., N] or None
        R of each row, or the logarithm of the sum of each row of p, from the values as stored.
    p : Tensor [..., N, K] or None
        The target as stored; its rows are divided by exp(log_norm).
    """

    log_counts: Tensor
    mu0: Tensor
    alpha0: float
    z0: Tensor | None = None
    log_norm: Tensor | None = None
    p: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        rows = self.p if self.z0 is None else self.z0
        if rows is None:
            words = "a target with rows; this one has soft counts alone, for mode 'self'"
            raise ValueError(checks.wording("target", words, "no rows"))
        return rows.shape[-2]

    def rows(self, index: Tensor) -> DecTarget:
        """The target of some rows, on the device of this target.

        Parameters
        ----------
        index : Tensor [n], int64
            Rows in [0, N), which may repeat, on any device. An index outside raises IndexError on
            a CPU; elsewhere it gives a row of NaN.

        Returns
        -------
        DecTarget
        """
        checks.tensor("index", index)
        dtype = str(index.dtype).removeprefix("torch.")
        checks.type_error(
            index.dtype == torch.int64,
            lambda: checks.wording("index", "dtype int64", dtype),
        )
        checks.shape("index", index, "[n]", index.ndim == 1)
        n = self.n_rows
        outside: Tensor | None = None
        if checks.readable(index):
            wrong = index[(index < 0) | (index >= n)]
            if wrong.numel():
                text = checks.wording("index", f"values in [0, {n})", int(wrong[0]))
                raise IndexError(text)
        else:
            outside = (index < 0) | (index >= n)
            index = index.clamp(0, n - 1)
        at = index.to(self.log_counts.device)
        chosen: dict[str, Any] = {
            name: None if x is None else x.index_select(dim, at)
            for name, x, dim in (
                ("z0", self.z0, -2), ("p", self.p, -2), ("log_norm", self.log_norm, -1),
            )
        }  # fmt: skip
        if outside is not None:
            name = "z0" if self.z0 is not None else "p"
            hidden = outside.to(at.device)[:, None]
            chosen[name] = torch.where(hidden, torch.nan, chosen[name])
        return replace(self, **chosen)

    def to(self, device: torch.device | str) -> DecTarget:
        """The target on a device; this one where it is there already.

        Parameters
        ----------
        device : torch.device or str
            Where to.

        Returns
        -------
        DecTarget
        """
        moved: dict[str, Any] = {
            name: value.to(device)
            for name in ("log_counts", "mu0", "z0", "log_norm", "p")
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)

    def shares(self) -> Tensor:
        """The target p of all rows, [..., N, K] in float32 (float64 for float64). For a part of the
        rows call `rows` first: this array has N x K entries.

        Returns
        -------
        Tensor [..., N, K]
        """
        _ = self.n_rows  # an error where there are no rows
        if self.p is not None:
            wide = self.p if self.p.dtype == torch.float64 else self.p.float()
            return wide if self.log_norm is None else wide / self.log_norm.exp()[..., None]
        assert self.z0 is not None
        shares: Tensor = _reference.target_shares(
            self.z0, self.mu0, self.alpha0, self.log_counts, log_norm=self.log_norm
        )
        return shares


def dec_target(
    z: Tensor,
    mu: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    weight: Tensor | None = None,
    store: str = "auto",
    dtype: torch.dtype | None = None,
) -> DecTarget:
    """Freeze the target of a set of rows: its soft counts, and p or the rows.

        p_ij = exp(2 s_ij - log f_j - R_i),  R_i = logsumexp_j(2 s_ij - log f_j)
                                                                (eqs. 4-5 of docs/ops/dec.md)

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows: embeddings; N >= 1. Leading dims of all arguments broadcast.
    mu : Tensor [..., K, D], dtype and device of z
        Centroids; a copy is stored.
    alpha : float or Tensor [], > 0, unit |z|^2
        Degrees of freedom; the number inf is a Gaussian of variance 1.
    weight : Tensor [..., N], any float dtype, optional
        Of each row in the soft counts; 1 by default.
    store : "auto", "dense" or "recompute"
        "dense" stores p, K numbers a row; "recompute" stores z and R, D + 1 numbers a row; "auto"
        stores the fewer, p if K <= D + 1.
    dtype : torch.dtype, optional
        A float dtype in which the rows or p are stored; that of z by default (of p float32 for
        narrower z). Soft counts and R are computed from the rows as stored.

    Returns
    -------
    DecTarget
        Without gradient. An update of z or mu in place does not change it.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit, or a set without rows.

    Notes
    -----
    Memory O(N (D + 1) + K D) with "recompute", N x K only where p is stored. It reads values of its
    arguments: call it outside torch.compile.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> z, mu = torch.tensor([[0.0], [3.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    >>> clam_kernels.dec_target(z, mu).rows(torch.tensor([2, 0])).shares()
    tensor([[0.5000, 0.5000],
            [0.9615, 0.0385]])
    """
    _check_target(z, mu, weight, store, dtype)
    alpha0 = _frozen_alpha(alpha)
    with torch.no_grad():
        dense = store == "dense" or (store == "auto" and mu.shape[-2] <= z.shape[-1] + 1)
        z0, mu0 = z.detach(), mu.detach().clone()
        if dtype is not None and not dense:
            z0 = z0.to(dtype)
        call: Any = torch.ops.clam.student_t_stats.default
        counts = call(z0.to(z.dtype), mu0, alpha0, weight, None)[2]
        log_counts = log_counts_of(counts)
        if not dense:
            norm: Tensor = _reference.target_norms(z0, mu0, alpha0, log_counts)
            z0 = z0.clone() if z0.dtype == z.dtype else z0
            return DecTarget(log_counts, mu0, alpha0, z0=z0, log_norm=norm)
        p = _reference.target_shares(z0, mu0, alpha0, log_counts, dtype)
        narrow = p.dtype in (torch.float16, torch.bfloat16)
        total = p.sum(-1, dtype=torch.float32).log() if narrow else None
        return DecTarget(log_counts, mu0, alpha0, log_norm=total, p=p)


def _frozen_alpha(alpha: Any) -> float:
    """Alpha as a number; a tensor has one finite entry, as in the ops."""
    if not isinstance(alpha, Tensor):
        return float(checks.real("alpha", alpha))
    checks.floating("alpha", alpha)
    checks.shape("alpha", alpha, "[]", alpha.numel() == 1)
    number = float(alpha.detach())
    checks.expect(0.0 < number < float("inf"), "alpha", "a finite number > 0", number)
    return number


def log_counts_of(counts: Tensor) -> Tensor:
    """Logarithms of soft counts, each at least that of the smallest normal number of float32: below
    it p is exactly 0.
    """
    return counts.clamp(min=torch.finfo(torch.float32).tiny).log()


def _check_target(
    z: object, mu: object, weight: object, store: str, dtype: torch.dtype | None
) -> None:
    """Check the types that the op would refuse in other words, and that there are rows."""
    checks.tensor("z", z)
    checks.tensor("mu", mu)
    checks.tensor("weight", weight, optional=True)
    checks.text("store", store)
    if store not in _STORES:
        listed = ", ".join(f"'{word}'" for word in _STORES)
        raise ValueError(checks.wording("store", listed, repr(store)))
    ok = dtype is None or dtype in checks.FLOATS
    words = "float16, bfloat16, float32, float64 or None"
    checks.type_error(ok, lambda: checks.wording("dtype", words, dtype))
    if isinstance(z, Tensor) and z.ndim >= 2:
        checks.non_empty("z", z, -2, "N")


def dec_loss(
    z: Tensor,
    mu: Tensor,
    target: DecTarget | None = None,
    index: Tensor | None = None,
    *,
    alpha: float | Tensor = 1.0,
    mode: str = "frozen",
    reduction: str = "mean",
    weight: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Loss of deep embedded clustering: KL(p || q) of rows, with p a constant.

        l_i = sum_j p_ij (log p_ij - log q_ij),  loss = sum_i w_i l_i / sum_i w_i
                                                                  (eqs. 6-7 of docs/ops/dec.md)

    Parameters
    ----------
    z : Tensor [..., N, D], float16, bfloat16, float32 or float64
        Rows: embeddings of a batch. Leading dims of all arguments broadcast.
    mu : Tensor [..., K, D], dtype and device of z
        Centroids.
    target : DecTarget, optional
        The frozen target; `mode="minibatch"` needs none.
    index : Tensor [N], int64, optional
        Which rows of the target these rows are; all rows in order by default. Only
        `mode="frozen"` uses it.
    alpha : float or Tensor [] or [..., 1], > 0, unit |z|^2
        Degrees of freedom of q; a tensor receives a gradient.
    mode : "frozen", "minibatch" or "self"
        "frozen": p of the target. "minibatch": p of the rows z, with the soft counts of this call.
        "self": p of the rows z, with the soft counts of the target.
    reduction : "mean", "sum" or "none"
        Of the weighted losses over N, problem by problem: their sum over the sum of the weights,
        their sum, or w_i l_i of each row.
    weight : Tensor [..., N], any float dtype, optional
        Of each row, in the reduction and in the soft counts of "minibatch". A row of weight 0 has
        no influence, whatever it contains.
    precision : "highest", "high" or "medium", optional
        Of the matrix products; see `student_t_stats`.

    Returns
    -------
    Tensor [...] or [..., N], float32 (float64 for float64)
        0 where N is 0 or the weights sum to 0. NaN with a row of positive weight that is not
        finite.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit, or a target that is missing.
    IndexError
        An index outside the target, on a CPU.

    Notes
    -----
    Gradients for z, mu and alpha, none through p. One row with `mode="minibatch"` has p = q, so its
    loss and its gradients are 0.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> z, mu = torch.tensor([[0.0], [3.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    >>> target = clam_kernels.dec_target(z, mu)
    >>> clam_kernels.dec_loss(z[1:], mu, target, torch.tensor([1, 2]), reduction="none")
    tensor([0.0812, 0.0000])
    """
    _check_loss(z, mu, target, index, mode, reduction)
    alpha = _alpha(alpha, weight, precision)
    frozen = _frozen(z, mu, target, index, mode)
    packet = torch.ops.clam.dec_losses
    call: Any = packet.alpha_tensor if isinstance(alpha, Tensor) else packet.default
    losses: Tensor = call(z, mu, alpha, weight, *frozen, precision)
    if weight is not None:
        share = weight.to(losses.dtype)
        losses = torch.where(share == 0, 0.0, losses * share)
    if reduction == "none":
        return losses
    total = losses.sum(-1)
    if reduction == "sum":
        return total
    mass = (torch.ones_like(losses) if weight is None else share).sum(-1)
    return total / torch.where(mass == 0, 1.0, mass)


def _alpha(alpha: Any, weight: object, precision: object) -> Any:
    """Check the types of alpha, weight and precision; return alpha, a number as a Python float."""
    if not isinstance(alpha, Tensor):
        alpha = checks.real("alpha", alpha, "a number or a Tensor")
    checks.tensor("weight", weight, optional=True)
    checks.text("precision", precision)
    return alpha


def _check_loss(
    z: object, mu: object, target: object, index: object, mode: str, reduction: str
) -> None:
    checks.tensor("z", z)
    checks.tensor("mu", mu)
    checks.type_error(
        target is None or isinstance(target, DecTarget),
        lambda: checks.wording(
            "target", "a DecTarget, made by dec_target, or None", type(target).__name__
        ),
    )
    checks.tensor("index", index, optional=True)
    for name, value, allowed in (("mode", mode, _MODES), ("reduction", reduction, _REDUCTIONS)):
        if not isinstance(value, str):
            raise TypeError(checks.wording(name, "a str", type(value).__name__))
        if value not in allowed:
            listed = ", ".join(f"'{word}'" for word in allowed)
            raise ValueError(checks.wording(name, listed, repr(value)))
    if target is None and mode != "minibatch":
        raise ValueError(checks.wording("target", f"a DecTarget to match mode '{mode}'", "None"))


def _check_rows(z: Tensor, mu: Tensor, target: DecTarget, index: Tensor | None) -> None:
    """Check that rows and centroids fit a frozen target; the op would name its parts."""
    if z.ndim < 2 or mu.ndim < 2:
        return  # the op names z or mu
    rows, n = z.shape[-2], target.n_rows
    if index is None:
        checks.value_error(
            rows == n,
            lambda: checks.wording(
                "index", f"the rows of the target, which has {n}", None, f"z [{rows}]"
            ),
        )
    else:
        spell = checks.spell
        checks.value_error(
            index.ndim == 1 and index.shape[0] == rows,
            lambda: checks.wording(
                "index", f"shape [{rows}]", spell(*index.shape), f"z {spell(*z.shape)}"
            ),
        )
    k = target.log_counts.shape[-1]
    checks.value_error(
        mu.shape[-2] == k,
        lambda: checks.wording("mu", f"{k} centroids as the target has", checks.spell(*mu.shape)),
    )
    if target.z0 is not None:
        d = target.z0.shape[-1]
        checks.value_error(
            z.shape[-1] == d,
            lambda: checks.wording("z", f"{d} features as the target has", checks.spell(*z.shape)),
        )


def _frozen(
    z: Tensor, mu: Tensor, target: DecTarget | None, index: Tensor | None, mode: str
) -> tuple[Any, ...]:
    """The arguments log_counts, z0, mu0, alpha0, log_norm, p of the op."""
    if mode == "minibatch" or target is None:
        return None, None, None, 1.0, None, None
    if mode == "self":
        return target.log_counts.to(z.device), None, None, 1.0, None, None
    _check_rows(z, mu, target, index)
    some = (target if index is None else target.rows(index)).to(z.device)
    if some.p is not None:
        return None, None, None, 1.0, some.log_norm, some.p
    return some.log_counts, some.z0, some.mu0, some.alpha0, some.log_norm, None
