# SPDX-License-Identifier: Apache-2.0
"""`save` and `load` of every estimator: parameters, learned numbers and arrays in one file."""

from __future__ import annotations

from os import PathLike
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ... import serialize
from .frame import Frame

E = TypeVar("E", bound="ModelFile")
# What a file holds of a frame.
COLUMNS = ("mean", "width", "deviation", "low", "high")


class ModelFile:
    """Mixin of an estimator with `cluster_centers_` and `labels_`, which lists its learned arrays
    and numbers.
    """

    n_clusters: int
    n_features_in_: int
    cluster_centers_: Any
    labels_: Any
    _arrays: tuple[str, ...]
    _learned: tuple[str, ...]
    _frame: Frame
    _framed = False  # whether the class fits in a frame

    def _check_savable(self) -> None:
        """ValueError if n_clusters was changed since fit, so that a load would refuse the file."""
        if len(self.cluster_centers_) != self.n_clusters:
            raise ValueError(
                f"n_clusters: expected {len(self.cluster_centers_)}, as it was fitted, got"
                f" {self.n_clusters}; fit again before saving"
            )

    def _restored(self) -> None:
        """Check the restored state, and finish it."""
        k, d = self.n_clusters, self.n_features_in_
        centres, labels = self.cluster_centers_, self.labels_
        none = torch.zeros(d, dtype=torch.float64, device="cpu")
        columns = [getattr(self._frame, name) for name in COLUMNS] if self._framed else [none]
        fits = centres.shape == (k, d) and all(x.shape == (d,) for x in columns)
        serialize.expect(fits, "shapes do not fit the header")
        known = labels.dtype in (np.int32, np.int64) and bool(((labels >= 0) & (labels < k)).all())
        serialize.expect(known, "labels are not those of its clusters")
        finite = bool(np.isfinite(centres).all()) and all(bool(x.isfinite().all()) for x in columns)
        serialize.expect(finite, "values are not finite")
        self._n_features_out = k

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fitted model as one safetensors file, atomically.

        Parameters
        ----------
        path : str or PathLike
            The file; its folder must exist.

        Raises
        ------
        TypeError
            A parameter is no data (a callable, a RandomState); callbacks are left out.
        ValueError
            n_clusters was changed since fit.
        OSError
            The file cannot be written; what was there before is unharmed.
        """
        check_is_fitted(self)
        self._check_savable()
        tensors = {name: _host(getattr(self, name)) for name in self._arrays}
        learned = {name: getattr(self, name) for name in self._learned}
        if self._framed:
            tensors |= {f"frame.{name}": getattr(self._frame, name).cpu() for name in COLUMNS}
            frame = self._frame
            learned["frame"] = [frame.range, frame.unit, frame.one, frame.standard]
        names = getattr(self, "feature_names_in_", None)
        if names is not None:
            learned["feature_names_in_"] = list(names)
        parameters = self.get_params(deep=False)  # type: ignore[attr-defined]
        if "callbacks" in parameters:  # of a fit that is over; a function is no data
            parameters["callbacks"] = None
        serialize.save(path, type(self).__name__, parameters, learned, tensors)

    @classmethod
    def load(cls: type[E], path: str | PathLike[str]) -> E:
        """Read a model that `save` wrote; arrays come back as numpy arrays.

        Parameters
        ----------
        path : str or PathLike
            The file.

        Returns
        -------
        estimator
            Fitted, with the parameters it was fitted with.

        Raises
        ------
        ModelFileError
            The file is truncated, damaged, of another class, or of a newer version.
        FileNotFoundError
            There is no such file.
        """
        parameters, learned, tensors = serialize.load(path, cls.__name__)
        with serialize.reading(path):
            model = cls(**parameters)
            model._validate_params()  # type: ignore[attr-defined]
            model._restore(learned, tensors)
            model._restored()
        return model

    def _restore(self, learned: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        names = learned.pop("feature_names_in_", None)
        if self._framed:
            self._frame = _framed(tensors, learned.pop("frame"))
        known = set(learned) == set(self._learned) and set(tensors) == set(self._arrays)
        serialize.expect(known, "its contents are not those of this class")
        for name in self._arrays:
            setattr(self, name, tensors[name].numpy())
        for name in self._learned:
            setattr(self, name, learned[name])
        if names is not None:
            self.feature_names_in_ = np.asarray(names, dtype=object)


def _host(x: Any) -> Tensor:
    return x.cpu() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))


def _framed(tensors: dict[str, Tensor], numbers: Any) -> Frame:
    """The frame that a file holds; its tensors are taken out of those of the model."""
    mean, width, deviation, low, high = (tensors.pop(f"frame.{x}").double() for x in COLUMNS)
    range_, unit, one, standard = numbers
    serialize.expect(bool((width > 0).all()), "widths of columns are not > 0")
    serialize.expect(bool((low <= high).all()), "ranges of columns are empty")
    return Frame(
        mean, int(range_), width, int(unit), float(one), deviation, low, high, bool(standard)
    )
