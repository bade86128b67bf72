"""Annealed Langevin dynamics of noise-conditional score networks (arXiv 1907.05600, algorithm 1).

At each of L levels of s = sigma/alpha, T steps in y = x/alpha towards the score g of y ::

    y <- y + e g + sqrt(2 e) z        e = step_size (s_i/s_L)^2

(the authors' code; algorithm 1 has e/2), and at the end the mean of the clean sample, y + s_L^2 g
(arXiv 2006.09011, section 4.3).
"""

from __future__ import annotations

import math
from dataclasses import replace

from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.prediction import canonical, steps_of, table_of
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update


def annealed_langevin(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    step_size: float | None = None,
    steps_per_level: int = 100,
    denoise: bool = True,
) -> SolverTable:
    """The table of annealed Langevin dynamics: L T evaluations, and one more to denoise.

    grid: the L levels, geometric by default ("lambda").
    step_size: e at the last of them; None is 0.2 s_L^2, the authors' 2e-5 at their s_L = 0.01.
    steps_per_level: T. denoise: end with the mean of the clean sample (NCSNv2).
    mode: "parity" has the step of the authors' code, "exact" that of algorithm 1, half of it.

    Raises ValueError for an unknown prediction or mode, a step_size that is not positive, a bad
    steps_per_level, and a grid that starts from pure noise (alpha = 0).
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    if step_size is None:
        step_size = 0.2 * math.exp(-2 * float(grid.lambdas[-1]))
    if not (isinstance(step_size, (int, float)) and math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be positive, got {step_size}")
    count = steps_per_level
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"steps_per_level must be an integer of at least 1, got {count}")
    steps = list(steps_of(schedule, grid, kind, "score"))
    if steps[0].alpha == 0:
        raise ValueError(f"grid must start where there is signal, got alpha = 0 ({grid.name})")
    rows: list[Row] = []
    draws = 0
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        e = step_size * math.exp(2 * (steps[-1].lam - step.lam))
        if mode == "exact":
            e /= 2
        for i in range(count):
            move = following is not None and i == count - 1
            alpha_to = following.alpha if move and following is not None else step.alpha
            # The score of y is alpha times that of x.
            update = Update(
                0,
                (alpha_to / step.alpha,),
                alpha_to * e * step.alpha,
                alpha_to * math.sqrt(2 * e),
            )
            rows.append(step.row(update, draw=draws))
            draws += 1
    last = steps[-1]
    end = (last.alpha, last.sigma)
    if denoise:
        rows.append(last.row(Update(0, (1 / last.alpha,), last.sigma**2 / last.alpha)))
        end = (1.0, 0.0)
    description = f"{count} steps per level, step_size={step_size:g}, {kind} model, {mode}"
    name = "annealed_langevin"
    table = table_of(name, schedule, grid, rows, prediction="score", description=description)
    return replace(table, end_level=end)
