# SPDX-License-Identifier: Apache-2.0
"""The arguments of `sinkhorn`: checks, logarithms of the marginals, casts of autocast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from .._core import checks, transforms
from ._problem import Scores, TransportProblem, potentials_dtype

# The total of a marginal may differ from 1 by this much.
TOTAL_ERROR = 1e-3
# Iterations without `n_iter` and `tol`.
DEFAULT_ITERATIONS = 3
GRADIENTS = ("stop", "unrolled", "implicit", "envelope")


def check_scores(scores: Any) -> tuple[Tensor, int]:
    """(the scores or the features z, the number of prototypes); raises if they do not fit."""
    check_type(scores)
    if not isinstance(scores, Tensor):
        z, prototypes = scores
        checks.shape("z", z, "[..., N, D]", z.ndim >= 2)
        checks.shape("prototypes", prototypes, "[..., K, D]", prototypes.ndim >= 2)
        return z, prototypes.shape[-2]
    checks.floating("scores", scores)
    checks.shape("scores", scores, "[..., N, K]", scores.ndim >= 2)
    checks.non_empty("scores", scores, -1, "K")
    return scores, scores.shape[-1]


def check_log_probabilities(x: Any) -> None:
    """The checks of `sinkhorn` for scores, under the name `log_probabilities`."""
    checks.tensor("log_probabilities", x)
    checks.floating("log_probabilities", x)
    checks.shape("log_probabilities", x, "[N, K]", x.ndim == 2)
    checks.non_empty("log_probabilities", x, -1, "K")


def check_batch(scores: Scores, **vectors: Tensor | None) -> None:
    """The leading dims broadcast. The op checks that too, but its errors say `logits`."""
    operands = [(name, x, 1) for name, x in vectors.items()]
    if isinstance(scores, Tensor):
        checks.broadcast([("scores", scores, 2), *operands])


def check_vector(name: str, x: Any, size: int, like: Tensor, other: str = "scores") -> None:
    """A float vector [..., size] on the device of `like`, the argument named `other`."""
    checks.tensor(name, x)
    checks.floating(name, x)
    checks.shape(name, x, ["...", size], x.ndim >= 1 and x.shape[-1] == size)
    checks.same_device(name, x, other, like)


def refuse_not_finite(name: str, x: Tensor, factor: float) -> None:
    """Raise a ValueError for the first NaN or +inf of x [..., K], or of factor * x."""
    for values, what in (
        (x, "finite values or -inf"),
        (factor * x.to(potentials_dtype(x)), f"values finite times {factor:g}"),
    ):
        bad = (values.isnan() | (values == torch.inf)).reshape(-1, x.shape[-1]).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            place = f"row {row}, column {column}" if x.ndim > 1 else f"index {column}"
            got = f"{float(x.reshape(-1, x.shape[-1])[row, column]):g}"
            got = {"nan": "NaN", "inf": "+inf"}.get(got, got)
            raise ValueError(checks.wording(name, what, f"{got} at {place}"))


def refuse_infeasible(name: str, x: Tensor) -> None:
    """Raise a ValueError for the first row or column of x [N, K] without a value above -inf."""
    for kind, dim in (("row", 1), ("column", 0)):
        closed = (x == -torch.inf).all(dim).nonzero()[:1, 0].tolist()
        if closed:
            text = f"a value above -inf in every {kind}"
            raise ValueError(checks.wording(name, text, f"none in {kind} {closed[0]}"))
    raise ValueError(checks.wording(name, "equal column shares", "a column without mass"))


def check_type(scores: Any) -> None:
    """Scores are a Tensor, or a tuple (z, prototypes) of Tensors."""
    is_pair = isinstance(scores, tuple) and len(scores) == 2
    ok = isinstance(scores, Tensor) or (is_pair and all(isinstance(t, Tensor) for t in scores))
    text = "a Tensor or a tuple of two (z, prototypes)"
    checks.type_error(ok, lambda: checks.wording("scores", text, type(scores).__name__))


def checked_rule(
    n_iter: Any, tol: Any, max_iter: Any, accelerate: Any, prototype_first: Any, warn: Any
) -> tuple[int, float | None]:
    """(the number of iterations, or with tol the largest number of them; tol)."""
    if tol is None:
        limit = checks.whole("n_iter", DEFAULT_ITERATIONS if n_iter is None else n_iter, 0)
    else:
        tol = checks.number("tol", tol, 0.0, finite=True, strict=True)
        text = "None with tol (max_iter limits the iterations)"
        checks.expect(n_iter is None, "n_iter", text, n_iter)
        limit = checks.whole("max_iter", max_iter, 1)
        checks.at_least("max_iter", limit, 1)
    checks.boolean("prototype_first", prototype_first)
    checks.boolean("warn", warn)
    checks.expect(
        accelerate in (None, "anderson"), "accelerate", "None or 'anderson'", repr(accelerate)
    )
    if accelerate is not None:
        checks.expect(tol is not None, "accelerate", "None without tol", repr(accelerate))
        text = "None with prototype_first=False"
        checks.expect(bool(prototype_first), "accelerate", text, repr(accelerate))
    return limit, tol


def checked_epsilon(epsilon: Any, like: Tensor) -> float | Tensor:
    """A Python number > 0 whose inverse is finite in the dtype of the potentials, or a Tensor."""
    if isinstance(epsilon, Tensor):
        dtype = str(epsilon.dtype).removeprefix("torch.")
        text = "a real dtype"
        checks.type_error(not epsilon.is_complex(), lambda: checks.wording("epsilon", text, dtype))
        checks.shape("epsilon", epsilon, "[]", epsilon.ndim == 0)
        if not like.is_meta:
            checks.has_values("epsilon", epsilon)
        checks.values("epsilon", epsilon, 0.0, finite=True, strict=True)
        return epsilon
    epsilon = checks.real("epsilon", epsilon, "a number or a Tensor")
    limits = torch.finfo(potentials_dtype(like))
    return _in_range("epsilon", epsilon, 1 / limits.max, 1 / limits.tiny, f"{like.dtype} scores")


def checked_lam(lam: Any, like: Tensor) -> float:
    """A Python number > 0 in the range of the dtype of the potentials."""
    limits = torch.finfo(potentials_dtype(like))
    text = f"{like.dtype} log_probabilities"
    number: float = _in_range("lam", lam, limits.tiny, limits.max, text)
    return number


def _in_range(name: str, value: Any, least: float, most: float, values: str) -> Any:
    """A number from least to most, the limits for `values` of a dtype."""
    value = checks.number(name, value, 0.0, finite=True, strict=True)
    text = f"a number from {least:.2g} to {most:.2g} for {values.removeprefix('torch.')}"
    checks.value_error(least <= value <= most, lambda: checks.wording(name, text, value))
    return value


def check_transforms(problem: TransportProblem, start: Tensor | None, gradient: str) -> None:
    """No vmap with `tol`, which reads values; no torch.func and no forward mode with the implicit
    gradient, which is a torch.autograd.Function.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    scores = problem.scores if isinstance(problem.scores, tuple) else (problem.scores,)
    vectors = (problem.bias, problem.log_row, problem.log_col, start, problem.epsilon)
    tensors = (*scores, *vectors)
    if any(transforms.maps(x) for x in tensors):
        raise NotImplementedError(
            "tol: expected None under torch.func.vmap, which has no values to compare with it; pass"
            " n_iter, or pass the problems as leading dims [..., N, K]: each stops at tol by itself"
        )
    forward = any(transforms.has_tangent(x) for x in tensors)
    if gradient == "implicit" and (forward or transforms.active()):
        where = "in forward mode" if forward else "under torch.func"
        raise NotImplementedError(
            f"gradient: 'implicit' is not implemented {where}; call torch.autograd.grad or"
            " backward, or pass gradient='unrolled' with n_iter"
        )


