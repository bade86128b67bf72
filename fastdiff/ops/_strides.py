"""How a tensor [..., C] lies in memory, for kernels that take rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdiff.environment import interpreting


class Rows(NamedTuple):
    """A tensor [..., C] as [outer, inner, C]; strides in elements, the last one is 1."""

    outer: int
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(x: torch.Tensor) -> Rows | None:
    """x as rows, or None: its last dimension is strided, or the others need three strides.

    A slice of a fused projection and the tokens of one part of a joint sequence are such rows.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    merged: list[tuple[int, int]] = []  # (size, stride), the fastest first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (inner, inner_stride), (outer, outer_stride) = [*merged, (1, 0), (1, 0)][:2]
    return Rows(outer, inner, outer_stride, inner_stride)


def why_not_triton(x: torch.Tensor, least: int = 80) -> str:
    """Why Triton cannot launch on x's device, or "". least: the oldest architecture, as sm_XY."""
    if x.device.type != "cuda" and not interpreting():
        return f"it computes on CUDA devices, x is on {x.device}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        if 10 * major + minor < least:
            return f"it needs sm_{least} or newer, {x.device} is sm_{major}{minor}"
    return ""
