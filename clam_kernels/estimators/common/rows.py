# SPDX-License-Identifier: Apache-2.0
"""The data matrix of a fit: dense or sparse, in memory or on disk, block by block.

A block is what an op is called with. Rows in memory that need no change are one block and are never
copied; read-only arrays (a memory map among them), sparse rows, rows of unit norm and rows near the
ends of the float range are made block by block.
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
from sklearn.utils import get_tags
from sklearn.utils.validation import validate_data
from torch import Tensor

from ..._core.backend import float32_products
from ...metrics import unmasked
from . import sparse_rows
from .base import NARROW, choose_device, read_tensor, refuse_bad_entries
from .frame import Frame
from .numbers import as_numbers, check_integers, refuse_same_names
from .scale import chunks, rescaled, scaled

# Entries of a block that is made on the way.
BLOCK_ENTRIES = 1 << 22
# Entries of a piece of float32 rows that are normalised in float64: on a CPU it stays in the cache.
UNIT_ENTRIES = 1 << 16
# Rows x centres of one product on a CPU, about.
TILE_ENTRIES = 1 << 18
# Squares of values between these need no scaling: (least, most) exponent.
SAFE = {torch.float32: (-40, 40), torch.float64: (-400, 400)}

# Rows below this have digits whose squares are 0 in float64.
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
    missing: bool = False  # whether some entries are NaN
    mean: Tensor = field(default_factory=_no_features)  # [D] float64, scaled
    variance: float = 0.0  # mean over the features, scaled
    seen_in: Frame | None = None  # rows are states of this frame
    result: torch.dtype = field(init=False)  # of results; `dtype` is that of the computation

    def __post_init__(self) -> None:
        self.result = self.dtype

    def __len__(self) -> int:
        return int(self.source.shape[0])

    @property
    def features(self) -> int:
        """D."""
        return int(self.source.shape[1])

    @property
    def whole(self) -> bool:
        """Whether the source itself can be handed to an op."""
        plain = isinstance(self.source, Tensor) and self.source.device == self.device
        same = plain and self.source.dtype == self.dtype
        plain = same and self.seen_in is None
        return plain and not self.exponent and not self.unit_norm and self.chunk_rows is None

    @property
    def is_sparse(self) -> bool:
        """Whether passes read the nonzero entries alone; a GPU reads dense blocks."""
        return sparse.issparse(self.source) and self.device.type == "cpu"

    @functools.cached_property
    def squares(self) -> Tensor:
        """Squared norms [N] of sparse rows, in float64; asked for when the scale is chosen."""
        return sparse_rows.squares(self)

    @property
    def in_place(self) -> bool:
        """Whether some rows are read as cheaply as all, in a processor's memory."""
        return self.whole and self.device.type == "cpu"

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values) of every block, in order."""
        n = len(self)
        if self.whole:
            yield slice(0, n), self.source
            return
        step = self.chunk_rows or max(1, BLOCK_ENTRIES // self.features)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            yield part, self._made(self.source[part])

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values) in chunks that a copy in float64 is no matter for."""
        for part, block in self.blocks():
            start = part.start
            for x in chunks(block):
                yield slice(start, start + len(x)), x
                start += len(x)

    def states(self, frame: Frame) -> Tensor:
        """Every row in a frame."""
        return torch.cat([frame.states(x, self.dtype) for _, x in self.pieces()])

    def take(self, index: Tensor) -> Tensor:
        """Some rows."""
        if isinstance(self.source, Tensor):
            return self._made(self.source.index_select(0, index.to(self.source.device)))
        return self._made(self.source[index.cpu().numpy()])

    def part(self, index: Tensor) -> Rows:
        """Some rows, as rows again; sparse ones stay sparse."""
        if self.is_sparse:
            return dataclasses.replace(self, source=self.source[index.cpu().numpy()])
        return in_memory(self.take(index))

    def _made(self, part: Any) -> Tensor:
        if self.is_sparse:
            return sparse_rows.dense(dataclasses.replace(self, source=part))
        if sparse.issparse(part):
            part = part.toarray()
        if not isinstance(part, Tensor):
            kept = np.float64 if self.seen_in is not None else _NUMPY[self.dtype]
            part = torch.from_numpy(np.array(part, dtype=kept, order="C"))
        x = part.to(self.device)
        x = x.to(self.dtype) if self.seen_in is None else self.seen_in.states(x, self.dtype)
        x = in_scale(x, self.exponent)
        return normalised(x) if self.unit_norm else x

    def give(self, result: Tensor) -> Any:
        """A result in the container of the input: numpy for arrays, else a tensor on its device."""
        return result.to(self.origin) if self.is_tensor else result.cpu().numpy()

    def give_labels(self, labels: Tensor) -> Any:
        """Labels: int32 numpy as scikit-learn has them, int64 for tensors."""
        return self.give(labels if self.is_tensor else labels.int())

    def tile_work(self, k: int) -> int:
        """Multiply-adds of one matrix product of the CPU's, which is of a tile of rows."""
        return min(len(self) * k, TILE_ENTRIES) * self.features

    def seen_from(self, frame: Frame) -> Rows:
        """The same rows as states of a frame."""
        top = max(float(bound.abs().max()) for bound in frame.bounds(frame.mean))
        return replace(self, seen_in=frame, exponent=0, top=top)

    def choose_scale(self, top: float) -> None:
        """Make room for the squares of values of magnitude `top`, and of those far below it: in
        float64 they have room, and what is too large or small for it is scaled by a power of two.
        """
        power = math.frexp(top)[1] if top else 0
        least, most = SAFE[self.dtype]
        self.exponent = 0
        if least <= power <= most or self.unit_norm:
            return
        if self.dtype == torch.float32:
            self.dtype = torch.float64
        else:
            self.exponent = most - power

    def refuse_lost(self, scale: Callable[[Tensor], Tensor], centres: Tensor | None = None) -> None:
        """ValueError where a row is so small beside the largest value that the square of what tells
        it from others is 0: from other rows, or from centres. `scale` gives values as they are
        squared; centres are so already.
        """
        near = None if centres is None else centres.abs().amax(1)
        if near is not None and not bool((near < LEAST).any()):
            return
        among = near is not None and bool(((near > 0) & (near < LEAST)).any())
        small: tuple[int, float] | None = None
        top, at, value = -1.0, (0, 0), 0.0
        for part, x in self.pieces():
            far = scale(x).abs().nan_to_num(0.0)
            most = far.amax(1)
            lost = ((most < LEAST) & ((most > 0) | among)).nonzero()[:, 0]
            if small is None and len(lost):
                row = int(lost[0])
                given = float(x[row].abs().nan_to_num(0.0).max())
                small = part.start + row, rescaled(given, -self.exponent)
            if float(most.max()) > top:
                top, row = float(most.max()), int(most.argmax())
                column = int(far[row].argmax())
                at = part.start + row, column
                value = rescaled(float(x[row, column]), -self.exponent)
        if small is not None:
            raise ValueError(
                "X: expected values that float64 can square beside each other, got"
                f" {value:.3g} in row {at[0]}, column {at[1]}, and at most {small[1]:.3g} in row"
                f" {small[0]}; leave out or replace values beyond about 1e150"
            )

    def frame(self) -> None:
        """Choose the scale, and learn mean and variance in one pass."""
        self.choose_scale(self.top)
        if self.exponent < 0:
            self.refuse_lost(lambda x: x)
        if self.is_sparse:
            self.mean, self.variance = sparse_rows.moments(self)
            return
        wide: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        first = self.take(torch.zeros(1, dtype=torch.int64, device="cpu"))[0]
        total, square = torch.zeros(2, self.features, **wide).unbind()
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

    def directed(self, weight: Tensor | None) -> Tensor | None:
        """The weights, 0 for rows of zeros where only directions count; as given if all are."""
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
        """A point to subtract before sums, where rows lie far from the origin."""
        if self.is_sparse:  # float64 holds their sums
            return None
        far = bool((self.mean.abs().max() ** 2 > 100 * self.variance).item())
        return self.mean.to(self.dtype) if far else None


