"""TCD and consistency models: diffusers' schedulers, and the distributions they should give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from mixture import Mixture
from moments import moments
from reference import BETAS, PREDICTIONS, check, cover, seeded, start, widen

import fastdiff
from fastdiff import solvers

NORMAL = {"weights": (1.0,), "means": (0.4,), "stds": (0.5,)}


@pytest.mark.parametrize(
    ("prediction", "betas", "steps", "eta"),
    cover(24, PREDICTIONS, list(BETAS), [1, 2, 4, 8, 50], [0.0, 0.3, 0.7, 1.0]),
)
def test_tcd_is_diffusers(prediction, betas, steps, eta):
    diffusers = pytest.importorskip("diffusers")
    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler = diffusers.TCDScheduler(
            beta_schedule=betas, prediction_type=prediction, clip_sample=False, **BETAS[betas]
        )
        schedule = solvers.from_diffusers(scheduler)
        model = Mixture(schedule, prediction)
        if dtype == torch.float64:
            widen(scheduler)
        scheduler.set_timesteps(steps)
        x, draws = start(dtype), seeded(5)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, eta=eta, **draws).prev_sample
        references.append(x)
    table = solvers.make_table("tcd", schedule, steps, prediction=prediction, eta=eta)
    assert list(table.times) == scheduler.timesteps.tolist()
    # Differences of float32 numbers near 1, as DDPM's (`reference.py`).
    slack = 2.0**-12 if eta > 0 and betas == "squaredcos_cap_v2" else 1e-5
    check(table, model, *references, noise=5, slack=slack)


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.35, 0.7, 0.9])
def test_tcd_rounds_its_time_as_diffusers_does(eta):
    """floor((1 - eta) t) in float32, over every timestep."""
    schedule = solvers.linear()
    grid = solvers.explicit_grid(schedule, np.arange(999.0, -1, -1), final="sigma_min")
    table = solvers.tcd(schedule, grid, eta=eta)
    s = torch.floor((1 - eta) * torch.arange(998, -1, -1)).long()
    expected = (
        schedule.sigma(s.numpy()) / schedule.alpha(s.numpy()) * schedule.alpha(grid.times[1:])
    )
    ours = [row.updates[0].from_registers[0] for row in table.rows[:-1]]
    np.testing.assert_allclose(ours, expected / schedule.sigma(grid.times[:-1]), rtol=1e-12)


def test_tcd_without_noise_is_ddim():
    schedule = solvers.cosine()
    grid = solvers.lcm_grid(schedule, 6)
    for ours, theirs in zip(
        solvers.tcd(schedule, grid, eta=0.0).rows, solvers.ddim(schedule, grid).rows, strict=True
    ):
        assert (ours.time, ours.from_state, ours.draw) == (theirs.time, theirs.from_state, -1)
        mine, its = ours.updates[0], theirs.updates[0]
        assert mine.from_registers[0] == pytest.approx(its.from_registers[0], rel=1e-14)
        assert mine.from_prediction == pytest.approx(its.from_prediction, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_tcd_keeps_the_variance_of_the_process_for_a_point(steps, eta):
    """For a single image every jump is exact, and jump and noise together are the marginal's."""
    schedule = solvers.ContinuousVP()
    model = Mixture(schedule, "eps", weights=(1.0,), means=(0.4,), stds=(0.0,))
    grid = solvers.make_grid(schedule, steps, "linspace", final="sigma_min")
    table = solvers.tcd(schedule, grid, eta=eta, mode="exact")
    alpha, sigma = table.end_level
    mean, variance = moments(table, schedule, model)
    assert variance == pytest.approx(sigma**2, rel=1e-9)
    # The prior has mean 0 instead of alpha_T times the data's, 0.0026.
    assert mean == pytest.approx(alpha * 0.4, abs=sigma * 0.4 * float(schedule.alpha(1.0)) * 1.001)


