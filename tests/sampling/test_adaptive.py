"""Adaptive DPM-Solver: the algorithm of the paper written out, and its error against tolerance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import solvers
from fastdiff.sampling import Guidance, sample_adaptive

MEAN, STD = 0.4, 0.5
VP = solvers.ContinuousVP(t_end=1e-3)


def epsilon(schedule: solvers.NoiseSchedule) -> Any:
    """The exact model of x0 ~ N(MEAN, STD^2)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = map(float, schedule.marginal(schedule.lambda_at(float(t[0]))))
        return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return model


def endpoint(schedule: solvers.NoiseSchedule, x: Tensor) -> Tensor:
    """Of the probability flow: the standardised state is constant."""
    start, end = schedule.lambda_at([schedule.t_max, schedule.t_min])
    (a, s), (a_to, s_to) = (map(float, schedule.marginal(lam)) for lam in (start, end))
    ratio = math.sqrt((a_to**2 * STD**2 + s_to**2) / (a**2 * STD**2 + s**2))
    return a_to * MEAN + (x - a * MEAN) * ratio


def start(count: int = 64) -> Tensor:
    return torch.linspace(-2, 2, count, dtype=torch.float64).reshape(2, count // 2)


def by_hand(
    schedule: solvers.NoiseSchedule,
    x: Tensor,
    order: int,
    controller: str,
    rtol: float = 0.05,
    atol: float = 0.0078,
) -> tuple[Tensor, int]:
    """arXiv 2206.00927, appendix C, and k-diffusion's controller, in y = x/alpha and l = lambda."""
    model = epsilon(schedule)
    lam, end = map(float, schedule.lambda_at([schedule.t_max, schedule.t_min]))
    h, count = 0.05, 0

    def alpha(at: float) -> float:
        return float(schedule.marginal(at)[0])

    def eps(y: Tensor, at: float) -> Tensor:
        time = torch.full((1,), float(schedule.time_at(at)), dtype=torch.float64)
        return model(alpha(at) * y, time)

    y = x / alpha(lam)
    before, before_alpha = y, alpha(lam)
    while end - lam > 1e-5:
        wished, h = h, min(h, end - lam)
        to = lam + h
        e0 = eps(y, lam)
        r1 = 1 / order
        u1 = y - math.exp(-lam - r1 * h) * math.expm1(r1 * h) * e0
        e1 = eps(u1, lam + r1 * h)
        rho = math.exp(-to)
        first = y - rho * math.expm1(h) * e0
        second = first - rho * math.expm1(h) / (2 * r1) * (e1 - e0)
        low, high = first, second
        if order == 3:
            r2 = 2 / 3
            u2 = y - math.exp(-lam - r2 * h) * (
                math.expm1(r2 * h) * e0 + r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * (e1 - e0)
            )
            e2 = eps(u2, lam + r2 * h)
            low, high = second, first - rho / r2 * (math.expm1(h) / h - 1) * (e2 - e0)
        count += order
        if controller == "dpm_solver":  # in x, per sample
            scaled = [alpha(to) * low, alpha(to) * high, before_alpha * before]
        else:
            scaled = [low, high, before]
        size = torch.maximum(scaled[0].abs(), scaled[2].abs()) * rtol
        gap = (scaled[1] - scaled[0]) / size.clamp(min=atol)
        if controller == "dpm_solver":
            error = gap.square().mean(1).sqrt().max().item()
            taken, h = error <= 1, 0.9 * h * error ** (-1 / order)
        else:
            error = (torch.linalg.norm(gap) / math.sqrt(gap.numel())).item()
            factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / order) - 1)
            taken, h = factor >= 0.81, wished * factor
        if taken:
            y, before, before_alpha, lam = high, low, alpha(to), to
    return alpha(lam) * y, count