def in_memory(x: Tensor) -> Rows:
    """A tensor as it is."""
    return Rows(x, x.dtype, x.device, True, x.device)


def in_scale(x: Tensor, exponent: int) -> Tensor:
    """`x * 2**exponent`, by way of float64, which holds the factor."""
    return scaled(x.double(), exponent).to(x.dtype) if exponent else x


def normalised(x: Tensor) -> Tensor:
    """Rows of unit norm, rounded once, as those of sparse rows are; a row of zeros stays."""
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
        wide = part.double()
        own.copy_(wide.div_(_divisor(wide)))
    return out


def _divisor(x: Tensor) -> Tensor:
    """The norm of each row, 1 for a row of zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0)


def read_rows(estimator: Any, x: Any, *, reset: bool) -> Rows:
    """Validate a data matrix by scikit-learn's rules, without reading it more than once.

    float32 and float64 stay, 16-bit and narrower types become float32, everything else float64. The
    estimator's tags say whether sparse matrices and NaN are taken.
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
        found = _float_dtype(source)
        dtype = torch.float32 if found == np.float32 else torch.float64
        dense = not sparse.issparse(source) and source.flags.c_contiguous
        if dense and source.flags.writeable and source.dtype == found:
            source = torch.from_numpy(source)
    device = choose_device(estimator.device, origin if is_tensor else None)
    if isinstance(source, Tensor) and device.type == "cuda":
        source = source.to(device)
    rows = Rows(source, dtype, device, is_tensor, origin, getattr(estimator, "chunk_rows", None))
    _look_at_entries(estimator, rows)
    rows.unit_norm = getattr(estimator, "metric", "euclidean") == "cosine"
    return rows


def _look_at_entries(estimator: Any, rows: Rows) -> None:
    """The largest magnitude, and whether entries are missing; ValueError for bad ones."""
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
            refuse_bad_entries(estimator, block, allow_nan, first_row=part.start)
            rows.missing = True
            low, high = (float(end) for end in torch.aminmax(block.nan_to_num(0.0)))
        rows.top = max(rows.top, -low, high)


def _read_array(estimator: Any, x: Any, reset: bool) -> Any:
    unmasked("X", x)
    refuse_same_names("X", x)
    if _is_mapped(x) and x.ndim == 2 and x.size and x.dtype.kind in "biuf":
        return np.asarray(validate_data(estimator, x, reset=reset, skip_check_array=True))
    narrow = _float_dtype(x) == np.float32
    return validate_data(
        estimator,
        as_numbers("X", x),
        reset=reset,
        accept_sparse="csr" if get_tags(estimator).input_tags.sparse else False,
        accept_large_sparse=True,
        dtype=np.float32 if narrow else [np.float64, np.float32],
        order="C",
        ensure_all_finite=False,
    )


def _float_dtype(x: Any) -> Any:
    """The dtype that the values of an array are computed in, whatever their order of bytes."""
    dtype = getattr(x, "dtype", None)
    name = dtype.newbyteorder("=").name if isinstance(dtype, np.dtype) else str(dtype)
    return np.float32 if name in (*NARROW, "float32") else np.float64


def _is_mapped(x: Any) -> bool:
    """Whether an array lies in a file: such an array is converted block by block, never whole."""
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
        given = as_numbers("sample_weight", unmasked("sample_weight", sample_weight))
        array = np.asarray(given, dtype=np.float64)
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