def check_group(group: Any) -> None:
    """A group of processes, this process among them, or None."""
    if group is None:
        return
    import torch.distributed as dist

    ok = dist.is_available() and isinstance(group, dist.ProcessGroup)
    text, got = "a ProcessGroup or None", type(group).__name__
    checks.type_error(ok, lambda: checks.wording("process_group", text, got))


def check_gradient(gradient: Any, tol: Any, group: Any) -> None:
    """The gradient fits `tol` and `process_group`, which is a group."""
    check_group(group)
    words = ", ".join(repr(word) for word in GRADIENTS[:-1])
    checks.expect(
        gradient in GRADIENTS, "gradient", f"{words} or {GRADIENTS[-1]!r}", repr(gradient)
    )
    if tol is None:
        text = "'stop' or 'unrolled' without tol (the other words need tol)"
        checks.expect(gradient in GRADIENTS[:2], "gradient", text, repr(gradient))
    else:
        text = "'stop', 'implicit' or 'envelope' with tol"
        checks.expect(gradient != "unrolled", "gradient", text, repr(gradient))
    if group is not None:
        checks.expect(gradient == "stop", "gradient", "'stop' with process_group", repr(gradient))


def log_marginal(
    name: str, mass: Tensor | None, size: int, like: Tensor, group: Any = None
) -> Tensor | None:
    """Logarithms of masses; -inf, without a gradient, for a mass of 0. Masses in half precision
    have rounding errors, and are scaled to a total of 1.
    """
    if mass is None:
        return None
    check_vector(name, mass, size, like)
    checks.values(name, mass, 0.0, finite=True)
    info, half = torch.finfo(mass.dtype), mass.dtype in (torch.float16, torch.bfloat16)
    wide = mass.to(potentials_dtype(like)) if half else mass
    total = wide.double().sum(-1, keepdim=True)
    if group is not None:
        total = distributed.gather(total.detach(), group).sum(0)
    if checks.readable(mass) and total.numel() and size and group is None:
        slack = TOTAL_ERROR + (info.eps / 2 + size * info.tiny * info.eps / 2 if half else 0.0)
        totals = total.detach().flatten()
        worst = float(totals[(totals - 1).abs().argmax()])
        checks.expect(abs(worst - 1) <= slack, name, "masses of total 1", repr(worst))
    if half:
        wide = wide / total.to(wide.dtype)
    positive = wide > 0
    return torch.where(positive, torch.where(positive, wide, 1.0).log(), -torch.inf)


