# SPDX-License-Identifier: Apache-2.0
"""Plots by their content: titles, number of artists, and that they are not blank."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from clam_kernels import plots

mpl.use("Agg")


def pixels(drawn: object, tmp_path: Path) -> np.ndarray:
    plots.save(drawn, tmp_path / "p.png")
    return mpl.image.imread(tmp_path / "p.png")


@pytest.mark.parametrize("count", [1, 2, 8, 9, 20, 21, 40])
def test_colours_are_distinct(count: int) -> None:
    assert len({mpl.colors.to_hex(c) for c in plots.colours(count)}) == count


def test_clusters(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(100, 5)), np.arange(100) % 3
    ax = plots.plot_clusters(x, labels, x[:3], title="three")
    assert ax.get_title() == "three"
    assert len(ax.collections) == 4
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "0 (34)",
        "1 (33)",
        "2 (33)",
        "center",
    ]
    assert pixels(ax, tmp_path).std() > 0.05
    axes = plots.plot_clusters(x, labels, embedding=x[:, :2])
    np.testing.assert_allclose(axes.collections[0].get_offsets(), x[labels == 0][:, :2])


@pytest.mark.parametrize("features", [1, 2, 3])
def test_clusters_of_few_features_and_one_label(features: int, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(10, features))
    assert pixels(plots.plot_clusters(x, np.zeros(10, int)), tmp_path).std() > 0.01


def test_many_rows_are_thinned() -> None:
    x = np.random.default_rng(0).normal(size=(50_000, 2))
    ax = plots.plot_clusters(x, np.zeros(50_000, int))
    assert len(ax.collections[0].get_offsets()) == plots.MAX_POINTS


def test_images_show_hidden_entries(tmp_path: Path) -> None:
    hidden = np.arange(12.0).reshape(3, 4)
    hidden[:, 1] = np.nan
    figure = plots.plot_images(
        [("hidden", hidden), ("true", np.ones((2, 4)))], (2, 2), titles=["a"]
    )
    assert len(figure.axes) == 6
    assert figure.axes[0].get_title() == "a"
    assert figure.axes[0].get_ylabel() == "hidden"
    image = pixels(figure, tmp_path)
    red = (image[..., 0] > 0.7) & (image[..., 1] < 0.5)
    assert red.any()


def test_a_bool_is_no_size_of_an_image() -> None:
    with pytest.raises(TypeError, match="shape: expected 2 or 3 ints, got"):
        plots.plot_images([("rows", np.ones((2, 4)))], (True, 4))


def test_history(tmp_path: Path) -> None:
    ax = plots.plot_history([3.0, 2.0, 1.0])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [3, 2, 1])
    assert pixels(ax, tmp_path).std() > 0.01


def training(count: int = 300) -> dict[str, object]:
    """Arguments of `plot_training`: three clusters, which separate."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    noise = rng.normal(size=(count, 4))
    history = {"step": [10, 20, 30], "loss": [0.3, 0.2, 0.18], "changed": [0.2, 0.02, 0.0]}
    return {
        "start": noise + labels[:, None],
        "end": noise + 5.0 * np.eye(4)[labels],
        "labels": (np.roll(labels, 1), labels),
        "history": history,
    }


def test_training_shows_codes_loss_and_changed_labels(tmp_path: Path) -> None:
    figure = plots.plot_training(**training(), title="digits")
    before, after, loss, changed = figure.axes
    assert [len(ax.collections) for ax in (before, after)] == [3, 3]
    colours = [[tuple(c.get_facecolor()[0]) for c in ax.collections] for ax in (before, after)]
    assert colours[0] == colours[1]
    assert loss.lines[0].get_ydata().tolist() == [0.3, 0.2, 0.18]
    assert changed.lines[0].get_ydata().tolist() == [20.0, 2.0, 0.0]
    plots.save(figure, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"start": np.zeros(3)}, r"start: expected shape \[N, D\] .*, got \[3\]"),
        ({"end": np.full((300, 2), np.nan)}, "end: expected finite values, got nan at row 0"),
        ({"labels": ([0], [0] * 300)}, r"labels of start: expected shape \[300\], got \[1\]"),
        ({"history": {"step": [1]}}, "history: expected the keys step, loss and changed, got step"),
        (
            {"history": {"step": [1], "loss": [1.0, 2.0], "changed": [0.0]}},
            r"history, loss: expected shape \[1\], got \[2\]",
        ),
    ],
)
def test_training_names_a_bad_argument(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plots.plot_training(**{**training(), **change})
