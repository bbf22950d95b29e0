# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` and its presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._core import checks
from . import _arguments as arguments
from ._gradients import implicit
from ._iterate import Found, iterate
from ._passes import EMPTY, FINE, INFEASIBLE, NOT_CONVERGED, NOT_FINITE, Passes, Sharded
from ._problem import LARGE, Problem, Scores
from ._result import Sinkhorn
from ._warn import not_converged

FAULTS = {
    NOT_FINITE: "hold NaN or +inf where something takes part",
    INFEASIBLE: "have a row or prototype with mass and without an open pair",
}


def sinkhorn(
    scores: Scores,
    *,
    epsilon: float | Tensor = 0.05,
    bias: Tensor | None = None,
    n_iter: int = 3,
    tol: float | None = None,
    max_iter: int = 1000,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    prototype_first: bool = True,
    row_mask: Tensor | None = None,
    init: Tensor | Sinkhorn | None = None,
    accelerate: str | None = None,
    gradient: str = "stop",
    process_group: Any = None,
    warn: bool = True,
    precision: str | None = None,
) -> Sinkhorn:
    """Equal (or given) shares of prototypes for rows by entropic optimal transport.

        max <plan, scores> + epsilon H(plan), with the given row and column sums: the plan is
        exp(scores / epsilon + bias + f + g)                        (docs/ops/sinkhorn.md)

    Parameters
    ----------
    scores : Tensor [..., N, K], or (z [..., N, D], prototypes [..., K, D])
        Scores of rows for prototypes, higher is closer; or features whose products are such and are
        never stored. Any float dtype; potentials are float32 (float64 for float64).
    epsilon : float or Tensor [], > 0, in units of the scores
        Softness of the plan. A number that changes from call to call inside torch.compile compiles
        anew: pass a Tensor there.
    bias : Tensor [..., K], optional
        Added to scores / epsilon.
    n_iter : int, >= 0
        Iterations, where `tol` is None.
    tol : float, > 0, optional
        L1 error of the marginals to go on to; float32 reaches about 5e-7.
    max_iter : int, >= 1
        Most iterations with `tol`.
    row_marginal : Tensor [..., N], >= 0, optional
        Masses of the rows, of total 1; 1/N each unless given. 0: the row takes no part. In half
        precision, where each is rounded, they are scaled to that total.
    col_marginal : Tensor [..., K], >= 0, optional
        Masses of the prototypes, as those of the rows; 1/K each unless given.
    prototype_first : bool
        Which side is made exact first in an iteration; with few iterations another result.
    row_mask : Tensor [..., N], bool, optional
        False: the row takes no part, whatever it holds; masses of the others are scaled to total 1.
    init : Tensor [..., K] or an earlier result, optional
        A g to start from.
    accelerate : "anderson", optional
        Fewer iterations to `tol`, prototypes first: each g is combined of the last ones.
    gradient : "stop", "unrolled", "implicit" or "envelope"
        None; through all of `n_iter` iterations; those of the fixed point, after `tol`; those of
        `value()` alone, after `tol`. Of scores, features, prototypes, bias, epsilon and marginals.
    process_group : torch.distributed.ProcessGroup, optional
        Rows are spread over its processes, any number on each; all call, with the same prototypes.
        Masses of rows, where given, have their total over all of them. No gradient but "stop". All
        call `value`, `entropy`, `counts` and `labels(strict=True)` of the result too, which are of
        the rows of all processes.
    warn : bool
        With `tol`, whether a ConvergenceWarning says that it was not reached, or that a problem
        failed. Without, `status` alone tells: nothing is read back.
    precision : "highest", "high" or "medium", optional
        Of the matrix products of the features form; None follows torch, and autocast where this is
        called: what is read off the result later is computed alike inside an autocast block.

    Returns
    -------
    Sinkhorn
        Potentials, error, status; `codes`, `labels`, `plan`, `topk`, `counts`, `value`, `entropy`,
        `assign`.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or value that does not fit.
    NotImplementedError
        A transform of torch.func that does not fit (see Notes).

    Notes
    -----
    The scores are read where they lie, and multiplied by 1 / epsilon there: nothing else is as
    large. Features are multiplied as they are; half ones accumulate in float32.

    Scores / epsilon that are large lose digits in float32: 2^-24 of their size, where no constant
    of their row can be subtracted (docs/ops/sinkhorn.md has figures). With `tol` the plan has the
    error that `err` tells. Without, potentials of float32 move by 2^-24 of the largest scores /
    epsilon: subtract one constant from all scores, which changes no code, or pass float64.

    Under torch.compile a call without `tol` is one graph for every number of rows; `tol`, whose
    errors the host reads, breaks it, and raises NotImplementedError under torch.func.vmap.
    gradient="implicit" is one of torch.autograd alone and raises under torch.func.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.0], [0.6, 0.5]])
    >>> clam_kernels.sinkhorn(scores, tol=1e-6).labels()
    tensor([0, 1, 0, 1])
    """
    first, columns = arguments.operands(scores)
    epsilon = arguments.checked_epsilon(epsilon, first)
    n_iter, tol, max_iter = arguments.checked_rule(
        n_iter, tol, max_iter, accelerate, prototype_first
    )
    arguments.check_gradient(gradient, tol, process_group)
    if bias is not None:
        arguments.check_vector("bias", bias, columns, first)
    log_row = arguments.log_mass(
        "row_marginal", row_marginal, first.shape[-2], first, process_group
    )
    if row_mask is not None:
        log_row = arguments.masked(log_row, row_mask, first, process_group)
    elif row_marginal is None and process_group is not None:
        log_row = arguments.even(first, process_group)
    log_col = arguments.log_mass("col_marginal", col_marginal, columns, first)
    scores, precision = arguments.as_autocast(scores, precision)
    problem = Problem(scores, epsilon, bias, log_row, log_col, precision)
    start = init.g if isinstance(init, Sinkhorn) else init
    if start is not None:
        arguments.check_vector("init", start, columns, first)
    vectors = {"row_marginal" if row_mask is None else "row_mask": log_row, "bias": bias}
    arguments.check_batch(scores, **vectors, col_marginal=log_col, init=start)
    if tol is not None:
        arguments.check_transforms(problem, start, gradient)
    exact = prototype_first or (tol is None and n_iter == 0)
    if gradient == "unrolled":
        found = problem.calls().iterated(n_iter, start, prototype_first)
        return Sinkhorn(*found, n_iter, problem, exact)
    still = problem.detached()
    with torch.no_grad():
        if tol is None and process_group is None:
            fixed = still.calls().iterated(n_iter, start, prototype_first)
            return Sinkhorn(*fixed, n_iter, still, exact)
        checks.at_least("n_iter", n_iter, 0)
        calls = still.calls()
        passes = Passes(calls) if process_group is None else Sharded(calls, process_group)
        most = n_iter if tol is None else max_iter
        state = iterate(passes, start, most, tol, prototype_first, accelerate is not None)
        result = _finished(state, still, tol, exact)
    if warn:
        _warn_of(result, tol, max_iter)
    if gradient == "implicit":
        f, g = implicit(problem, result.g)
        problem = replace(problem, low=result.problem.low)
        return replace(result, f=f, g=g, problem=problem, rows_exact=True)
    if gradient == "envelope":
        problem = replace(problem, low=result.problem.low)
        return replace(result, problem=problem, envelope=True)
    return replace(result, group=process_group)


