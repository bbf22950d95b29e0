# SPDX-License-Identifier: Apache-2.0
"""Quality of DEC and IDEC on images of digits, beside k-means and Ward's linkage on pixels and on
codes, and N2D (UMAP of the same codes, then a Gaussian mixture). Classes score results only.

`python3 bench/dec_quality.py` runs it, prints the table and writes bench/results/dec_quality.json.
usps and mnist10k are in shared/data, beside the checkout. N2D needs umap-learn.

Nothing is chosen by classes: one recipe for all tables and seeds, and one fit for a figure. What
`regroup` moves is chosen by the depth of the gap between clusters, in the graph of nearest codes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import record
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from clam_kernels import DEC, metrics
from clam_kernels.augment import ShiftAndRotate

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "bench" / "results" / "dec_quality.json"
K, FIGURES = 10, ("accuracy", "nmi", "ari", "smallest", "seconds")


class DecBars(NamedTuple):
    """Least means over the seeds: of DEC without augmentation, and with it."""

    accuracy: float
    nmi: float
    gain: float  # of NMI over k-means on the codes of the same weights
    augmented: tuple[float, float, float]  # accuracy, NMI, ARI
    seconds: float  # most CPU seconds of a fit with augmentation
    over_codes: float | None = None  # accuracy over k-means on the same codes, in every seed


# None: no bar without augmentation is stated for the table.
BARS: dict[str, DecBars] = {
    "digits": DecBars(0.79, 0.77, 0.03, (0.78, 0.79, 0.71), 60),
    "usps": DecBars(0.72, 0.73, 0.05, (0.78, 0.83, 0.74), 300, 0.05),
    "mnist10k": DecBars(0.0, 0.0, 0.0, (0.85, 0.83, 0.79), 900, 0.05),
}
GAIN_OF_EVERY_SEED, IDEC_BEHIND, SMALLEST = 0.031, 0.03, 0.02


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows in [0, 1] in float32, and classes."""
    if name == "digits":
        x, y = load_digits(return_X_y=True)
    else:
        with np.load(SHARED / f"{name}.npz") as file:
            x, y = file["x"], file["y"]
    x = x.astype(np.float32)
    return x / x.max(), y.astype(np.int64)


def scores_of(y: np.ndarray, labels: np.ndarray, seconds: float) -> dict[str, float]:
    return {
        "accuracy": metrics.clustering_accuracy(y, labels),
        "nmi": float(normalized_mutual_info_score(y, labels)),
        "ari": float(adjusted_rand_score(y, labels)),
        "smallest": float(np.bincount(labels, minlength=K).min() / len(labels)),
        "seconds": seconds,
    }


def timed_call(run: Callable[[], Any]) -> tuple[Any, float]:
    """(result, CPU seconds)."""
    start = time.process_time()
    return run(), time.process_time() - start


def n2d(codes: np.ndarray, seed: int) -> np.ndarray:
    """Labels of a Gaussian mixture on UMAP of codes (McConville et al. 2021)."""
    import umap

    flat = umap.UMAP(n_neighbors=20, min_dist=0.0, n_components=K, random_state=seed)
    return GaussianMixture(K, random_state=seed).fit_predict(flat.fit_transform(codes))


def ward(x: np.ndarray) -> np.ndarray:
    return AgglomerativeClustering(K).fit_predict(x)


def run_fits(
    x: np.ndarray, y: np.ndarray, seed: int, augment: ShiftAndRotate | None
) -> dict[str, dict[str, float]]:
    """Every method on one autoencoder. `seconds` are those of a whole fit, pretraining included."""
    common: dict[str, Any] = {"augment": augment, "random_state": seed}
    start, base = timed_call(lambda: DEC(K, n_epochs=0, **common).fit(x))
    codes = np.asarray(start.init_embedding_)
    rows = {"k-means on codes": scores_of(y, start.labels_, base)}
    labels, seconds = timed_call(lambda: ward(codes))
    rows["Ward on codes"] = scores_of(y, labels, base + seconds)
    if importlib.util.find_spec("umap"):
        labels, seconds = timed_call(lambda: n2d(codes, seed))
        rows["N2D"] = scores_of(y, labels, base + seconds)
    trained: dict[str, Any] = {"encoder": start.pretrained_, "pretrain": "none", **common}
    for name, rest in (
        ("DEC", {"regroup": False}),
        ("IDEC", {"variant": "idec", "regroup": False}),
        ("DEC, regrouped", {"regroup": True}),
    ):
        model, seconds = timed_call(lambda r=rest: DEC(K, **trained, **r).fit(x))
        rows[name] = {**scores_of(y, model.labels_, base + seconds), "rounds": model.n_rounds_}
    return rows


