"""Pictures: from files to tensors and back, a labelled grid, PNGs that say how they were made."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastdiff.checkpoints.writing import write_atomically

MARGIN = 4  # pixels between the cells of a grid and around it
CAPTION = 16  # pixels above each column for its label
SETTINGS_KEY = "fastdiff"  # the PNG text entry with a picture's settings, as JSON


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


def to_pil(samples: Tensor) -> list[Image.Image]:
    """samples [B, C, H, W] around -1..1 as PIL pictures; see :func:`to_uint8`."""
    return [
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        for image in to_uint8(samples)
    ]


def _listed(image: Any) -> list[Image.Image]:
    found = image if isinstance(image, (list, tuple)) else [image]
    if not found or not all(isinstance(one, Image.Image) for one in found):
        kinds = ", ".join(sorted({type(one).__name__ for one in found})) or "nothing"
        raise TypeError(f"image must be a PIL image, a list of them or a tensor, got {kinds}")
    return list(found)


def size_of(image: Any) -> tuple[int, int]:
    """(height, width) of a PIL image, the first of a list, or a tensor [B, C, H, W]."""
    if isinstance(image, Tensor):
        if image.dim() != 4:
            raise ValueError(f"image must have shape [B, C, H, W], got {list(image.shape)}")
        return image.shape[2], image.shape[3]
    return _listed(image)[0].size[::-1]


def to_tensor(image: Any, size: tuple[int, int]) -> Tensor:
    """A picture or a list of them as float32 [B, 3, H, W] in -1..1, resized (Lanczos) to ``size``.

    image: PIL, or a tensor that has this form and size already.
    """
    if isinstance(image, Tensor):
        return _sized("image", image, size, (-1.0, 1.0))
    pixels = [_pixels(one.convert("RGB"), size) for one in _listed(image)]
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous() * 2 - 1


def to_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """A mask as float32 [B, 1, H, W] of 0 and 1 from pictures (white is 1), resized to ``size``.

    A tensor [B, 1, H, W] in 0..1 keeps its fractions.
    """
    if isinstance(mask, Tensor):
        return _sized("mask", mask, size, (0.0, 1.0))
    pixels = [_pixels(one.convert("L"), size) for one in _listed(mask)]
    return (torch.stack(pixels)[:, None] >= 0.5).float()


def _pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)


def _sized(name: str, value: Tensor, size: tuple[int, int], span: tuple[float, float]) -> Tensor:
    channels = 3 if name == "image" else 1
    if value.dim() != 4 or tuple(value.shape[1:]) != (channels, *size):
        raise ValueError(
            f"{name} must have shape [B, {channels}, {size[0]}, {size[1]}], got {list(value.shape)}"
        )
    low, high = (float(bound) for bound in value.aminmax())
    if not (span[0] <= low and high <= span[1]):
        raise ValueError(f"{name} must be in {span[0]:g}..{span[1]:g}, got {low:g}..{high:g}")
    return value.float()


def numbered(path: str | os.PathLike[str], count: int) -> list[Path]:
    """``path`` for one picture; for more, its stem with -000, -001 and so on."""
    one = Path(path)
    if count == 1:
        return [one]
    digits = max(3, len(str(count - 1)))
    return [one.with_name(f"{one.stem}-{i:0{digits}}{one.suffix}") for i in range(count)]


def save_with_settings(
    picture: Image.Image, path: str | os.PathLike[str], settings: Mapping[str, Any]
) -> Path:
    """A PNG that holds its settings; :func:`read_settings` gives them back."""
    target = check_writable(path)
    text = {SETTINGS_KEY: json.dumps(settings, ensure_ascii=True, sort_keys=True)}
    save_png(picture, target, text)
    return target


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a PNG of :func:`save_with_settings`; ValueError where there are none."""
    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get(SETTINGS_KEY)
    try:
        settings = json.loads(text or "")
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"path must be a PNG with fastdiff's settings, got {str(path)!r}")
    return settings
