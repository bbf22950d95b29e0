# SPDX-License-Identifier: Apache-2.0
"""Deep clustering of scikit-learn's digits: train encoder, decoder and memories together.

First the autoencoder learns to turn a digit with hidden pixels into one of its nearest digits, and
k-means on its codes gives the first memories. Then encoder, decoder and memories train together
with two more losses: the recall of a code must decode to the digit too, and the code of a shifted
digit with hidden pixels must be near the recall of the complete digit. Labels only score the
result. The settings are the same for all seeds.

The rivals are ClAM and k-means on pixels, k-means on the codes of the same autoencoder before the
memories are added and after the same further training without them, and Ward's linkage on pixels,
which is better than all others.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor, nn

from clam_kernels import ClAM, KMeans
from clam_kernels.nn import AssociativeMemory

CLUSTERS = 10
SIDE = 8  # pixels
CODE = 10  # features of a code
PRETRAINING, TOGETHER = 400, 100  # epochs
BATCH, RATE = 256, 1e-3
NEIGHBOURS = 10
HIDDEN = 0.2  # share of pixels
SHIFT, TURN = 0.5, 0.1  # at most, in pixels and radians
SHARPNESS = 3.0  # beta times the gap of the codes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of --seed; medians of all")
    parser.add_argument("--json", type=Path, help="also write the report here")
    return parser.parse_args()


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers with rectifiers between them."""
    modules: list[nn.Module] = []
    for before, after in pairwise(sizes):
        modules += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = layers(SIDE * SIDE, 256, 128, CODE)
        self.decode = layers(CODE, 128, 256, SIDE * SIDE)


def shift_and_turn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift and turn each digit by a small random amount."""
    draw = 2 * torch.rand(len(x), 3, generator=generator) - 1
    right, down = (draw[:, :2] * SHIFT * 2 / SIDE).unbind(1)
    cos, sin = (draw[:, 2] * TURN).cos(), (draw[:, 2] * TURN).sin()
    theta = torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(theta, [len(x), 1, SIDE, SIDE], align_corners=False)
    images = x.view(-1, 1, SIDE, SIDE)
    return nn.functional.grid_sample(images, grid, align_corners=False).flatten(1)


def squared_error(difference: Tensor) -> Tensor:
    """Squared norm of a row, the mean over the rows."""
    return difference.square().sum(-1).mean()


def gap(codes: Tensor, memories: Tensor) -> float:
    """The median over codes of second-nearest minus nearest squared distance."""
    two = torch.cdist(codes, memories).square().topk(2, largest=False).values
    return float((two[:, 1] - two[:, 0]).median())


def train(model: Autoencoder, memory: AssociativeMemory | None, x: Tensor, epochs: int,
          generator: torch.Generator, move: bool) -> None:  # fmt: skip
    """Train to decode a code to one of its row's neighbours; with memories also from its recall."""
    near = torch.cdist(x, x).topk(NEIGHBOURS + 1, largest=False).indices[:, 1:]
    learning = [*model.parameters(), *(memory.parameters() if memory else ())]
    optimiser = torch.optim.Adam([p for p in learning if p.requires_grad], RATE)
    batches = -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    for _ in range(epochs):
        if memory is not None:
            with torch.no_grad():
                memory.beta = SHARPNESS / gap(model.encode(x), memory.memories)
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            which = torch.randint(NEIGHBOURS, (len(rows),), generator=generator)
            target, view = x[near[rows, which]], x[rows]
            view = shift_and_turn(view, generator) if move else view
            hidden = torch.rand(view.shape, generator=generator) < HIDDEN
            code = model.encode(view.masked_fill(hidden, 0.0))
            loss = squared_error(model.decode(code) - target)
            if memory is not None:
                with torch.no_grad():
                    goal = memory(model.encode(x[rows]))
                loss = loss + squared_error(model.decode(memory(code)) - target)
                loss = loss + squared_error(code - goal)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def cluster(x: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Labels of the joint training, of its rivals, and of the same training without memories."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Autoencoder()
    train(model, None, x, PRETRAINING, generator, move=False)
    with torch.no_grad():
        codes = model.encode(x)
    alone = copy.deepcopy(model)
    start = KMeans(n_clusters=CLUSTERS, n_init=10, random_state=seed).fit(codes)
    memory = AssociativeMemory.from_patterns(start.cluster_centers_, steps=5, learn_memories=True)
    train(model, memory, x, TOGETHER, generator, move=True)
    train(alone, None, x, TOGETHER, torch.Generator().manual_seed(seed), move=True)
    with torch.no_grad():
        labels = memory.assign(model.encode(x))[0].numpy()
        alone_codes = alone.encode(x)

    def kmeans(rows: Tensor) -> np.ndarray:
        model = SklearnKMeans(n_clusters=CLUSTERS, n_init=10, random_state=seed)
        return np.asarray(model.fit_predict(rows.numpy()))

    return {
        "": labels,
        "clam_pixels": ClAM(n_clusters=CLUSTERS, random_state=seed).fit_predict(x.numpy()),
        "kmeans_codes": kmeans(codes),
        "kmeans_codes_longer": kmeans(alone_codes),
        "kmeans_pixels": kmeans(x),
        "ward_pixels": AgglomerativeClustering(CLUSTERS).fit_predict(x.numpy()),
    }


def run(x: Tensor, y: np.ndarray, seed: int) -> dict[str, float]:
    """Scores of every partition against the labels, for one seed."""
    start = time.perf_counter()
    partitions = cluster(x, seed)
    report: dict[str, float] = {}
    for score, judge in (("nmi", normalized_mutual_info_score), ("ari", adjusted_rand_score)):
        for method, labels in partitions.items():
            report[f"{score}_{method}" if method else score] = float(judge(y, labels))
    report["clusters_used"] = len(np.unique(partitions[""]))
    report["seconds"] = time.perf_counter() - start
    return report


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # layers this small gain nothing from more
    pixels, y = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32)
    seeds = options.seeds or [options.seed]
    runs = [run(x, y, seed) for seed in seeds]
    medians = {name: float(np.median([r[name] for r in runs])) for name in runs[0]}
    columns = [*(f"seed {seed}" for seed in seeds), "median"]
    print(f"{'':<24}" + "".join(f"{column:>10}" for column in columns))
    for name in medians:
        print(f"{name:<24}" + "".join(f"{r[name]:>10.4g}" for r in [*runs, medians]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"seeds": seeds, **medians, "runs": runs}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
