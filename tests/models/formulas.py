"""Numbers from a formula of a name and an index, the same everywhere, so that none are stored."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn


def numbers(name: str, *shape: int) -> Tensor:
    """Uniform in -1..1, float64: a hash of the element's index and the name, in integers."""
    count = 1
    for size in shape:
        count *= size
    mixed = torch.arange(count, dtype=torch.int64) * 2654435761 + zlib.crc32(name.encode())
    mixed = mixed % 2**32
    for factor in (73244475, 295559667):
        mixed = ((mixed ^ (mixed >> 16)) * factor) % 2**32
    mixed = mixed ^ (mixed >> 16)
    return (mixed.double() / 2**31 - 1).view(shape)


@torch.no_grad()
def fill(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights by name, none of them zero, and of a scale that keeps activations near 1; rounded to
    bfloat16, so that a comparison in any dtype is of the same model. For inference."""
    for name, parameter in model.named_parameters():
        drawn = numbers(name, *parameter.shape)
        if parameter.dim() > 1:
            drawn = drawn * (3 / parameter[0].numel()) ** 0.5
        else:
            drawn = 0.2 * drawn + (name.endswith("weight") and parameter.dim() == 1)
        parameter.copy_(drawn.bfloat16())
    return model.to(dtype).eval().requires_grad_(False)
