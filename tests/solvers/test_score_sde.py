"""Predictor-corrector samplers and annealed Langevin dynamics against their papers' algorithms.

``reference_pc`` is the sampling loop of arXiv 2011.13456 (algorithms 2 to 5, with the
discretisations of appendices B and F), in the precision of its input; ``ScoreSdeVeScheduler`` is
diffusers' version of its VE half.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from mixture import Mixture
from moments import moments
from reference import check, seeded, start
from torch import Tensor

import fastdiff
from fastdiff import solvers
from fastdiff.solvers import SolverTable

VP = solvers.ContinuousVP(time_scale=999.0)
VE = solvers.ve()
NORMAL = {"weights": (1.0,), "means": (0.4,), "stds": (0.5,)}
SAMPLERS = [
    (predictor, corrector, flow)
    for predictor, corrector, flow in itertools.product(
        ["reverse_diffusion", "ancestral_sampling", "euler_maruyama", "none"],
        ["none", "langevin", "ald"],
        [False, True],
    )
    if not predictor == corrector == "none"
    and not (flow and predictor in ("ancestral_sampling", "none"))
]


class Score(Mixture):
    """The mixture's score; a float32 time may be just outside the schedule's range."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return super().__call__(x, t.double().clamp(self.schedule.t_min, self.schedule.t_max))

    def at(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return -super().at(x, alpha, sigma) / sigma


def run(table: SolverTable, model: Any, x: Tensor, seed: int) -> Tensor:
    """The rows one after the other, rules included, with diffusers' order of draws."""
    draws = seeded(seed)
    for row in table.rows:
        t = torch.tensor([row.time], dtype=x.dtype)
        prediction = row.from_state * x + row.from_output * model(x, t)
        z = torch.randn(x.shape, dtype=x.dtype, **draws) if row.draw >= 0 else torch.zeros_like(x)
        if row.rule == "langevin":
            r = z.flatten(1).norm(dim=1).mean() / prediction.flatten(1).norm(dim=1).mean()
            prediction, z = r**2 * prediction, r * z
        (update,) = row.updates
        x = (
            update.from_registers[0] * x
            + update.from_prediction * prediction
            + update.from_noise * z
        )
    return x


def reference_pc(schedule, score, x, steps, predictor, corrector, flow, *, snr=0.16, m=1, seed=5):
    """x_mean of the last step; N discrete betas or sigmas, times from 1 to eps, dt = 1/N."""
    draws, half = seeded(seed), 0.5 if flow else 1.0
    vp = isinstance(schedule, solvers.ContinuousVP)
    betas = np.linspace(0.1, 20, steps) / steps
    sigmas = np.geomspace(0.01, 50, steps)
    mean = x
    for t in np.linspace(1, 1e-3 if vp else 1e-5, steps):
        i = int(t * (steps - 1))
        time = 999 * t if vp else 0.01 * 5000**t
        alpha_i = 1 - betas[i] if vp else 1.0
        for _ in range(m if corrector != "none" else 0):
            g = score(x, torch.tensor([time], dtype=torch.float64))
            z = torch.randn(x.shape, dtype=x.dtype, **draws)
            if corrector == "langevin":
                size = snr * z.flatten(1).norm(dim=1).mean() / g.flatten(1).norm(dim=1).mean()
            else:
                size = snr * float(schedule.sigma(min(time, schedule.t_max)))
            e = 2 * alpha_i * size**2
            mean = x + e * g
            x = mean + (2 * e) ** 0.5 * z
        if predictor == "none":
            mean = x
            continue
        g = score(x, torch.tensor([time], dtype=torch.float64))
        z = torch.randn(x.shape, dtype=x.dtype, **draws)
        if predictor == "euler_maruyama":
            if vp:
                rate, drift = 0.1 + 19.9 * t, -0.5 * (0.1 + 19.9 * t)
            else:
                rate, drift = time**2 * 2 * math.log(5000), 0.0
            mean = x - (drift * x - half * rate * g) / steps
            std = (rate / steps) ** 0.5
        elif vp and predictor == "reverse_diffusion":
            mean = x - ((1 - betas[i]) ** 0.5 * x - x - half * betas[i] * g)
            std = betas[i] ** 0.5
        elif vp:
            mean = (x + betas[i] * g) / (1 - betas[i]) ** 0.5
            std = betas[i] ** 0.5
        else:
            below = sigmas[i - 1] if i > 0 else 0.0
            gap = sigmas[i] ** 2 - below**2
            mean = x + half * gap * g
            std = gap**0.5
            if predictor == "ancestral_sampling":
                std = (below**2 * gap / sigmas[i] ** 2) ** 0.5
        x = mean if flow else mean + std * z
    return mean


@pytest.mark.parametrize("schedule", [VP, VE], ids=lambda s: s.name)
@pytest.mark.parametrize(("predictor", "corrector", "flow"), SAMPLERS)
def test_pc_is_score_sde(schedule, predictor, corrector, flow):
    steps = 40
    model = Score(schedule)
    table = solvers.make_table(
        "pc",
        schedule,
        steps,
        prediction="score",
        predictor=predictor,
        corrector=corrector,
        probability_flow=flow,
    )
    per_level = (predictor != "none") + (corrector != "none")
    assert len(table) == steps * per_level
    assert table.num_draws == len(table)
    x = start(torch.float64) * table.init_scale
    theirs = reference_pc(schedule, model, x, steps, predictor, corrector, flow)
    size = max(1.0, theirs.abs().max().item())
    assert (run(table, model, x, 5) - theirs).abs().max() < 1e-10 * size
    if corrector != "langevin":
        single = reference_pc(schedule, model, x.float(), steps, predictor, corrector, flow)
        check(table, model, single, theirs, noise=5)


def test_pc_at_another_number_of_corrector_steps_and_snr():
    model = Score(VE)
    options = {"snr": 0.1, "n_steps": 3}
    table = solvers.make_table("pc", VE, 30, prediction="score", **options)
    assert len(table) == 30 * 4
    x = start(torch.float64) * table.init_scale
    theirs = reference_pc(VE, model, x, 30, "reverse_diffusion", "langevin", False, snr=0.1, m=3)
    assert (run(table, model, x, 5) - theirs).abs().max() < 1e-10


def test_noise_models_give_the_scores_run():
    """One table per kind of model: an eps model's conversion, the same numbers."""
    tables = {
        kind: solvers.make_table("pc", VP, 30, prediction=kind) for kind in ("eps", "v", "score")
    }
    x = start(torch.float64)
    expected = run(tables["score"], Score(VP), x, 5)
    for kind in ("eps", "v"):
        ours = run(tables[kind], Mixture(VP, kind), x, 5)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("correct_steps", [1, 2])
def test_pc_is_diffusers_score_sde_ve(correct_steps):
    diffusers = pytest.importorskip("diffusers")
    steps = 25
    scheduler = diffusers.ScoreSdeVeScheduler(num_train_timesteps=steps)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    schedule = solvers.ve(sigma_max=1348.0)
    model = Score(schedule)
    table = solvers.make_table(
        "pc", schedule, steps, prediction="score", snr=0.15, n_steps=correct_steps
    )
    levels = np.reshape(table.times, (steps, correct_steps + 1))[:, 0]
    np.testing.assert_allclose(levels, scheduler.sigmas.numpy(), rtol=1e-12)
    x = sample = start(torch.float64) * scheduler.init_noise_sigma
    assert table.init_scale == pytest.approx(scheduler.init_noise_sigma, rel=1e-14)
    draws = seeded(5)
    for t, sigma in zip(scheduler.timesteps, levels, strict=True):
        at = torch.tensor([sigma])
        for _ in range(correct_steps):
            sample = scheduler.step_correct(model(sample, at), sample, **draws).prev_sample
        output = scheduler.step_pred(model(sample, at), t.reshape(1), sample, **draws)
        sample = output.prev_sample
    theirs = output.prev_sample_mean
    assert (run(table, model, x, 5) - theirs).abs().max() < 1e-10 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("schedule", [VP, VE], ids=lambda s: s.name)
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama"])
def test_probability_flow_is_of_first_order(schedule, predictor):
    """For N(m, d^2) the ODE keeps (x - alpha m)/sqrt(alpha^2 d^2 + sigma^2)."""
    model = Score(schedule, **NORMAL)
    errors = []
    for steps in (200, 400, 800):
        grid = solvers.make_grid(schedule, steps, "lambda", final="sigma_min", mode="exact")
        table = solvers.pc(
            schedule,
            grid,
            prediction="score",
            predictor=predictor,
            corrector="none",
            probability_flow=True,
            denoise=False,
            mode="exact",
        )
        (alpha, sigma), (alpha_to, sigma_to) = table.rows[0].level, table.end_level
        noise = start(torch.float64)
        x = alpha * 0.4 + math.hypot(alpha * 0.5, sigma) * noise
        exact = alpha_to * 0.4 + math.hypot(alpha_to * 0.5, sigma_to) * noise
        errors.append((fastdiff.sample(model, x=x, solver=table) - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(1, abs=0.15), errors


@pytest.mark.parametrize("schedule", [VP, VE], ids=lambda s: s.name)
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral_sampling", "euler_maruyama"])
def test_predictors_moments_tend_to_the_datas_at_first_order(schedule, predictor):
    model = Score(schedule, **NORMAL)
    start_at = float(schedule.lambda_at(schedule.t_max))
    gaps = []
    for steps in (250, 500, 1000):
        # To where data and noise are alike: down to no noise, Euler-Maruyama's error on the
        # variance of normal data under VE cancels to second order.
        points = np.linspace(start_at, math.log(2), steps + 1)
        grid = solvers.sigma_grid(schedule, np.exp(-points))
        table = solvers.pc(
            schedule,
            grid,
            prediction="score",
            predictor=predictor,
            corrector="none",
            denoise=False,
            mode="exact",
        )
        alpha, sigma = table.end_level
        mean, variance = moments(table, schedule, model)
        gaps.append(abs(variance - (alpha * 0.5) ** 2 - sigma**2))
        assert mean == pytest.approx(0.4 * alpha, abs=5e-3)
    orders = [math.log2(a / b) for a, b in itertools.pairwise(gaps)]
    assert orders[-1] == pytest.approx(1, abs=0.15), gaps


def test_ancestral_sampling_of_ve_is_the_posterior_of_a_point():
    model = Score(VE, weights=(1.0,), means=(0.4,), stds=(0.0,))
    grid = solvers.sigma_grid(VE, [50.0, 3.0, 0.5, 0.1])
    table = solvers.pc(
        VE,
        grid,
        prediction="score",
        predictor="ancestral_sampling",
        corrector="none",
        denoise=False,
        mode="exact",
    )
    assert moments(table, VE, model)[1] == pytest.approx(0.1**2, rel=1e-12)


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("mode", ["parity", "exact"])
def test_denoising_leaves_the_last_noise_out(mode, denoise):
    table = solvers.make_table("pc", "vp", 50, corrector="none", denoise=denoise, mode=mode)
    last = table.rows[-1]
    assert (last.updates[0].from_noise == 0) == denoise
    assert (last.draw >= 0) == (mode == "parity" or not denoise)
    assert table.end_level == (1.0, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_sde_grid_is_uniform_in_time(steps):
    times = np.linspace(1, 1e-3, steps)
    np.testing.assert_allclose(solvers.sde_grid(VP, steps).times, 999 * times, rtol=1e-12)
    sigmas = 0.01 * 5000 ** np.linspace(1, 1e-5, steps)
    np.testing.assert_allclose(solvers.sde_grid(VE, steps).times, sigmas, rtol=1e-12)
    flow = 1000 * (1 - np.arange(steps) / steps)  # time 0 has no score
    np.testing.assert_allclose(solvers.sde_grid(solvers.Flow(), steps).times, flow, rtol=1e-12)
    assert len(solvers.make_table("pc", "flow", steps, prediction="flow")) == 2 * steps
    whole = solvers.sde_grid(solvers.linear(), steps).times
    assert whole.tolist() == np.round(np.linspace(999, 0, steps)).tolist()


def reference_ald(schedule, score, x, levels, per_level, step_lr, denoise, factor, seed):
    """Algorithm 1 of arXiv 1907.05600; factor 2 is the published code's step."""
    draws = seeded(seed)
    sigmas = np.geomspace(schedule.sigma_max, schedule.sigma_min, levels)
    for sigma in sigmas:
        alpha = factor * step_lr * sigma**2 / sigmas[-1] ** 2
        t = torch.tensor([sigma]).double().clamp(schedule.t_min, schedule.t_max)
        for _ in range(per_level):
            z = torch.randn(x.shape, dtype=x.dtype, **draws)
            x = x + alpha / 2 * score(x, t) + alpha**0.5 * z
    return x + sigmas[-1] ** 2 * score(x, t) if denoise else x


@pytest.mark.parametrize(
    ("mode", "denoise", "levels", "per_level"),
    [("parity", True, 10, 4), ("parity", False, 1, 7), ("exact", True, 3, 10), ("exact", 0, 6, 1)],
)
def test_annealed_langevin_is_algorithm_1(mode, denoise, levels, per_level):
    schedule = solvers.ve(sigma_max=1.0)
    model = Score(schedule)
    table = solvers.make_table(
        "annealed_langevin",
        schedule,
        levels,
        prediction="score",
        mode=mode,
        step_size=2e-5,
        steps_per_level=per_level,
        denoise=bool(denoise),
    )
    assert len(table) == levels * per_level + bool(denoise)
    assert table.init_scale == pytest.approx(1.0, rel=1e-14)
    references = [
        reference_ald(
            schedule,
            model,
            start(dtype) * table.init_scale,
            levels,
            per_level,
            2e-5,
            denoise,
            2 if mode == "parity" else 1,
            5,
        )
        for dtype in (torch.float32, torch.float64)
    ]
    check(table, model, *references, noise=5)


@pytest.mark.parametrize("schedule", [solvers.ve(sigma_max=1.0), VP], ids=lambda s: s.name)
@pytest.mark.parametrize("solver", ["annealed_langevin", "pc"])
def test_langevin_dynamics_settles_where_it_should(schedule, solver):
    """x + e g + sqrt(2e) z on N(m, v), g = (m - x)/v, tends to N(m, v/(1 - e/(2v)))."""
    model = Score(schedule, **NORMAL)
    lam = 1.5
    alpha, sigma = map(float, schedule.marginal(lam))
    grid = solvers.TimeGrid("level", [schedule.time_at(lam)], [lam], [math.inf], 1)
    v = (alpha * 0.5) ** 2 + sigma**2
    if solver == "pc":
        ratio = alpha if schedule is VP else 1.0  # the step's: it goes to the clean sample
        e = 2 * (ratio * 0.3 * sigma) ** 2
        options = {"predictor": "none", "corrector": "ald", "snr": 0.3, "n_steps": 800}
    else:
        e = 0.05 * alpha**2  # of x, where the table's is of x/alpha
        options = {"step_size": 0.05, "steps_per_level": 800, "denoise": False}
    table = solvers.make_table(solver, schedule, grid=grid, prediction="score", **options)
    mean, variance = moments(table, schedule, model)
    assert mean == pytest.approx(0.4 * alpha, rel=1e-9)
    assert variance == pytest.approx(v / (1 - e / (2 * v)), rel=1e-9)
    assert table.end_level == (alpha, sigma)


def test_annealed_langevin_on_another_schedule_is_that_of_the_same_noise_ratios():
    """On VP it is the VE run in y = x/alpha."""
    ve = solvers.ve(0.02, 5.0)
    levels = np.geomspace(5.0, 0.02, 6)
    runs = []
    for schedule in (VP, ve):
        grid = solvers.sigma_grid(schedule, [*levels, 0.0])
        table = solvers.annealed_langevin(schedule, grid, prediction="score", steps_per_level=5)
        alpha = table.rows[0].level[0]
        runs.append(run(table, Score(schedule), start(torch.float64) * 5 * alpha, 5))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "euler"}, "predictor must"),
        ({"corrector": "hmc"}, "corrector must"),
        ({"predictor": "none", "corrector": "none"}, "corrector must"),
        ({"predictor": "ancestral_sampling", "probability_flow": True}, "predictor must"),
        ({"snr": 0.0}, "snr must"),
        ({"n_steps": 0}, "n_steps must"),
        ({"steps": 20}, "steps must be above beta_max"),
        ({"schedule": "linear", "predictor": "euler_maruyama"}, "predictor must"),
        ({"schedule": "flow", "predictor": "ancestral_sampling"}, "predictor must"),
        ({"solver": "annealed_langevin", "step_size": -1.0}, "step_size must"),
        ({"solver": "annealed_langevin", "steps_per_level": 0}, "steps_per_level must"),
        ({"solver": "annealed_langevin", "schedule": "flow", "grid": "linspace"}, "grid must"),
    ],
)
def test_bad_values_are_refused(options, message):
    arguments = {"solver": "pc", "schedule": "vp", "steps": 50, "prediction": "flow"} | options
    with pytest.raises(ValueError, match=message):
        solvers.make_table(**arguments)


def test_few_steps_where_the_betas_are_not_needed():
    table = solvers.make_table("pc", "vp", 5, mode="exact")
    assert len(table) == 10
    table = solvers.make_table("pc", "vp", 5, predictor="euler_maruyama", corrector="none")
    assert len(table) == 5
