# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the public ops does not grow with N x K."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels import testing

D = 4


def _args(spec: Any, n: int, k: int) -> list[Any]:
    rest: dict[str, Any] = {"beta": torch.tensor(0.5), "steps": 3}
    names = testing.argument_names(spec.name)
    return [torch.randn(n, D), torch.randn(k, D), *(rest[x] for x in names if x in rest)]


def _forward(spec: Any, n: int, k: int) -> int:
    args = _args(spec, n, k)
    return testing.peak_bytes(lambda: spec.packet(*args))


def _both(spec: Any, n: int, k: int) -> int:
    """Forward and backward, for every tensor."""
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and spec.gradient is not None else a
        for a in _args(spec, n, k)
    ]
    leaves = [a for a in args if isinstance(a, Tensor)]

    def call() -> None:
        torch.autograd.grad(spec.packet(*args).sum(), leaves)

    return testing.peak_bytes(call)


def assert_no_n_by_k(measure: Any, spec: Any, n: int = 5000, k: int = 1000) -> None:
    """Nowhere near one N x K array of float32, and four times N x K adds next to nothing.

    What may grow is O(N D + K D): outputs, gradients, and one chunk's scratch, which is bounded.
    """
    small, large = measure(spec, n, k), measure(spec, 2 * n, 2 * k)
    assert large < 0.25 * (2 * n * 2 * k * 4), f"{large} bytes at N x K = {4 * n * k}"
    linear = 4 * 3 * (n + k) * 12 * D  # a dozen arrays as large as the inputs
    assert large - small < linear + 0.05 * (3 * n * k * 4), (small, large)


def test_forward(spec):
    assert_no_n_by_k(_forward, spec)


@pytest.mark.contract(gradient=True)
def test_backward(spec):
    assert_no_n_by_k(_both, spec, 8000, 1500)  # beside it lies the trajectory of a chunk, 16 MB


@pytest.mark.contract(gradient=True)
def test_scratch_is_bounded_in_steps_and_batch(spec):
    """Neither T states nor a broadcast operand are ever held whole."""
    n, k = 20_000, 64
    names = testing.argument_names(spec.name)
    args = _args(spec, n, k)
    if "steps" in names:
        args[names.index("steps")] = 40
        args[0].requires_grad_()
        peak = testing.peak_bytes(lambda: torch.autograd.grad(spec.packet(*args).sum(), args[0]))
        assert peak < 0.5 * 40 * n * (D + k) * 4
    batch = [torch.randn(1, n, D), torch.randn(50, 8, D), *_args(spec, 1, 8)[2:]]
    result = 50 * n * (1 if spec.name == "am_energy" else D) * 4
    assert testing.peak_bytes(lambda: spec.packet(*batch)) < result + 12e6


class _Planted:
    """An op that forms the N x K scores, in a place that no Python hook sees."""

    name, gradient = "am_step", None

    def __init__(self) -> None:
        self.packet = torch.ops.clam_planted.scores


@pytest.fixture(scope="module")
def planted():
    library = torch.library.Library("clam_planted", "DEF")
    library.define("scores(Tensor v, Tensor rho, Tensor beta) -> Tensor")
    library.impl("scores", lambda v, rho, beta: ((v @ rho.mT) * -beta).logsumexp(-1), "CPU")
    yield _Planted()
    library._destroy()


def test_a_planted_n_by_k_temporary_is_caught(planted):
    with pytest.raises(AssertionError, match="bytes at N x K"):
        assert_no_n_by_k(_forward, planted)


def test_the_truth_is_caught(spec):
    """The N x K of the truth, which docs and docstrings admit, is what this measures."""
    truth = type(
        "Truth", (), {"packet": staticmethod(spec.truth), "name": spec.name, "gradient": None}
    )
    with pytest.raises(AssertionError, match="bytes at N x K"):
        assert_no_n_by_k(_forward, truth)


def test_peak_is_a_peak():
    """Freed memory counts at its height, memory from before and the inputs do not."""
    before = torch.zeros(1_000_000)
    assert testing.peak_bytes(lambda: before + 1) == pytest.approx(4e6, rel=0.01)
    assert testing.peak_bytes(lambda: (before + 1).sum() + (before + 2).sum()) == pytest.approx(
        4e6, rel=0.01
    )
    assert testing.peak_bytes(lambda: (before + 1) + (before + 2)) == pytest.approx(12e6, rel=0.01)
    assert testing.peak_bytes(lambda: before.add_(1)) < 1000
