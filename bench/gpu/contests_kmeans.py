# SPDX-License-Identifier: Apache-2.0
"""The k-means contests: our calls, the packages that are installed, the wrong labels of each."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import clam_kernels  # noqa: F401  registers torch.ops.clam
from python_fallback import kmeans as truth

from .cases import Target, TimedContest
from .clock import Contestant
from .contests_am import STAND_IN_ROWS, sample_of, torch_mode
from .setting import Setting

CHUNK = 1 << 20
SPREAD = 0.7
# scikit-learn runs on so many rows: all of them would take the whole budget. The time of an
# iteration is the median over repeats of (long fit - short fit) / (difference of iterations); no
# repeat starts after PEER_SECONDS.
PEER_ROWS = 1 << 18
PEER_ITERATIONS, PEER_REPEATS, PEER_SECONDS = (2, 18), 3, 2.5


def blobs(n: int, d: int, k: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Rows around k Gaussian means, and k of the rows as centroids."""
    generator = torch.Generator(device).manual_seed(seed)
    means = torch.randn(k, d, generator=generator, device=device)
    near = torch.randint(k, (n,), generator=generator, device=device)
    x = torch.randn(n, d, generator=generator, device=device).mul_(SPREAD)
    for rows, which in zip(x.split(1 << 22), near.split(1 << 22), strict=True):
        rows += means[which]
    return x, x[torch.randperm(n, generator=generator, device=device)[:k]].clone()


def operands_of(setting: Setting, target: Target) -> tuple[Tensor, Tensor]:
    n, d, k = (target.shape[name] for name in ("n", "d", "k"))
    if setting.dry_run:
        n, k = STAND_IN_ROWS, min(k, 16)
    x, centroids = blobs(n, d, k, setting.device, setting.seed)
    return (x.bfloat16(), centroids) if target.dtype == "bfloat16" else (x, centroids)


def wrong_labels(x: Tensor, centroids: Tensor, seed: int) -> Callable[[Any], dict[str, Any]]:
    """Share of the labels on a sample of rows that differ from those of float64 on equal values."""
    at = sample_of(len(x), seed, str(x.device))
    exact = torch.cat(
        [truth.kmeans_assign(part, centroids, distances=False)[0] for part in x[at].split(64)]
    )

    def errors(out: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"out": float((out[0].reshape(-1)[at] != exact).double().mean())}

    return errors


# ---- peers ----------------------------------------------------------------------------------


def eager_labels(x: Tensor, centroids: Tensor) -> Tensor:
    """argmin_k of |c|^2 - 2 x c, over chunks of rows."""
    keys = (-2 * centroids.T).to(x.dtype)
    bias = centroids.square().sum(-1)
    return torch.cat([((part @ keys).float() + bias).argmin(-1) for part in x.split(CHUNK)])


