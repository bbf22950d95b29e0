# SPDX-License-Identifier: Apache-2.0
"""Pictures of clusters, memories and completions. Each function returns what it drew on and never
shows a window; matplotlib is imported at the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .exceptions import needs

MAX_POINTS = 20_000
# Colour-blind-safe (Okabe and Ito), then a colour map where there are more clusters.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def colours(count: int) -> list[Any]:
    """One colour a cluster, distinct as far as `count` allows."""
    _need_matplotlib()
    from matplotlib import colormaps

    if count <= len(PALETTE):
        return list(PALETTE[:count])
    names = colormaps["tab10"] if count <= 10 else colormaps["tab20"]
    if count <= 20:
        return [names(i) for i in range(count)]
    return [colormaps["nipy_spectral"]((i + 0.5) / count) for i in range(count)]


def _two_axes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, two principal axes [D, 2]) of a data matrix; a fixed sign makes the picture repeat."""
    mean = x.mean(0)
    centred = x - mean
    _, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    axes = vectors[:, ::-1][:, :2]
    if axes.shape[1] == 1:
        axes = np.hstack([axes, np.zeros_like(axes)])
    return mean, axes * np.where(axes[np.abs(axes).argmax(0), range(2)] < 0, -1.0, 1.0)


def plot_clusters(
    X: Any,
    labels: Any,
    centers: Any = None,
    *,
    embedding: Any = None,
    title: str = "clusters",
    ax: Any = None,
) -> Any:
    """Scatter of the rows, coloured by label, with the centres marked.

    Parameters
    ----------
    X : array [N, D]
        Data; at most 20,000 rows are drawn, evenly spaced.
    labels : array [N], int
        Cluster of each row.
    centers : array [K, D], optional
        Marked by crosses; not drawn where an embedding is given.
    embedding : array [N, 2], optional
        Positions to use instead of the first two principal axes.
    title : str
        Of the axes.
    ax : matplotlib Axes, optional
        Where to draw; a new figure otherwise.

    Returns
    -------
    matplotlib Axes

    Examples
    --------
    >>> import matplotlib, numpy as np
    >>> matplotlib.use("Agg")
    >>> from clam_kernels.plots import plot_clusters
    >>> plot_clusters(np.eye(4), [0, 0, 1, 1]).get_title()
    'clusters'
    """
    ax = _axes(ax, (6.0, 4.5))
    masked, labels = np.ma.asarray(X), np.asarray(labels)
    if masked.dtype.kind in "mM":
        raise TypeError(f"X: expected numbers, got dtype {masked.dtype}")
    x = np.ma.filled(masked.astype(np.float64), np.nan)  # a masked entry is no data
    if embedding is None and not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise ValueError(
            f"X: expected finite values, got {x[row, column]} at row {row}, column {column};"
            " `ClAM.complete` fills what is missing"
        )
    pick = np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).astype(int)
    mean, axes = _two_axes(x[pick])
    points = np.asarray(embedding)[pick] if embedding is not None else (x[pick] - mean) @ axes
    found = np.unique(labels)
    for colour, label in zip(colours(len(found)), found, strict=True):
        at = points[labels[pick] == label]
        size = f"{label} ({int((labels == label).sum())})"
        ax.scatter(*at.T, s=8, color=colour, alpha=0.7, linewidths=0, rasterized=True, label=size)
    if centers is not None and embedding is None:
        at = (np.asarray(centers, dtype=np.float64) - mean) @ axes
        ax.scatter(*at.T, marker="X", s=70, color="white", edgecolors="black", label="memory")
    ax.set(title=title, xlabel="principal axis 1", ylabel="principal axis 2")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return ax


def plot_images(
    rows: Sequence[tuple[str, Any]], shape: tuple[int, ...], *, titles: Sequence[str] | None = None
) -> Any:
    """Rows of images, one named row under the other.

    Parameters
    ----------
    rows : sequence of (name, array [M, height * width])
        What to draw; NaN entries (hidden) are drawn in red.
    shape : (height, width) or (height, width, channels)
        Of one image.
    titles : sequence of M str, optional
        Above the first row.

    Returns
    -------
    matplotlib Figure

    Examples
    --------
    >>> import matplotlib, numpy as np
    >>> matplotlib.use("Agg")
    >>> from clam_kernels.plots import plot_images
    >>> len(plot_images([("memories", np.zeros((3, 4)))], (2, 2)).axes)
    3
    """
    _need_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(0.9 * columns + 1.0, 1.0 * len(rows) + 0.5))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    ink = colormaps["gray_r"].with_extremes(bad="#D55E00")
    for row, (name, images) in zip(grid, rows, strict=True):
        pixels = np.ma.masked_invalid(np.asarray(images, dtype=np.float64))
        low, high = float(pixels.min()), float(pixels.max())
        for ax, image in zip(row, pixels, strict=False):
            ax.imshow(image.reshape(shape), cmap=ink, vmin=low, vmax=high, interpolation="nearest")
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.set_frame_on(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for ax, title in zip(grid[0], titles or (), strict=False):
        ax.set_title(title, fontsize=8)
    figure.tight_layout()
    return figure


def plot_history(loss_curve: Any, *, ax: Any = None) -> Any:
    """Training loss by epoch.

    Parameters
    ----------
    loss_curve : array [epochs]
        `loss_curve_` of an estimator.
    ax : matplotlib Axes, optional
        Where to draw; a new figure otherwise.

    Returns
    -------
    matplotlib Axes

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> from clam_kernels.plots import plot_history
    >>> plot_history([3.0, 2.0]).get_xlabel()
    'epoch'
    """
    ax = _axes(ax, (5.0, 3.0))
    ax.plot(np.arange(1, len(loss_curve) + 1), loss_curve, color=PALETTE[0])
    ax.set(xlabel="epoch", ylabel="loss", title="training")
    return ax


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    _need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").add_subplot()


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(needs("a picture", "matplotlib", "plot")) from None


def check_output(path: Any) -> None:
    """Find out whether an image can be written under a name, before there is one.

    Parameters
    ----------
    path : path

    Raises
    ------
    ValueError
        The suffix is no format of images that matplotlib writes.
    ImportError
        matplotlib is missing.

    Examples
    --------
    >>> from clam_kernels import plots
    >>> plots.check_output("clusters.png")
    """
    _need_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
    suffix = Path(path).suffix
    if suffix and suffix.lower()[1:] not in suffixes:
        raise ValueError(f"expected an image .{', .'.join(suffixes)}, got {suffix!r}")


def save(drawn: Any, path: Any) -> None:
    """Write a figure, or the figure of an axes, as an image.

    Parameters
    ----------
    drawn : matplotlib Axes or Figure
        What a function above returned.
    path : path
        The suffix decides the format.

    Examples
    --------
    >>> import os, tempfile
    >>> from clam_kernels import plots
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plots.save(plots.plot_history([1.0]), os.path.join(folder, "loss.png"))
    """
    figure = getattr(drawn, "figure", None) or drawn
    figure.savefig(path, dpi=150, bbox_inches="tight")
