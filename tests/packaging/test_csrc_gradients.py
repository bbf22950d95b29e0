# SPDX-License-Identifier: Apache-2.0
"""The gradients of the per-thread bodies of csrc/ against autograd in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from _csrc_host import (
    MASKS,
    WEIGHTS,
    assert_gradients_agree,
    compiled_library,
    draw_log_weights,
    draw_mask,
    needs_gxx,
    recursion_backward,
)

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def library() -> Any:
    return compiled_library()


@pytest.mark.parametrize("d", range(1, 17))
def test_gradients_equal_autograd(library: Any, d: int) -> None:
    betas = (0.3, torch.tensor([0.0]), torch.tensor([0.7]), torch.tensor([4.0]), "per memory")
    steps = ((1, 1.0), (1, 0.5), (2, 0.7), (5, 0.3), (5, 1.0), (3, 1.4))
    combinations = list(itertools.product(MASKS, WEIGHTS, betas, steps))
    turn = itertools.islice(itertools.cycle(combinations), 23 * d, None, 7)
    for k in (1, 2, 3, 5, 8, 13, 15, 16, 17, 20, 31, 32, 33, 48, 64, 90):
        mask_kind, weight_kind, beta, (count, step) = next(turn)
        g = torch.Generator().manual_seed(1000 * d + k)
        v, grad = torch.randn(75, d, generator=g), torch.randn(75, d, generator=g)
        rho = torch.randn(k, d, generator=g)
        mask, weights = draw_mask(mask_kind, v, g), draw_log_weights(weight_kind, k, g)
        if weights is not None and weight_kind == "some masked":
            weights[k // 2] = 0.0
        if isinstance(beta, str):
            beta = torch.rand(k, generator=g) * 2
        assert_gradients_agree(library, grad, (v, rho, beta, count, step, mask, weights))


@pytest.mark.parametrize("d", [1, 3, 8, 16])
def test_gradients_far_from_the_origin_and_sharp(library: Any, d: int) -> None:
    g = torch.Generator().manual_seed(d)
    rho = torch.randn(40, d, generator=g)
    v, grad = rho[:36] + 0.1 * torch.randn(36, d, generator=g), torch.randn(36, d, generator=g)
    for beta in (torch.tensor([1.0]), torch.tensor([300.0]), torch.full((40,), 300.0)):
        for shift in (0.0, 1000.0):
            assert_gradients_agree(
                library, grad, (v + shift, rho + shift, beta, 3, 1.0, None, None)
            )


def test_gradients_that_vanish_are_zero(library: Any) -> None:
    """With one active memory p = 1 to the last bit; with none the gradient passes through."""
    g = torch.Generator().manual_seed(0)
    for d in range(1, 17):
        v, grad, rho = (torch.randn(n, d, generator=g) for n in (40, 40, 9))
        for beta in (5.0, torch.rand(9, generator=g)):
            one = torch.where(torch.arange(9) == 4, 0.3, -torch.inf)
            grad_v, _, beta_gradient, _, weights = recursion_backward(
                library, grad, v, rho, beta, 3, 1.0, None, one
            )
            assert not grad_v.any()
            assert not beta_gradient.any()
            assert not weights.any()
            none = torch.full((9,), -torch.inf)
            gradients = recursion_backward(library, grad, v, rho, beta, 3, 1.0, None, none)
            assert torch.equal(gradients[0], grad)
            assert not any(x.any() for x in gradients[1:])


def test_a_nan_row_does_not_change_other_gradients(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    v, grad, rho = (torch.randn(n, 4, generator=g) for n in (70, 70, 20))
    fine = recursion_backward(library, grad, v, rho, 0.7, 2)
    v[40, 1] = torch.nan
    gradients = recursion_backward(library, grad, v, rho, 0.7, 2)
    others = torch.arange(70) != 40
    assert gradients[0][40].isnan().all()
    assert torch.equal(gradients[0][others], fine[0][others])
    assert gradients[1].isnan().all()
