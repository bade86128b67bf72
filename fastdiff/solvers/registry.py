"""Solvers by name, each with the grid it is used with by default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastdiff.solvers.adams import deis, lms, pndm, pndm_part_way
from fastdiff.solvers.ancestral import dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde
from fastdiff.solvers.best_linear import best_linear
from fastdiff.solvers.consistency import consistency, consistency_grid, lcm, lcm_grid, tcd
from fastdiff.solvers.ddim import ddim, ddim_inverse
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.dpm_solver import dpm_multistep
from fastdiff.solvers.grids import (
    FINALS,
    STRIDED,
    TimeGrid,
    check_choice,
    explicit_grid,
    make_grid,
    sigma_grid,
)
from fastdiff.solvers.langevin import annealed_langevin
from fastdiff.solvers.named import get_schedule
from fastdiff.solvers.runge_kutta import edm_stochastic, heun, midpoint
from fastdiff.solvers.schedules import DiscreteVP, NoiseSchedule, unknown
from fastdiff.solvers.score_sde import pc, sde_grid
from fastdiff.solvers.singlestep import dpm_fast, dpm_singlestep
from fastdiff.solvers.table import SolverTable
from fastdiff.solvers.unipc import unipc

# Grids that belong to a solver: functions of (schedule, steps, *, final).
OWN_GRIDS: dict[str, Callable[..., TimeGrid]] = {
    "lcm": lcm_grid,
    "consistency": consistency_grid,
    "sde": sde_grid,
}
Grid = str | TimeGrid | Sequence[float] | np.ndarray | None


@dataclass(frozen=True)
class Solver:
    """A solver function and the conventions of its family.

    Calling it is calling ``build(schedule, grid, **options)``.
    spacing, convention: the grid when none is asked for; diffusers' default for this solver.
    own_spacing: ``spacing`` goes before the schedule's own.
    stride: in parity mode and on whole-timestep spacings, a step goes to ``t - T//N``.
    final: the option that says where the last step goes, with its default: a spelling of
        "zero"/"sigma_min" or a truth value; None when it always goes to the clean sample.
    fixed: options of ``build`` that the name decides.
    part_way: in parity mode, the table of a run that leaves out the grid's first steps, where it is
        not that of the rest of the grid; ``part_way(schedule, grid, start, prediction=)``.
    """

    name: str
    build: Callable[..., SolverTable]
    spacing: str
    convention: str
    stride: bool = False
    final: tuple[str, str | bool] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    own_spacing: bool = False
    part_way: Callable[..., SolverTable] | None = None

    def __call__(self, schedule: NoiseSchedule, grid: TimeGrid, **options: Any) -> SolverTable:
        table = self.build(schedule, grid, **self.fixed, **options)
        return table if table.name == self.name else replace(table, name=self.name)

    def options(self) -> tuple[str, ...]:
        """The names :func:`make_table` takes for this solver, beyond its own arguments."""
        parameters = inspect.signature(self.build).parameters.values()
        own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        own = [name for name in own if name not in ("prediction", "mode", *self.fixed)]
        return (*own, "steps_offset", *([self.final[0]] if self.final else []))


def _dpm(
    name: str,
    order: int,
    algorithm: str = "dpmsolver++",
    build: Callable[..., SolverTable] = dpm_multistep,
) -> Solver:
    final = "zero" if algorithm.endswith("++") else "sigma_min"
    fixed = {"order": order, "algorithm_type": algorithm}
    return Solver(name, build, "linspace", "dpm", final=("final_sigmas_type", final), fixed=fixed)


_LEVELS = ("final_sigmas_type", "zero")
_LEAST = ("final_sigmas_type", "sigma_min")
_ALPHA = "set_alpha_to_one"
SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddpm", ddpm, "leading", "ddim"),
        Solver("ddim", ddim, "leading", "ddim", stride=True, final=(_ALPHA, True)),
        Solver(
            *("pndm", pndm, "leading", "ddim"),
            stride=True,
            final=(_ALPHA, False),
            part_way=pndm_part_way,
        ),
        _dpm("dpmpp_1", 1),
        _dpm("dpmpp_2m", 2),
        _dpm("dpmpp_3m", 3),
        _dpm("dpmpp_2m_sde", 2, "sde-dpmsolver++"),
        _dpm("dpmpp_3m_sde", 3, "sde-dpmsolver++"),
        _dpm("dpm_1", 1, "dpmsolver"),
        _dpm("dpm_2m", 2, "dpmsolver"),
        _dpm("dpm_3m", 3, "dpmsolver"),
        _dpm("dpm_2m_sde", 2, "sde-dpmsolver"),
        _dpm("dpmpp_2s", 2, build=dpm_singlestep),
        _dpm("dpmpp_3s", 3, build=dpm_singlestep),
        _dpm("dpmpp_2s_sde", 2, "sde-dpmsolver++", dpm_singlestep),
        _dpm("dpmpp_3s_sde", 3, "sde-dpmsolver++", dpm_singlestep),
        _dpm("dpm_2s", 2, "dpmsolver", dpm_singlestep),
        _dpm("dpm_3s", 3, "dpmsolver", dpm_singlestep),
        Solver("dpm_fast", dpm_fast, "lambda", "euler", final=_LEAST),
        Solver("unipc", unipc, "linspace", "dpm", final=_LEVELS),
        Solver("deis", deis, "linspace", "dpm", final=_LEAST),
        # In sigma/alpha Euler's method is DDIM, and with ancestral noise its eta = 1.
        Solver("euler", ddim, "linspace", "euler", final=_LEVELS, fixed={"eta": 0.0}),
        Solver("euler_ancestral", ddim, "linspace", "euler", final=_LEVELS, fixed={"eta": 1.0}),
        Solver("heun", heun, "linspace", "euler", final=_LEVELS),
        Solver("midpoint", midpoint, "linspace", "euler", final=_LEVELS),
        Solver("edm_stochastic", edm_stochastic, "linspace", "euler", final=_LEVELS),
        Solver("dpm_2", dpm_2, "linspace", "euler", final=_LEVELS),
        Solver("dpm_2_ancestral", dpm_2_ancestral, "linspace", "euler", final=_LEVELS),
        Solver("dpmpp_2s_ancestral", dpmpp_2s_ancestral, "linspace", "euler", final=_LEVELS),
        Solver("dpmpp_sde", dpmpp_sde, "linspace", "euler", final=_LEVELS),
        Solver("lms", lms, "linspace", "euler", final=_LEVELS),
        Solver("ddim_inverse", ddim_inverse, "leading", "ddim", stride=True, final=(_ALPHA, True)),
        Solver("lcm", lcm, "lcm", "ddim", own_spacing=True),
        Solver("tcd", tcd, "lcm", "ddim", final=_LEAST, own_spacing=True),
        Solver("consistency", consistency, "consistency", "ddim", own_spacing=True),
        Solver("pc", pc, "sde", "ddim", own_spacing=True),
        Solver("annealed_langevin", annealed_langevin, "lambda", "ddim", own_spacing=True),
        Solver("best_linear", best_linear, "angle", "dpm", final=_LEVELS, own_spacing=True),
    )
}


def get_solver(name: str | Solver) -> Solver:
    """A solver by name; ValueError for an unknown name, with the nearest ones."""
    if isinstance(name, Solver):
        return name
    if not isinstance(name, str):
        raise TypeError(f"solver must be a name or a Solver, got {type(name).__name__}")
    if name not in SOLVERS:
        raise ValueError(unknown("solver", name, list(SOLVERS)))
    return SOLVERS[name]


def make_table(
    solver: str | Solver,
    schedule: str | NoiseSchedule,
    steps: int | None = None,
    *,
    grid: Grid = None,
    sigmas: Sequence[float] | np.ndarray | None = None,
    prediction: str = "eps",
    mode: str = "parity",
    guidance_scale: float | Sequence[float] = 1.0,
    strength: float = 1.0,
    **options: Any,
) -> SolverTable:
    """The table of a solver on a schedule: what ``fastdiff.sample`` runs.

    solver: a name in SOLVERS. schedule: a name in SCHEDULES, or a NoiseSchedule.
    steps: the number of the grid's steps, for most solvers that of model evaluations (see their
        docstrings); not used when ``grid`` says where they are.
    grid: None (the schedule's own spacing, or the solver's), the name of a spacing ("linspace",
        "leading", "trailing", "quadratic", "sgm_uniform", "karras", "lambda", "exponential",
        "beta", "ays_sd15", "ays_sdxl", "ays_svd", "angle", and the solvers' own "lcm",
        "consistency", "sde"), a list of decreasing timesteps, or a TimeGrid.
    sigmas: instead of a grid, the values of sigma/alpha the run goes through, decreasing; the last
        is where it ends, 0 at the clean sample (:func:`sigma_grid`).
    prediction: what the model predicts: "eps", "v", "x0", "flow", "score" or "edm".
    strength: only the last int(strength*N) of the grid's N steps, for image-to-image; a multistep
        solver starts there with its first order, and what depends on the number of steps uses N.
    mode: "parity" gives what diffusers gives, quirks included; "exact" the paper's mathematics.
    options: the solver's own (``Solver.options()`` lists them) and the grid's: ``steps_offset``,
        and where the last step goes: ``final_sigmas_type`` ("zero", "sigma_min") or
        ``set_alpha_to_one``.

    Raises TypeError for an option the solver does not have, ValueError for a bad value.
    """
    chosen = get_solver(solver)
    schedule = get_schedule(schedule)
    for name in options:
        if name not in chosen.options():
            raise TypeError(
                f"{chosen.name} takes the options {', '.join(chosen.options())}, got {name!r}"
            )
    if sigmas is not None:
        if grid is not None:
            raise ValueError("grid must be None when sigmas are given, got both")
        if chosen.final and chosen.final[0] in options:
            raise ValueError(
                f"{chosen.final[0]} must not be given with sigmas, whose last value says where the "
                f"run ends, got {options[chosen.final[0]]!r}"
            )
        grid = sigma_grid(schedule, sigmas)
    final = "zero"
    if chosen.final:
        value = options.pop(chosen.final[0], chosen.final[1])
        if isinstance(chosen.final[1], bool):
            final = "zero" if value else "sigma_min"
        else:
            check_choice(chosen.final[0], value, FINALS)
            final = value
    steps_offset = options.pop("steps_offset", 0)
    if isinstance(steps_offset, bool) or not isinstance(steps_offset, (int, np.integer)):
        raise TypeError(f"steps_offset must be an integer, got {type(steps_offset).__name__}")
    if isinstance(grid, TimeGrid):
        points = grid
    elif grid is None or isinstance(grid, str):
        spacing = grid or (None if chosen.own_spacing else schedule.spacing) or chosen.spacing
        if steps is None:
            raise ValueError("steps must be given unless grid or sigmas list them, got None")
        scale = options.get("data_std", 1.0)
        points = _named_grid(
            chosen, schedule, steps, spacing, int(steps_offset), final, mode, scale
        )
    else:
        points = explicit_grid(schedule, grid, final=final)
    start = start_of(len(points), strength) if strength != 1 else 0
    if start and chosen.part_way is not None and mode == "parity":
        table = chosen.part_way(schedule, points, start, prediction=prediction)
    else:
        points = points.from_step(start)
        table = chosen(schedule, points, prediction=prediction, mode=mode, **options)
    if chosen.convention == "euler" and not points.name.startswith("leading"):
        # diffusers' init_noise_sigma: these classes start from the noise alone.
        sigma = float(schedule.marginal(points.lambdas[0])[1])
        table = replace(table, init_scale=sigma)
    return table if guidance_scale == 1 else table.with_guidance(guidance_scale)


def start_of(steps: int, strength: float) -> int:
    """The first step of an image-to-image run, as in diffusers' pipelines.

    Raises ValueError where no step is left.
    """
    start = steps - min(int(steps * strength), steps)
    if start >= steps:
        raise ValueError(f"strength must be at least 1/steps ({1 / steps:g}), got {strength}")
    return start


def _named_grid(
    solver: Solver,
    schedule: NoiseSchedule,
    steps: int,
    spacing: str,
    steps_offset: int,
    final: str,
    mode: str,
    data_std: float,
) -> TimeGrid:
    if spacing in OWN_GRIDS:
        return OWN_GRIDS[spacing](schedule, steps, final=final)
    discrete = isinstance(schedule, DiscreteVP)
    if not discrete and spacing in ("leading", "trailing", "sgm_uniform"):
        spacing = "linspace"  # in continuous time there is one uniform grid
    equal_strides = discrete and spacing in STRIDED
    return make_grid(
        schedule,
        steps,
        spacing,
        convention=solver.convention,
        steps_offset=steps_offset,
        final=final,
        stride=solver.stride and mode == "parity" and equal_strides,
        mode=mode,
        data_std=data_std,
    )
