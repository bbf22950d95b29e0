# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling on a GPU: a fixed number of steps, without a wait for the host. Equations:
docs/ops/sinkhorn.md.

Where a row of scores fits in registers, one launch reads the scores once, for the step of the rows
and for the masses of the columns. Otherwise, and for features, each side has a sweep of its own.
`sinkhorn/backward.py` has the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import launch
from .entries import Entries, entries_of
from .kernels import (
    EMPTY,
    columns_kernel,
    finish_kernel,
    merge_kernel,
    pass_kernel,
    rescue_kernel,
    rows_kernel,
)
from .potentials import pair, whole

# The most columns of a row in registers, entries of a tile of such rows, and rows of a tile.
MOST, TILE, MOST_ROWS = 4096, 8192, 256
# Chunks of rows: functions of N and K alone, so that sums are in one order on every GPU.
CHUNKS, LEAST_ROWS = 2048, 512 if launch.INTERPRETED else 16
COLUMN_PROGRAMS, COLUMNS, SWEPT_ROWS = 2112, 128, 512 if launch.INTERPRETED else 64
# Columns of a program of `merge_kernel` and `rescue_kernel`, rows of a tile of the latter, and
# entries of a program of `finish_kernel`.
MERGED, RESCUED_ROWS, FINISHED = 64, 64, 1024


def sides(n_iter: int, prototype_first: bool, has_init: bool) -> list[str]:
    """The half-steps in order, each named for the side whose masses it makes exact."""
    if n_iter == 0:
        return ["row"]
    steps = (["column", "row"] if prototype_first else ["row", "column"]) * n_iter
    return ["row", *steps] if prototype_first and has_init else steps


def pass_tile(device: torch.device, k: int, rows: int) -> dict[str, Any]:
    """Tile and options of the pass over whole rows."""
    name = f"{launch.arch_of(device)}/any/{launch.dim(k)}"
    tile = dict(launch.table()["sinkhorn_pass"][name])
    return tile | ({"ROWS": min(512, launch.dim(rows))} if launch.INTERPRETED else {})


def wide(vector: Tensor | None, batch: Sequence[int]) -> Tensor | None:
    """A vector expanded to every problem, [P, size] float64."""
    if vector is None:
        return None
    size = vector.shape[-1]
    whole = vector.to(torch.float64).expand(*batch, size)
    return whole.reshape(torch.Size(batch).numel(), size).contiguous()


def chunk_of(n: int, k: int) -> int:
    """Rows of a program of `pass_kernel`: a multiple of its tile."""
    rows = tile_rows(k)
    return triton.cdiv(max(LEAST_ROWS, triton.cdiv(n, CHUNKS)), rows) * rows


