# SPDX-License-Identifier: Apache-2.0
"""Cluster scikit-learn's digits with ClAM and with k-means, and complete half-hidden digits."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from clam_kernels import ClAM, __version__, plots

SHAPE = (8, 8)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the results"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the report here")
    return parser.parse_args()


def compare(x: np.ndarray, y: np.ndarray, models: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Fit each model without labels; the labels only score the result."""
    rows = {}
    for name, model in models.items():
        start = time.perf_counter()
        labels = model.fit_predict(x)
        rows[name] = {
            "silhouette": float(silhouette_score(x, labels)),
            "nmi": float(normalized_mutual_info_score(y, labels)),
            "ari": float(adjusted_rand_score(y, labels)),
            "clusters_used": len(np.unique(labels)),
            "seconds": time.perf_counter() - start,
        }
    return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    print(f"{'':<10}" + "".join(f"{name:>15}" for name in names))
    for method, values in rows.items():
        cells = (
            f"{values[n]:>15d}" if n == "clusters_used" else f"{values[n]:>15.3f}" for n in names
        )
        print(f"{method:<10}" + "".join(cells))


def complete(x: np.ndarray, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Hide the right half of 360 digits that are not in the training data, and complete it."""
    train, test = x[:-360], x[-360:]
    hidden = test.copy()
    hidden.reshape(-1, *SHAPE)[:, :, SHAPE[1] // 2 :] = np.nan
    model = ClAM(n_clusters=64, init="k-means++", n_init=2, random_state=seed).fit(train)
    completed = model.complete(hidden)
    missing = np.isnan(hidden)
    mean = np.broadcast_to(train.mean(0), test.shape)

    def error(values: np.ndarray) -> float:
        return float(np.sqrt(np.square(values - test)[missing].mean()))

    figures = {
        "hidden_share": float(missing.mean()),
        "rmse_completed": error(completed),
        "rmse_mean_fill": error(mean),
        "visible_entries_unchanged": bool(np.array_equal(completed[~missing], test[~missing])),
    }
    return figures, {"hidden": hidden[:12], "completed": completed[:12], "true": test[:12]}


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    # Pixels have one unit: one divisor for all keeps the proportions between them.
    x, y = (digits.data / 16.0).astype(np.float32), digits.target
    clam = ClAM(n_clusters=10, random_state=options.seed)
    kmeans = KMeans(n_clusters=10, n_init=10, random_state=options.seed)
    rows = compare(x, y, {"ClAM": clam, "k-means": kmeans})
    show(rows)
    figures, pictures = complete(x, options.seed)
    print(
        f"\nright half hidden in 360 new digits: error {figures['rmse_completed']:.3f} of ink"
        f" (mean fill {figures['rmse_mean_fill']:.3f}), visible pixels unchanged:"
        f" {figures['visible_entries_unchanged']}"
    )
    counts = [f"{i}: {n}" for i, n in enumerate(np.bincount(clam.labels_, minlength=10))]
    plots.save(
        plots.plot_clusters(x, clam.labels_, clam.cluster_centers_, title="digits by ClAM"),
        options.out / "clusters.png",
    )
    plots.save(
        plots.plot_images([("memories", clam.cluster_centers_)], SHAPE, titles=counts),
        options.out / "memories.png",
    )
    plots.save(plots.plot_images(list(pictures.items()), SHAPE), options.out / "completion.png")
    np.savetxt(options.out / "labels.csv", clam.labels_, fmt="%d", header="label", comments="")
    clam.save(options.out / "model.safetensors")
    report = {
        "seed": options.seed,
        "nmi": rows["ClAM"]["nmi"],
        "methods": rows,
        "completion": figures,
        "versions": {
            "clam_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    for path in filter(None, (options.out / "report.json", options.json)):
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nlabels, model, report and pictures are in {options.out}/")


if __name__ == "__main__":
    main()
