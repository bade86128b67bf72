"""Adams methods: DEIS, LMS and PLMS extrapolate the noise through earlier evaluations.

In rho = sigma/alpha and y = x/alpha the probability-flow ODE is dy = eps drho. A method of order k
integrates the polynomial through the last k values of eps:

========  ==================  ==================================================================
name      polynomial in       source
========  ==================  ==================================================================
lms       rho                 k-diffusion's ``lms``; Crowson
deis      ln rho              DEIS tAB, arXiv 2204.13902 (equation 15; "logrho" in diffusers)
pndm      the step's number   PLMS, arXiv 2202.09778 (equation 9): Adams-Bashforth weights
========  ==================  ==================================================================
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fastdiff.solvers.dpm_solver import FEW_STEPS
from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.multistep import History, check_joined, check_order, phi
from fastdiff.solvers.prediction import Step, canonical, steps_of, table_of, to_eps
from fastdiff.solvers.schedules import DiscreteVP, NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update


def _lagrange(nodes: np.ndarray) -> np.ndarray:
    """[k, k]: row j holds the coefficients, lowest power first, of the j-th basis polynomial."""
    return np.linalg.inv(np.vander(nodes, increasing=True)).T


def _check_final(grid: TimeGrid) -> None:
    if not math.isfinite(grid.lambdas[0]):
        raise ValueError("schedule must have some signal at the first step, got zero terminal SNR")


def _adams(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    name: str,
    kind: str,
    orders: list[int],
    integrate: object,
    description: str,
) -> SolverTable:
    """``integrate(step, nodes)``: weights of eps_0, eps_1, ... for ``y' = y + sum w_j eps_j``."""
    assert callable(integrate)
    check_joined(grid)
    _check_final(grid)
    n = len(grid)
    history = History(1, max(orders) - 1)
    rows = []
    for step in steps_of(schedule, grid, kind, "eps"):
        i = step.index
        lambdas = grid.lambdas[i - orders[i] + 1 : i + 1][::-1]
        weights = [0.0] if step.h == 0 else [float(w) for w in integrate(step, lambdas)]
        scaled = [step.alpha_to * weight for weight in weights]
        from_x = step.alpha_to / step.alpha
        updates = [Update(0, history.row(i, (from_x,), scaled[1:]), scaled[0])]
        if i < n - 1:
            updates += history.keep(i)
        rows.append(step.row(*updates))
    return table_of(
        name,
        schedule,
        grid,
        rows,
        registers=history.registers,
        prediction="eps",
        description=description,
    )


def deis(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    order: int = 2,
    lower_order_final: bool | None = None,
) -> SolverTable:
    """The table of DEIS (tAB, polynomials in ln rho), orders 1 to 4.

    lower_order_final: in runs of fewer than 15 steps the last step is of order 1 and the last but
        one at most of order 2. None: True in "parity" (as diffusers), False in "exact".

    The step to the clean sample is of order 1. Raises ValueError for options outside those, a grid
    whose steps do not join, or a first step without signal.
    """
    check_choice("mode", mode, MODES)
    check_order(order, 4)
    kind = canonical(prediction)
    if lower_order_final is None:
        lower_order_final = mode == "parity"
    n = len(grid)
    orders = [min(order, i + 1) for i in range(n)]
    if lower_order_final and grid.planned_steps < FEW_STEPS:
        orders = [min(o, n - i) if i >= n - 2 else o for i, o in enumerate(orders)]
    if not math.isfinite(grid.targets[-1]):
        orders[-1] = 1

    def integrate(step: Step, lambdas: np.ndarray) -> np.ndarray:
        # With u = (lambda - lambda_s)/h: -rho_s h int_0^1 e^{-h u} p(u) du; int u^k e^{-h u} is
        # e^{-h} k! phi(k + 1, -h).
        rho = step.sigma / step.alpha
        if math.isinf(step.h):
            return np.array([-rho])
        h = step.h
        scale = -rho * h * math.exp(-h)
        moments = [scale * math.factorial(k) * phi(k + 1, -h) for k in range(len(lambdas))]
        return _lagrange((lambdas - step.lam) / h) @ np.array(moments)

    description = f"order {order}, {kind} model, {mode}"
    return _adams(schedule, grid, "deis", kind, orders, integrate, description)


