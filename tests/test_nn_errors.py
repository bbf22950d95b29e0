# SPDX-License-Identifier: Apache-2.0
"""The errors of the layers, verbatim."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clam_kernels.nn import AssociativeMemory


def _new(**options: Any) -> Any:
    return lambda: AssociativeMemory(**{"n_memories": 3, "n_features": 4, **options})


def _stored(patterns: Any = None, **options: Any) -> Any:
    patterns_or_zeros = torch.zeros(3, 4) if patterns is None else patterns
    return lambda: AssociativeMemory.from_patterns(patterns_or_zeros, **options)


def _called(*args: Any, method: str = "forward", **options: Any) -> Any:
    beta = options.pop("beta", 1.0)
    return lambda: getattr(AssociativeMemory(3, 4, beta=beta), method)(*args, **options)


def _set(value: Any, beta: Any = 1.0) -> Any:
    return lambda: setattr(AssociativeMemory(3, 4, beta=beta), "beta", value)


FLOATS = "float16, bfloat16, float32 or float64"
WORDS = "'highest', 'high', 'medium' or None"
V = torch.zeros(2, 4)
ERRORS = [
    (_new(n_memories=0), ValueError, "n_memories: expected an int >= 1, got 0"),
    (_new(n_memories=True), TypeError, "n_memories: expected an int >= 1, got True"),
    (_new(n_memories="3"), TypeError, "n_memories: expected an int >= 1, got '3'"),
    (_new(n_features=0), ValueError, "n_features: expected an int >= 1, got 0"),
    (_new(n_features=2.0), TypeError, "n_features: expected an int >= 1, got 2.0"),
    (_new(steps=-1), ValueError, "steps: expected an int >= 0, got -1"),
    (_new(steps=1.5), TypeError, "steps: expected an int >= 0, got 1.5"),
    (_new(step=-0.5), ValueError, "step: expected a finite number >= 0, got -0.5"),
    (_new(step=V), TypeError, "step: expected a number, got Tensor"),
    (_new(beta=0.0), ValueError, "beta: expected a finite number > 0, got 0.0"),
    (_new(beta=math.inf), ValueError, "beta: expected a finite number > 0, got inf"),
    (_new(beta=math.nan), ValueError, "beta: expected a finite number > 0, got nan"),
    (_new(beta="1"), TypeError, "beta: expected a number or a Tensor, got str"),
    (_new(beta=torch.tensor([1.0, -1.0, 0.0])), ValueError,
     "beta: expected finite values > 0, got -1.0"),
    (_new(beta=torch.ones(3, dtype=torch.int64)), TypeError,
     f"beta: expected dtype {FLOATS}, got int64"),
    (_new(beta=torch.ones(4)), ValueError,
     "beta: expected shape broadcastable to [..., 3] (K) to match rho [3, 4], got [4]"),
    (_new(learn_beta=1), TypeError, "learn_beta: expected a bool, got int"),
    (_new(log_weights=None), TypeError, "log_weights: expected a bool, got NoneType"),
    (_new(precision="low"), ValueError, f"precision: expected {WORDS}, got 'low'"),
    (_new(precision=32), TypeError, "precision: expected a str or None, got int"),
    (_new(dtype=torch.int64), TypeError, f"dtype: expected {FLOATS}, got int64"),
    (_stored([[1.0]]), TypeError, "patterns: expected a Tensor, got list"),
    (_stored(torch.zeros(3, 4, dtype=torch.int64)), TypeError,
     f"patterns: expected dtype {FLOATS}, got int64"),
    (_stored(torch.zeros(4)), ValueError, "patterns: expected shape [..., K, D], got [4]"),
    (_stored(torch.zeros(0, 4)), ValueError, "patterns: expected K >= 1, got [0, 4]"),
    (_stored(torch.zeros(3, 0)), ValueError, "patterns: expected D >= 1, got [3, 0]"),
    (_stored(learn_memories=1), TypeError, "learn_memories: expected a bool, got int"),
    (_stored(steps=-1), ValueError, "steps: expected an int >= 0, got -1"),
    (_stored(log_weights=torch.zeros(2)), ValueError,
     "log_weights: expected shape broadcastable to [..., 3] (K) to match rho [3, 4], got [2]"),
    (_stored(log_weights=torch.zeros(3, dtype=torch.int64)), TypeError,
     f"log_weights: expected dtype {FLOATS}, got int64"),
    (_set(-1.0), ValueError, "beta: expected a finite number > 0, got -1.0"),
    (_set(torch.tensor(math.nan)), ValueError, "beta: expected finite values > 0, got nan"),
    (_set(torch.ones(3)), ValueError, "beta: expected shape broadcastable to [1], got [3]"),
    (_set(1e39), ValueError, "beta: expected a number from 1e-37 to 1e+38, got 1e+39"),
    (_set(torch.tensor([1e-40])), ValueError,
     f"beta: expected values from 1e-37 to 1e+38, got {torch.tensor(1e-40).item()}"),
    (_new(beta=1e-40), ValueError, "beta: expected a number from 1e-37 to 1e+38, got 1e-40"),
    (_new(beta=1e308, dtype=torch.float16), ValueError,
     "beta: expected a number from 1e-37 to 1e+38, got 1e+308"),
    (_set(torch.ones(2), torch.ones(3)), ValueError,
     "beta: expected shape broadcastable to [3], got [2]"),
    (_called([1.0]), TypeError, "v: expected a Tensor, got list"),
    (_called(V.double()), TypeError, "v: expected dtype float32 to match memories, got float64"),
    (_called(V.to("meta")), ValueError, "v: expected device cpu to match memories, got meta"),
    (_called(V[0]), ValueError,
     "v: expected shape [..., N, 4] to match memories [3, 4], got [4]"),
    (_called(V[:, :3], method="weights"), ValueError,
     "v: expected shape [..., N, 4] to match memories [3, 4], got [2, 3]"),
    (_called(V, V[:, :3]), ValueError,
     "update_mask: expected shape broadcastable to [..., 2, 4] (N, D) to match v [2, 4],"
     " got [2, 3]"),
    (_called(V, [1.0]), TypeError, "update_mask: expected a Tensor or None, got list"),
    (_called(V, steps=-1), ValueError, "steps: expected an int >= 0, got -1"),
    (_called(V, method="energy", beta=torch.ones(3)), ValueError,
     "beta: expected shape [] or [..., 1] (one for all memories), got [3]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_errors_verbatim(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
