# SPDX-License-Identifier: Apache-2.0
"""Adam and SGD of the package compute the same bits as torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels.estimators.training.optimisers import SGD, Adam

PAIRS: dict[str, tuple[Callable[[list[Tensor]], Any], Callable[[list[Tensor]], Any]]] = {
    "Adam": (
        lambda p: Adam(p, 0.05, eps=1e-6),
        lambda p: torch.optim.Adam([{"params": [x]} for x in p], lr=0.05, eps=1e-6, foreach=True),
    ),
    "SGD": (lambda p: SGD(p, 0.1, 0.0, 0.0), lambda p: torch.optim.SGD(p, 0.1)),
    "SGD with momentum": (
        lambda p: SGD(p, 0.1, 0.9, 0.01),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    ),
}


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=generator).requires_grad_() for n in (4, 2, 5)]


def _walk(optimiser: Any, parameters: list[Tensor], steps: range, rate: float = 0.05) -> None:
    for step in steps:
        for group in optimiser.param_groups:
            group["lr"] = rate / (1 + step)
        optimiser.zero_grad()
        used = parameters[: 2 if step == 0 else 3]  # the last has no gradient at first
        sum((p.sin() * p).sum() for p in used).backward()  # type: ignore[union-attr]
        optimiser.step()


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_those_of_torch(name: str) -> None:
    own, torchs = _parameters(), _parameters()
    optimisers = [make(p) for make, p in zip(PAIRS[name], (own, torchs), strict=True)]
    for optimiser, parameters in zip(optimisers, (own, torchs), strict=True):
        _walk(optimiser, parameters, range(6))
    for a, b in zip(own, torchs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PAIRS)
def test_a_state_is_resumed(name: str) -> None:
    make, torchs = PAIRS[name]
    whole = _parameters()
    _walk(make(whole), whole, range(6))
    for first in (make, torchs):  # torch's state can be loaded, too
        part = _parameters()
        optimiser = first(part)
        _walk(optimiser, part, range(3))
        again = make(part)
        again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        _walk(again, part, range(3, 6))
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="the state of an optimiser of these parameters"):
        make(_parameters()[:1]).load_state_dict(optimiser.state_dict())


def test_sparse_gradients_step_as_those_of_torch() -> None:
    results = []
    for make in (lambda p: SGD(p, 0.1, 0.9, 0.0), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)):
        table = torch.nn.Embedding(5, 2, sparse=True)
        torch.nn.init.constant_(table.weight, 1.0)
        optimiser = make([table.weight])
        for _ in range(3):
            optimiser.zero_grad()
            table(torch.tensor([1, 3, 1])).square().sum().backward()
            optimiser.step()
        results.append(table.weight.detach())
    assert torch.equal(*results)
