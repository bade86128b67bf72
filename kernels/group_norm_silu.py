"""y = act((GroupNorm(x + add) * weight + bias) * (1 + scale) + shift), act = SiLU or none.

    x, out       [N, C, HW] or, channels last, [N, HW, C]; fp32, fp16 or bf16
    skip         like x with channels of its own: the norm is of cat([x, skip], 1), which is not
                 made; C counts the channels of both, groups may have some of either
    weight, bias [C]; add, scale, shift [N, C] with any batch stride; each may be absent
    mean, rstd   per image and group, over C // groups channels and HW pixels; fp32

Group normalisation: Wu and He, 2018, https://arxiv.org/abs/1803.08494.

Two ways, chosen by `select` (kernels/_group_norm_policy.py):
- "group" (_group_norm_whole.py): a program holds a whole group in registers. x is read once, out
  written once.
- "split" (_group_norm_first.py, _group_norm_last.py): statistics per channel and run of pixels
  (mean and sum of squared distances from it), combined by Chan's rule, then a second pass over x.
  `add` only moves a channel's mean, so the statistics do not read it. The second pass goes through
  x backwards: it starts with what the first has just left in L2. What L2 does not hold is read
  twice from memory.

Limits: channels, an image's pixels, and the rows N * C below 2^31.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.kernels._group_norm import (
    apply_configs,
    group_configs,
    launch,
    stats_configs,
)
from fastdiff.kernels._group_norm_policy import (
    FLAGS,
    MAX_BLOCK_HW,
    MIN_BLOCK_HW,
    TARGET_PROGRAMS,
    Launch,
    select,
)

__all__ = [
    "MAX_BLOCK_HW",
    "MIN_BLOCK_HW",
    "TARGET_PROGRAMS",
    "Launch",
    "aot_configs",
    "launch",
    "select",
]


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every tile `select` can return, in the terms of fastdiff.ops.AotConfig, with every optional
    argument present (what needs most registers)."""
    yield from group_configs("", FLAGS)
    yield from group_configs("skip", FLAGS)
    yield from stats_configs("")
    yield from apply_configs()
