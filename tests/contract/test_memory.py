# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the public ops does not grow with N x K."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels import testing

D = 4


def _forward(function: Any, op: str, n: int, k: int) -> int:
    args = testing.large(op, torch.float32, n=n, k=k, d=D).args
    return testing.peak_bytes(lambda: function(*args))


def _both(function: Any, op: str, n: int, k: int) -> int:
    """Forward and backward, for every tensor; without the gradients themselves."""
    args = testing.leaves_of(testing.large(op, torch.float32, n=n, k=k, d=D).args)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    one = testing.single(op, function)
    peak = testing.peak_bytes(lambda: torch.autograd.grad(one(*args).sum(), leaves))
    return peak - sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def assert_no_n_by_k(measure: Any, n: int = 5000, k: int = 1000) -> None:
    """The peak is far below one N x K array of float32, and four times N x K adds almost nothing.
    Outputs, gradients, and the bounded scratch of one chunk may grow: O(N D + K D).
    """
    small, large = measure(n, k), measure(2 * n, 2 * k)
    assert large < 0.25 * (2 * n * 2 * k * 4), f"{large} bytes at N x K = {4 * n * k}"
    linear = 4 * 3 * (n + k) * 12 * D  # a dozen arrays as large as the inputs
    assert large - small < linear + 0.05 * (3 * n * k * 4), (small, large)


def test_forward(spec):
    assert_no_n_by_k(partial(_forward, spec.packet, spec.name))


@pytest.mark.contract(gradient=True)
def test_backward(spec):
    # plus the trajectory of a chunk, 16 MB
    assert_no_n_by_k(partial(_both, spec.packet, spec.name), 5000, 1000)


def test_an_n_by_k_temporary_fails_the_check():
    """An op that forms the N x K scores where no Python hook sees them."""
    library = torch.library.Library("clam_planted", "DEF")
    library.define("scores(Tensor x, Tensor y) -> Tensor")
    library.impl("scores", lambda x, y: (x @ y.mT).logsumexp(-1), "CPU")

    def measure(n: int, k: int) -> int:
        x, y = torch.randn(n, D), torch.randn(k, D)
        return testing.peak_bytes(lambda: torch.ops.clam_planted.scores(x, y))

    try:
        with pytest.raises(AssertionError, match="bytes at N x K"):
            assert_no_n_by_k(measure)
    finally:
        library._destroy()


def test_the_truth_fails_the_check(spec):
    """The truth makes N x K arrays, as docs and docstrings say; the measure sees them."""
    with pytest.raises(AssertionError, match="bytes at N x K"):
        assert_no_n_by_k(partial(_forward, spec.truth, spec.name), 2500, 500)


def test_peak_counts_freed_memory():
    """Freed memory counts at its peak; memory from before and the inputs do not count."""
    before = torch.zeros(1_000_000)
    assert testing.peak_bytes(lambda: before + 1) == pytest.approx(4e6, rel=0.01)
    assert testing.peak_bytes(lambda: (before + 1).sum() + (before + 2).sum()) == pytest.approx(
        4e6, rel=0.01
    )
    assert testing.peak_bytes(lambda: (before + 1) + (before + 2)) == pytest.approx(12e6, rel=0.01)
    assert testing.peak_bytes(lambda: before.add_(1)) < 1000
