# SPDX-License-Identifier: Apache-2.0
"""The per-thread bodies of csrc/, compiled by g++, against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from _csrc_host import (
    BETAS,
    MASKS,
    STEPS,
    WEIGHTS,
    assert_agrees,
    compiled_library,
    draw_log_weights,
    draw_mask,
    needs_gxx,
    pointers,
    recursion,
    recursion_backward,
)
from torch import Tensor

from python_fallback import am

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def library() -> Any:
    return compiled_library()


@pytest.mark.parametrize("d", range(1, 17))
def test_equals_the_reference(library: Any, d: int) -> None:
    """Every K from 1 to 100 for every D; the combinations of options rotate over the sizes."""
    combinations = list(itertools.product(MASKS, WEIGHTS, BETAS, STEPS))
    turn = itertools.islice(itertools.cycle(combinations), 100 * d, None)
    for k in range(1, 101):
        mask_kind, weight_kind, beta, (steps, step) = next(turn)
        g = torch.Generator().manual_seed(1000 * d + k)
        v = torch.randn(64, d, generator=g)
        rho = torch.randn(k, d, generator=g)
        mask, weights = draw_mask(mask_kind, v, g), draw_log_weights(weight_kind, k, g)
        if beta == "per memory":
            beta = torch.rand(k, generator=g) * 2
        args = (v, rho, beta, steps, step, mask, weights)
        for wide, tile in ((True, 4096), (False, 4096), (True, 8)):
            assert_agrees(recursion(library, *args, wide=wide, tile=tile), args, 4.0)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 11, 16])
def test_rows_and_tiles_change_nothing_but_rounding(library: Any, d: int) -> None:
    """A row's bits do not depend on the rows beside it."""
    g = torch.Generator().manual_seed(d)
    v, rho = torch.randn(9, d, generator=g), torch.randn(30, d, generator=g)
    whole = recursion(library, v, rho, 1.5, 4)
    for r in range(9):
        assert torch.equal(recursion(library, v[r : r + 1], rho, 1.5, 4), whole[r : r + 1])
    assert torch.equal(recursion(library, v, rho, 1.5, 4, wide=False), whole)


@pytest.mark.parametrize("d", [1, 3, 8, 16])
def test_far_from_the_origin_and_sharp(library: Any, d: int) -> None:
    """Centring keeps the digits of the expanded distance; a late maximum runs the rescaling
    branch.
    """
    g = torch.Generator().manual_seed(d)
    rho = torch.randn(40, d, generator=g)
    v = rho[:8] + 0.1 * torch.randn(8, d, generator=g)
    for beta in (1.0, 300.0, torch.full((40,), 300.0)):
        args = (v + 1000.0, rho + 1000.0, beta, 3)
        assert_agrees(recursion(library, *args), args, 1000.0)
        args = (v, rho, beta, 3)
        assert_agrees(recursion(library, *args), args, 4.0)
        worst_first = rho[(rho - v[0]).square().sum(-1).argsort(descending=True)]
        args = (v[:1], worst_first, beta, 1)
        assert_agrees(recursion(library, *args), args, 4.0)


def eager(v: Tensor, rho: Tensor, beta: float, steps: int) -> Tensor:
    """The plain torch form: two products and a softmax, the bias folded into the first."""
    bias, keys = -beta * rho.square().sum(-1), (2 * beta * rho).T
    for _ in range(steps):
        v = torch.softmax(torch.addmm(bias, v, keys), -1) @ rho
    return v


@pytest.mark.parametrize(("d", "k", "first"), [(16, 64, 300), (2, 8, 200)])
def test_largest_errors_are_those_of_eager(library: Any, d: int, k: int, first: int) -> None:
    """Over draws of memories, since all rows of one draw share the errors of its table. Some draws
    have a fixed point that barely attracts, where only such errors remain.
    """
    ratios = []
    for seed in range(first, first + 12):
        g = torch.Generator().manual_seed(seed)
        rho = torch.randn(k, d, generator=g)
        near = torch.randint(k, (4096,), generator=g)
        v = 0.5 * torch.randn(4096, d, generator=g) + rho[near]
        args = (v, rho, 3.0 / d, 10)
        truth = am.am_recursion(v.double(), rho.double(), *args[2:])
        errors = [(x - truth).abs().max() for x in (recursion(library, *args), eager(*args))]
        ratios.append(errors[0] / errors[1])
    assert torch.stack(ratios).log().mean().exp() <= 1.5


