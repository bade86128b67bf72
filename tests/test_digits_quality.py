"""The digits model meets its bars, and the report notices when one does not."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from fastdiff.evaluation import (
    Split,
    evaluate,
    frechet_distance,
    load_split,
    measure,
    nearest_distances,
)


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(5000, marks=pytest.mark.long)])
def test_embedded_model_meets_every_bar(seed: int) -> None:
    from fastdiff.models import load

    report = evaluate(load("digits"), seed=seed)
    assert report.passed, f"\n{report}"


def test_split_is_stratified_and_disjoint(split: Split) -> None:
    assert len(split.train_images) == 1437
    assert len(split.held_out_images) == 360
    assert split.train_images.min() == -1
    assert split.train_images.max() == 1
    assert np.bincount(split.held_out_labels).min() >= 34
    flat = split.held_out_images.reshape(360, -1)
    assert nearest_distances(flat, split.train_images.reshape(1437, -1)).min() > 0


def test_frechet_distance_of_known_gaussians() -> None:
    """Independent axes with deviations s and r: |mean difference|^2 + sum of (s - r)^2."""
    base = np.random.default_rng(0).standard_normal((400, 3))
    base -= base.mean(0)
    base = base @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    a, b = base * [1, 2, 3] + [0, 0, 4], base * [3, 2, 0]
    assert frechet_distance(a, b) == pytest.approx(16 + 4 + 0 + 9, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_real_digits_meet_the_bars_of_quality(split: Split) -> None:
    """Held-out digits in the place of samples: the bars are ones that real data reaches."""
    report = measure(split.held_out_images, split.held_out_labels, split)
    assert report.accuracy == report.held_out_accuracy > 0.98
    assert report.frechet < 1e-3
    assert report.copy_ratio == 1
    assert report.passed


def missed(report) -> list[str]:
    return [what for what, *_, met in report.checks() if not met]


def test_copies_are_noticed(split: Split) -> None:
    """One training image among good ones, even with the noise of a sampler on it."""
    images = split.held_out_images.copy()
    noise = np.random.default_rng(0).standard_normal(images[0].shape) * 0.03
    images[7] = split.train_images[100] + noise
    labels = split.held_out_labels.copy()
    labels[7] = split.train_labels[100]
    assert missed(measure(images, labels, split)) == ["nearest training image / real"]


def test_wrong_labels_and_a_wrong_distribution_are_noticed(split: Split) -> None:
    shuffled = measure(split.held_out_images, (split.held_out_labels + 1) % 10, split)
    assert missed(shuffled) == ["label accuracy"]
    faded = measure(split.held_out_images * 0.8, split.held_out_labels, split)
    assert "Frechet distance / real" in missed(faded)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((30, 1, 4, 4)), np.zeros(30), "images must have shape"),
        (np.zeros((30, 1, 8, 8)), np.zeros(29), "images must have shape"),
        (np.zeros((24, 1, 8, 8)), np.zeros(24), "images must be more than 24"),
        (np.full((30, 1, 8, 8), np.nan), np.zeros(30), "images must be finite"),
    ],
)
def test_bad_input(images: np.ndarray, labels: np.ndarray, message: str, split: Split) -> None:
    with pytest.raises(ValueError, match=message):
        measure(images, labels, split)
