"""What a step costs outside the model: fastdiff's loop beside diffusers' ``scheduler.step``.

A 1x4x64x64 float32 latent on the CPU, one thread, a model that returns a constant tensor, 100
steps, runs of all in turns. fastdiff's time is that of a whole ``fastdiff.sample`` call (checks and
set-up included) divided by its evaluations; diffusers' and the adapter's (the same class of
fastdiff.integrations.diffusers) that of their ``step`` calls alone, without scaling the model's
input. The gate before any timing: all end in the same latent after 20 steps of a model that is not
constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timing import interleaved

import fastdiff
from fastdiff.solvers import Flow, from_diffusers

STEPS = 100
GATE_STEPS = 20
SHAPE = (1, 4, 64, 64)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# solver: diffusers' class and configuration, the least ratio asked for.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", SD, 15.0),
    "unipc": ("UniPCMultistepScheduler", SD, 15.0),
    "deis": ("DEISMultistepScheduler", SD, 15.0),
    "lms": ("LMSDiscreteScheduler", SD, 15.0),
    "ddim": ("DDIMScheduler", {**SD, "clip_sample": False}, 3.0),
    "euler": ("EulerDiscreteScheduler", SD, 3.0),
    "heun": ("HeunDiscreteScheduler", SD, 3.0),
    # Three is the goal, and runs give 2.8 to 3.1: diffusers' step is one addition and one product,
    # and reading and writing the tensors is most of ours.
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 2.5),
    # torch.randn is most of it
    "ddpm": ("DDPMScheduler", {**SD, "clip_sample": False}, 1.0),
}


def set_timesteps(scheduler: Any, steps: int, flow: bool) -> None:
    if flow:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)


def start_again(scheduler: Any) -> None:
    """What set_timesteps resets; the first step of a run finds its index again."""
    scheduler._step_index = None
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs = [None] * scheduler.config.solver_order
        scheduler.lower_order_nums = 0
    if hasattr(scheduler, "derivatives"):
        scheduler.derivatives = []


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_overhead_per_step(
    name: str, benchmark: Any, record: Callable[..., None], quick: bool
) -> None:
    diffusers = pytest.importorskip("diffusers")
    from fastdiff.integrations import diffusers as adapters

    class_name, config, bar = CASES[name]
    flow = name == "flow euler"
    scheduler = getattr(diffusers, class_name)(**config)
    adapter = getattr(adapters, class_name)(**config)
    facts: dict[str, Any] = {
        "solver": "euler" if flow else name,
        "schedule": Flow(shift=3.0) if flow else from_diffusers(scheduler),
        "prediction": "flow" if flow else "eps",
    }
    torch.manual_seed(0)
    z, constant = torch.randn(2, *SHAPE)

    def ours(model: Callable[..., torch.Tensor], steps: int, x: torch.Tensor) -> torch.Tensor:
        return fastdiff.sample(
            model, x=x, steps=steps, generator=torch.Generator().manual_seed(1), **facts
        )

    def theirs(which: Any, model: Callable[..., torch.Tensor], scaled: bool) -> torch.Tensor:
        extra = {"generator": torch.Generator().manual_seed(1)} if name == "ddpm" else {}
        state = z * float(getattr(which, "init_noise_sigma", 1.0))
        for t in which.timesteps:
            seen = which.scale_model_input(state, t) if scaled else state
            state = which.step(model(seen, t), t, state, return_dict=False, **extra)[0]
        return state

    def curved(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.9 * state) * (0.5 + t.reshape(-1)[0] / 2000)

    def start(steps: int) -> torch.Tensor:
        return z * fastdiff.solvers.make_table(steps=steps, **facts).init_scale

    scaled = hasattr(scheduler, "scale_model_input")
    expected = None
    for which in (scheduler, adapter):
        set_timesteps(which, GATE_STEPS, flow)
        result = theirs(which, curved, scaled)
        expected = result if expected is None else expected
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        set_timesteps(which, STEPS, flow)
    result = ours(curved, GATE_STEPS, start(GATE_STEPS))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)

    def run(which: Any) -> Callable[[], None]:
        def go() -> None:
            start_again(which)
            theirs(which, lambda _x, _t: constant, False)

        return go

    x = start(STEPS)
    variants = {
        "fastdiff": lambda: ours(lambda _x, _t: constant, STEPS, x),
        "adapter": run(adapter),
        "diffusers": run(scheduler),
    }
    timings = interleaved(variants, torch.device("cpu"), budget=0.5 if quick else 5.0)
    evaluations = len(scheduler.timesteps)
    us = {key: timing.median / evaluations * 1e6 for key, timing in timings.items()}
    ratio = us["diffusers"] / us["fastdiff"]
    benchmark.extra_info.update(us_per_step=us, ratio=ratio, bar=bar)
    benchmark.pedantic(variants["fastdiff"], rounds=3 if quick else 20)
    row = {
        "name": f"{name} step, 1x4x64x64 float32, one thread",
        "peer": f"diffusers {class_name} {diffusers.__version__}",
        "ratio": ratio,
        "ratio_adapter": us["diffusers"] / us["adapter"],
        "bar": bar,
    }
    record("cpu", row, timings, ours=("fastdiff", "adapter"), per=evaluations)
    print(f"\n{name}: " + ", ".join(f"{key} {value:.1f} us" for key, value in us.items()))
    assert ratio >= bar