@pytest.mark.parametrize("controller", ["dpm_solver", "pid"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("schedule", [VP, solvers.linear(), solvers.edm()], ids=str)
def test_the_papers_algorithm(schedule, order, controller):
    x = start() * schedule.init_scale(float(schedule.lambda_at(schedule.t_max)))
    expected, evaluations = by_hand(schedule, x, order, controller)
    result = sample_adaptive(
        epsilon(schedule), x=x, schedule=schedule, order=order, controller=controller
    )
    torch.testing.assert_close(result.sample, expected, rtol=1e-7, atol=1e-7)
    assert result.evaluations == evaluations
    assert (result.accepted + result.rejected) * order == evaluations


@pytest.mark.parametrize("algorithm_type", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("order", [2, 3])
def test_error_falls_with_the_tolerance(order, algorithm_type):
    x = start()
    errors, evaluations = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        result = sample_adaptive(
            epsilon(VP),
            x=x,
            schedule=VP,
            order=order,
            rtol=tolerance,
            atol=tolerance,
            algorithm_type=algorithm_type,
        )
        errors.append((result.sample - endpoint(VP, x)).abs().max().item())
        evaluations.append(result.evaluations)
    assert errors[0] < 5e-2
    # The lower order's local error c h^order is held to the tolerance, so the global error of the
    # higher order, c h^order too, is proportional to it: 10^4 less, with room for the last step.
    assert errors[2] < errors[0] / 1e3
    assert evaluations[0] < evaluations[1] < evaluations[2]


def test_drawn_noise_guidance_and_stopping():
    model = epsilon(VP)

    def conditional(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t) * y.reshape(-1, 1).to(x.dtype)

    cond, uncond = {"y": torch.ones(1)}, {"y": torch.full((1,), 0.8)}
    common = {"schedule": VP, "seed": 3, "cond": cond, "uncond": uncond}
    plain = sample_adaptive(conditional, (2, 8), **common, guidance_scale=2.0)
    other = sample_adaptive(conditional, (2, 8), **common, guidance=Guidance(2.0, batched=False))
    torch.testing.assert_close(plain.sample, other.sample, rtol=1e-5, atol=1e-6)
    assert plain.sample.dtype == torch.float32
    free = sample_adaptive(conditional, (2, 8), schedule=VP, seed=3, cond=cond)
    assert not torch.allclose(free.sample, plain.sample, atol=1e-3)
    seen = []

    def stop(info: Any) -> bool:
        seen.append((info.index, info.x.clone(), info.level))
        return info.index < 2

    stopped = sample_adaptive(conditional, (2, 8), schedule=VP, seed=3, cond=cond, callback=stop)
    assert [index for index, *_ in seen] == [0, 1, 2]
    assert torch.equal(stopped.sample, seen[-1][1])
    assert seen[0][2][1] > seen[1][2][1] > seen[2][2][1] > 0
    # The same noise as any other run's of that seed.
    z = fastdiff.sample(conditional, (2, 8), schedule=VP, seed=3, cond=cond, steps=400)
    assert (free.sample - z).abs().max() < 0.1


@pytest.mark.parametrize(
    ("error", "message", "more"),
    [
        (ValueError, "order must be 2 or 3", {"order": 1}),
        (ValueError, "controller must be", {"controller": "pd"}),
        (ValueError, "algorithm_type must be", {"algorithm_type": "sde-dpmsolver++"}),
        (ValueError, "rtol must be positive", {"rtol": 0.0}),
        (ValueError, "h_init must be positive", {"h_init": -1.0}),
        (ValueError, "finite range", {"schedule": "flow"}),
        (ValueError, "guidance_scale must be one number", {"guidance_scale": [1.0, 2.0]}),
        (ValueError, "without cond and uncond", {"guidance_scale": 2.0}),
        (ValueError, "seed and generator", {"seed": 1, "generator": torch.Generator()}),
        (ValueError, "model must return finite", {"model": lambda x, t: x * math.nan}),
        (TypeError, "model must be callable", {"model": 3}),
        (RuntimeError, "max_evaluations must be", {"max_evaluations": 20}),
    ],
)
def test_bad_arguments_are_refused(error, message, more):
    arguments = {"model": epsilon(VP), "schedule": VP, **more}
    with pytest.raises(error, match=message):
        sample_adaptive(arguments.pop("model"), x=start(), **arguments)
