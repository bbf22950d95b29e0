# SPDX-License-Identifier: Apache-2.0
"""What a frame learns of every column of a data matrix: centre, deviation, observed range.

One far entry moves a mean and a deviation by any amount. An entry that lies further from the median
than `FAR` times the typical distance counts in neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.frame import Frame
from ..common.rows import Rows
from ..common.scale import exponent_of, rescaled, scaled

# "auto" standardises where the spread of one column is more than so many times that of another:
# pixels of 8 bits stay as they are, and columns in other units do not.
UNLIKE = 256.0
# A fit that does not standardise warns from here on.
WARNED = 1e3
# Exponent up to which float64 holds squares and their sums.
MOST = 400
# Exponent of the largest value in the frame from which on others may be lost beside it.
WIDE = 300

# An entry is far beyond so many typical distances from the median. Where more than a share of the
# column is far, the deviation counts all entries: two groups are no error of measurement.
FAR, FEW = 2.0**14, 0.05
# Entries and least rows of the sample behind medians.
SAMPLE_ENTRIES, SAMPLE_ROWS, LEAST_ROWS = 1 << 17, 10_000, 256


def frame_of(
    rows: Rows,
    weight: Tensor | None = None,
    names: Any = None,
    standardize: str | bool = "auto",
) -> Frame:
    """The frame of a data matrix, centred on the means of what is observed. Entries that lie far
    from all others (`FAR`) count neither in the means nor in the widths.

    ValueError if a feature has no observed entry (in a row that counts), or rows are lost beside a
    value.
    """
    range_ = exponent_of(rows.top)
    columns = Columns.of(rows, weight, range_)
    lost = (columns.held == 0).nonzero()[:, 0].tolist()
    if lost:
        which = lost if names is None else [str(names[i]) for i in lost]
        raise ValueError(f"X: expected an observed entry in every column, got none in {which}")
    contrast = columns.contrast
    standard = contrast > UNLIKE if standardize == "auto" else bool(standardize)
    base, mantissa, exponent = torch.ones_like(columns.mean), 1.0, 0
    if standard:
        base, mantissa, exponent = _widths(columns.deviation)
    near, top = (float((far / base).max()) for far in (columns.near, columns.top))
    spread = max(exponent_of(near), exponent_of(top) - MOST)
    width = base * math.ldexp(1.0, spread)
    unit = range_ + spread + exponent
    if range_ > MOST or exponent_of(top) > spread + WIDE:
        rows.refuse_lost(lambda x: scaled(x.double(), -range_) / width)
    return Frame(
        mean=columns.mean,
        range=range_,
        width=width,
        unit=unit,
        one=math.ldexp(mantissa, -spread) if standard else rescaled(1.0, -unit),
        deviation=columns.deviation / width,
        low=scaled(columns.low, range_),
        high=scaled(columns.high, range_),
        standard=standard,
        contrast=contrast,
    )


def _widths(deviation: Tensor) -> tuple[Tensor, float, int]:
    """(width [D] of every column, mantissa, exponent).

    Mantissa and exponent are those of the root mean square of the deviations: a distance of columns
    in units of their deviations, times that, is in units of the data. A column of one value keeps
    its differences as they are.
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
    """Figures [D] in float64, in units of 2**range; `held` is 0 where nothing is observed."""

    median: Tensor
    typical: Tensor  # median distance from the median of the entries that differ from it
    held: Tensor  # weight of the observed entries
    low: Tensor
    high: Tensor
    mean: Tensor  # of the entries that are not far
    deviation: Tensor
    near: Tensor  # largest distance from the mean of an entry that is not far
    top: Tensor  # and of any entry

    @classmethod
    def of(cls, rows: Rows, weight: Tensor | None, range_: int) -> Columns:
        """Two passes over the rows, after a look at a sample of them."""
        median, typical = _typical(rows, weight, range_)
        limit = torch.where(typical > 0, FAR * typical, torch.inf)
        wide: dict[str, Any] = {"dtype": torch.float64, "device": rows.device}
        total, near, held = torch.zeros(3, rows.features, **wide).unbind()
        low = torch.full((rows.features,), torch.inf, **wide)
        high = -low
        for x, share in _counting(rows, weight, range_):
            seen = ~x.isnan()
            close = (x - median).abs() <= limit
            total += (torch.where(close, x, 0.0) * share).sum(0)
            near += (close * share).sum(0)
            held += (seen * share).sum(0)
            counts = seen & (share > 0)
            low = torch.minimum(low, torch.where(counts, x, torch.inf).amin(0))
            high = torch.maximum(high, torch.where(counts, x, -torch.inf).amax(0))
        mean = torch.where(near > 0, total / near.clamp(min=_TINY), median)
        # a column of one value has the deviation 0, whatever rounding makes of its mean
        mean = torch.where(low == high, low, mean)
        limit = torch.where(near >= (1 - FEW) * held, limit, torch.inf)
        found = cls(median, typical, held, low, high, mean, mean, mean, mean)
        found._measure(rows, weight, range_, limit)
        return found

    def _measure(self, rows: Rows, weight: Tensor | None, range_: int, limit: Tensor) -> None:
        """The second pass: distances from the mean."""
        square, counted, near, top = torch.zeros_like(self.mean).repeat(4, 1).unbind()
        unit = torch.where(self.typical > 0, self.typical, self.high - self.low)
        unit = torch.where(unit > 0, unit, 1.0)  # squares neither overflow nor vanish
        for x, share in _counting(rows, weight, range_):
            far = (x - self.mean).abs()
            close = (x - self.median).abs() <= limit
            square += ((torch.where(close, far, 0.0) / unit).square() * share).sum(0)
            counted += (close * share).sum(0)
            near = torch.maximum(near, torch.where(close, far, 0.0).amax(0))
            top = torch.maximum(top, far.nan_to_num(0.0).amax(0))
        self.deviation = (square / counted.clamp(min=_TINY)).sqrt() * unit
        self.near, self.top = near, top

    @property
    def contrast(self) -> float:
        """How much the spreads of the columns that vary differ: the largest over the smallest, of
        the typical distances or of the deviations, whichever differ less. Rare entries make a
        deviation small, and far ones make it large.
        """
        varies = self.deviation > 0
        if not bool(varies.any()):
            return 1.0
        deviation = self.deviation[varies]
        typical = torch.where(self.typical[varies] > 0, self.typical[varies], deviation)
        return min(float(x.max() / x.min()) for x in (deviation, typical))


