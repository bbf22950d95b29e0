# SPDX-License-Identifier: Apache-2.0
"""A compiler backend for tests that count graphs."""

from __future__ import annotations

from typing import Any


class Counting:
    """The backend aot_eager, with a count of its compilations."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.compiled += 1
        return aot_eager(graph, inputs)
