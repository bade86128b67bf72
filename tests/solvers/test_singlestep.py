"""Solvers of several evaluations a step against their diffusers classes: same model, same noise.

As in ``test_level_parity.py``: in float32 as they are, and in float64 with float64 sigmas.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from mixture import Mixture
from reference import BETAS, PREDICTIONS, STEPS, check, cover, seeded, start
from test_level_parity import GRIDS, LEAST, ZERO, AtTheirTimes, run

import fastdiff
from fastdiff import solvers
from fastdiff.solvers import Flow

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:diffusers.*",
    "ignore::DeprecationWarning:numpy.*",
    "ignore:.*dpmsolver. is deprecated:FutureWarning",
)

HEUN = {"solver_type": "heun"}
ALL_ORDERS = {"lower_order_final": False}
# solver, its options, diffusers' options.
SINGLESTEP: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dpmpp_2s", ZERO, {}),
    ("dpmpp_2s", {**ZERO, **HEUN}, {}),
    ("dpmpp_2s", {**LEAST, **ALL_ORDERS}, {}),
    ("dpmpp_2s", {**LEAST, "lower_order_final": True}, {}),
    ("dpmpp_3s", ZERO, {"solver_order": 3}),
    ("dpmpp_3s", {**LEAST, **HEUN}, {"solver_order": 3}),
    ("dpmpp_3s", {**LEAST, "lower_order_final": True}, {"solver_order": 3}),
    ("dpm_2s", LEAST, {"algorithm_type": "dpmsolver"}),
    ("dpm_2s", {**LEAST, **HEUN}, {"algorithm_type": "dpmsolver"}),
    ("dpm_3s", LEAST, {"algorithm_type": "dpmsolver", "solver_order": 3}),
    ("dpm_3s", {**LEAST, **HEUN}, {"algorithm_type": "dpmsolver", "solver_order": 3}),
    ("dpmpp_2s_sde", ZERO, {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp_2s_sde", {**LEAST, **HEUN}, {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp_3s_sde", ZERO, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
]


@pytest.mark.parametrize(
    ("case", "prediction", "betas", "grid", "steps"),
    cover(
        60,
        list(range(len(SINGLESTEP))),
        PREDICTIONS,
        list(BETAS),
        ["linspace", "karras", "exponential", "beta"],
        [1, 2, 3, *STEPS, 21],
    ),
)
def test_dpm_singlestep(case, prediction, betas, grid, steps):
    solver, options, config = SINGLESTEP[case]
    if betas == "squaredcos_cap_v2" and grid != "linspace":
        betas = "linear"  # diffusers' times for those are a matter of luck
    # The noise of a model of x0 grows with the length of a step, and float32's roundings with it.
    grows = prediction == "sample" and solver in ("dpm_2s", "dpm_3s")
    if grows and betas == "squaredcos_cap_v2":
        betas = "linear"  # by 1e7 there
    if grid == "beta" and steps > 30:
        grid = "linspace"  # diffusers repeats timesteps there, and its index runs off the list
    kwargs = {**BETAS[betas], **config, **options}
    if grid != "linspace":
        kwargs |= GRIDS[grid]
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        beta_schedule=betas, prediction_type=prediction, **kwargs
    )
    schedule = solvers.from_diffusers(scheduler)
    table = solvers.make_table(solver, schedule, steps, grid=grid, prediction=prediction, **options)
    assert len(table) == steps
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    slack = 1 if grid in ("exponential", "beta") else 0
    np.testing.assert_allclose(table.times, times, atol=slack)
    final = options["final_sigmas_type"]
    points = solvers.make_grid(schedule, steps, grid, convention="dpm", final=final)
    wide = torch.from_numpy(np.exp(-np.append(points.lambdas, points.targets[-1])))
    torch.testing.assert_close(wide.float(), scheduler.sigmas, rtol=1e-5, atol=0)
    model = AtTheirTimes(table, times, Mixture(schedule, prediction))
    noise = 5 if table.num_draws else None
    draws = seeded(5) if table.num_draws else {}
    reference32 = run(scheduler, model, start(torch.float32), **draws)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = wide
    draws = seeded(5) if table.num_draws else {}
    reference64 = run(scheduler, model, start(torch.float64), **draws)
    if grows:
        result = fastdiff.sample(model, x=start(torch.float64), solver=model.table)
        torch.testing.assert_close(result, reference64, rtol=1e-10, atol=1e-10)
    else:
        check(model.table, model, reference32, reference64, noise=noise)


def test_part_of_a_singlestep_run_is_diffusers():
    """Started inside a step, diffusers begins a new one and keeps the order list's turns."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(solver_order=3)
    schedule = solvers.from_diffusers(scheduler)
    model = Mixture(schedule)
    for begin in range(6):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(begin)
        grid = solvers.make_grid(schedule, 10, "linspace", convention="dpm")
        wide = torch.from_numpy(np.exp(-np.append(grid.lambdas, np.inf)))
        scheduler.sigmas = wide
        x = start(torch.float64)
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(model(x, t), t, x).prev_sample
        table = solvers.make_table("dpmpp_3s", schedule, grid=grid.from_step(begin))
        check(table, model, x, x)


