"""DPM-Solver and DPM-Solver++, multistep, orders 1 to 3, as ODE and as SDE solvers.

The exact solution over h = lambda_t - lambda_s in data prediction (arXiv 2211.01095, equation 8)
and in noise prediction (arXiv 2206.00927, equation 3.4) is ::

    x_t = (sigma_t/sigma_s) x_s + sigma_t int_{lambda_s}^{lambda_t} e^lambda x0(lambda) dlambda
    x_t = (alpha_t/alpha_s) x_s - alpha_t int_{lambda_s}^{lambda_t} e^-lambda eps(lambda) dlambda

With m0 the prediction at s, m1 and m2 the ones before it (h0 and h1 apart), r0 = h0/h, r1 = h1/h,

    A = (m0 - m1)/r0      D1 = A + r0/(r0 + r1) (A - B)
    B = (m1 - m2)/r1      D2 = (A - B)/(r0 + r1)

a step adds, with g = h and S = alpha_t in data prediction, g = -h and S = sigma_t in noise
prediction ::

    order 1         S (1 - e^{-g}) m0
    2M midpoint     + S (1 - e^{-g})/2 A                    2M heun     + S f1 A
    3M              + S f1 D1 + S f2 D2

    f1 = 1 - (1 - e^{-g})/g       f2 = 1/2 - (e^{-g} - 1 + g)/g^2

D2 is half the second derivative and f2 the weight of the whole one: all implementations, and this
one in "parity" mode, are of second order. "exact" mode has 2 f2, and is of third.

The SDE versions (arXiv 2211.01095, section 5) are those of the reverse-time SDE: in data prediction
g = 2h, x_s has a further factor e^{-h}, and the noise sigma_t sqrt(1 - e^{-2h}) is added; in noise
prediction S = 2 sigma_t, and the noise is sigma_t sqrt(e^{2h} - 1).
"""

from __future__ import annotations

import math

from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.multistep import History, check_joined, check_order, phi
from fastdiff.solvers.prediction import Step, canonical, steps_of, table_of
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update

SOLVER_TYPES = ("midpoint", "heun")
ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
# diffusers' lower_order_final acts on runs with fewer steps than this.
FEW_STEPS = 15


def first_order(step: Step, algorithm: str, eta: float = 1.0) -> tuple[float, float, float, float]:
    """(from_x, S, g, from_noise) of a step; see the top of this file.

    eta: of "sde-dpmsolver++" alone: the noise is that of h replaced by eta h, g is (1 + eta) h.
    """
    h, sde = step.h, algorithm.startswith("sde")
    if algorithm.endswith("++"):
        decay = eta * h if sde and eta else 0.0
        from_x = step.sigma_to / step.sigma * math.exp(-decay)
        return from_x, step.alpha_to, h + decay, step.sigma_to * math.sqrt(-math.expm1(-2 * decay))
    noise = step.sigma_to * math.sqrt(math.expm1(2 * h)) if sde else 0.0
    return step.alpha_to / step.alpha, step.sigma_to * (2.0 if sde else 1.0), -h, noise


def weights_of(
    order: int, size: float, g: float, r0: float, r1: float, solver_type: str, mode: str
) -> list[float]:
    """Coefficients of m0, m1, m2 in a step; ``size`` is S."""
    first = -size * math.expm1(-g)
    if order == 1:
        return [first]
    f1 = size if math.isinf(g) else size * g * phi(2, g)
    if order == 2:
        a = (first / 2 if solver_type == "midpoint" else f1) / r0
        return [first + a, -a]
    f2 = size * g * phi(3, g) * (2 if mode == "exact" else 1)
    share = 0.0 if math.isinf(r1) else r0 / (r0 + r1)
    a = (f1 * (1 + share) + f2 / (r0 + r1)) / r0
    b = (f1 * share + f2 / (r0 + r1)) / r1
    return [first + a, -a - b, b]


