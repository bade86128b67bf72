"""DPM-Solver and DPM-Solver++, single-step, orders 1 to 3, as ODE and as SDE solvers.

A step of order k evaluates the model k times and keeps nothing for the next one. From the state at
lambda_s, its evaluations m_0 .. m_{k-1} lie at lambda_s + r_j h, r_0 = 0. The j-th update, to the
place of evaluation j (to the end of the step for j = k), starts from the state at lambda_s again
and integrates a polynomial through m_0 .. m_{j-1} exactly; with h here its own length, and r_i in
units of it, S and g as at the top of ``dpm_solver.py``, it adds ::

    order 1         S (1 - e^{-g}) m0
    2S midpoint     + S (1 - e^{-g})/2 (m1 - m0)/r1
    2S heun         + S f1 (m1 - m0)/r1                      f1 = 1 - (1 - e^{-g})/g
    3S midpoint     + S f1 (m2 - m0)/r2
    3S heun         + S f1 D1 + S f2 D2                      f2 = 1/2 - (e^{-g} - 1 + g)/g^2

D1 and D2 being the derivatives of the parabola through m0, m1, m2. Sources: DPM-Solver-2 and -3
(arXiv 2206.00927, algorithms 1 and 2), DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1).

The SDE version has the noise sigma_t sqrt(1 - e^{-2 eta h}), the factor e^{-eta h} on the state and
g = (1 + eta) h. The noises of the updates of one step are values of one process, so that ::

    x_{j+1} = mean_{j+1} + decay (x_j - mean_j) + fresh noise,
    decay = sigma_{j+1}/sigma_j e^{-eta (lambda_{j+1} - lambda_j)}

Independent ones, as in diffusers, cost the second weak order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastdiff.solvers.dpm_solver import SOLVER_TYPES, first_order, weights_of
from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.multistep import check_joined, check_order
from fastdiff.solvers.prediction import canonical, step_between, table_of
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")


@dataclass(frozen=True)
class _Block:
    """One step: the model is evaluated at ``lambdas[:-1]`` and ``times``; it ends at the last.

    even: the lambdas are equally far apart.
    up_to: noise then raises the level from there to this one, None for no such noise.
    """

    times: Sequence[float]
    lambdas: Sequence[float]
    even: bool = False
    up_to: float | None = None
    s_noise: float = 1.0


def dpm_singlestep(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool | None = None,
    eta: float = 1.0,
) -> SolverTable:
    """The table of single-step DPM-Solver, of any algorithm and order.

    order: 1, 2 or 3. algorithm_type: "dpmsolver++" (data prediction), "dpmsolver" (noise
        prediction; not to the clean sample, so with ``final_sigmas_type="sigma_min"``) or
        "sde-dpmsolver++".
    solver_type: "midpoint" or "heun", see the top of this file.
    mode: in "parity" the grid's N points are model evaluations and ``order`` of them a step, whose
        updates are of order 1, 2, .., as in diffusers' DPMSolverSinglestepScheduler. In "exact"
        every step of the grid has ``order`` evaluations, at equal distances in lambda and at the
        times the schedule has there, and the noises within a step belong together (see above).
    lower_order_final: the last evaluation's update is of order 1: in "parity" where it would end a
        step (for N that is no multiple of the order it does not), in "exact" the last step has
        one evaluation. None is False.
    eta: "sde-dpmsolver++" only: 1 is the reverse-time SDE, 0 the ODE.

    Steps to the clean sample and from pure noise are of order 1: inner levels have no limit there.
    The third order of "sde-dpmsolver++" has the sign of its last term right, which diffusers 0.42
    has wrong.

    Raises ValueError for options outside those, for a grid whose steps do not join, and for noise
    prediction to the clean sample or from pure noise.
    """
    check_choice("mode", mode, MODES)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    check_choice("algorithm_type", algorithm_type, ALGORITHMS)
    kind = canonical(prediction)
    check_order(order, 3)
    if not (isinstance(eta, (int, float)) and math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be finite and at least 0, got {eta}")
    check_joined(grid)
    _check_ends(grid, algorithm_type)
    split = _listed if mode == "parity" else _refined
    blocks = split(schedule, grid, order, bool(lower_order_final))
    rows = _rows(schedule, kind, blocks, algorithm_type, solver_type, eta, mode)
    sde = algorithm_type.startswith("sde")
    name = f"{'dpm' if algorithm_type == 'dpmsolver' else 'dpmpp'}_{order}{'s' * (order > 1)}"
    return table_of(
        f"{name}{'_sde' * sde}",
        schedule,
        grid,
        rows,
        registers=_registers(blocks),
        prediction="eps" if algorithm_type == "dpmsolver" else "x0",
        description=f"{algorithm_type}, order {order}, {solver_type}, {kind} model, {mode}",
    )


def dpm_fast(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> SolverTable:
    """The table of DPM-Solver-fast: steps of order 3, and lower ones last, N evaluations in all.

    The orders are 3, .., 3 and then 2, 1 where N is a multiple of 3, else the remainder
    (arXiv 2206.00927, section 3.3).

    mode: in "parity" the steps are equal in lambda between the ends of the grid, whose inner points
        are not used (k-diffusion's ``sample_dpm_fast``, and the paper); in "exact" they are between
        points of the grid, as many apart as the step has evaluations.
    eta: above 0, up to 1: every step goes to less noise than asked for and noise is added, times
        ``s_noise``, but never to less than at the end of the run.

    Raises ValueError for eta outside 0..1, a negative s_noise, an unknown prediction or mode, a
    grid whose steps do not join, and a run to the clean sample or from pure noise.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    check_eta(eta, s_noise)
    check_joined(grid)
    _check_ends(grid, "dpmsolver")
    n = len(grid)
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    points = np.append(grid.lambdas, grid.targets[-1])
    if mode == "parity":
        bounds = np.linspace(points[0], points[-1], len(orders) + 1)
        starts = [float(grid.times[0]), *schedule.time_at(bounds[1:-1]).tolist()]
    else:
        places = np.cumsum([0, *orders])
        bounds, starts = points[places], grid.times[places[:-1]].tolist()
    blocks = []
    for order, start, (lam, target) in zip(
        orders, starts, itertools.pairwise(bounds.tolist()), strict=True
    ):
        if not eta:
            blocks.append(_inside(schedule, start, lam, target, order))
            continue
        down = min(float(bounds[-1]), target - 0.5 * log_kept(target - lam, eta))
        inside = _inside(schedule, start, lam, down, order)
        blocks.append(replace(inside, up_to=target, s_noise=s_noise))
    rows = _rows(schedule, kind, blocks, "dpmsolver", "midpoint", 0.0, mode)
    return table_of(
        "dpm_fast",
        schedule,
        grid,
        rows,
        registers=_registers(blocks),
        prediction="eps",
        description=f"eta={eta:g}, s_noise={s_noise:g}, {kind} model, {mode}",
    )


def check_eta(eta: float, s_noise: float = 1.0) -> None:
    """ValueError unless eta is in 0..1 and s_noise finite and at least 0."""
    if not (isinstance(eta, (int, float)) and 0 <= eta <= 1):
        raise ValueError(f"eta must be in 0..1, got {eta}")
    if not (isinstance(s_noise, (int, float)) and math.isfinite(s_noise) and s_noise >= 0):
        raise ValueError(f"s_noise must be finite and at least 0, got {s_noise}")


def log_kept(h: float, eta: float) -> float:
    """ln(1 - eta^2 (1 - e^{-2h})): of the variance after a step, the part that is not fresh noise.

    It is the square of (sigma_down/sigma_to) of an ancestral step.
    """
    if eta == 1:
        return -2.0 * h
    return math.log1p(eta * eta * math.expm1(-2.0 * h))


def _check_ends(grid: TimeGrid, algorithm_type: str) -> None:
    if algorithm_type.endswith("++"):
        return
    if not math.isfinite(grid.targets[-1]):
        raise ValueError(
            "final_sigmas_type must be sigma_min for noise prediction "
            f"(algorithm_type {algorithm_type!r}), got zero"
        )
    if not math.isfinite(grid.lambdas[0]):
        raise ValueError("schedule must have some signal at the first step, got zero terminal SNR")


def _order_list(steps: int, order: int, lower_order_final: bool, clean: bool) -> list[int]:
    """The order of each evaluation's update in diffusers: 1, 2, .., order, 1, 2, ..."""
    orders = [i % order + 1 for i in range(steps)]
    if clean or (lower_order_final and orders[-1] == order):
        orders[-1] = 1
    return orders


def _listed(
    schedule: NoiseSchedule, grid: TimeGrid, order: int, lower_order_final: bool
) -> list[_Block]:
    """Steps made of the grid's own points."""
    clean = not math.isfinite(grid.targets[-1])
    orders = _order_list(grid.planned_steps, order, lower_order_final, clean)[-len(grid) :]
    starts = [i for i, o in enumerate(orders) if o == 1 or i == 0]
    if not math.isfinite(grid.lambdas[0]) and len(grid) > 1:
        starts = sorted({1, *starts})
    points = [*grid.lambdas.tolist(), float(grid.targets[-1])]
    times = grid.times.tolist()
    bounds = itertools.pairwise([*starts, len(grid)])
    return [_Block(times[i:j], points[i : j + 1]) for i, j in bounds]


def _refined(
    schedule: NoiseSchedule, grid: TimeGrid, order: int, lower_order_final: bool
) -> list[_Block]:
    """Each step of the grid with ``order`` evaluations."""
    blocks = []
    ends = zip(grid.times.tolist(), grid.lambdas.tolist(), grid.targets.tolist(), strict=True)
    for i, (time, lam, target) in enumerate(ends):
        last = lower_order_final and i == len(grid) - 1
        blocks.append(_inside(schedule, time, lam, target, 1 if last else order))
    return blocks


def _inside(schedule: NoiseSchedule, time: float, lam: float, target: float, order: int) -> _Block:
    """A step with its evaluations at equal distances in lambda."""
    h = target - lam
    if h == 0 or math.isinf(h):
        return _Block([time], [lam, target])
    inner = [lam + h * j / order for j in range(1, order)]
    return _Block(
        [time, *(float(schedule.time_at(at)) for at in inner)], [lam, *inner, target], True
    )


def _registers(blocks: Sequence[_Block]) -> int:
    """The state; where a step has k > 1 evaluations, its first state and k - 1 predictions."""
    most = max(len(block.times) for block in blocks)
    return 1 if most == 1 else most + 1


def _update_weights(size: float, g: float, ratios: list[float], solver_type: str) -> list[float]:
    """Coefficients of m_0, m_1, ... in an update; m_j lies at ``ratios[j - 1]`` of its length."""
    # weights_of counts backwards from m_0.
    if not ratios:
        return weights_of(1, size, g, math.inf, math.inf, solver_type, "exact")
    if len(ratios) == 1:
        return weights_of(2, size, g, -ratios[0], math.inf, solver_type, "exact")
    first, second = ratios
    if solver_type == "heun":
        return weights_of(3, size, g, -first, first - second, solver_type, "exact")
    base, slope = weights_of(2, size, g, -second, math.inf, "heun", "exact")
    return [base, 0.0, slope]


def _rows(
    schedule: NoiseSchedule,
    kind: str,
    blocks: Sequence[_Block],
    algorithm_type: str,
    solver_type: str,
    eta: float,
    mode: str,
) -> list[Row]:
    wanted = "eps" if algorithm_type == "dpmsolver" else "x0"
    sde = algorithm_type.startswith("sde") and eta > 0
    registers = _registers(blocks)
    rows: list[Row] = []
    draws = itertools.count()

    def padded(values: Sequence[float]) -> tuple[float, ...]:
        return (*values, *[0.0] * (registers - len(values)))

    for block in blocks:
        base, count = block.lambdas[0], len(block.times)
        mean: list[float] = []  # of the state fed: coefficients of m_0, m_1, ...
        for j, time in enumerate(block.times):
            lam, target = block.lambdas[j : j + 2]
            here = step_between(schedule, kind, wanted, len(rows), time, lam, target)
            whole = step_between(schedule, kind, wanted, len(rows), time, base, target)
            from_x, size, g, noise = first_order(whole, algorithm_type, eta)
            weights = [0.0]
            if whole.h > 0:
                ratios = [(at - base) / whole.h for at in block.lambdas[1 : j + 1]]
                if block.even:  # without rounding, so that what cancels is 0
                    ratios = [i / (j + 1) for i in range(1, j + 1)]
                inner = block.even and j < count - 1
                weights = _update_weights(size, g, ratios, "heun" if inner else solver_type)
            state = [0.0, from_x, *weights[:-1]] if j else [from_x]
            if j and sde and mode == "exact":
                decay, _, _, noise = first_order(here, algorithm_type, eta)
                gaps = [a - decay * b for a, b in zip(weights[:-1], mean, strict=True)]
                state = [decay, 0.0, *gaps]  # decays compose: nothing is left of the first state
            mean = weights
            scale = 1.0
            if block.up_to is not None and j == count - 1:
                alpha_up, sigma_up = map(float, schedule.marginal(block.up_to))
                scale = alpha_up / here.alpha_to
                raised = -math.expm1(2.0 * (block.up_to - target))
                noise = block.s_noise * sigma_up * math.sqrt(raised)
            stochastic = sde or (block.up_to is not None and j == count - 1)
            draw = next(draws) if noise > 0 or (stochastic and mode == "parity") else -1
            keep = []
            if j < count - 1:
                if j == 0:
                    keep.append(Update(1, padded([1.0]), 0.0))
                keep.append(Update(2 + j, padded([]), 1.0))
            update = Update(
                0, padded([scale * value for value in state]), scale * weights[-1], noise
            )
            rows.append(here.row(update, *keep, draw=draw))
    return rows


def embedded_step(
    schedule: NoiseSchedule,
    lam: float,
    target: float,
    *,
    prediction: str = "eps",
    order: int = 3,
    algorithm_type: str = "dpmsolver",
) -> SolverTable:
    """One step of DPM-Solver-12 (``order`` 2) or -23 (3): ends with the lower order in register 1.

    The lower order takes the evaluations it can use: order 1 the first, order 2 the first two, at 0
    and 1/3 of the step (arXiv 2206.00927, appendix C).

    Raises ValueError for another order or algorithm_type, and for lambdas that are not finite or do
    not increase.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order}")
    check_choice("algorithm_type", algorithm_type, ALGORITHMS[:2])
    if not (math.isfinite(lam) and math.isfinite(target) and lam < target):
        raise ValueError(f"target must be finite and above lam ({lam:g}), got {target:g}")
    kind = canonical(prediction)
    time = float(schedule.time_at(lam))
    block = _inside(schedule, time, lam, target, order)
    rows = _rows(schedule, kind, [block], algorithm_type, "midpoint", 0.0, "exact")
    wanted = "eps" if algorithm_type == "dpmsolver" else "x0"
    whole = step_between(schedule, kind, wanted, 0, time, lam, target)
    from_x, size, g, _ = first_order(whole, algorithm_type)
    weights = _update_weights(size, g, [1 / order] * (order - 2), "midpoint")
    state = [0.0, from_x, *weights, 0.0, 0.0][: _registers([block])]
    lower = Update(1, tuple(state), 0.0)
    rows[-1] = replace(rows[-1], updates=(*rows[-1].updates, lower))
    grid = TimeGrid("adaptive", np.array([time]), np.array([lam]), np.array([target]), 1)
    return table_of(
        f"dpm_{order - 1}{order}",
        schedule,
        grid,
        rows,
        registers=_registers([block]),
        prediction=wanted,
        description=f"{algorithm_type}, {kind} model",
    )
