"""Samplers whose steps are not linear, run by fastdiff.sample: learned variances and Langevin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import solvers
from fastdiff._ext import ext
from fastdiff.sampling.rules import langevin, learned_range

SHAPE = (3, 2, 4, 4)
ENGINES = ["reference", *(["cpp"] if ext() is not None else [])]


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def mean(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1) / 2000)


def learned(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """Twice the channels: the noise, and where its variance lies in its range."""
    shift = 0.0 if y is None else 0.3 * y.reshape(-1, 1, 1, 1)
    return torch.cat([mean(x, t) + shift, torch.sin(3 * x + shift)], dim=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [4, 25])
def test_learned_range_is_diffusers(steps, engine):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(steps)
    x, generator = start(), torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        x = scheduler.step(learned(x, t), t, x, generator=generator).prev_sample
    result = fastdiff.sample(
        learned,
        x=start(),
        solver="ddpm",
        variance_type="learned_range",
        steps=steps,
        schedule=solvers.from_diffusers(scheduler),
        generator=torch.Generator().manual_seed(5),
        engine=engine,
    )
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-4)


def test_learned_range_under_guidance_takes_the_conditional_variance():
    cond, uncond = {"y": torch.ones(1)}, {"y": torch.zeros(1)}

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with_y, without = learned(x, t, torch.ones(1)), learned(x, t, torch.zeros(1))
        out = without[:, :2] + 3.0 * (with_y[:, :2] - without[:, :2])
        return torch.cat([out, with_y[:, 2:]], dim=1)

    common: dict[str, Any] = {
        "x": start(),
        "solver": "ddpm",
        "variance_type": "learned_range",
        "steps": 6,
        "schedule": "linear",
        "seed": 4,
    }
    expected = fastdiff.sample(guided, **common)
    batched = fastdiff.sample(learned, cond=cond, uncond=uncond, guidance_scale=3.0, **common)
    torch.testing.assert_close(batched, expected, rtol=1e-5, atol=1e-5)


def test_learned_range_needs_twice_the_channels():
    with pytest.raises(ValueError, match="twice the channels"):
        fastdiff.sample(
            mean, x=start(), solver="ddpm", variance_type="learned_range", schedule="linear"
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_predictor_corrector_is_diffusers_ve(engine):
    """Its loop: the corrector's steps, then the predictor's; the last mean is the result."""
    diffusers = pytest.importorskip("diffusers")
    steps, low, high = 30, 0.01, 50.0
    scheduler = diffusers.ScoreSdeVeScheduler(
        num_train_timesteps=steps, snr=0.15, sigma_min=low, sigma_max=high
    )
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1).to(x.dtype)
        return -(x - 0.3 * torch.tanh(x / (1 + s))) / (s * s + 0.2)

    x, generator = start() * high, torch.Generator().manual_seed(5)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].expand(3)
        x = scheduler.step_correct(score(x, sigma), x, generator=generator).prev_sample
        output = scheduler.step_pred(score(x, sigma), t, x, generator=generator)
        x = output.prev_sample
    result = fastdiff.sample(
        score,
        x=start() * high,
        solver="pc",
        schedule=solvers.ve(low, high),
        steps=steps,
        prediction="score",
        predictor="reverse_diffusion",
        snr=0.15,
        generator=torch.Generator().manual_seed(5),
        engine=engine,
    )
    # diffusers' sigmas are float32 powers; its times truncate to the same entries.
    torch.testing.assert_close(result, output.prev_sample_mean, rtol=2e-3, atol=2e-3)


def test_langevin_steps_do_not_depend_on_the_scores_scale():
    g, z = start(), start().flip(0)
    once, noise = langevin(g, z)
    size = z.flatten(1).norm(dim=1).mean() / g.flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(once, g * size**2)
    torch.testing.assert_close(noise, z * size)
    scaled, less = langevin(5 * g, z)
    torch.testing.assert_close(scaled, once / 5)
    torch.testing.assert_close(less, noise / 5)


def test_learned_range_goes_from_one_deviation_to_the_other():
    z = start()
    torch.testing.assert_close(learned_range(z, torch.full_like(z, -1), 3.0), z)
    torch.testing.assert_close(learned_range(z, torch.ones_like(z), 3.0), 3 * z)
    torch.testing.assert_close(learned_range(z, torch.zeros_like(z), 4.0), 2 * z)


def test_engines_refuse_rules_they_are_not_told_of():
    from fastdiff.solvers.engine import run
    from fastdiff.solvers.stepper import Stepper

    table = solvers.make_table("ddpm", "linear", 3, variance_type="learned_range")
    with pytest.raises(ValueError, match="table must have no rules"):
        run(table, start(), lambda x, i: x, dtype=torch.float32)
    with pytest.raises(ValueError, match="table must have no rules"):
        Stepper(table)
