"""Tables against diffusers' schedulers: same model, same start, same noise (`reference.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mixture import Mixture
from reference import (
    BETAS,
    PREDICTIONS,
    SPACINGS,
    STEPS,
    check,
    cover,
    reference,
    seeded,
    start,
    widen,
)

from fastdiff import solvers

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")


def _stochastic(kind: str, steps: int, config: dict[str, Any], options: dict, call: dict) -> None:
    """DDIM and DDPM, whose schedulers can be widened to float64."""
    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler = getattr(diffusers, kind)(clip_sample=False, **config)
        schedule = solvers.from_diffusers(scheduler)
        model = Mixture(schedule, config["prediction_type"])
        if dtype == torch.float64:
            widen(scheduler)
        scheduler.set_timesteps(steps)
        references.append(reference(scheduler, model, start(dtype), **call, **seeded(5)))
    table = solvers.make_table(
        kind[:4].lower(),
        schedule,
        steps,
        grid=config["timestep_spacing"],
        prediction=config["prediction_type"],
        steps_offset=config["steps_offset"],
        **options,
    )
    assert list(table.times) == scheduler.timesteps.tolist()
    from_differences = kind == "DDPMScheduler" or call["eta"] == 1
    cosine = config["beta_schedule"] == "squaredcos_cap_v2"
    slack = 2.0**-12 if from_differences and cosine else 1e-5
    check(table, model, *references, noise=5, slack=slack)


@pytest.mark.parametrize(
    ("prediction", "betas", "spacing", "steps", "eta", "offset", "to_one"),
    cover(40, PREDICTIONS, list(BETAS), SPACINGS, STEPS, [0.0, 0.5, 1.0], [0, 1], [True, False]),
)
def test_ddim(prediction, betas, spacing, steps, eta, offset, to_one):
    config = {
        "prediction_type": prediction,
        "beta_schedule": betas,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": to_one,
        **BETAS[betas],
    }
    options = {"eta": eta, "set_alpha_to_one": to_one}
    _stochastic("DDIMScheduler", steps, config, options, {"eta": eta})


@pytest.mark.parametrize(
    ("prediction", "betas", "spacing", "steps", "variance", "offset"),
    cover(
        30,
        PREDICTIONS,
        list(BETAS),
        SPACINGS,
        STEPS,
        ["fixed_small", "fixed_small_log", "fixed_large"],
        [0, 1],
    ),
)
def test_ddpm(prediction, betas, spacing, steps, variance, offset):
    config = {
        "prediction_type": prediction,
        "beta_schedule": betas,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "variance_type": variance,
        **BETAS[betas],
    }
    _stochastic("DDPMScheduler", steps, config, {"variance_type": variance}, {})


@pytest.mark.parametrize("betas", list(BETAS))
def test_named_schedules_are_diffusers_up_to_its_float32_rounding(betas):
    scheduler = diffusers.DDIMScheduler(beta_schedule=betas, **BETAS[betas])
    theirs = solvers.from_diffusers(scheduler).alphas_cumprod
    ours = solvers.get_schedule(betas).alphas_cumprod
    # A product of 1000 float32 numbers; 1 - 0.999, the last of the cosine betas, is off by 1.3e-5.
    np.testing.assert_allclose(theirs, ours, rtol=5e-5)
