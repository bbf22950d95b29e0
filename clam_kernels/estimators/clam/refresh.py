# SPDX-License-Identifier: Apache-2.0
"""The frame of a stream whose later rows differ from its first batch.

The first batch may be constant, wholly or in a column. The deviations of the columns are computed
again from the sample of all rows; the frame takes them where they differ much from its own.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..common.columns import frame_of
from ..common.frame import Frame
from ..common.rows import in_memory
from ..common.scale import scale_number, scale_tensor
from .sample import StreamSample

# A column has another deviation where the sample's differs by more than this factor.
DEVIATION_RATIO = 2.0


def refresh_frame(
    standardize: str | bool, frame: Frame, sample: StreamSample, z: Tensor, weight: Tensor | None
) -> Frame:
    """The frame with the deviations of the sample and of a batch z [N, D], both states of the
    frame; the frame itself where they differ little. Its centre and its range do not change.
    """
    rows, weights = sample.table(z, weight)
    rows, weights = _with_constant_columns(frame, rows, weights)
    rows = rows * frame.width
    table = in_memory(rows)
    table.top = float(rows.abs().nan_to_num(0.0).max())
    fresh = frame_of(table, weights, None, standardize)
    width = scale_tensor(fresh.width, fresh.range)
    before, after = frame.deviation * frame.width, fresh.deviation * width
    differs = (after > DEVIATION_RATIO * before) | (DEVIATION_RATIO * after < before)
    if not bool(differs.any()) and fresh.is_standard == frame.is_standard:
        return frame
    unit = frame.range + fresh.unit
    return dataclasses.replace(
        frame,
        width=width,
        unit=unit,
        one=fresh.one if fresh.is_standard else scale_number(1.0, -unit),
        deviation=fresh.deviation,
        is_standard=fresh.is_standard,
        contrast=fresh.contrast,
    )


def _with_constant_columns(frame: Frame, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, weights) with two more rows: a column that varied before, and has one value or none
    here, keeps the deviation that it has in the frame.
    """
    counted = ~rows.isnan() & (weights > 0)[:, None]
    low = torch.where(counted, rows, torch.inf).amin(0)
    high = torch.where(counted, rows, -torch.inf).amax(0)
    deviation = frame.deviation
    is_constant = (low > high) | ((low == high) & (deviation > 0))
    if not bool(is_constant.any()):
        return rows, weights
    pair = torch.stack([-deviation, deviation]).masked_fill(~is_constant, torch.nan)
    rows = torch.cat([rows.masked_fill(is_constant, torch.nan), pair])
    return rows, torch.cat([weights, weights.new_ones(2)])


def size_in(frame: Frame, factor: Tensor | float = 1.0) -> float:
    """Root mean square of the deviations, in the frame or with every column divided by a factor."""
    return float((frame.deviation / factor).square().mean().sqrt())
