"""Runge-Kutta methods in the variables in which the path is straightest: Heun, midpoint, EDM.

In y = x/alpha and rho = sigma/alpha the probability-flow ODE is dy/drho = (y - x0)/rho
(arXiv 2206.00364, equation 4); for rectified flow it is dx/dt = eps - x0, where sigma = t. In both
a step of Euler's is DDIM's.

EDM's stochastic sampler (arXiv 2206.00364, algorithm 2) raises the noise before a step, from rho to
rho_hat = (1 + gamma) rho: y_hat = y + s_noise sqrt(rho_hat^2 - rho^2) z.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastdiff.solvers.continuous import Flow, SigmaSchedule
from fastdiff.solvers.ddim import posterior
from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.multistep import check_joined, check_order
from fastdiff.solvers.prediction import Step, canonical, step_between, steps_of, table_of
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update


def heun(
    schedule: NoiseSchedule, grid: TimeGrid, *, prediction: str = "eps", mode: str = "parity"
) -> SolverTable:
    """The table of Heun's second-order method: 2N - 1 evaluations for N steps.

    EDM's deterministic sampler (arXiv 2206.00364, algorithm 1) and, on a Flow schedule, Heun's
    method in its own time. The last step is Euler's, and so is one from pure noise elsewhere.

    Raises ValueError for an unknown prediction or mode, and for a grid whose steps do not join.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    check_joined(grid)
    steps = list(steps_of(schedule, grid, kind))
    rows = [row for i in range(len(steps)) for row in _heun_step(schedule, steps, i, steps[i], 3)]
    description = f"{kind} model, {mode}"
    return table_of("heun", schedule, grid, rows, registers=3, description=description)


