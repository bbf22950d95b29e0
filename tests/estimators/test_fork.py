# SPDX-License-Identifier: Apache-2.0
"""A process may fork after small fits, as joblib and torch's DataLoader do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# An alarm ends a child that waits for threads that a fork does not copy.
SCRIPT = """
import os, signal, warnings
import numpy as np
import torch
from clam_kernels import ClAM, KMeans

warnings.simplefilter("ignore")
assert torch.get_num_threads() == 2
x = np.random.default_rng(0).normal(size=({rows}, 20))
x[: len(x) // 2] += 4
gaps = np.where(np.random.default_rng(1).random(x.shape) < 0.1, np.nan, x)


def work():
    {work}


work()
child = os.fork()
if child == 0:
    signal.alarm(50)
    work()
    a = torch.ones(1000, 1000)
    assert float((a @ a).sum()) == 1e9
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
FITS = {
    "ClAM": (
        500,
        "ClAM(3, n_init=4, max_iter=8, random_state=0).fit(x)",
        "ClAM(3, n_init=4, max_iter=8, random_state=0).fit(gaps).complete(gaps)",
        "ClAM(3, random_state=0).partial_fit(x).partial_fit(x).predict_proba(x)",
        "ClAM(3, recipe='paper', n_init=2, max_iter=2, random_state=0).fit(x)",
    ),
    "KMeans": (
        20_000,
        "KMeans(3, n_init=5, random_state=0).fit(x).transform(x)",
        "KMeans(3, algorithm='minibatch', random_state=0).fit(x).score(x)",
    ),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("estimator", FITS)
def test_a_child_fits_after_small_fits_of_its_parent(estimator):
    rows, *lines = FITS[estimator]
    code = SCRIPT.format(work="\n    ".join(lines), rows=rows)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
