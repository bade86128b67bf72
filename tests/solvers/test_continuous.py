"""Schedules in continuous time, what their models predict, and the solvers on them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from mixture import Mixture

import fastdiff
from fastdiff import solvers
from fastdiff.solvers import ContinuousVP, Flow, SigmaSchedule, dynamic_shift
from fastdiff.solvers.prediction import EDM_SIGMA_DATA, input_scale, to_eps, to_score, to_x0

SCHEDULES = [
    ContinuousVP(),
    ContinuousVP(t_end=1e-5, time_scale=999.0),
    solvers.ve(),
    solvers.edm(),
    solvers.cm(),
    Flow(),
    Flow(shift=3.0, time_scale=1.0),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_maps_are_inverse(schedule):
    inside = schedule.t_min + (schedule.t_max - schedule.t_min) * np.linspace(0.001, 0.999, 50)
    t = np.concatenate([[schedule.t_min], inside, [schedule.t_max]])
    lam = schedule.lambda_at(t)
    assert np.all(np.diff(lam) < 0)
    np.testing.assert_allclose(schedule.time_at(lam), t, rtol=1e-9, atol=1e-12)
    alpha, sigma = schedule.marginal(lam[1:-1])
    np.testing.assert_allclose(np.log(alpha / sigma), lam[1:-1], rtol=1e-9, atol=1e-12)
    assert schedule.time_at(1e9) == schedule.t_min
    assert schedule.time_at(-1e9) == schedule.t_max


def test_closed_forms():
    t = np.array([0.001, 0.1, 0.5, 1.0])
    vp = ContinuousVP()
    integral = 0.1 * t + (20 - 0.1) * t**2 / 2  # of beta
    np.testing.assert_allclose(vp.alpha(t), np.exp(-integral / 2), rtol=1e-12)
    np.testing.assert_allclose(vp.sigma(t) ** 2, 1 - np.exp(-integral), rtol=1e-12)
    s = np.array([0.02, 3.0, 50.0])
    np.testing.assert_allclose(solvers.ve().sigma(s), s, rtol=1e-14)
    np.testing.assert_allclose(solvers.edm().sigma(np.log(s) / 4), s, rtol=1e-14)
    np.testing.assert_allclose(Flow().sigma([0, 250, 1000]), [0, 0.25, 1], rtol=1e-15)
    np.testing.assert_allclose(Flow().alpha([0, 250, 1000]), [1, 0.75, 0], rtol=1e-15)


def test_zero_terminal_snr_rescale():
    scaled = solvers.zero_terminal_snr(solvers.scaled_linear())
    assert scaled.alphas_cumprod[-1] == 0
    first = solvers.scaled_linear().alphas_cumprod[0]
    assert scaled.alphas_cumprod[0] == pytest.approx(first, rel=1e-15)
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
    )
    np.testing.assert_allclose(scaled.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (1.0, 7.0), (0.3, 0.7), (1.0, 0.01)])
def test_every_prediction_gives_the_same_x0_eps_and_score(alpha, sigma):
    x0, eps = 0.7, -1.3
    x, n = alpha * x0 + sigma * eps, math.hypot(alpha, sigma)
    skip = alpha * EDM_SIGMA_DATA**2 / (sigma**2 + alpha**2 * EDM_SIGMA_DATA**2)
    out = sigma * EDM_SIGMA_DATA / math.hypot(sigma, alpha * EDM_SIGMA_DATA)
    outputs = {
        "eps": eps,
        "v": (alpha * eps - sigma * x0) / n,
        "x0": x0,
        "flow": eps - x0,
        "score": -eps / sigma,
        "edm": (x0 - skip * x) / out,
    }
    for kind, output in outputs.items():
        for convert, expected in ((to_x0, x0), (to_eps, eps), (to_score, -eps / sigma)):
            state, model = convert(kind, alpha, sigma)
            assert state * x + model * output == pytest.approx(expected, rel=1e-10), kind
        if kind != "edm":
            assert input_scale(kind, alpha, sigma) == 1
    # The raw EDM network sees unit variance when the data has deviation sigma_data.
    scale = input_scale("edm", alpha, sigma)
    assert scale * math.hypot(alpha * EDM_SIGMA_DATA, sigma) == pytest.approx(1)


def test_flow_euler_moves_along_the_velocity():
    table = solvers.make_table("euler", Flow(), 7, prediction="flow")
    s = np.append(1 - np.arange(7) / 7, 0)
    for i, row in enumerate(table.rows):
        assert row.time == pytest.approx(1000 * s[i])
        update = row.updates[0]
        from_x = update.from_registers[0] + update.from_prediction * row.from_state
        assert from_x == pytest.approx(1, abs=1e-14)
        velocity = update.from_prediction * row.from_output
        assert velocity == pytest.approx(s[i + 1] - s[i], rel=1e-12)
    assert table.init_scale == 1


def test_shift_spends_more_steps_at_much_noise():
    s = solvers.make_grid(Flow(shift=3.0), 10, "linspace").times / 1000
    u = 1 - np.arange(10) / 10
    np.testing.assert_allclose(s, 3 * u / (1 + 2 * u), rtol=1e-14)
    assert dynamic_shift(256) == pytest.approx(math.exp(0.5))
    assert dynamic_shift(4096) == pytest.approx(math.exp(1.15))


@pytest.mark.parametrize(
    "kind",
    ["ddim", "dpmpp_2m", "unipc", "euler", "heun", "dpmpp_2s", "dpmpp_3s", "dpm_2", "midpoint"],
)
@pytest.mark.parametrize(
    ("schedule", "prediction", "options"),
    [
        (ContinuousVP(t_end=1e-4), "score", {"grid": "lambda"}),
        (solvers.ve(), "score", {}),
        (solvers.edm(), "eps", {}),
        (Flow(shift=2.0), "flow", {}),
    ],
    ids=["vp", "ve", "edm", "flow"],
)
def test_normal_data_is_sampled_with_its_deviation(kind, schedule, prediction, options):
    """Deterministic solvers map the prior to the data: a linear model, so their scale says it."""
    std = 0.5

    def model(x, t):
        alpha, sigma = map(float, schedule.marginal(schedule.lambda_at(float(t[0]))))
        eps = sigma * x / (alpha**2 * std**2 + sigma**2)
        if prediction == "eps":
            return eps
        x0 = alpha * std**2 * x / (alpha**2 * std**2 + sigma**2)
        return -eps / sigma if prediction == "score" else eps - x0

    table = solvers.make_table(kind, schedule, 200, prediction=prediction, mode="exact", **options)
    unit = torch.ones(1, 1, dtype=torch.float64)
    scale = fastdiff.sample(model, x=unit * table.init_scale, solver=table).item()
    assert scale == pytest.approx(std, rel=0.02 if kind in ("ddim", "euler") else 2e-3)


def test_edm_heun_is_algorithm_1():
    schedule = solvers.edm()
    mixture = Mixture(schedule, "x0")
    n, rho = 9, 7
    ramp = np.arange(n) / (n - 1)
    sigmas = (80 ** (1 / rho) + ramp * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    sigmas = [*sigmas, 0.0]

    def network(x, t):
        """F of a preconditioned model whose denoiser is exact."""
        sigma = math.exp(4 * float(t[0]))
        n2 = sigma**2 + EDM_SIGMA_DATA**2
        y = x * math.sqrt(n2)
        out = sigma * EDM_SIGMA_DATA / math.sqrt(n2)
        return (mixture.at(y, 1.0, sigma) - EDM_SIGMA_DATA**2 / n2 * y) / out

    z = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 16)
    y = sigmas[0] * z
    for s, s_to in itertools.pairwise(sigmas):
        d = (y - mixture.at(y, 1.0, s)) / s
        moved = y + (s_to - s) * d
        if s_to > 0:
            d = (d + (moved - mixture.at(moved, 1.0, s_to)) / s_to) / 2
            moved = y + (s_to - s) * d
        y = moved
    table = solvers.make_table("heun", schedule, n, prediction="edm")
    assert len(table) == 2 * n - 1
    assert table.init_scale == pytest.approx(80)
    result = fastdiff.sample(network, x=z * table.init_scale, solver=table)
    torch.testing.assert_close(result, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize(("shift", "tokens"), [(1.0, None), (3.0, None), (None, 1024)])
def test_flow_match_euler_is_diffusers(steps, shift, tokens):
    diffusers = pytest.importorskip("diffusers")
    sigmas = np.linspace(1, 1 / steps, steps)  # as the pipelines hand them over
    if tokens is None:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=sigmas)
        schedule = Flow(shift=shift)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        schedule = Flow(shift=dynamic_shift(tokens))
        scheduler.set_timesteps(sigmas=sigmas, mu=math.log(schedule.shift))
    table = solvers.make_table("euler", schedule, steps, prediction="flow")
    np.testing.assert_allclose(table.times, scheduler.timesteps, rtol=1e-6)

    def model(x, t):
        return torch.tanh(x) * (1 + t.reshape(-1)[0] / 1000)

    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = z
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    assert (fastdiff.sample(model, x=z, solver=table) - x).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContinuousVP(beta_min=-1.0), "beta_min must be positive"),
        (lambda: ContinuousVP(beta_max=0.05), "beta_max must be above beta_min"),
        (lambda: ContinuousVP(t_end=2.0), "t_end must be below 1"),
        (lambda: SigmaSchedule(1.0, 0.5), "sigma_max must be above sigma_min"),
        (lambda: SigmaSchedule(0.0, 0.5), "sigma_min must be positive"),
        (lambda: Flow(shift=0.0), "shift must be positive"),
        (lambda: Flow(shift=math.nan), "shift must be positive"),
        (lambda: Flow().lambda_at(1001.0), r"0\.\.1000"),
        (lambda: Flow().time_at(math.nan), "must not be NaN"),
        (lambda: solvers.make_table("dpmpp_2m", "flow", 5, grid="karras"), "finite range"),
        (lambda: solvers.make_table("euler", "flow", 5), "prediction must be"),
        (lambda: solvers.make_table("deis", "flow", 5, prediction="flow"), "zero terminal SNR"),
        (lambda: solvers.make_table("dpm_2m", "linear", 5, final_sigmas_type="zero"), "sigma_min"),
        (lambda: solvers.make_table("lcm", "linear", 51), "steps must be in 1..50"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
