# SPDX-License-Identifier: Apache-2.0
"""Deep embedded clustering against plain torch: a refresh of the target, then the loss of all rows
and its gradients, from N x K x D differences and from torch.cdist.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import clam_kernels as ck
from clam_kernels import testing

STATS, LOSSES = testing.workloads("student_t_stats"), testing.workloads("dec_losses")
TIMER = {"timer": time.process_time, "min_rounds": 1}
SAMPLE_ROWS = 2048


def broadcast(z: Tensor, mu: Tensor) -> Tensor:
    """Squared distances [N, K] from N x K x D differences."""
    return (z[:, None] - mu).square().sum(-1)


def cdist(z: Tensor, mu: Tensor) -> Tensor:
    """Squared distances [N, K] by torch's own distance."""
    return torch.cdist(z, mu).square()


def soft(far: Tensor) -> Tensor:
    q = 1 / (1 + far)
    return q / q.sum(1, keepdim=True)


def plain_iteration(distances: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The code that users write: q and p are N x K arrays, and autograd differentiates the loss."""

    def iteration(z: Tensor, mu: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            q = soft(distances(z, mu))
            p = q.square() / q.sum(0)
            p = p / p.sum(1, keepdim=True)
        rows, centroids = new.clone().requires_grad_(), mu.clone().requires_grad_()
        q = soft(distances(rows, centroids))
        loss = (p * (p.log() - q.log())).sum(1).mean()
        return loss.detach(), *torch.autograd.grad(loss, (rows, centroids))

    return iteration


def iteration(z: Tensor, mu: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    target = ck.dec_target(z, mu, store="recompute")
    rows, centroids = new.clone().requires_grad_(), mu.clone().requires_grad_()
    loss = ck.dec_loss(rows, centroids, target)
    return loss.detach(), *torch.autograd.grad(loss, (rows, centroids))


RIVALS = {"broadcast": plain_iteration(broadcast), "cdist": plain_iteration(cdist)}


def drawn(workload: testing.Workload) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and centroids, and the rows after a step of the network."""
    args = workload.make(0)
    return args[5], args[6], args[0]


def errors(z: Tensor, mu: Tensor, new: Tensor) -> dict[str, float]:
    """Largest error of dz over its largest entry against float64, on a sample of rows."""
    parts = z[:SAMPLE_ROWS], mu, new[:SAMPLE_ROWS]
    exact = RIVALS["broadcast"](*(x.double() for x in parts))[1]
    results = {"ours": iteration(*parts)[1], "eager": RIVALS["cdist"](*parts)[1]}
    return {
        name: float((out - exact).abs().max() / exact.abs().max()) for name, out in results.items()
    }


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("workload", LOSSES, ids=lambda w: w.name)
def test_iteration(workload: testing.Workload, race: Any) -> None:
    """A refresh, the loss and its gradients on all rows, one thread each."""
    args = drawn(workload)
    calls = {"ours": iteration, "eager": RIVALS["cdist"]}
    row = race(
        workload.name,
        "refresh+forward+backward",
        bytes=workload.bytes,
        flops=workload.flops,
        error_vs_float64=errors(*args),
        peak_extra_bytes={
            name: testing.peak_bytes(lambda call=call: call(*args)) for name, call in calls.items()
        },
    )
    row.run(
        lambda: iteration(*args),
        {name: (lambda call=call: call(*args)) for name, call in RIVALS.items()},
    )


def stats_errors(calls: dict[str, Any], args: Any) -> dict[str, float]:
    """Largest error of the log-sum-exp against float64, on a sample of rows."""
    z, mu, *rest = args
    exact = torch.ops.clam.student_t_stats(z[:SAMPLE_ROWS].double(), mu.double(), *rest)[0]
    results = {name: call(z[:SAMPLE_ROWS], mu, *rest)[0] for name, call in calls.items()}
    return {name: float((out - exact).abs().max()) for name, out in results.items()}


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("workload", STATS, ids=lambda w: w.name)
def test_stats(workload: testing.Workload, race: Any) -> None:
    """Labels, log-sum-exp and soft counts."""
    args = workload.make(0)
    plain: Any = testing.eager(workload.op)
    calls = {"ours": torch.ops.clam.student_t_stats, "eager": plain}
    row = race(
        workload.name,
        "forward",
        bytes=workload.bytes,
        flops=workload.flops,
        error_vs_float64=stats_errors(calls, args),
        peak_extra_bytes={
            name: testing.peak_bytes(lambda call=call: call(*args)) for name, call in calls.items()
        },
    )
    with torch.inference_mode():
        row.run(lambda: torch.ops.clam.student_t_stats(*args), {"eager": lambda: plain(*args)})
