# SPDX-License-Identifier: Apache-2.0
"""Measures of a clustering, computed on the device of the data in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._core import checks

# float64 distances of one tile: 32 MB.
TILE_ENTRIES = 1 << 22
# Up to this many differences N x N x D, distances come from differences: exact, but slower than
# products.
DIRECT_WORK = 1 << 29


def silhouette(
    X: Any, labels: Any, sample_size: int | None = None, *, random_state: int = 0
) -> float:
    """Compute the mean silhouette of a clustering, exactly in chunks of rows, or of a sample.

        s_n = (b_n - a_n) / max(a_n, b_n), a_n the mean distance to the other rows of n's cluster,
        b_n the least mean distance to the rows of another one; 0 for a cluster of one row
        (Rousseeuw 1987)

    Parameters
    ----------
    X : array-like or Tensor [N, D]
        Finite numbers. A tensor is computed on its device.
    labels : array-like or Tensor [N], numbers or names
        The cluster of each row; at least 2 clusters, and fewer clusters than rows.
    sample_size : int, optional
        Number of rows to draw without replacement, whose silhouettes use these rows only; default
        all rows.
    random_state : int
        Seed of the sample.

    Returns
    -------
    float in [-1, 1]
        Equal to `silhouette_score` of scikit-learn up to rounding, without an N x N array.

    Raises
    ------
    ValueError
        A shape that does not fit, values that are not finite or masked, fewer than 2 clusters, or
        as many clusters as rows.
    TypeError
        X is not numeric, or is sparse.

    Examples
    --------
    >>> from clam_kernels import metrics
    >>> round(metrics.silhouette([[0.0], [1.0], [8.0], [9.0]], [0, 0, 1, 1]), 4)
    0.8745
    """
    x = _matrix(X)
    names = _names(labels, len(x)).to(x.device)
    if sample_size is not None:
        fits = checks.is_whole(sample_size) and 3 <= sample_size <= len(x)
        checks.expect(fits, "sample_size", f"an int from 3 to {len(x)}", repr(sample_size))
        drawn = np.random.default_rng(random_state).choice(len(x), sample_size, replace=False)
        index = torch.from_numpy(np.sort(drawn)).to(x.device)
        x, names = x[index], names[index]
    _, cluster, counts = names.unique(return_inverse=True, return_counts=True)
    if not 2 <= len(counts) < len(x):
        raise ValueError(
            f"labels: expected 2 to {len(x) - 1} clusters among {len(x)} rows, got {len(counts)}"
        )
    return float(_widths(x, cluster, counts).mean())


def clustering_accuracy(classes: Any, labels: Any) -> float:
    """Share of rows whose cluster is matched with their class, for the best one-to-one matching.

        max over matchings m of clusters to classes of the share of n with m(label_n) = class_n
                                                                            (Hungarian algorithm)

    Parameters
    ----------
    classes : array-like or Tensor [N], numbers or names
        The class of each row; N >= 1.
    labels : array-like or Tensor [N], numbers or names
        The cluster of each row. The numbers of classes and clusters may differ; what is then left
        over has no partner.

    Returns
    -------
    float in [0, 1]

    Raises
    ------
    ValueError
        A shape that does not fit, no rows, or values that are masked or not finite.
    TypeError
        Complex numbers.

    Examples
    --------
    >>> from clam_kernels import metrics
    >>> metrics.clustering_accuracy(["a", "a", "b", "b"], [1, 1, 0, 1])
    0.75
    """
    from scipy.optimize import linear_sum_assignment

    rows = len(labels) if hasattr(labels, "__len__") else -1
    checks.expect(rows > 0, "labels", "at least one row", "none")
    truth = _names(classes, rows, "classes").unique(return_inverse=True)[1].cpu()
    clusters = _names(labels, rows).unique(return_inverse=True)[1].cpu()
    width = int(truth.max()) + 1
    pairs = torch.bincount(clusters * width + truth, minlength=width * (int(clusters.max()) + 1))
    table = pairs.view(-1, width).numpy()
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / rows)


def refuse_masked_entries(name: str, value: Any) -> Any:
    """The value; ValueError for a numpy array with masked entries, which have no value."""
    if np.ma.isMaskedArray(value) and np.ma.getmaskarray(value).any():
        raise ValueError(f"{name}: expected an array without masked entries, got a masked array")
    return value


def _matrix(X: Any) -> Tensor:
    """X as a finite Tensor [N, D]."""
    refuse_masked_entries("X", X)
    if hasattr(X, "toarray"):
        raise TypeError(f"X: expected an array or a dense Tensor, got a {type(X).__name__}")
    x = X.detach() if isinstance(X, Tensor) else _from_array(X)
    checks.has_values("X", x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"X: expected shape [N, D] with N, D >= 1, got {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("X: expected finite values, got NaN or infinity")
    return x


def _from_array(X: Any) -> Tensor:
    """A numeric array as a Tensor."""
    array = np.array(X, order="C")
    if array.dtype.kind not in "biufc":
        raise TypeError(f"X: expected numbers, got dtype {array.dtype}")
    return torch.from_numpy(array)


def _names(labels: Any, rows: int, name: str = "labels") -> Tensor:
    """Labels of any type as integers [N]."""
    if isinstance(labels, Tensor):
        checks.has_values(name, labels)
        if labels.is_complex():
            raise TypeError(f"{name}: expected real numbers or names, got dtype {labels.dtype}")
        codes = labels.detach()
    else:
        array = np.asarray(refuse_masked_entries(name, labels))
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
        shape = array.shape
        codes = torch.from_numpy(np.unique(array, return_inverse=True)[1].reshape(shape))
    if codes.is_floating_point() and not bool(codes.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    if codes.ndim != 1 or len(codes) != rows:
        raise ValueError(f"{name}: expected shape [{rows}], got {list(codes.shape)}")
    return codes


def _widths(x: Tensor, cluster: Tensor, counts: Tensor) -> Tensor:
    """s_n [N], in the order of the clusters: the rows of one cluster are a slice."""
    order = torch.sort(cluster, stable=True).indices
    own = cluster[order]
    values = x[order].double()
    # the median, because one distant row would move the mean away from all others
    values = values - values.median(0).values
    top = values.abs().max()
    values = values / torch.where(
        top > 0, top, 1.0
    )  # so that squares neither overflow nor underflow
    norms = values.square().sum(1)
    sizes = counts.tolist()
    widths = torch.empty(len(values), dtype=torch.float64, device=x.device)
    step = max(1, TILE_ENTRIES // len(values))
    direct = len(values) ** 2 * values.shape[1] <= DIRECT_WORK
    for start in range(0, len(values), step):
        part = slice(start, min(start + step, len(values)))
        if direct:
            distances = torch.cdist(
                values[part], values, compute_mode="donot_use_mm_for_euclid_dist"
            )
        else:
            distances = torch.addmm(norms, values[part], values.T, alpha=-2)
            distances = distances.add_(norms[part, None]).clamp_(min=0).sqrt_()
        distances[:, part].fill_diagonal_(0.0)
        sums = torch.stack([tile.sum(1) for tile in distances.split(sizes, 1)], 1)
        widths[part] = _width(sums, own[part], counts)
    return widths


def _width(sums: Tensor, own: Tensor, counts: Tensor) -> Tensor:
    """s_n of some rows, from the sums [n, K] of their distances to the rows of each cluster; `own`
    [n] are their clusters, `counts` [K] the numbers of rows.
    """
    index = own[:, None]
    count = counts[own].double()
    inside = sums.gather(1, index)[:, 0] / (count - 1).clamp(min=1)
    outside = (sums / counts).scatter(1, index, torch.inf).amin(1)
    most = torch.maximum(inside, outside)
    width = (outside - inside) / torch.where(most > 0, most, 1.0)
    return torch.where(count > 1, width, 0.0)
