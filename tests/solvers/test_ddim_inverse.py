"""DDIM inversion: diffusers' scheduler, and back and forth on the exact model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from mixture import Mixture
from reference import BETAS, STEPS, check, cover, start, widen

import fastdiff
from fastdiff import solvers


@pytest.mark.parametrize(
    ("prediction", "betas", "spacing", "steps", "offset", "to_one"),
    [
        case
        for case in cover(
            24,
            ["epsilon", "v_prediction", "sample"],
            list(BETAS),
            ["leading", "trailing"],
            STEPS,
            [0, 1],
            [True, False],
        )
        if case[0] != "sample" or not case[-1]  # there diffusers divides 0 by 0
    ],
)
def test_ddim_inverse_is_diffusers(prediction, betas, spacing, steps, offset, to_one):
    diffusers = pytest.importorskip("diffusers")
    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler = diffusers.DDIMInverseScheduler(
            beta_schedule=betas,
            prediction_type=prediction,
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=to_one,
            clip_sample=False,
            **BETAS[betas],
        )
        schedule = solvers.from_diffusers(scheduler)
        model = Mixture(schedule, prediction)
        if dtype == torch.float64:
            widen(scheduler)
            first = scheduler.alphas_cumprod[0]
            scheduler.initial_alpha_cumprod = torch.ones_like(first) if to_one else first
        scheduler.set_timesteps(steps)
        x = start(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        references.append(x)
    table = solvers.make_table(
        "ddim_inverse",
        schedule,
        steps,
        grid=spacing,
        prediction=prediction,
        steps_offset=offset,
        set_alpha_to_one=to_one,
    )
    assert list(table.times) == scheduler.timesteps.tolist()
    assert table.init_scale == 1
    check(table, model, *references)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_inverting_and_sampling_returns_the_image_at_first_order(prediction):
    schedule = solvers.ContinuousVP()
    model = Mixture(schedule, prediction)
    image = torch.linspace(-1.2, 1.5, 40, dtype=torch.float64)[None]
    errors = []
    for steps in (100, 200, 400, 800):
        grid = solvers.make_grid(schedule, steps, "lambda", final="sigma_min", mode="exact")
        there = solvers.ddim_inverse(schedule, grid, prediction=prediction, mode="exact")
        back = solvers.ddim(schedule, grid, prediction=prediction, mode="exact")
        assert there.rows[0].level == back.end_level
        assert there.end_level == back.rows[0].level
        noise = fastdiff.sample(model, x=image, solver=there)
        errors.append((fastdiff.sample(model, x=noise, solver=back) - image).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(1, abs=0.15), errors


def test_inversion_gives_the_noise_of_the_ode():
    """For N(0, d^2) the ODE keeps x/sqrt(alpha^2 d^2 + sigma^2), from the clean image on."""
    schedule = solvers.ContinuousVP()
    model = Mixture(schedule, "eps", weights=(1.0,), means=(0.0,), stds=(0.5,))
    image = torch.linspace(-1, 1, 9, dtype=torch.float64)[None]
    errors = []
    for steps in (200, 400, 800):
        grid = solvers.make_grid(schedule, steps, "lambda", mode="exact")
        table = solvers.ddim_inverse(schedule, grid, mode="exact")
        alpha, sigma = table.end_level
        noise = fastdiff.sample(model, x=image, solver=table)
        exact = image / 0.5 * math.hypot(0.5 * alpha, sigma)
        errors.append((noise - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(1, abs=0.15), errors


def test_x0_models_cannot_start_from_the_clean_image():
    with pytest.raises(ValueError, match="set_alpha_to_one"):
        solvers.make_table("ddim_inverse", "linear", 10, prediction="x0")
    table = solvers.make_table(
        "ddim_inverse", "linear", 10, prediction="x0", set_alpha_to_one=False
    )
    assert len(table) == 10
