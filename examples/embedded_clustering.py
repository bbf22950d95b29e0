# SPDX-License-Identifier: Apache-2.0
"""Deep embedded clustering of digits, or of images of your own, beside its rivals.

`DEC` pretrains an autoencoder on shifted and rotated images, clusters its codes by k-means, and
trains the encoder and the centroids on a sharpened target. Labels, where the data has some, only
score the result. The rivals are k-means on the codes of the same autoencoder (the start of DEC),
and k-means and Ward's linkage on pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from clam_kernels import DEC, metrics, plots
from clam_kernels.augment import ShiftAndRotate


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help=".npz with x [N, height * width] and maybe y; default digits"
    )
    parser.add_argument("-k", "--clusters", type=int, default=10)
    parser.add_argument("--variant", choices=("dec", "idec"), default="dec")
    parser.add_argument("--plain", action="store_true", help="without augmentation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="draw the codes and the training here")
    return parser.parse_args()


def read(path: Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(square images as rows in float32, classes or None)."""
    if path is None:
        digits = load_digits()
        return digits.data.astype(np.float32), digits.target
    with np.load(path) as file:
        x = file["x"].reshape(len(file["x"]), -1)
        return x.astype(np.float32), file.get("y")


def score(y: np.ndarray | None, labels: np.ndarray) -> dict[str, float]:
    """The scores of a partition; without classes its smallest share alone."""
    shares = np.bincount(labels) / len(labels)
    scores = {"smallest_cluster": float(shares.min()), "clusters": len(np.unique(labels))}
    if y is None:
        return scores
    return {
        "accuracy": metrics.clustering_accuracy(y, labels),
        "nmi": float(normalized_mutual_info_score(y, labels)),
        "ari": float(adjusted_rand_score(y, labels)),
        **scores,
    }


def main() -> None:
    options = parse()
    x, y = read(options.data)
    side = round(x.shape[1] ** 0.5)
    augment = None if options.plain else ShiftAndRotate((side, side))
    model = DEC(
        options.clusters, variant=options.variant, augment=augment, random_state=options.seed
    )
    start = time.process_time()
    model.fit(x)
    seconds = time.process_time() - start
    pixels = KMeans(options.clusters, n_init=10, random_state=options.seed).fit_predict(x)
    report: dict[str, Any] = {
        options.variant: score(y, model.labels_),
        "kmeans_codes": score(y, model.init_labels_),
        "kmeans_pixels": score(y, pixels),
    }
    if len(x) <= 10_000:  # Ward's linkage stores a distance for each pair of rows
        ward = AgglomerativeClustering(options.clusters).fit_predict(x)
        report["ward_pixels"] = score(y, ward)
    names = list(report[options.variant])
    print(f"{'':<14}" + "".join(f"{name:>18}" for name in names))
    for method, figures in report.items():
        print(f"{method:<14}" + "".join(f"{figures[name]:>18.4g}" for name in names))
    print(f"{model.n_steps_} steps, {model.stop_reason_}, {seconds:.0f} CPU seconds")
    if options.plot:
        labels = (model.init_labels_, model.labels_)
        history = model.history_
        plots.save(
            plots.plot_training(model.init_embedding_, model.transform(x), labels, history),
            options.plot,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        totals = {name: report[options.variant].get(name) for name in ("nmi", "accuracy")}
        report = {"seed": options.seed, **totals, "seconds": seconds, "methods": report}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