def widen_k_dpm_2(scheduler: Any, lambdas: np.ndarray, ancestral: bool, lost: int) -> None:
    """What set_timesteps of the two KDPM2 classes makes of sigmas, in float64."""
    sigmas = torch.from_numpy(np.exp(-np.append(lambdas, np.inf)))

    def double(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])

    down = following = sigmas.roll(-1)
    following[-1] = 0
    if ancestral:
        up = (following**2 * (sigmas**2 - following**2) / sigmas**2).sqrt()
        down = following**2 / sigmas  # the root of following^2 - up^2
        up[-1] = down[-1] = 0
        scheduler.sigmas_up, scheduler.sigmas_down = double(up), double(down)
    middle = (sigmas * down).sqrt()
    if not ancestral:
        middle = middle.roll(1)
    assert double(middle).shape == scheduler.sigmas_interpol.shape
    ours = double(middle).float()[: 2 * len(lambdas) - 1]
    theirs = scheduler.sigmas_interpol[: 2 * len(lambdas) - 1]
    first = lost if ancestral else 1  # entry 0 of the other is never read
    torch.testing.assert_close(ours[first:], theirs[first:], rtol=1e-3, atol=0)
    torch.testing.assert_close(double(sigmas).float(), scheduler.sigmas, rtol=1e-5, atol=0)
    scheduler.sigmas, scheduler.sigmas_interpol = double(sigmas), double(middle)


@pytest.mark.parametrize(
    ("solver", "prediction", "betas", "grid", "steps"),
    cover(
        40,
        ["dpm_2", "dpm_2_ancestral"],
        ["epsilon", "v_prediction"],
        list(BETAS),
        ["leading", "linspace", "trailing", "karras", "exponential", "beta"],
        [1, *STEPS],
    ),
)
def test_k_dpm_2(solver, prediction, betas, grid, steps):
    if betas == "squaredcos_cap_v2" and grid not in ("leading", "linspace", "trailing"):
        betas = "linear"
    if steps == 1 and grid in ("karras", "exponential", "beta"):
        grid = "trailing"  # diffusers' range of those is that of its linspace, which is [0]
    ancestral = solver.endswith("ancestral")
    kind = getattr(diffusers, f"KDPM2{'Ancestral' * ancestral}DiscreteScheduler")
    kwargs = {**BETAS[betas], **GRIDS[grid]}
    scheduler = kind(beta_schedule=betas, prediction_type=prediction, **kwargs)
    schedule = solvers.from_diffusers(scheduler)
    common = {"grid": grid, "steps_offset": kwargs.get("steps_offset", 0)}
    table = solvers.make_table(solver, schedule, steps, prediction=prediction, **common)
    assert len(table) == 2 * steps - 1
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    # Float32 takes the first sigma_down, after 20,000, as a difference of nearly equal squares.
    lost = [1] if ancestral and betas == "squaredcos_cap_v2" and steps > 1 else []
    expected = np.delete(times, lost)
    np.testing.assert_allclose(np.delete(table.times, lost), expected, rtol=2e-5, atol=2e-3)
    points = solvers.make_grid(schedule, steps, spacing=grid, convention="euler",
                               steps_offset=common["steps_offset"])  # fmt: skip
    model = AtTheirTimes(table, times, Mixture(schedule, prediction))
    draws = seeded(5) if ancestral else {}
    reference32 = run(scheduler, model, start(torch.float32), **draws)
    scheduler.set_timesteps(steps)
    widen_k_dpm_2(scheduler, points.lambdas, ancestral, len(lost))
    draws = seeded(5) if ancestral else {}
    reference64 = run(scheduler, model, start(torch.float64), **draws)
    check(model.table, model, reference32, reference64, noise=5 if ancestral else None)


