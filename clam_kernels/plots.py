# SPDX-License-Identifier: Apache-2.0
"""Pictures of clusters, memories and completions. Each function returns its axes or figure and
opens no window; the first call imports matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ._core import checks
from .exceptions import needs

MAX_POINTS = 20_000
# Colours for colour-blind readers (Okabe and Ito); a colour map replaces them for more clusters.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def colours(count: int) -> list[Any]:
    """`count` colours, distinct for up to 20."""
    _need_matplotlib()
    from matplotlib import colormaps

    if count <= len(PALETTE):
        return list(PALETTE[:count])
    names = colormaps["tab10"] if count <= 10 else colormaps["tab20"]
    if count <= 20:
        return [names(i) for i in range(count)]
    return [colormaps["nipy_spectral"]((i + 0.5) / count) for i in range(count)]


def _two_axes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, two principal axes [D, 2]) of a data matrix; the sign is fixed, so that the same data
    give the same picture.
    """
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
    """Draw a scatter plot of the rows, coloured by label, and the centers.

    Parameters
    ----------
    X : array [N, D]
        Data; at most 20,000 rows are drawn, evenly spaced.
    labels : array [N], int
        Cluster of each row.
    centers : array [K, D], optional
        Drawn as crosses; not drawn with an embedding.
    embedding : array [N, 2], optional
        Positions of the rows; default their first two principal axes.
    title : str
        Title of the axes.
    ax : matplotlib Axes, optional
        Axes to draw on; default those of a new figure.

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
    masked = np.ma.asarray(X)
    if masked.dtype.kind not in "biufcO":
        raise TypeError(f"X: expected numbers, got dtype {masked.dtype}")
    _expect_shape("X", masked, "[N, D] with N, D >= 1", masked.ndim == 2 and masked.size > 0)
    n, d = masked.shape
    labels = np.asarray(labels)
    _expect_shape("labels", labels, f"[{n}]", labels.shape == (n,))
    if embedding is not None:
        embedding = np.asarray(embedding)
        _expect_shape("embedding", embedding, f"[{n}, 2]", embedding.shape == (n, 2))
    x = np.ma.filled(masked.astype(np.float64), np.nan)  # a masked entry has no value
    if embedding is None and not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise ValueError(
            f"X: expected finite values, got {x[row, column]} at row {row}, column {column};"
            " `ClAM.complete` fills what is missing"
        )
    pick = np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).astype(int)
    mean, axes = _two_axes(x[pick])
    points = embedding[pick] if embedding is not None else (x[pick] - mean) @ axes
    names = np.unique(labels)
    palette = dict(zip(names.tolist(), colours(len(names)), strict=True))
    sizes = {label: f"{label} ({int((labels == label).sum())})" for label in palette}
    _scatter(ax, points, labels[pick], palette, sizes)
    if centers is not None and embedding is None:
        centers = np.asarray(centers)
        if centers.dtype.kind not in "biufO":
            raise TypeError(f"centers: expected numbers, got dtype {centers.dtype}")
        _expect_shape("centers", centers, f"[K, {d}]", centers.shape[-1:] == (d,))
        at = (centers.astype(np.float64) - mean) @ axes
        ax.scatter(*at.T, marker="X", s=70, color="white", edgecolors="black", label="center")
    ax.set(title=title, xlabel="principal axis 1", ylabel="principal axis 2")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return ax


def plot_images(
    rows: Sequence[tuple[str, Any]], shape: tuple[int, ...], *, titles: Sequence[str] | None = None
) -> Any:
    """Draw rows of images, one named row below the other.

    Parameters
    ----------
    rows : sequence of (name, array [M, height * width])
        The images; NaN entries (missing) are drawn in red.
    shape : (height, width) or (height, width, channels)
        Shape of one image.
    titles : sequence of M str, optional
        Titles above the images of the first row.

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
    _check_images(rows, shape, titles)
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
    """Draw the training loss by epoch.

    Parameters
    ----------
    loss_curve : array [epochs]
        `loss_curve_` of an estimator.
    ax : matplotlib Axes, optional
        Axes to draw on; default those of a new figure.

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
    _expect_shape("loss_curve", loss_curve, "[epochs]", np.ndim(loss_curve) == 1)
    ax.plot(np.arange(1, len(loss_curve) + 1), loss_curve, color=PALETTE[0])
    ax.set(xlabel="epoch", ylabel="loss", title="training")
    return ax


def plot_training(
    start: Any, end: Any, labels: tuple[Any, Any], history: Any, *, title: str = "training"
) -> Any:
    """Draw codes of rows before and after a training, and its loss and changed labels by step.

    Parameters
    ----------
    start, end : array [N, D]
        Codes of the rows before and after the training, each on its first two principal axes; at
        most 20,000 rows are drawn, evenly spaced.
    labels : (array [N], array [N]), int
        Clusters before and after the training. A cluster has one colour in both pictures.
    history : dict of arrays [M]
        "step", "loss" and "changed" (share of the rows whose label changed) at M times, as
        `history_` of `DEC`.
    title : str
        Title of the figure.

    Returns
    -------
    matplotlib Figure

    Examples
    --------
    >>> import matplotlib, numpy as np
    >>> matplotlib.use("Agg")
    >>> from clam_kernels.plots import plot_training
    >>> history = {"step": [1, 2], "loss": [0.3, 0.2], "changed": [0.1, 0.0]}
    >>> figure = plot_training(np.eye(4), np.eye(4), ([0, 0, 1, 1], [0, 1, 1, 1]), history)
    >>> [ax.get_title() for ax in figure.axes]
    ['codes before', 'codes after', 'loss and labels', '']
    """
    if not isinstance(labels, Sequence) or len(labels) != 2:
        kind = type(labels).__name__
        raise TypeError(checks.wording("labels", "a pair (labels before, labels after)", kind))
    pairs = [_codes(*pair) for pair in zip(("start", "end"), (start, end), labels, strict=True)]
    steps, loss, changed = _columns(history)
    _need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.0, 4.0), layout="constrained")
    *both, right = figure.subplots(1, 3)
    names = np.union1d(pairs[0][1], pairs[1][1]).tolist()
    palette = dict(zip(names, colours(len(names)), strict=True))
    for ax, (codes, clusters), when in zip(both, pairs, ("before", "after"), strict=True):
        pick = np.linspace(0, len(codes) - 1, min(len(codes), MAX_POINTS)).astype(int)
        mean, axes = _two_axes(codes[pick])
        _scatter(
            ax,
            (codes[pick] - mean) @ axes,
            clusters[pick],
            palette,
            dict(zip(names, map(str, names), strict=True)),
        )
        ax.set(title=f"codes {when}", xlabel="principal axis 1", ylabel="principal axis 2")
    handles = both[1].get_legend_handles_labels()
    style = {"ncols": 20, "frameon": False, "markerscale": 2.0, "title": "cluster"}
    figure.legend(*handles, loc="outside lower left", **style)
    right.plot(steps, loss, color=PALETTE[0])
    right.set(xlabel="step", title="loss and labels")
    right.set_ylabel("loss", color=PALETTE[0])
    second = right.twinx()
    second.plot(steps, 100.0 * changed, color=PALETTE[5])
    second.set_ylabel("changed labels, % of rows", color=PALETTE[5])
    second.set_ylim(bottom=0.0)
    figure.suptitle(title)
    return figure


def _codes(name: str, codes: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, D] in float64 with their labels; ValueError for another shape."""
    codes, labels = np.asarray(codes, dtype=np.float64), np.asarray(labels)
    _expect_shape(name, codes, "[N, D] with N, D >= 1", codes.ndim == 2 and codes.size > 0)
    _expect_shape(f"labels of {name}", labels, f"[{len(codes)}]", labels.shape == (len(codes),))
    if not np.isfinite(codes).all():
        row, column = np.argwhere(~np.isfinite(codes))[0]
        got = f"{codes[row, column]} at row {row}, column {column}"
        raise ValueError(checks.wording(name, "finite values", got))
    return codes, labels


