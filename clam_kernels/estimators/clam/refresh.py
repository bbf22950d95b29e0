# SPDX-License-Identifier: Apache-2.0
"""The frame of a stream after rows that the first batch did not foresee.

The first batch may be constant, wholly or in a column. The deviations of the columns are measured
again on the sample of all rows, and the frame takes them over where they differ much.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..common.frame import Frame
from ..common.rows import in_memory
from ..common.scale import rescaled, scaled
from .columns import frame_of
from .sample import Sample

# A column has another deviation where that of the sample differs by more than this factor.
OTHER = 2.0


def refreshed(
    standardize: str | bool, frame: Frame, sample: Sample, z: Tensor, weight: Tensor | None
) -> Frame:
    """The frame with the deviations of the sample and of a batch z [N, D], both states of the
    frame; the frame itself where they differ little. Its centre and its range stay.
    """
    rows, share = sample.table(z, weight)
    rows, share = _with_still_columns(frame, rows, share)
    rows = rows * frame.width
    known = in_memory(rows)
    known.top = float(rows.abs().nan_to_num(0.0).max())
    found = frame_of(known, share, None, standardize)
    width = scaled(found.width, found.range)
    before, after = frame.deviation * frame.width, found.deviation * width
    other = (after > OTHER * before) | (OTHER * after < before)
    if not bool(other.any()) and found.standard == frame.standard:
        return frame
    unit = frame.range + found.unit
    return dataclasses.replace(
        frame,
        width=width,
        unit=unit,
        one=found.one if found.standard else rescaled(1.0, -unit),
        deviation=found.deviation,
        standard=found.standard,
        contrast=found.contrast,
    )


def _with_still_columns(frame: Frame, rows: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, and two more: a column that varied before and has one value here, or none, keeps
    the deviation that it has in the frame.
    """
    counts = ~rows.isnan() & (share > 0)[:, None]
    low = torch.where(counts, rows, torch.inf).amin(0)
    high = torch.where(counts, rows, -torch.inf).amax(0)
    deviation = frame.deviation
    still = (low > high) | ((low == high) & (deviation > 0))
    if not bool(still.any()):
        return rows, share
    pair = torch.stack([-deviation, deviation]).masked_fill(~still, torch.nan)
    rows = torch.cat([rows.masked_fill(still, torch.nan), pair])
    return rows, torch.cat([share, share.new_ones(2)])


def size_in(frame: Frame, factor: Tensor | float = 1.0) -> float:
    """Root mean square of the deviations, in the frame or with every column divided by a factor."""
    return float((frame.deviation / factor).square().mean().sqrt())
