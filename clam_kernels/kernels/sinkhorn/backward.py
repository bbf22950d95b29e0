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
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core.backend import float32_products
from ..common import launch
from ..common.sweep import NUMBERS
from .entries import opened
from .kernels import begin_of, parts_of, scale_of, side_of, tile_of
from .potentials import less, level, pair, pairs, whole
from .solver import Solver, share_of, wide

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
    X, C, SCALE, HELD_P, SWEPT_P, ADJOINT, PART,
    rows, count, inner, blocks, splits, share, step, x_o, x_i, c_o, c_i,
    D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, HELD: tl.constexpr,
    SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr, BY_ROWS: tl.constexpr,
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
    scale = scale_of(SCALE, problem, HAS_SCALE)
    total = tl.zeros((HELD,), tl.float32)
    for w0 in tl.range(begin, end, SWEPT, num_stages=STAGES):
        w = (w0 + tl.arange(0, SWEPT)).to(tl.int64)
        live = w < end
        x = tile_of(
            mine, other, side, scale, step, at, known, w, live, BY_ROWS, D, DIM, UNIT, FORM, PREC
        )  # fmt: skip
        beside, below = parts_of(SWEPT_P + 2 * p * far, w, far, live)
        weight = tl.load(ADJOINT + p * far + w, mask=live, other=0.0)
        total += tl.sum(shifted(x, high, low, beside, below) * weight[None, :], 1)
    tl.store(PART + (p * splits + split) * own + at, total, mask=known)


@triton.jit(do_not_specialize=NUMBERS)
def slopes_kernel(
    X, C, SCALE, F, G, ADJ_F, ADJ_G, LEVEL, OUT, SLOPE,
    rows, count, inner, blocks, k, steps, first, size, strip, share, splits, step,
    x_o, x_i, c_o, c_i,
    D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, HELD: tl.constexpr,
    SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr, ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of scores, all half-steps added: HELD rows of [first, first + size) of the
    problems from the `strip`th on. F and G [2, ., P, 2, size] hold the potentials that were begun
    with and those of every step, as they are and less the logarithms of the masses, ADJ_F and ADJ_G
    [., P, size] what each is asked for; `k` is P, `share` and `splits` are how many potentials.
    SLOPE is each program's sum of its logits, less LEVEL [P, kinds], times their gradients.
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
    scale = scale_of(SCALE, problem, HAS_SCALE)
    x = tile_of(
        mine, other, side, scale, step, at, known, w, live, True, D, DIM, UNIT, FORM, PREC
    )  # fmt: skip
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
    tl.store(OUT + where, total * scale, mask=known[:, None] & live[None, :])
    # what takes no part may be NaN, and a forbidden pair is infinite: neither has a gradient
    x -= tl.load(LEVEL + p * kinds + w, mask=live, other=0.0)[None, :]
    product = tl.where(total == 0.0, 0.0, x * total)  # [HELD, SWEPT]
    # one sum of a flat tile: for sm_100 triton 3.6 does not compile a sum over axis 0 or 1 of it
    tl.store(SLOPE + pid, tl.sum(tl.reshape(product, (HELD * SWEPT,)), 0))


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
            torch.stack([pairs(x), pairs(less(x, log_mass))])
            for x, log_mass in ((fs, self.log_a), (gs, self.log_b))
        )
        self.level = level(fs[-1], gs[-1])

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
        launch.launch(
            weigh_kernel, (solver.problems * blocks * splits,), solver.device, e.x, e.c,
            e.scale_or(adjoint), held, swept, adjoint, part,
            solver.n, solver.k // e.unit, e.inner, blocks, splits, share, step, *strides,
            **chosen, BY_ROWS=by_rows,
        )  # fmt: skip
        return part.sum(1, dtype=torch.float64)

    def slopes(self, out: Tensor, problem: int, first: int = 0) -> Tensor:
        """Gradient of the scores into [problems, rows, K] from a problem and a row on; returns the
        sums of the logits, less their level, times theirs [problems] float64.
        """
        solver, e = self.solver, self.solver.entries
        chosen = e.tile("slopes")
        problems, size = out.shape[:2]
        blocks = triton.cdiv(size, chosen["HELD"])
        part = solver.new(problems, blocks * triton.cdiv(solver.k, chosen["SWEPT"]))
        step, *strides = e.strides
        launch.launch(
            slopes_kernel, (part.numel(),), solver.device, e.x, e.c, e.scale_or(self.adj_f),
            self.fs, self.gs, self.adj_f, self.adj_g, self.level, out, part,
            solver.n, solver.k // e.unit, e.inner, blocks, solver.problems,
            len(self.steps), first, size, problem, self.fs.shape[1], self.gs.shape[1], step,
            *strides,
            **chosen, ROWS_FIRST=self.steps[0] == "row",
        )  # fmt: skip
        return part.sum(1, dtype=torch.float64)


