# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` and its presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._core import checks
from ..ops._facts import EMPTY, FINE, INFEASIBLE, LARGE_POTENTIAL, NOT_CONVERGED, NOT_FINITE
from . import _arguments as arguments
from ._gradients import implicit
from ._iterate import IterationResult, iterate
from ._passes import Passes, Sharded
from ._problem import Scores, TransportProblem
from ._result import Sinkhorn
from ._warn import not_converged

# What a warning says of failed problems.
FAULTS = {
    NOT_FINITE: "have NaN or +inf in scores / epsilon, bias or init outside masked entries",
    INFEASIBLE: "have a row or prototype with mass whose scores are all -inf",
}


def sinkhorn(
    scores: Scores,
    *,
    epsilon: float | Tensor = 0.05,
    bias: Tensor | None = None,
    n_iter: int | None = None,
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
    """Assign rows to prototypes with equal or given shares, by entropic optimal transport.

        max <plan, scores> + epsilon H(plan), for plans whose row and column sums are the marginals:
        plan = exp(scores / epsilon + bias + f + g)                 (docs/ops/sinkhorn.md)

    Parameters
    ----------
    scores : Tensor [..., N, K], or (z [..., N, D], prototypes [..., K, D])
        Scores of rows for prototypes, higher is closer; or features whose products are the scores,
        which are never stored. Any float dtype; potentials are float32 (float64 for float64).
    epsilon : float or Tensor [], > 0, in units of the scores
        Softness of the plan. Inside torch.compile another number compiles again: pass a Tensor
        there.
    bias : Tensor [..., K], optional
        Added to scores / epsilon.
    n_iter : int, >= 0, optional
        Number of iterations, default 3. Not together with `tol`.
    tol : float, > 0, optional
        Iterate until the L1 error of the marginals is at most this; float32 reaches about 5e-7.
    max_iter : int, >= 1
        Largest number of iterations with `tol`.
    row_marginal : Tensor [..., N], >= 0, optional
        Masses of the rows, of total 1; default 1/N each. A row of mass 0 is masked. Masses in half
        precision have rounding errors, and are scaled to a total of 1.
    col_marginal : Tensor [..., K], >= 0, optional
        Masses of the prototypes, as for the rows; default 1/K each.
    prototype_first : bool
        Whether the half-step of the prototypes is the first of an iteration. With few iterations
        the order changes the result.
    row_mask : Tensor [..., N], bool, optional
        False: the row is masked, its scores may be NaN. The masses of the other rows are scaled to
        a total of 1.
    init : Tensor [..., K] or an earlier result, optional
        The first g.
    accelerate : "anderson", optional
        Anderson acceleration: fewer iterations to `tol`. Needs prototype_first=True.
    gradient : "stop", "unrolled", "implicit" or "envelope"
        "stop": no gradient. "unrolled": through all `n_iter` iterations. "implicit": of the fixed
        point, with `tol`. "envelope": of `value()` alone, with `tol`. All are gradients by scores,
        features, prototypes, bias, epsilon and marginals.
    process_group : torch.distributed.ProcessGroup, optional
        Each of its processes has any number of the rows, and all have the same prototypes and call
        `sinkhorn`. Row masses have the total 1 over all processes. Only gradient="stop". The
        methods `value`, `entropy`, `counts` and `labels(strict=True)` of the result use the rows of
        all processes: all must call them.
    warn : bool
        With `tol`, whether a ConvergenceWarning says that a problem failed or did not reach `tol`.
        Without `tol` nothing is read from the device, and only `status` says so.
    precision : "highest", "high" or "medium", optional
        Of the matrix products of features. None: the precision of torch, and of autocast where
        `sinkhorn` is called. The methods of the result use the same precision.

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
        A shape, device or value that does not fit; `n_iter` together with `tol`.
    NotImplementedError
        A transform of torch.func that is not supported (see Notes).

    Notes
    -----
    The scores are not copied: 1 / epsilon multiplies each tile, and no other array is as large.
    Products of half precision features accumulate in float32.

    Large scores / epsilon lose digits in float32, 2^-24 of their size, unless a constant of their
    row can be subtracted (docs/ops/sinkhorn.md has figures). With `tol`, `err` is the error of the
    plan. Without `tol`, float32 potentials have errors of 2^-24 of the largest scores / epsilon:
    subtract one constant from all scores, which changes no code, or pass float64.

    Under torch.compile a call without `tol` is one graph for every number of rows. With `tol` the
    host reads the error, which breaks the graph, and torch.func.vmap raises NotImplementedError.
    gradient="implicit" supports torch.autograd only, and raises under torch.func.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.0], [0.6, 0.5]])
    >>> clam_kernels.sinkhorn(scores, tol=1e-6).labels()
    tensor([0, 1, 0, 1])
    """
    first, size = arguments.check_scores(scores)
    epsilon = arguments.checked_epsilon(epsilon, first)
    limit, tol = arguments.checked_rule(n_iter, tol, max_iter, accelerate, prototype_first, warn)
    arguments.check_gradient(gradient, tol, process_group)
    if bias is not None:
        arguments.check_vector("bias", bias, size, first)
    log_row = arguments.row_logarithms(row_marginal, row_mask, first, process_group)
    log_col = arguments.log_marginal("col_marginal", col_marginal, size, first)
    scores, precision = arguments.apply_autocast(scores, precision)
    problem = TransportProblem(scores, epsilon, bias, log_row, log_col, precision)
    start = init.g if isinstance(init, Sinkhorn) else init
    if start is not None:
        arguments.check_vector("init", start, size, first)
    vectors = {"row_marginal" if row_mask is None else "row_mask": log_row, "bias": bias}
    arguments.check_batch(scores, **vectors, col_marginal=log_col, init=start)
    if tol is not None:
        checks.has_values("scores", first)
        arguments.check_transforms(problem, start, gradient)
    if gradient == "unrolled":
        state = problem.ops().iterate(limit, start, prototype_first)
        return Sinkhorn(*state, limit, problem, prototype_first or limit == 0)
    if tol is None and process_group is not None:
        checks.at_least("n_iter", limit, 0)
    with torch.no_grad():
        result = _solve(
            problem.detach(), start, limit, tol, prototype_first, accelerate, process_group
        )
    if warn and (tol is not None or process_group is not None):
        _warn_of(result, tol, limit)
    if gradient == "implicit":
        f, g = implicit(problem, result.g)
        problem = replace(problem, g_low=result.problem.g_low)
        return replace(result, f=f, g=g, problem=problem, rows_exact=True)
    if gradient == "envelope":
        problem = replace(problem, g_low=result.problem.g_low)
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
    """Codes of a batch for swapped prediction (SwAV): few iterations, no gradient.

    The shares are nearly equal; the `err` of `sinkhorn` is their error.

    Parameters
    ----------
    scores : Tensor [..., N, K], or (z, prototypes)
        Cosines of features and prototypes; both of unit norm in the second form.
    epsilon : float, > 0
        Softness.
    n_iter : int, >= 0
        Iterations, prototypes first.
    row_mask : Tensor [..., N], bool, optional
        False: the row is masked.
    process_group : torch.distributed.ProcessGroup, optional
        Each of its processes has any number of the rows of the batch.

    Returns
    -------
    Tensor [..., N, K]
        Active rows sum to 1, masked rows to 0. All NaN if active scores are NaN or +inf: nothing is
        read from the device, so there is no error.

    Raises
    ------
    TypeError, ValueError
        As in `sinkhorn`.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> clam_kernels.swav_codes(torch.tensor([[1.0, 0.9], [1.0, 0.5]])).argmax(1)
    tensor([1, 0])
    """
    result = sinkhorn(
        scores, epsilon=epsilon, n_iter=n_iter, row_mask=row_mask, process_group=process_group
    )
    return result.codes()


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
    """Labels of a data set with equal shares, for self-labelling (SeLa).

    Parameters
    ----------
    log_probabilities : Tensor [N, K], K >= 1
        log softmax of a head; finite or -inf.
    lam : float, > 0
        Sharpness, 1 / epsilon.
    tol : float, > 0
        L1 error of the label shares.
    max_iter : int, >= 1
        Largest number of iterations.
    init : Tensor [K] or an earlier result, optional
        The first g, for example that of earlier labels.
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
        As in `sinkhorn`; NaN or +inf, or a row or column whose values are all -inf.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    >>> clam_kernels.sela_labels(logits.log_softmax(1))
    tensor([1, 0, 1, 0])
    """
    arguments.check_log_probabilities(log_probabilities)
    checks.boolean("strict", strict)
    checks.boolean("warn", warn)
    lam = arguments.checked_lam(lam, log_probabilities)
    tol = checks.number("tol", tol, 0.0, finite=True, strict=True)
    start = init.g if isinstance(init, Sinkhorn) else init
    checks.has_values("log_probabilities", log_probabilities)
    size = log_probabilities.shape[-1]
    if start is not None:
        arguments.check_vector("init", start, size, log_probabilities, "log_probabilities")
        checks.shape("init", start, [size], start.numel() == size)
    result = sinkhorn(
        log_probabilities, epsilon=1.0 / lam, tol=tol, max_iter=max_iter, init=init, warn=False,
        accelerate="anderson",
    )  # fmt: skip
    status = int(result.status)
    if status == NOT_FINITE:
        arguments.refuse_not_finite("log_probabilities", log_probabilities, lam)
        if start is not None:
            arguments.refuse_not_finite("init", start, 1.0)
    if status in FAULTS:
        arguments.refuse_infeasible("log_probabilities", log_probabilities)
    if warn:
        _warn_of(result, tol, max_iter)
    return result.labels(strict)


# ---- parts ---------------------------------------------------------------------------------------


def _solve(
    problem: TransportProblem,
    start: Tensor | None,
    limit: int,
    tol: float | None,
    prototype_first: bool,
    accelerate: str | None,
    group: Any,
) -> Sinkhorn:
    """The result after `limit` iterations, or at `tol`; no gradient."""
    rows_exact = prototype_first or (tol is None and limit == 0)
    if tol is None and group is None:
        potentials = problem.ops().iterate(limit, start, prototype_first)
        return Sinkhorn(*potentials, limit, problem, rows_exact)
    ops = problem.ops()
    passes = Passes(ops) if group is None else Sharded(ops, group)
    state = iterate(passes, start, limit, tol, prototype_first, accelerate is not None)
    return _finish(state, problem, tol, rows_exact)


def _warn_of(result: Sinkhorn, tol: float | None, max_iter: int) -> None:
    """Warn of problems that failed, and of problems that did not reach `tol`."""
    for fault, words in FAULTS.items():
        count = int((result.status == fault).sum())
        if count:
            not_converged(f"sinkhorn: {count} of {result.status.numel()} problems {words}")
    late = result.status == NOT_CONVERGED
    if bool(late.any()):
        not_converged(
            f"sinkhorn: the error of the marginals is {float(result.err[late].max()):.3g} after"
            f" max_iter={max_iter} iterations, tol={tol}: raise max_iter, epsilon or tol. Large"
            " scores / epsilon need float64 scores, or a constant subtracted from the scores of"
            " each row or prototype"
        )


def _finish(
    state: IterationResult, problem: TransportProblem, tol: float | None, rows_exact: bool
) -> Sinkhorn:
    """The result of an iteration; NaN in failed problems."""
    f, g, err, status, count = state
    failed = status > FINE
    late = torch.zeros_like(failed) if tol is None else ~failed & ~(err <= tol)
    is_nan = failed & (status != EMPTY)
    g64 = g
    f, g = (torch.where(is_nan[..., None], torch.nan, x.to(problem.dtype)) for x in (f, g))
    err = torch.where(is_nan, torch.nan, err.to(problem.dtype))
    status = torch.where(late, NOT_CONVERGED, status)
    n_iter = int(count.max()) if count.numel() else 0
    problem = replace(problem, g_low=_low_part(g64, g))
    return Sinkhorn(f, g, err, status, n_iter, problem, rows_exact)


def _low_part(g64: Tensor, g: Tensor) -> Tensor | None:
    """`g64 - g`, which g loses in float32, if an entry is large."""
    if g.dtype == torch.float64 or not bool((g.isfinite() & (g.abs() > LARGE_POTENTIAL)).any()):
        return None
    return torch.where(g.isfinite(), g64 - g.double(), 0.0).to(g.dtype)
