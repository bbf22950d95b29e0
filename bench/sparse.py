# SPDX-License-Identifier: Apache-2.0
"""KMeans on sparse rows beside scikit-learn's: seconds, memory and results of one fit and of
`predict`.

`python3 bench/sparse.py` prints the figures and writes bench/results/sparse.json. Times are the
least of several runs that alternate in one process, on one thread. Memory is measured in a new
process for each: the peak less the memory before the call. Both fits start from the same rows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from scipy import sparse
from sklearn.cluster import KMeans as Peer

from clam_kernels import KMeans

RESULTS = Path(__file__).resolve().parent / "results/sparse.json"
# (rows, features, share of entries that are not 0)
SHAPES = ((2000, 5000, 0.01), (4000, 50_000, 0.002), (100_000, 10_000, 0.001))
LEAST_RATIO, MOST_MEMORY = 0.5, 2.0


def data(rows: int, features: int, density: float) -> sparse.csr_array:
    """A table with random entries at random places."""
    random = np.random.default_rng(0)
    return sparse.random_array((rows, features), density=density, format="csr", rng=random)


def model(ours: bool, clusters: int) -> Any:
    """An estimator of ours or of scikit-learn: one start, at most ten iterations."""
    kind = KMeans if ours else Peer
    return kind(clusters, n_init=1, max_iter=10, random_state=0)


def seconds(call: Any) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def extra_bytes(ours: bool, shape: tuple[int, int, float], clusters: int) -> float:
    """Peak memory of a fit less the memory before it; a small fit first does the imports."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model(ours, 2).fit(data(50, 50, 0.2))
    x = data(*shape)
    before = record.resident_bytes()
    # forget the peak of the calls before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    model(ours, clusters).fit(x)
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024.0 - before
    raise RuntimeError("/proc/self/status: expected a line VmHWM, got none")


def measure(shape: tuple[int, int, float], clusters: int, repeats: int) -> dict[str, Any]:
    """Times of both estimators in alternation, their memory, and whether their results agree."""
    x = data(*shape)
    ours, theirs = model(True, clusters).fit(x), model(False, clusters).fit(x)
    calls = {
        "fit": lambda: model(True, clusters).fit(x),
        "fit_sklearn": lambda: model(False, clusters).fit(x),
        "predict": lambda: ours.predict(x),
        "predict_sklearn": lambda: theirs.predict(x),
    }
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeats)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = [pool.apply(extra_bytes, (own, shape, clusters)) for own in (True, False)]
    rows, features, density = shape
    return {
        "rows": rows,
        "features": features,
        "density": density,
        "clusters": clusters,
        "seconds": {name: min(one[name] for one in times) for name in calls},
        "extra_bytes": memory[0],
        "extra_bytes_sklearn": memory[1],
        "iterations": [ours.n_iter_, theirs.n_iter_],
        "inertia": [ours.inertia_, float(theirs.inertia_)],
        "labels_that_differ": int((ours.labels_ != theirs.labels_).sum()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for shape in SHAPES:
        case = measure(shape, options.clusters, options.repeats)
        times = case["seconds"]
        case["fit_ratio"] = times["fit_sklearn"] / times["fit"]
        case["predict_ratio"] = times["predict_sklearn"] / times["predict"]
        case["memory_ratio"] = case["extra_bytes"] / case["extra_bytes_sklearn"]
        cases.append(case)
        print(case, flush=True)
    report = {"cases": cases, **record.facts()}
    record.write(options.json, report)
    good = all(c["fit_ratio"] >= LEAST_RATIO and c["memory_ratio"] <= MOST_MEMORY for c in cases)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
