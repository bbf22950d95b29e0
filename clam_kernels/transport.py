# SPDX-License-Identifier: Apache-2.0
"""Codes and labels by optimal transport: Sinkhorn scaling of the scores of rows for prototypes.

Equations: docs/ops/sinkhorn.md.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._core import checks
from .ops import sinkhorn as ops

FINE, NOT_CONVERGED = 0, 1
# Iterations between two looks at the error.
BLOCK = 16
# Logits that are held at once where only labels or sums are asked for.
TILE_ENTRIES = 1 << 22
GRADIENTS = ("stop", "unrolled")

Scores = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sinkhorn:
    """What `sinkhorn` found.

    Attributes
    ----------
    f, g : Tensor [..., N], [..., K]
        Potentials: the plan is exp(scores / epsilon + bias + f + g).
    err : Tensor [...]
        L1 error of the sums of the side that was not made exact last.
    status : Tensor [...], int64
        0 fine, 1 not converged to `tol`, 2 not finite, 3 infeasible, 4 no row.
    n_iter : int
        Iterations run.
    """

    f: Tensor
    g: Tensor
    err: Tensor
    status: Tensor
    n_iter: int
    scores: Scores
    scale: Any
    bias: Tensor | None
    mass: Tensor | None  # marginal of the rows, for what has none
    shares: Tensor | None  # marginal of the prototypes

    @property
    def converged(self) -> Tensor:
        """Whether each problem is fine."""
        return self.status == FINE

    def _logits(self, part: slice) -> Tensor:
        """Logits of some rows in the dtype of the potentials."""
        if isinstance(self.scores, Tensor):
            x = self.scores[..., part, :].to(self.g.dtype)
        else:
            z, prototypes = (t.to(self.g.dtype) for t in self.scores)
            x = z[..., part, :] @ prototypes.mT
        x = x / self.scale
        return x if self.bias is None else x + self.bias.to(x.dtype)[..., None, :]

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits + g) in chunks."""
        n, k = self.f.shape[-1], self.g.shape[-1]
        problems = max(1, self.err.numel())
        step = max(1, TILE_ENTRIES // (k * problems))
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            yield part, self._logits(part) + self.g[..., None, :]

    def _out(self, part: slice) -> Tensor | None:
        """Which of some rows take no part."""
        return None if self.mass is None else self.mass[..., part] <= 0

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """The plan's rows over their sums, softmax_j(logits + g).

        Parameters
        ----------
        rows : slice
            Rows to give; all unless given.

        Returns
        -------
        Tensor [..., N, K]
            0 in rows that take no part, NaN in problems that failed.
        """
        p = torch.softmax(self._logits(rows) + self.g[..., None, :], -1)
        out = self._out(rows)
        return p if out is None else p.masked_fill(out[..., None], 0.0)

    def plan(self, rows: slice = slice(None)) -> Tensor:
        """exp(logits + f + g) [..., N, K], of some rows or all."""
        x = self._logits(rows) + self.g[..., None, :] + self.f[..., rows, None]
        return x.exp()

    def labels(self, strict: bool = False) -> Tensor:
        """The prototype of each row's largest code, without an N x K array.

        Parameters
        ----------
        strict : bool
            Whether no prototype gets more rows than its mass is worth (rounded, the rest to the
            largest remainders, lowest index on ties): rows move where that costs least.

        Returns
        -------
        Tensor [..., N], int64
            -1 for rows that take no part and for problems that failed.
        """
        with torch.no_grad():
            found = torch.empty(self.f.shape, dtype=torch.int64, device=self.f.device)
            for part, x in self._tiles():
                best = x.argmax(-1)
                out = self._out(part)
                found[..., part] = best if out is None else best.masked_fill(out, -1)
            found[self.status > NOT_CONVERGED] = -1
        return _evened(self, found) if strict else found

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest codes of each row.

        Parameters
        ----------
        k : int
            How many.

        Returns
        -------
        values, indices : Tensor [..., N, k]
        """
        values, indices = [], []
        for _, x in self._tiles():
            top = torch.softmax(x, -1).topk(k, -1)
            values.append(top.values)
            indices.append(top.indices)
        return torch.cat(values, -2), torch.cat(indices, -2)

    def counts(self) -> Tensor:
        """Rows of each label [..., K], int64."""
        labels, k = self.labels(), self.g.shape[-1]
        flat = labels.reshape(-1, labels.shape[-1])
        rows = [torch.bincount(row[row >= 0], minlength=k) for row in flat]
        return torch.stack(rows).reshape(self.g.shape)

    def value(self) -> Tensor:
        """<plan, -scores> + epsilon KL(plan | a b^T) at the potentials [...], up to err."""
        total = torch.zeros_like(self.err, dtype=torch.float64)
        n, k = self.f.shape[-1], self.g.shape[-1]
        for part, x in self._tiles():
            q = (x + self.f[..., part, None]).exp()
            both = self.f[..., part, None] + self.g[..., None, :]
            live = torch.where(q > 0, both + math.log(n * k), 0.0)
            total = total + (q * live).double().sum((-2, -1))
        return total * self.scale

    def entropy(self) -> Tensor:
        """Mean entropy of the codes of the rows [...], in nats."""
        total = torch.zeros_like(self.err, dtype=torch.float64)
        rows = torch.zeros_like(total)
        for part, x in self._tiles():
            p = torch.softmax(x, -1)
            one = torch.special.entr(p).sum(-1).double()
            out = self._out(part)
            weight = torch.ones_like(one) if out is None else (~out).double()
            total, rows = total + (one * weight).sum(-1), rows + weight.sum(-1)
        return total / rows.clamp(min=1)

    def assign(self, scores: Scores) -> Tensor:
        """Codes of other rows at these potentials.

        Parameters
        ----------
        scores : Tensor [..., M, K] or (z [..., M, D], prototypes [..., K, D])
            As `sinkhorn` takes them.

        Returns
        -------
        Tensor [..., M, K]
        """
        rows = scores if isinstance(scores, Tensor) else scores[0]
        f = rows.new_zeros(rows.shape[:-1], dtype=self.f.dtype)
        other = Sinkhorn(
            f, self.g, self.err, self.status, self.n_iter, scores, self.scale, self.bias, None, None
        )
        return other.codes()


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
    gradient: str = "stop",
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
        Softness of the plan.
    bias : Tensor [..., K], optional
        Added to scores / epsilon.
    n_iter : int, >= 0
        Iterations, where `tol` is None.
    tol : float, > 0, optional
        L1 error of the marginals to go on to, looked at every 16 iterations.
    max_iter : int, >= 1
        Most iterations with `tol`.
    row_marginal : Tensor [..., N], >= 0, optional
        Masses of the rows; 1/N each unless given.
    col_marginal : Tensor [..., K], >= 0, optional
        Masses of the prototypes, of the same total; 1/K each unless given.
    prototype_first : bool
        Which side is made exact first in an iteration; with few iterations another result.
    row_mask : Tensor [..., N], bool, optional
        False: the row takes no part, whatever it holds.
    init : Tensor [..., K] or an earlier result, optional
        A g to start from.
    gradient : "stop" or "unrolled"
        Whether results carry gradients, through all iterations (not with `tol`).
    warn : bool
        Whether a ConvergenceWarning says that `tol` was not reached.
    precision : "highest", "high" or "medium", optional
        Of the matrix products of the features form; None follows torch.

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

    Examples
    --------
    >>> import torch, clam_kernels
    >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.0], [0.6, 0.5]])
    >>> clam_kernels.sinkhorn(scores, tol=1e-6).labels()
    tensor([0, 1, 0, 1])
    """
    first = scores if isinstance(scores, Tensor) else _pair(scores)[0]
    _check(epsilon, n_iter, tol, max_iter, gradient)
    n = first.shape[-2] if first.ndim > 1 else 0
    log_row = _log_mass("row_marginal", row_marginal)
    mass = row_marginal
    if row_mask is not None:
        log_row, mass = _masked(log_row, row_mask, n, first)
    log_col = _log_mass("col_marginal", col_marginal)
    start = init.g if isinstance(init, Sinkhorn) else init
    with torch.set_grad_enabled(gradient == "unrolled" and torch.is_grad_enabled()):
        call = _call(scores, epsilon, bias, log_row, log_col, prototype_first, precision)
        if tol is None:
            f, g, err, status = call(n_iter, start)
            done = n_iter
        else:
            f, g, err, status, done = _to_tolerance(call, start, tol, max_iter, warn)
    kept: Scores = scores
    if gradient == "stop":
        bias = None if bias is None else bias.detach()
        epsilon = epsilon.detach() if isinstance(epsilon, Tensor) else epsilon
        fixed = tuple(t.detach() for t in ((scores,) if isinstance(scores, Tensor) else scores))
        kept = fixed[0] if len(fixed) == 1 else (fixed[0], fixed[1])
    return Sinkhorn(f, g, err, status, done, kept, epsilon, bias, mass, col_marginal)


def swav_codes(
    scores: Scores, *, epsilon: float = 0.05, n_iter: int = 3, row_mask: Tensor | None = None
) -> Tensor:
    """Codes of a batch as swapped prediction (SwAV) has them: few iterations, no gradient.

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

    Returns
    -------
    Tensor [..., N, K]
        Rows sum to 1.

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
    return sinkhorn(scores, epsilon=epsilon, n_iter=n_iter, row_mask=row_mask).codes()


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
    log_probabilities : Tensor [N, K]
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
        As `sinkhorn`.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    >>> clam_kernels.sela_labels(logits.log_softmax(1))
    tensor([1, 0, 1, 0])
    """
    checks.number("lam", lam, 0.0, finite=True, strict=True)
    found = sinkhorn(
        log_probabilities, epsilon=1.0 / lam, tol=tol, max_iter=max_iter, init=init, warn=warn
    )
    return found.labels(strict)


# ---- parts ---------------------------------------------------------------------------------------


def _pair(scores: Any) -> tuple[Tensor, Tensor]:
    two = isinstance(scores, tuple) and len(scores) == 2
    ok = two and all(isinstance(t, Tensor) for t in scores)
    text = "a Tensor or a tuple of two (z, prototypes)"
    checks.type_error(ok, lambda: checks.wording("scores", text, type(scores).__name__))
    return scores[0], scores[1]


def _check(epsilon: Any, n_iter: Any, tol: Any, max_iter: Any, gradient: Any) -> None:
    if isinstance(epsilon, Tensor):
        checks.values("epsilon", epsilon, 0.0, finite=True, strict=True)
    else:
        checks.number("epsilon", epsilon, 0.0, finite=True, strict=True)
    if tol is not None:
        checks.number("tol", tol, 0.0, finite=True, strict=True)
        checks.at_least("max_iter", max_iter, 1)
        both = gradient == "unrolled"
        checks.value_error(
            not both,
            lambda: checks.wording("gradient", "'stop' with tol", repr(gradient)),
        )
    if gradient not in GRADIENTS:
        words = " or ".join(repr(word) for word in GRADIENTS)
        raise ValueError(checks.wording("gradient", words, repr(gradient)))


def _log_mass(name: str, mass: Tensor | None) -> Tensor | None:
    if mass is None:
        return None
    checks.tensor(name, mass)
    checks.values(name, mass, 0.0, finite=True)
    return mass.log()


def _masked(log_row: Tensor | None, mask: Tensor, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(logarithms of the rows' masses, masses) with those outside the mask at 0."""
    checks.tensor("row_mask", mask)
    checks.type_error(
        mask.dtype == torch.bool,
        lambda: checks.wording("row_mask", "dtype bool", str(mask.dtype).removeprefix("torch.")),
    )
    ok = mask.ndim >= 1 and mask.shape[-1] == n
    checks.shape("row_mask", mask, f"[..., {n}]", ok)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    if log_row is None:
        log_row = -mask.sum(-1, keepdim=True).to(wide).clamp(min=1).log()
    log_row = torch.where(mask, log_row, -torch.inf)
    return log_row, log_row.exp()


def _call(
    scores: Scores,
    epsilon: Any,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    prototype_first: bool,
    precision: str | None,
) -> Any:
    """The op as a function of (iterations, start)."""
    rest: dict[str, Any] = {
        "log_row": log_row,
        "log_col": log_col,
        "prototype_first": prototype_first,
        "precision": precision,
    }
    if not isinstance(scores, Tensor):
        z, prototypes = scores
        wide = prototypes / epsilon
        return lambda n, init: ops.sinkhorn_features(
            z, wide.to(z.dtype), n, bias=bias, init=init, **rest
        )
    logits = (
        scores / epsilon
        if scores.dtype in (torch.float32, torch.float64)
        else (scores.float() / epsilon)
    )
    logits = logits if bias is None else logits + bias[..., None, :]
    return lambda n, init: ops.sinkhorn(logits, n, init=init, **rest)


def _to_tolerance(
    call: Any, start: Tensor | None, tol: float, max_iter: int, warn: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Blocks of iterations until every problem's error is below tol; one that is stays as it is."""
    kept: tuple[Tensor, ...] | None = None
    done = 0
    while True:
        block = min(BLOCK, max_iter - done)
        f, g, err, status = call(block, start)
        done += block
        if kept is not None:
            still = (kept[3] == FINE) & (kept[2] <= tol)
            f, g = (
                torch.where(still[..., None], a, b) for a, b in zip(kept[:2], (f, g), strict=True)
            )
            err = torch.where(still, kept[2], err)
        kept = (f, g, err, status)
        start = g
        open_ = (status == FINE) & ~(err <= tol)
        if done >= max_iter or not bool(open_.any()):
            break
    status = torch.where(open_, NOT_CONVERGED, status)
    if warn and bool(open_.any()):
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"sinkhorn: the error of the marginals is {float(err[open_].max()):.3g} after"
            f" max_iter={max_iter} iterations, tol={tol}: raise max_iter or epsilon",
            ConvergenceWarning,
            stacklevel=3,
        )
    return f, g, err, status, done


def _capacities(total: int, mass: Tensor) -> list[int]:
    """Whole shares of a number of rows: rounded down, the rest to the largest remainders."""
    exact = mass.double() / mass.double().sum() * total
    whole = (exact + 1e-9).floor().long()
    order = torch.sort(whole.double() - exact, stable=True).indices
    whole[order[: total - int(whole.sum())]] += 1
    return [int(x) for x in whole]


def _evened(found: Sinkhorn, labels: Tensor) -> Tensor:
    """Labels of every problem with no prototype above its capacity."""
    flat = labels.reshape(-1, labels.shape[-1]).clone()
    if len(flat) > 1:
        raise ValueError(checks.wording("strict", "one problem", f"a batch of {len(flat)}"))
    row = flat[0]
    if bool((row >= 0).any()):
        _even_one(found, row)
    return flat.reshape(labels.shape)


def _even_one(found: Sinkhorn, labels: Tensor) -> None:
    """Move rows of least regret from prototypes above their capacity to those below, in place."""
    k, total = found.g.shape[-1], int((labels >= 0).sum())
    mass = torch.ones(k) if found.shares is None else found.shares.reshape(k).cpu()
    held = torch.bincount(labels[labels >= 0], minlength=k).tolist()
    room = [c - n for c, n in zip(_capacities(total, mass), held, strict=True)]
    heap: list[tuple[float, int, int]] = []
    for part, x in found._tiles():
        heap += _offers(x.reshape(-1, k), labels[part], room, part.start)
    heapq.heapify(heap)
    while heap and min(room) < 0:
        _, row, target = heapq.heappop(heap)
        source = int(labels[row])
        if room[source] >= 0:
            continue
        if room[target] <= 0:  # it has filled up since
            x = found._logits(slice(row, row + 1)).reshape(1, k) + found.g.reshape(k)
            for offer in _offers(x, labels[row : row + 1], room, row):
                heapq.heappush(heap, offer)
            continue
        labels[row] = target
        room[source] += 1
        room[target] -= 1


def _offers(x: Tensor, labels: Tensor, room: list[int], first: int) -> list[tuple[float, int, int]]:
    """(regret, row, prototype) of the rows that are too many: the best that has room."""
    space = torch.tensor(room, device=x.device)
    rows = (labels >= 0).nonzero()[:, 0]
    rows = rows[space[labels[rows]] < 0]
    best = x[rows].masked_fill(space <= 0, -torch.inf).max(1)
    regret = x[rows, labels[rows]] - best.values
    return list(zip(regret.tolist(), (rows + first).tolist(), best.indices.tolist(), strict=True))
