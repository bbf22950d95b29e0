# SPDX-License-Identifier: Apache-2.0
"""What the estimators share: checks of tensors and entries, devices, and that a failed fit changes
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...exceptions import BackendUnavailableError, needs
from .numbers import as_numbers

NARROW = ("bool", "int8", "uint8", "int16", "uint16", "float16")
F = TypeVar("F", bound=Callable[..., Any])


def read_tensor(estimator: Any, x: Tensor, reset: bool) -> Tensor:
    """A tensor's values in float32 or float64, by scikit-learn's rules and in its words."""
    name = type(estimator).__name__
    if x.layout != torch.strided:
        raise TypeError(f"X: expected a dense tensor, got one of layout {x.layout}")
    if x.device.type == "meta":
        raise ValueError("X: expected a tensor with values, got one on device meta")
    if x.is_complex():
        raise ValueError("Complex data not supported")
    if x.ndim != 2:
        raise ValueError(f"Expected 2D tensor, got {x.ndim}D tensor instead: reshape to [N, D].")
    for count, word, kind in ((x.shape[0], "sample", "shape"), (x.shape[1], "feature", "shape")):
        if count == 0:
            raise ValueError(
                f"Found tensor with 0 {word}(s) ({kind}={tuple(x.shape)}) while a minimum of 1 is"
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
    narrow = str(x.dtype).removeprefix("torch.") in (*NARROW, "bfloat16", "float32")
    return x.detach().to(torch.float32 if narrow else torch.float64)


def refuse_bad_entries(
    estimator: Any, values: Tensor, allow_nan: bool = False, first_row: int = 0
) -> None:
    """ValueError that names the first bad entry; a finite sum settles the common case in one
    pass.
    """
    if bool(values.sum().isfinite()):
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
        f" {first_row + row}, column {column}. {type(estimator).__name__} takes finite values{hint}"
    )


def choose_device(wanted: str, origin: torch.device | None) -> torch.device:
    """Where to compute: "auto" is the tensor's device, for arrays a GPU if there is one."""
    if wanted == "auto":
        return origin or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {wanted!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise BackendUnavailableError(f"device: expected 'auto', 'cpu' or 'cuda', got {wanted!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"{count or 'no'} CUDA device{'s' if count > 1 else ''}"
            raise BackendUnavailableError(
                f"device: expected one of this machine, which has {there}, got {wanted!r}"
            )
    return device


def progress_bar(name: str, total: int, word: str = "epoch", done: int = 0) -> Any:
    """A bar over epochs, or what `word` says, on stderr."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(needs("verbose: a progress bar", "tqdm", "progress")) from None
    return tqdm(total=total, initial=done, desc=name, unit=word, leave=False)


def _python_numbers(estimator: Any) -> dict[str, int | float]:
    """The parameters that are numpy's numbers, by name, as Python's."""
    return {
        name: int(value) if isinstance(value, np.integer) else float(value)
        for name, value in estimator.__dict__.items()
        if isinstance(value, np.integer | np.floating) and not name.endswith("_")
    }


def keeps_state_on_failure(fit: F) -> F:
    """Whatever ends a fit early, Ctrl-C too, leaves the estimator as it was before.

    A fit inside `torch.no_grad()` or `inference_mode()` trains all the same. While it runs, numbers
    of numpy among the parameters are Python's: torch refuses some, and a uint8 overflows.
    """

    @functools.wraps(fit)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = dict(self.__dict__)
        numbers = _python_numbers(self)
        self.__dict__.update(numbers)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                result = fit(self, *args, **kwargs)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        for name, number in numbers.items():
            if self.__dict__.get(name) is number:  # a callback may have set another
                self.__dict__[name] = before[name]
        return result

    return wrapped  # type: ignore[return-value]
