"""Solvers by name, each with the grid it is used with by default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.dpm_solver import dpmpp_2m
from fastdiff.solvers.grids import FINALS, TimeGrid, check_choice, explicit_grid, make_grid
from fastdiff.solvers.schedules import NoiseSchedule, get_schedule, unknown
from fastdiff.solvers.table import SolverTable

Grid = str | TimeGrid | Sequence[float] | np.ndarray | None


@dataclass(frozen=True)
class Solver:
    """A solver function and the conventions of its family.

    Calling it is calling ``build(schedule, grid, **options)``.
    spacing, convention: the grid when none is asked for; diffusers' default for this solver.
    stride: in parity mode and on whole-timestep spacings, a step goes to ``t - T//N``.
    final: the option that says where the last step goes, with its default: a spelling of
        "zero"/"sigma_min" or a truth value; None when it always goes to the clean sample.
    """

    name: str
    build: Callable[..., SolverTable]
    spacing: str
    convention: str
    stride: bool = False
    final: tuple[str, str | bool] | None = None

    def __call__(self, schedule: NoiseSchedule, grid: TimeGrid, **options: Any) -> SolverTable:
        return self.build(schedule, grid, **options)

    def options(self) -> tuple[str, ...]:
        """The names :func:`make_table` takes for this solver, beyond its own arguments."""
        parameters = inspect.signature(self.build).parameters.values()
        own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        own = [name for name in own if name not in ("prediction", "mode")]
        return (*own, "steps_offset", *([self.final[0]] if self.final else []))


def _first_order(
    schedule: NoiseSchedule, grid: TimeGrid, *, prediction: str = "eps", mode: str = "parity"
) -> SolverTable:
    """DPM-Solver++ of order 1."""
    return dpmpp_2m(schedule, grid, prediction=prediction, mode=mode, order=1)


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddpm", ddpm, "leading", "ddim"),
        Solver("ddim", ddim, "leading", "ddim", stride=True, final=("set_alpha_to_one", True)),
        Solver("dpmpp_1", _first_order, "linspace", "dpm", final=("final_sigmas_type", "zero")),
        Solver("dpmpp_2m", dpmpp_2m, "linspace", "dpm", final=("final_sigmas_type", "zero")),
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
    prediction: str = "eps",
    mode: str = "parity",
    guidance_scale: float | Sequence[float] = 1.0,
    **options: Any,
) -> SolverTable:
    """The table of a solver on a schedule: what ``fastdiff.sample`` runs.

    solver: a name in SOLVERS. schedule: a name in SCHEDULES, or a NoiseSchedule.
    steps: the number of model evaluations; not used when ``grid`` says where they are.
    grid: None (the solver's default spacing), the name of a spacing ("linspace", "leading",
        "trailing", "karras", "lambda"), a list of decreasing timesteps, or a TimeGrid.
    prediction: what the model predicts: "eps", "v" or "x0".
    mode: "parity" gives what diffusers gives, quirks included; "exact" the paper's mathematics.
    options: the solver's own (``eta``, ``variance_type``, ``order``, ``solver_type``,
        ``lower_order_final``, ``euler_at_final``) and the grid's: ``steps_offset``, and where the
        last step goes: ``final_sigmas_type`` ("zero", "sigma_min") or ``set_alpha_to_one``.

    Raises TypeError for an option the solver does not have, ValueError for a bad value.
    """
    chosen = get_solver(solver)
    schedule = get_schedule(schedule)
    for name in options:
        if name not in chosen.options():
            raise TypeError(
                f"{chosen.name} takes the options {', '.join(chosen.options())}, got {name!r}"
            )
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
        spacing = chosen.spacing if grid is None else grid
        if steps is None:
            raise ValueError("steps must be given unless grid lists the times, got None")
        stride = chosen.stride and mode == "parity" and spacing not in ("karras", "lambda")
        points = make_grid(
            schedule,
            steps,
            spacing,
            convention=chosen.convention,
            steps_offset=int(steps_offset),
            final=final,
            stride=stride,
            mode=mode,
        )
    else:
        points = explicit_grid(schedule, grid, final=final)
    table = chosen(schedule, points, prediction=prediction, mode=mode, **options)
    return table if guidance_scale == 1 else table.with_guidance(guidance_scale)