def lms(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    order: int = 4,
) -> SolverTable:
    """The table of the linear multistep method in rho, orders 1 to 4.

    Raises ValueError for an order outside those, a grid whose steps do not join, or a first step
    without signal.
    """
    check_choice("mode", mode, MODES)
    check_order(order, 4)
    kind = canonical(prediction)

    def integrate(step: Step, lambdas: np.ndarray) -> np.ndarray:
        # Scaled so that the step runs from 0 to 1.
        rho, to = step.sigma / step.alpha, step.sigma_to / step.alpha_to
        nodes = (np.exp(-lambdas) - rho) / (to - rho)
        powers = np.arange(1, len(nodes) + 1)
        return (to - rho) * (_lagrange(nodes) @ (1.0 / powers))

    orders = [min(order, i + 1) for i in range(len(grid))]
    description = f"order {order}, {kind} model, {mode}"
    return _adams(schedule, grid, "lms", kind, orders, integrate, description)


_BASHFORTH = (
    (1.0,),
    (1.5, -0.5),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(
    schedule: NoiseSchedule, grid: TimeGrid, *, prediction: str = "eps", mode: str = "parity"
) -> SolverTable:
    """The table of PLMS (PNDM without its Runge-Kutta start): N + 1 evaluations for N steps.

    The first step is Heun's: it is repeated with the mean of the noise at both its ends, the second
    of which is evaluated for this purpose only, and not kept. The weights are those of equal steps.

    mode: in "parity" a v model's output itself is extrapolated, and the repeated step starts at the
        level of ``t_1 + T//N``, as in diffusers; in "exact" the noise is, and it starts at t_0.

    Raises ValueError for an unknown prediction or mode, or a first step without signal.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    _check_final(grid)
    history = History(2, 3)
    raw = kind == "v" and mode == "parity"
    n = len(grid)
    rows: list[Row] = []

    def transfer(lam: float, target: float) -> tuple[float, float]:
        """x' = a x + b q: DDIM, q the quantity that is extrapolated."""
        (alpha, sigma), (alpha_to, sigma_to) = schedule.marginal(lam), schedule.marginal(target)
        ratio = float(alpha_to / alpha)
        from_eps = float(sigma_to) - ratio * float(sigma)
        state, output = to_eps(kind, float(alpha), float(sigma)) if raw else (0.0, 1.0)
        return ratio + from_eps * state, from_eps * output

    def add(at: Step, state: tuple[float, float], weights: list[float], *more: Update) -> None:
        update = Update(0, history.row(kept, state, weights[1:]), weights[0])
        at = replace(at, from_state=0.0, from_output=1.0) if raw else at
        rows.append(at.row(update, *more))

    steps = list(steps_of(schedule, grid, kind, "eps"))
    kept = 0
    for i, step in enumerate(steps):
        a, b = transfer(step.lam, step.target)
        weights = [b * w for w in _BASHFORTH[min(kept, 3)]]
        keep = history.keep(kept) if i < n - 1 else []
        if i == 0 and n > 1:
            # Register 1 keeps x for the repetition.
            add(step, (a, 0.0), weights, Update(1, history.row(0, (1.0, 0.0), ()), 0.0), *keep)
            kept = 1
            lam, target = step.lam, steps[1].lam
            if mode == "parity" and isinstance(schedule, DiscreteVP) and not grid.contiguous:
                stride = schedule.num_timesteps // grid.planned_steps
                lam = float(schedule.lambda_at(min(steps[1].time + stride, schedule.t_max)))
            a, b = transfer(lam, target)
            add(steps[1], (0.0, a), [b / 2, b / 2])
            continue
        add(step, (a, 0.0), weights, *keep)
        kept += 1
    return table_of(
        "pndm",
        schedule,
        grid,
        rows,
        registers=history.registers,
        prediction=kind if raw else "eps",
        description=f"PLMS, {kind} model, {mode}",
    )


def pndm_part_way(
    schedule: NoiseSchedule, grid: TimeGrid, start: int, *, prediction: str = "eps"
) -> SolverTable:
    """PLMS begun part of the way, as diffusers' pipelines do for image-to-image.

    start: the place in diffusers' list of timesteps, t_0, t_1, t_1, t_2, ...: its first step is
    redone with the second evaluation. A run that begins later evaluates no timestep twice, but
    diffusers counts as if it did: the second evaluation redoes a step to where it is, and the third
    is taken for the next.
    """

    def rows_after(place: int, offset: int) -> SolverTable:
        """The table whose row ``offset`` is of the timestep at that place of the list."""
        step = place if place < 2 else place - 1
        step -= min(offset, 1)
        return pndm(schedule, grid.from_step(step), prediction=prediction)

    length = len(grid) + 1 if len(grid) > 1 else 1
    first = rows_after(start, 0)
    rows = list(first.rows[:1])
    if start + 1 < length:
        rows.append(rows_after(start + 1, 1).rows[1])
    if start + 2 < length:
        rows += rows_after(start + 2, 2).rows[2:]
    return replace(first, rows=tuple(rows))
