"""The analytic models against definitions, and their ODE's solution against three others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdiff import solvers
from fastdiff.solvers.oracle import AnisotropicGaussian, GaussianMixture, integrate
from fastdiff.solvers.prediction import input_scale, to_eps, to_x0

NARROW = {"weights": (0.4, 0.35, 0.25), "means": (-1.0, 0.2, 1.3), "stds": (0.05, 0.1, 0.08)}
KINDS = ["eps", "v", "x0", "flow", "score", "edm"]


def oracles(schedule, prediction="eps"):
    covariance = AnisotropicGaussian.conditioned(8, 1e3)
    return [
        GaussianMixture(schedule, prediction),
        GaussianMixture(schedule, prediction, **NARROW),
        AnisotropicGaussian(
            schedule, prediction, covariance=covariance, mean=np.linspace(-1, 1, 8)
        ),
    ]


def states(count=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 8, generator=generator, dtype=torch.float64)


def log_density(oracle, x, alpha, sigma):
    """log p(x) from the definition of each distribution, by torch.distributions."""
    if isinstance(oracle, GaussianMixture):
        spread = [math.hypot(alpha * s, sigma) for s in oracle.stds]
        parts = [
            math.log(w) + torch.distributions.Normal(alpha * m + 0 * x, s + 0 * x).log_prob(x)
            for w, m, s in zip(oracle.weights, oracle.means, spread, strict=True)
        ]
        return torch.logsumexp(torch.stack(parts), 0).sum()
    covariance = alpha**2 * oracle.covariance + sigma**2 * torch.eye(8, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(alpha * oracle.mean, covariance)
    return normal.log_prob(x).sum()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "vp", "ve", "edm", "flow"])
def test_score_is_the_gradient_and_every_prediction_gives_it_back(schedule, index):
    schedule = solvers.get_schedule(schedule)
    for fraction in (0.02, 0.4, 0.9):
        time = schedule.t_max + fraction * (schedule.t_min - schedule.t_max)
        if isinstance(schedule, solvers.DiscreteVP):
            time = round(time)
        alpha, sigma = map(float, schedule.marginal(schedule.lambda_at(time)))
        x = (math.hypot(alpha, sigma) * states(8)).requires_grad_()
        (score,) = torch.autograd.grad(log_density(oracles(schedule)[index], x, alpha, sigma), x)
        x = x.detach()
        eps = -sigma * score
        x0 = (x - sigma * eps) / alpha
        for kind in KINDS:
            model = oracles(schedule, kind)[index]
            out = model(
                x * input_scale(kind, alpha, sigma), torch.full((8,), time, dtype=torch.float64)
            )
            for wanted, convert in ((x0, to_x0), (eps, to_eps)):
                from_state, from_output = convert(kind, alpha, sigma)
                torch.testing.assert_close(
                    from_state * x + from_output * out, wanted, rtol=1e-9, atol=1e-9
                )


@pytest.mark.parametrize("ends", [(-2.7, math.inf), (-math.inf, math.inf), (1.0, -1.5), (0.5, 3)])
@pytest.mark.parametrize("schedule", ["scaled_linear", "flow"])
def test_integrator_against_the_closed_form(schedule, ends):
    model = oracles(schedule)[2]
    closed = model.endpoint(states(), *ends)
    torch.testing.assert_close(integrate(model, states(), *ends), closed, rtol=0, atol=1e-12)
    back = model.endpoint(closed, *ends[::-1])
    torch.testing.assert_close(back, states(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", [0, 1])
def test_endpoint_against_dop853(index):
    ivp = pytest.importorskip("scipy.integrate")
    model = oracles("scaled_linear")[index]
    x = states()

    def slope(phi, z):
        state = torch.from_numpy(z).reshape(x.shape)
        x0, score = model.posterior(state, math.cos(phi), math.sin(phi))
        velocity = -math.cos(phi) * math.sin(phi) * score - math.sin(phi) * x0
        return velocity.reshape(-1).numpy()

    start = math.atan(math.exp(2.7))
    theirs = ivp.solve_ivp(
        slope, (start, 0), x.reshape(-1).numpy(), method="DOP853", rtol=1e-13, atol=1e-15
    ).y[:, -1]
    wide = model.endpoint(x + 1e-6, -2.7) - model.endpoint(x - 1e-6, -2.7)
    sensitivity = 1 + (wide / 2e-6).abs()
    gap = (model.endpoint(x, -2.7) - torch.from_numpy(theirs).reshape(x.shape)).abs()
    assert (gap / sensitivity).max() < 1e-12


def test_the_endpoint_is_of_the_process_not_of_the_schedule():
    """VE and flow states of one angle and size lead to one clean sample."""
    z, lam = states(), -1.3
    ends = []
    for schedule in ("scaled_linear", "ve", "flow"):
        model = oracles(schedule)[1]
        norm = math.hypot(*map(float, model.schedule.marginal(lam)))
        ends.append(model.endpoint(norm * z, lam))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-11)


def test_samples_of_the_ode_are_the_data():
    model = oracles("flow")[0]
    normal = torch.distributions.Normal(0.0, 1.0)
    quantiles = normal.icdf((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    x0 = model.endpoint(quantiles, -math.inf)
    assert x0.mean().item() == pytest.approx(model.mean, abs=1e-4)
    assert x0.var(correction=0).item() == pytest.approx(model.variance, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept_and_the_rounding_is_its_own(dtype):
    for model in oracles("flow", "flow"):
        x = states().to(dtype)
        out = model(x, torch.tensor([500.0]))
        assert out.dtype == dtype
        exact = model(x.double(), torch.tensor([500.0]))
        size = max(1.0, exact.abs().max().item())
        assert (out.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * size + 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture("linear", weights=(0.5, 0.6), means=(0, 1), stds=(1, 1)), "weig"),
        (lambda: GaussianMixture("linear", means=(0.0, 1.0)), "means"),
        (lambda: GaussianMixture("linear", stds=(0.1, 0.1, -1)), "stds"),
        (lambda: GaussianMixture("linear", "noise"), "prediction"),
        (lambda: AnisotropicGaussian("linear", covariance=[[1.0, 0.5]]), "covariance"),
        (lambda: AnisotropicGaussian("linear", covariance=[[1.0, 2.0], [2.0, 1.0]]), "definite"),
        (lambda: AnisotropicGaussian("linear", covariance=[[1.0, 0.2], [0.1, 1.0]]), "symmetric"),
        (lambda: AnisotropicGaussian("linear", covariance=[[1.0]], mean=[0, 1]), "mean"),
        (lambda: AnisotropicGaussian.conditioned(3, 0.5), "condition"),
        (lambda: AnisotropicGaussian.conditioned(0, 2), "dimension"),
        (lambda: oracles("linear")[2].endpoint(torch.zeros(3), 0.0), "last dimension"),
        (lambda: oracles("linear")[0].endpoint(torch.full((3,), math.nan), 0.0), "finite"),
        (lambda: oracles("linear")[0].endpoint(torch.zeros(3), math.nan), "from_lambda"),
        (lambda: oracles("ve")[2].endpoint(torch.zeros(8), -math.inf), "from_lambda"),
        (
            lambda: GaussianMixture("linear", weights=(1.0,), means=(0.4,), stds=(0.0,)).endpoint(
                torch.zeros(3), 0.0
            ),
            "stds",
        ),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
