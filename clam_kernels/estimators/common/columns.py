# SPDX-License-Identifier: Apache-2.0
"""The figures of each column of a data matrix for a frame: mean, deviation, observed range.

One far entry changes a mean and a deviation by any amount. An entry whose distance from the median
is more than `FAR` times the typical distance counts in neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._core.warn import warn
from .frame import Frame
from .rows import Rows
from .scale import exponent_of, scale_number, scale_tensor

# "auto" standardises where the spread of one column is more than so many times that of another:
# pixels of 8 bits stay as they are, columns in different units are standardised.
STANDARDISED_CONTRAST = 256.0
# A fit that does not standardise warns where the spreads differ by more than this.
WARNED_CONTRAST = 1e3
# Exponent of the largest value whose squares, and sums of them, float64 holds.
SQUARE_EXPONENT = 400
# Exponent of the largest value in the frame from which small values may be lost beside it.
LOSS_EXPONENT = 300

# An entry is far if it is more than so many typical distances from the median. Where more than a
# share FAR_SHARE of the column is far, all entries count: two groups are no error of measurement.
FAR, FAR_SHARE = 2.0**14, 0.05
# Entries, most rows and least rows of the sample that medians are computed from.
SAMPLE_ENTRIES, SAMPLE_ROWS, LEAST_ROWS = 1 << 17, 10_000, 256

# The least sum of weights by which other sums are divided.
TINY = torch.finfo(torch.float64).tiny


def frame_of(
    rows: Rows,
    weight: Tensor | None = None,
    names: Any = None,
    standardize: str | bool = "auto",
) -> Frame:
    """The frame of a data matrix, centered on the means of the observed entries.

    Far entries (`FAR`) count neither in the means nor in the widths.

    ValueError if a column has no observed entry (in a row that counts), or if float64 cannot
    square the values of some row beside the largest value.
    """
    range_ = exponent_of(rows.top)
    columns = Columns.of(rows, weight, range_)
    empty = (columns.observed == 0).nonzero()[:, 0].tolist()
    if empty:
        which = empty if names is None else [str(names[i]) for i in empty]
        raise ValueError(f"X: expected an observed entry in every column, got none in {which}")
    contrast = columns.contrast
    is_standard = contrast > STANDARDISED_CONTRAST if standardize == "auto" else bool(standardize)
    base, mantissa, exponent = torch.ones_like(columns.mean), 1.0, 0
    if is_standard:
        base, mantissa, exponent = _widths(columns.deviation)
    near, top = (float((distance / base).max()) for distance in (columns.near, columns.top))
    spread = max(exponent_of(near), exponent_of(top) - SQUARE_EXPONENT)
    width = base * math.ldexp(1.0, spread)
    unit = range_ + spread + exponent
    if range_ > SQUARE_EXPONENT or exponent_of(top) > spread + LOSS_EXPONENT:
        rows.refuse_underflow(lambda x: scale_tensor(x.double(), -range_) / width)
    return Frame(
        mean=columns.mean,
        range=range_,
        width=width,
        unit=unit,
        one=math.ldexp(mantissa, -spread) if is_standard else scale_number(1.0, -unit),
        deviation=columns.deviation / width,
        low=scale_tensor(columns.low, range_),
        high=scale_tensor(columns.high, range_),
        is_standard=is_standard,
        contrast=contrast,
    )


def _widths(deviation: Tensor) -> tuple[Tensor, float, int]:
    """(width [D] of every column, mantissa, exponent).

    Mantissa and exponent are those of the root mean square of the deviations: a distance in units
    of the deviations, times that number, is a distance in units of the data. A column of one value
    is not divided by its deviation, which is 0.
    """
    varies = deviation > 0
    top = float(deviation.max())
    if top == 0:
        return torch.ones_like(deviation), 1.0, 0
    square = (deviation[varies] / top).square().mean()
    mantissa, exponent = math.frexp(top * math.sqrt(float(square)))
    return torch.where(varies, deviation / mantissa, math.ldexp(1.0, exponent)), mantissa, exponent


@dataclass
class Columns:
    """Figures [D] of the columns in float64, in units of 2**range."""

    median: Tensor
    typical: Tensor  # median distance from the median, of the entries that differ from it
    observed: Tensor  # weight of the observed entries; 0 where there is none
    low: Tensor
    high: Tensor
    mean: Tensor  # of the entries that are not far, as is the deviation
    deviation: Tensor
    near: Tensor  # largest distance from the mean of an entry that is not far
    top: Tensor  # largest distance from the mean of any entry

    @classmethod
    def of(cls, rows: Rows, weight: Tensor | None, range_: int) -> Columns:
        """Compute the figures: medians of a sample, then two passes over all rows."""
        median, typical = _typical(rows, weight, range_)
        limit = torch.where(typical > 0, FAR * typical, torch.inf)
        float64: dict[str, Any] = {"dtype": torch.float64, "device": rows.device}
        total, near, observed = torch.zeros(3, rows.features, **float64).unbind()
        low = torch.full((rows.features,), torch.inf, **float64)
        high = -low
        for x, weights in _weighted_chunks(rows, weight, range_):
            is_observed = ~x.isnan()
            is_near = (x - median).abs() <= limit
            total += (torch.where(is_near, x, 0.0) * weights).sum(0)
            near += (is_near * weights).sum(0)
            observed += (is_observed * weights).sum(0)
            counts = is_observed & (weights > 0)
            low = torch.minimum(low, torch.where(counts, x, torch.inf).amin(0))
            high = torch.maximum(high, torch.where(counts, x, -torch.inf).amax(0))
        mean = torch.where(near > 0, total / near.clamp(min=TINY), median)
        # rounding may move the mean of a column of one value, whose deviation is 0
        mean = torch.where(low == high, low, mean)
        limit = torch.where(near >= (1 - FAR_SHARE) * observed, limit, torch.inf)
        columns = cls(median, typical, observed, low, high, mean, mean, mean, mean)
        columns._measure(rows, weight, range_, limit)
        return columns

    def _measure(self, rows: Rows, weight: Tensor | None, range_: int, limit: Tensor) -> None:
        """The second pass: sqrt(sum_n w_n (x_n - mean)^2 / sum_n w_n) over the entries that are not
        far, and the largest distances from the mean.
        """
        square, counted, near, top = torch.zeros_like(self.mean).repeat(4, 1).unbind()
        unit = torch.where(self.typical > 0, self.typical, self.high - self.low)
        unit = torch.where(unit > 0, unit, 1.0)  # squares neither overflow nor vanish
        for x, weights in _weighted_chunks(rows, weight, range_):
            distance = (x - self.mean).abs()
            is_near = (x - self.median).abs() <= limit
            near_distance = torch.where(is_near, distance, 0.0)
            square += ((near_distance / unit).square() * weights).sum(0)
            counted += (is_near * weights).sum(0)
            near = torch.maximum(near, near_distance.amax(0))
            top = torch.maximum(top, distance.nan_to_num(0.0).amax(0))
        self.deviation = (square / counted.clamp(min=TINY)).sqrt() * unit
        self.near, self.top = near, top

    @property
    def contrast(self) -> float:
        """The largest spread of a column that varies over the smallest: of the typical distances
        or of the deviations, whichever differ less. Rare entries make a deviation small, and far
        entries make it large.
        """
        varies = self.deviation > 0
        if not bool(varies.any()):
            return 1.0
        deviation = self.deviation[varies]
        typical = torch.where(self.typical[varies] > 0, self.typical[varies], deviation)
        return min(float(x.max() / x.min()) for x in (deviation, typical))


def near(z: Tensor, frame: Frame) -> Tensor:
    """Which entries of states are observed and not far, by the deviations of a frame. In a column
    where more than a share `FAR_SHARE` is far, all observed entries are near.
    """
    is_observed = ~z.isnan()
    limit = torch.where(frame.deviation > 0, FAR * frame.deviation, torch.inf).to(z.device)
    is_near = z.abs() <= limit
    is_mostly_near = is_near.sum(0) >= (1 - FAR_SHARE) * is_observed.sum(0)
    return torch.where(is_mostly_near, is_near, is_observed)


def _weighted_chunks(
    rows: Rows, weight: Tensor | None, range_: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows in float64 and units of 2**range, their weights [n, 1]) of each chunk."""
    for part, x in rows.pieces():
        ones = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
        yield scale_tensor(x.double(), -range_), ones if weight is None else weight[part, None]


