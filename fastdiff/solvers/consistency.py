"""Latent consistency models (arXiv 2310.04378, algorithm 3)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.prediction import canonical, steps_of, table_of
from fastdiff.solvers.schedules import DiscreteVP, NoiseSchedule
from fastdiff.solvers.table import SolverTable, Update

SIGMA_DATA = 0.5


def lcm_grid(schedule: NoiseSchedule, steps: int, original_steps: int = 50) -> TimeGrid:
    """``steps`` of the ``original_steps`` timesteps the model was distilled on.

    Those are k T//original_steps - 1 for k = 1 .. original_steps; of them, in decreasing order, the
    ones at floor(i original_steps/steps).
    """
    if not isinstance(schedule, DiscreteVP):
        raise TypeError(
            f"schedule must have whole timesteps for an lcm grid, got {schedule.name} "
            f"({type(schedule).__name__})"
        )
    if not 1 <= original_steps <= schedule.num_timesteps:
        raise ValueError(
            f"original_steps must be in 1..{schedule.num_timesteps}, got {original_steps}"
        )
    if not 1 <= steps <= original_steps:
        raise ValueError(f"steps must be in 1..{original_steps} (original_steps), got {steps}")
    stride = schedule.num_timesteps // original_steps
    original = (np.arange(1, original_steps + 1) * stride - 1)[::-1]
    chosen = np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(np.int64)
    times = original[chosen].astype(np.float64)
    lambdas = schedule.lambda_at(times)
    return TimeGrid("lcm", times, lambdas, np.append(lambdas[1:], math.inf), steps)


def lcm(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    timestep_scaling: float = 10.0,
) -> SolverTable:
    """The table of multistep consistency sampling: predict the clean sample, noise it again.

    The clean sample is c_skip x + c_out x0, with u = timestep_scaling*t and s = 0.5,
    c_skip = s^2/(u^2 + s^2) and c_out = u/sqrt(u^2 + s^2). No noise is added after the last step.

    Raises ValueError for an unknown prediction or mode, or a timestep_scaling that is not positive.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    if not (math.isfinite(timestep_scaling) and timestep_scaling > 0):
        raise ValueError(f"timestep_scaling must be positive, got {timestep_scaling}")
    rows = []
    n = len(grid)
    for step in steps_of(schedule, grid, kind):
        scaled = step.time * timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / math.hypot(scaled, SIGMA_DATA)
        last = step.index == n - 1
        to, noise = (1.0, 0.0) if last else (step.alpha_to, step.sigma_to)
        rows.append(
            replace(
                step,
                from_state=skip + out * step.from_state,
                from_output=out * step.from_output,
            ).row(Update(0, (0.0,), to, noise), draw=-1 if last else step.index)
        )
    return table_of("lcm", schedule, grid, rows, description=f"{kind} model, {mode}")
