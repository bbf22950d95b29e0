# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling against logsumexp over whole arrays, against the linear-domain loop that
contrastive methods run on their scores, and against POT's log-domain solver where it is installed.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels import testing

SCORES, FEATURES = (
    testing.workloads("sinkhorn_potentials"),
    testing.workloads("sinkhorn_potentials_features"),
)
# Largest number of entries for POT, which is ten times slower.
MOST_OF_POT = 20_000 * 300
TIMER = {"timer": time.process_time, "min_rounds": 1}


def logsumexp_loop(logits: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """The simplest form in the log domain; the prototypes' potential is first."""
    n, k = logits.shape
    f, g = torch.zeros(n), torch.zeros(k)
    for _ in range(n_iter):
        g = -torch.tensor(float(k)).log() - (logits + f[:, None]).logsumexp(0)
        f = -torch.tensor(float(n)).log() - (logits + g).logsumexp(1)
    return f, g


def linear_loop(logits: Tensor, n_iter: int) -> Tensor:
    """The loop on a copy of exp(scores / epsilon), in place; returns codes."""
    n, k = logits.shape
    q = logits.exp()
    q /= q.sum()
    for _ in range(n_iter):
        q /= q.sum(0, keepdim=True) * k
        q /= q.sum(1, keepdim=True) * n
    return q.mul_(n)


def pot(logits: Any, n_iter: int) -> Any:
    """POT's log-domain solver with as many iterations, on NumPy arrays or torch tensors."""
    import ot

    n, k = logits.shape
    a, b = (0 * logits[:, 0] + 1) / n, (0 * logits[0] + 1) / k
    return ot.bregman.sinkhorn_log(a, b, -logits, 1.0, numItermax=n_iter, stopThr=0, warn=False)


def has_pot() -> bool:
    return importlib.util.find_spec("ot") is not None


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("workload", [*SCORES, *FEATURES], ids=lambda w: w.name)
def test_forward(workload: testing.Workload, race: Any) -> None:
    args = workload.make(0)
    op = getattr(torch.ops.clam, workload.op)
    n_iter = next(a for a in args if isinstance(a, int))

    def logits() -> Tensor:
        return args[0] if workload.op == "sinkhorn_potentials" else args[0] @ args[1].T

    rivals = {
        "logsumexp": lambda: logsumexp_loop(logits(), n_iter),
        "linear": lambda: linear_loop(logits(), n_iter),
    }
    if workload.op == "sinkhorn_potentials" and logits().numel() <= MOST_OF_POT and has_pot():
        rivals["POT"] = lambda: pot(logits().numpy(), n_iter)
        rivals["POT on torch"] = lambda: pot(logits(), n_iter)
    exact = testing.spec_of(workload.op).truth(
        *(a.double() if isinstance(a, Tensor) else a for a in args)
    )[1]
    errors = {
        name: float((g.double() - exact).abs().max())
        for name, g in (("ours", op(*args)[1]), ("eager", rivals["logsumexp"]()[1]))
    }
    row = race(
        workload.name,
        "forward",
        bytes=workload.bytes,
        flops=workload.flops,
        error_vs_float64=errors,
        peak_extra_bytes={
            "ours": testing.peak_bytes(lambda: op(*args)),
            "eager": testing.peak_bytes(rivals["logsumexp"]),
        },
    )
    row.run(lambda: op(*args), rivals)
