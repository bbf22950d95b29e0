# SPDX-License-Identifier: Apache-2.0
"""The verdict on an op's outputs and gradients beside float64, for the tests and
bench/gpu/fresh.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from clam_kernels import testing


def assert_accurate(
    draws: Sequence[tuple[Any, Any, Any]],
    *,
    output_scale: Callable[[int], float] = lambda i: 0.0,
    output_eps: Callable[[Tensor], float | None] = lambda output: None,
    gradient_scale: float = 1.0,
) -> None:
    """Compare (ours, float64, eager) of several draws of a call, output by output and gradient by
    gradient, by the rule of `testing.assert_close_on_average`.
    """
    first = draws[0][0]
    for i in range(len(first.outputs)):
        triples: list[Any] = [tuple(values.outputs[i] for values in draw) for draw in draws]
        testing.assert_close_on_average(
            triples, what=f"output {i}", scale=output_scale(i), eps=output_eps(triples[0][0])
        )
    for name in first.gradients:
        triples = [tuple(values.gradients[name] for values in draw) for draw in draws]
        testing.assert_close_on_average(triples, what=f"gradient of {name}", scale=gradient_scale)
