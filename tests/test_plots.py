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
        "memory",
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
