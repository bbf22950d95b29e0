# SPDX-License-Identifier: Apache-2.0
"""Checks of tensors and entries, devices, backends; the method `fit_predict`; and a decorator of
fits, by which a failed fit changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from sklearn.base import BaseEstimator, ClusterMixin
from torch import Tensor

from ...exceptions import BackendUnavailableError
from .numbers import as_numbers

# Dtypes of data whose values float32 holds.
NARROW = ("bool", "int8", "uint8", "int16", "uint16", "float16", "bfloat16", "float32")
F = TypeVar("F", bound=Callable[..., Any])


class FitPredict(ClusterMixin):
    """Mixin of an estimator whose `fit` takes weights of rows and sets `labels_`."""

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit, and the labels of the rows.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.

        Returns
        -------
        array [N], int32, or for a tensor Tensor [N], int64, on its device
            `labels_`.
        """
        return self.fit(X, sample_weight=sample_weight).labels_


def computed_dtype(x: Any) -> torch.dtype:
    """The dtype that estimators compute data in: float32 for types of at most 16 bits and for
    float32, else float64. `x` is a tensor, an array, a sparse matrix or a data frame.
    """
    dtype = getattr(x, "dtype", None)
    if hasattr(dtype, "newbyteorder"):  # numpy's, in any byte order
        name = dtype.newbyteorder("=").name  # type: ignore[union-attr]
    else:
        name = str(dtype).removeprefix("torch.")
    return torch.float32 if name in NARROW else torch.float64


def read_tensor(estimator: BaseEstimator, x: Tensor, reset: bool) -> Tensor:
    """A tensor's values in float32 or float64; errors have scikit-learn's wording."""
    name = type(estimator).__name__
    if x.layout != torch.strided:
        raise TypeError(f"X: expected a dense tensor, got one of layout {x.layout}")
    if x.device.type == "meta":
        raise ValueError("X: expected a tensor with values, got one on device meta")
    if x.is_complex():
        raise ValueError("Complex data not supported")
    if x.ndim != 2:
        raise ValueError(f"Expected 2D tensor, got {x.ndim}D tensor instead: reshape to [N, D].")
    for count, word in ((x.shape[0], "sample"), (x.shape[1], "feature")):
        if count == 0:
            raise ValueError(
                f"Found tensor with 0 {word}(s) (shape={tuple(x.shape)}) while a minimum of 1 is"
                f" required by {name}."
            )
    if reset:
        estimator.n_features_in_ = x.shape[1]
        estimator.__dict__.pop("feature_names_in_", None)
    elif x.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {x.shape[1]} features, but {name} is expecting"
            f" {estimator.n_features_in_} features as input."
        )
    as_numbers("X", x)
    return x.detach().to(computed_dtype(x))


def refuse_bad_entries(
    name: str, values: Tensor, allow_nan: bool = False, first_row: int = 0
) -> None:
    """ValueError, which names the first bad entry; `name` is that of the estimator's class."""
    if bool(values.sum().isfinite()):  # one pass, and true for most data
        return
    bad = values.isinf() if allow_nan else ~values.isfinite()
    count = int(bad.sum())
    if count == 0:
        return
    row, column = (int(i) for i in bad.nonzero()[0])
    what = "NaN" if bool(values[row, column].isnan()) else "infinity"
    hint = "; impute them first, or use ClAM, for which NaN is a missing value."
    hint = ", and NaN for what is missing." if allow_nan else hint
    raise ValueError(
        f"Input X contains {what}: {count} bad entr{'y' if count == 1 else 'ies'}, the first at row"
        f" {first_row + row}, column {column}. {name} takes finite values{hint}"
    )


def choose_device(name: str, origin: torch.device | None) -> torch.device:
    """The device of a fit: "auto" is the tensor's device, for arrays a GPU if there is one."""
    if name == "auto":
        return origin or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise BackendUnavailableError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            devices = f"{count or 'no'} CUDA device{'s' if count > 1 else ''}"
            raise BackendUnavailableError(
                f"device: expected one of this machine, which has {devices}, got {name!r}"
            )
    return device


def keeps_state_on_failure(fit: F) -> F:
    """A method `fit` after whose error, Ctrl-C too, the estimator is as it was before.

    A fit inside `torch.no_grad()` or `inference_mode()` trains all the same.
    """

    @functools.wraps(fit)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = dict(self.__dict__)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return fit(self, *args, **kwargs)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    return wrapped  # type: ignore[return-value]