def eager_iteration(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    labels = eager_labels(x, centroids)
    sums = torch.zeros_like(centroids).index_add_(0, labels, x.float())
    counts = torch.bincount(labels, minlength=len(centroids)).clamp(min=1)
    return labels, sums / counts[:, None]


def flash(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    package = importlib.import_module("flash_kmeans")
    result = package.batch_kmeans_Euclid(
        x[None], len(centroids), max_iters=1, tol=0.0, init_centroids=centroids[None].to(x.dtype)
    )
    return result[0][0], result[1][0]


def fast_pytorch(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    package = importlib.import_module("fast_pytorch_kmeans")
    model = package.KMeans(n_clusters=len(centroids), max_iter=1, mode="euclidean", verbose=0)
    return (model.fit_predict(x, centroids=centroids.clone()),)


def cuml(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    package = importlib.import_module("cuml.cluster")
    model = package.KMeans(len(centroids), init=centroids, n_init=1, max_iter=1, tol=0.0)
    return (torch.as_tensor(model.fit_predict(x), device=x.device).long(),)


def faiss(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    package = importlib.import_module("faiss")
    index = package.GpuIndexFlatL2(package.StandardGpuResources(), x.shape[1])
    index.add(centroids.cpu().numpy())
    return (torch.from_numpy(index.search(x.cpu().numpy(), 1)[1][:, 0]).to(x.device),)


def scikit_learn(x: Tensor, centroids: Tensor) -> dict[str, Any]:
    """Milliseconds of one of its iterations on all cores, scaled from PEER_ROWS rows to all."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        return {"scikit_learn_ms": None, "scikit_learn_absent": str(error)}

    rows, first = x[:PEER_ROWS].float().cpu().numpy(), centroids.cpu().numpy()

    def fit(most: int) -> tuple[float, int]:
        """Seconds of a fit and its number of iterations, which may be less than `most`."""
        model = KMeans(len(first), init=first, n_init=1, max_iter=most, tol=0.0)
        start = time.perf_counter()
        model.fit(rows)
        return time.perf_counter() - start, model.n_iter_

    ends = time.perf_counter() + PEER_SECONDS
    fit(PEER_ITERATIONS[0])  # the first call starts threads and loads the rows into the caches
    times: list[float] = []
    for _ in range(PEER_REPEATS):
        (short, few), (long, many) = (fit(most) for most in PEER_ITERATIONS)
        if many == few:
            return {"scikit_learn_ms": None, "scikit_learn_absent": f"converged in {few}"}
        times.append((long - short) / (many - few))
        if time.perf_counter() > ends:
            break
    return {"scikit_learn_ms": 1e3 * statistics.median(times) * len(x) / len(rows)}


# ---- contests -----------------------------------------------------------------------------------


def iteration(setting: Setting, target: Target) -> TimedContest:
    """Target 7: labels and sums of one Lloyd iteration."""
    x, centroids = operands_of(setting, target)
    ops, k = torch.ops.clam, len(centroids)

    def ours() -> tuple[Tensor, ...]:
        labels = ops.kmeans_assign(x, centroids, None, None, False, target.mode)[0]
        sums, counts = ops.kmeans_update(x, labels, k)
        return labels, (sums / counts.clamp(min=1)[:, None]).float()

    peers = {
        "eager": Contestant(lambda: eager_iteration(x, centroids), torch_mode(target.mode)),
        "flash": Contestant(lambda: flash(x, centroids)),
        "fast_pytorch": Contestant(lambda: fast_pytorch(x, centroids)),
        "cuml": Contestant(lambda: cuml(x, centroids)),
    }
    return TimedContest(
        ours=ours,
        args=(x, centroids),
        peers=peers,
        errors=wrong_labels(x, centroids, setting.seed),
        plain=Contestant(lambda: eager_iteration(x, centroids)),
        facts=lambda: scikit_learn(x, centroids),
    )


def step(setting: Setting, target: Target) -> TimedContest:
    """Target 7s: the iteration of target 7 for few centroids and features, against the two ops that
    it replaces.
    """
    x, centroids = operands_of(setting, target)
    ops = torch.ops.clam

    def ours() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = ops.kmeans_step(x, centroids, precision=target.mode)
        return result

    def two() -> tuple[Tensor, ...]:
        labels = ops.kmeans_assign(x, centroids, None, None, False, target.mode)[0]
        return labels, *ops.kmeans_update(x, labels, len(centroids))

    peers = {
        "two_ops": Contestant(two),
        "eager": Contestant(lambda: eager_iteration(x, centroids), torch_mode(target.mode)),
        "flash": Contestant(lambda: flash(x, centroids)),
    }
    return TimedContest(
        args=(x, centroids),
        ours=ours,
        peers=peers,
        errors=wrong_labels(x, centroids, setting.seed),
        plain=Contestant(lambda: eager_iteration(x, centroids)),
    )


def assignment(setting: Setting, target: Target) -> TimedContest:
    """Target 8: labels alone."""
    x, centroids = operands_of(setting, target)

    def ours() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.clam.kmeans_assign(
            x, centroids, None, None, False, target.mode
        )
        return result

    peers = {
        "eager": Contestant(lambda: (eager_labels(x, centroids),)),
        "flash": Contestant(lambda: flash(x, centroids)),
        "faiss": Contestant(lambda: faiss(x.float(), centroids)),
    }
    return TimedContest(
        ours=ours,
        args=(x, centroids),
        peers=peers,
        errors=wrong_labels(x, centroids, setting.seed),
        plain=Contestant(lambda: (eager_labels(x, centroids),)),
    )
