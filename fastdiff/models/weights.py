"""fastdiff's own files: safetensors with the configuration, how to sample, and a checksum.

All three are in the header's metadata, under the key ``fastdiff``. Everything else that
``fastdiff.load`` reads is in ``fastdiff.checkpoints``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.files import Checkpoint
from fastdiff.checkpoints.writing import as_bytes, serialised, write_atomically
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.solvers import NoiseSchedule

DATA = Path(__file__).parent / "data"
EMBEDDED = {"digits": DATA / "digits.safetensors"}
METADATA_KEY = "fastdiff"
STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Sampling:
    """How a model's weights are meant to be sampled; ``fastdiff.sample`` reads the first four.

    schedule: the noise schedule it was trained with, or its name. prediction: what it outputs.
    grid: the time grid to sample on. "leading" by default because it starts below t = T-1, where a
        cosine schedule has alpha = 5e-5 and an eps model's x0 = (x - sigma eps)/alpha explodes.
    shape: (C, H, W) of one image. guidance_scale: a good default for class-conditional pictures.
    value_range: of the training images.
    """

    schedule: str | NoiseSchedule = "cosine"
    prediction: str = "eps"
    grid: str = "leading"
    shape: tuple[int, int, int] = (1, 8, 8)
    num_classes: int = 10
    guidance_scale: float = 1.0
    value_range: tuple[float, float] = (-1.0, 1.0)


def save(
    model: DiT,
    path: str | os.PathLike[str],
    *,
    sampling: Sampling | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes ``model`` as safetensors with its configuration; ``path`` is whole or untouched.

    sampling: default the model's own. dtype: stored precision (default the parameters'); float16
    halves the file of a float32 model.
    Raises TypeError when ``model`` is not a DiT, ValueError for another suffix, a model without
    ``sampling``, or values that overflow ``dtype``; OSError when the folder cannot be written.
    """
    if not isinstance(model, DiT):
        raise TypeError(f"model must be a DiT, got {type(model).__name__}")
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    sampling = model.sampling if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be given for a model without .sampling, got {sampling!r}")
    if dtype is not None and dtype not in STORED.values():
        raise ValueError(f"dtype must be one of {', '.join(STORED)}, got {dtype}")
    tensors = {}
    for key, value in model.state_dict().items():
        stored = value.detach().to("cpu", dtype or value.dtype).contiguous()
        if value.isfinite().all() and not stored.isfinite().all():
            raise ValueError(f"dtype must hold the values of {key}, got {dtype}, which overflows")
        tensors[key] = stored
    about = {"family": "DiT", "config": asdict(model.config), "sampling": asdict(sampling)}
    about["sha256"] = _checksum(tensors, about)
    kinds = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    metadata = {METADATA_KEY: json.dumps(about)}
    write_atomically(target, serialised(kinds, tensors.__getitem__, metadata))


def read_own(checkpoint: Checkpoint) -> tuple[DiTConfig, Sampling]:
    """The configuration and the sampling in a file's metadata; reads no tensor.

    Raises ValueError for what this version does not read.
    """
    try:
        about = json.loads(checkpoint.metadata[METADATA_KEY])
        about.pop("sha256")
        if about["family"] != "DiT":
            raise ValueError(f"family must be 'DiT', got {about['family']!r}")
        config = DiTConfig(**about["config"])
        raw = dict(about["sampling"])
        for key in ("shape", "value_range"):
            raw[key] = tuple(raw[key])
        return config, Sampling(**raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        names = ", ".join(field.name for field in fields(DiTConfig))
        raise ValueError(
            f"{checkpoint.path} must carry a fastdiff configuration this version reads ({names}), "
            f"got {type(error).__name__}: {error}"
        ) from error


def verify(checkpoint: Checkpoint) -> None:
    """ValueError when a file's tensors are not those it was saved with."""
    about = json.loads(checkpoint.metadata[METADATA_KEY])
    expected = about.pop("sha256")
    found = _checksum(checkpoint, about)
    checkpoint.release()
    if found != expected:
        raise ValueError(
            f"{checkpoint.path} must have the checksum it was saved with, got another: the file is "
            "damaged; copy or download it again"
        )


def _checksum(tensors: Mapping[str, Tensor] | Checkpoint, about: Mapping[str, Any]) -> str:
    """SHA-256 of the configuration and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(as_bytes(value))
    return digest.hexdigest()
