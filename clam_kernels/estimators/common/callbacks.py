# SPDX-License-Identifier: Apache-2.0
"""Callbacks of a fit: plain callables, or objects with some of `on_fit_begin(estimator)`,
`on_iteration(estimator, info)` and `on_fit_end(estimator)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sklearn.base import BaseEstimator

EVENTS = ("on_fit_begin", "on_iteration", "on_fit_end")


class Callbacks:
    """The callbacks of one fit; each is called with the estimator.

    `callbacks` is the estimator's parameter: None, one callback or several. TypeError if one of
    them is no callback.
    """

    def __init__(self, estimator: BaseEstimator, callbacks: Any) -> None:
        if isinstance(callbacks, Iterator):
            raise TypeError("callbacks: expected a callback or a list of them, got an iterator")
        self.estimator = estimator
        self.callbacks: list[Any] = []
        if callbacks is not None:
            self.callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        for callback in self.callbacks:
            if not callable(callback) and not any(hasattr(callback, name) for name in EVENTS):
                raise TypeError(
                    f"callbacks: expected callables or objects with {', '.join(EVENTS)}, got"
                    f" {type(callback).__name__}"
                )

    def __bool__(self) -> bool:
        return bool(self.callbacks)

    def fit_begin(self) -> None:
        """Call every `on_fit_begin`."""
        self._call("on_fit_begin")

    def iteration(self, info: dict[str, Any]) -> bool:
        """Call every callback after an iteration; return whether one of them ends the fit."""
        return self._call("on_iteration", info)

    def fit_end(self) -> None:
        """Call every `on_fit_end`."""
        self._call("on_fit_end")

    def _call(self, event: str, *arguments: Any) -> bool:
        stop = False
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is None and event == "on_iteration" and callable(callback):
                method = callback
            if method is not None and method(self.estimator, *arguments):
                stop = True
        return stop
