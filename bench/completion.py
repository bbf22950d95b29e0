# SPDX-License-Identifier: Apache-2.0
"""Missing entries: hide 20 % of four tables at random, fit ClAM on the other entries and let it
complete the hidden ones; beside it the same recall from the centroids of k-means, a
nearest-neighbour imputer and the mean.

`python3 bench/completion.py` prints the errors and writes bench/results/completion.json. Two of the
tables are in shared/data, beside the checkout.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from quality import load
from sklearn.cluster import KMeans
from sklearn.impute import KNNImputer

from clam_kernels import ClAM, am_recursion
from clam_kernels.estimators.clam.recall import COMPLETION, RECALL_STEPS

RESULTS = Path(__file__).resolve().parent / "results" / "completion.json"
TABLES = {"wine": 12, "libras": 32, "segment": 32, "digits": 32}
SHARE, BAR = 0.2, 1.15


def recall(shown: np.ndarray, hidden: np.ndarray, fitted_on: np.ndarray, k: int, seed: int
             ) -> np.ndarray:  # fmt: skip
    """The hidden entries by the rule of `ClAM.complete`, with k-means centroids as memories."""
    model = KMeans(k, n_init=10, random_state=seed).fit(fitted_on)
    two = np.sort(model.transform(fitted_on) ** 2, axis=1)[:, :2]
    gap = float(np.median(two[:, 1] - two[:, 0]))
    states, centroids, mask = map(torch.from_numpy, (shown, model.cluster_centers_, hidden))
    return am_recursion(states, centroids, COMPLETION / gap, RECALL_STEPS, update_mask=mask).numpy()


def run_mask(x: np.ndarray, k: int, seed: int) -> dict[str, float]:
    """Root mean squared error of the hidden entries for one mask, by method."""
    hidden = np.random.default_rng(seed).random(x.shape) < SHARE
    gaps, shown = np.where(hidden, np.nan, x), np.where(hidden, 0.0, x)
    completed = ClAM(k, random_state=seed).fit(gaps).complete(gaps)
    if not np.array_equal(completed[~hidden], x[~hidden]):
        raise RuntimeError("an observed entry has changed")
    completions = {
        "clam": completed,
        "oracle": recall(shown, hidden, x, k, seed),
        "kmeans_mean_filled": recall(shown, hidden, shown, k, seed),
        "knn_imputer": KNNImputer(n_neighbors=10).fit_transform(gaps),
        "mean": np.zeros_like(x),
    }
    return {
        name: float(np.sqrt(np.square(f - x)[hidden].mean())) for name, f in completions.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    short = False
    for name, k in TABLES.items():
        x = load(name)[0].astype(np.float64)
        runs = [run_mask(x, k, seed) for seed in range(options.masks)]
        errors = {method: float(np.mean([run[method] for run in runs])) for method in runs[0]}
        ratio = errors["clam"] / errors["oracle"]
        met = ratio <= BAR and errors["clam"] < errors["kmeans_mean_filled"]
        short |= not met
        rows.append({"name": name, "k": k, "rmse": errors, "ratio": ratio, "masks": runs})
        cells = "  ".join(f"{method} {error:.3f}" for method, error in errors.items())
        print(
            f"{name:8s} K {k}  {cells}  ratio {ratio:.3f}  {'met' if met else 'MISSED'}", flush=True
        )
    report = {"rows": rows, **record.facts()}
    record.write(options.json, report)
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())
