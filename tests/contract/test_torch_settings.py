# SPDX-License-Identifier: Apache-2.0
"""No public call depends on torch's default device or default dtype, or leaves the state of the
process changed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _entries import ALL, same
from _state import state

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@functools.cache
def _wanted(name: str) -> Any:
    return ALL[name]()


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# "meta" has no values: a tensor made there by mistake cannot be read
SETTINGS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),
    "dtype": _default_dtype,
}

CASES = [(name, setting) for name in ALL for setting in SETTINGS]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_results_are_those_without_the_setting(name, setting):
    expected = _wanted(name)  # the first call may import modules that set their own state
    before = state()
    with SETTINGS[setting]():
        result = ALL[name]()
    same(result, expected)
    assert state() == before
