"""group_norm_silu over every GroupNorm + SiLU of Stable Diffusion 1.5's U-Net, as one figure.

The shapes are those of a 512x512 image with classifier-free guidance (batch 2, latent 64x64): each
distinct one counts once, in both memory formats. The geometric mean is over the speed-ups against
the fastest baseline measured.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from measure import measure

from fastdiff.ops._contract import Call
from fastdiff.ops.group_norm_silu import OP

BATCH, GROUPS = 2, 32
# (channels, side of the square): the residual blocks' two norms and the output's. The wide ones
# are the up blocks', whose input is joined with the down path's.
SHAPES = (
    *((channels, 64) for channels in (320, 640, 960)),
    *((channels, 32) for channels in (320, 640, 960, 1280, 1920)),
    *((channels, 16) for channels in (640, 1280, 1920, 2560)),
    *((channels, 8) for channels in (1280, 2560)),
)
FORMATS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)
SECONDS = 1.0  # per shape
QUICK_SECONDS = 0.05


def make(
    channels: int, side: int, memory: torch.memory_format, device: str, dtype: torch.dtype
) -> Call:
    random = torch.Generator().manual_seed(channels * side)
    x = torch.randn(BATCH, channels, side, side, generator=random)
    weight, bias = torch.randn(2, channels, generator=random)
    x = x.to(device, dtype).contiguous(memory_format=memory)
    return Call((x, GROUPS, weight.to(device, dtype), bias.to(device, dtype)))


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_sd15_unet(
    device: str, quick: bool, pytestconfig: pytest.Config, benchmark: Any, record: Any
) -> None:
    seconds = QUICK_SECONDS if quick else SECONDS
    with_compile = pytestconfig.getoption("--with-compile")
    ratios: dict[str, list[float]] = {}

    def one(dtype: torch.dtype, memory: str, channels: int, side: int) -> None:
        call = make(channels, side, FORMATS[memory], device, dtype)
        found = measure(OP, call, seconds, with_compile)
        if found is None:
            pytest.skip(f"no implementation of {OP.name} besides the reference runs here")
        ratio = next(  # of the implementation that impl="auto" takes
            variant["times_best_baseline"]
            for variant in found["variants"].values()
            if "times_best_baseline" in variant
        )
        ratios.setdefault(f"{found['dtype']} {memory}", []).append(ratio)
        record(
            device,
            {
                "name": f"{OP.name} SD1.5 {channels}x{side}x{side} {memory} {found['dtype']}",
                "op": OP.name,
                "memory_format": memory,
                **found,
            },
        )

    def every() -> None:
        for dtype in DTYPES:
            for memory in FORMATS:
                for channels, side in SHAPES:
                    one(dtype, memory, channels, side)

    benchmark.group = OP.name
    benchmark.pedantic(every, rounds=1, iterations=1)
    means = {name: geometric_mean(values) for name, values in ratios.items()}
    means["all"] = geometric_mean([ratio for values in ratios.values() for ratio in values])
    row = {"name": f"{OP.name} SD1.5 geometric mean", "times_best_baseline": means}
    benchmark.extra_info.update(row)
    record(device, row)
