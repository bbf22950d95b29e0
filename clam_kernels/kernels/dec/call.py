# SPDX-License-Identifier: Apache-2.0
"""The operands of a call of deep embedded clustering as the kernels read them, and the sums of the
partial sums of row chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.operands import arrange, batch_of, by_name, in_rows
from ..common.sweep import offset
from .scores import NARROW, UNSPECIALISED

# Above this the kernels compute the limit alpha = inf, which is equal in float32.
GAUSSIAN = 1e30
# Rows of a chunk, whose sums are one partial sum, for K <= CHUNK_SIZE; more for a larger K, so that
# the partial sums of N rows are fewer than the numbers of the rows.
CHUNK, CHUNK_SIZE, LONGEST_CHUNK = 1024, 64, 8192
# Error of a product relative to the norms of its factors, and the error of a score that a mode
# allows before a distance comes from differences.
ROUNDED = {"bf16": 2.0**-9, "bf16x3": 2.0**-17, "tf32": 2.0**-11}
ALLOWED = {"highest": 2.0**-18, "high": 2.0**-10, "medium": 2.0**-5}


def why_not(z: Tensor, mu: Tensor, *rest: Any) -> str | None:
    """Why Triton cannot take these arguments, or None."""
    for x in rest[3:5]:  # z0 and mu0 of dec_losses
        if isinstance(x, Tensor) and x.dtype == torch.float64:
            return launch.why_not(x)
    return launch.why_not(z)


def kind_of(alpha: float | Tensor) -> str:
    """KIND of the kernels: "one", "inf" or "any"; a tensor is "any" whatever its value."""
    if isinstance(alpha, Tensor):
        return "any"
    return "one" if alpha == 1.0 else "inf" if alpha > GAUSSIAN else "any"


class Call:
    """The operands of one call, views [O, I, ...], and what every launch over them needs."""

    def __init__(
        self,
        z: Tensor,
        mu: Tensor,
        alpha: float | Tensor,
        precision: str,
        options: dict[str, tuple[Tensor | None, int]] | None = None,
    ) -> None:
        """`options` are further operands by name, each with its core dims."""
        named: dict[str, tuple[Tensor, int]] = {
            "X": (launch.rows(z), 2),
            "MU": (launch.rows(mu), 2),
        }
        if isinstance(alpha, Tensor):
            named["ALPHA"] = (alpha if alpha.ndim else alpha[None], 1)
        for name, (x, core) in (options or {}).items():
            if x is not None:
                is_row = name in ("Z0", "MU0")
                named[name] = (launch.rows(x) if is_row else launch.plain(x), core)
        self.batch = batch_of(list(named.values()))
        views = arrange(self.batch, list(named.values()))
        self.views = dict(zip(named, views, strict=True))
        self.device, self.precision = z.device, precision
        self.features, self.count, self.rows = z.shape[-1], mu.shape[-2], z.shape[-2]
        self.inner = views[0].shape[1]
        self.problems = views[0].shape[0] * self.inner
        self.alpha, self.kind = alpha, kind_of(alpha)
        self.wide = self.features > NARROW

    @property
    def chunk(self) -> int:
        """Rows of a chunk; it depends on K alone."""
        share = triton.next_power_of_2(triton.cdiv(self.count, CHUNK_SIZE))
        return int(min(CHUNK * share, LONGEST_CHUNK))

    @property
    def chunks(self) -> int:
        return int(triton.cdiv(self.rows, self.chunk))

    def strides(self, name: str, words: Sequence[str], rows: bool = False) -> dict[str, Any]:
        """An operand with its strides: batch strides, in rows of D if `rows`, then the others."""
        view = self.views.get(name)
        if view is None:
            return {name: None, **by_name(words, None)}
        steps = in_rows(view, self.features) if rows else view.stride()
        if not rows:  # stride 0 where one entry serves all
            steps = tuple(s * (n > 1) for s, n in zip(steps, view.shape, strict=True))
        return {name: view, **by_name(words, tuple(steps)[: len(words)])}

    def operands(self) -> dict[str, Any]:
        """Rows, centroids, degrees of freedom and sizes."""
        number = 1.0 if self.kind != "any" or isinstance(self.alpha, Tensor) else self.alpha
        return {
            **self.strides("X", ("x_o", "x_i"), rows=True),
            **self.strides("MU", ("m_o", "m_i"), rows=True),
            **self.strides("ALPHA", ("a_o", "a_i")),
            "alpha": float(number),
            "rows": self.rows,
            "count": self.count,
            "inner": self.inner,
            "D": self.features,
            "WIDE": self.wide,
            "KIND": self.kind,
            "HAS_ALPHA": "ALPHA" in self.views,
        }

    def tile(self, kernel: str) -> dict[str, Any]:
        """Tile and options of a kernel, and the bound that puts a distance in doubt. Without
        products of distances all modes are the same.
        """
        mode = self.precision if self.wide else "highest"
        d = self.features
        width = launch.WIDEST + 1 if self.wide else d  # the wide rows of the table
        chosen = dict(launch.settings(kernel, self.device, mode, width))
        chosen["PROTOS"] = min(chosen["PROTOS"], launch.dim(self.count))
        chosen.setdefault("DIM", launch.dim(d))
        if launch.INTERPRETED and self.wide:
            chosen["DIM"] = min(256, launch.dim(d))
        error = ROUNDED.get(chosen["PREC"], 0.0) + (math.sqrt(d) + 4) * 2.0**-24
        return {**chosen, "unit": error / (2 * ALLOWED[mode])}

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return launch.empty(shape, dtype, self.device)


@triton.jit
def alpha_of(ALPHA, problem, inner, a_o, a_i, alpha, HAS_ALPHA: tl.constexpr):
    """The degrees of freedom of a problem; NaN for inf in a tensor."""
    if HAS_ALPHA:
        value = tl.load(ALPHA + offset(problem, inner, a_o, a_i)).to(tl.float32)
        value = tl.where(value == float("inf"), float("nan"), value)
    else:
        value = alpha
    return value


@triton.jit(do_not_specialize=UNSPECIALISED)
def dec_merge_kernel(
    PART, OUT, BAD, width, chunks, blocks,
    COLUMNS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """OUT [problems, width] float64 takes s = sum_c PART[c], chunk after chunk, of PART [problems,
    chunks, width]. FORM "counts": PART has one more column, whose sum goes to BAD. "logs": OUT
    takes log(max(s, smallest normal float32)), and PART has one more column.
    """
    pid = tl.program_id(0)
    problem, at = pid // blocks, (pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    whole = width + 1 if FORM != "sums" else width
    total = tl.zeros((COLUMNS,), tl.float64)
    PART += problem.to(tl.int64) * chunks * whole
    for c in range(0, chunks):
        part = tl.load(PART + tl.cast(c, tl.int64) * whole + at, mask=at < whole, other=0.0)
        total += part.to(tl.float64)
    if FORM == "counts":
        tl.store(BAD + problem + at * 0, total.to(tl.int64), mask=at == width)
    if FORM == "logs":
        total = tl.where(total == total, tl.log(tl.maximum(total, 1.1754943508222875e-38)), total)
    tl.store(OUT + problem.to(tl.int64) * width + at, total, mask=at < width)


def merge(call: Call, part: Tensor, width: int, form: str, bad: Tensor | None = None) -> Tensor:
    """The sums of partial sums [problems, chunks, .], float64 [problems, width]. One launch."""
    out = call.new(call.problems, width, dtype=torch.float64)
    columns = min(128, triton.next_power_of_2(width + 1))
    blocks = triton.cdiv(width + (form != "sums"), columns)
    launch.launch(
        dec_merge_kernel, (call.problems * blocks,), call.device,
        PART=part, OUT=out, BAD=bad, width=width, chunks=call.chunks, blocks=blocks,
        COLUMNS=columns, FORM=form, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
