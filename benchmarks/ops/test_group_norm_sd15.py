"""group_norm_silu over every GroupNorm + SiLU of Stable Diffusion 1.5's U-Net, as one figure.

The shapes are those of a 512x512 image with classifier-free guidance (batch 2, latent 64x64): each
distinct one counts once, in both memory formats. The geometric mean is over the speed-ups against
the fastest baseline measured.
"""

from __future__ import annotations

from statistics import geometric_mean
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
SECONDS = 0.5  # per shape
QUICK_SECONDS = 0.02


def make(
    channels: int, side: int, memory: torch.memory_format, device: str, dtype: torch.dtype
) -> Call:
    random = torch.Generator().manual_seed(channels * side)
    x = torch.randn(BATCH, channels, side, side, generator=random)
    weight, bias = torch.randn(2, channels, generator=random)
    x = x.to(device, dtype).contiguous(memory_format=memory)
    return Call((x, GROUPS, weight.to(device, dtype), bias.to(device, dtype)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_sd15_unet(
    device: str, quick: bool, pytestconfig: pytest.Config, benchmark: Any, record: Any
) -> None:
    seconds, side = (QUICK_SECONDS, 512) if quick else (SECONDS, None)
    with_compile = pytestconfig.getoption("--with-compile")
    ratios: dict[str, list[float]] = {}

    def one(dtype: torch.dtype, memory: str, channels: int, square: int) -> None:
        call = make(channels, square, FORMATS[memory], device, dtype)
        found = measure(OP, call, seconds, with_compile, side)
        if found is None:
            pytest.skip(f"no implementation of {OP.name} besides the reference runs here")
        facts = found.facts
        ratio = found.columns[facts["auto"]]["times_best_baseline"]
        ratios.setdefault(f"{facts['dtype']} {memory}", []).append(ratio)
        name = f"{OP.name} SD1.5 {channels}x{square}x{square} {memory} {facts['dtype']}"
        row = {"name": name, "op": OP.name, "memory_format": memory, **facts}
        record(device, row, found.timings, found.columns, found.ours)

    def every() -> None:
        for dtype in DTYPES[device == "cuda" :]:  # models run in half precision there
            for memory in FORMATS:
                for channels, square in SHAPES if not quick else SHAPES[-6:]:
                    one(dtype, memory, channels, square)

    benchmark.group = OP.name
    benchmark.pedantic(every, rounds=1, iterations=1)
    means = {name: geometric_mean(values) for name, values in ratios.items()}
    means["all"] = geometric_mean([ratio for values in ratios.values() for ratio in values])
    row = {"name": f"{OP.name} SD1.5 geometric mean", "times_best_baseline": means}
    benchmark.extra_info.update(row)
    record(device, row)
