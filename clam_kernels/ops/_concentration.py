# SPDX-License-Identifier: Apache-2.0
"""PCL's temperature of each prototype, from the distances of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._core import checks
from ._facts import compute_dtype
from .kmeans import kmeans_update


def cluster_concentration(
    distances: Tensor,
    labels: Tensor,
    n_clusters: int,
    *,
    alpha: float = 10.0,
    tau: float = 0.1,
    clip: tuple[float, float] = (10, 90),
) -> Tensor:
    """Concentration phi of each cluster, with mean tau: the temperature of its prototype (PCL).

        phi_k = sum_{i in k} d_i / (n_k log(n_k + alpha))            (eq. 8 of docs/ops/xent.md)

    A cluster with at most one row gets the largest phi of the others. Then phi is clipped to its
    percentiles, and at last scaled to the mean tau.

    Parameters
    ----------
    distances : Tensor [N], float16, bfloat16, float32 or float64
        Distance of each row from the centroid of its cluster, not squared. PCL takes the centroid
        before it is scaled to unit length.
    labels : Tensor [N], int64
        The cluster of each row; -1: the row is ignored.
    n_clusters : int, >= 1
        Number of clusters K.
    alpha : float, >= 0
        Smooths the logarithm of small clusters.
    tau : float, > 0
        The mean of phi.
    clip : (float, float)
        Lower and upper percentile of phi, in [0, 100].

    Returns
    -------
    Tensor [K], float32 (float64 for float64)
        On the device of the distances; no gradient. tau for all if every phi is 0.

    Raises
    ------
    TypeError
        A dtype or type other than stated.
    ValueError
        A shape, device or number that does not fit; on a CPU also a label outside [-1, K).

    Examples
    --------
    >>> import torch, clam_kernels
    >>> distances, labels = torch.tensor([0.1, 0.3, 0.2, 0.2]), torch.tensor([0, 0, 1, 1])
    >>> clam_kernels.cluster_concentration(distances, labels, 3)
    tensor([0.1000, 0.1000, 0.1000])
    """
    low, high = _checked(distances, labels, n_clusters, alpha, tau, clip)
    totals, sizes = kmeans_update(distances.detach()[:, None], labels, n_clusters)[:2]
    sums, counts = totals[:, 0].double(), sizes.double()
    is_large = counts > 1
    phi = torch.where(is_large, sums / (counts * torch.log(counts + alpha)), 0.0)
    phi = torch.where(is_large, phi, phi.amax())
    bounds = torch.quantile(phi, phi.new_tensor([low / 100, high / 100]))
    phi = torch.minimum(torch.maximum(phi, bounds[0]), bounds[1])
    mean = phi.mean()
    phi = torch.where(mean > 0, tau * phi / mean, torch.where(mean.isnan(), mean, tau))
    return phi.to(compute_dtype(distances.dtype))


def _checked(
    distances: object, labels: object, n_clusters: int, alpha: object, tau: object, clip: object
) -> tuple[float, float]:
    """Check the arguments; return the percentiles."""
    checks.tensor("distances", distances)
    checks.tensor("labels", labels)
    assert isinstance(distances, Tensor)
    assert isinstance(labels, Tensor)
    checks.floating("distances", distances)
    checks.device("distances", distances)
    dtype = str(labels.dtype).removeprefix("torch.")
    checks.type_error(
        labels.dtype == torch.int64, lambda: checks.wording("labels", "dtype int64", dtype)
    )
    checks.same_device("labels", labels, "distances", distances)
    checks.shape("distances", distances, "[N]", distances.ndim == 1)
    ok = labels.ndim == 1 and labels.shape[0] == distances.shape[0]
    checks.shape("labels", labels, [distances.shape[0]], ok, "distances")
    checks.whole("n_clusters", n_clusters, 1)
    checks.at_least("n_clusters", n_clusters, 1)
    checks.number("alpha", alpha, 0.0, finite=True)
    checks.number("tau", tau, 0.0, finite=True, strict=True)
    words = "two numbers 0 <= low <= high <= 100"
    ok = isinstance(clip, Sequence) and len(clip) == 2
    checks.type_error(ok, lambda: checks.wording("clip", words, clip))
    low, high = (float(checks.real("clip", x)) for x in clip)  # type: ignore[attr-defined]
    checks.expect(0 <= low <= high <= 100 and not math.isnan(low), "clip", words, clip)
    if checks.readable(labels) and labels.numel():
        wrong = (labels < -1) | (labels >= n_clusters)
        if bool(wrong.any()):
            text = f"values in [-1, {n_clusters})"
            raise ValueError(checks.wording("labels", text, int(labels[wrong][0])))
    return low, high
