# SPDX-License-Identifier: Apache-2.0
"""The associative-memory family against unchunked eager torch, and torch.compile of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels import testing
from python_fallback import am as truth

SAMPLE_ROWS = 4096
FORWARD = [w for w in testing.workloads() if w.op.startswith("am_") and "1m" not in w.name]
TRAINED = [w for w in FORWARD if w.op == "am_recursion"]
LARGE = [w for w in testing.workloads("am_step") if "1m" in w.name]
TIMER = {"timer": time.process_time, "min_rounds": 1}


def eager_recursion(v: Tensor, rho: Tensor, beta: Any, steps: int = 1) -> Tensor:
    """The fastest plain form: two matrix products and a softmax, with whole N x K arrays."""
    bias = -beta * rho.square().sum(-1)
    for _ in range(steps):
        v = torch.softmax(torch.addmm(bias, v, (2 * beta * rho).T), -1) @ rho
    return v


def eager_energy(v: Tensor, rho: Tensor, beta: Any) -> Tensor:
    z = torch.addmm(-beta * rho.square().sum(-1), v, (2 * beta * rho).T)
    return v.square().sum(-1) - torch.logsumexp(z, -1) / beta


def eager_assign(v: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    d = torch.addmm(rho.square().sum(-1), v, -2 * rho.T) + v.square().sum(-1, keepdim=True)
    best = d.min(-1)
    return best.indices, best.values


EAGER: dict[str, Callable[..., Any]] = {
    "am_recursion": eager_recursion,
    "am_step": eager_recursion,
    "am_energy": eager_energy,
    "am_assign": eager_assign,
}


def op_of(workload: testing.Workload) -> Callable[..., Any]:
    return getattr(torch.ops.clam, workload.op)


def errors(workload: testing.Workload, args: tuple[Any, ...]) -> dict[str, float]:
    """max |out - exact| / std(exact) on a sample of rows, for ours and for eager torch; `exact` is
    the result in float64.
    """
    v, rho, *rest = args
    rows = v[:SAMPLE_ROWS]
    exact = getattr(truth, workload.op)(rows.double(), rho.double(), *rest)
    results = {
        "ours": op_of(workload)(rows, rho, *rest),
        "eager": EAGER[workload.op](rows, rho, *rest),
    }
    pick = (lambda out: out[1]) if isinstance(exact, tuple) else (lambda out: out)
    spread = float(pick(exact).std())
    return {k: float((pick(out) - pick(exact)).abs().max()) / spread for k, out in results.items()}


Trained = Callable[[Callable[..., Tensor]], tuple[Tensor, ...]]


def training(args: tuple[Any, ...]) -> Trained:
    """A function that runs a recursion forward and backward and returns its gradients."""
    v, rho, beta, *rest = args
    leaves = [t.detach().requires_grad_() for t in (v, rho, torch.as_tensor(beta, dtype=rho.dtype))]
    grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v)

    def trained(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves, *rest), leaves, grad)

    return trained


def gradient_errors(workload: testing.Workload, args: tuple[Any, ...]) -> dict[str, float]:
    """max |g - exact| / max |exact| on a sample of rows, the largest over the gradients."""
    v, rho, *rest = args
    rows = v[:SAMPLE_ROWS]
    exact = training((rows.double(), rho.double(), *rest))(truth.am_recursion)
    run = training((rows, rho, *rest))
    results = {"ours": run(op_of(workload)), "eager": run(eager_recursion)}
    return {
        name: max(
            float((g - e).abs().max() / e.abs().max()) for g, e in zip(grads, exact, strict=True)
        )
        for name, grads in results.items()
    }


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("workload", FORWARD, ids=lambda w: w.name)
def test_forward(workload: testing.Workload, race: Any) -> None:
    args = workload.make(0)
    plain = EAGER[workload.op]
    rivals = {"eager": lambda: plain(*args)}
    if workload.op == "am_recursion":
        compiled = torch.compile(plain)
        compiled(*args)
        rivals["compile"] = lambda: compiled(*args)
    row = race(
        workload.name,
        "forward",
        bytes=workload.bytes,
        flops=workload.flops,
        error_vs_float64=errors(workload, args),
        peak_extra_bytes={
            "ours": testing.peak_bytes(lambda: op_of(workload)(*args)),
            "eager": testing.peak_bytes(lambda: plain(*args)),
        },
    )
    with torch.inference_mode():
        row.run(lambda: op_of(workload)(*args), rivals)


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("workload", TRAINED, ids=lambda w: w.name)
def test_forward_backward(workload: testing.Workload, race: Any) -> None:
    args = workload.make(0)
    trained = training(args)
    row = race(
        workload.name,
        "forward+backward",
        flops=workload.flops * 7 // 2,
        error_vs_float64=gradient_errors(workload, args),
        peak_extra_bytes={
            "ours": testing.peak_bytes(lambda: trained(op_of(workload))),
            "eager": testing.peak_bytes(lambda: trained(eager_recursion)),
        },
    )
    row.run(lambda: trained(op_of(workload)), {"eager": lambda: trained(eager_recursion)})


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("workload", LARGE, ids=lambda w: w.name)
def test_memory(workload: testing.Workload, race: Any, benchmark: Any) -> None:
    args = workload.make(0)
    with torch.inference_mode():
        peaks = {
            "ours": testing.peak_bytes(lambda: op_of(workload)(*args)),
            "eager": testing.peak_bytes(lambda: EAGER[workload.op](*args)),
        }
        benchmark.pedantic(lambda: op_of(workload)(*args), rounds=1)
    race(workload.name, "memory", peak_extra_bytes=peaks).write()
