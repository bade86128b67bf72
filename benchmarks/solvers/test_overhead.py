"""What a step costs outside the model: fastdiff's loop beside diffusers' ``scheduler.step``.

A 1x4x64x64 float32 latent on the CPU, one thread, a model that returns a constant tensor, 100
steps, runs of both in turns. fastdiff's time is that of a whole ``fastdiff.sample`` call (checks
and set-up included) divided by its steps, diffusers' that of its ``step`` calls alone. The gate
before any timing: both end in the same latent after 20 steps of a model that is not constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timing import interleaved

import fastdiff
from fastdiff.solvers import from_diffusers

STEPS = 100
GATE_STEPS = 20
SHAPE = (1, 4, 64, 64)
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# solver, its options, diffusers' class and configuration, the least ratio asked for.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], float]] = {
    "dpmpp_2m": ({}, "DPMSolverMultistepScheduler", {}, 15.0),
    "ddim": ({}, "DDIMScheduler", {"clip_sample": False}, 3.0),
    "ddpm": ({}, "DDPMScheduler", {"clip_sample": False}, 1.0),  # torch.randn is most of it
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_overhead_per_step(
    name: str, benchmark: Any, record: Callable[[str, dict[str, Any]], None], quick: bool
) -> None:
    diffusers = pytest.importorskip("diffusers")
    options, class_name, config, bar = CASES[name]
    scheduler = getattr(diffusers, class_name)(**STABLE_DIFFUSION, **config)
    schedule = from_diffusers(scheduler)
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    constant = torch.randn(SHAPE)

    def ours(model: Callable[..., torch.Tensor], steps: int) -> torch.Tensor:
        return fastdiff.sample(
            model,
            x=x,
            solver=name,
            steps=steps,
            schedule=schedule,
            generator=torch.Generator().manual_seed(1),
            **options,
        )

    def theirs(model: Callable[..., torch.Tensor]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        extra = {} if name == "dpmpp_2m" else {"generator": generator}
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t), t, state, **extra).prev_sample
        return state

    def curved(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """eps of data that is nearly N(0, 1): latents stay of unit size."""
        sigma = (1 - scheduler.alphas_cumprod[t.reshape(-1)[0]]).sqrt()
        return sigma * (0.9 * state + 0.1 * state.sin())

    scheduler.set_timesteps(GATE_STEPS)
    torch.testing.assert_close(ours(curved, GATE_STEPS), theirs(curved), rtol=0, atol=1e-5)
    scheduler.set_timesteps(STEPS)

    def run_theirs() -> None:
        # set_timesteps resets the step index; the first step of a run finds it again.
        scheduler._step_index = None
        if hasattr(scheduler, "model_outputs"):
            scheduler.model_outputs = [None] * scheduler.config.solver_order
            scheduler.lower_order_nums = 0
        theirs(lambda _x, _t: constant)

    def run_ours() -> None:
        ours(lambda _x, _t: constant, STEPS)

    run_theirs()
    timings = interleaved(
        {"fastdiff": run_ours, "diffusers": run_theirs},
        torch.device("cpu"),
        budget=0.5 if quick else 5.0,
    )
    us = {key: timing.median / STEPS * 1e6 for key, timing in timings.items()}
    ratio = us["diffusers"] / us["fastdiff"]
    benchmark.extra_info.update(us_per_step=us, ratio=ratio, bar=bar)
    benchmark.pedantic(run_ours, rounds=3 if quick else 20)
    record(
        "cpu",
        {
            "name": f"{name} step, 1x4x64x64 float32, one thread",
            "peer": f"diffusers {class_name} {diffusers.__version__}",
            "us_per_step": us,
            "ratio": ratio,
            "bar": bar,
        },
    )
    print(f"\n{name}: fastdiff {us['fastdiff']:.1f} us, diffusers {us['diffusers']:.1f} us a step")
    assert ratio >= bar
