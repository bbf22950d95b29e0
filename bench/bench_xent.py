# SPDX-License-Identifier: Apache-2.0
"""Cross-entropies over prototypes against plain torch: the loss and the gradients of rows and
prototypes, one thread each, with the N x K arrays that users write.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import clam_kernels as ck
from clam_kernels import testing
from clam_kernels.testing.xent import nce_problem, swapped_problem, unit_rows

TIMER = {"timer": time.process_time, "min_rounds": 1}
Loss = Callable[[Tensor, Tensor], Tensor]
# rows, features, prototypes
NCE = ((2048, 128, 3000), (1024, 128, 20_000), (4096, 32, 1000))
# views, samples, features, prototypes; codes for two views
SWAPPED = ((8, 256, 128, 1000), (2, 256, 128, 3000))
TEACHER = (256, 128, 98_304)


def gradients(loss: Loss, z: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    value = loss(z, prototypes)
    return value.detach(), *torch.autograd.grad(value, (z, prototypes))


def run(race: Any, name: str, ours: Loss, eager: Loss, z: Tensor, prototypes: Tensor) -> None:
    """Time both, and record the peak of memory without the gradients, and the errors."""
    z.requires_grad_()
    prototypes.requires_grad_()
    calls = {"ours": ours, "eager": eager}
    results = 4 * (z.numel() + prototypes.numel())
    exact = eager_in_float64(eager, z, prototypes)
    row = race(
        name,
        "forward+backward",
        peak_extra_bytes={
            key: testing.peak_bytes(lambda call=call: gradients(call, z, prototypes)) - results
            for key, call in calls.items()
        },
        error_vs_float64={
            key: max(
                float((x - y).abs().max() / y.abs().max())
                for x, y in zip(gradients(call, z, prototypes)[1:], exact, strict=True)
            )
            for key, call in calls.items()
        },
    )
    row.run(
        lambda: gradients(ours, z, prototypes), {"eager": lambda: gradients(eager, z, prototypes)}
    )


def eager_in_float64(eager: Loss, z: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().double().requires_grad_() for x in (z, prototypes)]
    return gradients(eager, *leaves)[1:]


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("size", NCE, ids=str)
def test_labels(size: tuple[int, int, int], race: Any) -> None:
    """`proto_nce` with a temperature for each prototype, against cross_entropy of the logits."""
    n, d, k = size
    z, prototypes, phi, labels = nce_problem(0, n, d, k)

    def ours(x: Tensor, c: Tensor) -> Tensor:
        return ck.proto_nce(x, c, phi, labels)

    def eager(x: Tensor, c: Tensor) -> Tensor:
        return functional.cross_entropy(x @ c.T / phi.to(x), labels[0])

    run(race, f"proto_nce/{n}-{d}-{k}-fp32", ours, eager, z, prototypes)


@pytest.mark.benchmark(**TIMER)
@pytest.mark.parametrize("size", SWAPPED, ids=str)
def test_views(size: tuple[int, int, int, int], race: Any) -> None:
    """`swapped_prediction` of the codes of two views, against SwAV's loss pair by pair, which forms
    each code by one exponential from the same potentials.
    """
    views, n, d, k = size
    z, prototypes, f, g = swapped_problem(0, views, n, d, k)

    def ours(x: Tensor, c: Tensor) -> Tensor:
        return ck.swapped_prediction(x, c, f, g)

    def eager(x: Tensor, c: Tensor) -> Tensor:
        scores, loss = x @ c.T, x.new_zeros(())
        for a in range(2):
            codes = (scores[a].detach() / 0.05 + f[a, :, None].to(x) + g[a].to(x)).exp()
            part = x.new_zeros(())
            for v in range(views):
                if v != a:
                    logs = (scores[v] / 0.1).log_softmax(1)
                    part = part - (codes * logs).sum(1).mean()
            loss = loss + part / (views - 1)
        return loss / 2

    run(race, f"swapped_prediction/{views}x{n}-{d}-{k}-fp32", ours, eager, z, prototypes)


@pytest.mark.benchmark(**TIMER)
def test_teacher(race: Any) -> None:
    """`swapped_prediction` of masked patches and the centred targets of a teacher with prototypes
    of its own, against the logits of both.
    """
    n, d, k = TEACHER
    generator = torch.Generator().manual_seed(0)
    (z, rows), (prototypes, points) = (
        [unit_rows(generator, *shape) for _ in range(2)] for shape in ((n, d), (k, d))
    )
    centre = 0.01 * torch.randn(k, generator=generator, dtype=torch.float32)
    g = -centre[None] / 0.04
    f = -(rows @ points.T / 0.04 + g).logsumexp(1)[None]
    pairs = torch.ones(1, 1, dtype=torch.float32)

    def ours(x: Tensor, c: Tensor) -> Tensor:
        teacher = {"target_z": rows[None], "target_prototypes": points}
        return ck.swapped_prediction(x[None], c, f, g, epsilon=0.04, pairs=pairs, **teacher)

    def eager(x: Tensor, c: Tensor) -> Tensor:
        with torch.no_grad():
            codes = ((rows.to(x) @ points.to(x).T - centre.to(x)) / 0.04).softmax(1)
        return -(codes * (x @ c.T / 0.1).log_softmax(1)).sum(1).mean()

    run(race, f"swapped_prediction/teacher-{n}-{d}-{k}-fp32", ours, eager, z, prototypes)