def dpm_multistep(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> SolverTable:
    """The table of multistep DPM-Solver, of any algorithm and order.

    prediction: what the model predicts.
    order: 1, 2 or 3. algorithm_type: "dpmsolver++" (data prediction) or "dpmsolver" (noise
        prediction; not to the clean sample, so with ``final_sigmas_type="sigma_min"``), either with
        "sde-" before it.
    solver_type: "midpoint" or "heun", the two second-order rules above.
    lower_order_final: in runs of fewer than 15 steps the last step is of order 1 and the last but
        one at most of order 2. None: True in "parity" (as diffusers), False in "exact".
    euler_at_final: the last step is of order 1 whatever the number of steps.
    mode: "parity" or "exact"; differs in the default above, in the third order (see the top of this
        file), in noise drawn with coefficient 0, and in the grid (see ``make_grid``).

    The first steps are of lower order, and the step to the clean sample is of order 1: the
    differences have no limit there. The third order of "sde-dpmsolver++" has the sign of its last
    term right, which diffusers 0.42 has wrong.

    Raises ValueError for options outside those, for a grid whose steps do not join, and for
    noise prediction to the clean sample.
    """
    check_choice("mode", mode, MODES)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    check_choice("algorithm_type", algorithm_type, ALGORITHMS)
    kind = canonical(prediction)
    check_order(order, 3)
    if order == 3 and algorithm_type == "sde-dpmsolver":
        raise ValueError("order must be 1 or 2 for algorithm_type 'sde-dpmsolver', got 3")
    check_joined(grid)
    if not algorithm_type.endswith("++") and not math.isfinite(grid.targets[-1]):
        raise ValueError(
            "final_sigmas_type must be sigma_min for noise prediction "
            f"(algorithm_type {algorithm_type!r}), got zero"
        )
    if not algorithm_type.endswith("++") and not math.isfinite(grid.lambdas[0]):
        raise ValueError(
            "schedule must have some signal at the first step for noise prediction "
            f"(algorithm_type {algorithm_type!r}), got alpha = 0"
        )
    if lower_order_final is None:
        lower_order_final = mode == "parity"
    wanted = "x0" if algorithm_type.endswith("++") else "eps"
    sde = algorithm_type.startswith("sde")
    few = lower_order_final and grid.planned_steps < FEW_STEPS
    n = len(grid)
    history = History(1, order - 1)
    rows: list[Row] = []
    draws = 0
    for step in steps_of(schedule, grid, kind, wanted):
        i = step.index
        here = min(order, i + 1)
        if i == n - 1 and (euler_at_final or few or math.isinf(step.h)):
            here = 1
        elif i == n - 2 and few:
            here = min(here, 2)
        from_x, size, g, noise = first_order(step, algorithm_type)
        if step.h == 0:
            weights = [0.0]
        else:
            gaps = [grid.lambdas[j] - grid.lambdas[j - 1] for j in (i, i - 1) if j > 0]
            r0, r1 = ([float(gap) / step.h for gap in gaps] + [math.inf] * 2)[:2]
            weights = weights_of(here, size, g, r0, r1, solver_type, mode)
        draw = -1
        if sde and (noise > 0 or mode == "parity"):
            draw, draws = draws, draws + 1
        updates = [Update(0, history.row(i, (from_x,), weights[1:]), weights[0], noise)]
        if i < n - 1:
            updates += history.keep(i)
        rows.append(step.row(*updates, draw=draw))
    name = {"dpmsolver++": "dpmpp", "dpmsolver": "dpm"}[algorithm_type.removeprefix("sde-")]
    return table_of(
        f"{name}_1{'_sde' * sde}" if order == 1 else f"{name}_{order}m{'_sde' * sde}",
        schedule,
        grid,
        rows,
        registers=history.registers,
        prediction=wanted,
        description=f"{algorithm_type}, order {order}, {solver_type}, {kind} model, {mode}",
    )
