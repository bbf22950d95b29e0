# SPDX-License-Identifier: Apache-2.0
"""Which rows the per-thread bodies of csrc/ flag as rows in doubt."""

from __future__ import annotations

import ctypes
import importlib
import itertools
from typing import Any

import pytest
import torch
from _csrc_host import (
    SCENES,
    compiled_library,
    errors_of,
    needs_gxx,
    pointers,
    recursion,
    recursion_backward,
    scene,
)
from _watch import rows_in_doubt

pytest.importorskip("triton", reason="triton is missing")
from clam_kernels.kernels.am import cuda

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def library() -> Any:
    return compiled_library()


@pytest.mark.parametrize("d", [2, 4, 8, 16])
@pytest.mark.parametrize("name", SCENES)
def test_a_wrong_row_has_its_flag(library: Any, name: str, d: int) -> None:
    wrong = 0
    for seed, steps in itertools.product(range(4), (1, 2)):
        v, rho, beta = scene(name, d, seed)
        flag, again = torch.full((2, len(v)), 7, dtype=torch.uint8)
        out = recursion(library, v, rho, beta, steps, flag=flag)
        assert set(flag.tolist()) <= {0, 1}
        error, allowed = errors_of(out, v, rho, beta, steps)
        over = ~(error <= allowed)
        assert flag[over].all(), (seed, steps, error[over & (flag == 0)])
        wrong += int(over.sum())
        recursion(library, v, rho, beta, steps, wide=False, tile=4, flag=again)
        assert torch.equal(again, flag)
    assert wrong > 0 or name in ("offset", "large", "tiny")


@pytest.mark.parametrize("d", [2, 3, 8, 11, 16])
@pytest.mark.parametrize("name", SCENES)
def test_a_flagged_row_adds_nothing_to_the_sums(library: Any, name: str, d: int) -> None:
    """Its gradients are 0 for any upstream gradient; other rows do not change."""
    flagged = 0
    for seed, steps in itertools.product(range(3), (1, 3)):
        v, rho, beta = scene(name, d, seed)
        v, flag = v[:45], torch.full((45,), 7, dtype=torch.uint8)
        grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))
        gradients = recursion_backward(library, grad, v, rho, beta, steps, flag=flag)
        flagged_rows = flag == 1
        assert set(flag.tolist()) <= {0, 1}
        for x in (gradients[0], gradients[3]):
            assert not x[flagged_rows].any()
        for x in gradients:
            assert x.isfinite().all()
        grad[flagged_rows] = torch.nan
        for a, b in zip(
            recursion_backward(library, grad, v, rho, beta, steps), gradients, strict=True
        ):
            assert torch.equal(a, b)
        if flagged_rows.all():
            assert not any(x.any() for x in gradients)
        flagged += int(flagged_rows.sum())
    assert flagged > 0 or name == "offset"


@pytest.mark.parametrize("k", [6, 64])
@pytest.mark.parametrize(("d", "beta"), [(4, 0.2), (8, 0.2), (8, 20.0), (16, 0.2), (16, 20.0)])
def test_normal_data_have_no_flag(library: Any, d: int, k: int, beta: float) -> None:
    g = torch.Generator().manual_seed(k)
    rho = torch.randn(k, d, generator=g)
    v = rho[torch.arange(200) % k] + 0.6 * torch.randn(200, d, generator=g)
    flags = torch.full((3, 200), 7, dtype=torch.uint8)
    recursion(library, v, rho, beta, 5, flag=flags[0])
    recursion(library, v, rho, beta, 5, wide=False, flag=flags[1])
    recursion_backward(library, torch.ones_like(v), v, rho, beta, 5, flag=flags[2])
    assert not flags.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_operands_set_no_flag(library: Any, bad: float) -> None:
    """A row alone, or a memory, a beta or a log-weight with all rows: the result is NaN."""
    v, rho, beta = scene("sentinel", 4, 0)
    weights, betas = torch.zeros(6), torch.ones(6)
    flag, back = torch.full((2, 60), 7, dtype=torch.uint8)
    for where, index in ((v, (7, 1)), (rho, (2, 3)), (betas, (4,)), (weights, (1,))):
        row = where[index].item()
        where[index] = bad
        out = recursion(library, v, rho, betas, 2, log_weights=weights, flag=flag)
        recursion_backward(
            library, torch.ones_like(v), v, rho, betas, 2, 1.0, None, weights, flag=back
        )
        for result in (flag, back):
            assert not result[out.isnan().any(-1)].any()
            assert int(result.sum()) == (59 if where is v else 0)
        where[index] = row
    weights[2] = -torch.inf
    rho[2] = bad
    recursion(library, v, rho, beta, 2, log_weights=weights, flag=flag)
    assert flag.all()


