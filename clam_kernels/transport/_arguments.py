# SPDX-License-Identifier: Apache-2.0
"""The arguments of `sinkhorn`: checks, marginals as logarithms, what autocast makes of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from .._core import checks, transforms
from ._problem import Problem, Scores, potentials_dtype

# How far the total of a marginal may be from 1.
TOTAL = 1e-3
GRADIENTS = ("stop", "unrolled", "implicit", "envelope")


def operands(scores: Any) -> tuple[Tensor, int]:
    """(what has the rows, number of prototypes)."""
    if not isinstance(scores, Tensor):
        z, prototypes = _pair(scores)
        checks.shape("z", z, "[..., N, D]", z.ndim >= 2)
        checks.shape("prototypes", prototypes, "[..., K, D]", prototypes.ndim >= 2)
        return z, prototypes.shape[-2]
    checks.floating("scores", scores)
    checks.shape("scores", scores, "[..., N, K]", scores.ndim >= 2)
    checks.non_empty("scores", scores, -1, "K")
    return scores, scores.shape[-1]


def check_log_probabilities(x: Any) -> None:
    """Those of one head, in words of their own."""
    checks.tensor("log_probabilities", x)
    checks.floating("log_probabilities", x)
    checks.shape("log_probabilities", x, "[N, K]", x.ndim == 2)
    checks.non_empty("log_probabilities", x, -1, "K")


def check_batch(scores: Scores, **vectors: Tensor | None) -> None:
    """Leading dims that broadcast, before the op would call the scores logits."""
    given = [(name, x, 1) for name, x in vectors.items()]
    if isinstance(scores, Tensor):
        checks.broadcast([("scores", scores, 2), *given])


def check_vector(name: str, x: Any, size: int, like: Tensor) -> None:
    checks.tensor(name, x)
    checks.floating(name, x)
    checks.shape(name, x, ["...", size], x.ndim >= 1 and x.shape[-1] == size)
    checks.same_device(name, x, "scores", like)


def _pair(scores: Any) -> tuple[Tensor, Tensor]:
    two = isinstance(scores, tuple) and len(scores) == 2
    ok = two and all(isinstance(t, Tensor) for t in scores)
    text = "a Tensor or a tuple of two (z, prototypes)"
    checks.type_error(ok, lambda: checks.wording("scores", text, type(scores).__name__))
    return scores[0], scores[1]


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    checks.value_error(ok, lambda: checks.wording(name, expected, repr(got)))


def checked_rule(
    n_iter: Any, tol: Any, max_iter: Any, accelerate: Any, prototype_first: Any
) -> tuple[int, float | None, int]:
    """(n_iter, tol, max_iter) as Python's numbers."""
    n_iter = checks.whole("n_iter", n_iter, 0)
    if tol is not None:
        tol = checks.number("tol", tol, 0.0, finite=True, strict=True)
        max_iter = checks.whole("max_iter", max_iter, 1)
        checks.at_least("max_iter", max_iter, 1)
    ok, got = isinstance(prototype_first, bool), type(prototype_first).__name__
    checks.type_error(ok, lambda: checks.wording("prototype_first", "a bool", got))
    _expect(accelerate in (None, "anderson"), "accelerate", "None or 'anderson'", accelerate)
    if accelerate is not None:
        _expect(tol is not None, "accelerate", "None without tol", accelerate)
        text = "None where the rows come first"
        _expect(bool(prototype_first), "accelerate", text, accelerate)
    return n_iter, tol, max_iter


def checked_epsilon(epsilon: Any, like: Tensor) -> float | Tensor:
    """A number > 0 that has an inverse in the dtype of the potentials, as Python's, or a Tensor."""
    if isinstance(epsilon, Tensor):
        checks.shape("epsilon", epsilon, "[]", epsilon.ndim == 0)
        checks.values("epsilon", epsilon, 0.0, finite=True, strict=True)
        return epsilon
    epsilon = checks.real("epsilon", epsilon, "a number or a Tensor")
    kind = torch.finfo(potentials_dtype(like))
    return _between("epsilon", epsilon, 1 / kind.max, 1 / kind.tiny, like)


def checked_lam(lam: Any, like: Tensor) -> float:
    """A number > 0 that is a scale in the dtype of the potentials, as Python's."""
    kind = torch.finfo(potentials_dtype(like))
    return _between("lam", lam, kind.tiny, kind.max, like)


def _between(name: str, value: Any, least: float, most: float, like: Tensor) -> Any:
    value = checks.number(name, value, 0.0, finite=True, strict=True)
    text = f"a number from {least:.2g} to {most:.2g} for {like.dtype} scores"
    checks.value_error(least <= value <= most, lambda: checks.wording(name, text, value))
    return value


