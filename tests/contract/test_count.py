# SPDX-License-Identifier: Apache-2.0
"""The guard of the suite itself: a run that skips its contract cases fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _slow import LONG_SAMPLES, is_slow
from conftest import (
    BACKENDS,
    MINIMUM,
    is_whole,
    shortfall,
    skip_calls_beyond_the_limits,
    skips,
)
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import clam_kernels
from clam_kernels import testing
from clam_kernels._core import backend as choice

ROOT = Path(__file__).parents[2]
SKIP_ALL = """
import pytest

def pytest_ignore_collect(collection_path):  # one file says as much as all of them, and sooner
    return collection_path.suffix == ".py" and collection_path.name != "test_memory.py" or None

def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.skip(reason="planted"))
"""


def test_a_run_that_skips_everything_fails(tmp_path):
    (tmp_path / "skip_all.py").write_text(SKIP_ALL)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "skip_all", "tests/contract"],
        env=env, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-2000:]
    for spec in clam_kernels.all_ops():
        line = f"ERROR: {spec.name}: 0 contract cases ran, expected at least {MINIMUM}"
        assert line in done.stdout


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [
        ({"args": ["tests"]}, True),
        ({"args": ["tests/contract"]}, True),
        ({"args": [str(ROOT)]}, True),
        ({"args": ["tests"], "markexpr": "not slow and not build"}, True),
        ({"args": ["tests/contract/test_errors.py"]}, False),
        ({"args": ["tests/contract/test_errors.py::test_types"]}, False),
        ({"args": ["tests/architecture"]}, False),
        ({"args": ["tests"], "keyword": "explain"}, False),
        ({"args": ["tests"], "markexpr": "gpu"}, False),
        ({"args": ["tests"], "deselect": ["tests/contract"]}, False),
        ({"args": ["tests"], "collectonly": True}, False),
        ({"args": ["tests"], "ignore": ["tests/contract"]}, False),
    ],
)
def test_only_a_whole_run_needs_the_minimum(arguments, whole, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = {"keyword": "", "markexpr": "", "deselect": None, "collectonly": False, **arguments}
    config = SimpleNamespace(args=options.pop("args"), option=SimpleNamespace(**options))
    assert is_whole(config) is whole


def test_shortfall():
    enough = Counter({spec.name: MINIMUM for spec in clam_kernels.all_ops()})
    assert shortfall(enough) == []
    first = clam_kernels.all_ops()[0].name
    enough[first] -= 1
    assert shortfall(enough) == [
        f"{first}: {MINIMUM - 1} contract cases ran, expected at least {MINIMUM}"
    ]


def test_each_reason_of_a_skip_has_one_line():
    counted = Counter({"nvcc is missing": 1, "triton on cuda: no CUDA device": 540})
    assert skips(counted) == [
        "skipped: 540 cases: triton on cuda: no CUDA device",
        "skipped: 1 case: nvcc is missing",
    ]


def test_make_test_interprets_each_sample():
    """Every op is compared with float64 on each of its samples in float32, except the long ones."""
    for spec in clam_kernels.all_ops():
        for sample in testing.samples(spec.name):
            parameters = {"spec": spec, "sample": sample, "dtype": torch.float32}
            assert not is_slow("test_samples", parameters) or sample.name in LONG_SAMPLES


def refused(spec, backend):
    """Names of the samples that the limits of a backend exclude."""
    limit = choice.implementation(spec.limits[backend])
    samples = [
        s.cast(torch.float32) for s in testing.samples(spec.name) if torch.float32 in s.dtypes
    ]
    return [s.name for s in samples if limit(*s.args) is not None], len(samples)


def test_the_limits_leave_every_sample_to_triton_and_most_to_cuda():
    """Calls beyond a limit are skipped, so a stricter limit would hide failures."""
    for spec in clam_kernels.all_ops():
        assert set(spec.kernels) - {"cuda"} <= set(spec.limits)
        if not spec.kernels:
            continue
        assert refused(spec, "triton")[0] == []
        if "cuda" in spec.limits:
            names, count = refused(spec, "cuda")
            assert len(names) < count / 4, names


def test_the_limits_accept_symbolic_shapes():
    """torch.compile passes symbolic shapes to the limits."""
    for spec in clam_kernels.all_ops():
        args = testing.problem(spec.name, 20, 7, 5).args
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        for where in spec.limits.values():
            assert choice.implementation(where)(*fake) == choice.implementation(where)(*args)


def test_only_calls_beyond_the_limits_are_skipped(monkeypatch):
    """Through autograd, and through opcheck, which wraps errors. An error in a kernel stays an
    error.
    """

    def dies(*args):
        raise RuntimeError("a kernel died")

    real, spec = choice.implementation, testing.spec_of("am_step")
    monkeypatch.setattr(choice, "_unavailable", lambda name, device: None)
    monkeypatch.setattr(
        choice,
        "implementation",
        lambda where: dies if where.startswith("clam_cuda") else real(where),
    )
    for table in (spec.kernels, spec.gradient.saved_kernels):
        monkeypatch.setitem(table, "cuda", "clam_cuda::planted")
    skip_calls_beyond_the_limits(BACKENDS[-1], monkeypatch)
    narrow, wide = (torch.zeros(4, d, requires_grad=True) for d in (3, 17))
    with clam_kernels.backend("cuda"):
        for call in (
            lambda x: spec.packet(x, x, 1.0),
            lambda x: spec.packet(x.detach(), x.detach(), 1.0),
            lambda x: torch.library.opcheck(spec.packet.default, (x, x, 1.0)),
        ):
            with pytest.raises(pytest.skip.Exception, match="cuda: D = 17 > 16"):
                call(wide)
            with pytest.raises(Exception, match="a kernel died"):
                call(narrow)