# ---- gradients of the operands -------------------------------------------------------------------


def _through_all(
    n_iter: int,
    prototype_first: bool,
    solver: Solver,
    init: Tensor | None,
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


Tensors = dict[str, Tensor]
MATRICES = ("logits", "z", "prototypes")


def _chunks(
    back: Back, batch: Sequence[int], sums: Tensor
) -> Iterator[tuple[int, tuple[int, ...], slice, Tensor]]:
    """(problem, its place in the batch, rows, gradient of their scores) of all problems in chunks
    of bounded scratch; `sums` [P] takes in the logits times their gradients.
    """
    n, k = back.solver.n, back.solver.k
    size = max(1, min(n, launch.SCRATCH // 4 // k))
    scratch = back.solver.new(size, k)
    for problem, at in enumerate(itertools.product(*map(range, batch))):
        for first in range(0, n, size):
            part = slice(first, min(first + size, n))
            slope = scratch[: part.stop - first]
            sums[problem] += back.slopes(slope[None], problem, first)[0]
            yield problem, at, part, slope


def _of_scores(
    back: Back, operands: Tensors, batch: Sequence[int], needs: set[str]
) -> tuple[Tensors, Tensor]:
    """(gradient of the logits where they need one, sums of all logits times theirs [P])."""
    (logits,) = operands.values()
    if needs and logits.shape[:-2].numel() == back.solver.problems:
        stored = launch.plain(logits).dtype
        out = back.solver.new(back.solver.problems, *logits.shape[-2:], dtype=stored)
        sums = back.slopes(out, 0)
        return {"logits": out.view(logits.shape).to(logits.dtype)}, sums
    total = _Sum(logits, batch) if needs else None
    sums = torch.zeros(back.solver.problems, dtype=torch.float64, device=logits.device)
    for _, at, part, slope in _chunks(back, batch, sums):
        if total is not None:
            total.view[at][part].add_(slope)
    return {} if total is None else {"logits": total.result()}, sums


def _of_features(
    back: Back, operands: Tensors, batch: Sequence[int], needs: set[str], exact: bool
) -> tuple[Tensors, Tensor]:
    """(gradients of features and prototypes that need one, sums of all logits times theirs [P]);
    two products a chunk.
    """
    z, prototypes = (x.expand(*batch, *x.shape[-2:]) for x in operands.values())
    totals = {name: _Sum(operands[name], batch) for name in needs}
    sums = torch.zeros(back.solver.problems, dtype=torch.float64, device=z.device)
    with float32_products() if exact else contextlib.nullcontext():
        for problem, at, part, slope in _chunks(back, batch, sums):
            # what is out of play may hold NaN, of which 0 times is NaN
            rows, columns = (out[problem][:, None] for out in back.dead)
            if "z" in totals:
                c = torch.where(columns, 0.0, prototypes[at].float())
                totals["z"].view[at][part].add_(slope @ c)
            if "prototypes" in totals:
                x = torch.where(rows[part], 0.0, z[at][part].float())
                totals["prototypes"].view[at].add_(slope.mT @ x)
    return {name: total.result() for name, total in totals.items()}, sums


def _fit(found: Tensor, operand: Tensor, batch: Sequence[int]) -> Tensor:
    """A gradient in the shape and dtype of its operand."""
    whole = found.view([*batch, *found.shape[1:]]).sum_to_size(operand.shape)
    return whole.to(operand.dtype).contiguous()


def _differentiated(
    operands: dict[str, Tensor | None],
    needs: Sequence[bool],
    precision: str,
    grads: tuple[Tensor, Tensor],
    through: Callable[..., Back],
    covered: bool = True,
) -> tuple[Tensor, ...]:
    """Gradients of the operands in their order, empty where there is none or none is needed;
    `through(solver, start, grads)` walks back. A start is named init or g.
    """
    there = {name: x for name, x in operands.items() if x is not None}
    wanted = {n for n, need in zip(operands, needs, strict=True) if need and n in there}
    matrices = {name: there[name] for name in MATRICES if name in there}
    names = ("log_row", "log_col", "bias", "init" if covered else "g")
    vectors, scale = [operands.get(name) for name in names], operands["scale"]
    entries, batch = opened([*matrices.values()], vectors, scale, precision)
    found: Tensors = {}
    if entries.problems * entries.shape[0] == 0:  # of no row or no problem
        found = {name: torch.zeros_like(there[name]).contiguous() for name in wanted}
    else:
        a, b, bias, start = (wide(v, batch) for v in vectors)
        solver = Solver(entries, a, b, bias, covered)
        back = through(solver, start, [wide(x, batch) for x in grads])
        slopes = zip(names, (back.row, back.column, back.down, back.g), strict=True)
        found = {n: _fit(v, there[n], batch) for n, v in slopes if n in wanted}
        found |= _of_entries(back, matrices, scale, batch, wanted, precision == "highest")
    first = next(iter(matrices.values()))
    return tuple(found[n] if n in found else first.new_empty(0) for n in operands)


def _of_entries(
    back: Back,
    matrices: Tensors,
    scale: Tensor | None,
    batch: Sequence[int],
    wanted: set[str],
    exact: bool,
) -> Tensors:
    """Gradients of the matrices and the scale, which need one more pass over all entries."""
    needs = wanted & matrices.keys()
    if not needs and "scale" not in wanted:
        return {}
    if len(matrices) == 1:
        found, sums = _of_scores(back, matrices, batch, needs)
    else:
        found, sums = _of_features(back, matrices, batch, needs, exact)
    used = back.solver.entries.scale
    if scale is not None and used is not None and "scale" in wanted:
        sums = sums + (back.level.double() * back.down).sum(-1)
        found["scale"] = _fit(sums / used.double(), scale, batch)
    return found


def sinkhorn_potentials_backward(
    grad_f: Tensor,
    grad_g: Tensor,
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    bias: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (logits, log_row, log_col, init, bias, scale) through all iterations."""
    operands = {
        "logits": logits, "log_row": log_row, "log_col": log_col, "init": init, "bias": bias,
        "scale": scale,
    }  # fmt: skip
    through = partial(_through_all, n_iter, prototype_first)
    return _differentiated(operands, needs, precision, (grad_f, grad_g), through)


def sinkhorn_potentials_features_backward(
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
    scale: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, prototypes, bias, log_row, log_col, init, scale) through all iterations."""
    operands = {
        "z": z, "prototypes": prototypes, "bias": bias, "log_row": log_row, "log_col": log_col,
        "init": init, "scale": scale,
    }  # fmt: skip
    through = partial(_through_all, n_iter, prototype_first)
    return _differentiated(operands, needs, precision, (grad_f, grad_g), through)


def sinkhorn_pass_backward(
    grad_f: Tensor,
    grad_log_mass: Tensor,
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (logits, g, log_row, bias, scale)."""
    operands = {"logits": logits, "g": g, "log_row": log_row, "bias": bias, "scale": scale}
    grads = (grad_f, grad_log_mass)
    return _differentiated(operands, needs, precision, grads, _through_pass, covered=False)


def sinkhorn_features_pass_backward(
    grad_f: Tensor,
    grad_log_mass: Tensor,
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of (z, prototypes, g, bias, log_row, scale)."""
    operands = {
        "z": z, "prototypes": prototypes, "g": g, "bias": bias, "log_row": log_row, "scale": scale
    }  # fmt: skip
    grads = (grad_f, grad_log_mass)
    return _differentiated(operands, needs, precision, grads, _through_pass, covered=False)
