# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of Sinkhorn scaling through the interpreter: both paths of a step, chunks,
columns whose masses underflow, masked entries, problems that fail. Every buffer lies between guard
bands.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from _interpreted import INTERPRETED_BACKEND, NEEDS_INTERPRETER, random
from _subprocess import output_of
from torch import Tensor

from clam_kernels import testing
from python_fallback import sinkhorn as truth

pytestmark = [NEEDS_INTERPRETER, INTERPRETED_BACKEND]
INF, NAN = math.inf, math.nan


@pytest.fixture
def kernels():
    return importlib.import_module("clam_kernels.kernels.sinkhorn.solver")


def _masses(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).log_softmax(-1)


def _double(args: tuple[Any, ...]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in args]


def _assert_agrees(op: str, *args: Any, atol: float = 4e-6) -> tuple[Tensor, ...]:
    """Check results and gradients of a call against the equations in float64."""
    expected = tuple(
        n for n, a in zip(testing.argument_names(op), args, strict=False) if isinstance(a, Tensor)
    )
    call = testing.Sample(op, "call", args, expected)
    result = testing.evaluate(testing.spec_of(op).packet, call, expected)
    grads = testing.upstream(result.outputs)
    exact = testing.Sample(op, "exact", tuple(_double(args)), expected)
    reference = testing.evaluate(testing.spec_of(op).truth, exact, expected, grads)
    for i, (a, b) in enumerate(zip(result.outputs, reference.outputs, strict=True)):
        message = f"output {i}: {{}}".format
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-6, atol=atol, equal_nan=True, msg=message
        )
    for name in expected:
        a, b = result.gradients[name].double(), reference.gradients[name]
        scale = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        assert float((a - b).abs().max()) <= 2 * atol * scale, name
    again = testing.evaluate(testing.spec_of(op).packet, call, expected)
    for a, b in zip(result.outputs, again.outputs, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return result.outputs


def _small(monkeypatch: pytest.MonkeyPatch, kernels: Any, rows: int = 16) -> None:
    """Set the numbers of rows and columns of a tile, and of tiles in a chunk."""
    tile, whole = kernels.Entries.tile, kernels.pass_tile
    monkeypatch.setattr(kernels.Entries, "tile", lambda *a: tile(*a) | {"OWN": 16, "SWEPT": 16})
    monkeypatch.setattr(kernels, "pass_tile", lambda *a: whole(*a) | {"ROWS": rows})
    monkeypatch.setattr(kernels, "MOST_ROWS", rows)
    monkeypatch.setattr(kernels, "CHUNKS", 2)
    monkeypatch.setattr(kernels, "LEAST_ROWS", 1)
    monkeypatch.setattr(kernels, "SWEPT_ROWS", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)


# ---- tiles and chunks ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("n", "k"), [(37, 45), (16, 16)])
def test_rows_longer_than_registers(backend, kernels, monkeypatch, n, k, first):
    """The path of K above 4096: each side alone, in tiles that do not divide it."""
    _small(monkeypatch, kernels)
    monkeypatch.setattr(kernels, "MOST", 8)
    args = (3 * random(n, k), 2, _masses(n), _masses(k, seed=1), random(k, seed=2), first)
    _assert_agrees("sinkhorn_potentials", *args)


@pytest.mark.parametrize("n", [1, 16, 17, 70])
def test_chunks_of_rows(backend, kernels, monkeypatch, n):
    """Chunks of one row, of whole tiles, and of one row more or less."""
    _small(monkeypatch, kernels)
    _assert_agrees("sinkhorn_potentials", 2 * random(n, 5), 2, None, None, None, True)
    _assert_agrees(
        "sinkhorn_features_pass", random(n, 3), random(5, 3), random(5, seed=1), None, None
    )


def test_a_chunk_of_many_rows(backend, kernels, monkeypatch):
    """More rows than one program finishes."""
    monkeypatch.setattr(kernels, "CHUNKS", 1)
    _assert_agrees("sinkhorn_pass", random(600, 3), random(3, seed=1), _masses(600))


@pytest.mark.parametrize("d", [150, 300])
def test_features_too_wide_for_registers(backend, d):
    z, c = random(40, d), random(9, d, seed=1) / math.sqrt(d)
    _assert_agrees(
        "sinkhorn_potentials_features", z, c, 2, random(9), None, None, None, True, atol=2e-5
    )


def test_chunks_are_of_n_and_k_alone(backend, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_ROWS", 16)  # as on a GPU
    for n, k in ((1, 1), (4096, 3000), (1_281_167, 3000), (50_000, 16)):
        rows = kernels.chunk_of(n, k)
        assert rows % kernels.tile_rows(k) == 0
        assert -(-n // rows) <= kernels.CHUNKS
        assert kernels.tile_rows(k) * k <= 2 * kernels.TILE
    assert -(-4096 // kernels.chunk_of(4096, 3000)) >= 256


def test_tiles_of_the_table_divide_chunks(backend, kernels):
    launch = importlib.import_module("clam_kernels.kernels.common.launch")
    for name, row in launch.table()["sinkhorn_pass"].items():
        k = int(name.rpartition("/")[2])
        assert kernels.tile_rows(k) % row["ROWS"] == 0, name


# ---- scale and bias ------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [4096, 8])
@pytest.mark.parametrize("first", [True, False])
def test_a_scale_and_a_bias(backend, kernels, monkeypatch, most, first):
    """Stored scores on both paths of a step, a batch that shares them, and passes."""
    _small(monkeypatch, kernels)
    monkeypatch.setattr(kernels, "MOST", most)
    x, bias, scale = random(18, 20), random(20, seed=1), torch.tensor([0.5, 2.5])
    _assert_agrees("sinkhorn_potentials", x, 2, None, None, None, first, bias, scale)
    _assert_agrees("sinkhorn_pass", x, random(20, seed=2), None, bias, scale)


def test_a_scale_of_features(backend, kernels, monkeypatch):
    _small(monkeypatch, kernels)
    z, c, bias = random(2, 17, 3), random(9, 3, seed=1), random(9, seed=2)
    scale = torch.tensor([0.5, 2.5])
    _assert_agrees("sinkhorn_potentials_features", z, c, 2, bias, None, None, None, True, scale)
    _assert_agrees("sinkhorn_features_pass", z, c, random(9, seed=3), bias, None, scale)


def test_the_gradient_of_a_scale_alone_takes_bounded_scratch(backend, monkeypatch):
    """Rows are processed in chunks; no array has N x K entries."""
    launch = importlib.import_module("clam_kernels.kernels.common.launch")
    monkeypatch.setattr(launch, "SCRATCH", 4 * 6 * 10)
    real, largest = launch.empty, []

    def note(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        largest.append(math.prod(shape))
        return real(shape, dtype, device)

    x, scale = random(35, 6), torch.tensor(1.5, requires_grad=True)
    weight = random(6, seed=1)
    loss = (torch.ops.clam.sinkhorn_potentials(x, 2, scale=scale)[1] * weight).sum()
    monkeypatch.setattr(launch, "empty", note)
    (gradient,) = torch.autograd.grad(loss, scale)
    assert max(largest) < x.numel()
    exact = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    expected = (truth.sinkhorn_potentials(x.double(), 2, scale=exact)[1] * weight).sum()
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected, exact)[0], rtol=1e-5, atol=1e-5
    )


def test_a_forbidden_pair_gives_the_scale_no_gradient(backend):
    x = random(9, 4)
    x[0, 1] = x[3, 2] = -INF
    _assert_agrees("sinkhorn_potentials", x, 2, None, None, None, True, None, torch.tensor(0.5))


# ---- columns whose masses underflow --------------------------------------------------------------


def _low(k: int = 5) -> Tensor:
    x = random(20, k)
    x[:, 2] -= 300.0
    return x


@pytest.mark.parametrize(("init", "first"), [(None, False), (torch.zeros(5), True)])
def test_a_prototype_far_below_the_others(backend, kernels, monkeypatch, init, first):
    """Its mass underflows if no exact step of the columns went before."""
    args = (_low(), 2, None, None, init, first)
    _, g, _, status = _assert_agrees("sinkhorn_potentials", *args, atol=4e-5)
    assert int(status) == 0
    assert float(g[2]) > 250
    monkeypatch.setattr(kernels.Solver, "rescue", lambda *_: None)
    assert not bool(torch.ops.clam.sinkhorn_potentials(*args)[1].isfinite().all())


def test_its_mass_in_a_pass(backend):
    _, log_mass, _ = _assert_agrees("sinkhorn_pass", _low(), torch.zeros(5), None, atol=4e-5)
    assert float(log_mass[2]) < -290


def test_masses_too_small_for_float32(backend):
    """Rows and columns with mass 1e-60: no step may lose them."""
    a, b = _masses(9), _masses(4, seed=1)
    a[3] = b[1] = -140.0
    _assert_agrees("sinkhorn_potentials", random(9, 4), 3, a, b, None, True, atol=2e-5)


@pytest.mark.parametrize("first", [True, False])
def test_large_potentials(backend, first):
    """Logits and potentials near 1000: the marginal of the last side is exact."""
    x = random(30, 6) + torch.tensor([0.0, 1000.0, -700.0, 0.0, 256.0, 0.0])
    f, g, _, _ = torch.ops.clam.sinkhorn_potentials(x, 3, None, None, None, first)
    expected = truth.sinkhorn_potentials(x.double(), 3, None, None, None, first)
    for potential, exact in ((f, expected[0]), (g, expected[1])):
        torch.testing.assert_close(potential.double(), exact, rtol=1e-7, atol=2e-4)
    plan = (x.double() + f.double()[:, None] + g.double()).exp()
    sums = plan.sum(1) * 30 if first else plan.sum(0) * 6
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-3)


# ---- masked entries, and failures ----------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("most", [4096, 2])
def test_masked_rows_and_columns_may_have_any_values(backend, kernels, monkeypatch, most, first):
    monkeypatch.setattr(kernels, "MOST", most)
    x, a, b = random(9, 6), _masses(9), _masses(6, seed=1)
    a[4] = b[2] = -INF
    expected = _assert_agrees("sinkhorn_potentials", x, 2, a, b, None, first)
    x[4], x[:, 2], x[4, 1] = NAN, INF, -INF
    for result, value in zip(
        torch.ops.clam.sinkhorn_potentials(x, 2, a, b, None, first), expected, strict=True
    ):
        assert torch.equal(result, value)


@pytest.mark.parametrize("most", [4096, 2])
def test_forbidden_pairs(backend, kernels, monkeypatch, most):
    monkeypatch.setattr(kernels, "MOST", most)
    x = random(6, 4)
    x[0, 0] = x[3, 1] = x[3, 2] = x[3, 3] = -INF
    f, g, _, status = torch.ops.clam.sinkhorn_potentials(x, 3, None, None, None, True)
    expected = truth.sinkhorn_potentials(x.double(), 3)
    torch.testing.assert_close(f.double(), expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(g.double(), expected[1], rtol=0, atol=2e-6)
    assert int(status) == 0
    assert torch.softmax(x + g, 1)[3].tolist() == [1, 0, 0, 0]


def _failures() -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(logits, log_row, log_col, start)."""
    results = {}
    for name, place, value in (
        ("nan", (1, 2), NAN), ("inf", (1, 2), INF), ("row", (1,), -INF),
        ("column", (slice(None), 2), -INF), ("fine", (1, 2), -INF),
    ):  # fmt: skip
        x = random(7, 4)
        x[place] = value
        results[name] = (x, _masses(7), _masses(4, seed=1), torch.zeros(4))
    for name, vector, value in (
        ("nan mass of a row", 1, NAN), ("inf mass of a row", 1, INF), ("no row", 1, -INF),
        ("nan mass of a column", 2, NAN), ("inf mass of a column", 2, INF), ("no column", 2, -INF),
        ("nan start", 3, NAN), ("inf start", 3, INF),
    ):  # fmt: skip
        parts = (random(7, 4), _masses(7), _masses(4, seed=1), torch.zeros(4))
        if name.startswith("no "):
            parts[vector].fill_(value)
        else:
            parts[vector][1] = value
        results[name] = parts
    return results


FAILURES = _failures()


@pytest.mark.parametrize("most", [4096, 2])
@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_those_of_the_equations(backend, kernels, monkeypatch, name, most):
    """Status, and NaN or the substitute value, as in the equations; each order, with and without
    iterations.
    """
    monkeypatch.setattr(kernels, "MOST", most)
    x, a, b, start = FAILURES[name]
    for n_iter, first in ((0, True), (1, True), (1, False)):
        init = None if n_iter and "start" not in name else start
        result = torch.ops.clam.sinkhorn_potentials(x, n_iter, a, b, init, first)
        expected = truth.sinkhorn_potentials(*_double((x, n_iter, a, b, init, first)))
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(
                one.double(), other.double(), rtol=1e-5, atol=4e-6, equal_nan=True
            )
    result = torch.ops.clam.sinkhorn_pass(x, b, a)
    for one, other in zip(result, truth.sinkhorn_pass(*_double((x, b, a))), strict=True):
        torch.testing.assert_close(
            one.double(), other.double(), rtol=1e-5, atol=4e-6, equal_nan=True
        )


@pytest.mark.parametrize(("value", "status"), [(NAN, 2), (INF, 2), (-INF, 3)])
def test_a_bias_is_a_logit_of_its_column(backend, value, status):
    z, c, bias = random(7, 3), random(4, 3, seed=1), random(4, seed=2)
    bias[1] = value
    for n_iter, first in ((0, True), (1, True), (1, False)):
        result = torch.ops.clam.sinkhorn_potentials_features(
            z, c, n_iter, bias, None, None, None, first
        )
        assert int(result[3]) == status
        assert bool(result[0].isnan().all() & result[1].isnan().all() & result[2].isnan())
    out = torch.zeros(4).log_softmax(0)
    out[1] = -INF  # and is masked if its column is
    result = torch.ops.clam.sinkhorn_potentials_features(z, c, 2, bias, None, out, None, True)
    expected = truth.sinkhorn_potentials_features(*_double((z, c, 2, bias, None, out)))
    assert int(result[3]) == 0
    torch.testing.assert_close(result[1].double(), expected[1], rtol=0, atol=4e-6)


def test_a_problem_that_fails_does_not_change_others(backend):
    x = random(3, 7, 4)
    x[1, 2, 2] = NAN
    result = torch.ops.clam.sinkhorn_potentials(x, 2, None, None, None, True)
    assert result[3].tolist() == [0, 2, 0]
    for at in (0, 2):
        alone = torch.ops.clam.sinkhorn_potentials(x[at], 2, None, None, None, True)
        assert all(torch.equal(a[at], b) for a, b in zip(result, alone, strict=True))


# ---- launches and addresses ----------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launch = importlib.import_module("clam_kernels.kernels.common.launch")
    real, names = launch.launch, []

    def note(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__.removesuffix("_kernel"))
        real(kernel, *args, **options)

    monkeypatch.setattr(launch, "launch", note)
    return names


def test_launches(backend, launched):
    """Two launches an iteration, and one that ends at once unless masses underflowed; codes of
    three iterations are nine launches, and twelve from features, whatever the batch.
    """
    step = ["pass", "merge"]
    x = random(2, 20, 6)
    torch.ops.clam.sinkhorn_potentials(x, 3, None, None, None, True)
    assert launched == ["columns", "merge", *3 * step, "finish"]
    launched.clear()
    torch.ops.clam.sinkhorn_potentials(x, 2, None, None, torch.zeros(6), True)
    assert launched == [*2 * [*step, "rescue"], *step, "finish"]
    launched.clear()
    torch.ops.clam.sinkhorn_potentials_features(
        x[..., :3], x[0, :6, :3], 3, None, None, None, None, True
    )
    assert launched == ["columns", "merge", *3 * ["rows", "columns", "merge"], "finish"]


def test_offsets_are_64_bits_wide(backend):
    """Strides of rows and of the batch past 2^31 reach the right entries."""
    far = (1 << 31) + 64
    try:
        buffer = torch.empty(2 * far + 12)
    except RuntimeError:
        pytest.skip("no 17 GB of address space here")
    x = buffer.as_strided((3, 4), (far, 1))
    x.copy_(random(3, 4))
    result = torch.ops.clam.sinkhorn_potentials(x, 2, None, None, None, True)
    expected = torch.ops.clam.sinkhorn_potentials(x.clone(), 2, None, None, None, True)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    z, c = buffer.as_strided((2, 3, 4), (far, 4, 1)), random(5, 4, seed=1)
    z.copy_(random(2, 3, 4))
    result = torch.ops.clam.sinkhorn_potentials_features(z, c, 1, None, None, None, None, True)
    expected = torch.ops.clam.sinkhorn_potentials_features(
        z.clone(), c, 1, None, None, None, None, True
    )
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_one_row_many_times(backend):
    """A stride of 0 along the rows is not copied: g has a closed form."""
    row = random(1, 6)
    _, g, _, _ = torch.ops.clam.sinkhorn_potentials(row.expand(50, 6), 1, None, None, None, True)
    torch.testing.assert_close(g, -math.log(6) - row[0] - math.log(50), rtol=1e-6, atol=1e-6)


def test_many_shapes_need_few_compilations(backend):
    """Thirty sizes of one width need a handful of specialisations."""
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "import torch, resources\n"
        "from clam_kernels.kernels.sinkhorn import solver\n"
        "keys = {}\n"
        "for i in range(30):\n"
        "    x = torch.zeros(*([3] if i % 5 == 0 else []), 1000 + 37 * i, 70 + i)\n"
        "    z, c = torch.zeros(500 + 37 * i, 16), torch.zeros(70 + 13 * i, 16)\n"
        "    def call():\n"
        "        solver.sinkhorn_potentials(x, 2, None, None, None, True, None, None, 'highest')\n"
        "        solver.sinkhorn_potentials_features(z, c, 2, *[None] * 4, True, None, 'highest')\n"
        "    for one in resources.record('sm_90', call):\n"
        "        words = ('FORM', 'STARTED', 'FUSED', 'USED')\n"
        "        name = one.name, *(one.options.get(w) for w in words)\n"
        "        keys.setdefault(name, set()).add(repr(resources.signature(one)))\n"
        "print(max(map(len, keys.values())), {n: len(one) for n, one in keys.items()})\n"
    )
    output = output_of(code)
    assert int(output.split()[0]) <= 4, output