def run_seed(name: str, seed: int, is_plain: bool) -> dict[str, Any]:
    """One seed on one table. The rivals on pixels come with it, and with `is_plain` the fits
    without augmentation.
    """
    x, y = load(name)
    side = int(x.shape[1] ** 0.5)
    labels, seconds = timed_call(lambda: KMeans(K, n_init=20, random_state=seed).fit(x).labels_)
    methods = {"k-means on pixels": scores_of(y, labels, seconds)}
    labels, seconds = timed_call(lambda: ward(x))
    methods["Ward on pixels"] = scores_of(y, labels, seconds)
    if is_plain:
        methods |= run_fits(x, y, seed, None)
    augmented = run_fits(x, y, seed, ShiftAndRotate((side, side)))
    methods |= {f"{method}, augmented": scores for method, scores in augmented.items()}
    return {"seed": seed, "methods": methods}


def figures(runs: list[dict[str, Any]], method: str, figure: str) -> np.ndarray:
    return np.array([run["methods"][method][figure] for run in runs if method in run["methods"]])


def missed(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """The figures that miss their bar, in words."""
    bars, words = BARS[name], []

    def least(method: str, figure: str, bar: float) -> None:
        value = figures(runs, method, figure).mean()
        if value < bar:
            words.append(f"{method}: {figure} {value:.3f} < {bar}")

    for method in ("DEC, augmented", "DEC, regrouped, augmented"):
        for figure, bar in zip(("accuracy", "nmi", "ari"), bars.augmented, strict=True):
            least(method, figure, bar)
        longest = figures(runs, method, "seconds").max()
        if longest > bars.seconds:
            words.append(f"{method}: {longest:.0f} CPU seconds > {bars.seconds:.0f}")
        if bars.over_codes is not None:
            gain = figures(runs, method, "accuracy")
            gain -= figures(runs, "k-means on codes, augmented", "accuracy")
            words += [f"{method}: {g:+.3f} over codes" for g in gain if g < bars.over_codes]
    if bars.accuracy and len(figures(runs, "DEC", "nmi")):
        words += missed_without_augmentation(bars, runs, least)
    return words


def missed_without_augmentation(
    bars: DecBars, runs: list[dict[str, Any]], least: Callable[[str, str, float], None]
) -> list[str]:
    least("DEC", "accuracy", bars.accuracy)
    least("DEC", "nmi", bars.nmi)
    words = []
    gains = figures(runs, "DEC", "nmi") - figures(runs, "k-means on codes", "nmi")
    if gains.mean() < bars.gain:
        words.append(f"DEC: NMI {gains.mean():+.3f} over codes < {bars.gain:+}")
    if bars.over_codes is not None and gains.min() < GAIN_OF_EVERY_SEED:
        words.append(f"DEC: NMI {gains.min():+.3f} over codes in a seed < {GAIN_OF_EVERY_SEED}")
    behind = figures(runs, "DEC", "accuracy").mean() - figures(runs, "IDEC", "accuracy").mean()
    if abs(behind) > IDEC_BEHIND:
        words.append(f"IDEC: accuracy {behind:.3f} from that of DEC > {IDEC_BEHIND}")
    smallest = min(figures(runs, method, "smallest").min() for method in ("DEC", "IDEC"))
    if smallest < SMALLEST:
        words.append(f"smallest cluster {smallest:.1%} < {SMALLEST:.0%}")
    return words


def show(name: str, runs: list[dict[str, Any]]) -> None:
    """Print means over the seeds, and the accuracy of each seed."""
    methods = list(dict.fromkeys(m for run in runs for m in run["methods"]))
    for method in methods:
        means = {figure: figures(runs, method, figure).mean() for figure in FIGURES}
        cells = "  ".join(f"{figure} {mean:.3f}" for figure, mean in means.items())
        each = " ".join(f"{value:.3f}" for value in figures(runs, method, "accuracy"))
        print(f"{name:9s} {method:26s} {cells}  ({each})", flush=True)
    if importlib.util.find_spec("umap") is None:
        print(f"{name:9s} N2D: umap-learn is not installed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=list(BARS), choices=list(BARS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--augmented", action="store_true", help="no fits without augmentation")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sets: dict[str, Any] = {}
    if options.json.exists():  # tables that this run leaves out keep their rows
        sets = json.loads(options.json.read_text(encoding="utf-8"))["sets"]
    missed_count = 0
    with threadpool_limits(1):
        if importlib.util.find_spec("umap"):
            n2d(np.random.default_rng(0).normal(size=(200, K)), 0)  # compiles its functions
        for name in options.sets:
            runs: list[dict[str, Any]] = []
            for seed in options.seeds:
                runs.append(run_seed(name, seed, not options.augmented))
                sets[name] = runs
                record.write(options.json, {"sets": sets, **record.facts()})
            show(name, runs)
            words = missed(name, runs)
            missed_count += len(words)
            print(f"{name:9s} {'; '.join(words) or 'all met'}", flush=True)
    return 1 if missed_count else 0


if __name__ == "__main__":
    raise SystemExit(main())
