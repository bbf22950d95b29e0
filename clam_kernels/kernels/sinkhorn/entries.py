# SPDX-License-Identifier: Apache-2.0
"""The scores of a batch of transport problems as the kernels read them: scores in memory, or
features whose products every tile computes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import launch
from ..common.operands import arrange, batch_of, by_name, in_rows


class Entries(NamedTuple):
    """The scores of a batch: a view [O, I, N, K] of them, or views of features [O, I, N, D] and
    prototypes [O, I, K, D]. The logits are the scores times `scale` [P] float32.
    """

    x: Tensor
    c: Tensor | None
    scale: Tensor | None
    form: str  # "scores" or "features"
    unit: int  # columns and strides of scores are multiples of it
    shape: tuple[int, int]  # N, K
    mode: str

    @property
    def problems(self) -> int:
        return int(self.x.shape[0] * self.x.shape[1])

    @property
    def inner(self) -> int:
        return int(self.x.shape[1])

    def scores(self) -> dict[str, Any]:
        """Arguments of a kernel that reads scores alone; strides in UNITs."""
        x_o, x_i, step = (s // self.unit for s in self.x.stride()[:3])
        return {"X": self.x, "x_o": x_o, "x_i": x_i, "step": step, **self._common()}

    def arguments(self) -> dict[str, Any]:
        """Arguments of a kernel that reads scores or features. Batch strides of features are in
        rows.
        """
        names = ("c_o", "c_i")
        if self.c is None:
            return {**self.scores(), "C": None, **by_name(names, None)}
        d = self.x.shape[-1]
        return {
            "X": self.x, **by_name(("x_o", "x_i"), in_rows(self.x, d)), "step": None,
            "C": self.c, **by_name(names, in_rows(self.c, d)), **self._common(),
        }  # fmt: skip

    def _common(self) -> dict[str, Any]:
        return {
            "SCALE": self.scale, "HAS_SCALE": self.scale is not None, "UNIT": self.unit,
            "rows": self.shape[0], "count": self.shape[1] // self.unit, "inner": self.inner,
        }  # fmt: skip

    def tile(self, side: str) -> dict[str, Any]:
        """Tile and options of a kernel whose programs own `side`: rows, columns or slopes."""
        tile = tile_of(self.form, self.mode, side, self.x.device, self.x.shape[-1], self.x.dtype)
        if launch.INTERPRETED:  # it pays for each operation, unless tiles are far too large
            n, k = (min(512, launch.dim(size)) for size in self.shape)
            tile |= {"OWN": k, "SWEPT": n} if side == "columns" else {"OWN": n, "SWEPT": k}
        return tile


def tile_of(
    form: str, mode: str, side: str, device: torch.device, d: int, dtype: torch.dtype
) -> dict[str, Any]:
    """A row of the table, with the names of the constants of these kernels."""
    if form == "scores":
        tile = dict(launch.table()["sinkhorn_scores"][f"{launch.arch_of(device)}/any/{side}"])
        tile |= {"D": 1, "DIM": 16, "FORM": form, "PREC": "ieee"}
    else:
        # matrix units multiply bfloat16 without an error: every mode may use "medium" for it
        lowered = dtype == torch.bfloat16 and not launch.INTERPRETED
        kernel = "sinkhorn_slopes" if side == "slopes" else "sinkhorn"
        tile = dict(launch.settings(kernel, device, "medium" if lowered else mode, d))
        tile["FORM"] = "wide" if "DIM" in tile else "narrow"
        tile = {"D": d, "DIM": launch.dim(d), **tile}
    tile.setdefault("STAGES", tile["num_stages"])
    tile["OWN"], tile["SWEPT"] = tile.pop("ROWS"), tile.pop("PROTOS")
    return tile


def entries_of(
    matrices: Sequence[Tensor], vectors: Sequence[Tensor | None], scale: Tensor | None, mode: str
) -> tuple[Entries, tuple[int, ...]]:
    """(entries, batch) of a call; `matrices` are logits, or features and prototypes."""
    others = [(v, 1) for v in vectors if v is not None]
    batch = batch_of(
        [*((x, 2) for x in matrices), *others, *([] if scale is None else [(scale, 0)])]
    )
    scales = None
    if scale is not None:
        scales = scale.float().expand([*batch]).reshape(-1).contiguous()
    if len(matrices) == 1:
        return _scores(matrices[0], scales, batch), batch
    x, c = arrange(batch, [(launch.rows(x), 2) for x in matrices])
    shape = (x.shape[-2], c.shape[-2])
    return Entries(x, c, scales, "features", 1, shape, mode), batch


def _scores(logits: Tensor, scales: Tensor | None, batch: Sequence[int]) -> Entries:
    """The entries of stored logits: rows of any stride, the entries of a row side by side."""
    n, k = logits.shape[-2:]
    x = launch.plain(logits)
    if x.stride(-1) != 1 and k > 1:
        x = x.contiguous()
    (x,) = arrange(batch, [(launch.align(x), 2)])
    steps = (k, *x.stride()[:3])
    unit = next(u for u in (8, 4, 2, 1) if all(s % u == 0 for s in steps))
    return Entries(x, None, scales, "scores", unit, (n, k), "any")
