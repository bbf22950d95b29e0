# SPDX-License-Identifier: Apache-2.0
"""`import clam_kernels` in a fresh interpreter: it prints nothing and loads few modules."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("triton", "sklearn", "numpy.testing", "torch._dynamo", "torch._inductor", "scipy",
    "matplotlib", "pandas")  # fmt: skip
# Parts of the package that the import loads; all others load at their first use.
FIRST = ("_core", "_version", "ops", "transport", "distributed")
FACTS = f"""
import json, logging, sys
import torch
root = logging.getLogger()
before = (root.level, list(root.handlers), logging.root.manager.disable)
loaded = set(sys.modules)
import clam_kernels
facts = {{
    "loaded": sorted(set(sys.modules) - loaded),
    "heavy": [name for name in {HEAVY} if name in sys.modules],
    "cuda": torch.cuda.is_initialized(),
    "root": before == (root.level, list(root.handlers), logging.root.manager.disable),
    "handlers": [type(h).__name__ for h in logging.getLogger("clam_kernels").handlers],
}}
with open(sys.argv[1], "w") as file:
    json.dump(facts, file)
"""


def _run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter without the settings of the tests; warnings are errors."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CLAM_", "TRITON_", "PYTEST"))}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env=env, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, Any]:
    """The facts that an import reports; it must print nothing else."""
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    done = _run(FACTS, str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    return json.loads(path.read_text())


def test_import_is_quick(facts):
    """Judged by the modules that are loaded, which are the same on every machine: beside torch the
    import loads these parts of the package and no other distribution.
    """
    ours = [name for name in facts["loaded"] if name.partition(".")[0] == "clam_kernels"]
    parts = {name.split(".")[1] for name in ours if "." in name}
    assert parts <= set(FIRST)
    roots = {name.partition(".")[0] for name in facts["loaded"]}
    allowed = {"clam_kernels", "python_fallback", "torch", *sys.stdlib_module_names}
    assert roots <= allowed


def test_import_brings_in_nothing_heavy(facts):
    assert facts["heavy"] == []
    assert not facts["cuda"]


def test_import_leaves_logging_alone(facts):
    assert facts["root"]
    assert facts["handlers"] == ["NullHandler"]


def test_without_triton_everything_runs():
    """A CPU wheel of torch has no triton: ops and gradients must not import it."""
    done = _run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, clam_kernels as ck\n"
        "v = torch.zeros(2, 3, requires_grad=True)\n"
        "ck.am_recursion(v, torch.eye(3), 1.0, 2).sum().backward()\n"
        "ck.am_assign(v, torch.eye(3)); ck.am_energy(v, torch.eye(3), 1.0)\n"
        "assert 'sklearn' not in sys.modules\n"
        "try:\n"
        "    with ck.backend('triton'): ck.am_step(v, torch.eye(3), 1.0)\n"
        "except RuntimeError as error:\n"
        "    assert str(error).startswith(\"backend 'triton' cannot run clam::am_step: \"), error\n"
        "else:\n"
        "    raise AssertionError('a forced backend fell back')\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_lazy_names():
    """The estimators load at first use, and unknown names raise AttributeError."""
    done = _run(
        "import sys, clam_kernels as ck\n"
        "assert 'sklearn' not in sys.modules\n"
        "assert all(hasattr(ck, name) for name in ck.__all__)\n"
        "assert set(ck.list_estimators()) <= set(ck.__all__)\n"
        "assert 'sklearn' in sys.modules\n"
        "try:\n"
        "    ck.Clam\n"
        "except AttributeError as error:\n"
        "    assert str(error) == \"module 'clam_kernels' has no attribute 'Clam'\"\n"
        "else:\n"
        "    raise AssertionError('an unknown name was found')\n"
    )
    assert done.returncode == 0, done.stderr


# ---- print and the root logger, by reading the files --------------------------------------------


def loud(text: str, but_for: str = "") -> list[int]:
    """Lines outside one function that print, log through the root logger, or configure it."""
    root = {"basicConfig", "debug", "info", "warning", "error", "critical", "exception", "log"}
    messages = []
    tree = ast.parse(text)
    spared = {
        inner
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == but_for
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in spared:
            name = ast.unparse(node.func)
            is_root = name.startswith("logging.") and name.removeprefix("logging.") in root
            bare = name == "logging.getLogger" and not node.args
            if name in ("print", "sys.stdout.write", "sys.stderr.write") or is_root or bare:
                messages.append(node.lineno)
    return messages


FILES = sorted(
    p
    for package in ("clam_kernels", "python_fallback")
    for p in (ROOT / package).rglob("*.py")
    if p.parent != ROOT / "clam_kernels" / "cli"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_print_and_no_root_logger(path):
    # `python -m clam_kernels.info` is not in cli/; verbose fits print as scikit-learn's do
    spared = {"info.py": "show", "progress.py": "print_line"}.get(path.name, "")
    assert loud(path.read_text(encoding="utf-8"), spared) == []


def test_a_print_is_reported():
    text = (
        "import logging\nprint(1)\ndef f():\n    logging.info('x')\nlogging.getLogger(__name__)\n"
    )
    assert sorted(loud(text)) == [2, 4]
    assert loud("logging.basicConfig()\nlogging.getLogger()") == [1, 2]
    assert loud("def main():\n    print(1)\nprint(2)", "main") == [3]
