"""k-diffusion's convention: a denoiser, sigmas, and x = x0 + sigma z. Its samplers, written out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import solvers

SIGMAS = [14.6, 8.0, 4.1, 2.0, 0.9, 0.4, 0.1, 0.0]


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    s = sigma.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return 0.8 * torch.tanh(x / (1 + s * s)) + 0.1 * x / (1 + s * s)


def start() -> Tensor:
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return SIGMAS[0] * z


def model(x: Tensor, sigma: float) -> Tensor:
    return denoise(x, torch.full((len(x),), sigma, dtype=torch.float64))


def euler(x: Tensor, **_: Any) -> Tensor:
    for s, to in itertools.pairwise(SIGMAS):
        x = x + (to - s) * (x - model(x, s)) / s
    return x


def heun(x: Tensor, **_: Any) -> Tensor:
    for s, to in itertools.pairwise(SIGMAS):
        d = (x - model(x, s)) / s
        moved = x + (to - s) * d
        if to > 0:
            d = (d + (moved - model(moved, to)) / to) / 2
        x = x + (to - s) * d
    return x


def ancestral(x: Tensor, draw: Any) -> Tensor:
    for s, to in itertools.pairwise(SIGMAS):
        up = to * math.sqrt(s * s - to * to) / s
        down = math.sqrt(to * to - up * up)
        x = x + (down - s) * (x - model(x, s)) / s
        if to > 0:
            x = x + up * draw()
    return x


def dpmpp_2m(x: Tensor, **_: Any) -> Tensor:
    before, last = None, 0.0
    for s, to in itertools.pairwise(SIGMAS):
        d = model(x, s)
        if to == 0:
            return d
        h = math.log(s / to)
        used = d
        if before is not None:
            r = last / h
            used = (1 + 1 / (2 * r)) * d - before / (2 * r)
        x = to / s * x - math.expm1(-h) * used
        before, last = d, h
    return x


@pytest.mark.parametrize(
    ("solver", "by_hand"),
    [
        ("euler", euler),
        ("heun", heun),
        ("euler_ancestral", ancestral),
        ("dpmpp_2m", dpmpp_2m),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_its_samplers(solver, by_hand, kind):
    generator = torch.Generator().manual_seed(5)

    def draw() -> Tensor:
        return torch.randn(2, 8, generator=generator, dtype=torch.float64)

    expected = by_hand(start(), draw=draw)
    result = fastdiff.sample(
        denoise,
        x=start(),
        sigmas=kind(SIGMAS) if kind is not torch.tensor else kind(SIGMAS, dtype=torch.float64),
        solver=solver,
        mode="exact",
        generator=torch.Generator().manual_seed(5),
    )
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_drawn_noise_has_the_first_sigma_and_the_model_sees_sigmas():
    seen = []

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        if not seen:
            assert x.std().item() == pytest.approx(14.6, rel=0.05)
        seen.append(float(sigma[0]))
        return denoise(x, sigma)

    fastdiff.sample(watched, (4, 1000), sigmas=SIGMAS, seed=0)
    np.testing.assert_allclose(seen, SIGMAS[:-1], rtol=1e-6)


def test_ending_above_zero():
    ended = fastdiff.sample(denoise, x=start(), sigmas=SIGMAS[:-1], solver="euler")
    x = start()
    for s, to in itertools.pairwise(SIGMAS[:-1]):
        x = x + (to - s) * (x - model(x, s)) / s
    torch.testing.assert_close(ended, x, rtol=1e-12, atol=1e-12)


def test_sigmas_of_a_schedule_with_its_own_times():
    """The levels of an eps model on timesteps: what a sigma means does not depend on the model."""
    schedule = solvers.scaled_linear()
    grid = solvers.make_grid(schedule, 7, "karras", convention="euler")
    sigmas = [*np.exp(-grid.lambdas), 0.0]

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * (0.5 + t.reshape(-1, 1) / 2000)

    common = {"schedule": schedule, "prediction": "eps", "x": start() / 14.6}
    by_levels = fastdiff.sample(eps, sigmas=sigmas, **common)
    by_grid = fastdiff.sample(eps, grid=grid, **common)
    torch.testing.assert_close(by_levels, by_grid, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("message", "sigmas"),
    [
        ("sigmas must be finite", [math.inf, 1.0, 0.0]),
        ("sigmas must be finite and start above 0", [0.0]),
        ("sigmas must", [1.0, 2.0, 0.0]),
        ("sigmas must", [1.0, 1.0, 0.0]),
        ("sigmas must", []),
        ("sigmas must", [[1.0, 0.0]]),
        ("sigmas must", [3.0, -1.0]),
    ],
)
def test_bad_sigmas_are_refused(message, sigmas):
    with pytest.raises(ValueError, match=message):
        fastdiff.sample(denoise, x=start(), sigmas=sigmas)


def test_sigmas_and_a_grid_exclude_each_other():
    with pytest.raises(ValueError, match="grid must be None when sigmas"):
        fastdiff.sample(denoise, x=start(), sigmas=SIGMAS, grid="karras")
    table = solvers.make_table("euler", "linear", 5)
    with pytest.raises(TypeError, match="takes no options"):
        fastdiff.sample(denoise, x=start(), sigmas=SIGMAS, solver=table)