class Path:
    """Brownian increments over sigma, normalised, from normals drawn in order: a noise sampler."""

    def __init__(self, seed: int, like: torch.Tensor) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.like = like
        self.end = -1.0
        self.walked = torch.zeros(())

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        z = torch.randn(self.like.shape, generator=self.generator, dtype=self.like.dtype)
        if float(sigma) != self.end:  # a first half: the walk begins at its sigma
            self.end, self.middle = float(sigma), sigma_next
            self.walked = (sigma - sigma_next).sqrt() * z
            return z
        whole = self.walked + (self.middle - sigma_next).sqrt() * z
        self.end = -1.0
        return whole / (sigma - sigma_next).sqrt()


@pytest.mark.parametrize(
    ("prediction", "betas", "grid", "steps"),
    cover(
        16,
        ["epsilon", "v_prediction"],
        ["linear", "scaled_linear"],
        ["leading", "linspace", "trailing", "karras"],
        [1, *STEPS],
    ),
)
def test_dpmpp_sde(prediction, betas, grid, steps, monkeypatch):
    """diffusers' class, with a path of ours in place of torchsde's."""
    if steps == 1 and grid == "karras":
        grid = "trailing"
    if "torchsde" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    kwargs = {**BETAS[betas], **GRIDS[grid]}
    scheduler = module.DPMSolverSDEScheduler(
        beta_schedule=betas, prediction_type=prediction, **kwargs
    )
    schedule = solvers.from_diffusers(scheduler)
    common = {"grid": grid, "steps_offset": kwargs.get("steps_offset", 0)}
    table = solvers.make_table("dpmpp_sde", schedule, steps, prediction=prediction, **common)
    assert table.num_draws == 2 * steps - 2
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    np.testing.assert_allclose(table.times, times, rtol=2e-5, atol=2e-3)
    points = solvers.make_grid(schedule, steps, spacing=grid, convention="euler",
                               steps_offset=common["steps_offset"])  # fmt: skip
    sigma = np.exp(-points.lambdas)
    wide = torch.from_numpy(np.concatenate([sigma[:1], np.repeat(sigma[1:], 2), [0.0]]))
    torch.testing.assert_close(wide.float(), scheduler.sigmas, rtol=1e-5, atol=0)
    model = AtTheirTimes(table, times, Mixture(schedule, prediction))
    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler.set_timesteps(steps)
        if dtype == torch.float64:
            scheduler.sigmas = wide
        scheduler.noise_sampler = Path(5, start(dtype))
        references.append(run(scheduler, model, start(dtype)))
    check(model.table, model, *references, noise=5)


@pytest.mark.parametrize(("steps", "shift"), list(itertools.product([1, 2, 7, 28], [1.0, 3.0])))
def test_flow_match_heun(steps, shift, monkeypatch):
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    # Float32's times, each once: one before the last may be repeated to the last bit.
    points = solvers.explicit_grid(Flow(), [times[0], *times[1::2]])
    table = solvers.heun(Flow(), points, prediction="flow")
    assert len(table) == 2 * steps - 1
    np.testing.assert_allclose(table.times, times, rtol=1e-15)
    sigma = points.times / 1000
    wide = torch.from_numpy(np.concatenate([sigma[:1], np.repeat(sigma[1:], 2), [0.0]]))
    torch.testing.assert_close(wide.float(), scheduler.sigmas, rtol=1e-6, atol=0)

    def model(x, t):
        return torch.tanh(x) * (1 + t.reshape(-1)[0].to(x.dtype) / 1000)

    references = []
    for dtype in (torch.float32, torch.float64):
        scheduler.set_timesteps(steps)
        x = start(dtype)
        if dtype == torch.float64:
            scheduler.sigmas = wide
            monkeypatch.setattr(torch.Tensor, "to", _kept(torch.Tensor.to))
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.double()), t, x).prev_sample
        monkeypatch.undo()
        references.append(x)
    check(table, model, *references)


def _kept(to):
    """Tensor.to without the cast to float32 that step() begins with."""
    return lambda self, *args, **kwargs: (
        self if args == (torch.float32,) else to(self, *args, **kwargs)
    )