def _columns(history: Any) -> list[np.ndarray]:
    """The columns step, loss and changed; ValueError where one is missing or of another length."""
    names = ("step", "loss", "changed")
    if not all(name in history for name in names):
        got = ", ".join(map(str, history)) or "none"
        raise ValueError(checks.wording("history", "the keys step, loss and changed", got))
    columns = [np.asarray(history[name], dtype=np.float64) for name in names]
    for name, column in zip(names, columns, strict=True):
        _expect_shape(
            f"history, {name}", column, f"[{len(columns[0])}]", column.shape == columns[0].shape
        )
    return columns


def _scatter(
    ax: Any, points: np.ndarray, labels: np.ndarray, palette: dict[Any, Any], names: dict[Any, str]
) -> None:
    """Draw points [M, 2] in the colours of their labels."""
    for label, colour in palette.items():
        at = points[labels == label]
        ax.scatter(
            *at.T, s=8, color=colour, alpha=0.7, linewidths=0, rasterized=True, label=names[label]
        )


def _check_path(path: Any) -> None:
    """TypeError unless the argument names a file."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path: expected a str or a path, got {type(path).__name__}")


def _check_images(rows: Any, shape: Any, titles: Any) -> None:
    """The arguments of `plot_images`: rows of images of one shape."""
    pairs = isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0
    if not pairs or not all(isinstance(row, Sequence) and len(row) == 2 for row in rows):
        raise TypeError(f"rows: expected a sequence of (name, array), got {type(rows).__name__}")
    is_sequence = isinstance(shape, Sequence | np.ndarray) and not isinstance(shape, str)
    sizes = shape if is_sequence else ()
    if len(sizes) not in (2, 3) or not all(checks.is_whole(size) for size in sizes):
        raise TypeError(f"shape: expected 2 or 3 ints, got {shape!r}")
    for name, images in rows:
        size = np.shape(images)
        ok = len(size) > 1 and math.prod(size[1:]) == math.prod(sizes)
        _expect_shape("rows", images, f"[M, {math.prod(sizes)}] of images {name!r}", ok)
    if titles is not None and np.ndim(titles) != 1:
        raise TypeError(f"titles: expected a sequence of str, got {type(titles).__name__}")


def _expect_shape(name: str, array: Any, expected: str, ok: bool) -> None:
    """ValueError unless ok."""
    if not ok:
        raise ValueError(f"{name}: expected shape {expected}, got {list(np.shape(array))}")


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    """The axes, or those of a new figure."""
    if ax is not None:
        if not hasattr(ax, "set_xlabel"):
            raise TypeError(f"ax: expected matplotlib Axes, got {type(ax).__name__}")
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
    """Check that an image file of this name can be written, before drawing it.

    Parameters
    ----------
    path : path

    Raises
    ------
    ValueError
        matplotlib does not write images with this suffix.
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> from clam_kernels import plots
    >>> plots.check_output("clusters.png")
    """
    _need_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
    _check_path(path)
    suffix = Path(path).suffix
    if suffix and suffix.lower()[1:] not in suffixes:
        raise ValueError(f"path: expected an image .{', .'.join(suffixes)}, got {suffix!r}")


def save(drawn: Any, path: Any) -> None:
    """Write a figure, or the figure of axes, as an image.

    Parameters
    ----------
    drawn : matplotlib Axes or Figure
        The result of a function above.
    path : path
        The file to write; its suffix decides the format.

    Examples
    --------
    >>> import os, tempfile
    >>> from clam_kernels import plots
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plots.save(plots.plot_history([1.0]), os.path.join(folder, "loss.png"))
    """
    figure = getattr(drawn, "figure", None) or drawn
    if not hasattr(figure, "savefig"):
        kind = type(drawn).__name__
        raise TypeError(f"drawn: expected matplotlib Axes or a Figure, got {kind}")
    if not hasattr(path, "write"):
        _check_path(path)
    figure.savefig(path, dpi=150, bbox_inches="tight")