def near(z: Tensor, frame: Frame) -> Tensor:
    """Which entries of states are observed and not far, by the deviations of a frame; in a column
    with more than few far entries all that are observed.
    """
    seen = ~z.isnan()
    limit = torch.where(frame.deviation > 0, FAR * frame.deviation, torch.inf).to(z.device)
    close = z.abs() <= limit
    few = close.sum(0) >= (1 - FEW) * seen.sum(0)
    return torch.where(few, close, seen)


_TINY = torch.finfo(torch.float64).tiny


def _counting(rows: Rows, weight: Tensor | None, range_: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows in float64 and units of 2**range, their weights [n, 1]) piece by piece."""
    for part, x in rows.pieces():
        share = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
        yield scaled(x.double(), -range_), share if weight is None else weight[part, None]


def _typical(rows: Rows, weight: Tensor | None, range_: int) -> tuple[Tensor, Tensor]:
    """(median, median distance from it of the entries that differ from it) of every column [D], of
    a sample of rows; 0 where nothing differs.
    """
    most = max(LEAST_ROWS, min(SAMPLE_ROWS, SAMPLE_ENTRIES // rows.features))
    step = math.ceil(len(rows) / most)
    index = torch.arange(0, len(rows), step, dtype=torch.int64, device="cpu")
    x = scaled(rows.take(index).double(), -range_)
    share = torch.ones(len(x), dtype=torch.float64, device=x.device)
    share = share if weight is None else weight[index.to(weight.device)]
    median = _medians(x, share).nan_to_num(0.0)
    far = (x - median).abs()
    return median, _medians(torch.where(far > 0, far, torch.nan), share).nan_to_num(0.0)


def _medians(x: Tensor, share: Tensor) -> Tensor:
    """Lower weighted median of every column, without NaN; NaN where there is nothing else."""
    values, order = x.sort(0)
    below = (share[order] * ~values.isnan()).cumsum(0)
    at = (below * 2 < below[-1]).sum(0).clamp(max=len(x) - 1)
    found = values.gather(0, at[None])[0]
    return torch.where(below[-1] > 0, found, torch.nan)
