# SPDX-License-Identifier: Apache-2.0
"""ClAM on tables whose columns have different units: twenty tables, three seeds. The clusters of a
raw table must be as good as those of its scaled form, no filled cell may lie outside the observed
range of its column, and filled cells must be at least as close as the means of the columns.

`python3 bench/units.py` prints the figures and writes bench/results/units.json. Eight of the tables
are in shared/data, beside the checkout.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import record
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

from clam_kernels import ClAM, metrics

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "bench" / "results" / "units.json"
# Number of clusters of every table; at most ROWS rows of a table are drawn. exercise and linnerud
# are the two halves of one data set. RAW tables also run in the units of their own columns.
TABLES = {
    "iris": 3, "wine": 3, "breast_cancer": 2, "digits": 10, "diabetes": 4, "linnerud": 2,
    "exercise": 2, "zoo": 7, "ecoli": 8, "libras": 15, "glass": 6, "mice_protein": 8, "ctg": 10,
    "segment": 7, "yale": 15,
}  # fmt: skip
RAW = ("wine", "breast_cancer", "glass", "ctg", "segment")
ROWS, HIDDEN, SLACK = 600, 0.1, 0.01


def load(name: str, raw: bool) -> np.ndarray:
    """Features in their own units, or each in a random unit between 1e-9 and 1e9."""
    if name == "exercise":
        x = datasets.load_linnerud().data
    elif name == "linnerud":
        x = datasets.load_linnerud().target
    elif hasattr(datasets, f"load_{name}"):
        x = getattr(datasets, f"load_{name}")().data
    else:
        x = np.load(SHARED / f"{name}.npz")["X"]
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    if len(x) > ROWS:
        x = x[np.random.default_rng(0).choice(len(x), ROWS, replace=False)]
    units = np.random.default_rng(1).uniform(-9, 9, x.shape[1])
    return x if raw else x * 10.0**units


def run_seed(x: np.ndarray, k: int, seed: int) -> dict[str, Any]:
    """One table and one seed: both silhouettes, the number of cells out of range, and the errors in
    standard deviations.
    """
    scaler = StandardScaler().fit(x)
    scaled = scaler.transform(x)
    ours, theirs = (ClAM(k, random_state=seed).fit(table) for table in (x, scaled))
    hidden = np.random.default_rng(seed).random(x.shape) < HIDDEN
    hidden &= ~np.all(hidden, axis=0)  # every column keeps an observed entry
    gaps = np.where(hidden, np.nan, x)
    model = ClAM(k, random_state=seed).fit(gaps)
    filled = model.complete(gaps)
    low, high = np.nanmin(gaps, axis=0), np.nanmax(gaps, axis=0)
    means = np.broadcast_to(np.nanmean(gaps, axis=0), x.shape)
    errors = [
        np.square((estimate - x) / scaler.scale_)[hidden].mean() for estimate in (filled, means)
    ]
    return {
        "seed": seed,
        "silhouette": metrics.silhouette(scaled, ours.labels_),
        "silhouette_scaled": metrics.silhouette(scaled, theirs.labels_),
        "standardised": bool((ours.scale_ != 1).any()),
        "filled": int(hidden.sum()),
        "out_of_range": int(((filled < low) | (filled > high)).sum()),
        "centres_out_of_range": int(
            ((model.cluster_centers_ < low) | (model.cluster_centers_ > high)).sum()
        ),
        "error": float(np.sqrt(errors[0])),
        "error_means": float(np.sqrt(errors[1])),
    }


def met(run: dict[str, Any]) -> bool:
    """Whether one run keeps every promise."""
    inside = run["out_of_range"] == 0 and run["centres_out_of_range"] == 0
    as_scaled = run["silhouette"] >= run["silhouette_scaled"] - SLACK
    return inside and as_scaled and run["error"] <= run["error_means"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, short = [], False
    cases = [(name, False) for name in TABLES] + [(name, True) for name in RAW]
    for name, raw in cases:
        x = load(name, raw)
        runs = [run_seed(x, TABLES[name], seed) for seed in range(options.seeds)]
        short |= not all(met(run) for run in runs)
        units = "own" if raw else "random"
        rows.append({"name": name, "k": TABLES[name], "units": units, "runs": runs})
        for run in runs:
            print(
                f"{name:14s}{units:7s} seed {run['seed']}"
                f"  silhouette {run['silhouette']:.4f} (scaled {run['silhouette_scaled']:.4f})"
                f"  out of range {run['out_of_range']} of {run['filled']}"
                f"  error {run['error']:.3f} (means {run['error_means']:.3f})"
                f"  {'met' if met(run) else 'MISSED'}",
                flush=True,
            )
    report = {"rows": rows, **record.facts()}
    record.write(options.json, report)
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())
