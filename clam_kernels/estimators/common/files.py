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
# The tensors of a frame in a file.
COLUMNS = ("mean", "width", "deviation", "low", "high")

# Exponents of the scale of a table are far below this.
MOST_EXPONENT = 1 << 13
SCALARS = {
    **dict.fromkeys(("inertia_", "beta_", "gap_"), float),
    **dict.fromkeys(("n_features_in_", "n_clusters_used_", "n_iter_", "n_relocated_"), int),
    **dict.fromkeys(("device_", "backend_"), str),
}


class ModelFile:
    """Mixin of an estimator with `cluster_centers_` and `labels_`.

    The class lists the names of its learned arrays in `_arrays`, of its learned numbers in
    `_learned`.
    """

    n_clusters: int
    n_features_in_: int
    cluster_centers_: Any
    labels_: Any
    _arrays: tuple[str, ...]
    _learned: tuple[str, ...]
    _frame: Frame
    _has_frame = False  # whether the class fits in a frame
    _unsaved: tuple[str, ...] = ("callbacks",)  # parameters that a file has as None: no data

    def _center_features(self) -> int:
        """Number of features of `cluster_centers_`."""
        return self.n_features_in_

    def _modules(self) -> dict[str, Tensor]:
        """Tensors of modules for a file, beside the arrays."""
        return {}

    def _check_savable(self) -> None:
        """ValueError if n_clusters was changed since fit: a load of the file would fail."""
        if len(self.cluster_centers_) != self.n_clusters:
            raise ValueError(
                f"n_clusters: expected {len(self.cluster_centers_)}, as it was fitted, got"
                f" {self.n_clusters}; fit again before saving"
            )

    def _check_restored(self) -> None:
        """Check the attributes after a load, and set those that a file does not have."""
        for name in self._learned:
            if name in SCALARS:
                _check_scalar(name, getattr(self, name))
        k, d = self.n_clusters, self.n_features_in_
        centers, labels = self.cluster_centers_, self.labels_
        fits = centers.shape == (k, self._center_features())
        serialize.expect(fits, "shapes do not fit the header")
        known = labels.dtype in (np.int32, np.int64) and labels.ndim == 1
        known = known and bool(((labels >= 0) & (labels < k)).all())
        serialize.expect(known, "labels are not those of its clusters")
        finite = centers.dtype.kind == "f" and bool(np.isfinite(centers).all())
        serialize.expect(finite, "values are not finite")
        names = getattr(self, "feature_names_in_", None)
        serialize.expect(names is None or len(names) == d, "names do not fit the header")
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
            A parameter is no data (a callable, a RandomState); callbacks are not written.
        ValueError
            n_clusters was changed since fit.
        OSError
            The file cannot be written; a file that was there before is unchanged.
        """
        check_is_fitted(self)
        self._check_savable()
        tensors = {name: _host(getattr(self, name)) for name in self._arrays}
        learned = {name: getattr(self, name) for name in self._learned}
        if self._has_frame:
            tensors |= {f"frame.{name}": getattr(self._frame, name).cpu() for name in COLUMNS}
            frame = self._frame
            learned["frame"] = [frame.range, frame.unit, frame.one, frame.is_standard]
        tensors |= self._modules()
        names = getattr(self, "feature_names_in_", None)
        if names is not None:
            learned["feature_names_in_"] = list(names)
        parameters = self.get_params(deep=False)  # type: ignore[attr-defined]
        parameters |= {name: None for name in self._unsaved if name in parameters}
        serialize.save(path, type(self).__name__, parameters, learned, tensors)

    @classmethod
    def load(cls: type[E], path: str | PathLike[str]) -> E:
        """Read a model that `save` wrote; arrays are numpy arrays.

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
            model._check_restored()
        return model

    def _restore(self, learned: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Set the learned attributes to the content of a file."""
        names = learned.pop("feature_names_in_", None)
        frame_names = [f"frame.{name}" for name in COLUMNS] if self._has_frame else []
        known = set(learned) == {*self._learned, *(["frame"] if self._has_frame else [])}
        known = known and set(tensors) == {*self._arrays, *frame_names}
        serialize.expect(known, "its contents are not those of this class")
        if self._has_frame:
            shape = (learned["n_features_in_"],)
            self._frame = _frame_of(tensors, learned.pop("frame"), shape)
        for name in self._arrays:
            setattr(self, name, tensors[name].numpy())
        for name in self._learned:
            setattr(self, name, learned[name])
        if names is not None:
            known = isinstance(names, list) and all(isinstance(name, str) for name in names)
            serialize.expect(known, "names of columns are no text")
            self.feature_names_in_ = np.asarray(names, dtype=object)


def _host(x: Any) -> Tensor:
    return x.cpu() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))


def _check_scalar(name: str, value: Any) -> None:
    kind = SCALARS[name]
    known = type(value) in ((int, float) if kind is float else (kind,))
    serialize.expect(known, f"{name} is no {kind.__name__}")
    serialize.expect(kind is not int or value >= 0, f"{name} is not >= 0")


def _frame_of(tensors: dict[str, Tensor], numbers: Any, shape: tuple[Any, ...]) -> Frame:
    """The frame of a file; its tensors are removed from those of the model."""
    mean, width, deviation, low, high = (tensors.pop(f"frame.{x}").double() for x in COLUMNS)
    for x in (mean, width, deviation, low, high):
        serialize.expect(x.shape == shape, "shapes do not fit the header")
        serialize.expect(bool(x.isfinite().all()), "values are not finite")
    range_, unit, one, standard = numbers
    scale = all(type(x) is int and abs(x) <= MOST_EXPONENT for x in (range_, unit))
    scale = scale and type(one) in (int, float) and one >= 0 and type(standard) is bool
    serialize.expect(scale, "its scale is not one of numbers")
    serialize.expect(bool((width > 0).all()), "widths of columns are not > 0")
    serialize.expect(bool((low <= high).all()), "ranges of columns are empty")
    return Frame(mean, range_, width, unit, float(one), deviation, low, high, standard)