def tile_rows(k: int) -> int:
    """The most rows of a tile of whole rows."""
    return min(MOST_ROWS, max(1, TILE // launch.dim(k)))


def share_of(n: int, k: int) -> int:
    """Rows of a program that owns columns: a multiple of SWEPT_ROWS."""
    splits = max(1, COLUMN_PROGRAMS // triton.cdiv(k, COLUMNS))
    return triton.cdiv(triton.cdiv(n, splits), SWEPT_ROWS) * SWEPT_ROWS


class Solver:
    """The steps of a batch of problems. It keeps all potentials if there is a history, else the
    latest. Inside, a bias of columns is a part of the potentials.
    """

    def __init__(
        self,
        entries: Entries,
        log_row: Tensor | None = None,
        log_col: Tensor | None = None,
        bias: Tensor | None = None,
        covered: bool = True,
    ) -> None:
        self.entries, self.covered = entries, covered
        self.log_row, self.log_col, self.bias = log_row, log_col, bias
        self.n, self.k = entries.shape
        self.device, self.problems = entries.x.device, entries.problems
        self.fused = entries.form == "scores" and self.k <= MOST
        self.heaviest = log_row.amax(-1) if log_row is not None and self.fused else None
        self.blocks = triton.cdiv(self.k, MERGED)
        self.word = self.new(self.problems, self.blocks, dtype=torch.int32)
        self.err = self.new(self.problems, self.blocks, dtype=torch.float64)
        self.mass = self.new(self.problems, self.k, dtype=torch.float64)
        self.merges, self.keeps = 0, False
        self.need: Tensor | None = None
        self.row_word: Tensor | None = None
        self.parts: tuple[Tensor | None, Tensor, int] | None = None

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return launch.empty(shape, dtype, self.device)

    def _launch(self, kernel: Any, programs: int, **arguments: Any) -> None:
        launch.launch(kernel, (self.problems * programs,), self.device, **arguments)

    # ---- steps ---------------------------------------------------------------------------------

    def rows(self, g: Tensor, f: Tensor) -> None:
        """Write f from g; where one launch computes both, also the masses of the columns."""
        if self.fused:
            self._pass(g, f)
        else:
            self.row_word = self.exact_rows(g, f)
            self.parts = None

    def exact_rows(self, g: Tensor, f: Tensor) -> Tensor:
        """The step of the rows alone; returns the flags of its programs."""
        e = self.entries
        settings = e.tile("rows")
        blocks = triton.cdiv(self.n, settings["OWN"])
        word = self.new(self.problems, blocks, dtype=torch.int32)
        self._launch(
            rows_kernel, blocks, **e.arguments(), G=g, LOG_ROW=self.log_row, F=f, WORD=word,
            blocks=blocks, **settings, HAS_ROW=self.log_row is not None,
        )  # fmt: skip
        return word

    def _pass(self, g: Tensor, f: Tensor) -> None:
        e = self.entries
        share = chunk_of(self.n, self.k)
        splits = triton.cdiv(self.n, share)
        part = self.new(self.problems, splits, self.k)
        self.row_word = self.new(self.problems, splits, dtype=torch.int32)
        settings = pass_tile(self.device, self.k, min(share, self.n))
        top, total = (self.new(self.problems, self.n) for _ in range(2))
        self._launch(
            pass_kernel, splits, **e.scores(), G=g, LOG_ROW=self.log_row, HEAVIEST=self.heaviest,
            F=f, TOP=top, TOTAL=total, PART=part, WORD=self.row_word, splits=splits, share=share,
            COLUMNS=launch.dim(self.k), HAS_ROW=self.log_row is not None, **settings,
        )  # fmt: skip
        self.parts = (None, part, splits)

    def sweep_columns(self, f: Tensor | None) -> None:
        """Partial sums of the columns at f; None: at f = 0."""
        e = self.entries
        settings = e.tile("columns")
        blocks = triton.cdiv(self.k, settings["OWN"])
        share = share_of(self.n, self.k)
        splits = triton.cdiv(self.n, share)
        top, total = (self.new(self.problems, splits, self.k) for _ in range(2))
        self._launch(
            columns_kernel, blocks * splits, **e.arguments(), F=f, TOP=top, SUM=total,
            blocks=blocks, splits=splits, share=share, **settings, STARTED=f is not None,
        )  # fmt: skip
        self.parts = (top, total, splits)

    def merge(self, g: Tensor | None, f: Tensor | None, out: Tensor) -> None:
        """The step of the columns into `out`; after a step of the rows at g also the masses of the
        columns and the error.
        """
        fused = self.fused and self.parts is not None and g is not None
        if self.parts is None:
            self.sweep_columns(f)
        assert self.parts is not None
        top, total, splits = self.parts
        need = self.new(self.problems, self.k, dtype=torch.int32) if fused else None
        used, words = g is not None, self.row_word
        self._launch(
            merge_kernel, self.blocks, TOP=top, SUM=total, G=g, LOG_COL=self.log_col,
            BIAS=self.bias, HEAVIEST=self.heaviest, OUT=out,
            MASS=self.mass if used else None, ERR=self.err if used else None, NEED=need,
            WORD=self.word, ROW_WORD=words if used else None, rows=self.n, count=self.k,
            blocks=self.blocks, splits=splits,
            strip=words.shape[1] if used and words is not None else None,
            first=int(self.merges == 0), COLUMNS=MERGED, FUSED=fused, USED=used,
            HAS_ROW=self.heaviest is not None, HAS_COL=self.log_col is not None,
            HAS_BIAS=self.bias is not None, COVERED=self.covered, num_warps=4, num_stages=1,
        )  # fmt: skip
        self.merges += 1
        self.need = need
        self.row_word = self.parts = None

    def rescue(self, g: Tensor, f: Tensor, out: Tensor) -> None:
        """The step of the columns whose masses in the last merge were too small."""
        if self.need is None:
            return
        e = self.entries
        self._launch(
            rescue_kernel, self.blocks, **e.scores(), F=f, G=g, LOG_COL=self.log_col,
            NEED=self.need, OUT=out, MASS=self.mass, WORD=self.word, blocks=self.blocks,
            COLUMNS=MERGED, SWEPT=RESCUED_ROWS, HAS_COL=self.log_col is not None,
            COVERED=self.covered, num_warps=4, num_stages=1,
        )  # fmt: skip

    # ---- all of them ---------------------------------------------------------------------------

    def start(self, init: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The first (f, g); None where it is 0 everywhere and nothing is masked."""
        f, g = None, init
        if self.bias is not None:
            g = self.bias if g is None else self.add_bias(g)
        if self.log_row is not None:
            f = torch.where(self.log_row == -torch.inf, self.log_row, 0.0)
        if self.log_col is not None:
            g = torch.zeros_like(self.log_col) if g is None else g
            g = torch.where(self.log_col == -torch.inf, self.log_col, g)
        return None if f is None else pair(f), None if g is None else pair(g)

    def add_bias(self, g: Tensor) -> Tensor:
        """G + bias, -inf where g is."""
        return g if self.bias is None else torch.where(g == -torch.inf, g, g + self.bias)

    def solve(
        self, n_iter: int, init: Tensor | None, prototype_first: bool, history: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[str], Tensor]:
        """(every f, every g, the half-steps, partial errors). Without a history only the last two f
        and g are valid: the others share their memory.
        """
        self.keeps = history
        # after an exact step of the columns, with equal masses, no mass falls below 1 / (N K)
        sound = prototype_first and init is None and self.log_row is None and self.log_col is None
        steps = sides(n_iter, prototype_first, init is not None)
        f, g = self.start(init)
        fs = self._buffers(f, steps.count("row"), self.n, history)
        gs = self._buffers(g, steps.count("column"), self.k, history or steps[0] == "row")
        at = {"row": 0, "column": 0}
        for side in steps:
            before = gs[at["column"]]
            at[side] += 1
            if side == "row":
                self.rows(before, fs[at["row"]])
            elif at["row"] == 0:
                self.merge(None, f, gs[1])
            else:
                self.merge(before, fs[at["row"]], gs[at["column"]])
                if not sound:
                    self.rescue(before, fs[at["row"]], gs[at["column"]])
        if steps[-1] == "column":
            return fs, gs, steps, self._row_error(fs[-1], gs[-1])
        spare = self.new(self.problems, 2, self.k)
        self.merge(gs[-1], fs[-1], spare)
        if len(steps) == 1:  # no step of the columns has checked for columns without a finite logit
            self.rescue(gs[-1], fs[-1], spare)
        return fs, gs, steps, self.err

    def _buffers(self, first: Tensor | None, count: int, size: int, filled: bool) -> list[Tensor]:
        """The first potential, zeros if it is None but must be `filled`, and one for each step: two
        buffers in turn unless there is a history.
        """
        kinds = count if self.keeps else min(count, 2)
        buffers = [self.new(self.problems, 2, size) for _ in range(kinds)]
        if first is None and filled:
            shape = self.problems, 2, size
            first = torch.zeros(shape, dtype=torch.float32, device=self.device)
        return [self.mass if first is None else first, *(buffers[i % kinds] for i in range(count))]

    def one_pass(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """(f, logarithm of the masses of the columns) after the rows' step at g."""
        f, out = (self.new(self.problems, 2, size) for size in (self.n, self.k))
        self.rows(g, f)
        self.merge(g, f, out)
        self.rescue(g, f, out)
        return f, self.mass

    def _row_error(self, f: Tensor, g: Tensor) -> Tensor:
        """L1 error of the rows after a columns' step."""
        exact = self.new(self.problems, 2, self.n)
        self.exact_rows(g, exact)
        high = f[:, 0]  # the op returns f in float32, with fewer digits where it is large
        out = high == -torch.inf
        mass = torch.where(out, 0.0, torch.expm1(high.double() - whole(exact)).abs())
        weight = 1.0 / self.n if self.log_row is None else self.log_row.exp()
        return (mass * weight).sum(-1, keepdim=True)

    def finish(
        self, f: Tensor, g: Tensor, err: Tensor | None, batch: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(f, g, err, status) as the op returns them."""
        outs = (self.new(*batch, self.n), self.new(*batch, self.k), self.new(*batch))
        status = self.new(*batch, dtype=torch.int64)
        blocks = triton.cdiv(max(self.n, self.k), FINISHED)
        out_f, out_g, out_err = outs
        has_bias = self.bias is not None and err is not None
        self._launch(
            finish_kernel, blocks, F=f, G=g, BIAS=self.bias if has_bias else None, ERR=err,
            WORD=self.word, OUT_F=out_f, OUT_G=out_g, OUT_ERR=None if err is None else out_err,
            STATUS=status, rows=self.n, count=self.k, blocks=blocks,
            splits=None if err is None else err.shape[1], strip=self.blocks,
            SIZE=FINISHED, MASSES=err is None, HAS_BIAS=has_bias, num_warps=4, num_stages=1,
        )  # fmt: skip
        return (*outs, status)


# ---- the ops -------------------------------------------------------------------------------------


def _potentials(
    matrices: Sequence[Tensor],
    vectors: tuple[Tensor | None, ...],
    n_iter: int,
    prototype_first: bool,
    scale: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vectors` are bias, log_row, log_col and a start."""
    entries, batch = entries_of(matrices, vectors, scale, mode)
    bias, log_row, log_col, init = (wide(v, batch) for v in vectors)
    if entries.shape[0] == 0 or entries.problems == 0:
        return empty(entries, batch)
    solver = Solver(entries, log_row, log_col, bias)
    fs, gs, _, err = solver.solve(n_iter, init, prototype_first)
    return solver.finish(fs[-1], gs[-1], err, batch)


def empty(entries: Entries, batch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of a call without rows or without problems."""
    like: dict[str, Any] = {"dtype": torch.float32, "device": entries.x.device}
    (n, k), batch = entries.shape, tuple(batch)
    status = torch.full(batch, EMPTY.value, dtype=torch.int64, device=entries.x.device)
    return (
        torch.zeros(*batch, n, **like), torch.zeros(*batch, k, **like),
        torch.zeros(batch, **like), status,
    )  # fmt: skip


def _one_pass(
    matrices: Sequence[Tensor], vectors: tuple[Tensor | None, ...], scale: Tensor | None, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`vectors` are bias, log_row and g."""
    entries, batch = entries_of(matrices, vectors, scale, mode)
    bias, log_row, g = (wide(v, batch) for v in vectors)
    assert g is not None
    if entries.shape[0] == 0 or entries.problems == 0:
        f, log_mass, _, status = empty(entries, batch)
        return f, log_mass.fill_(-torch.inf), status
    solver = Solver(entries, log_row, None, bias, covered=False)
    f, log_mass = solver.one_pass(pair(solver.add_bias(g)))
    f, log_mass, _, status = solver.finish(f, log_mass, None, batch)
    return f, log_mass, status


def sinkhorn_potentials(
    logits: Tensor,
    n_iter: int,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    bias: Tensor | None,
    scale: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, g, err and status: two launches for a pair of half-steps, and a third that usually ends at
    once.
    """
    vectors = (bias, log_row, log_col, init)
    return _potentials((logits,), vectors, n_iter, prototype_first, scale, precision)


def sinkhorn_potentials_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: int,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    scale: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sinkhorn_potentials`; every pass computes the logits from the features again."""
    vectors = (bias, log_row, log_col, init)
    return _potentials((z, prototypes), vectors, n_iter, prototype_first, scale, precision)


def sinkhorn_pass(
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """f, the logarithms of the masses of the columns, and status."""
    return _one_pass((logits,), (bias, log_row, g), scale, precision)


def sinkhorn_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    scale: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sinkhorn_pass`; the pass computes the logits from the features."""
    return _one_pass((z, prototypes), (bias, log_row, g), scale, precision)
