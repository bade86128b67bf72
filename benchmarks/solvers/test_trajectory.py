"""What a step costs around the model's own kernels: a replayed trajectory beside the other loops.

A model so small that launches are all it takes, 2x4x16x16 float32 with guidance, 50 steps, whole
``fastdiff.sample`` calls divided by the steps, on a CUDA device: the run as replays of one recorded
step ("graph"), the C++ loop with a CUDA graph of the model alone ("cpp"), and the C++ loop with the
model as it is ("eager"). The gate before any timing: all three give the same samples. What the host
takes to launch the replays is noted, too: by the extension's loop where it can, else by PyTorch's.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import interleaved
from torch import Tensor, nn

import fastdiff
from fastdiff import compiler
from fastdiff.testing import psnr

STEPS = 50
SHAPE = (2, 4, 16, 16)


class Small(nn.Module):
    """Two convolutions with the time and a label as a scale between them."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.label = nn.Linear(1, 32), nn.Linear(6, 32)
        self.first, self.last = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        scale = self.time(t.to(x.dtype)[:, None] / 1000) + self.label(y)
        return self.last(nn.functional.silu(self.first(x)) * scale[:, :, None, None])


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral"])
@torch.no_grad()
def test_overhead_of_a_trajectory(
    solver: str, benchmark: Any, record: Callable[..., None], quick: bool
) -> None:
    torch.manual_seed(0)
    eager = Small().cuda().eval()
    model = compiler.compile(copy.deepcopy(eager))
    y = torch.randn(2, 6, device="cuda")

    def run(which: nn.Module, engine: str) -> Tensor:
        return fastdiff.sample(
            which,
            SHAPE,
            solver=solver,
            steps=STEPS,
            schedule="scaled_linear",
            seed=0,
            cond={"y": y},
            uncond={"y": torch.zeros_like(y)},
            guidance_scale=3.0,
            engine=engine,
        )

    variants: dict[str, Callable[[], Any]] = {
        "graph": lambda: run(model, "graph"),
        "cpp": lambda: run(model, "cpp"),
        "eager": lambda: run(eager, "cpp"),
    }
    right = variants["eager"]()
    for name in ("graph", "graph", "cpp", "cpp"):
        assert psnr(variants[name](), right) >= 80

    compiled: Any = model._compiled_call_impl
    (trajectory,) = compiled.trajectories.values()
    table = trajectory.loaded
    launches = []
    for _ in range(20):
        torch.cuda.synchronize()
        trajectory.rewind()
        started = time.perf_counter()
        trajectory.launch(table)
        launches.append(time.perf_counter() - started)

    timings = interleaved(variants, torch.device("cuda"), budget=0.5 if quick else 5.0)
    us = {name: timing.median / STEPS * 1e6 for name, timing in timings.items()}
    benchmark.extra_info.update(us_per_step=us)
    benchmark.pedantic(variants["graph"], rounds=3 if quick else 20)
    row = {
        "name": f"{solver} trajectory, 2x4x16x16 float32, guided, {STEPS} steps",
        "peer": "the C++ loop with a CUDA graph of the model",
        "host_us_per_launch": statistics.median(launches) / STEPS * 1e6,
        "launched_by_cpp": trajectory.native,
        "ratio": us["cpp"] / us["graph"],
    }
    record("cuda", row, timings, ours=("graph", "cpp"), per=STEPS)
    print(f"\n{solver}: " + ", ".join(f"{key} {value:.1f} us" for key, value in us.items()))
