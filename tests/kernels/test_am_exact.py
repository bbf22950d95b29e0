# SPDX-License-Identifier: Apache-2.0
"""Memories and rows at any position: rows whose logits cancel are computed again in float64. All
tests run through the interpreter and compare with differences in float64.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _interpreted import NEEDS_INTERPRETER
from torch import Tensor

import clam_kernels
from clam_kernels import testing

pytestmark = [
    NEEDS_INTERPRETER,
    # numpy warns where a fast kernel overflows, before its rows are computed again
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
DRAWS, ROWS = 2, 6


# ---- the truth: plain differences ----------------------------------------------------------------


def _gaps(x: Tensor, rho: Tensor) -> Tensor:
    return rho[..., None, :, :] - x[..., :, None, :]


def _logits(t: Tensor, beta: Tensor, log_weights: Tensor | None) -> Tensor:
    z = -(beta[..., None, :] if beta.ndim else beta) * t.square().sum(-1)
    return z if log_weights is None else z + log_weights[..., None, :]


def recursion(
    v: Tensor,
    rho: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    steps: int = 2,
    step: float = 1.0,
) -> Tensor:
    x = v
    for _ in range(steps):
        t = _gaps(x, rho)
        p = torch.softmax(_logits(t, beta, log_weights), -1)
        pull = (p[..., None] * t).sum(-2)
        x = x + step * (pull if mask is None else mask * pull)
    return x


def energy(v: Tensor, rho: Tensor, beta: Tensor, log_weights: Tensor | None = None) -> Tensor:
    return -torch.logsumexp(_logits(_gaps(v, rho), beta, log_weights), -1) / beta


def evaluated(
    function: Callable[..., Tensor], args: tuple[Any, ...], upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The output of a function and the gradients of its arguments."""
    cast = [None if a is None else a.detach().to(dtype).requires_grad_() for a in args]
    out = function(*cast)
    inputs = [a for a in cast if a is not None]
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def ours_recursion(v, rho, beta, mask=None, log_weights=None, steps=2, step=1.0):
    options = {"step": step, "update_mask": mask, "log_weights": log_weights}
    return clam_kernels.am_recursion(v, rho, beta, steps, **options)


def ours_energy(v, rho, beta, log_weights=None):
    return clam_kernels.am_energy(v, rho, beta, log_weights=log_weights)


# ---- positions of memories -----------------------------------------------------------------------


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sentinel(size: float) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Five ordinary memories and one far away."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        rho = torch.cat([_normal(seed, 5, 4), torch.full((1, 4), size)])
        return _normal(seed + 100, 30, 4), rho

    return make


def groups(*places: tuple[float, ...]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Three memories and ROWS rows around each place."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        rho = [torch.tensor(at) + _normal(seed + i, 3, 4) for i, at in enumerate(places)]
        v = [torch.tensor(at) + _normal(seed + 50 + i, ROWS, 4) for i, at in enumerate(places)]
        return torch.cat(v), torch.cat(rho)

    return make


SCENES = {
    **{f"sentinel-{size:g}": sentinel(size) for size in (1e3, 1e4, 1e5, 1e10, 1e15)},
    "two-groups": groups((0.0,) * 4, (1e6,) * 4),
    "three-groups": groups((1e5, 0, 0, 0), (0, 1e5, 0, 0), (0, 0, 1e5, 0)),
    "off-the-origin": groups((1e6,) * 4),
}


def assert_accurate_parts(
    truth: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    draws: list[tuple[Any, ...]],
    parts: int,
) -> None:
    """Check outputs and gradients: at most twice the error of differences in float32, separately in
    every group of ROWS rows.
    """
    results = []
    for args in draws:
        shape = truth(*args).shape
        upstream = _normal(7, *shape)
        exact = evaluated(truth, args, upstream, torch.float64)
        plain = evaluated(truth, args, upstream, torch.float32)
        with clam_kernels.backend("triton"):
            mine = evaluated(ours, args, upstream, torch.float32)
        results.append(list(zip(mine, exact, plain, strict=True)))
    for i in range(len(results[0])):
        alone = i < 2 and parts > 1  # the output and the gradient of v have rows
        for part in range(parts if alone else 1):
            rows = slice(ROWS * part, ROWS * (part + 1)) if alone else ...
            triples = [tuple(x[rows] for x in draw[i]) for draw in results]
            size = max(float(t[1].abs().max()) for t in triples)
            if i == 3 and triples[0][1].ndim == 0:  # one number: its scale is that of its summands
                size = max(size, max(float(draw[2][1].abs().max()) for draw in results))
            testing.assert_close_on_average(triples, what=f"number {i}, part {part}", scale=size)


@pytest.mark.parametrize("name", SCENES)
def test_recursion_at_any_position_of_memories(name):
    draws = [(*SCENES[name](seed), torch.tensor(1.0)) for seed in range(DRAWS)]
    assert_accurate_parts(
        recursion, ours_recursion, draws, len(draws[0][0]) // ROWS if "groups" in name else 1
    )


@pytest.mark.parametrize("name", ["sentinel-1e+10", "two-groups"])
def test_a_recursion_with_every_option(name):
    """A beta for each memory, a mask, log-weights: the two kernels of the backward."""
    draws = []
    for seed in range(DRAWS):
        v, rho = SCENES[name](seed)
        beta, mask = 0.5 + torch.rand(len(rho)), torch.rand(v.shape)
        draws.append((v, rho, beta, mask, _normal(seed, len(rho))))
    parts = len(draws[0][0]) // ROWS if "groups" in name else 1
    assert_accurate_parts(recursion, ours_recursion, draws, parts)


@pytest.mark.parametrize("name", SCENES)
def test_energy_at_any_position_of_memories(name):
    draws = [
        (*SCENES[name](seed), torch.tensor(1.0), _normal(seed, len(SCENES[name](seed)[1])))
        for seed in range(DRAWS)
    ]
    assert_accurate_parts(
        energy, ours_energy, draws, len(draws[0][0]) // ROWS if "groups" in name else 1
    )


def test_rows_too_wide_for_registers():
    places = torch.tensor([0.0, 1e6])
    rho = places.repeat_interleave(2)[:, None] + 0.1 * _normal(0, 4, 150)
    v = places.repeat_interleave(2)[:, None] + 0.1 * _normal(1, 4, 150)
    assert_accurate_parts(recursion, ours_recursion, [(v, rho, torch.tensor(1.0))], 1)
    assert_accurate_parts(energy, ours_energy, [(v, rho, torch.tensor(1.0))], 1)


# ---- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "beta"), [(1e19, 1e-38), (1e-30, 1e60), (1e-20, 1e38), (1.0, 1e38), (1e15, 1e-30)]
)
def test_extremes_of_float32(scale, beta):
    """Squares and a beta beyond float32: no result is NaN."""
    v, rho = _normal(0, 12, 3) * scale, _normal(1, 5, 3) * scale
    exact = recursion(v.double(), rho.double(), torch.tensor(beta, dtype=torch.float64))
    with clam_kernels.backend("triton"):
        out = clam_kernels.am_recursion(v, rho, beta, 2)
    assert float((out.double() - exact).abs().max()) <= 1e-5 * scale