def test_rows_that_cannot_be_wrong_have_no_flag(library: Any) -> None:
    v, rho, beta = scene("sentinel", 4, 0)
    flag, back = torch.full((2, 60), 7, dtype=torch.uint8)
    none = torch.full((6,), -torch.inf)
    recursion(library, v, rho, beta, 2, log_weights=none, flag=flag)
    recursion_backward(library, v, v, rho, beta, 2, 1.0, None, none, flag=back)
    assert not flag.any()
    assert not back.any()


def test_a_row_whose_weights_underflow_is_in_doubt(library: Any) -> None:
    """Logits underflow float32: the sum of the weights is 0 or NaN."""
    v, rho = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1e30], [-1e30]])
    flag, back = torch.full((2, 2), 7, dtype=torch.uint8)
    recursion(library, v, rho, 1.0, 1, flag=flag)
    gradients = recursion_backward(library, torch.ones(2, 1), v, rho, 1.0, 1, flag=back)
    assert flag.all()
    assert back.all()
    assert not any(x.any() for x in gradients)


def test_memories_near_the_end_of_float32_have_a_finite_centre(library: Any) -> None:
    """Their sum overflows, their mean does not."""
    v, rho = torch.tensor([[1e38], [3e38]]), torch.tensor([[3e38], [3.2e38], [1e38]])
    flag = torch.full((2,), 7, dtype=torch.uint8)
    recursion(library, v, rho, 1.0, 1, flag=flag)
    assert flag.all()


def test_the_rule_is_that_of_the_kernels_in_triton(library: Any) -> None:
    rule = importlib.import_module("clam_kernels.kernels.am.doubt")
    names = (
        "NEAR_FACTOR", "NEAR_LIMIT", "NEAR_LIMIT_OF_MANY", "FAR_LIMIT", "LOGIT_ERROR", "LONGEST",
        "SHARPEST", "MOST",
    )  # fmt: skip
    values = torch.zeros(len(names))
    library.numbers(*pointers(values))
    for name, number in zip(names, values.tolist(), strict=True):
        assert number == torch.tensor(getattr(rule, name).value).item(), name


def test_the_rule_chooses_the_rows_of_the_rule_in_torch(library: Any) -> None:
    """Norms, distances, weights and betas on both sides of every limit."""
    g = torch.Generator().manual_seed(0)
    x = 10.0 ** (4 * torch.rand(512, 1, generator=g) - 1) * torch.randn(512, 4, generator=g)
    reach = 10.0 ** (-2 * torch.rand(512, 1, generator=g))
    recalled = x + reach * x.norm(dim=-1, keepdim=True) * torch.randn(512, 4, generator=g)
    weights = (12 * torch.rand(512, 3, generator=g)).softmax(-1)
    largest = weights.amax(-1)
    size, along = x.square().sum(-1) + recalled.square().sum(-1), (x * recalled).sum(-1)
    both = set()
    for sharp in (1e-4, 0.1, 1.0, 100.0):
        rows = rows_in_doubt(size, along, weights, sharp)
        flags = torch.zeros(512, dtype=torch.uint8)
        library.doubts(*pointers(x, recalled, largest, flags), ctypes.c_float(sharp), 512)
        assert torch.equal(flags.bool(), rows), sharp
        both.update(rows.tolist())
    assert both == {True, False}


def test_python_knows_the_limit_of_the_backward(library: Any) -> None:
    for d in range(1, 17):
        assert cuda.backward_memories(d) == library.backward_memories(d)
