# SPDX-License-Identifier: Apache-2.0
"""Gradients of Sinkhorn scaling on a GPU, half-step by half-step back. Equations:
docs/ops/sinkhorn.md.

The steps are taken again and their potentials kept, O((N + K) T); with these every weight of a
half-step is one exponential of a logit. A pass a half-step carries the adjoint to the other side,
and one pass in the end adds what all of them ask of the logits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.backend import float32_products
from . import _launch
from ._operands import batch_of
from ._scaling import begin_of, parts_of, side_of, tile_of
from ._sweep import NUMBERS
from .sinkhorn import Solver, features, given, pair, scores, share_of, whole, wide

FINE = 0


@triton.jit
def shifted(x, high, low, other, below):
    """Weights exp(logits + both potentials); 0 where one of these is -inf. The held potential is
    the one that the step used: with it the logits are rounded as they were in that step, and the
    weights keep their sum.
    """
    out = (high == float("-inf"))[:, None] | (other == float("-inf"))[None, :]
    x = ((x + high[:, None]) + low[:, None]) + other[None, :]
    return tl.exp(tl.where(out, float("-inf"), x + below[None, :]))


@triton.jit(do_not_specialize=NUMBERS)
def weigh_kernel(
    X, C, HELD_P, SWEPT_P, ADJOINT, PART,
    rows, count, inner, blocks, splits, share, step, x_o, x_i, c_o, c_i,
    D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, HELD: tl.constexpr,
    SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    BY_ROWS: tl.constexpr,
):  # fmt: skip
    """Sum of exp(logits + both potentials) * ADJOINT of the swept side over one chunk of it."""
    pid = tl.program_id(0)
    block, split, problem = pid % blocks, (pid // blocks) % splits, pid // (blocks * splits)
    p = problem.to(tl.int64)
    at = (block * HELD + tl.arange(0, HELD)).to(tl.int64)
    mine, other = begin_of(X, C, problem, inner, x_o, x_i, c_o, c_i, BY_ROWS, D, UNIT, FORM)
    k = count * UNIT
    if BY_ROWS:  # one chunk: all columns
        own, far = rows, k
        begin, end = 0, k
    else:
        own, far = k, rows
        begin = split * share
        end = tl.minimum(begin + share, rows)
    known = at < own
    high, low = parts_of(HELD_P + 2 * p * own, at, own, known)
    side = side_of(mine, at, known, D, DIM, FORM)
    total = tl.zeros((HELD,), tl.float32)
    for w0 in tl.range(begin, end, SWEPT, num_stages=STAGES):
        w = (w0 + tl.arange(0, SWEPT)).to(tl.int64)
        live = w < end
        x = tile_of(
            mine, other, side, step, at, known, w, live, BY_ROWS, D, DIM, UNIT, FORM, PREC
        )  # fmt: skip
        beside, below = parts_of(SWEPT_P + 2 * p * far, w, far, live)
        weight = tl.load(ADJOINT + p * far + w, mask=live, other=0.0)
        total += tl.sum(shifted(x, high, low, beside, below) * weight[None, :], 1)
    tl.store(PART + (p * splits + split) * own + at, total, mask=known)


@triton.jit(do_not_specialize=NUMBERS)
def slopes_kernel(
    X, C, F, G, ADJ_F, ADJ_G, OUT,
    rows, count, inner, blocks, k, steps, first, size, strip, share, splits, step,
    x_o, x_i, c_o, c_i,
    D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, HELD: tl.constexpr,
    SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of logits, all half-steps added: HELD rows of [first, first + size) of the
    problems from the `strip`th on. F and G [2, ., P, 2, size] hold the potentials that were begun
    with and those of every step, as they are and less the logarithms of the masses, ADJ_F and ADJ_G
    [., P, size] what each is asked for; `k` is P, `share` and `splits` are how many potentials.
    """
    pid = tl.program_id(0)
    wide = tl.cdiv(count * UNIT, SWEPT)
    kinds = count * UNIT
    local = pid // (blocks * wide)
    problem = strip + local
    p = problem.to(tl.int64)
    near = ((pid // wide) % blocks) * HELD + tl.arange(0, HELD)
    at = (first + near).to(tl.int64)
    w = ((pid % wide) * SWEPT + tl.arange(0, SWEPT)).to(tl.int64)
    known, live = near < size, w < kinds
    mine, other = begin_of(X, C, problem, inner, x_o, x_i, c_o, c_i, True, D, UNIT, FORM)
    side = side_of(mine, at, known, D, DIM, FORM)
    x = tile_of(mine, other, side, step, at, known, w, live, True, D, DIM, UNIT, FORM, PREC)
    total = tl.zeros((HELD, SWEPT), tl.float32)
    for h in range(0, steps):
        if ROWS_FIRST:
            by_row, f, g = h % 2 == 0, h // 2 + 1, (h + 1) // 2
        else:
            by_row, f, g = h % 2 == 1, (h + 1) // 2, h // 2 + 1
        own_f = tl.where(by_row, share, 0) + f
        own_g = tl.where(by_row, 0, splits) + g
        f_at = F + 2 * (own_f * tl.cast(k, tl.int64) + p) * rows
        g_at = G + 2 * (own_g * tl.cast(k, tl.int64) + p) * kinds
        row, low_row = parts_of(f_at, at, rows, known)
        column, low_column = parts_of(g_at, w, kinds, live)
        out = (row == float("-inf"))[:, None] | (column == float("-inf"))[None, :]
        y = x  # what the step used comes first
        y += tl.where(by_row, 0.0, row)[:, None] + tl.where(by_row, column, 0.0)[None, :]
        y += tl.where(by_row, 0.0, low_row)[:, None] + tl.where(by_row, low_column, 0.0)[None, :]
        y += tl.where(by_row, row, 0.0)[:, None] + tl.where(by_row, 0.0, column)[None, :]
        y += tl.where(by_row, low_row, 0.0)[:, None] + tl.where(by_row, 0.0, low_column)[None, :]
        f_at = (f * tl.cast(k, tl.int64) + p) * rows + at
        g_at = (g * tl.cast(k, tl.int64) + p) * kinds + w
        adj_f = tl.load(ADJ_F + f_at, mask=known, other=0.0)
        adj_g = tl.load(ADJ_G + g_at, mask=live, other=0.0)
        weight = tl.where(by_row, adj_f, 1.0)[:, None] * tl.where(by_row, 1.0, adj_g)[None, :]
        total -= tl.exp(tl.where(out, float("-inf"), y)) * weight
    where = (local.to(tl.int64) * size + near)[:, None] * kinds + w[None, :]
    tl.store(OUT + where, total, mask=known[:, None] & live[None, :])


class Back:
    """Adjoints of a batch of problems, all [P, size] float64; those of failed ones are 0."""

    def __init__(
        self,
        solver: Solver,
        potentials: tuple[Tensor, Tensor],
        steps: list[str],
        grads: tuple[Tensor, Tensor],
        status: Tensor,
    ) -> None:
        self.solver, self.steps = solver, steps
        fine = (status.reshape(-1) == FINE)[:, None]
        fs, gs = (torch.where(fine, whole(x), -torch.inf) for x in potentials)
        n, k = solver.n, solver.k
        self.log_a = self._marginal(solver.log_row, n)
        self.log_b = self._marginal(solver.log_col, k)
        if not solver.covered:
            self.log_b = torch.where(gs[0] == -torch.inf, -torch.inf, 0.0).double()
        self.dead = (self.log_a == -torch.inf, self.log_b == -torch.inf)
        self.f, self.g = (
            torch.where(fine & ~dead, x.double().expand_as(dead), 0.0)
            for x, dead in zip(grads, self.dead, strict=True)
        )
        self.adj_f, self.adj_g = (torch.zeros_like(x, dtype=torch.float32) for x in (fs, gs))
        self.row, self.column = torch.zeros_like(self.log_a), torch.zeros_like(self.log_b)
        self.down = torch.zeros_like(self.log_b)  # column sums of the logits' gradient
        # [2, ., P, 2, size]: as the other side's step used them, and less the masses
        self.fs, self.gs = (
            torch.stack([_pairs(x), _pairs(_less(x, log_mass))])
            for x, log_mass in ((fs, self.log_a), (gs, self.log_b))
        )

    def _marginal(self, given: Tensor | None, size: int) -> Tensor:
        if given is not None:
            return given
        shape, device = (self.solver.problems, size), self.solver.device
        return torch.full(shape, -math.log(size), dtype=torch.float64, device=device)

    def walk(self) -> None:
        """Back through all half-steps."""
        f, g = self.steps.count("row"), self.steps.count("column")
        for side in reversed(self.steps):
            if side == "row":
                self.row += self.f
                self.adj_f[f] = self.f
                passed = self._weigh(False, self.gs[0, g], self.fs[1, f], self.adj_f[f])
                self.g -= passed
                self.down -= passed
                self.f = torch.zeros_like(self.f)
                f -= 1
            else:
                self.column += self.g
                self.adj_g[g] = self.g
                self.down -= self.g  # its weights sum to 1 down each column
                self.f -= self._weigh(True, self.fs[0, f], self.gs[1, g], self.adj_g[g])
                self.g = torch.zeros_like(self.g)
                g -= 1

    def _weigh(self, by_rows: bool, held: Tensor, swept: Tensor, adjoint: Tensor) -> Tensor:
        solver, e = self.solver, self.solver.entries
        chosen = e.tile("rows" if by_rows else "columns")
        size = held.shape[-1]
        blocks = triton.cdiv(size, chosen["HELD"])
        share = share_of(solver.n, solver.k)
        splits = 1 if by_rows else triton.cdiv(solver.n, share)
        part = solver.new(solver.problems, splits, size)
        step, *strides = e.strides
        _launch.launch(
            weigh_kernel, (solver.problems * blocks * splits,), solver.device, e.x, e.c,
            held, swept, adjoint, part, solver.n, solver.k // e.unit, e.inner, blocks, splits,
            share, step, *strides, **chosen, BY_ROWS=by_rows,
        )  # fmt: skip
        return part.sum(1, dtype=torch.float64)

    def slopes(self, out: Tensor, problem: int, first: int = 0) -> None:
        """Gradient of the logits into [problems, rows, K] from a problem and a row on."""
        solver, e = self.solver, self.solver.entries
        chosen = e.tile("slopes")
        problems, size = out.shape[:2]
        blocks = triton.cdiv(size, chosen["HELD"])
        step, *strides = e.strides
        _launch.launch(
            slopes_kernel, (problems * blocks * triton.cdiv(solver.k, chosen["SWEPT"]),),
            solver.device, e.x, e.c, self.fs, self.gs, self.adj_f, self.adj_g,
            out, solver.n, solver.k // e.unit, e.inner, blocks, solver.problems,
            len(self.steps), first, size, problem, self.fs.shape[1], self.gs.shape[1], step,
            *strides,
            **chosen, ROWS_FIRST=self.steps[0] == "row",
        )  # fmt: skip


def _pairs(potentials: Tensor) -> Tensor:
    """`pair` of [., P, size]."""
    return pair(potentials.flatten(0, 1)).view(*potentials.shape[:2], 2, -1)


def _less(potential: Tensor, log_mass: Tensor) -> Tensor:
    """A potential less the logarithm of its mass, -inf where either is."""
    out = (potential == -torch.inf) | (log_mass == -torch.inf)
    return torch.where(out, -torch.inf, potential - log_mass)


# ---- gradients of the operands -------------------------------------------------------------------


def _through_all(
    solver: Solver,
    n_iter: int,
    init: Tensor | None,
    prototype_first: bool,
    grads: tuple[Tensor, Tensor],
) -> Back:
    fs, gs, steps, err = solver.solve(n_iter, init, prototype_first, history=True)
    *_, status = solver.finish(fs[-1], gs[-1], err, (solver.problems,))
    back = Back(solver, (torch.stack(fs), torch.stack(gs)), steps, grads, status)
    back.walk()
    return back


def _through_pass(solver: Solver, g: Tensor, grads: tuple[Tensor, Tensor]) -> Back:
    """The masses are those that a columns' step would divide by: log_mass = g - (log 1 - lse)."""
    g = solver.biased(g)
    f, mass = solver.one_pass(pair(g))
    *_, status = solver.finish(f, mass, None, (solver.problems,))
    found = torch.where(mass == -torch.inf, mass, g - mass)
    kept = torch.stack([f, f]), torch.stack([pair(g), pair(found)])
    back = Back(solver, kept, ["row", "column"], (grads[0], -grads[1]), status)
    direct = -back.g
    back.walk()
    back.g += direct
    return back


class _Sum:
    """Gradient of a matrix operand, added up over the problems that share it."""

    def __init__(self, operand: Tensor, batch: Sequence[int]) -> None:
        self.dtype = operand.dtype
        self.total = torch.zeros(operand.shape, dtype=torch.float32, device=operand.device)
        self.view = self.total.expand(*batch, *operand.shape[-2:])

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


def _of_scores(back: Back, logits: Tensor, batch: Sequence[int]) -> Tensor:
    n, k = logits.shape[-2:]
    if logits.shape[:-2].numel() == back.solver.problems:
        stored = _launch.plain(logits).dtype
        out = back.solver.new(back.solver.problems, n, k, dtype=stored)
        back.slopes(out, 0)
        return out.view(logits.shape).to(logits.dtype)
    total, out = _Sum(logits, batch), back.solver.new(1, n, k)
    for problem, at in enumerate(itertools.product(*map(range, batch))):
        back.slopes(out, problem)
        total.view[at].add_(out[0])
    return total.result()


def _of_features(
    back: Back,
    operands: tuple[Tensor, Tensor],
    batch: Sequence[int],
    needs: Sequence[bool],
    precision: str,
) -> list[Tensor]:
    """Rows in chunks of bounded scratch, two products a chunk."""
    z, prototypes = (x.expand(*batch, *x.shape[-2:]) for x in operands)
    sums = [_Sum(x, batch) if need else None for x, need in zip(operands, needs, strict=True)]
    n, k = back.solver.n, back.solver.k
    size = max(1, min(n, _launch.SCRATCH // 4 // k))
    scratch = back.solver.new(size, k)
    exact = precision == "highest"
    with float32_products() if exact else contextlib.nullcontext():
        for problem, at in enumerate(itertools.product(*map(range, batch))):
            for first in range(0, n, size):
                part = slice(first, min(first + size, n))
                slope = scratch[: part.stop - first]
                back.slopes(slope[None], problem, first)
                # what is out of play may hold NaN, of which 0 times is NaN
                rows, columns = (out[problem][:, None] for out in back.dead)
                if sums[0] is not None:
                    c = torch.where(columns, 0.0, prototypes[at].float())
                    sums[0].view[at][part].add_(slope @ c)
                if sums[1] is not None:
                    x = torch.where(rows[part], 0.0, z[at][part].float())
                    sums[1].view[at].add_(slope.mT @ x)
    return [operands[0].new_empty(0) if s is None else s.result() for s in sums]


def _fit(found: Tensor, operand: Tensor | None, batch: Sequence[int], need: bool) -> Tensor:
    """A gradient in the shape and dtype of its operand; empty where it is not asked for."""
    if operand is None or not need:
        return found.new_empty(0)
    whole = found.view(*batch, found.shape[-1]).sum_to_size(operand.shape)
    return whole.to(operand.dtype).contiguous()


def _nothing(operands: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Of no row or no problem."""
    first = next(x for x in operands if x is not None)
    return tuple(
        first.new_empty(0) if x is None or not need else torch.zeros_like(x).contiguous()
        for x, need in zip(operands, needs, strict=True)
    )


def _upstream(grads: Sequence[Tensor], batch: Sequence[int]) -> tuple[Tensor, Tensor]:
    f, g = (wide(x, batch) for x in grads)
    assert f is not None
    assert g is not None
    return f, g


def sinkhorn_backward(
    grad_f: Tensor,
    grad_g: Tensor,
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (logits, log_row, log_col, init) through all iterations."""
    operands = (logits, log_row, log_col, init)
    batch = batch_of([(logits, 2), *given(log_row, log_col, init)])
    entries = scores(logits, batch)
    if entries.problems * entries.shape[0] == 0:
        return _nothing(operands, needs)
    a, b, start = (wide(v, batch) for v in operands[1:])
    solver = Solver(entries, a, b)
    back = _through_all(solver, n_iter, start, prototype_first, _upstream((grad_f, grad_g), batch))
    x = _of_scores(back, logits, batch) if needs[0] else logits.new_empty(0)
    found = zip((back.row, back.column, back.g), operands[1:], needs[1:], strict=True)
    return (x, *(_fit(v, o, batch, need) for v, o, need in found))


def sinkhorn_features_backward(
    grad_f: Tensor,
    grad_g: Tensor,
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, prototypes, bias, log_row, log_col, init) through all iterations."""
    operands = (z, prototypes, bias, log_row, log_col, init)
    batch = batch_of([(z, 2), (prototypes, 2), *given(bias, log_row, log_col, init)])
    entries = features(z, prototypes, batch, precision)
    if entries.problems * entries.shape[0] == 0:
        return _nothing(operands, needs)
    c, a, b, start = (wide(v, batch) for v in operands[2:])
    solver = Solver(entries, a, b, c)
    back = _through_all(solver, n_iter, start, prototype_first, _upstream((grad_f, grad_g), batch))
    matrices = _matrices(back, (z, prototypes), batch, needs, precision)
    found = zip(
        (back.down, back.row, back.column, back.g), operands[2:], needs[2:], strict=True
    )  # fmt: skip
    return (*matrices, *(_fit(v, o, batch, need) for v, o, need in found))


def _matrices(
    back: Back,
    operands: tuple[Tensor, Tensor],
    batch: Sequence[int],
    needs: Sequence[bool],
    precision: str,
) -> list[Tensor]:
    if not (needs[0] or needs[1]):
        return [x.new_empty(0) for x in operands]
    return _of_features(back, operands, batch, needs[:2], precision)


def sinkhorn_pass_backward(
    grad_f: Tensor,
    grad_log_mass: Tensor,
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (logits, g, log_row)."""
    operands = (logits, g, log_row)
    batch = batch_of([(logits, 2), *given(g, log_row)])
    entries = scores(logits, batch)
    if entries.problems * entries.shape[0] == 0:
        return _nothing(operands, needs)
    start, a = (wide(v, batch) for v in operands[1:])
    assert start is not None
    solver = Solver(entries, a, covered=False)
    back = _through_pass(solver, start, _upstream((grad_f, grad_log_mass), batch))
    x = _of_scores(back, logits, batch) if needs[0] else logits.new_empty(0)
    found = zip((back.g, back.row), operands[1:], needs[1:], strict=True)
    return (x, *(_fit(v, o, batch, need) for v, o, need in found))


def sinkhorn_features_pass_backward(
    grad_f: Tensor,
    grad_log_mass: Tensor,
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, prototypes, g, bias, log_row)."""
    operands = (z, prototypes, g, bias, log_row)
    batch = batch_of([(z, 2), (prototypes, 2), *given(g, bias, log_row)])
    entries = features(z, prototypes, batch, precision)
    if entries.problems * entries.shape[0] == 0:
        return _nothing(operands, needs)
    start, c, a = (wide(v, batch) for v in operands[2:])
    assert start is not None
    solver = Solver(entries, a, None, c, covered=False)
    back = _through_pass(solver, start, _upstream((grad_f, grad_log_mass), batch))
    matrices = _matrices(back, (z, prototypes), batch, needs, precision)
    found = zip((back.g, back.down, back.row), operands[2:], needs[2:], strict=True)
    return (*matrices, *(_fit(v, o, batch, need) for v, o, need in found))
