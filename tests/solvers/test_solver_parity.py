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


@pytest.mark.parametrize(
    ("betas", "spacing", "steps", "offset"), cover(12, list(BETAS), SPACINGS, STEPS, [0, 1])
)
def test_learned_range_is_diffusers(betas, spacing, steps, offset):
    """Each row, with its rule, from diffusers' step: the model's further channels are v."""
    config = {"timestep_spacing": spacing, "steps_offset": offset, "beta_schedule": betas}
    config |= BETAS[betas]
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range", **config)
    schedule = solvers.from_diffusers(scheduler)
    widen(scheduler)
    scheduler.set_timesteps(steps)
    table = solvers.make_table(
        "ddpm", schedule, steps, grid=spacing, steps_offset=offset, variance_type="learned_range"
    )
    assert list(table.times) == scheduler.timesteps.tolist()
    x = start(torch.float64)
    v = torch.linspace(-1.2, 1.2, x.numel(), dtype=torch.float64).reshape(x.shape)
    output = 0.3 * x.roll(1, 0)
    for row, t in zip(table.rows, scheduler.timesteps, strict=True):
        draws = seeded(int(t))
        theirs = scheduler.step(torch.cat([output, v], 1), t, x, **draws).prev_sample
        update = row.updates[0]
        ours = update.from_registers[0] * x
        ours += update.from_prediction * (row.from_state * x + row.from_output * output)
        if row.draw >= 0:
            assert row.rule == "learned_range"
            z = torch.randn(x.shape, dtype=torch.float64, **seeded(int(t)))
            ours += update.from_noise * row.rule_value ** ((1 + v) / 2) * z
        else:
            assert row.rule == ""
            assert t == 0
        assert (ours - theirs).abs().max() < 1e-10 * max(1.0, theirs.abs().max().item())


def test_learned_range_is_between_the_fixed_variances():
    def stds(variance_type):
        table = solvers.make_table("ddpm", "cosine", 20, mode="exact", variance_type=variance_type)
        return [row.updates[0].from_noise for row in table.rows[:-1]], table

    small, large = stds("fixed_small")[0], stds("fixed_large")[0]
    learned, table = stds("learned_range")
    np.testing.assert_array_equal(learned, small)
    ratios = [row.rule_value for row in table.rows[:-1]]
    np.testing.assert_allclose(np.multiply(learned, ratios), large, rtol=1e-14)
    assert table.rows[-1].rule == ""
    # An empty step has no noise to choose.
    repeated = solvers.TimeGrid("empty", [10.0], [0.5], [0.5], 1)
    row = solvers.ddpm(solvers.linear(), repeated, variance_type="learned_range").rows[0]
    assert (row.rule, row.updates[0].from_noise) == ("", 0.0)
    with pytest.raises(ValueError, match="did you mean 'learned_range'"):
        solvers.make_table("ddpm", "linear", 5, variance_type="learned")
