"""Noise schedules, time grids and solvers: a solver is a function that returns a table.

>>> from fastdiff import solvers
>>> print(solvers.make_table("dpmpp_2m", "scaled_linear", 5))    # doctest: +SKIP

Adding a solver: a function (schedule, grid, *, prediction, mode, options) -> SolverTable in the
file of its family, and one line in SOLVERS (registry.py). Engines and kernels need nothing.
"""

from __future__ import annotations

from fastdiff.solvers.adams import deis, lms, pndm
from fastdiff.solvers.ancestral import dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde
from fastdiff.solvers.best_linear import best_linear
from fastdiff.solvers.consistency import consistency, consistency_grid, lcm, lcm_grid, tcd
from fastdiff.solvers.continuous import (
    ContinuousVP,
    Flow,
    SigmaSchedule,
    cm,
    dynamic_shift,
    edm,
    ve,
)
from fastdiff.solvers.ddim import ddim, ddim_inverse
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.dpm_solver import dpm_multistep
from fastdiff.solvers.grids import TimeGrid, explicit_grid, make_grid, sigma_grid
from fastdiff.solvers.langevin import annealed_langevin
from fastdiff.solvers.named import SCHEDULES, get_schedule
from fastdiff.solvers.registry import SOLVERS, Solver, get_solver, make_table
from fastdiff.solvers.runge_kutta import edm_stochastic, heun, midpoint
from fastdiff.solvers.schedules import (
    DiscreteVP,
    NoiseSchedule,
    cosine,
    from_alphas_cumprod,
    from_betas,
    from_diffusers,
    linear,
    scaled_linear,
    sigmoid,
    zero_terminal_snr,
)
from fastdiff.solvers.score_sde import pc, sde_grid
from fastdiff.solvers.singlestep import dpm_fast, dpm_singlestep
from fastdiff.solvers.table import PackedTable, Row, SolverTable, Update
from fastdiff.solvers.unipc import unipc

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "ContinuousVP",
    "DiscreteVP",
    "Flow",
    "NoiseSchedule",
    "PackedTable",
    "Row",
    "SigmaSchedule",
    "Solver",
    "SolverTable",
    "TimeGrid",
    "Update",
    "annealed_langevin",
    "best_linear",
    "cm",
    "consistency",
    "consistency_grid",
    "cosine",
    "ddim",
    "ddim_inverse",
    "ddpm",
    "deis",
    "dpm_2",
    "dpm_2_ancestral",
    "dpm_fast",
    "dpm_multistep",
    "dpm_singlestep",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dynamic_shift",
    "edm",
    "edm_stochastic",
    "explicit_grid",
    "from_alphas_cumprod",
    "from_betas",
    "from_diffusers",
    "get_schedule",
    "get_solver",
    "heun",
    "lcm",
    "lcm_grid",
    "linear",
    "lms",
    "make_grid",
    "make_table",
    "midpoint",
    "pc",
    "pndm",
    "scaled_linear",
    "sde_grid",
    "sigma_grid",
    "sigmoid",
    "tcd",
    "unipc",
    "ve",
    "zero_terminal_snr",
]
