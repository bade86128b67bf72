"""Recipes read from scheduler_config.json against the scheduler classes they stand for."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.pipelines.recipes import Recipe, from_scheduler
from fastdiff.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# ruff: noqa: E501
# The scheduler_config.json of public models (entries that matter), and one of every class.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    "sd15 ddim": ("DDIMScheduler", {**SD, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    "sd21": ("DDIMScheduler", {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"}),
    "sdxl": ("EulerDiscreteScheduler", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    "turbo": ("EulerAncestralDiscreteScheduler", {**SD, "timestep_spacing": "trailing"}),
    "playground": ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True}),
    "dpm sde 3": ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3, "final_sigmas_type": "zero", "euler_at_final": True}),
    "exponential": ("EulerDiscreteScheduler", {**SD, "use_exponential_sigmas": True}),
    "single": ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {**SD, "solver_order": 3, "timestep_spacing": "trailing"}),
    "deis": ("DEISMultistepScheduler", {**SD, "solver_order": 3}),
    "heun": ("HeunDiscreteScheduler", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", SD),
    "lcm": ("LCMScheduler", SD),
    "ddpm": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"}),
    "dit": ("DDIMScheduler", {"clip_sample": False, "beta_schedule": "linear"}),
    "zero snr": ("DDIMScheduler", {**SD, "clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    "sd3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}  # fmt: skip


def model(x: Tensor, t: Tensor) -> Tensor:
    """Some function of both arguments, the same in any batch."""
    return torch.tanh(x * 0.7 + torch.as_tensor(t).to(x).reshape(-1, 1, 1, 1) / 2000)


def theirs(scheduler: Any, steps: int, x: Tensor, generator: torch.Generator) -> Tensor:
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    takes = "generator" in scheduler.step.__code__.co_varnames
    more = {"generator": generator} if takes else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, t), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_is_its_scheduler(name: str) -> None:
    kind, config = CONFIGS[name]
    scheduler = getattr(diffusers, kind)(**config)
    written = json.loads(scheduler.to_json_string())
    recipe = from_scheduler(written)
    steps = 4 if name == "lcm" else 10
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = theirs(scheduler, steps, start, torch.Generator().manual_seed(1))
    table = recipe.table(steps)
    result = sample(
        model,
        x=start * table.init_scale,
        solver=table,
        hooks=recipe.hooks,
        generator=torch.Generator().manual_seed(1),
    )
    scale = float(expected.abs().max())
    torch.testing.assert_close(result / scale, expected / scale, rtol=0, atol=2e-5)
    # The short form of the file, without the entries at their defaults.
    short = from_scheduler({"_class_name": kind, **config}).table(steps)
    assert [row.time for row in short.rows] == [row.time for row in table.rows]


def test_flux_shifts_by_the_tokens_of_the_picture() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    written = json.loads(scheduler.to_json_string())
    recipe = from_scheduler(written)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    recipe = Recipe(recipe.schedule, "flow", "euler", warp="flux", dynamic=recipe.dynamic)
    for tokens in (256, 1024, 4096):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10), mu=calculate_shift(tokens))
        times = recipe.table(10, tokens=tokens).times
        np.testing.assert_allclose(times, scheduler.timesteps.numpy(), rtol=1e-6)


def test_another_solver_on_the_same_schedule() -> None:
    recipe = from_scheduler({"_class_name": "PNDMScheduler", **SD, "skip_prk_steps": True})
    table = recipe.table(8, solver="dpmpp_2m", grid="karras")
    assert table.name == "dpmpp_2m"
    assert len(table) == 8
    assert recipe.table(10, strength=0.5).rows[0].time < recipe.table(10).rows[0].time


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "VQDiffusionScheduler"}, "_class_name must be one of"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps must be true"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "odd"}, "beta_schedule must be"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "odd"}, "prediction_type must be"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, "solver_order"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert"),
    ],
)
def test_what_no_table_stands_for_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_scheduler(config)
