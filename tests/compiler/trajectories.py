"""What the tests of recorded trajectories share: a tiny denoiser, solvers and how runs are made."""

from __future__ import annotations

import math
from typing import Any

import torch
from recorders import Again
from torch import Tensor, nn

import fastdiff
from fastdiff import compiler
from fastdiff.solvers import SolverTable


class Tiny(nn.Module):
    """A denoiser with each of the five programs: the condition alone, the time, both, the sample.

    fixed: the batch is written into its code, as into that of models that reshape by it.
    """

    def __init__(self, fixed: int = 0) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32))
        self.label = nn.Linear(6, 32)
        self.both = nn.Linear(32, 16)
        self.text = nn.Linear(6, 8)
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.fixed = fixed
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(1000.0) * torch.arange(4, device=x.device) / 4)
        angles = t.float()[:, None] * frequencies
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        if self.fixed:
            embedded = embedded + torch.arange(self.fixed, device=x.device)[:, None] / 100
        scale, shift = self.both(embedded + self.label(y)).chunk(2, 1)
        hidden = self.first(x) + self.text(y)[:, :, None, None]
        hidden = hidden * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return self.last(torch.nn.functional.silu(hidden)) + x * 0.5


def tiny(seed: int = 0, **options: Any) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(**options).eval()


def labels(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(100 + seed))


SHAPE = (2, 4, 8, 8)
SOLVERS = ["dpmpp_2m", "unipc", "euler_ancestral", "ddim", "euler", "ddpm", "lcm", "heun", "pndm"]


def draw(model: Any, y: int = 0, scale: float = 3.0, **options: Any) -> Tensor:
    options = {"solver": "dpmpp_2m", "steps": 6, "seed": 3, **options}
    if not isinstance(options["solver"], SolverTable):
        options["schedule"] = "scaled_linear"
    if "generator" in options:
        del options["seed"]
    condition = {"y": labels(y)}
    uncond = {"y": torch.zeros(2, 6)}
    return fastdiff.sample(
        model, SHAPE, cond=condition, uncond=uncond, guidance_scale=scale, **options
    )


def prepared(recorder: Again, model: nn.Module | None = None, **options: Any) -> Any:
    model = compiler.compile(tiny() if model is None else model, **options)
    model._compiled_call_impl.pool.recorder = recorder
    return model


def graphs(model: Any) -> dict[str, Any]:
    every = [g.cuda_graphs.items() for g in compiler.report(model).graphs]
    return {f"{i} {n}": facts for i, graph in enumerate(every) for n, facts in graph}


def recordings(model: Any) -> int:
    return sum(f["recordings"] for name, f in graphs(model).items() if "trajectory" in name)
