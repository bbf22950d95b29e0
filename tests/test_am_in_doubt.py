# SPDX-License-Identifier: Apache-2.0
"""Which rows the CPU computes again, and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import clam_kernels
from python_fallback.am.exact import ExactRows, ExactSums


def _normal(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _clumps(features: int, reach: float = 1.0) -> tuple[Tensor, Tensor]:
    """400 rows in 10 tight clusters, and 64 of them as memories."""
    centers = reach * _normal(0, 10, features)
    rows = centers[torch.arange(400) % 10] + 0.15 * _normal(1, 400, features)
    return rows, rows[::6][:64].clone()


@pytest.fixture
def rows_by_method(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many rows each method computes."""
    counts = {"Differences": 0, "ExpandedDistances": 0}
    real_tile = ExactRows._tile

    def counted(self: Any, way: Any, *args: Any) -> Any:
        tile = real_tile(self, way, *args)
        counts[type(way).__name__] += int(tile.valid.sum())
        return tile

    monkeypatch.setattr(ExactRows, "_tile", counted)
    return counts


@pytest.mark.parametrize(("features", "k", "beta"), [(1, 64, 4.0), (2, 64, 4.0), (4, 256, 1.0)])
def test_normal_rows_are_not_computed_again(rows_by_method, features, k, beta):
    rho = _normal(0, k, features)
    clam_kernels.am_recursion(_normal(1, 400, features), rho, beta, 5)
    assert sum(rows_by_method.values()) <= 2


def test_no_float64_row_is_in_doubt(rows_by_method):
    rows, rho = _clumps(8)
    clam_kernels.am_recursion(rows.double(), rho.double(), 4.0, 5)
    clam_kernels.am_energy(rows.double(), rho.double(), 4.0)
    assert sum(rows_by_method.values()) == 0


def test_rows_in_a_clump_are_expanded_and_far_rows_are_not(rows_by_method):
    """beta |x|^2 is 100 in the clump and 1e12 for the far rows."""
    rows, rho = _clumps(16)
    clam_kernels.am_step(rows, rho, 4.0)
    assert rows_by_method["ExpandedDistances"] > 150
    assert rows_by_method["Differences"] == 0
    clam_kernels.am_step(1e5 * rows.sign() + rows, 1e5 * rho.sign() + rho, 4.0)
    assert rows_by_method["Differences"] > 150


def _both(rows: Tensor, rho: Tensor, beta: Tensor, lift: Tensor | None) -> list[list[Tensor]]:
    """Results and gradients of each method; energies are those of one beta."""
    results = []
    for centre in (rho.mean(0, keepdim=True), None):
        exact = ExactRows(rho, beta, lift, centre)
        sums = ExactSums(exact)
        gain = torch.rand(rows.shape, generator=torch.Generator().manual_seed(2)).double()
        x, grad = rows.double(), _normal(3, *rows.shape).double()
        outputs = [exact.advance(x, gain, 2), *sums.backward(x, grad, gain, 2)]
        if len(beta) == 1:
            outputs += [exact.energy(x), sums.energy_backward(x, grad[:, 0])]
        outputs += [sums.rho, sums.beta, sums.log_weights]
        results.append(outputs)
    return results


@pytest.mark.parametrize("per_memory", [False, True])
@pytest.mark.parametrize("features", [3, 8])
def test_both_methods_agree(features, per_memory):
    """Also with a masked memory that is NaN."""
    rows, rho = _clumps(features)
    rho, lift = rho[:21], 0.3 * _normal(4, 21)
    rho[4], lift[4] = torch.nan, -torch.inf
    beta = 1.0 + torch.rand(21 if per_memory else 1, generator=torch.Generator().manual_seed(5))
    active = torch.isfinite(lift)
    centre = rho[active].mean(0, keepdim=True)
    exact = ExactRows(rho, beta, lift, centre)
    assert exact.expanded is not None
    clean = rho.clone()
    clean[4] = centre[0]
    for first, second in zip(*_both(rows[:37], clean, beta, lift), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-10)
    far = exact.advance(rows[:37].double(), 1.0, 1)
    torch.testing.assert_close(far, ExactRows(clean, beta, lift).advance(
        rows[:37].double(), 1.0, 1), rtol=1e-9, atol=1e-10)  # fmt: skip


def test_bits_of_an_expanded_row_do_not_depend_on_other_rows(rows_by_method):
    rows, rho = _clumps(7)
    together = clam_kernels.am_recursion(rows, rho, 8.0, 3)
    assert rows_by_method["ExpandedDistances"] > 200
    for n in (0, 17, 399):
        assert torch.equal(clam_kernels.am_recursion(rows[n : n + 1], rho, 8.0, 3)[0], together[n])
    half = clam_kernels.am_recursion(rows[::2], rho, 8.0, 3)
    assert torch.equal(half, together[::2])