def edm_stochastic(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    order: int = 2,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> SolverTable:
    """The table of EDM's stochastic sampler (arXiv 2206.00364, algorithm 2).

    order: 2 (Heun, 2N - 1 evaluations for N steps) or 1 (Euler, N).
    s_churn, s_tmin, s_tmax, s_noise: where sigma/alpha is in s_tmin..s_tmax, gamma is
        min(s_churn/N, sqrt(2) - 1). The defaults are the paper's for ImageNet-64 (table 5);
        ``s_churn=0`` is :func:`heun`.
    mode: in "parity" every step draws noise when s_churn > 0, even with coefficient 0, as the
        paper's code and k-diffusion do. "exact" draws only noise that is used.

    The noise of the first step is a row without an evaluation, that of each further one is added at
    the end of the step before it. Of schedules that do not go on beyond their t_max (all but
    sigma schedules), the noise is raised to the level there at most.

    Raises ValueError for values that are negative or not finite (s_tmax may be infinite), an order
    other than 1 and 2, an unknown prediction or mode, and for a grid whose steps do not join.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    check_order(order, 2)
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_noise": s_noise}
    for name, value in options.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if not (isinstance(s_tmax, (int, float)) and s_tmax >= 0):
        raise ValueError(f"s_tmax must be at least 0, got {s_tmax}")
    check_joined(grid)
    gamma = min(s_churn / grid.planned_steps, math.sqrt(2.0) - 1.0)
    registers = 3 if order == 2 else 1
    steps = list(steps_of(schedule, grid, kind))
    draws = itertools.count()
    rows: list[Row] = []
    for i, step in enumerate(steps):
        inside = s_tmin <= math.exp(-step.lam) <= s_tmax
        raised = _raise(schedule, kind, step, gamma) if inside and gamma > 0 else step
        scale, std = 1.0, 0.0
        if raised is not step:
            scale = raised.alpha / step.alpha
            std = s_noise * raised.sigma * math.sqrt(-math.expm1(2.0 * (raised.lam - step.lam)))
        draw = -1
        if std > 0 or (s_churn > 0 and mode == "parity"):
            draw = next(draws)
        if not rows:
            if draw >= 0:
                lift = Update(0, (scale, *[0.0] * (registers - 1)), 0.0, std)
                level = (step.alpha, step.sigma)
                rows.append(Row(0, step.time, 1.0, 0.0, 0.0, (lift,), draw=draw, level=level))
        else:
            rows[-1] = _lifted(rows[-1], scale, std, draw)
        if order == 2:
            rows += _heun_step(schedule, steps, i, raised, registers)
        else:
            rows.append(raised.row(_euler(raised, registers)))
    values = ", ".join(f"{name}={value:g}" for name, value in options.items())
    return table_of(
        "edm_stochastic",
        schedule,
        grid,
        rows,
        registers=registers,
        description=f"order {order}, {values}, s_tmax={s_tmax:g}, {kind} model, {mode}",
    )


def midpoint(
    schedule: NoiseSchedule, grid: TimeGrid, *, prediction: str = "eps", mode: str = "parity"
) -> SolverTable:
    """The table of the explicit midpoint method: the slope in the middle of a step, for all of it.

    On a Flow schedule the middle is that in t, and N steps are 2N evaluations; elsewhere it is that
    in sigma/alpha, and a step to the clean sample, or from pure noise, is Euler's: models are not
    trained on half the least noise. The modes are one.

    Raises ValueError for an unknown prediction or mode, and for a grid whose steps do not join.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    check_joined(grid)
    rows: list[Row] = []
    for step in steps_of(schedule, grid, kind):
        if step.h == 0 or (math.isinf(step.h) and not isinstance(schedule, Flow)):
            rows.append(step.row(_euler(step, 2)))
            continue
        if isinstance(schedule, Flow):
            s = (step.sigma + step.sigma_to) / 2
            lam = math.log1p(-s) - math.log(s)
        else:
            lam = math.log(2.0) - float(np.logaddexp(-step.lam, -step.target))
        time = float(schedule.time_at(lam))
        mid = step_between(schedule, kind, "x0", step.index, time, lam, step.target)
        reached = replace(step, target=lam, alpha_to=mid.alpha, sigma_to=mid.sigma)
        rows.append(step.row(_euler(reached, 2), Update(1, (1.0, 0.0), 0.0)))
        places = [
            _straight(schedule, alpha, sigma)
            for alpha, sigma in (
                (step.alpha, step.sigma),
                (mid.alpha, mid.sigma),
                (step.alpha_to, step.sigma_to),
            )
        ]
        scales, times = zip(*places, strict=True)
        rows.append(mid.row(midpoint_update(scales, times)))
    description = f"{kind} model, {mode}"
    return table_of("midpoint", schedule, grid, rows, registers=2, description=description)


def midpoint_update(scales: Sequence[float], s: Sequence[float]) -> Update:
    """y' = y + (s_to - s)/s_mid (y_mid - x0), with x = scale*y kept in register 1.

    scales, s: of the state, of the middle, which is fed, and of the end of the step.
    """
    step = (s[2] - s[0]) / s[1]
    to = scales[2]
    return Update(0, (step * to / scales[1], to / scales[0]), -step * to)


def _straight(schedule: NoiseSchedule, alpha: float, sigma: float) -> tuple[float, float]:
    """(scale, s): x/scale moves along (x/scale - x0)/s in s."""
    return (1.0, sigma) if isinstance(schedule, Flow) else (alpha, sigma / alpha)


def _euler(step: Step, registers: int) -> Update:
    from_x, from_x0, _ = posterior(step, 0.0)
    return Update(0, (from_x, *[0.0] * (registers - 1)), from_x0)


def _heun_step(
    schedule: NoiseSchedule, steps: Sequence[Step], i: int, step: Step, registers: int
) -> list[Row]:
    """Step i from ``step``, which is ``steps[i]`` or has more noise."""
    euler = _euler(step, registers)
    pure_noise = step.alpha == 0 and not isinstance(schedule, Flow)
    if i == len(steps) - 1 or step.h == 0 or pure_noise:
        return [step.row(euler)]
    scale, s = _straight(schedule, step.alpha, step.sigma)
    scale_to, s_to = _straight(schedule, step.alpha_to, step.sigma_to)
    # Register 1 keeps the state, register 2 the prediction, for the second half.
    keep = (Update(1, (1.0, 0.0, 0.0), 0.0), Update(2, (0.0, 0.0, 0.0), 1.0))
    half, half_to = (s_to - s) / (2 * s), (s_to - s) / (2 * s_to)
    second = Update(
        0, (half_to, scale_to / scale * (1 + half), -scale_to * half), -scale_to * half_to
    )
    return [step.row(euler, *keep), steps[i + 1].row(second)]


def _raise(schedule: NoiseSchedule, kind: str, step: Step, gamma: float) -> Step:
    """The step from (1 + gamma) times its sigma/alpha."""
    lam = step.lam - math.log1p(gamma)
    if isinstance(schedule, SigmaSchedule):
        # Its time is a formula, which holds beyond sigma_max too.
        schedule = replace(schedule, sigma_max=max(schedule.sigma_max, math.exp(-lam)))
    lam = max(lam, float(schedule.lambda_at(schedule.t_max)))
    if not lam < step.lam:
        return step
    time = float(schedule.time_at(lam))
    return step_between(schedule, kind, "x0", step.index, time, lam, step.target)


def _lifted(row: Row, scale: float, std: float, draw: int) -> Row:
    """The row with its new state times ``scale`` plus ``std*z``."""
    first, *rest = row.updates
    lifted = Update(
        first.dest,
        tuple(scale * value for value in first.from_registers),
        scale * first.from_prediction,
        std,
    )
    return replace(row, updates=(lifted, *rest), draw=draw)
