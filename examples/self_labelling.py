# SPDX-License-Identifier: Apache-2.0
"""Self-labelling (SeLa) of scikit-learn's digits, or of your own folder of images or .npz.

A small convolutional network computes labels of equal shares for the training images, learns them
from shifted and noisy images, and computes better ones. The classes only score the features: by
k-means on them, and by classifiers from two labelled images a class (mean of five draws). With all
labels even the untrained network is near perfect here, so the example prints those figures, but
they show nothing.

The rivals are the untrained network (with BatchNorm statistics of the data) and pixels. Ward's
linkage and label spreading, which see the unlabelled images too, run on all of these; on pixels
they are the strongest simple rivals. --ablations adds SeLa without augmentation and without equal
shares (each row gets the likeliest label of its head).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from sklearn.semi_supervised import LabelSpreading
from torch import Tensor, nn

from clam_kernels import SeLa, info, tables
from clam_kernels.nn import SelfLabeller

LABELS, HEADS = 20, 10
DRAWS, PER_CLASS = 5, 2
TURN, SHEAR, SHIFT = 15.0, 0.15, 1.0  # at most: degrees, share, eighths of the side
SCALE, NOISE, GAIN = (0.85, 1.15), 0.1, (0.8, 1.2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of --seed; means of all")
    parser.add_argument("--data", type=Path, help="folder of images, or .npz with x and maybe y")
    parser.add_argument("--size", type=int, default=32, help="side of the images of a folder")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--ablations", action="store_true", help="also without our two parts")
    parser.add_argument("--json", type=Path, help="also write the report here")
    return parser.parse_args()


# ---- data ----------------------------------------------------------------------------------------


def load(path: Path | None, size: int) -> tuple[Tensor, np.ndarray | None]:
    """Images [N, C, H, W] in [0, 1] and their classes, where known."""
    if path is None:
        x, y = load_digits(return_X_y=True)
        return torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), y
    if path.is_dir():
        return folder(path, size)
    x = np.asarray(tables.read_array(path), dtype=np.float32)
    with np.load(path, allow_pickle=False) as arrays:
        y = arrays["y"] if "y" in arrays.files else None
    images = torch.from_numpy(x / max(1.0, float(x.max())))
    return images[:, None] if images.ndim == 3 else images, y


def folder(path: Path, size: int) -> tuple[Tensor, np.ndarray | None]:
    """Images of a folder, whose subfolders are the classes. `SeLa.fit(path)` reads folders too."""
    from PIL import Image, ImageOps

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    images = [ImageOps.fit(Image.open(file).convert("RGB"), (size, size)) for file in files]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    names = np.array([file.parent.name for file in files])
    return x, names if len(set(names)) > 1 else None


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, shear, scale and shift each image at random, change its gain, and add noise."""
    n, device = len(batch), batch.device

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, device=device)

    angle, shear, scale = draw(-TURN, TURN).deg2rad(), draw(-SHEAR, SHEAR), draw(*SCALE)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # a shift by an eighth of the side is a quarter of the coordinates, which run from -1 to 1
    right, down = draw(-SHIFT, SHIFT) / 4, draw(-SHIFT, SHIFT) / 4
    rows = [cos, shear * cos - sin, right, sin, shear * sin + cos, down]
    theta = torch.stack(rows, 1).view(n, 2, 3)
    grid = nn.functional.affine_grid(theta, list(batch.shape), align_corners=False)
    images = nn.functional.grid_sample(batch, grid, align_corners=False)
    noise = torch.randn(batch.shape, generator=generator, device=device)
    return draw(*GAIN).view(n, 1, 1, 1) * images + draw(0, NOISE).view(n, 1, 1, 1) * noise


# ---- network and its features --------------------------------------------------------------------


def network(channels: int) -> nn.Sequential:
    """Three convolutions, 512 features."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*block(channels, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 128)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())


@torch.no_grad()
def features(encoder: nn.Module, x: Tensor) -> np.ndarray:
    encoder.eval()
    return torch.cat([encoder(part) for part in x.split(256)]).numpy()


@torch.no_grad()
def with_statistics(encoder: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose BatchNorm has the statistics of the data, from one pass in training mode."""
    model = copy.deepcopy(encoder).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # plain mean over the batches
    for part in x.split(128):
        model(part)
    return model


def fit_sela(
    encoder: nn.Module, x: Tensor, seed: int, epochs: int, augment: Callable[..., Tensor] | None
) -> SeLa:
    settings = {"n_heads": HEADS, "n_epochs": epochs, "augment": augment, "random_state": seed}
    return SeLa(encoder, LABELS, **settings).fit(x)


