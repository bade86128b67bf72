"""sum = x + residual; y = act(GroupNorm(sum) * weight + bias), act = SiLU or none, in one pass.

    x, residual, sum, out  [N, C, HW] or, channels last, [N, HW, C]; fp32, fp16 or bf16
    weight, bias           [C]; each may be absent
    mean, rstd             per image and group, over C // groups channels and HW pixels; fp32

The sum is rounded to its dtype before the norm takes it, as PyTorch's two operations do. Bytes: x
and residual read once, sum and out written once; where a group does not fit into registers the
second pass reads the sum once more. Group normalisation: https://arxiv.org/abs/1803.08494.

The kernels, the launch policy and the limits are those of kernels/group_norm_silu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.kernels._group_norm import group_configs, launch, stats_configs
from fastdiff.kernels._group_norm_policy import Launch, select

__all__ = ["Launch", "aot_configs", "launch", "select"]


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every tile `select` can return that is not among group_norm_silu's: the second pass of the
    split way reads the sum as it reads an x."""
    yield from group_configs("residual", ("HAS_WEIGHT", "HAS_BIAS"))
    yield from stats_configs("residual")
