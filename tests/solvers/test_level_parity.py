"""Solvers whose diffusers classes step through a list of sigmas, and LCM: same model, same noise.

Each runs in float32 as it is and, with float64 sigmas in place of its own, in float64. Between
whole timesteps the times handed to the model are diffusers' to float32's rounding; the comparison
of the steps uses diffusers'.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from mixture import Mixture
from reference import BETAS, PREDICTIONS, STEPS, check, cover, seeded, start, widen

from fastdiff import solvers
from fastdiff.solvers import SolverTable

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

GRIDS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lambda": {"use_lu_lambdas": True},
}
ZERO, LEAST = {"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}
# solver, its options, diffusers' class, what they are called there.
DPM = "DPMSolverMultistepScheduler"
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("dpmpp_1", ZERO, DPM, {"solver_order": 1}),
    ("dpmpp_2m", ZERO, DPM, {}),
    ("dpmpp_2m", {**ZERO, "solver_type": "heun"}, DPM, {"solver_type": "heun"}),
    ("dpmpp_2m", LEAST, DPM, {}),
    ("dpmpp_2m", {**LEAST, "euler_at_final": True}, DPM, {"euler_at_final": True}),
    ("dpmpp_2m", {**LEAST, "lower_order_final": False}, DPM, {"lower_order_final": False}),
    ("dpmpp_3m", ZERO, DPM, {"solver_order": 3}),
    ("dpmpp_3m", {**LEAST, "lower_order_final": False}, DPM, {"solver_order": 3}),
    ("dpm_1", LEAST, DPM, {"algorithm_type": "dpmsolver", "solver_order": 1}),
    ("dpm_2m", LEAST, DPM, {"algorithm_type": "dpmsolver"}),
    (
        "dpm_2m",
        {**LEAST, "solver_type": "heun"},
        DPM,
        {"algorithm_type": "dpmsolver", "solver_type": "heun"},
    ),
    ("dpm_3m", LEAST, DPM, {"algorithm_type": "dpmsolver", "solver_order": 3}),
    ("dpmpp_2m_sde", ZERO, DPM, {"algorithm_type": "sde-dpmsolver++"}),
    (
        "dpmpp_2m_sde",
        {**ZERO, "solver_type": "heun"},
        DPM,
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    ("dpm_2m_sde", LEAST, DPM, {"algorithm_type": "sde-dpmsolver"}),
    *(
        (
            "unipc",
            {"order": order, "solver_type": kind, "predict_x0": x0, **(ZERO if x0 else LEAST)},
            "UniPCMultistepScheduler",
            {"solver_order": order, "solver_type": kind, "predict_x0": x0},
        )
        for order, kind, x0 in [
            (1, "bh2", True),
            (2, "bh2", True),
            (3, "bh2", True),
            (2, "bh2", False),
            (3, "bh1", False),
        ]
    ),
    (
        "unipc",
        {**ZERO, "disable_corrector": (0, 1)},
        "UniPCMultistepScheduler",
        {"disable_corrector": [0, 1]},
    ),
    *(
        ("deis", {"order": order, **LEAST}, "DEISMultistepScheduler", {"solver_order": order})
        for order in (1, 2, 3)
    ),
    ("euler", ZERO, "EulerDiscreteScheduler", {}),
    ("euler_ancestral", ZERO, "EulerAncestralDiscreteScheduler", {}),
    ("heun", ZERO, "HeunDiscreteScheduler", {}),
    ("lms", ZERO, "LMSDiscreteScheduler", {}),
]
EULERS = ("euler", "euler_ancestral", "heun", "lms")


def supported(solver: str, grid: str, prediction: str) -> bool:
    """Whether diffusers' class takes the combination."""
    if solver == "euler_ancestral" and grid not in ("leading", "linspace", "trailing"):
        return False
    if solver in ("unipc", "deis") and grid == "lambda":
        return False
    return solver not in EULERS or (grid != "lambda" and prediction != "sample")


class AtTheirTimes:
    """The table with the times diffusers gives the model, and a model that rounds them alike."""

    def __init__(self, table: SolverTable, times: list[float], mixture: Mixture) -> None:
        rows = (
            dataclasses.replace(row, time=time) for row, time in zip(table.rows, times, strict=True)
        )
        self.table = dataclasses.replace(table, rows=tuple(rows))
        self.mixture = mixture

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.mixture(x, t.reshape(-1)[:1].float())


def run(scheduler: Any, model: Any, z: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    x = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, **kwargs).prev_sample
    return x


def levels(table_grid: solvers.TimeGrid, repeated: bool) -> torch.Tensor:
    sigma = np.exp(-np.append(table_grid.lambdas, table_grid.targets[-1]))
    if repeated:  # HeunDiscreteScheduler holds every level between the ends twice
        sigma = np.concatenate([sigma[:1], np.repeat(sigma[1:-1], 2), sigma[-1:]])
    return torch.from_numpy(sigma)


