"""Golden outputs: weights from a formula, so that a file holds results alone.

``tests/models/data/edm_outputs.json`` was made once by running the networks of NVlabs/edm,
NVlabs/edm2 and the denoiser of openai/consistency_models (whose code is not ours to keep) on the
weights and inputs of this file: "oracle" in float64 (their source with float32 read as float64),
"float32" as it is, and "bfloat16" with their half-precision branch taken, in bfloat16 on the CPU
(float32 weights cast at their use, a float32 result). Every value here is exact in bfloat16, so
the oracle is that of all three. ``edm_keys.json`` lists the names and shapes of their
``state_dict()`` for the public configurations; modules with the same tensors share one list.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
COMPUTED = ("resample_filter", "u")


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in -1..1 that depend on the name and the index alone, float64."""
    k = torch.arange(math.prod(shape), dtype=torch.int64) + zlib.crc32(name.encode())
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        k = ((k ^ (k >> shift)) * factor) & 0xFFFFFFFF
    return (((k ^ (k >> 15)) >> 16).double() / 32767.5 - 1).reshape(shape)


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight, of a size that keeps every branch of a network in sight; float64."""
    u = uniform(name, shape)
    if name.endswith(("freqs", "phases")):
        u = 3 * u
    elif "gain" in name or ("norm" in name and name.endswith("weight")):
        u = 1 + 0.4 * u
    elif len(shape) < 2:
        u = 0.3 * u
    else:
        u = u * math.sqrt(3 / math.prod(shape[1:]))
    return u.bfloat16().double()


def fill(module: torch.nn.Module) -> None:
    """Gives every parameter and buffer its value, but the buffers that are computed."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not name.endswith(COMPUTED):
                tensor.copy_(value(name, tuple(tensor.shape)))


def inputs(channels: int, size: int) -> tuple[Tensor, Tensor]:
    """x [2, C, S, S] and sigma [2], float64."""
    x = 2 * uniform("x", (2, channels, size, size))
    return x.bfloat16().double(), torch.tensor([0.40625, 3.0], dtype=torch.float64)


def encode(tensor: Tensor) -> str:
    """The bytes of a tensor, compressed, as text."""
    return base64.b64encode(zlib.compress(tensor.contiguous().numpy().tobytes(), 9)).decode()


def decode(text: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The tensor of :func:`encode`."""
    kind = {torch.float32: "<f4", torch.float64: "<f8"}[dtype]
    values = np.frombuffer(zlib.decompress(base64.b64decode(text)), kind)
    return torch.from_numpy(values.copy()).reshape(shape)


def read(name: str) -> Any:
    """A file of ``data``."""
    return json.loads((DATA / name).read_text())