def row_logarithms(
    row_marginal: Tensor | None, row_mask: Tensor | None, like: Tensor, group: Any
) -> Tensor | None:
    """Logarithms of the row masses of a marginal and a mask; None if all rows have the same."""
    log_row = log_marginal("row_marginal", row_marginal, like.shape[-2], like, group)
    if row_mask is not None:
        return mask_rows(log_row, row_mask, like, group)
    return uniform_rows(like, group) if row_marginal is None and group is not None else log_row


def uniform_rows(like: Tensor, group: Any) -> Tensor:
    """Logarithms of equal masses: one over the number of rows of all processes."""
    n = like.shape[-2]
    count = torch.tensor([n], dtype=torch.int64, device=like.device)
    total = max(1, int(distributed.gather(count, group).sum()))
    return torch.full((n,), -math.log(total), dtype=torch.float64, device=like.device)


def apply_autocast(scores: Scores, precision: str | None) -> tuple[Scores, str | None]:
    """Scores and precision under the autocast of the caller: features of one dtype, and products of
    precision "medium" unless a precision is given. Methods of the result use the same.
    """
    first = scores if isinstance(scores, Tensor) else scores[0]
    kind = first.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return scores, precision
    if precision is None and torch.get_autocast_dtype(kind) != torch.float32:
        precision = "medium"
    if isinstance(scores, Tensor) or not all(x.is_floating_point() for x in scores):
        return scores, precision
    widest = torch.promote_types(scores[0].dtype, scores[1].dtype)
    return (scores[0].to(widest), scores[1].to(widest)), precision


def mask_rows(log_row: Tensor | None, mask: Tensor, like: Tensor, group: Any) -> Tensor:
    """Logarithms of the row masses, -inf outside the mask, scaled to a total of 1."""
    checks.tensor("row_mask", mask)
    got = str(mask.dtype).removeprefix("torch.")
    is_bool = mask.dtype == torch.bool
    checks.type_error(is_bool, lambda: checks.wording("row_mask", "dtype bool", got))
    checks.same_device("row_mask", mask, "scores", like)
    n = like.shape[-2] if like.ndim > 1 else 0
    checks.shape("row_mask", mask, ["...", n], mask.ndim >= 1 and mask.shape[-1] == n)
    mass = (
        mask.to(potentials_dtype(like))
        if log_row is None
        else torch.where(mask, log_row.exp(), 0.0)
    )
    total = mass.sum(-1, keepdim=True)
    if group is not None:
        total = distributed.gather(total, group).sum(0)
    log_mass = torch.zeros_like(mass) if log_row is None else log_row
    return torch.where(mask, log_mass - torch.where(total > 0, total, 1.0).log(), -torch.inf)
