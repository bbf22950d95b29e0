# SPDX-License-Identifier: Apache-2.0
"""The first call of a session imports no compiler and no algebra package. After Ctrl-C in the
middle of such an import every later call of the session would fail.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clam_kernels import KMeans

HEAVY = ("sympy", "torch._dynamo", "torch._inductor", "triton", "torch.onnx")
CALLS = f"""
import sys, warnings
import numpy as np, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import _entries
from clam_kernels.nn import AssociativeMemory
warnings.simplefilter("ignore")
def layer():
    made = AssociativeMemory(3, 4, steps=3, beta=1.5, log_weights=True)
    made(torch.zeros(2, 4)).sum().backward()
calls = dict(_entries.ALL)
calls["AssociativeMemory"] = layer  # the one of _entries is made on meta, which torch computes
for name, call in calls.items():
    call()
    for module in {HEAVY!r}:
        assert module not in sys.modules, f"{{name}} imports {{module}}"
print(len(calls))
"""
FITS = """
import sys
import numpy as np
from clam_kernels import ClAM, KMeans
x = np.random.default_rng(0).normal(size=(60, 3))
before = set(sys.modules)
for model in (KMeans(3), ClAM(3, n_init=2, max_iter=2)):
    model.fit(x).predict(x)
print(*sorted(set(sys.modules) - before))
"""

PREDICTS = """
import sys
import torch, sklearn.cluster
before = set(sys.modules)
from clam_kernels.cli import main
assert main(["predict", *sys.argv[1:]]) == 0
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}), file=sys.stderr)
"""


def _run(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.timeout(300)
def test_no_eager_call_imports_a_compiler() -> None:
    assert int(_run(CALLS)) > 50


def test_the_first_fit_imports_nothing_of_torch() -> None:
    new = _run(FITS).split()
    assert not [name for name in new if name.startswith(("torch.", "sympy", "triton"))], new
    assert len(new) < 30, new


def test_predict_imports_little_beside_torch_and_scikit_learn(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "x.npy", x)
    KMeans(2, n_init=1, random_state=0).fit(x).save(tmp_path / "m")
    paths = [str(tmp_path / "m"), str(tmp_path / "x.npy")]
    run = subprocess.run(
        [sys.executable, "-c", PREDICTS, *paths], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    new = set(run.stderr.splitlines()[-1].split()) - set(sys.stdlib_module_names)
    assert new <= {"clam_kernels", "python_fallback", "safetensors"}
