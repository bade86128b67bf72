"""Two evaluations per step: Heun's method, in the variables in which the path is straightest.

In y = x/alpha and rho = sigma/alpha the probability-flow ODE is dy/drho = (y - x0)/rho
(arXiv 2206.00364, equation 4); for rectified flow it is dx/dt = eps - x0, where sigma = t.
"""

from __future__ import annotations

import math

from fastdiff.solvers.continuous import Flow
from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.multistep import check_joined
from fastdiff.solvers.prediction import canonical, steps_of, table_of
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update


def heun(
    schedule: NoiseSchedule, grid: TimeGrid, *, prediction: str = "eps", mode: str = "parity"
) -> SolverTable:
    """The table of Heun's second-order method: 2N - 1 evaluations for N steps.

    EDM's deterministic sampler (arXiv 2206.00364, algorithm 1) and, on a Flow schedule, Heun's
    method in its own time. The step to the clean sample is Euler's.

    Raises ValueError for an unknown prediction or mode, and for a grid whose steps do not join.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    check_joined(grid)
    steps = list(steps_of(schedule, grid, kind))
    rows: list[Row] = []
    straight = isinstance(schedule, Flow)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if straight:
            # The velocity (x - x0)/sigma; the state itself moves along it.
            scale, scale_to, s, s_to = 1.0, 1.0, step.sigma, step.sigma_to
        else:
            scale, scale_to = step.alpha, step.alpha_to
            s, s_to = step.sigma / step.alpha, step.sigma_to / step.alpha_to
        ratio = 0.0 if math.isinf(step.h) else s_to / s
        euler = Update(0, (ratio * scale_to / scale, 0.0, 0.0), scale_to * (1 - ratio))
        if following is None or step.h == 0:
            rows.append(step.row(euler))
            continue
        # Register 1 keeps the state, register 2 the prediction, for the second half.
        keep = (Update(1, (1.0, 0.0, 0.0), 0.0), Update(2, (0.0, 0.0, 0.0), 1.0))
        rows.append(step.row(euler, *keep))
        half, half_to = (s_to - s) / (2 * s), (s_to - s) / (2 * s_to)
        second = Update(
            0, (half_to, scale_to / scale * (1 + half), -scale_to * half), -scale_to * half_to
        )
        rows.append(following.row(second))
    description = f"{kind} model, {mode}"
    return table_of("heun", schedule, grid, rows, registers=3, description=description)
