# SPDX-License-Identifier: Apache-2.0
"""The rows of a DEC: matrices by scikit-learn's rules, other data by those of all trainers; the
scale in which the encoder gets them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator
from torch import Tensor

from ... import tables
from ..._core import checks
from ..common.columns import STANDARDISED_CONTRAST, frame_of, warn_of_units
from ..common.frame import Frame
from ..common.rows import Rows, read_rows
from ..common.scale import scale_tensor
from ..training.inputs import PROBES, Inputs, digest, inputs_of

# Columns are centred where a mean is more than so many typical deviations from 0.
FAR = 10.0


class MatrixInputs(Inputs):
    """The rows of a matrix that scikit-learn's checks have read."""

    is_checked = True

    def __init__(self, rows: Rows) -> None:
        self.rows, self.count = rows, len(rows)
        self.origin = rows.origin if rows.is_tensor else None

    def raw(self, rows: Tensor) -> Tensor:
        return self.rows.take(rows)

    def mark(self) -> list[Any]:
        places = np.linspace(0, self.count - 1, min(self.count, PROBES)).astype(np.int64)
        probes = self.rows.take(torch.from_numpy(places)).cpu().contiguous()
        name = str(probes.dtype).removeprefix("torch.")
        return [self.count, self.rows.features, name, digest(probes.numpy().tobytes())]

    def give(self, result: Tensor) -> Any:
        result = result.detach()
        return self.rows.give(result) if result.is_floating_point() else self._labels(result)

    def _labels(self, labels: Tensor) -> Any:
        return self.rows.give_labels(labels)


@dataclass(frozen=True)
class InputScale:
    """(x - shift) / divisor, for rows of a shape."""

    shift: Tensor  # [features] float64
    divisor: Tensor
    shape: tuple[int, ...]  # of one row, as the encoder gets it

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> InputScale:
        """No change of any entry."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        features = math.prod(shape)
        return cls(torch.zeros(features, **options), torch.ones(features, **options), shape)

    @functools.cached_property
    def is_identity(self) -> bool:
        """Whether no entry changes."""
        return not bool(self.shift.any()) and bool((self.divisor == 1).all())

    def on(self, device: torch.device) -> InputScale:
        """The scale on a device."""
        if self.shift.device == device:
            return self
        return dataclasses.replace(
            self, shift=self.shift.to(device), divisor=self.divisor.to(device)
        )

    def apply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [B, ...] in this scale and shape."""
        features = math.prod(self.shape)
        fits = x[0].numel() == features
        checks.expect(fits, "data", f"rows of {features} numbers", f"shape {list(x.shape)}")
        if not self.is_identity:
            x = (x.flatten(1).double() - self.shift) / self.divisor
        return x.to(dtype).reshape(len(x), *self.shape)


