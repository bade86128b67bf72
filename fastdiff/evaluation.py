"""How good the digits model is: 1,000 samples against the real 8x8 digits, three bars.

1. Labels. An SVC (RBF) fitted on the real training split reads the label a sample was asked for:
   at least 95 % right. On held-out real digits the same classifier reaches about 99 %.
2. Distribution. The Frechet distance between Gaussians fitted to samples and to held-out images,
   in PCA features of the training split, at most twice that of the training split to held-out
   images. That is the distance two sets of real digits have, so 1 would be indistinguishable.
3. Copies. No sample closer to a training image than half the smallest distance any held-out
   image has. Held-out images show how close two real digits come by chance; a memorised one lies
   far below that, as nothing but the sampler's rounding separates it from its original.

Needs scikit-learn. The split is stratified, 20 % held out, with a fixed seed; the training script
uses the same function, so no held-out image was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff.models import DiT

SPLIT_SEED = 0
HELD_OUT = 0.2
COMPONENTS = 24  # PCA features: 90 % of the variance; 359 held-out images fit a 24x24 covariance
SAMPLES = 1000
MIN_ACCURACY = 0.95
MAX_FRECHET_RATIO = 2.0
MIN_COPY_RATIO = 0.5


@dataclass(frozen=True)
class Split:
    """Real digits: images float32 [N, 1, 8, 8] in [-1, 1], labels int64 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray


@dataclass(frozen=True)
class Report:
    """The measured quantities; distances are Euclidean in the 64 pixels of [-1, 1]."""

    samples: int
    accuracy: float
    held_out_accuracy: float
    frechet: float
    frechet_real: float
    nearest_min: float
    nearest_median: float
    held_out_nearest_min: float
    held_out_nearest_median: float

    @property
    def frechet_ratio(self) -> float:
        return self.frechet / self.frechet_real

    @property
    def copy_ratio(self) -> float:
        return self.nearest_min / self.held_out_nearest_min

    def checks(self) -> list[tuple[str, float, str, float, bool]]:
        """(what, value, "at least" or "at most", bar, met) for each of the three bars."""
        low, high = "at least", "at most"
        return [
            ("label accuracy", self.accuracy, low, MIN_ACCURACY, self.accuracy >= MIN_ACCURACY),
            (
                "Frechet distance / real",
                self.frechet_ratio,
                high,
                MAX_FRECHET_RATIO,
                self.frechet_ratio <= MAX_FRECHET_RATIO,
            ),
            (
                "nearest training image / real",
                self.copy_ratio,
                low,
                MIN_COPY_RATIO,
                self.copy_ratio >= MIN_COPY_RATIO,
            ),
        ]

    @property
    def passed(self) -> bool:
        return all(met for *_, met in self.checks())

    def __str__(self) -> str:
        lines = [
            f"{self.samples} samples against held-out real digits",
            f"{'':34}{'samples':>10}{'held-out':>10}",
            f"{'label accuracy (SVC)':34}{self.accuracy:>10.1%}{self.held_out_accuracy:>10.1%}",
            f"{f'Frechet distance ({COMPONENTS} PCA features)':34}{self.frechet:>10.4f}"
            f"{self.frechet_real:>10.4f}  (held-out column: the training split)",
            f"{'nearest training image, smallest':34}{self.nearest_min:>10.3f}"
            f"{self.held_out_nearest_min:>10.3f}",
            f"{'nearest training image, median':34}{self.nearest_median:>10.3f}"
            f"{self.held_out_nearest_median:>10.3f}",
            "",
        ]
        for what, value, relation, bar, met in self.checks():
            mark = "pass" if met else "MISS"
            lines.append(f"{mark}  {what:32}{value:>8.3f}  {relation} {bar:g}")
        return "\n".join(lines)


def load_split() -> Split:
    """scikit-learn's 1,797 digits, split as everywhere in this project.

    Raises ImportError naming the remedy when scikit-learn is missing.
    """
    _require_sklearn()
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images = (digits.images / 8 - 1).astype(np.float32)[:, None]
    train_x, test_x, train_y, test_y = train_test_split(
        images,
        digits.target.astype(np.int64),
        test_size=HELD_OUT,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    return Split(train_x, train_y, test_x, test_y)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features a [N, D] and b [M, D].

    A and B are the covariances (Dowson and Landau 1982). The root's trace is the sum of the square
    roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric, so no complex part arises.
    """
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance_b @ root)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(cross.clip(0)).sum()
    return float(means + trace)


def nearest_distances(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """[N]: the Euclidean distance of each image [N, D] to the nearest of training [M, D]."""
    images, training = images.astype(np.float64), training.astype(np.float64)
    nearest = [np.sqrt(((training - image) ** 2).sum(1).min()) for image in images]
    return np.array(nearest)


def measure(images: np.ndarray, labels: np.ndarray, split: Split | None = None) -> Report:
    """The report of images [N, 1, 8, 8] in [-1, 1] that were asked to show labels [N]."""
    split = load_split() if split is None else split
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    count = len(images)
    if images.shape[1:] != split.train_images.shape[1:] or count != len(labels):
        raise ValueError(
            f"images must have shape ({len(labels)}, 1, 8, 8), one per label, got {images.shape}"
        )
    if count <= COMPONENTS:
        raise ValueError(f"images must be more than {COMPONENTS} for a covariance, got {count}")
    if not np.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity")
    flat = images.reshape(count, -1)
    train = split.train_images.reshape(len(split.train_images), -1)
    held_out = split.held_out_images.reshape(len(split.held_out_images), -1)
    classifier = SVC(C=10, gamma="scale").fit(train, split.train_labels)
    features = PCA(COMPONENTS, svd_solver="full").fit(train).transform
    nearest, nearest_real = nearest_distances(flat, train), nearest_distances(held_out, train)
    return Report(
        samples=count,
        accuracy=float((classifier.predict(flat) == labels).mean()),
        held_out_accuracy=float(classifier.score(held_out, split.held_out_labels)),
        frechet=frechet_distance(features(flat), features(held_out)),
        frechet_real=frechet_distance(features(train), features(held_out)),
        nearest_min=float(nearest.min()),
        nearest_median=float(np.median(nearest)),
        held_out_nearest_min=float(nearest_real.min()),
        held_out_nearest_median=float(np.median(nearest_real)),
    )


def evaluate(
    model: DiT,
    *,
    samples: int = SAMPLES,
    solver: str = "best_linear",
    steps: int = 20,
    guidance_scale: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Draws ``samples`` digits, labels 0..9 in turn, clips them to [-1, 1] and measures them.

    Raises ValueError for a model of other images than 8x8 digits, or a bad argument;
    ImportError when scikit-learn is missing.
    """
    shape = getattr(model.sampling, "shape", None)
    if shape != (1, 8, 8):
        raise ValueError(f"model must draw 8x8 digits, shape (1, 8, 8), got {shape}")
    if samples <= COMPONENTS:
        raise ValueError(f"samples must be more than {COMPONENTS}, got {samples}")
    split = load_split()
    from fastdiff.pipelines import sample_classes

    labels = np.arange(samples) % 10
    drawn = sample_classes(
        model,
        labels.tolist(),
        solver=solver,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        progress=progress,
    )
    return measure(drawn.float().cpu().numpy().clip(-1, 1), labels, split)


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "scikit-learn must be installed for the digits and the classifier: "
            "pip install scikit-learn"
        ) from error
