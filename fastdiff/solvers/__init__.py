"""Noise schedules, time grids and solvers: a solver is a function that returns a table.

>>> from fastdiff import solvers
>>> print(solvers.make_table("dpmpp_2m", "scaled_linear", 5))    # doctest: +SKIP

Adding a solver: a function (schedule, grid, *, prediction, mode, options) -> SolverTable in the
file of its family, and one line in SOLVERS (registry.py). Engines and kernels need nothing.
"""

from __future__ import annotations

from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.dpm_solver import dpmpp_2m
from fastdiff.solvers.grids import TimeGrid, explicit_grid, make_grid
from fastdiff.solvers.registry import SOLVERS, Solver, get_solver, make_table
from fastdiff.solvers.schedules import (
    SCHEDULES,
    DiscreteVP,
    NoiseSchedule,
    cosine,
    from_alphas_cumprod,
    from_betas,
    from_diffusers,
    get_schedule,
    linear,
    scaled_linear,
)
from fastdiff.solvers.table import PackedTable, Row, SolverTable, Update

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "DiscreteVP",
    "NoiseSchedule",
    "PackedTable",
    "Row",
    "Solver",
    "SolverTable",
    "TimeGrid",
    "Update",
    "cosine",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "explicit_grid",
    "from_alphas_cumprod",
    "from_betas",
    "from_diffusers",
    "get_schedule",
    "get_solver",
    "linear",
    "make_grid",
    "make_table",
    "scaled_linear",
]