def test_gradients_of_large_numbers():
    v, rho = _normal(0, 20, 3) * 1e15, _normal(1, 5, 3) * 1e15
    beta = torch.tensor(1e-30)
    assert_accurate_parts(
        lambda v, rho: recursion(v, rho, beta.to(v.dtype)),
        lambda v, rho: ours_recursion(v, rho, 1e-30),
        [(v, rho)],
        1,
    )


# ---- the nearest memory --------------------------------------------------------------------------

TIED = torch.tensor([[0.5, -2.0], [-0.5, 2.0], [0.5, -2.0]])


def test_ties_go_to_the_lowest_index():
    with clam_kernels.backend("triton"):
        assert clam_kernels.am_assign(torch.zeros(2, 2), TIED)[0].tolist() == [0, 0]
        v = torch.zeros(2, 2, requires_grad=True)
        rho = TIED.clone().requires_grad_()
        out = clam_kernels.am_step(v, rho, math.inf, step=0.5)
        assert out.tolist() == [[0.25, -1.0]] * 2
        grads = torch.autograd.grad(out, (v, rho), torch.ones(2, 2))
    assert grads[0].tolist() == [[0.5, 0.5]] * 2
    assert grads[1].tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", SCENES)
def test_nearest_memory_at_any_position_of_memories(name):
    v, rho = SCENES[name](0)
    far = _gaps(v.double(), rho.double()).square().sum(-1)
    with clam_kernels.backend("triton"):
        labels, sqdist = clam_kernels.am_assign(v, rho)
        out = clam_kernels.am_step(v, rho, math.inf)
    assert torch.equal(labels, far.min(-1).indices)
    torch.testing.assert_close(sqdist.double(), far.min(-1).values, rtol=1e-6, atol=0.0)
    # one rounding of x + (rho - x), and one of adding the centre again
    size = rho[labels].abs().amax(-1, keepdim=True)
    assert bool(((out - rho[labels]).abs() <= 2e-5 * size.clamp(min=1.0)).all())


def test_memories_that_are_not_finite():
    """They reach every row of their problem, unless they are masked."""
    v, rho = _normal(0, 4, 3), _normal(1, 2, 5, 3)
    rho[0, 2, 1] = math.nan
    out = torch.zeros(5)
    out[2] = -math.inf
    with clam_kernels.backend("triton"):
        labels, sqdist = clam_kernels.am_assign(v, rho)
        nearest, near = clam_kernels.am_assign(v, rho, log_weights=out)
        none = clam_kernels.am_assign(v, rho, log_weights=torch.tensor(-math.inf))
    assert labels[0].tolist() == [-1] * 4
    assert bool(sqdist[0].isnan().all())
    assert bool((labels[1] >= 0).all())
    assert bool((nearest >= 0).all())
    assert bool(near.isfinite().all())
    assert none[0].unique().tolist() == [-1]
    assert none[1].unique().tolist() == [math.inf]


# ---- the second launch ---------------------------------------------------------------------------


