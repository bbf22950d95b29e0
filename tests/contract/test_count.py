# SPDX-License-Identifier: Apache-2.0
"""The suite's own guard: a run that skips its contract cases fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MINIMUM, is_whole, shortfall

import clam_kernels

ROOT = Path(__file__).parents[2]
SKIP_ALL = """
import pytest

def pytest_collection_modifyitems(items):
    del items[30:]
    for item in items:
        item.add_marker(pytest.mark.skip(reason="planted"))
"""


def test_a_run_that_skips_everything_fails(tmp_path):
    (tmp_path / "skip_all.py").write_text(SKIP_ALL)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "skip_all", "tests/contract"],
        env=env, capture_output=True, text=True, timeout=120, cwd=ROOT,
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
def test_only_a_whole_run_is_held_to_it(arguments, whole, monkeypatch):
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