class ScaledInputs(Inputs):
    """The rows of other inputs in the scale of an encoder."""

    def __init__(self, inner: Inputs, scale: InputScale, is_own: bool) -> None:
        """`is_own`: whether the encoder is the user's, which may take whole numbers."""
        self.is_own = is_own
        self.inner, self.scale, self.count = inner, scale, len(inner)
        self.origin, self.files, self.images = inner.origin, inner.files, inner.images
        self.is_static, self.is_checked = inner.is_static, inner.is_checked

    def raw(self, rows: Tensor) -> Tensor:
        return self.inner.raw(rows)

    def take(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        x = self.inner.raw(rows).to(device)
        self.scale = self.scale.on(x.device)
        dtype = self.inner.batch_dtype(x.dtype, dtype) if self.is_own else dtype
        batch = self.scale.apply(x, dtype)
        self.check_finite(batch, rows)
        return batch

    def mark(self) -> list[Any]:
        content = torch.stack((self.scale.shift, self.scale.divisor)).cpu().numpy().tobytes()
        return [*self.inner.mark(), list(self.scale.shape), digest(content)]

    def give(self, result: Tensor) -> Any:
        return self.inner.give(result)


def read(
    estimator: BaseEstimator,
    x: Any,
    device: str,
    images: tuple[str | None, int | None],
    reset: bool,
) -> tuple[Inputs, tuple[int, ...]]:
    """(the rows of X, the shape of one row); `images` are mode and side of the images of a folder.

    A matrix is checked by scikit-learn's rules; an array of more dimensions is one, whose rows are
    its items. The estimator gets `n_features_in_` where `reset`.
    """
    if isinstance(x, str | os.PathLike) and not Path(x).is_dir():
        x = tables.read_array(Path(x))
    if _is_dataset(x):
        inputs = inputs_of(x, images[1], images[0])
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        shape = tuple(inputs.raw(first).shape[1:])
        _check_features(estimator, math.prod(shape), reset)
        return inputs, shape
    shape = ()
    if isinstance(x, list | tuple):
        x = _array_of_items(x)
    if isinstance(x, Tensor | np.ndarray) and x.ndim > 2:
        shape = tuple(x.shape[1:])
        x = x.reshape(len(x), math.prod(shape))
    rows = read_rows(estimator, x, device=device, reset=reset)
    return MatrixInputs(rows), shape or (rows.features,)


def _is_dataset(x: Any) -> bool:
    """Whether X is a folder or a Dataset, whose rows no matrix has."""
    if isinstance(x, str | os.PathLike | torch.utils.data.Dataset):
        return True
    is_array = isinstance(x, list | tuple | Tensor | np.ndarray) or sparse.issparse(x)
    is_array = is_array or any(hasattr(x, name) for name in ("__array__", "columns", "shape"))
    return not is_array and hasattr(x, "__getitem__") and hasattr(x, "__len__")


def _array_of_items(x: Any) -> Any:
    """Nested lists as an array if they have more than two levels."""
    try:
        array = np.asarray(x)
    except ValueError:  # lists of several lengths: scikit-learn raises
        return x
    return array if array.ndim > 2 else x


def _check_features(estimator: BaseEstimator, features: int, reset: bool) -> None:
    """Store the numbers of a row, or ValueError in scikit-learn's wording for another number."""
    if reset:
        estimator.n_features_in_ = features
        estimator.__dict__.pop("feature_names_in_", None)
    elif features != estimator.n_features_in_:
        name = type(estimator).__name__
        raise ValueError(
            f"X has {features} features, but {name} is expecting {estimator.n_features_in_}"
            " features as input."
        )


def scale_of(
    inputs: Inputs, shape: tuple[int, ...], names: Any, standardize: str | bool, is_paper: bool
) -> InputScale:
    """The scale of a fit: a Dataset and a folder keep theirs.

    Columns of unlike range (`standardize="auto"`) become (x - mean) / deviation. Other columns are
    divided by one number: the largest magnitude, for the paper the root of the mean square of all
    entries. They are centred before it only where they are far from 0.
    """
    if not isinstance(inputs, MatrixInputs):
        return InputScale.identity(shape)
    rows = inputs.rows
    frame = frame_of(rows, None, names, standardize is True)
    if standardize == "auto" and _has_unlike_ranges(frame):
        frame = frame_of(rows, None, names, True)
    frame = frame.on(torch.device("cpu"))
    if standardize is False:
        warn_of_units(frame)
    mean = scale_tensor(frame.mean, frame.range)
    deviation = scale_tensor(frame.deviation * frame.width, frame.range)
    if frame.is_standard:
        return InputScale(mean, torch.where(deviation > 0, deviation, 1.0), shape)
    top = max(float(frame.low.abs().max()), float(frame.high.abs().max())) or 1.0
    typical = float((deviation / top).square().mean().sqrt())
    is_far = float((mean / top).abs().max()) > FAR * typical > 0
    shift = mean if is_far else torch.zeros_like(mean)
    if is_paper:
        square = (deviation / top).square() + ((mean - shift) / top).square()
        divisor = top * math.sqrt(float(square.mean()))
    else:
        ends = torch.maximum((frame.low - shift).abs(), (frame.high - shift).abs())
        divisor = float(ends.max())
    return InputScale(shift, torch.full_like(mean, divisor or 1.0), shape)


def _has_unlike_ranges(frame: Frame) -> bool:
    """Whether the range of one column is more than 256 times that of another.

    Ranges, not deviations as in ClAM: a pixel of 8 bits that is seldom above 0 has a small
    deviation, and an image must not be divided by that.
    """
    ranges = frame.high - frame.low
    ranges = ranges[ranges > 0]
    return len(ranges) > 0 and float(ranges.max() / ranges.min()) > STANDARDISED_CONTRAST
