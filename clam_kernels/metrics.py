# SPDX-License-Identifier: Apache-2.0
"""Measures of a clustering, on the device of the data and in bounded memory."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

# float64 distances that are held at once: 32 MB.
TILE_ENTRIES = 1 << 22
# Differences up to which distances are taken from them: exact, and slower than from products.
DIRECT_WORK = 1 << 29


def silhouette(
    X: Any, labels: Any, sample_size: int | None = None, *, random_state: int = 0
) -> float:
    """Mean silhouette of a clustering, exact in chunks of rows, or of a sample of them.

        s_n = (b_n - a_n) / max(a_n, b_n), a_n the mean distance to the other rows of n's cluster,
        b_n the least mean distance to the rows of another one; 0 for a cluster of one row
        (Rousseeuw 1987)

    Parameters
    ----------
    X : array-like or Tensor [N, D]
        Finite values. A tensor is measured on its device.
    labels : array-like or Tensor [N], numbers or names
        The cluster of each row; at least 2 clusters and fewer than rows.
    sample_size : int, optional
        Rows to draw without replacement and to measure among themselves; all unless given.
    random_state : int
        Seed of the draw.

    Returns
    -------
    float in [-1, 1]
        That of scikit-learn's `silhouette_score` up to rounding, without its N x N array.

    Raises
    ------
    ValueError
        Shapes that do not fit, values that are not finite or that a mask hides, fewer than 2
        clusters or as many as rows.

    Examples
    --------
    >>> from clam_kernels import metrics
    >>> round(metrics.silhouette([[0.0], [1.0], [8.0], [9.0]], [0, 0, 1, 1]), 4)
    0.8745
    """
    x = _matrix(X)
    found = _names(labels, len(x)).to(x.device)
    if sample_size is not None:
        whole = isinstance(sample_size, Integral) and not isinstance(sample_size, bool)
        if not whole or not 3 <= sample_size <= len(x):
            raise ValueError(f"sample_size: expected 3 to {len(x)} rows, got {sample_size!r}")
        drawn = np.random.default_rng(random_state).choice(len(x), sample_size, replace=False)
        index = torch.from_numpy(np.sort(drawn)).to(x.device)
        x, found = x[index], found[index]
    _, cluster, counts = found.unique(return_inverse=True, return_counts=True)
    if not 2 <= len(counts) < len(x):
        raise ValueError(
            f"labels: expected 2 to {len(x) - 1} clusters among {len(x)} rows, got {len(counts)}"
        )
    return float(_widths(x, cluster, counts).mean())


def unmasked(name: str, value: Any) -> Any:
    """The value; ValueError for a masked array of numpy that hides entries: what stands below the
    mask is no data.
    """
    if np.ma.isMaskedArray(value) and np.ma.getmaskarray(value).any():
        raise ValueError(f"{name}: expected an array without masked entries, got a masked array")
    return value


def _matrix(X: Any) -> Tensor:
    unmasked("X", X)
    if hasattr(X, "toarray"):
        raise TypeError(f"X: expected an array or a dense Tensor, got a {type(X).__name__}")
    x = X.detach() if isinstance(X, Tensor) else torch.from_numpy(np.array(X, order="C"))
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"X: expected shape [N, D] with N, D >= 1, got {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("X: expected finite values, got NaN or infinity")
    return x


def _names(labels: Any, rows: int) -> Tensor:
    """Labels of any kind as whole numbers [N]."""
    if isinstance(labels, Tensor):
        found = labels.detach()
    else:
        array = np.asarray(unmasked("labels", labels))
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("labels: expected finite values, got NaN or infinity")
        shape = array.shape
        found = torch.from_numpy(np.unique(array, return_inverse=True)[1].reshape(shape))
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise ValueError("labels: expected finite values, got NaN or infinity")
    if found.ndim != 1 or len(found) != rows:
        raise ValueError(f"labels: expected shape [{rows}], got {list(found.shape)}")
    return found


def _widths(x: Tensor, cluster: Tensor, counts: Tensor) -> Tensor:
    """s_n [N]; rows are put in the order of their clusters, so that those of one are a slice."""
    order = torch.sort(cluster, stable=True).indices
    own = cluster[order]
    values = x[order].double()
    # not the mean: one far row would take all the others from the origin
    values = values - values.median(0).values
    top = values.abs().max()
    values = values / torch.where(top > 0, top, 1.0)  # squares neither overflow nor vanish
    norms = values.square().sum(1)
    sizes = counts.tolist()
    widths = torch.empty(len(values), dtype=torch.float64, device=x.device)
    step = max(1, TILE_ENTRIES // len(values))
    direct = len(values) ** 2 * values.shape[1] <= DIRECT_WORK
    for start in range(0, len(values), step):
        part = slice(start, min(start + step, len(values)))
        if direct:
            far = torch.cdist(values[part], values, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            far = torch.addmm(norms, values[part], values.T, alpha=-2).add_(norms[part, None])
            far = far.clamp_(min=0).sqrt_()
        far[:, part].fill_diagonal_(0.0)
        sums = torch.stack([one.sum(1) for one in far.split(sizes, 1)], 1)
        widths[part] = _width(sums, own[part], counts)
    return widths


def _width(sums: Tensor, own: Tensor, counts: Tensor) -> Tensor:
    """s_n of some rows by the sums [n, K] of their distances to the rows of every cluster."""
    mine = own[:, None]
    count = counts[own].double()
    inside = sums.gather(1, mine)[:, 0] / (count - 1).clamp(min=1)
    outside = (sums / counts).scatter(1, mine, torch.inf).amin(1)
    most = torch.maximum(inside, outside)
    width = (outside - inside) / torch.where(most > 0, most, 1.0)
    return torch.where(count > 1, width, 0.0)