def test_masked_entries_keep_their_bits(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho = torch.randn(50, 5, generator=g) * 1e3, torch.randn(6, 5, generator=g) + 0.1
    mask = torch.rand(50, 5, generator=g) > 0.5
    out = recursion(library, v, rho, 0.5, 4, update_mask=mask)
    assert torch.equal(out[~mask], v[~mask])
    assert (out[mask] != v[mask]).all()
    assert torch.equal(recursion(library, v, rho, 0.5, 0), v)
    assert torch.equal(recursion(library, v, rho, 0.5, 3, step=0.0), v)


def test_without_active_memories_rows_stay(library: Any) -> None:
    v, rho = torch.randn(5, 3), torch.randn(4, 3)
    masked = torch.full((4,), -torch.inf)
    assert torch.equal(recursion(library, v, rho, 1.0, 3, log_weights=masked), v)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_memory_makes_every_row_nan(library: Any, bad: float) -> None:
    v, rho = torch.randn(9, 3), torch.randn(4, 3)
    rho[2, 1] = bad
    mask = torch.rand(9, 3) > 0.5
    for beta in (0.7, torch.rand(4)):
        out = recursion(library, v, rho, beta, 2, update_mask=mask)
        assert out.isnan().all()
        weights = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
        assert recursion(library, v, rho, beta, 2, log_weights=weights).isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("beta", [0.7, "per memory"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_nan_row_does_not_change_others(
    library: Any, bad: float, beta: Any, weighted: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho = torch.randn(9, 4, generator=g), torch.randn(7, 4, generator=g)
    beta = torch.rand(7, generator=g) if beta == "per memory" else beta
    weights = torch.randn(7, generator=g) if weighted else None
    if weights is not None:
        weights[:2] = -torch.inf
    broken = v.clone()
    broken[4, 2] = bad
    fine = recursion(library, v, rho, beta, 2, log_weights=weights)
    out = recursion(library, broken, rho, beta, 2, log_weights=weights)
    assert out[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(out[others], fine[others])


def test_the_centre_is_the_mean_of_active_memories(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    for k, d in ((1, 1), (7, 3), (32, 16), (33, 5), (200, 8)):
        rho = torch.randn(k, d, generator=g) + 100.0
        weights = torch.randn(k, generator=g)
        result = torch.zeros(d + 1)
        for log_weights in (None, weights):
            active = torch.ones(k, dtype=torch.bool)
            if log_weights is not None:
                log_weights[::2] = -torch.inf
                rho[::2] = torch.nan
                active = log_weights > -torch.inf
            library.centre(*pointers(rho, log_weights, result), k, d)
            assert result[d] == active.sum()
            if active.any():
                mean = rho[active].double().mean(0)
                assert (result[:d] - mean).abs().max() <= 4e-7 * 100
            else:
                assert torch.equal(result[:d], torch.zeros(d))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 2, 4, 7, 16])
def test_loads_half_precision(library: Any, dtype: torch.dtype, d: int) -> None:
    """Each pattern of 16 bits is loaded as its value; a recursion computes in float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = bits[: len(bits) // d * d].reshape(-1, d)
    rho = torch.zeros(1, d, dtype=dtype)
    for wide in (True, False):
        out = recursion(library, bits, rho, 1.0, 0, wide=wide)
        assert torch.equal(out.nan_to_num(nan=-7.0), bits.float().nan_to_num(nan=-7.0))
    g = torch.Generator().manual_seed(d)
    v, rho = (torch.randn(n, d, generator=g).to(dtype) for n in (40, 9))
    assert torch.equal(
        recursion(library, v, rho, 2.0, 3), recursion(library, v.float(), rho.float(), 2.0, 3)
    )


def test_a_masked_memory_may_have_any_values(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho, grad = (torch.randn(n, 3, generator=g) for n in (40, 20, 40))
    weights = torch.randn(20, generator=g)
    weights[[0, 5, 19]] = -torch.inf
    fine = recursion(library, v, rho, 1.0, 3, log_weights=weights)
    args = (1.0, 3, 0.7, None, weights)
    slopes = recursion_backward(library, grad, v, rho, *args)
    for bad in (torch.nan, torch.inf, 1e30):
        rho[[0, 5, 19]] = bad
        assert torch.equal(recursion(library, v, rho, 1.0, 3, log_weights=weights), fine)
        for a, b in zip(recursion_backward(library, grad, v, rho, *args), slopes, strict=True):
            assert torch.equal(a, b)
    assert (slopes[1][[0, 5, 19]] == 0).all()
