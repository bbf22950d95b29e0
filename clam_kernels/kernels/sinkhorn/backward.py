# SPDX-License-Identifier: Apache-2.0
"""Gradients of Sinkhorn scaling on a GPU, from the last half-step to the first. Equations:
docs/ops/sinkhorn.md.

The backward computes the steps again and stores their potentials, O((N + K) T): with these every
weight of a half-step is one exponential of a logit. One pass for each half-step computes the
adjoint of the other side, and one last pass adds the gradients of all half-steps for the logits.
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
from ..common.sweep import UNSPECIALISED
from .entries import entries_of
from .kernels import FINE
from .potentials import less, level, pair, pairs, whole
from .solver import Solver, share_of, wide
from .tiles import begin_of, parts_of, scale_of, side_of, tile_of


@triton.jit
def half_step_weights(x, high, low, other, below):
    """Weights exp(logits + both potentials) [OWN, SWEPT]; 0 where a potential is -inf. (high, low)
    is the potential that the step used: with it the logits are rounded as in that step, and the sum
    of the weights is the same.
    """
    out = (high == float("-inf"))[:, None] | (other == float("-inf"))[None, :]  # [OWN, SWEPT]
    x = ((x + high[:, None]) + low[:, None]) + other[None, :]  # [OWN, SWEPT]
    return tl.exp(tl.where(out, float("-inf"), x + below[None, :]))


@triton.jit(do_not_specialize=UNSPECIALISED)
def weigh_kernel(
    X, C, SCALE, OWN_P, SWEPT_P, ADJOINT, PART,
    rows, count, inner, blocks, splits, share, step, x_o, x_i, c_o, c_i,
    D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr,
    SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr, BY_ROWS: tl.constexpr,
):  # fmt: skip
    """PART_i = sum_j exp(logits_ij + OWN_P_i + SWEPT_P_j) ADJOINT_j of OWN rows or columns i, over
    one chunk of the swept side j.
    """
    pid = tl.program_id(0)
    block, split, problem = pid % blocks, (pid // blocks) % splits, pid // (blocks * splits)
    p = problem.to(tl.int64)
    at = (block * OWN + tl.arange(0, OWN)).to(tl.int64)
    mine, other = begin_of(X, C, problem, inner, x_o, x_i, c_o, c_i, BY_ROWS, D, UNIT, FORM)
    k = count * UNIT
    if BY_ROWS:  # one chunk: all columns
        own, far = rows, k
        begin, end = 0, k
    else:
        own, far = k, rows
        begin = split * share
        end = tl.minimum(begin + share, rows)
    exists = at < own
    high, low = parts_of(OWN_P + 2 * p * own, at, own, exists)
    side = side_of(mine, at, exists, D, DIM, FORM)  # [OWN, DIM] if "narrow"
    scale = scale_of(SCALE, problem, HAS_SCALE)
    total = tl.zeros((OWN,), tl.float32)
    for w0 in tl.range(begin, end, SWEPT, num_stages=STAGES):
        w = (w0 + tl.arange(0, SWEPT)).to(tl.int64)
        valid = w < end
        x = tile_of(  # [OWN, SWEPT]
            mine, other, side, scale, step, at, exists, w, valid, BY_ROWS, D, DIM, UNIT, FORM, PREC
        )  # fmt: skip
        beside, below = parts_of(SWEPT_P + 2 * p * far, w, far, valid)
        weight = tl.load(ADJOINT + p * far + w, mask=valid, other=0.0)
        total += tl.sum(half_step_weights(x, high, low, beside, below) * weight[None, :], 1)
    tl.store(PART + (p * splits + split) * own + at, total, mask=exists)


@triton.jit(do_not_specialize=UNSPECIALISED)
def slopes_kernel(
    X, C, SCALE, F, G, ADJ_F, ADJ_G, LEVEL, OUT, SLOPE,
    rows, count, inner, blocks, problems, steps, first, size, first_problem, f_count, g_count, step,
    x_o, x_i, c_o, c_i,
    D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr,
    SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr, ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of scores: OUT_nk = -scale sum_h w_nk(h) adjoint(h), over all half-steps
    h, with the weights w of `half_step_weights` and the adjoint of the row or of the column that h
    normalised. The tile is OWN rows of [first, first + size) of the problems from `first_problem`
    on. F and G [2, ., P, 2, size] are the first potentials and those of every step, then the same
    minus the logarithms of the masses; there are `f_count` and `g_count` of them, and P is
    `problems`. ADJ_F and ADJ_G [., P, size] are their adjoints. SLOPE takes each program's sum of
    (logit - LEVEL [P, kinds]) times its gradient.
    """
    pid = tl.program_id(0)
    wide = tl.cdiv(count * UNIT, SWEPT)
    kinds = count * UNIT
    local = pid // (blocks * wide)
    problem = first_problem + local
    p = problem.to(tl.int64)
    near = ((pid // wide) % blocks) * OWN + tl.arange(0, OWN)
    at = (first + near).to(tl.int64)
    w = ((pid % wide) * SWEPT + tl.arange(0, SWEPT)).to(tl.int64)
    exists, valid = near < size, w < kinds
    mine, other = begin_of(X, C, problem, inner, x_o, x_i, c_o, c_i, True, D, UNIT, FORM)
    side = side_of(mine, at, exists, D, DIM, FORM)  # [OWN, DIM] if "narrow"
    scale = scale_of(SCALE, problem, HAS_SCALE)
    x = tile_of(  # [OWN, SWEPT]
        mine, other, side, scale, step, at, exists, w, valid, True, D, DIM, UNIT, FORM, PREC
    )  # fmt: skip
    total = tl.zeros((OWN, SWEPT), tl.float32)  # [OWN, SWEPT]
    for h in range(0, steps):
        if ROWS_FIRST:
            by_row, f, g = h % 2 == 0, h // 2 + 1, (h + 1) // 2
        else:
            by_row, f, g = h % 2 == 1, (h + 1) // 2, h // 2 + 1
        own_f = tl.where(by_row, f_count, 0) + f
        own_g = tl.where(by_row, 0, g_count) + g
        f_at = F + 2 * (own_f * tl.cast(problems, tl.int64) + p) * rows
        g_at = G + 2 * (own_g * tl.cast(problems, tl.int64) + p) * kinds
        row, low_row = parts_of(f_at, at, rows, exists)
        column, low_column = parts_of(g_at, w, kinds, valid)
        out = (row == float("-inf"))[:, None] | (column == float("-inf"))[None, :]  # [OWN, SWEPT]
        y = x  # [OWN, SWEPT]; the potential that the step used is added first
        y += tl.where(by_row, 0.0, row)[:, None] + tl.where(by_row, column, 0.0)[None, :]
        y += tl.where(by_row, 0.0, low_row)[:, None] + tl.where(by_row, low_column, 0.0)[None, :]
        y += tl.where(by_row, row, 0.0)[:, None] + tl.where(by_row, 0.0, column)[None, :]
        y += tl.where(by_row, low_row, 0.0)[:, None] + tl.where(by_row, 0.0, low_column)[None, :]
        f_at = (f * tl.cast(problems, tl.int64) + p) * rows + at
        g_at = (g * tl.cast(problems, tl.int64) + p) * kinds + w
        adj_f = tl.load(ADJ_F + f_at, mask=exists, other=0.0)
        adj_g = tl.load(ADJ_G + g_at, mask=valid, other=0.0)
        # [OWN, SWEPT]
        weight = tl.where(by_row, adj_f, 1.0)[:, None] * tl.where(by_row, 1.0, adj_g)[None, :]
        total -= tl.exp(tl.where(out, float("-inf"), y)) * weight
    where = (local.to(tl.int64) * size + near)[:, None] * kinds + w[None, :]  # [OWN, SWEPT]
    tl.store(OUT + where, total * scale, mask=exists[:, None] & valid[None, :])
    # a masked logit may be NaN, and that of a forbidden pair is -inf: both have the gradient 0
    x -= tl.load(LEVEL + p * kinds + w, mask=valid, other=0.0)[None, :]
    product = tl.where(total == 0.0, 0.0, x * total)  # [OWN, SWEPT]
    # one sum of a flat tile: for sm_100 triton 3.6 does not compile a sum over axis 0 or 1 of it
    tl.store(SLOPE + pid, tl.sum(tl.reshape(product, (OWN * SWEPT,)), 0))


class Back:
    """Adjoints of a batch of problems, all [P, size] float64; 0 for problems that failed."""

    def __init__(
        self,
        solver: Solver,
        potentials: tuple[Tensor, Tensor],
        steps: list[str],
        grads: tuple[Tensor, Tensor],
        status: Tensor,
    ) -> None:
        self.solver, self.steps = solver, steps
        fine = (status.reshape(-1) == FINE.value)[:, None]
        fs, gs = (torch.where(fine, whole(x), -torch.inf) for x in potentials)
        n, k = solver.n, solver.k
        self.log_a = self._marginal(solver.log_row, n)
        self.log_b = self._marginal(solver.log_col, k)
        if not solver.covered:
            self.log_b = torch.where(gs[0] == -torch.inf, -torch.inf, 0.0).double()
        self.masked = (self.log_a == -torch.inf, self.log_b == -torch.inf)
        self.f, self.g = (
            torch.where(fine & ~masked, x.double().expand_as(masked), 0.0)
            for x, masked in zip(grads, self.masked, strict=True)
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

    def _marginal(self, log_mass: Tensor | None, size: int) -> Tensor:
        if log_mass is not None:
            return log_mass
        shape, device = (self.solver.problems, size), self.solver.device
        return torch.full(shape, -math.log(size), dtype=torch.float64, device=device)

    def walk(self) -> None:
        """Compute the adjoints of all half-steps, from the last to the first."""
        f, g = self.steps.count("row"), self.steps.count("column")
        for side in reversed(self.steps):
            if side == "row":
                self.row += self.f
                self.adj_f[f] = self.f
                change = self._weigh(False, self.gs[0, g], self.fs[1, f], self.adj_f[f])
                self.g -= change
                self.down -= change
                self.f = torch.zeros_like(self.f)
                f -= 1
            else:
                self.column += self.g
                self.adj_g[g] = self.g
                self.down -= self.g  # its weights sum to 1 down each column
                self.f -= self._weigh(True, self.fs[0, f], self.gs[1, g], self.adj_g[g])
                self.g = torch.zeros_like(self.g)
                g -= 1

    def _weigh(self, by_rows: bool, own: Tensor, top_and_total: Tensor, adjoint: Tensor) -> Tensor:
        """The adjoint of one side times the weights of a half-step, summed for the other side."""
        solver, e = self.solver, self.solver.entries
        settings = e.tile("rows" if by_rows else "columns")
        size = own.shape[-1]
        blocks = triton.cdiv(size, settings["OWN"])
        share = share_of(solver.n, solver.k)
        splits = 1 if by_rows else triton.cdiv(solver.n, share)
        part = solver.new(solver.problems, splits, size)
        launch.launch(
            weigh_kernel, (solver.problems * blocks * splits,), solver.device, **e.arguments(),
            OWN_P=own, SWEPT_P=top_and_total, ADJOINT=adjoint, PART=part,
            blocks=blocks, splits=splits, share=share, **settings, BY_ROWS=by_rows,
        )  # fmt: skip
        return part.sum(1, dtype=torch.float64)

    def slopes(self, out: Tensor, problem: int, first: int = 0) -> Tensor:
        """Write the gradient of the scores to `out` [problems, rows, K], from a problem and a row
        on; returns the sums [problems] float64 of (logit - level) times its gradient.
        """
        solver, e = self.solver, self.solver.entries
        settings = e.tile("slopes")
        problems, size = out.shape[:2]
        blocks = triton.cdiv(size, settings["OWN"])
        part = solver.new(problems, blocks * triton.cdiv(solver.k, settings["SWEPT"]))
        launch.launch(
            slopes_kernel, (part.numel(),), solver.device, **e.arguments(),
            F=self.fs, G=self.gs, ADJ_F=self.adj_f, ADJ_G=self.adj_g, LEVEL=self.level, OUT=out,
            SLOPE=part, blocks=blocks, problems=solver.problems, steps=len(self.steps),
            first=first, size=size, first_problem=problem, f_count=self.fs.shape[1],
            g_count=self.gs.shape[1], **settings, ROWS_FIRST=self.steps[0] == "row",
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
    """Adjoints of one pass. The masses come from a columns' step: log_mass = g + lse."""
    g = solver.add_bias(g)
    f, mass = solver.one_pass(pair(g))
    *_, status = solver.finish(f, mass, None, (solver.problems,))
    after = torch.where(mass == -torch.inf, mass, g - mass)
    potentials = torch.stack([f, f]), torch.stack([pair(g), pair(after)])
    back = Back(solver, potentials, ["row", "column"], (grads[0], -grads[1]), status)
    direct = -back.g
    back.walk()
    back.g += direct
    return back


Tensors = dict[str, Tensor]
MATRICES = ("logits", "z", "prototypes")


def _chunks(
    back: Back, batch: Sequence[int], sums: Tensor
) -> Iterator[tuple[int, tuple[int, ...], slice, Tensor]]:
    """(problem, its place in the batch, rows, gradient of their scores) of all problems in chunks
    of bounded scratch; adds the sums of the logits times their gradients to `sums` [P].
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


def _zeros_of(operands: Tensors, needs: set[str]) -> Tensors:
    """Zeros for the sums of gradients of matrices."""
    # float32, and not the float64 of MemoryTotals: scores and rows may fill half of the memory
    return {
        name: torch.zeros(operands[name].shape, dtype=torch.float32, device=operands[name].device)
        for name in needs
    }


def _of_problem(total: Tensor, batch: Sequence[int], at: tuple[int, ...]) -> Tensor:
    """The part of a sum to which a problem adds; problems that share an operand share the part."""
    return total.expand(*batch, *total.shape[-2:])[at]


def _of_scores(
    back: Back, operands: Tensors, batch: Sequence[int], needs: set[str]
) -> tuple[Tensors, Tensor]:
    """(gradient of the logits if they need one, sums [P] of the logits times their gradients)."""
    (logits,) = operands.values()
    if needs and logits.shape[:-2].numel() == back.solver.problems:
        dtype = launch.plain(logits).dtype
        out = back.solver.new(back.solver.problems, *logits.shape[-2:], dtype=dtype)
        sums = back.slopes(out, 0)
        return {"logits": out.view(logits.shape).to(logits.dtype)}, sums
    totals = _zeros_of(operands, needs)
    sums = torch.zeros(back.solver.problems, dtype=torch.float64, device=logits.device)
    for _, at, part, slope in _chunks(back, batch, sums):
        for total in totals.values():
            _of_problem(total, batch, at)[part].add_(slope)
    return {name: total.to(logits.dtype) for name, total in totals.items()}, sums


def _of_features(
    back: Back, operands: Tensors, batch: Sequence[int], needs: set[str], exact: bool
) -> tuple[Tensors, Tensor]:
    """(gradients of features and prototypes that need one, sums [P] of the logits times their
    gradients); two products a chunk.
    """
    z, prototypes = (x.expand(*batch, *x.shape[-2:]) for x in operands.values())
    totals = _zeros_of(operands, needs)
    sums = torch.zeros(back.solver.problems, dtype=torch.float64, device=z.device)
    with float32_products() if exact else contextlib.nullcontext():
        for problem, at, part, slope in _chunks(back, batch, sums):
            # masked rows may hold NaN, and 0 * NaN is NaN: set them to 0 first
            rows, columns = (out[problem][:, None] for out in back.masked)
            if "z" in totals:
                c = torch.where(columns, 0.0, prototypes[at].float())
                _of_problem(totals["z"], batch, at)[part].add_(slope @ c)
            if "prototypes" in totals:
                x = torch.where(rows[part], 0.0, z[at][part].float())
                _of_problem(totals["prototypes"], batch, at).add_(slope.mT @ x)
    return {name: total.to(operands[name].dtype) for name, total in totals.items()}, sums


def _fit(gradient: Tensor, operand: Tensor, batch: Sequence[int]) -> Tensor:
    """A gradient in the shape and dtype of its operand."""
    whole = gradient.view([*batch, *gradient.shape[1:]]).sum_to_size(operand.shape)
    return whole.to(operand.dtype).contiguous()


def _gradients(
    operands: dict[str, Tensor | None],
    needs: Sequence[bool],
    precision: str,
    grads: tuple[Tensor, Tensor],
    through: Callable[..., Back],
    covered: bool = True,
) -> tuple[Tensor, ...]:
    """Gradients of the operands in their order, empty for operands that are None or need none;
    `through(solver, start, grads)` computes the adjoints. The start is the operand init or g.
    """
    there = {name: x for name, x in operands.items() if x is not None}
    targets = {n for n, need in zip(operands, needs, strict=True) if need and n in there}
    matrices = {name: there[name] for name in MATRICES if name in there}
    names = ("log_row", "log_col", "bias", "init" if covered else "g")
    vectors, scale = [operands.get(name) for name in names], operands["scale"]
    entries, batch = entries_of([*matrices.values()], vectors, scale, precision)
    gradients: Tensors = {}
    if entries.problems * entries.shape[0] == 0:  # no rows or no problems
        gradients = {name: torch.zeros_like(there[name]).contiguous() for name in targets}
    else:
        a, b, bias, start = (wide(v, batch) for v in vectors)
        solver = Solver(entries, a, b, bias, covered)
        back = through(solver, start, [wide(x, batch) for x in grads])
        slopes = zip(names, (back.row, back.column, back.down, back.g), strict=True)
        gradients = {n: _fit(v, there[n], batch) for n, v in slopes if n in targets}
        gradients |= _of_entries(back, matrices, scale, batch, targets, precision == "highest")
    first = next(iter(matrices.values()))
    return tuple(gradients[n] if n in gradients else first.new_empty(0) for n in operands)


def _of_entries(
    back: Back,
    matrices: Tensors,
    scale: Tensor | None,
    batch: Sequence[int],
    targets: set[str],
    exact: bool,
) -> Tensors:
    """Gradients of the matrices and of the scale: one more pass over all entries."""
    needs = targets & matrices.keys()
    if not needs and "scale" not in targets:
        return {}
    if len(matrices) == 1:
        gradients, sums = _of_scores(back, matrices, batch, needs)
    else:
        gradients, sums = _of_features(back, matrices, batch, needs, exact)
    scales = back.solver.entries.scale
    if scale is not None and scales is not None and "scale" in targets:
        sums = sums + (back.level.double() * back.down).sum(-1)
        gradients["scale"] = _fit(sums / scales.double(), scale, batch)
    return gradients


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
    return _gradients(operands, needs, precision, (grad_f, grad_g), through)


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
    return _gradients(operands, needs, precision, (grad_f, grad_g), through)


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
    return _gradients(operands, needs, precision, grads, _through_pass, covered=False)


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
    return _gradients(operands, needs, precision, grads, _through_pass, covered=False)