@pytest.fixture
def flagged(monkeypatch):
    """How many rows each launch after the first computes again."""
    launch, flags = importlib.import_module("clam_kernels.kernels.common.launch"), []
    real = launch.launch

    def counted(kernel, grid, device, **arguments):
        if kernel.fn.__name__.startswith("exact_") and "sums" not in kernel.fn.__name__:
            flags.append(int((arguments["FLAG"] != 0).sum()))
        real(kernel, grid, device, **arguments)

    monkeypatch.setattr(launch, "launch", counted)
    return flags


@pytest.mark.parametrize("k", [6, 64, 70])
def test_few_rows_of_normal_data_are_computed_again(flagged, k):
    """The second launch only loads its flags; for the energy it computes a few rows."""
    rho = _normal(0, k, 16)
    v = rho[torch.arange(200) % k] + 0.6 * _normal(1, 200, 16)
    with clam_kernels.backend("triton"):
        for args in ((v, rho, torch.tensor(0.2)), (v, rho, torch.tensor(20.0))):
            evaluated(lambda *a: ours_recursion(*a, steps=5), args, _normal(2, 200, 16), v.dtype)
            evaluated(ours_energy, args, _normal(2, 200), v.dtype)
        clam_kernels.am_step(v, rho, math.inf, precision="medium")
    assert len(flagged) == 9
    energies = [flagged[i] for i in (2, 3, 6, 7)]
    assert max(energies) <= 0.05 * len(v), flagged
    assert sum(flagged) == sum(energies), flagged


def _all_in_doubt() -> tuple[Any, Any, tuple[Any, ...], Tensor]:
    """Modules, operands of every kind, and flags that are all set."""
    exact = importlib.import_module("clam_kernels.kernels.am.exact")
    backward = importlib.import_module("clam_kernels.kernels.am.exact_backward")
    v, rho = _normal(0, 3, 1, 7, 5), _normal(1, 2, 6, 5)
    lift = _normal(3, 2, 6)
    lift[1, 4] = -math.inf
    beta, mask = 0.2 + torch.rand(2, 6), torch.rand(7, 5)
    return exact, backward, (v, rho, beta, mask, lift), torch.ones(3, 2, 7, dtype=torch.uint8)


def test_rows_in_doubt_of_crossed_batches():
    """Every row is computed again: crossed batches, a beta for each memory, a mask, one masked
    memory.
    """
    exact, backward, args, flags = _all_in_doubt()
    v, rho, beta, mask, lift = args
    upstream = _normal(5, 3, 2, 7, 5)
    exact_args = [a.double().requires_grad_() for a in args]
    out = recursion(*exact_args, steps=3, step=0.7)
    grads = torch.autograd.grad(out, exact_args, upstream.double())
    operands = exact.operands(v, rho, beta, mask, lift)
    output, gv, gm = torch.empty_like(out).float(), torch.empty(3, 2, 7, 5), torch.empty(3, 2, 7, 5)
    exact.recursion(operands, 3, 0.7, flags, output)
    sums = backward.recursion_backward(operands, upstream, 3, 0.7, flags, gv, gm, True)
    rho_sums, weight_sums, beta_sums = sums.of_batch()
    close = {"rtol": 2e-7, "atol": 1e-6}
    torch.testing.assert_close(output.double(), out.detach(), **close)
    torch.testing.assert_close(gv.double().sum(1, keepdim=True), grads[0], **close)
    torch.testing.assert_close(gm.double().sum((0, 1)), grads[3], **close)
    wide = {"rtol": 1e-11, "atol": 1e-11}
    for mine, truth in ((rho_sums, grads[1]), (-beta_sums, grads[2]), (weight_sums, grads[4])):
        torch.testing.assert_close(mine, truth, **wide)


@pytest.mark.parametrize("budget", [1, 1 << 24])
def test_parts_of_any_size_add_up(monkeypatch, budget):
    """The sums of the energy's gradients with one problem in a launch, or with all."""
    exact, backward, (v, rho, _, _, lift), flags = _all_in_doubt()
    monkeypatch.setattr(backward, "PARTS", budget)
    beta, upstream = torch.tensor(0.7), _normal(5, 3, 2, 7)
    exact_args = [a.double().requires_grad_() for a in (v, rho, beta, lift)]
    out = energy(*exact_args)
    grads = torch.autograd.grad(out, exact_args, upstream.double())
    operands = exact.operands(v, rho, beta, None, lift)
    output, gv = torch.empty(3, 2, 7), torch.empty(3, 2, 7, 5)
    exact.energy(operands, flags, output)
    rho_sums, weight_sums, beta_sums = backward.energy_backward(
        operands, upstream, flags, gv
    ).of_batch()
    torch.testing.assert_close(output.double(), out.detach(), rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(gv.double().sum(1, keepdim=True), grads[0], rtol=2e-7, atol=1e-6)
    wide = {"rtol": 1e-11, "atol": 1e-11}
    sharp = beta.double()
    for mine, truth in (
        (rho_sums, grads[1]),
        (beta_sums.sum() / sharp, grads[2]),
        (-weight_sums / sharp, grads[3]),
    ):
        torch.testing.assert_close(mine, truth, **wide)
