# SPDX-License-Identifier: Apache-2.0
"""The scores of a batch of transport problems as the kernels read them: stored, or features whose
products every tile computes anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import launch
from ..common.operands import arrange, batch_of, in_rows


class Entries(NamedTuple):
    """The scores of a batch as the kernels read them: views [O, I, N, K] of those in memory, or of
    features [O, I, N, D] and prototypes [O, I, K, D]; with `scale` [P] float32 they are logits.
    """

    x: Tensor
    c: Tensor
    scale: Tensor | None
    form: str
    unit: int
    shape: tuple[int, int]
    mode: str

    @property
    def problems(self) -> int:
        return int(self.x.shape[0] * self.x.shape[1])

    @property
    def inner(self) -> int:
        return int(self.x.shape[1])

    @property
    def strides(self) -> tuple[int, ...]:
        """(of a row, of the batch of x and of c), in UNITs or in rows."""
        if self.form == "scores":
            o, i, step = (s // self.unit for s in self.x.stride()[:3])
            return step, o, i, 0, 0
        d = self.x.shape[-1]
        return (0, *in_rows(self.x, d), *in_rows(self.c, d))

    def tile(self, side: str) -> dict[str, Any]:
        """Tile and options of a kernel that holds rows or columns."""
        found = tile_of(self.form, self.mode, side, self.x.device, self.x.shape[-1], self.x.dtype)
        if launch.INTERPRETED:  # its cost is by the operation, unless tiles are far too large
            n, k = (min(512, launch.dim(size)) for size in self.shape)
            found |= {"HELD": k, "SWEPT": n} if side == "columns" else {"HELD": n, "SWEPT": k}
        return found | {"UNIT": self.unit, "HAS_SCALE": self.scale is not None}

    def scale_or(self, other: Tensor) -> Tensor:
        """The scale, or what a kernel takes in its place and does not read."""
        return other if self.scale is None else self.scale


def tile_of(
    form: str, mode: str, side: str, device: torch.device, d: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Row of the table, with the names that these kernels have."""
    if form == "scores":
        found = dict(launch.table()["sinkhorn_scores"][f"{launch.arch_of(device)}/any/{side}"])
        found |= {"D": 1, "DIM": 16, "FORM": form, "PREC": "ieee"}
    else:
        # products of bfloat16 are exact in its own units: every mode may use them
        lowered = dtype == torch.bfloat16 and not launch.INTERPRETED
        kernel = "sinkhorn_slopes" if side == "slopes" else "sinkhorn"
        found = launch.settings(kernel, device, "medium" if lowered else mode, d)
        found["FORM"] = "wide" if "DIM" in found else "held"
        found = {"D": d, "DIM": launch.dim(d), **found}
    found.setdefault("STAGES", found["num_stages"])
    found["HELD"], found["SWEPT"] = found.pop("ROWS"), found.pop("PROTOS")
    return found


def opened(
    matrices: Sequence[Tensor], vectors: Sequence[Tensor | None], scale: Tensor | None, mode: str
) -> tuple[Entries, tuple[int, ...]]:
    """(entries, batch) of a call; `matrices` are logits, or features and prototypes."""
    known = [(v, 1) for v in vectors if v is not None]
    batch = batch_of(
        [*((x, 2) for x in matrices), *known, *([] if scale is None else [(scale, 0)])]
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
    """Rows of any stride; entries of a row side by side."""
    n, k = logits.shape[-2:]
    x = launch.plain(logits)
    if x.stride(-1) != 1 and k > 1:
        x = x.contiguous()
    (x,) = arrange(batch, [(launch.aligned(x), 2)])
    steps = (k, *x.stride()[:3])
    unit = next(u for u in (8, 4, 2, 1) if all(s % u == 0 for s in steps))
    return Entries(x, x, scales, "scores", unit, (n, k), "any")
