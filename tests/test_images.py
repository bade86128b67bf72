"""Samples to pictures: values, places, text entries, and files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.images import check_writable, labelled_grid, save_png, to_uint8


def test_values_are_clipped_and_rounded() -> None:
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1.0, 9.0]).view(1, 1, 2, 3)
    assert to_uint8(values).reshape(-1).tolist() == [0, 0, 64, 128, 255, 255]
    assert to_uint8(values, (0, 2)).reshape(-1).tolist() == [0, 0, 0, 0, 128, 255]


def test_colour_channels_come_last() -> None:
    samples = torch.zeros(2, 3, 4, 5)
    samples[1, 2] = 1
    pixels = to_uint8(samples, (0, 1))
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels[1, 0, 0].tolist() == [0, 0, 255]
    assert not pixels[0].any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [(), ("0", "1", "2")])
def test_grid_holds_every_image_once_in_reading_order(channels: int, labels: tuple) -> None:
    """Five distinct greys in three columns; the sixth cell stays white."""
    greys = [10, 60, 110, 160, 210]
    images = np.stack([np.full((2, 3, channels), grey, np.uint8) for grey in greys])
    pixels = np.asarray(labelled_grid(images, 3, labels, scale=4).convert("L"))
    if labels:
        assert pixels[:20].min() < 128
        pixels = pixels[20:]  # the captions' smooth edges have greys of their own
    found = [np.argwhere(pixels == grey) for grey in greys]
    for places in found:
        low, high = places.min(0), places.max(0) + 1
        assert (high - low).tolist() == [8, 12]
        assert (pixels[low[0] : high[0], low[1] : high[1]] == pixels[tuple(low)]).all()
    corners = [tuple(places.min(0)) for places in found if len(places)]
    assert corners == sorted(corners)
    assert [corner[1] for corner in corners[:2]] == [corner[1] for corner in corners[3:]]
    assert pixels[-8:, -8:].min() == 255
    assert (corners[0][0], pixels[: corners[0][0]].min(initial=255)) == (0 if labels else 4, 255)


def test_png_round_trip_with_text(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    path = tmp_path / "a.png"
    save_png(labelled_grid(pixels, 1), path, {"seed": 7, "solver": "ddim"})
    with Image.open(path) as picture:
        assert picture.text == {"seed": "7", "solver": "ddim"}
        assert np.array_equal(np.asarray(picture)[4:12, 4:12], pixels[0, :, :, 0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("samples", "value_range", "message"),
    [
        (torch.zeros(1, 2, 4, 4), (-1, 1), r"samples must have shape .*got \(1, 2, 4, 4\)"),
        (torch.zeros(1, 4, 4), (-1, 1), "samples must have shape"),
        (torch.zeros(1, 1, 4, 4), (1, 1), r"value_range must be .*got \(1, 1\)"),
        (torch.full((1, 1, 2, 2), float("nan")), (-1, 1), "samples must be finite, got 4 values"),
    ],
)
def test_bad_samples(samples: torch.Tensor, value_range: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_uint8(samples, value_range)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((1, 2, 2, 1))}, "images must be uint8 .*got float64"),
        ({"images": np.zeros((0, 2, 2, 1), np.uint8)}, "images must hold at least one"),
        ({"columns": 0}, "columns must be at least 1, got 0"),
        ({"scale": 0}, "scale must be at least 1, got 0"),
        ({"labels": ["a", "b"]}, r"labels must be one per column \(1\), got 2"),
    ],
)
def test_bad_grid(change: dict, message: str) -> None:
    arguments = {"images": np.zeros((1, 2, 2, 1), np.uint8), "columns": 1, **change}
    with pytest.raises(ValueError, match=message):
        labelled_grid(**arguments)


def test_check_writable(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a.png") == tmp_path / "a.png"
    (tmp_path / "folder.png").mkdir()
    for path, message in (
        (tmp_path / "a.jpg", "must end in .png"),
        (tmp_path / "folder.png", "must be a file, got the folder"),
        (tmp_path / "no" / "a.png", "must be in a folder that exists"),
    ):
        with pytest.raises(ValueError, match=message):
            check_writable(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="must be in a writable folder"):
        check_writable(tmp_path / "a.png")
