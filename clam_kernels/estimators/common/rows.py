# SPDX-License-Identifier: Apache-2.0
"""The data matrix of a fit: dense or sparse, in memory or on disk, block by block.

Ops are called with one block at a time. Rows in memory that need no conversion are one block, which
is not copied. Read-only arrays (such as memory maps), sparse rows, rows of unit norm and rows near
the ends of the float range are converted block by block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils import get_tags
from sklearn.utils.validation import validate_data
from torch import Tensor

from ..._core.backend import float32_products
from ..._core.spec import choice
from ...metrics import refuse_masked_entries
from . import sparse_rows
from .base import choose_device, computed_dtype, read_tensor, refuse_bad_entries
from .frame import Frame
from .numbers import as_numbers, check_integers, refuse_same_names
from .scale import chunks, scale_number, scale_tensor

# Entries of a block that is converted.
BLOCK_ENTRIES = 1 << 22
# Entries of a chunk of float32 rows that are normalised in float64: it fits in a CPU's cache.
UNIT_ENTRIES = 1 << 16
# About the rows x centroids of one product on a CPU.
TILE_ENTRIES = 1 << 18
# Exponents of the least and the largest magnitude whose squares need no scaling.
SAFE_EXPONENTS = {torch.float32: (-40, 40), torch.float64: (-400, 400)}

# Values below this have digits whose squares are 0 in float64.
LEAST = 2.0**-459

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def _no_features() -> Tensor:
    return torch.zeros(0, dtype=torch.float64, device="cpu")


@dataclass
class Rows:
    """A matrix [N, D] of float32 or float64, scaled by 2**exponent, on a device."""

    source: Any  # a Tensor, a numpy array or a CSR matrix
    dtype: torch.dtype
    device: torch.device
    is_tensor: bool
    origin: torch.device
    chunk_rows: int | None = None
    unit_norm: bool = False
    exponent: int = 0
    top: float = 0.0  # the largest magnitude
    has_missing: bool = False  # whether some entries are NaN
    mean: Tensor = field(default_factory=_no_features)  # [D] float64, scaled
    variance: float = 0.0  # mean over the features, scaled
    frame_of_rows: Frame | None = None  # the rows are states of this frame, if there is one
    result: torch.dtype = field(init=False)  # dtype of results; `dtype` is that of computations

    def __post_init__(self) -> None:
        self.result = self.dtype

    def __len__(self) -> int:
        return int(self.source.shape[0])

    @property
    def features(self) -> int:
        """D."""
        return int(self.source.shape[1])

    @property
    def is_whole(self) -> bool:
        """Whether an op can take the source itself."""
        is_scaled = self.frame_of_rows is not None or self.exponent != 0 or self.unit_norm
        if is_scaled or self.chunk_rows is not None or not isinstance(self.source, Tensor):
            return False
        return self.source.device == self.device and self.source.dtype == self.dtype

    @property
    def is_sparse(self) -> bool:
        """Whether a pass reads the nonzero entries alone; a GPU reads dense blocks."""
        return sparse.issparse(self.source) and self.device.type == "cpu"

    @functools.cached_property
    def squares(self) -> Tensor:
        """Squared norms [N] of sparse rows in float64; valid after the scale is chosen."""
        return sparse_rows.squares(self)

    @property
    def is_in_memory(self) -> bool:
        """Whether the rows are in a CPU's memory: reading some costs less than reading all."""
        return self.is_whole and self.device.type == "cpu"

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values) of every block, in order."""
        n = len(self)
        if self.is_whole:
            yield slice(0, n), self.source
            return
        step = self.chunk_rows or max(1, BLOCK_ENTRIES // self.features)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            yield part, self._convert(self.source[part])

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values) of every chunk: few rows, so that a copy in float64 is small."""
        for part, block in self.blocks():
            start = part.start
            for x in chunks(block):
                yield slice(start, start + len(x)), x
                start += len(x)

    def states(self, frame: Frame) -> Tensor:
        """All rows as states of a frame."""
        return torch.cat([frame.states(x, self.dtype) for _, x in self.pieces()])

    def take(self, index: Tensor) -> Tensor:
        """The values of some rows."""
        if isinstance(self.source, Tensor):
            return self._convert(self.source.index_select(0, index.to(self.source.device)))
        return self._convert(self.source[index.cpu().numpy()])

    def part(self, index: Tensor) -> Rows:
        """Some rows as `Rows`; sparse rows stay sparse."""
        if self.is_sparse:
            return dataclasses.replace(self, source=self.source[index.cpu().numpy()])
        return in_memory(self.take(index))

    def _convert(self, part: Any) -> Tensor:
        if self.is_sparse:
            return sparse_rows.dense(dataclasses.replace(self, source=part))
        if sparse.issparse(part):
            part = part.toarray()
        if not isinstance(part, Tensor):
            dtype = np.float64 if self.frame_of_rows is not None else _NUMPY[self.dtype]
            part = torch.from_numpy(np.array(part, dtype=dtype, order="C"))
        x = part.to(self.device)
        frame = self.frame_of_rows
        x = x.to(self.dtype) if frame is None else frame.states(x, self.dtype)
        x = in_scale(x, self.exponent)
        return normalise_rows(x) if self.unit_norm else x

    def give(self, result: Tensor) -> Any:
        """A result in the container of the input: numpy for arrays, else a tensor on its device."""
        return result.to(self.origin) if self.is_tensor else result.cpu().numpy()

    def give_labels(self, labels: Tensor) -> Any:
        """Labels: int32 numpy as scikit-learn has them, int64 for tensors."""
        return self.give(labels if self.is_tensor else labels.int())

    def tile_work(self, k: int) -> int:
        """Multiply-adds of one matrix product on a CPU, which takes a chunk of rows."""
        return min(len(self) * k, TILE_ENTRIES) * self.features

    def in_frame(self, frame: Frame) -> Rows:
        """The same rows as states of a frame."""
        top = max(float(bound.abs().max()) for bound in frame.bounds(frame.mean))
        return replace(self, frame_of_rows=frame, exponent=0, top=top)

    def choose_scale(self, top: float) -> None:
        """Choose dtype and exponent for values of magnitude `top`: their squares are finite.

        float32 becomes float64; values too large or too small for float64 are scaled by a power of
        two.
        """
        power = math.frexp(top)[1] if top else 0
        least, most = SAFE_EXPONENTS[self.dtype]
        self.exponent = 0
        if least <= power <= most or self.unit_norm:
            return
        if self.dtype == torch.float32:
            self.dtype = torch.float64
        else:
            self.exponent = most - power

    def refuse_underflow(
        self, scale: Callable[[Tensor], Tensor], centroids: Tensor | None = None
    ) -> None:
        """ValueError where a row is so small beside the largest value that float64 has 0 for its
        squared distance to another row, or to a centroid.

        `scale` returns values in the scale in which they are squared; centroids have that scale.
        """
        has_small_centroids = False
        if centroids is not None:
            magnitude = centroids.abs().amax(1)
            if not bool((magnitude < LEAST).any()):
                return
            has_small_centroids = bool(((magnitude > 0) & (magnitude < LEAST)).any())
        small: tuple[int, float] | None = None  # (row, magnitude) of the first small row
        top, place, value = -1.0, (0, 0), 0.0
        for part, x in self.pieces():
            magnitudes = scale(x).abs().nan_to_num(0.0)
            largest = magnitudes.amax(1)
            is_small = (largest < LEAST) & ((largest > 0) | has_small_centroids)
            index = is_small.nonzero()[:, 0]
            if small is None and len(index):
                row = int(index[0])
                magnitude_of_row = float(x[row].abs().nan_to_num(0.0).max())
                small = part.start + row, scale_number(magnitude_of_row, -self.exponent)
            if float(largest.max()) > top:
                top, row = float(largest.max()), int(largest.argmax())
                column = int(magnitudes[row].argmax())
                place = part.start + row, column
                value = scale_number(float(x[row, column]), -self.exponent)
        if small is not None:
            raise ValueError(
                "X: expected values that float64 can square beside each other, got"
                f" {value:.3g} in row {place[0]}, column {place[1]}, and at most {small[1]:.3g} in"
                f" row {small[0]}; leave out or replace values beyond about 1e150"
            )

    def frame(self) -> None:
        """Choose the scale, and compute mean and variance in one pass.

        With gap = x - x_0: mean = x_0 + sum gap / N, and the variance of a column is
        sum gap^2 / N - (sum gap / N)^2.
        """
        self.choose_scale(self.top)
        if self.exponent < 0:
            self.refuse_underflow(lambda x: x)
        if self.is_sparse:
            self.mean, self.variance = sparse_rows.moments(self)
            return
        first = self.take(torch.zeros(1, dtype=torch.int64, device="cpu"))[0]
        total, square = torch.zeros(2, self.features, dtype=torch.float64, device=self.device)
        for _, block in self.blocks():
            for x in block.split(max(1, (BLOCK_ENTRIES >> 6) // self.features)):
                gap = x - first
                ones = gap.new_ones(len(gap))
                with float32_products():
                    total += ones @ gap
                    square += ones @ gap.square_()
        mean = total / len(self)
        self.variance = float((square / len(self) - mean.square()).clamp(min=0).mean())
        self.mean = first.double() + mean

    def mask_zero_rows(self, weight: Tensor | None) -> Tensor | None:
        """The weights; for the cosine metric 0 for rows of zeros, unless all rows are zeros."""
        if not self.unit_norm:
            return weight
        if self.is_sparse:
            some = self.squares > 0
        else:
            some = torch.cat([(block != 0).any(-1) for _, block in self.blocks()])
        if bool(some.all()) or not bool(some.any()):
            return weight
        return some.double() if weight is None else weight * some

    @property
    def shift(self) -> Tensor | None:
        """A point to subtract before sums where rows are far from the origin, else None."""
        if self.is_sparse:  # float64 holds their sums
            return None
        far = bool((self.mean.abs().max() ** 2 > 100 * self.variance).item())
        return self.mean.to(self.dtype) if far else None


def in_memory(x: Tensor) -> Rows:
    """A tensor as rows, without a conversion."""
    return Rows(x, x.dtype, x.device, True, x.device)


def in_scale(x: Tensor, exponent: int) -> Tensor:
    """`x * 2**exponent`, computed in float64, which holds the factor."""
    return scale_tensor(x.double(), exponent).to(x.dtype) if exponent else x


def normalise_rows(x: Tensor) -> Tensor:
    """Rows x / |x|, rounded once, as sparse rows are; a row of zeros stays zeros."""
    if x.dtype == torch.float64:
        top = x.abs().amax(-1, keepdim=True)
        x = x / torch.where(top > 0, top, 1.0)  # squares neither overflow nor vanish
        return x.div_(_divisor(x))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    features = x.shape[-1]
    size = max(1, (UNIT_ENTRIES if x.device.type == "cpu" else BLOCK_ENTRIES) // features)
    for part, own in zip(
        x.reshape(-1, features).split(size), out.view(-1, features).split(size), strict=True
    ):
        values = part.double()
        own.copy_(values.div_(_divisor(values)))
    return out


def _divisor(x: Tensor) -> Tensor:
    """The norm of each row, 1 for a row of zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0)


def backend_of(op: str, rows: Rows) -> str:
    """The backend that computes an op on these rows."""
    probe = torch.zeros(1, rows.features, dtype=rows.dtype, device=rows.device)
    return choice(op, probe).backend


def weighted_sum(values: Tensor, weight: Tensor | None) -> float:
    """sum_n w_n values_n in float64."""
    return float(values.double().sum() if weight is None else values.double() @ weight)


def read_rows(
    estimator: BaseEstimator,
    x: Any,
    *,
    reset: bool,
    device: str = "auto",
    chunk_rows: int | None = None,
    unit_norm: bool = False,
) -> Rows:
    """Validate a data matrix by scikit-learn's rules, and read it once.

    float32 and float64 stay, 16-bit and narrower types become float32, all others float64. The
    estimator gets `n_features_in_` where `reset`; its tags decide whether sparse matrices and NaN
    are valid.
    """
    is_tensor = isinstance(x, Tensor)
    origin = x.device if is_tensor else torch.device("cpu")
    source: Any
    if is_tensor:
        source = read_tensor(estimator, x, reset)
        dtype = source.dtype
    else:
        source = _read_array(estimator, x, reset)
        if sparse.issparse(source) and not source.has_canonical_format:
            source = source.copy()
            source.sum_duplicates()
        dtype = computed_dtype(source)
        is_dense = not sparse.issparse(source) and source.flags.c_contiguous
        if is_dense and source.flags.writeable and source.dtype == _NUMPY[dtype]:
            source = torch.from_numpy(source)
    place = choose_device(device, origin if is_tensor else None)
    if isinstance(source, Tensor) and place.type == "cuda":
        source = source.to(place)
    rows = Rows(source, dtype, place, is_tensor, origin, chunk_rows)
    _check_entries(estimator, rows)
    rows.unit_norm = unit_norm
    return rows


def _check_entries(estimator: BaseEstimator, rows: Rows) -> None:
    """Store the largest magnitude, and whether entries are missing; ValueError for bad entries."""
    name = type(estimator).__name__
    allow_nan = get_tags(estimator).input_tags.allow_nan
    if rows.is_sparse and np.isfinite(rows.source.data).all():
        data = rows.source.data
        rows.top = float(max(data.max(initial=0), -data.min(initial=0)))
        return
    for part, block in rows.blocks():
        if isinstance(rows.source, np.ndarray):  # the conversion to a block may have rounded
            check_integers("X", rows.source[part], part.start)
        low, high = (float(end) for end in torch.aminmax(block))
        if not (math.isfinite(low) and math.isfinite(high)):
            refuse_bad_entries(name, block, allow_nan, first_row=part.start)
            rows.has_missing = True
            low, high = (float(end) for end in torch.aminmax(block.nan_to_num(0.0)))
        rows.top = max(rows.top, -low, high)


def _read_array(estimator: BaseEstimator, x: Any, reset: bool) -> Any:
    refuse_masked_entries("X", x)
    refuse_same_names("X", x)
    if _is_mapped(x) and x.ndim == 2 and x.size and x.dtype.kind in "biuf":
        return np.asarray(validate_data(estimator, x, reset=reset, skip_check_array=True))
    return validate_data(
        estimator,
        as_numbers("X", x),
        reset=reset,
        accept_sparse="csr" if get_tags(estimator).input_tags.sparse else False,
        accept_large_sparse=True,
        dtype=np.float32 if computed_dtype(x) == torch.float32 else [np.float64, np.float32],
        order="C",
        ensure_all_finite=False,
    )


def _is_mapped(x: Any) -> bool:
    """Whether an array is a memory map: such an array is converted block by block, never whole."""
    while isinstance(x, np.ndarray):
        if isinstance(x, np.memmap):
            return True
        x = x.base
    return isinstance(x, mmap.mmap)


def read_weight(sample_weight: Any, rows: Rows) -> Tensor | None:
    """Weights [N] in float64 on the rows' device; None where all are 1."""
    if sample_weight is None:
        return None
    if isinstance(sample_weight, Tensor):
        weight = sample_weight.detach().to(rows.device, torch.float64)
    else:
        numbers = as_numbers("sample_weight", refuse_masked_entries("sample_weight", sample_weight))
        array = np.asarray(numbers, dtype=np.float64)
        weight = torch.from_numpy(np.array(array)).to(rows.device)
    if weight.ndim == 0:
        weight = weight.expand(len(rows)).clone()
    if weight.ndim != 1:
        raise ValueError("Sample weights must be 1D array or scalar")
    if len(weight) != len(rows):
        raise ValueError(f"sample_weight.shape == {tuple(weight.shape)}, expected {(len(rows),)}!")
    if not bool(weight.isfinite().all()):
        raise ValueError("Input sample_weight contains NaN or infinity")
    if bool((weight < 0).any()):
        raise ValueError("Negative values in data passed to `sample_weight`")
    if not bool((weight > 0).any()):
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weight