def swav_codes(
    scores: Scores,
    *,
    epsilon: float = 0.05,
    n_iter: int = 3,
    row_mask: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """Codes of a batch as swapped prediction (SwAV) has them: few iterations, no gradient.

    Their shares are nearly equal: the `err` of `sinkhorn` says how nearly.

    Parameters
    ----------
    scores : Tensor [..., N, K], or (z, prototypes)
        Cosines of features and prototypes; both of unit norm in the second form.
    epsilon : float, > 0
        Softness.
    n_iter : int, >= 0
        Iterations, prototypes first.
    row_mask : Tensor [..., N], bool, optional
        False: the row takes no part.
    process_group : torch.distributed.ProcessGroup, optional
        The batch is spread over its processes, any number of rows on each.

    Returns
    -------
    Tensor [..., N, K]
        Rows sum to 1, those outside the mask to 0. All NaN if scores hold NaN or +inf: nothing is
        read back that could raise.

    Raises
    ------
    TypeError, ValueError
        As `sinkhorn`.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> clam_kernels.swav_codes(torch.tensor([[1.0, 0.9], [1.0, 0.5]])).argmax(1)
    tensor([1, 0])
    """
    found = sinkhorn(
        scores, epsilon=epsilon, n_iter=n_iter, row_mask=row_mask, process_group=process_group
    )
    return found.codes()


def sela_labels(
    log_probabilities: Tensor,
    *,
    lam: float = 25.0,
    tol: float = 1e-3,
    max_iter: int = 1000,
    init: Tensor | Sinkhorn | None = None,
    strict: bool = False,
    warn: bool = True,
) -> Tensor:
    """Labels of a data set as self-labelling (SeLa) has them: equal shares of the labels.

    Parameters
    ----------
    log_probabilities : Tensor [N, K], K >= 1
        log softmax of a head.
    lam : float, > 0
        Sharpness, 1 / epsilon.
    tol : float, > 0
        L1 error of the label shares.
    max_iter : int, >= 1
        Most iterations.
    init : Tensor [K] or an earlier result, optional
        A g to start from, that of the labels before.
    strict : bool
        Whether shares are exact.
    warn : bool
        Whether a ConvergenceWarning says that `tol` was not reached.

    Returns
    -------
    Tensor [N], int64

    Raises
    ------
    TypeError, ValueError
        As `sinkhorn`; NaN, +inf, or a row or label that is forbidden altogether.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    >>> clam_kernels.sela_labels(logits.log_softmax(1))
    tensor([1, 0, 1, 0])
    """
    arguments.check_log_probabilities(log_probabilities)
    lam = arguments.checked_lam(lam, log_probabilities)
    tol = checks.number("tol", tol, 0.0, finite=True, strict=True)
    found = sinkhorn(
        log_probabilities, epsilon=1.0 / lam, tol=tol, max_iter=max_iter, init=init, warn=False,
        accelerate="anderson",
    )  # fmt: skip
    words = FAULTS.get(int(found.status), "")
    checks.value_error(not words, lambda: f"log_probabilities: they {words}")
    if warn:
        _warn_of(found, tol, max_iter)
    return found.labels(strict)


# ---- parts ---------------------------------------------------------------------------------------


def _warn_of(found: Sinkhorn, tol: float | None, max_iter: int) -> None:
    """Warnings of problems that failed, and of those where `tol` was not reached."""
    for fault, words in FAULTS.items():
        count = int((found.status == fault).sum())
        if count:
            not_converged(f"sinkhorn: {count} of {found.status.numel()} problems {words}")
    late = found.status == NOT_CONVERGED
    if bool(late.any()):
        not_converged(
            f"sinkhorn: the error of the marginals is {float(found.err[late].max()):.3g} after"
            f" max_iter={max_iter} iterations, tol={tol}: raise max_iter, epsilon or tol, or"
            " pass float64 scores, which large scores / epsilon need; what the scores of a row or"
            " of a prototype have in common may be subtracted before"
        )


def _finished(state: Found, problem: Problem, tol: float | None, exact: bool) -> Sinkhorn:
    """The result, failed problems NaN."""
    f, g, err, status, count = state
    failed = status > FINE
    late = torch.zeros_like(failed) if tol is None else ~failed & ~(err <= tol)
    lost = failed & (status != EMPTY)
    wide = g
    f, g = (torch.where(lost[..., None], torch.nan, x.to(problem.dtype)) for x in (f, g))
    err = torch.where(lost, torch.nan, err.to(problem.dtype))
    status = torch.where(late, NOT_CONVERGED, status)
    n_iter = int(count.max()) if count.numel() else 0
    return Sinkhorn(f, g, err, status, n_iter, replace(problem, low=_low_part(wide, g)), exact)


def _low_part(wide: Tensor, g: Tensor) -> Tensor | None:
    """What float32 leaves out of a g, if it is large."""
    if g.dtype == torch.float64 or not bool((g.isfinite() & (g.abs() > LARGE)).any()):
        return None
    return torch.where(g.isfinite(), wide - g.double(), 0.0).to(g.dtype)