@pytest.mark.parametrize(
    ("case", "prediction", "betas", "grid", "steps"),
    cover(140, list(range(len(CASES))), PREDICTIONS, list(BETAS), list(GRIDS), STEPS),
)
def test_levels(case, prediction, betas, grid, steps, monkeypatch):
    solver, options, kind, config = CASES[case]
    if not supported(solver, grid, prediction):
        grid, prediction = "linspace", "epsilon"
    if betas == "squaredcos_cap_v2" and grid not in ("leading", "linspace", "trailing"):
        betas = "linear"  # diffusers' times for those are a matter of luck
    kwargs = {**BETAS[betas], **GRIDS[grid], **config}
    if solver in ("dpm_1", "dpm_2m", "dpm_3m", "dpm_2m_sde", "unipc") or kind == DPM:
        kwargs |= {k: v for k, v in options.items() if k in ("final_sigmas_type",)}
        for name in ("lower_order_final", "euler_at_final"):
            if name in options:
                kwargs[name] = options[name]
    scheduler = getattr(diffusers, kind)(beta_schedule=betas, prediction_type=prediction, **kwargs)
    schedule = solvers.from_diffusers(scheduler)
    offset = kwargs.get("steps_offset", 0)
    common = {"grid": grid, "prediction": prediction, "steps_offset": offset}
    table = solvers.make_table(solver, schedule, steps, **common, **options)
    level_grid = grid not in ("leading", "linspace", "trailing")
    last_is_empty = level_grid and options["final_sigmas_type"] == "sigma_min"
    if last_is_empty and (options.get("solver_type") == "heun" or "3" in solver):
        pytest.skip("diffusers divides 0 by 0 in the empty last step")
    if grid == "beta" and steps > 30:
        pytest.skip("diffusers repeats timesteps there, and its index runs off the list")
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    # Float32 logarithms, and under a cast to whole timesteps one of them may be the next.
    slack = 1 if grid in ("exponential", "beta") else 2e-3 if solver in EULERS else 0
    np.testing.assert_allclose(table.times, times, rtol=2e-5, atol=slack)

    convention = "euler" if solver in EULERS else "dpm"
    points = solvers.make_grid(
        schedule,
        steps,
        grid,
        convention=convention,
        steps_offset=offset,
        final=options["final_sigmas_type"],
    )
    wide = levels(points, solver == "heun")
    torch.testing.assert_close(wide.float(), scheduler.sigmas.float(), rtol=1e-5, atol=0)
    stochastic = table.num_draws > 0
    model = AtTheirTimes(table, times, Mixture(schedule, prediction))
    draws = seeded(5) if stochastic else {}
    reference32 = run(scheduler, model, start(torch.float32), **draws)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = wide
    to = torch.Tensor.to

    def keep_float64(self, *args, **kwargs):
        if args == (torch.float32,) or kwargs == {"dtype": torch.float32}:
            return self
        return to(self, *args, **kwargs)

    draws = seeded(5) if stochastic else {}

    def draw_float64(shape, generator, device, dtype):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    with monkeypatch.context() as patch:  # step() casts the sample to float32, and draws in it
        patch.setattr(torch.Tensor, "to", keep_float64)
        if kind == DPM:
            patch.setattr(f"{scheduler.__module__}.randn_tensor", draw_float64)
        reference64 = run(scheduler, model, start(torch.float64), **draws)
    check(model.table, model, reference32, reference64, noise=5 if stochastic else None)


@pytest.mark.parametrize(
    ("prediction", "betas", "steps"), list(itertools.product(PREDICTIONS, BETAS, [1, 4, 8]))
)
def test_lcm(prediction, betas, steps, monkeypatch):
    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler = diffusers.LCMScheduler(
            beta_schedule=betas, prediction_type=prediction, clip_sample=False, **BETAS[betas]
        )
        schedule = solvers.from_diffusers(scheduler)
        model = Mixture(schedule, prediction)
        if dtype == torch.float64:
            widen(scheduler)
            scalings = scheduler.get_scalings_for_boundary_condition_discrete
            monkeypatch.setattr(
                scheduler,
                "get_scalings_for_boundary_condition_discrete",
                lambda t, scalings=scalings: scalings(t.double()),
            )
        scheduler.set_timesteps(steps)
        references.append(run(scheduler, model, start(dtype), **seeded(5)))
    table = solvers.make_table("lcm", schedule, steps, prediction=prediction)
    assert list(table.times) == scheduler.timesteps.tolist()
    check(table, model, *references, noise=5)


@pytest.mark.parametrize(
    ("prediction", "betas", "spacing", "steps", "to_one"),
    cover(
        20,
        ["epsilon", "v_prediction"],
        list(BETAS),
        ["leading", "linspace", "trailing"],
        STEPS,
        [True, False],
    ),
)
def test_pndm(prediction, betas, spacing, steps, to_one):
    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler = diffusers.PNDMScheduler(
            beta_schedule=betas,
            prediction_type=prediction,
            skip_prk_steps=True,
            set_alpha_to_one=to_one,
            timestep_spacing=spacing,
            **BETAS[betas],
        )
        schedule = solvers.from_diffusers(scheduler)
        model = Mixture(schedule, prediction)
        if dtype == torch.float64:
            widen(scheduler)
        scheduler.set_timesteps(steps)
        references.append(run(scheduler, model, start(dtype)))
    options = {"grid": spacing, "prediction": prediction, "set_alpha_to_one": to_one}
    table = solvers.make_table("pndm", schedule, steps, **options)
    assert list(table.times) == scheduler.timesteps.tolist()
    check(table, model, *references)


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
        grid = solvers.make_grid(schedule, steps, spacing, convention="dpm")
        torch.testing.assert_close(levels(grid, False).float(), scheduler.sigmas, rtol=2e-6, atol=0)