class _Consistent:
    """The consistency function of N(m, d^2): along the ODE (y - m)/sqrt(d^2 + s^2) is constant."""

    def __init__(self, schedule: solvers.NoiseSchedule, mean: float, std: float) -> None:
        self.schedule, self.mean, self.std = schedule, mean, std
        self.least = math.exp(-float(schedule.lambda_at(schedule.t_min)))

    def at(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        s = sigma / alpha
        shrink = math.hypot(self.std, self.least) / math.hypot(self.std, s)
        return self.mean + shrink * (x / alpha - self.mean)

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = self.schedule.lambda_at(float(t.reshape(-1)[0]))
        return self.at(x, *map(float, self.schedule.marginal(level)))


@pytest.mark.parametrize("steps", [2, 4, 10])
@pytest.mark.parametrize("schedule", [solvers.cm(), solvers.ContinuousVP()], ids=lambda s: s.name)
def test_consistency_sampling_has_the_datas_moments_at_any_number_of_steps(schedule, steps):
    model = _Consistent(schedule, 0.4, 0.5)
    table = solvers.make_table("consistency", schedule, steps, prediction="x0", mode="exact")
    assert table.num_draws == steps - 1
    mean, variance = moments(table, schedule, model)
    # The prior lacks the data's mean and variance; one draw later little is left of that.
    assert variance == pytest.approx(0.25 + model.least**2, rel=1e-3)
    assert mean == pytest.approx(0.4, rel=0.02)
    n = 20_000
    x = fastdiff.sample(model, (n, 1), solver=table, dtype=torch.float64, seed=3)
    assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert x.var().item() == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / n))


class _Network:
    """Some F(c_in x, t): smooth, and of the size of a network's output."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * x) + 0.001 * t.reshape(-1)[0].to(x.dtype)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 40])
def test_consistency_is_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    schedule = solvers.cm()
    model: Any = _Network()
    table = solvers.make_table("consistency", schedule, steps, prediction="edm")
    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
        scheduler.set_timesteps(steps)
        np.testing.assert_allclose(table.times, scheduler.timesteps.numpy(), rtol=1e-12, atol=1e-9)
        if dtype == torch.float64:
            levels = torch.exp(scheduler.timesteps / 250)
            torch.testing.assert_close(levels.float(), scheduler.sigmas[:-1], rtol=1e-6, atol=0)
            least = torch.tensor([scheduler.config.sigma_min], dtype=torch.float64)
            scheduler.sigmas = torch.cat([levels, least])
        x, draws = start(dtype) * scheduler.init_noise_sigma, seeded(5)
        for t in scheduler.timesteps:
            output = model(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, **draws).prev_sample
        references.append(x)
    assert table.num_draws == (steps if steps > 1 else 0)
    check(table, model, *references, noise=5)


def test_bounded_weights_are_the_identity_at_the_least_noise():
    schedule = solvers.cm()
    lam = float(schedule.lambda_at(schedule.t_min))
    grid = solvers.TimeGrid("end", [schedule.t_min], [lam], [math.inf], 1)
    row = solvers.consistency(schedule, grid, prediction="edm").rows[0]
    assert row.from_state == pytest.approx(1.0, abs=1e-12)
    assert row.from_output == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.make_table("tcd", "linear", 4, eta=1.5), "eta must"),
        (lambda: solvers.make_table("tcd", "linear", 51), "steps must"),
        (lambda: solvers.make_table("tcd", "edm", 4, grid="karras"), "times from 0 up"),
        (lambda: solvers.make_table("consistency", "cm", 41, prediction="edm"), "steps must"),
        (lambda: solvers.make_table("consistency", "flow", 2), "finite range"),
        (lambda: solvers.make_table("consistency", "cm", 2, s_noise=-1.0), "s_noise must"),
        (lambda: solvers.consistency_grid(solvers.cm(), 1, 1), "train_steps must"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
