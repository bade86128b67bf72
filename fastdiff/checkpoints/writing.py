"""Writing safetensors: one tensor at a time, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints.header import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes beside ``path`` and renames: a reader, or a crash, never sees half a file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in (content,) if isinstance(content, bytes) else content:
                file.write(part)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only the owner reads
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def as_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes, without a copy where it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def serialised(
    about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Iterable[bytes | memoryview]:
    """The bytes of a safetensors file, in pieces: the header, then tensor after tensor.

    about: name -> dtype and shape; ``tensor(name)`` is asked for each in turn, the widest dtypes
    first, so that every tensor begins where its numbers are aligned.
    """
    names = sorted(about, key=lambda name: (-about[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in names:
        dtype, shape = about[name]
        end = place + torch.Size(shape).numel() * dtype.itemsize
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        header[name] = entry
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        value = tensor(name)
        if (value.dtype, tuple(value.shape)) != about[name]:
            raise ValueError(f"{name} must be {about[name]}, got {value.dtype} {value.shape}")
        yield as_bytes(value)