def _typical(rows: Rows, weight: Tensor | None, range_: int) -> tuple[Tensor, Tensor]:
    """(median, median distance from it of the entries that differ from it) of every column [D],
    computed from a sample of rows; a distance of 0 where no entry differs.
    """
    count = max(LEAST_ROWS, min(SAMPLE_ROWS, SAMPLE_ENTRIES // rows.features))
    step = math.ceil(len(rows) / count)
    index = torch.arange(0, len(rows), step, dtype=torch.int64, device="cpu")
    x = scale_tensor(rows.take(index).double(), -range_)
    weights = torch.ones(len(x), dtype=torch.float64, device=x.device)
    weights = weights if weight is None else weight[index.to(weight.device)]
    median = _medians(x, weights).nan_to_num(0.0)
    distance = (x - median).abs()
    distance = torch.where(distance > 0, distance, torch.nan)
    return median, _medians(distance, weights).nan_to_num(0.0)


def _medians(x: Tensor, weights: Tensor) -> Tensor:
    """Lower weighted median of every column over the entries that are not NaN; NaN where all are
    NaN.
    """
    values, order = x.sort(0)
    below = (weights[order] * ~values.isnan()).cumsum(0)
    index = (below * 2 < below[-1]).sum(0).clamp(max=len(x) - 1)
    medians = values.gather(0, index[None])[0]
    return torch.where(below[-1] > 0, medians, torch.nan)


def warn_of_units(frame: Frame) -> None:
    """Warn where nothing standardises columns whose spreads differ by more than 1e3."""
    if not frame.is_standard and frame.contrast > WARNED_CONTRAST:
        warn(
            f"standardize=False: the spread of one column of X is {frame.contrast:.0e} times that"
            " of another: columns of large spread alone decide the labels.",
            UserWarning,
        )
