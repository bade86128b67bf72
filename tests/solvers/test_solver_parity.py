"""Tables against diffusers' schedulers: same model, same start, same noise.

In float64 the two agree to rounding, which shows that the coefficients are the same. In float32
they differ by less than 1e-5, with two exceptions. Where a step multiplies an eps model's output by
a large 1/alpha (20,000 on the cosine schedule), by that factor times float32's rounding. And on the
cosine schedule the variances of DDPM and eta = 1, which diffusers takes as differences of numbers
near 1, are off by one rounding of 1: their roots by up to 2^-12, or NaN where the difference comes
out negative.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from mixture import Mixture

import fastdiff
from fastdiff import solvers

diffusers = pytest.importorskip("diffusers")

BETAS: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]
STEPS = [5, 10, 20, 50]


def _cover(count: int, *axes: list) -> list[tuple]:
    """``count`` cases of the product of the axes, always the same, every pair of values in some."""
    chosen = random.Random(1).sample(list(itertools.product(*axes)), count)
    for (i, a), (j, b) in itertools.combinations(enumerate(axes), 2):
        seen = {(repr(case[i]), repr(case[j])) for case in chosen}
        missing = [p for p in itertools.product(a, b) if (repr(p[0]), repr(p[1])) not in seen]
        for first, second in missing:
            case = [axis[0] for axis in axes]
            case[i], case[j] = first, second
            chosen.append(tuple(case))
    return chosen


def _start(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def _widen(scheduler: Any) -> None:
    """Makes the scheduler compute in float64, from its own float32 alphas_cumprod."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        to_one = scheduler.config.set_alpha_to_one
        first = scheduler.alphas_cumprod[0]
        scheduler.final_alpha_cumprod = torch.ones_like(first) if to_one else first
    if hasattr(scheduler, "one"):
        scheduler.one = scheduler.one.double()


def _reference(scheduler: Any, model: Mixture, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **kwargs).prev_sample
    return x


def _seeded(seed: int) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(seed)}


def _check(table, model, reference32, reference64, noise=None, slack: float = 1e-5) -> None:
    ours = {}
    for dtype in (torch.float32, torch.float64):
        draws = {} if noise is None else _seeded(noise)
        ours[dtype] = fastdiff.sample(model, x=_start(dtype), solver=table, **draws)
        assert ours[dtype].dtype == dtype
        assert torch.isfinite(ours[dtype]).all()
    assert (ours[torch.float64] - reference64).abs().max() < 1e-10
    rounding = 4 * np.finfo(np.float32).eps * _magnification(table)
    gap = (ours[torch.float32] - reference32).abs().max()
    if slack > 1e-5 and torch.isnan(gap):
        return  # the root of a negative difference, see above
    assert gap < max(slack, rounding)


def _magnification(table) -> float:
    """The largest factor on a prediction's rounding: its two terms cancel, their rounding stays.

    A prediction acts on x in its own row and, kept in register 1, in the next.
    """
    factors = []
    for row, following in zip(table.rows, [*table.rows[1:], None], strict=True):
        uses = abs(row.updates[0].from_prediction)
        if following is not None and table.num_registers > 1:
            uses += abs(following.updates[0].from_registers[1])
        factors.append(abs(row.from_state) * uses)
    return max(factors)


def _stochastic(kind: str, steps: int, config: dict[str, Any], options: dict, call: dict) -> None:
    """DDIM and DDPM, whose schedulers can be widened to float64."""
    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler = getattr(diffusers, kind)(clip_sample=False, **config)
        schedule = solvers.from_diffusers(scheduler)
        model = Mixture(schedule, config["prediction_type"])
        if dtype == torch.float64:
            _widen(scheduler)
        scheduler.set_timesteps(steps)
        references.append(_reference(scheduler, model, _start(dtype), **call, **_seeded(5)))
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
    _check(table, model, *references, noise=5, slack=slack)


@pytest.mark.parametrize(
    ("prediction", "betas", "spacing", "steps", "eta", "offset", "to_one"),
    _cover(40, PREDICTIONS, list(BETAS), SPACINGS, STEPS, [0.0, 0.5, 1.0], [0, 1], [True, False]),
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
    _cover(
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


GRIDS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "lambda": {"use_lu_lambdas": True},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"solver_type": "heun"},
    {"order": 1},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
]


@pytest.mark.parametrize(
    ("prediction", "betas", "spacing", "steps", "options"),
    _cover(60, PREDICTIONS, list(BETAS), list(GRIDS), STEPS, OPTIONS),
)
def test_dpmpp_2m(prediction, betas, spacing, steps, options, monkeypatch):
    if betas == "squaredcos_cap_v2" and spacing in ("karras", "lambda"):
        betas = "linear"  # diffusers' times for those are a matter of luck: test_cosine_levels
    config = {("solver_order" if k == "order" else k): v for k, v in options.items()}
    config |= GRIDS[spacing] | BETAS[betas]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=betas, prediction_type=prediction, **config
    )
    scheduler.set_timesteps(steps)
    schedule = solvers.from_diffusers(scheduler)
    model = Mixture(schedule, prediction)
    offset = config.get("steps_offset", 0)
    table = solvers.make_table(
        "dpmpp_2m",
        schedule,
        steps,
        grid=spacing,
        prediction=prediction,
        steps_offset=offset,
        **options,
    )
    assert list(table.times) == scheduler.timesteps.tolist()

    sigmas = _sigmas(schedule, steps, spacing, offset, options.get("final_sigmas_type", "zero"))
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=2e-6, atol=0)
    reference32 = _reference(scheduler, model, _start(torch.float32))
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas
    to = torch.Tensor.to

    def keep_float64(self, *args, **kwargs):
        return self if args == (torch.float32,) else to(self, *args, **kwargs)

    with monkeypatch.context() as patch:  # step() casts the sample to float32
        patch.setattr(torch.Tensor, "to", keep_float64)
        reference64 = _reference(scheduler, model, _start(torch.float64))
    _check(table, model, reference32, reference64)


def _sigmas(schedule, steps, spacing, offset=0, final="zero") -> torch.Tensor:
    grid = solvers.make_grid(
        schedule, steps, spacing, convention="dpm", steps_offset=offset, final=final
    )
    return torch.from_numpy(np.exp(-np.append(grid.lambdas, grid.targets[-1])))


@pytest.mark.parametrize("spacing", ["karras", "lambda"])
def test_cosine_levels(spacing):
    """diffusers truncates the times of these grids, and its float32 logarithm makes 999 a 998."""
    for steps in STEPS:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            beta_schedule="squaredcos_cap_v2", **GRIDS[spacing]
        )
        scheduler.set_timesteps(steps)
        schedule = solvers.from_diffusers(scheduler)
        table = solvers.make_table("dpmpp_2m", schedule, steps, grid=spacing)
        times = scheduler.timesteps.tolist()
        assert max(abs(a - b) for a, b in zip(table.times, times, strict=True)) <= 1
        sigmas = _sigmas(schedule, steps, spacing)
        torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=2e-6, atol=0)


@pytest.mark.parametrize("betas", list(BETAS))
def test_named_schedules_are_diffusers_up_to_its_float32_rounding(betas):
    scheduler = diffusers.DDIMScheduler(beta_schedule=betas, **BETAS[betas])
    theirs = solvers.from_diffusers(scheduler).alphas_cumprod
    ours = solvers.get_schedule(betas).alphas_cumprod
    # A product of 1000 float32 numbers; 1 - 0.999, the last of the cosine betas, is off by 1.3e-5.
    np.testing.assert_allclose(theirs, ours, rtol=5e-5)
