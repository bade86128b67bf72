"""From samples to a PNG: bytes, a labelled grid, metadata, a file that is whole or absent."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastdiff.checkpoints.writing import write_atomically

MARGIN = 4  # pixels between the cells of a grid and around it
CAPTION = 16  # pixels above each column for its label


def to_uint8(samples: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> np.ndarray:
    """samples [B, C, H, W], C = 1 or 3, values in value_range -> uint8 [B, H, W, C].

    Values outside the range are clipped, then rounded to the nearest of 256 levels.
    Raises ValueError for another shape, an empty range, or NaN or infinite values: a picture of
    those would hide a fault.
    """
    if samples.dim() != 4 or samples.shape[1] not in (1, 3):
        raise ValueError(
            f"samples must have shape (batch, 1 or 3, height, width), got {tuple(samples.shape)}"
        )
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")
    values = samples.detach().to("cpu", torch.float64)
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"samples must be finite, got {bad} values that are not")
    scaled = ((values - low) / (high - low)).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def labelled_grid(
    images: np.ndarray, columns: int, labels: Sequence[str] = (), *, scale: int = 1
) -> Image.Image:
    """One picture of many: images uint8 [B, H, W, 1 or 3], row by row, ``columns`` to a row.

    labels: the caption of each column, or none. scale: each pixel becomes scale x scale, without
    smoothing. Raises ValueError for a bad argument.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images must be uint8 (batch, height, width, 1 or 3), got {images.dtype} "
            f"{images.shape}"
        )
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if labels and len(labels) != columns:
        raise ValueError(f"labels must be one per column ({columns}), got {len(labels)}")
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    across, down = width * scale + MARGIN, height * scale + MARGIN
    top = MARGIN + (CAPTION if labels else 0)
    size = (MARGIN + columns * across, top + rows * down)
    picture = Image.new("L" if channels == 1 else "RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    for column, label in enumerate(labels):
        centre = (MARGIN + column * across + width * scale / 2, MARGIN + CAPTION / 2)
        draw.text(centre, label, fill="black", font=font, anchor="mm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        cell = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        cell = cell.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        picture.paste(cell, (MARGIN + column * across, top + row * down))
    return picture


def save_png(
    picture: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, object] | None = None
) -> None:
    """Writes ``picture`` with ``metadata`` as PNG text entries; the file is whole or untouched.

    Raises OSError when the file cannot be written.
    """
    text = PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, str(value))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=text)
    write_atomically(Path(path), buffer.getvalue())


def check_writable(path: str | os.PathLike[str], suffix: str = ".png") -> Path:
    """``path`` as a Path when a file can be written there; asked before the work, not after it.

    Raises ValueError for another suffix, a folder, a missing folder or one that is not writable.
    """
    target = Path(path)
    if target.suffix.lower() != suffix:
        raise ValueError(f"path must end in {suffix}, got {str(path)!r}")
    if target.is_dir():
        raise ValueError(f"path must be a file, got the folder {str(path)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"path must be in a folder that exists, got {str(path)!r}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(f"path must be in a writable folder, got {str(path)!r}")
    return target
