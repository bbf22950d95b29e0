# SPDX-License-Identifier: Apache-2.0
"""A million rows on a CPU: time, memory and inertia of ClAM beside one k-means of scikit-learn.

`python3 bench/million.py` prints the figures and writes bench/results/million.json. Each fit runs
in its own process, so that its peak memory does not include another fit's, and on all cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
from sklearn.cluster import KMeans

from clam_kernels import ClAM, metrics

RESULTS = Path(__file__).resolve().parent / "results" / "million.json"
K, FEATURES = 64, 16


def data(rows: int, seed: int = 0) -> np.ndarray:
    """A mixture of 64 overlapping Gaussians of unequal weight and spread, float32."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(K, FEATURES)) * 2
    spread = rng.uniform(0.6, 1.4, size=K)
    label = rng.choice(K, rows, p=rng.dirichlet(np.full(K, 3.0)))
    noise = rng.normal(size=(rows, FEATURES)) * spread[label, None]
    return (means[label] + noise).astype(np.float32)


def measure(method: str, rows: int, seed: int) -> dict[str, Any]:
    """One fit in this process."""
    x = data(rows)
    estimator = (
        ClAM(K, random_state=seed) if method == "clam" else KMeans(K, n_init=1, random_state=seed)
    )
    small = x[:2000]
    (ClAM(K, n_init=2, max_iter=2) if method == "clam" else KMeans(K, n_init=1)).fit(small)
    before, start, cpu = record.resident_bytes(), time.perf_counter(), time.process_time()
    model = estimator.fit(x)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "extra_bytes": peak - before,
        "inertia": float(model.inertia_),
        "silhouette": metrics.silhouette(x, model.labels_, 10_000),
        "used": len(np.unique(model.labels_)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    fresh = multiprocessing.get_context("spawn")
    for seed in range(options.seeds):
        run: dict[str, Any] = {"seed": seed}
        for method in ("kmeans", "clam"):
            with fresh.Pool(1) as pool:
                run[method] = pool.apply(measure, (method, options.rows, seed))
            print(seed, method, {k: float(f"{v:.4g}") for k, v in run[method].items()}, flush=True)
        run["inertia_ratio"] = run["clam"]["inertia"] / run["kmeans"]["inertia"]
        run["time_ratio"] = run["clam"]["seconds"] / run["kmeans"]["seconds"]
        runs.append(run)
    report = {
        "rows": options.rows,
        "features": FEATURES,
        "k": K,
        "input_bytes": options.rows * FEATURES * 4,
        "runs": runs,
        **record.facts(),
    }
    record.write(options.json, report)
    worst = max(run["inertia_ratio"] for run in runs)
    extra = max(run["clam"]["extra_bytes"] for run in runs)
    print(f"inertia at most {worst:.4f} of k-means, {extra / 1e6:.0f} MB over the input")
    return 0 if worst <= 1.02 and extra <= 500e6 else 1


if __name__ == "__main__":
    raise SystemExit(main())
