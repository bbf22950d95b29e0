# SPDX-License-Identifier: Apache-2.0
"""Callbacks of a fit: plain callables, or objects with some of `on_fit_begin(estimator)`,
`on_iteration(estimator, info)` and `on_fit_end(estimator)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

EVENTS = ("on_fit_begin", "on_iteration", "on_fit_end")


def each(callbacks: Any) -> list[Any]:
    """The callbacks of a parameter that is None, one of them or several."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]


def call(callbacks: list[Any], event: str, *arguments: Any) -> bool:
    """Tell every callback; whether one of them asks to stop, by returning what is true."""
    stop = False
    for callback in callbacks:
        method = getattr(callback, event, None)
        if method is None and event == "on_iteration" and callable(callback):
            method = callback
        if method is not None and method(*arguments):
            stop = True
    return stop


def check(callbacks: Any) -> None:
    """TypeError for what is no callback."""
    if isinstance(callbacks, Iterator):
        raise TypeError("callbacks: expected a callback or a list of them, got an iterator")
    for callback in each(callbacks):
        if not callable(callback) and not any(hasattr(callback, name) for name in EVENTS):
            raise TypeError(
                f"callbacks: expected callables or objects with {', '.join(EVENTS)}, got"
                f" {type(callback).__name__}"
            )


def tell(text: str) -> None:
    """Print what a verbose fit says."""
    print(text)
