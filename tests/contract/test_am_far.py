# SPDX-License-Identifier: Apache-2.0
"""The am ops follow their equations for any position of rows and memories. The error against
float64 is at most twice the error of plain torch that takes differences in the same dtype, plus 4
eps of the scale (`testing.assert_close_on_average`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import clam_kernels
from clam_kernels import testing

Scene = Callable[[Callable[..., Tensor]], tuple[Tensor, Tensor, float]]
D = 4


def _sentinel(size: float) -> Scene:
    """One far memory among five, like a slot that is filled later."""
    return lambda n: (n(60, D), torch.cat([n(5, D), torch.full((1, D), size)]), 1.0)


def _far_pair(size: float) -> Scene:
    """Two far memories close to each other, rows beside them, and ordinary rows and memories."""

    def scene(n: Callable[..., Tensor]) -> tuple[Tensor, Tensor, float]:
        gap = size / 1024
        v = torch.cat([n(40, D), size + gap * n(20, D)])
        return v, torch.cat([n(5, D), size + gap * n(2, D)]), 1 / gap**2

    return scene


def _groups(size: float, count: int) -> Scene:
    """Groups of memories and rows far from each other, each on an axis."""

    def scene(n: Callable[..., Tensor]) -> tuple[Tensor, Tensor, float]:
        places = torch.cat([torch.zeros(1, D), size * torch.eye(D)])[:count]
        rho = torch.cat([n(5, D) + place for place in places])
        return torch.cat([n(30, D) + place for place in places]), rho, 0.7

    return scene


def _scaled(size: float, beta: float) -> Scene:
    return lambda n: (size * n(60, D), size * n(6, D), beta)


def _half_way(size: float) -> Scene:
    """Rows half-way to a far memory: a small difference of large logits decides their label."""

    def scene(n: Callable[..., Tensor]) -> tuple[Tensor, Tensor, float]:
        rho = n(3, D)
        rho[2, 0] += size
        v = n(60, D)
        v[:, 0] = rho[2, 0] / 2 + torch.linspace(-0.3, 0.3, 60)
        return v, rho, 0.1

    return scene


def _mixture(size: float) -> Scene:
    """Rows beside one memory that recall several far memories as well."""
    return lambda n: (n(60, D), torch.cat([n(1, D), torch.full((4, D), size)]), 0.2 / size**2)


def _pairs(size: float) -> Scene:
    """Pairs of memories far from each other, rows at one memory of a pair."""

    def scene(n: Callable[..., Tensor]) -> tuple[Tensor, Tensor, float]:
        gap = size / 8
        places = size * torch.eye(D)[:3]
        rho = torch.cat([places, places + gap * torch.eye(D)[3]])
        return rho.repeat(10, 1) + 1e-3 * gap * n(60, D), rho, 6.2 / gap**2

    return scene


def _offset(size: float) -> Scene:
    return lambda n: (size + n(60, D), size + n(8, D), 0.7)


SCENES: dict[str, Scene] = {
    **{f"sentinel-{size:g}": _sentinel(size) for size in (1e3, 1e4, 1e5, 1e10, 1e15)},
    **{f"far-pair-{size:g}": _far_pair(size) for size in (1e4, 1e10, 1e15)},
    "two-groups-1e4": _groups(1e4, 2),
    "two-groups-1e6": _groups(1e6, 2),
    "four-groups-1e5": _groups(1e5, 4),
    "offset-1e6": _offset(1e6),
    "scale-1e15": _scaled(1e15, 1e-30),
    "scale-1e19": _scaled(1e19, 1e-38),
    "scale-1e-30": _scaled(1e-30, 1e38),
    "beta-1e10": _scaled(1.0, 1e10),
    "beta-1e38": _scaled(1.0, 1e38),
    "beta-3e38": _scaled(1.0, 3e38),
    "half-way-3e6": _half_way(3e6),
    **{f"mixture-{size:g}": _mixture(size) for size in (1e2, 1e4, 1e6)},
}

# Here the gradient of v through a step is small: the rounding of the upstream gradient counts.
PAIRS = {f"pairs-{size:g}": _pairs(size) for size in (3e2, 1e4)}


def _draw(name: str, seed: int, backend: Any) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    v, rho, beta = (SCENES | PAIRS)[name](lambda *size: torch.randn(size, generator=generator))
    v = v[::6] if backend.interpreted else v  # a row and five steps take a second
    return v.to(backend.device), rho.to(backend.device), beta


def _draws(backend: Any) -> range:
    return range(1 if backend.interpreted else 4)


def _differences(v: Tensor, rho: Tensor) -> Tensor:
    return rho[None] - v[:, None]


def _logits(v: Tensor, rho: Tensor, beta: Tensor) -> Tensor:
    return -beta * _differences(v, rho).square().sum(-1)


def _recursion(v: Tensor, rho: Tensor, beta: Tensor, steps: int, step: float) -> Tensor:
    for _ in range(steps):
        v = v + step * (torch.softmax(_logits(v, rho, beta), -1) @ rho - v)
    return v


def _energy(v: Tensor, rho: Tensor, beta: Tensor) -> Tensor:
    return -torch.logsumexp(_logits(v, rho, beta), -1) / beta


def _results(function: Callable[..., Tensor], call: tuple[Any, ...], dtype: torch.dtype) -> list:
    """The result and the gradients of v, rho and beta."""
    v, rho, beta, *rest = call
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (v, rho)]
    beta = torch.tensor(beta, dtype=torch.float32, device=v.device)
    leaves.append(beta.to(dtype, copy=True).requires_grad_())
    out = function(*leaves, *rest)
    grad = testing.upstream([out])[0].to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _assert_accurate(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], calls: list
) -> None:
    triples: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], [], [], []]
    for call in calls:
        result = _results(ours, call, torch.float32)
        expected = _results(plain, call, torch.float64)
        rival = _results(plain, call, torch.float32)
        for row, a, b, c in zip(triples, result, expected, rival, strict=True):
            rounded = b.float()
            # if float32 cannot represent the value, or plain torch fails, compare with its rounding
            b = torch.where(rounded.isfinite(), b, rounded.double())
            row.append((a, b, torch.where(c.isfinite(), c, rounded)))
    for name, row in zip(("result", "grad v", "grad rho", "grad beta"), triples, strict=True):
        testing.assert_close_on_average(row, what=name)


@pytest.mark.contract(ops=("am_recursion",))
@pytest.mark.parametrize(("steps", "step"), [(1, 1.0), (5, 0.5), (5, 1.0)])
@pytest.mark.parametrize("name", SCENES)
def test_recursion(spec, backend, name, steps, step):
    calls = [(*_draw(name, seed, backend), steps, step) for seed in _draws(backend)]
    with clam_kernels.backend(backend.name):
        _assert_accurate(torch.ops.clam.am_recursion, _recursion, calls)


@pytest.mark.contract(ops=("am_recursion",))
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", [30.0, 1e2, 1e4])
def test_a_sharp_memory_among_broad_ones(spec, backend, size, steps):
    """A row beside the sharp memory competes with broad memories that are far from it."""
    generator = torch.Generator().manual_seed(0)
    calls = []
    for _ in _draws(backend):
        rho = torch.randn((6, D), generator=generator, device="cpu")
        rho[5] += size
        beta = [0.5 / size**2] * 5 + [1.0]
        near, far = torch.randn((2, 30, D), generator=generator, device="cpu")
        v = torch.cat([rho[5] + near, far])[:: 6 if backend.interpreted else 1]
        calls.append((v.to(backend.device), rho.to(backend.device), beta, steps, 0.8))
    with clam_kernels.backend(backend.name):
        _assert_accurate(torch.ops.clam.am_recursion, _recursion, calls)


@pytest.mark.contract(ops=("am_energy",))
@pytest.mark.parametrize("name", SCENES | PAIRS)
def test_energy(spec, backend, name):
    calls = [_draw(name, seed, backend) for seed in _draws(backend)]
    with clam_kernels.backend(backend.name):
        _assert_accurate(torch.ops.clam.am_energy, _energy, calls)


@pytest.mark.contract(ops=("am_assign",))
@pytest.mark.parametrize("name", SCENES)
def test_nearest(spec, backend, name):
    """Labels equal those of float64; a step at beta = inf goes to the same memory."""
    v, rho, _ = _draw(name, 0, backend)
    far = _differences(v.double(), rho.double()).square().sum(-1)
    nearest = far.argmin(-1)
    with clam_kernels.backend(backend.name):
        labels, sqdist = torch.ops.clam.am_assign(v, rho)
        moved = torch.ops.clam.am_step(v, rho, math.inf)
    assert torch.equal(labels, nearest)
    # a GPU subtracts the centre and adds it again
    size = 0.0 if backend.name == "reference" else float(rho.abs().max())
    torch.testing.assert_close(moved, rho[nearest], rtol=0, atol=2e-7 * size)
    torch.testing.assert_close(sqdist, far.amin(-1).float(), rtol=1e-6, atol=0)


@pytest.mark.contract(ops=("am_assign",))
def test_the_lowest_index_wins_a_tie(spec, backend, dtype):
    rho = torch.tensor([[0.5, -2.0], [-0.5, 2.0], [0.5, -2.0]], dtype=dtype, device=backend.device)
    v = torch.zeros(2, 2, dtype=dtype, device=backend.device)
    with clam_kernels.backend(backend.name):
        assert torch.ops.clam.am_assign(v, rho)[0].tolist() == [0, 0]
        assert torch.equal(torch.ops.clam.am_step(v, rho, math.inf), rho[[0, 0]])


@pytest.mark.contract(ops=("am_recursion",))
def test_bits_of_a_row_do_not_depend_on_other_rows(spec, backend):
    """Rows that need differences and rows that do not, alone and together, forward and backward."""
    v, rho, beta = _draw("two-groups-1e6", 0, backend)
    v = v[:: 2 if backend.interpreted else 7].clone()

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.clone().requires_grad_()
        out = torch.ops.clam.am_recursion(rows, rho, beta, 3, 0.5)
        return out.detach(), torch.autograd.grad(out, rows, torch.ones_like(out))[0]

    with clam_kernels.backend(backend.name):
        together = run(v)
        for n in range(0, len(v), 3):
            alone = run(v[n : n + 1])
            assert all(torch.equal(a[0], b[n]) for a, b in zip(alone, together, strict=True))


@pytest.mark.contract(ops=("am_recursion",))
def test_masks_weights_and_batches_of_far_rows(spec, backend):
    """Every option of the recursion on rows that need differences, against the truth."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(backend.device)

    places = 1e6 * torch.eye(D, device=backend.device)[:2]
    rho = (normal(2, 4, D) + places[:, None]).reshape(1, 8, D) + normal(3, 1, D).round()
    v = torch.cat([normal(2, 1, 5, D) + place for place in places], -2)
    lam = normal(3, 8)
    lam[1, 2] = -math.inf
    mask = torch.rand((10, D), generator=generator).to(backend.device)
    betas = normal(3, 8).exp()
    with clam_kernels.backend(backend.name):
        for beta in (betas[:, :1], betas):
            args = [v, rho, beta, 3, 0.8, mask, lam]
            call = testing.Sample("am_recursion", "far", tuple(args)).cast(torch.float32)
            inputs = ("v", "rho", "beta", "update_mask", "log_weights")
            result = testing.evaluate(spec.packet, call, inputs)
            grads = testing.upstream(result.outputs)
            exact = testing.evaluate(spec.truth, call.cast(torch.float64), inputs, grads)
            plain = testing.evaluate(spec.truth, call, inputs, grads)
            testing.assert_close(result.outputs[0], exact.outputs[0], plain.outputs[0])
            for name in inputs:
                parts = (one.gradients[name] for one in (result, exact, plain))
                testing.assert_close(*parts, what=name, scale=1.0)