def train_without_shares(encoder: nn.Module, x: Tensor, seed: int, epochs: int) -> nn.Module:
    """The same training in a loop of your own, but each row gets the likeliest label of its head
    instead of that of `heads.relabel_features`.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = copy.deepcopy(encoder).train()
    width = encoder(x[:2]).shape[1]
    heads = SelfLabeller(width, LABELS, len(x), HEADS, generator=generator)
    learning = [*encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.SGD(learning, 0.05, momentum=0.9, weight_decay=1e-4)
    batches = -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    times = ((epochs + 1.01) * len(x) * np.linspace(0, 1, 12) ** 2).tolist()
    seen = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            if times[0] <= seen:
                times.pop(0)
                with torch.no_grad():
                    views = (augment(x, generator).split(128) for _ in range(4))
                    mean = sum(torch.cat([encoder(part) for part in view]) for view in views) / 4
                for head in range(HEADS):
                    heads.labels[head] = heads.log_probabilities(mean, head).argmax(1)
            loss = heads.loss(encoder(augment(x[rows], generator)), rows)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            seen += len(rows)
    return encoder


# ---- scores --------------------------------------------------------------------------------------


def scores_of(
    train: np.ndarray, test: np.ndarray, y: np.ndarray, y_test: np.ndarray
) -> dict[str, float]:
    """Scores of the features, by clusterings and by classifiers from few labels."""
    train, test = normalize(train), normalize(test)
    classes = np.unique(y)
    clusters = KMeans(len(classes), n_init=10, random_state=0).fit_predict(train)
    linear, nearest, spread = [], [], []
    for draw in range(DRAWS):
        random = np.random.default_rng(draw)
        chosen = [random.choice(np.flatnonzero(y == c), PER_CLASS, replace=False) for c in classes]
        rows = np.concatenate(chosen)
        model = LogisticRegression(C=10, max_iter=2000).fit(train[rows], y[rows])
        linear.append(model.score(test, y_test))
        model = KNeighborsClassifier(1).fit(train[rows], y[rows])
        nearest.append(model.score(test, y_test))
        few = np.full(len(y), -1)
        few[rows] = np.searchsorted(classes, y[rows])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an image that no label reaches
            model = LabelSpreading(kernel="knn", max_iter=200).fit(train, few)
            spread.append(model.score(test, np.searchsorted(classes, y_test)))
    ward = AgglomerativeClustering(len(classes)).fit_predict(train)
    full = LogisticRegression(C=10, max_iter=2000).fit(train, y)
    return {
        "nmi": float(normalized_mutual_info_score(y, clusters)),
        "linear": float(np.mean(linear)),
        "nearest": float(np.mean(nearest)),
        "spreading": float(np.mean(spread)),
        "nmi_ward": float(normalized_mutual_info_score(y, ward)),
        "linear_all_labels": float(full.score(test, y_test)),
    }


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Scores of every set of features against the classes, for one seed."""
    start = time.perf_counter()
    x, y = load(options.data, options.size)
    if y is None:
        y = np.zeros(len(x), dtype=int)
    split = train_test_split(np.arange(len(x)), test_size=0.3, stratify=y, random_state=0)
    (train, y_train), (test, y_test) = ((x[rows], y[rows]) for rows in split)
    torch.manual_seed(seed)
    encoder = network(x.shape[1])
    model = fit_sela(encoder, train, seed, options.epochs, augment)
    counts = [np.bincount(row, minlength=LABELS) for row in model.labels_.numpy()]
    report: dict[str, Any] = {
        "counts_least": int(np.min(counts)),
        "counts_most": int(np.max(counts)),
        "counts_equal_share": len(train) / LABELS,
        "predicted_as_labelled": float((model.predict(train) == model.labels_[0]).float().mean()),
        "loss": model.history_["loss"][-1],
        "iterations": float(model.history_["relabellings"]["n_iter"].mean()),
    }
    if len(np.unique(y)) > 1:
        own = [normalized_mutual_info_score(y_train, row) for row in model.labels_.numpy()]
        report["nmi_heads"] = float(np.mean(own))
        rivals: dict[str, nn.Module] = {
            "": model.encoder_,
            "untrained": with_statistics(encoder, train),
            "pixels": nn.Flatten(),
        }
        if options.ablations:
            plain = fit_sela(encoder, train, seed, options.epochs, None)
            rivals["no_augmentation"] = plain.encoder_
            rivals["unequal_shares"] = train_without_shares(encoder, train, seed, options.epochs)
        for name, rival in rivals.items():
            both = (features(rival, rows) for rows in (train, test))
            for figure, value in scores_of(*both, y_train, y_test).items():
                report[f"{figure}_{name}" if name else figure] = value
    report["seconds"] = time.perf_counter() - start
    return report


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # layers this small gain nothing from more
    seeds = options.seeds or [options.seed]
    runs = [run(options, seed) for seed in seeds]
    means = {name: float(np.mean([r[name] for r in runs])) for name in runs[0]}
    columns = [*(f"seed {seed}" for seed in seeds), "mean"]
    print(f"{'':<34}" + "".join(f"{column:>10}" for column in columns))
    for name in means:
        print(f"{name:<34}" + "".join(f"{r[name]:>10.4g}" for r in [*runs, means]))
    if "nmi" in means:
        print("\nlinear_all_labels says nothing here: untrained features reach it too")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = info.collect()
        versions = {name: facts[name] for name in ("clam_kernels", "torch", "python")}
        where = {"machine": facts["processor"], "versions": versions}
        report = {"seeds": seeds, **where, **means, "runs": runs}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