def check_transforms(problem: Problem, start: Tensor | None, gradient: str) -> None:
    """A tolerance is read on the way, and its gradient is a function of torch.autograd's alone."""
    if torch.compiler.is_dynamo_compiling():
        return
    scores = problem.scores if isinstance(problem.scores, tuple) else (problem.scores,)
    vectors = (problem.bias, problem.log_row, problem.log_col, start, problem.epsilon)
    tensors = (*scores, *vectors)
    if any(transforms.maps(x) for x in tensors):
        raise NotImplementedError(
            "tol: expected None under torch.func.vmap, which has no values to compare with it; pass"
            " the problems as leading dims [..., N, K], of which each ends by itself, or n_iter"
        )
    forward = any(transforms.has_tangent(x) for x in tensors)
    if gradient == "implicit" and (forward or transforms.active()):
        where = "in forward mode" if forward else "under torch.func"
        raise NotImplementedError(
            f"gradient: 'implicit' is not implemented {where}; call torch.autograd.grad or"
            " backward, or pass gradient='unrolled' with n_iter"
        )


def check_gradient(gradient: Any, tol: Any, group: Any) -> None:
    words = ", ".join(repr(word) for word in GRADIENTS[:-1])
    _expect(gradient in GRADIENTS, "gradient", f"{words} or {GRADIENTS[-1]!r}", gradient)
    if tol is None:
        text = "'stop' or 'unrolled' without tol (the others need it)"
        _expect(gradient in GRADIENTS[:2], "gradient", text, gradient)
    else:
        text = "'stop', 'implicit' or 'envelope' with tol"
        _expect(gradient != "unrolled", "gradient", text, gradient)
    if group is not None:
        _expect(gradient == "stop", "gradient", "'stop' with process_group", gradient)


def log_mass(
    name: str, mass: Tensor | None, size: int, like: Tensor, group: Any = None
) -> Tensor | None:
    """Logarithms; -inf, without a gradient, of 0. Masses in half precision, each of which is
    rounded, are scaled to a total of 1.
    """
    if mass is None:
        return None
    check_vector(name, mass, size, like)
    checks.values(name, mass, 0.0, finite=True)
    kind, half = torch.finfo(mass.dtype), mass.dtype in (torch.float16, torch.bfloat16)
    wide = mass.to(potentials_dtype(like)) if half else mass
    total = wide.double().sum(-1, keepdim=True)
    if group is not None:
        total = distributed.gathered(total.detach(), group).sum(0)
    if checks.readable(mass) and total.numel() and size and group is None:
        slack = TOTAL + (kind.eps / 2 + size * kind.tiny * kind.eps / 2 if half else 0.0)
        read = total.detach().flatten()
        worst = float(read[(read - 1).abs().argmax()])
        _expect(abs(worst - 1) <= slack, name, "masses of total 1", worst)
    if half:
        wide = wide / total.to(wide.dtype)
    some = wide > 0
    return torch.where(some, torch.where(some, wide, 1.0).log(), -torch.inf)


def even(like: Tensor, group: Any) -> Tensor:
    """Logarithms of equal masses for the rows of all processes."""
    n = like.shape[-2]
    count = torch.tensor([n], dtype=torch.int64, device=like.device)
    total = max(1, int(distributed.gathered(count, group).sum()))
    return torch.full((n,), -math.log(total), dtype=torch.float64, device=like.device)


def as_autocast(scores: Scores, precision: str | None) -> tuple[Scores, str | None]:
    """Scores and precision as autocast has them where `sinkhorn` is called: features of one dtype,
    and lower products unless a precision is asked for. What is read later is computed alike.
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


def masked(log_row: Tensor | None, mask: Tensor, like: Tensor, group: Any) -> Tensor:
    """Logarithms of the rows' masses with -inf outside the mask."""
    checks.tensor("row_mask", mask)
    got = str(mask.dtype).removeprefix("torch.")
    ok = mask.dtype == torch.bool
    checks.type_error(ok, lambda: checks.wording("row_mask", "dtype bool", got))
    n = like.shape[-2] if like.ndim > 1 else 0
    checks.shape("row_mask", mask, ["...", n], mask.ndim >= 1 and mask.shape[-1] == n)
    mass = (
        mask.to(potentials_dtype(like))
        if log_row is None
        else torch.where(mask, log_row.exp(), 0.0)
    )
    total = mass.sum(-1, keepdim=True)
    if group is not None:
        total = distributed.gathered(total, group).sum(0)
    given = torch.zeros_like(mass) if log_row is None else log_row
    return torch.where(mask, given - torch.where(total > 0, total, 1.0).log(), -torch.inf)
