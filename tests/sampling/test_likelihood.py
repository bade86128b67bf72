"""log p(x) of models whose density is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff.sampling import log_likelihood
from fastdiff.solvers.prediction import canonical, to_model

MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
ROOT = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 0.5]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T


class Gaussian:
    """The exact model of x0 ~ N(MEAN, COVARIANCE), [B, 3], and its density at the least noise."""

    def __init__(self, schedule: solvers.NoiseSchedule, prediction: str) -> None:
        self.schedule, self.prediction = schedule, canonical(prediction)

    def _spread(self, alpha: float, sigma: float) -> Tensor:
        return alpha**2 * COVARIANCE + sigma**2 * torch.eye(3, dtype=torch.float64)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = map(float, self.schedule.marginal(self.schedule.lambda_at(float(t[0]))))
        gap = torch.linalg.solve(self._spread(alpha, sigma), (x - alpha * MEAN).T).T
        if self.prediction == "flow":  # regular at both ends
            return sigma * gap - (MEAN + alpha * gap @ COVARIANCE)
        from_x, from_x0 = to_model(self.prediction, alpha, sigma)
        return from_x * x + from_x0 * (MEAN + alpha * gap @ COVARIANCE)

    def log_prob(self, x: Tensor) -> Tensor:
        at = float(self.schedule.lambda_at(self.schedule.t_min))
        alpha, sigma = map(float, self.schedule.marginal(at))
        normal = torch.distributions.MultivariateNormal(alpha * MEAN, self._spread(alpha, sigma))
        return normal.log_prob(x)


def samples(count: int = 6) -> Tensor:
    z = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MEAN + z @ ROOT.T


CASES = [
    (solvers.ContinuousVP(t_end=1e-5), "score"),
    (solvers.ContinuousVP(), "v"),
    (solvers.linear(), "eps"),
    (solvers.ve(sigma_max=500.0), "score"),
    (solvers.edm(sigma_max=500.0), "x0"),
    (solvers.Flow(), "flow"),
]


@pytest.mark.parametrize(("schedule", "prediction"), CASES, ids=lambda v: str(v)[:12])
def test_density_of_normal_data(schedule, prediction):
    model = Gaussian(schedule, prediction)
    x = samples()
    result = log_likelihood(
        model, x, schedule=schedule, prediction=prediction, probe="exact", rtol=1e-8, atol=1e-8
    )
    lam = float(schedule.lambda_at(schedule.t_max))
    alpha, sigma = map(float, schedule.marginal(lam))
    # The model's own density there instead of the prior, which does not know what is left of it.
    true = torch.distributions.MultivariateNormal(alpha * MEAN, model._spread(alpha, sigma))
    prior = torch.distributions.Normal(0.0, schedule.init_scale(lam))
    left = true.log_prob(result.latent) - prior.log_prob(result.latent).sum(1)
    if isinstance(schedule, solvers.Flow):
        assert left.abs().max() < 1e-12
    torch.testing.assert_close(result.log_prob + left, model.log_prob(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_has_the_exact_mean(probe):
    schedule = solvers.ContinuousVP(t_end=1e-3)
    model = Gaussian(schedule, "score")
    x = samples(1)
    common = {"schedule": schedule, "prediction": "score", "rtol": 1e-4, "atol": 1e-4}
    exact = log_likelihood(model, x, probe="exact", **common).log_prob.item()
    count = 4000
    estimates = log_likelihood(
        model,
        x.expand(count, 3).contiguous(),
        probe=probe,
        generator=torch.Generator().manual_seed(1),
        **common,
    ).log_prob
    error = estimates.std().item() / math.sqrt(count)
    assert error > 0
    assert estimates.mean().item() == pytest.approx(exact, abs=4 * error + 1e-3)


def test_bits_per_dimension_of_uniform_noise():
    """A density of 1/2 on -1..1 costs all 8 bits of a level."""
    from fastdiff.sampling import Likelihood

    latent = torch.zeros(2, 3, 4, 4)
    flat = Likelihood(torch.full((2,), 48 * math.log(0.5), dtype=torch.float64), latent, 1)
    np.testing.assert_allclose(flat.bits_per_dim(), 8.0, rtol=1e-12)
    np.testing.assert_allclose(flat.bits_per_dim(bins=32), 5.0, rtol=1e-12)


def test_a_condition_reaches_the_model_and_float32_serves():
    schedule = solvers.ContinuousVP(t_end=1e-3)
    model = Gaussian(schedule, "v")
    seen = []

    def conditional(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(tuple(y.shape))
        return model(x.double(), t).to(x.dtype)

    x = samples()
    common = {"schedule": schedule, "prediction": "v", "probe": "exact"}
    double = log_likelihood(model, x, **common)
    single = log_likelihood(conditional, x.float(), cond={"y": torch.ones(1, 2)}, **common)
    assert set(seen) == {(6, 2)}
    assert single.evaluations == len(seen)
    assert single.log_prob.dtype == torch.float64
    torch.testing.assert_close(single.log_prob, double.log_prob, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("error", "message", "more"),
    [
        (TypeError, "x must be a float32", {"x": samples().half()}),
        (TypeError, "x must be a float32", {"x": [1.0]}),
        (ValueError, "probe must be", {"probe": "normal"}),
        (ValueError, "rtol must be positive", {"rtol": 0.0}),
        (ValueError, "atol must be positive", {"atol": math.nan}),
        (ValueError, "model must return shape", {"model": lambda x, t: x[:1]}),
        (ValueError, "model must return finite", {"model": lambda x, t: x * math.nan}),
    ],
)
def test_bad_arguments_are_refused(error, message, more):
    arguments = {"model": lambda x, t: x, "x": samples(), "schedule": "vp", **more}
    with pytest.raises(error, match=message):
        log_likelihood(arguments.pop("model"), arguments.pop("x"), **arguments)
