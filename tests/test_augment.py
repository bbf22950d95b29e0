# SPDX-License-Identifier: Apache-2.0
"""Shift and rotation of images: exact cases, ranges, repeatability, errors."""

from __future__ import annotations

import pytest
import torch

from clam_kernels.augment import ShiftAndRotate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(height: int = 9, width: int = 9) -> torch.Tensor:
    """A smooth ramp to the right and down."""
    return torch.arange(width) / 10.0 + 3.0 * torch.arange(height)[:, None]


def test_without_shift_and_rotation_a_batch_is_unchanged() -> None:
    batch = torch.rand(4, 3, 6, 5, generator=seeded())
    out = ShiftAndRotate(degrees=0, shift=0)(batch, seeded())
    torch.testing.assert_close(out, batch, rtol=0, atol=1e-6)


def test_a_shift_moves_the_ramp_by_at_most_the_stated_part_of_the_side() -> None:
    batch = image().expand(200, 9, 9)
    out = ShiftAndRotate(degrees=0, shift=1 / 9)(batch, seeded())
    moved = out[:, 4, 4] - batch[:, 4, 4]
    assert moved.abs().max() <= 3.1 + 1e-5  # one pixel down and one to the right
    assert moved.min() < -2.5
    assert moved.max() > 2.5
    assert len(moved.unique()) == 200


def test_a_rotation_keeps_the_centre_and_turns_a_rectangle_in_pixels() -> None:
    ramp = torch.arange(21.0).expand(11, 21)  # to the right
    out = ShiftAndRotate(degrees=90, shift=0)(ramp.expand(100, 11, 21), seeded())
    torch.testing.assert_close(out[:, 5, 10], torch.full((100,), 10.0), rtol=0, atol=1e-4)
    # a step down is the vector (-sin, cos) and a step right (cos, sin): their squares sum to 1
    down, right = out[:, 6, 10] - out[:, 5, 10], out[:, 5, 11] - out[:, 5, 10]
    torch.testing.assert_close(down**2 + right**2, torch.ones(100), rtol=0, atol=1e-4)
    assert down.min() < -0.9
    assert down.max() > 0.9


def test_the_border_fills_what_comes_from_outside() -> None:
    out = ShiftAndRotate(degrees=180, shift=1)(torch.full((50, 4, 4), 7.0), seeded())
    torch.testing.assert_close(out, torch.full((50, 4, 4), 7.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flat_rows_are_the_same_images(dtype: torch.dtype) -> None:
    images = torch.rand(5, 2, 4, 6, generator=seeded()).to(dtype)
    flat = ShiftAndRotate((2, 4, 6))(images.flatten(1), seeded())
    assert flat.dtype == dtype
    assert torch.equal(flat, ShiftAndRotate()(images, seeded()).flatten(1))


def test_the_generator_alone_decides_the_draw() -> None:
    batch, augment = torch.rand(5, 36, generator=seeded()), ShiftAndRotate((6, 6))
    before = torch.get_rng_state()
    first, second = augment(batch, seeded(1)), augment(batch, seeded(2))
    assert torch.equal(first, augment(batch, seeded(1)))
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_an_empty_batch_stays_empty() -> None:
    assert ShiftAndRotate((2, 3))(torch.zeros(0, 6), seeded()).shape == (0, 6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"shape": (8,)}, r"shape: expected \(height, width\) or .*, got \(8,\)"),
        ({"shape": 8}, r"shape: expected \(height, width\) or .*, got \(8,\)"),
        ({"shape": (8, 0)}, "shape: expected"),
        ({"shape": "ab"}, "shape: expected"),
        ({"degrees": -1}, r"degrees: expected a number in \[0, 180\], got -1"),
        ({"degrees": float("nan")}, "degrees: expected"),
        ({"shift": 1.5}, r"shift: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments_have_a_clear_error(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ShiftAndRotate(**arguments)


def test_bad_batches_have_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"batch: expected shape \[B, 64\] of images \[8, 8\]"):
        ShiftAndRotate((8, 8))(torch.zeros(2, 63), seeded())
    with pytest.raises(ValueError, match="flat rows need `shape`"):
        ShiftAndRotate()(torch.zeros(2, 64), seeded())
    with pytest.raises(TypeError, match="batch: expected"):
        ShiftAndRotate((8, 8))(torch.zeros(2, 64, dtype=torch.uint8), seeded())
    with pytest.raises(TypeError, match="degrees: expected a number, got str"):
        ShiftAndRotate(degrees="ten")
