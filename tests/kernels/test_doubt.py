# SPDX-License-Identifier: Apache-2.0
"""PyTorch and Triton have the same rule for which rows are computed again."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from _interpreted import NEEDS_INTERPRETER
from _watch import rows_in_doubt

pytest.importorskip("triton", reason="triton is missing")
import triton
import triton.language as tl

from python_fallback.am import doubt

pytestmark = NEEDS_INTERPRETER
ROWS, MEMORIES = 512, 3


def _rule() -> Any:
    return importlib.import_module("clam_kernels.kernels.am.doubt")


def test_both_rules_have_the_same_numbers():
    rule, unit = _rule(), 2.0**-24
    assert rule.NEAR_FACTOR.value * doubt.NEAR_PART == 1
    assert rule.LOGIT_ERROR.value == doubt.LOGIT_ERROR * unit
    assert (rule.NEAR_LIMIT.value, rule.FAR_LIMIT.value) == (doubt.NEAR_LIMIT, doubt.FAR_LIMIT)
    assert rule.NEAR_LIMIT_OF_MANY.value == doubt.NEAR_LIMIT_OF_MANY
    assert rule.NEAR_LIMIT_OF_ENERGY.value == doubt.NEAR_LIMIT_OF_ENERGY
    assert rule.NEAR_FACTOR_OF_ENERGY.value * doubt.NEAR_PART_OF_ENERGY == 1
    assert rule.LONGEST.value == doubt.LARGEST[torch.float32]
    assert rule.LARGEST_LOGIT.value == doubt.LARGEST_LOGIT[torch.float32]


def test_both_rules_choose_the_same_rows():
    """Norms, distances, weights and betas on both sides of every limit."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    size = 10.0 ** (8 * draw(ROWS) - 2)
    far = size * 10.0 ** (-3 * draw(ROWS))
    weights = (12 * draw(ROWS, MEMORIES)).softmax(-1)
    total = 1 / weights.amax(-1)
    both = set()
    for sharp in (1e-4, 0.1, 1.0, 100.0):
        rows = rows_in_doubt(size, (size - far) / 2, weights, sharp)
        flags = torch.zeros(ROWS, dtype=torch.int32)
        doubts_kernel[(1,)](size, far, total, sharp, flags, ROWS)
        assert torch.equal(flags.bool(), rows), sharp
        both.update(rows.tolist())
    assert both == {True, False}


@triton.jit
def doubts_kernel(SIZE, FAR, TOTAL, sharp, DOUBTS, ROWS: tl.constexpr):
    i = tl.arange(0, ROWS)
    size, far, total = tl.load(SIZE + i), tl.load(FAR + i), tl.load(TOTAL + i)
    tl.store(DOUBTS + i, doubted(size, far, total, sharp, 1.0, 0.0, NEAR_LIMIT).to(tl.int32))


doubted, NEAR_LIMIT = _rule().doubted, _rule().NEAR_LIMIT
