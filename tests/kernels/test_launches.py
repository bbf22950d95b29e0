# SPDX-License-Identifier: Apache-2.0
"""The launchers of the Triton kernels: batches as views, cells of scratch, rows too wide for
registers, how often a GPU would compile. All tests run through the interpreter, on the CPU.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from _accuracy import assert_accurate
from _interpreted import NEEDS_INTERPRETER, ROOT
from _subprocess import output_of
from torch import Tensor

import clam_kernels
from clam_kernels import testing
from python_fallback import am as truth

pytestmark = NEEDS_INTERPRETER


@pytest.fixture(scope="module")
def operands():
    return importlib.import_module("clam_kernels.kernels.common.operands")


@pytest.mark.parametrize("seed", range(200))
def test_any_batch_is_two_dims_of_strides(operands, seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    full = [pick(3) + 1 for _ in range(pick(5))]
    operand_list = []
    for core in (2, 2, 1, 1):
        lead_dims = pick(len(full) + 1)
        lead = [n if pick(3) else 1 for n in full[len(full) - lead_dims :]]
        x = torch.randn(*lead, *[4 + pick(2) for _ in range(core)], generator=generator)
        if pick(3) == 0 and x.ndim > 1:
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        operand_list.append((x, core))
    batch = operands.batch_of(operand_list)
    for (x, core), view in zip(operand_list, operands.arrange(batch, operand_list), strict=True):
        tail = x.shape[x.ndim - core :]
        expected = x.expand(*batch, *tail).reshape(-1, *tail)
        assert torch.equal(view.reshape(-1, *tail), expected)


def test_a_shared_operand_is_not_copied(operands):
    """Crossed batches are two strides, 0 for a shared operand."""
    v, rho = torch.randn(2, 1, 5, 3), torch.randn(3, 4, 3)
    views = operands.arrange((2, 3), [(v, 2), (rho, 2)])
    assert [x.data_ptr() for x in views] == [v.data_ptr(), rho.data_ptr()]
    assert [x.stride()[:2] for x in views] == [(15, 0), (0, 12)]


def test_no_rows_in_batches_that_cross():
    """Three batch dims that do not merge, without rows."""
    v, rho = torch.randn(3, 1, 2, 0, 5), torch.randn(1, 2, 1, 4, 5)
    with clam_kernels.backend("triton"):
        assert torch.ops.clam.am_step(v, rho, 1.0).shape == (3, 2, 2, 0, 5)
        assert torch.ops.clam.kmeans_assign(v, rho)[0].shape == (3, 2, 2, 0)


def test_rows_that_32_bits_cannot_count_are_refused():
    launch = importlib.import_module("clam_kernels.kernels.common.launch")
    v = torch.zeros(1, 1).expand((1 << 31) - 5, 1)
    assert "N = 2147483643 >" in launch.why_not(v)
    assert launch.why_not(v[: 1 << 30]) is None


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _wide_calls(d: int) -> list[tuple[str, tuple[object, ...]]]:
    v, rho, mask = _random(40, d), _random(33, d, seed=1), torch.rand(40, d).double()
    weights = _random(33, seed=2)
    weights[1] = -math.inf
    sharp = torch.tensor(2.0 / d, dtype=torch.float64)
    each = 2.0 / d * torch.rand(33, dtype=torch.float64)
    masked = torch.full((33,), -math.inf, dtype=torch.float64)
    return [
        ("am_step", (v, rho, sharp, 0.7, None, None)),
        ("am_recursion", (v, rho, each, 3, 0.6, mask, weights)),
        ("am_recursion", (v, rho, math.inf, 2, 0.6, mask, weights)),
        ("am_recursion", (_random(2, 40, d), rho, sharp, 2, 1.0, None, masked)),
        ("am_energy", (v, rho, sharp, weights)),
        ("am_assign", (v, rho, weights)),
    ]


WIDEST = [pytest.param(1024, case, marks=pytest.mark.slow) for case in (0, 1)]


@pytest.mark.parametrize(("d", "case"), [*((150, case) for case in range(6)), *WIDEST])
def test_rows_too_wide_for_registers(d, case):
    """D above 128 runs the wide kernels: outputs and gradients against float64."""
    op, args = _wide_calls(d)[case]
    _assert_agrees(op, args)


def _assert_agrees(op: str, *draws: tuple[object, ...], scale: float = 4.0) -> None:
    """Check outputs and gradients of calls that differ in their values alone, against float64."""
    spec, names = testing.spec_of(op), testing.argument_names(op)
    expected = tuple(
        n for n, a in zip(names, draws[0], strict=False) if isinstance(a, Tensor) and spec.gradient
    )
    values = []
    for args in draws:
        call = testing.Sample(op, "wide", args, expected).cast(torch.float32)
        with clam_kernels.backend("triton"):
            result = testing.evaluate(spec.packet, call, expected)
        grads = testing.upstream(result.outputs)
        exact = testing.evaluate(spec.truth, call.cast(torch.float64), expected, grads)
        plain = testing.evaluate(testing.eager(op), call, expected, grads)
        values.append((result, exact, plain))
    assert_accurate(values, gradient_scale=scale)


@pytest.mark.parametrize(
    ("d", "budget", "fused"),
    [(5, 1, True), (5, 3000, True), (5, 3000, False), (5, 40_000, False), (150, 20_000, False)],
)
def test_cells_of_scratch_change_nothing_but_rounding(monkeypatch, budget, d, fused):
    """A cell is a part of a problem, one problem or several; either side may have batch dims."""
    if not fused:
        monkeypatch.setattr(am_fused(), "serves", lambda *arguments: False)
    launch = importlib.import_module("clam_kernels.kernels.common.launch")
    monkeypatch.setattr(launch, "SCRATCH", budget)
    call = importlib.import_module("clam_kernels.kernels.am.call")
    monkeypatch.setattr(
        call.Call, "settings", lambda self, name: {**SETTINGS(self, name), "ROWS": 16}
    )
    lead, n = (3, 37) if d == 5 else (2, 18)
    v, rho = _random(lead, 2, n, d), _random(7, d, seed=1)
    beta = torch.rand(lead, 1, 7, dtype=torch.float64) / d
    _assert_agrees("am_recursion", (v, rho, beta, 2, 0.7, None, None))
    if d == 5:
        _assert_agrees("am_recursion", (v, rho, beta.new_tensor(1.0 / d), 2, 0.7, None, None))


SETTINGS = importlib.import_module("clam_kernels.kernels.am.call").Call.settings


def am_fused():
    return importlib.import_module("clam_kernels.kernels.am.backward_fused")


# the error of one draw of a few rows varies by chance
DRAWS = 6
TWO = ("plain", "batch-crossed", "beta-k-weights", "all-masked-in-one-problem", "T-9-mask")


@pytest.mark.parametrize("name", TWO)
def test_few_features_through_the_two_kernels(monkeypatch, name):
    """The kernels for many memories also compute calls that the fused backward serves."""
    monkeypatch.setattr(am_fused(), "serves", lambda *arguments: False)
    samples = [
        s for i in range(DRAWS) for s in testing.samples("am_recursion", i) if s.name == name
    ]
    _assert_agrees("am_recursion", *(sample.cast(torch.float64).args for sample in samples))


def test_the_fused_backward_is_one_launch(monkeypatch):
    """One launch after the one that prepares the memories, then two for the rows in doubt: their
    gradients, and the sums of these. More memories than one program can store need two more.
    """
    launch = importlib.import_module("clam_kernels.kernels.common.launch")
    backward = importlib.import_module("clam_kernels.kernels.am.backward").am_recursion_backward
    real, names = launch.launch, []

    def counted(kernel, *rest, **options):
        names.append(kernel.fn.__name__)
        real(kernel, *rest, **options)

    monkeypatch.setattr(launch, "launch", counted)
    v = _random(70, 4).float()
    for k, launches in ((4, 4), (64, 4), (65, 6)):
        names.clear()
        rho, needs = _random(k, 4, seed=1).float(), [True, True, True, False, True]
        backward(v, v, rho, 1.0, 2, 1.0, None, None, needs, "highest")
        assert len(names) == launches, names


def test_many_shapes_need_few_compilations():
    """Fifty counts of rows, memories, steps and batches need a handful of specialisations."""
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "import torch, resources\n"
        "from clam_kernels.kernels.am import forward\n"
        "keys = set()\n"
        "for i in range(50):\n"
        "    v = torch.zeros(*([3] if i % 5 == 0 else []), 1000 + 37 * i, 16)\n"
        "    rho = torch.zeros(70 + 13 * i, 16)\n"
        "    call = lambda: forward.am_recursion(v, rho, 1.0, 1 + i, 1.0, None, None, 'highest')\n"
        "    for one in resources.record('sm_90', call):\n"
        "        keys.add(repr((one.name, resources.signature(one))))\n"
        "print(len(keys))\n"
    )
    assert int(output_of(code)) <= 4


def test_offsets_are_64_bits_wide():
    """A batch stride past 2^31 reaches the right rows: the operands are views of one large
    buffer.
    """
    rows, d = 3, 4
    far = (1 << 31) + 64
    try:
        buffer = torch.empty(far + rows * d)
    except RuntimeError:
        pytest.skip("no 8 GB of address space here")
    v = buffer.as_strided((2, rows, d), (far, d, 1))
    small = torch.randn(2, rows, d, generator=torch.Generator().manual_seed(0))
    v.copy_(small)
    rho = torch.randn(2, 5, d, generator=torch.Generator().manual_seed(1))
    with clam_kernels.backend("triton"):
        result = torch.ops.clam.am_step(v, rho, 1.0)
    torch.testing.assert_close(result, truth.am_step(small, rho, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("d", "dtype", "precision", "name", "says"),
    [
        (8, torch.float32, "medium", "cuda", "preferred"),
        (16, torch.float32, "highest", "cuda", "preferred"),
        (16, torch.float32, "high", "triton", "matrix units"),
        (17, torch.float16, "highest", "triton", "D = 17"),
        (16, torch.float64, "highest", "reference", "float64"),
    ],
)
def test_the_automatic_choice_on_a_gpu(monkeypatch, d, dtype, precision, name, says):
    """The arguments alone decide; `explain` gives the reason for each backend that it
    passes over.
    """
    backend = importlib.import_module("clam_kernels._core.backend")
    monkeypatch.setattr(backend.library, "why_unavailable", lambda: None)
    spec = testing.spec_of("am_recursion")
    v, rho = torch.zeros(5, d, dtype=dtype), torch.zeros(4, d, dtype=dtype)
    chosen, reason = backend.choose(spec, "cuda", (v, rho, 1.0, 3, 1.0, None, None, precision))
    assert chosen == name
    assert says in reason


@pytest.mark.parametrize(("options", "name"), [((), "cuda"), (("high",), "triton")])
def test_explain_works_without_the_memories(monkeypatch, options, name):
    """`ClAM.fit` calls it before the memories exist."""
    backend = importlib.import_module("clam_kernels._core.backend")
    monkeypatch.setattr(backend.library, "why_unavailable", lambda: None)
    v = torch.zeros(5, 16)
    assert backend.choose(testing.spec_of("am_recursion"), "cuda", (v, *options))[0] == name
    for spec in clam_kernels.all_ops():
        assert clam_kernels.choice(spec.name, v, *options).op == f"clam::{spec.name}"
        if not spec.kernels:
            continue
        with clam_kernels.backend("triton"):
            mode = options[0] if options else "highest"
            assert clam_kernels.choice(spec.name, v, *options)[1:3] == ("triton", mode)


def test_a_forced_backend_says_why_it_cannot(monkeypatch):
    v = torch.zeros(5, 3, dtype=torch.float64)
    with clam_kernels.backend("triton"), pytest.raises(RuntimeError, match="by the reference"):
        torch.ops.clam.am_step(v, v, 1.0)


def test_tuning_needs_a_gpu_and_has_a_dry_run(tmp_path):
    def tune(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "tools/tune.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    table = ROOT / "clam_kernels/kernels/configs.json"
    before = table.read_bytes()
    if not torch.cuda.is_available():
        assert tune().returncode == 3
    out = tmp_path / "tiles.json"
    chosen = ("--mode", "high", "--dim", "16", "--kernel", "kmeans_assign")
    done = tune("--dry-run", *chosen, "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kmeans_assign high 16: ")
    assert table.read_bytes() == before
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["machine"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["rows"]
    for row in report["rows"]:  # each time has the error of its result beside it
        assert row["ms_median"] > 0
        assert row["err_vs_f64"] < 1e-6
        assert row["wrong_labels"] == 0


def test_forward_and_backward_use_the_same_products():
    """Forward and backward, the rows' side and the memories' side use one kind of product for a
    row.
    """
    table = importlib.import_module("clam_kernels.kernels.common.launch").table()
    alike = ("am_recursion_full", "am_rows_backward", "am_memories_backward")
    for arch in ("sm_80", "sm_86", "sm_90", "sm_100"):
        for mode in ("highest", "high", "medium"):
            rows = [table[f"{k}{w}"] for k in alike for w in ("", "_wide")]
            mine = [r[n]["PREC"] for r in rows for n in r if n.startswith(f"{arch}/{mode}/")]
            assert len(set(mine)) == 1, (arch, mode, mine)


@pytest.mark.parametrize("d", [32, 150])
@pytest.mark.parametrize("k", [10, 70])
def test_a_logit_rounded_otherwise_does_not_reach_a_large_beta(monkeypatch, d, k):
    """Another kernel's maximum, off by one rounding: rows with all weight on one memory keep the
    gradient 0.
    """
    backward = importlib.import_module("clam_kernels.kernels.am.backward")
    walk = backward._walk_back

    def nudged(call, cell, *rest):
        cell.top.mul_(1 + 1.2e-7)
        walk(call, cell, *rest)

    monkeypatch.setattr(backward, "_walk_back", nudged)
    rho = _random(k, d).float()
    v = (rho[torch.arange(60) % k] + 0.01 * _random(60, d, seed=1).float()).requires_grad_()
    with clam_kernels.backend("triton"):
        out = torch.ops.clam.am_step(v, rho, 100.0)
        (grad,) = torch.autograd.grad(out, v, _random(60, d, seed=2).float())
    assert float(grad.abs().max()) < 1e-6


def test_rows_past_the_end_reach_no_gradient(monkeypatch):
    """Large log-weights, and more rows in a tile than the cell has."""
    call = importlib.import_module("clam_kernels.kernels.am.call")

    def settings(self, name):
        rows = 64 if name == "am_memories_backward" else 16
        return {**SETTINGS(self, name), "ROWS": rows}

    monkeypatch.setattr(call.Call, "settings", settings)
    weights = 100.0 + _random(7, seed=3)
    beta = torch.tensor(0.5, dtype=torch.float64)
    # `size` is that of the logits, so their rounding is relative to it
    v, rho, size = _random(5, 4), _random(7, 4, seed=1), 100.0
    _assert_agrees("am_recursion", (v, rho, beta, 2, 0.7, None, weights), scale=size)
    _assert_agrees("am_energy", (v, rho, beta, weights), scale=size)


def test_a_step_of_0_keeps_every_bit():
    v, rho = 1e3 + _random(5, 3).float(), _random(4, 3, seed=1).float()
    with clam_kernels.backend("triton"):
        out = torch.ops.clam.am_step(v.requires_grad_(), rho, 1.0, 0.0)
        (grad,) = torch.autograd.grad(out, v, torch.ones_like(v))
    assert torch.equal(out, v)
    assert torch.equal(grad, torch.ones_like(v))


@pytest.mark.parametrize("size", [1e-33, 1e-25, 1e-15, 1.0, 1e15])
def test_halves_of_memories_of_any_size(size):
    """Squared norms may underflow float32: the factor that scales by them must not overflow."""
    rho = size * _random(20, 32, seed=1).float()
    v = size * _random(70, 32).float()
    beta = min(0.5 / size / size, 1e38)
    with clam_kernels.backend("triton"):
        out = torch.ops.clam.am_recursion(v, rho, beta, 3, precision="high")
    exact = truth.am_recursion(v.double(), rho.double(), beta, 3)
    if size > 1e-18:  # below, float32 has no squared norms
        assert float((out.double() - exact).abs().max()) <= 1e-4 * size
    assert bool(out.isfinite().all())


def test_highest_does_not_multiply_in_halves():
    """All halves share one scale: memories far below the largest would lose digits."""
    table = importlib.import_module("clam_kernels.kernels.common.launch").table()
    for kernel in (k for k in table if k.startswith("am_")):
        kinds = {row["PREC"] for name, row in table[kernel].items() if "/highest/" in name}
        assert "f16x3" not in kinds, kernel
    v, rho = _random(70, 32).float(), _random(20, 32, seed=1).float()
    rho[3], rho[4] = 1e4, -1e4
    _assert_agrees("am_recursion", (v.double(), rho.double(), 0.5, 1, 1.0, None, None))
