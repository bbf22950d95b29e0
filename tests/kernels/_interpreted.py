# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Triton kernels share: marks for the interpreter, and random operands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS
from torch import Tensor

pytest.importorskip("triton", reason="triton is missing")
ROOT = Path(__file__).parents[2]
NEEDS_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1 in this process"
)
# The `backend` fixture lays every buffer between guard bands.
INTERPRETED_BACKEND = pytest.mark.parametrize(
    "backend", [one for one in BACKENDS if one.interpreted], indirect=True, ids=["interpreted"]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
