"""DPM-Solver++ multistep, orders 1 and 2 (arXiv 2211.01095, algorithm 2).

The exact solution over h = lambda_t - lambda_s in data prediction (equation 8) is ::

    x_t = (sigma_t/sigma_s) x_s + sigma_t int_{lambda_s}^{lambda_t} e^lambda x0(lambda) dlambda

With m0 the prediction at s, m1 the one before it (h0 earlier), and D1 = (h/h0) (m0 - m1)::

    order 1        x_t = (sigma_t/sigma_s) x + alpha_t (1 - e^{-h}) m0            (= DDIM, eta 0)
    2M midpoint        + alpha_t (1 - e^{-h})/2 D1
    2M heun            + alpha_t ((e^{-h} - 1)/h + 1) D1
"""

from __future__ import annotations

import math

from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.prediction import canonical, to_x0
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update

SOLVER_TYPES = ("midpoint", "heun")
# diffusers' lower_order_final acts on runs with fewer steps than this.
FEW_STEPS = 15


def _phi_heun(h: float) -> float:
    """(e^{-h} - 1)/h + 1: h/2 near 0, 1 at infinity."""
    if math.isinf(h):
        return 1.0
    if h < 0.02:
        # The quotient loses digits here; the series' next term is below 1e-16.
        return h / 2 * (1 - h / 3 * (1 - h / 4 * (1 - h / 5 * (1 - h / 6 * (1 - h / 7)))))
    return math.expm1(-h) / h + 1.0


def dpmpp_2m(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> SolverTable:
    """The table of DPM-Solver++(2M), or of its first order with ``order=1``.

    prediction: what the model predicts: "eps", "v" or "x0".
    solver_type: "midpoint" or "heun", the two second-order rules above.
    lower_order_final: the last step is of order 1 when the run has fewer than 15 steps. None: True
        in "parity" (as diffusers), False in "exact".
    euler_at_final: the last step is of order 1 whatever the number of steps.
    mode: "parity" or "exact"; differs in the default above and in the grid (see ``make_grid``).

    The first step is of order 1, and so is the step to the clean sample: D1 has no limit there.
    Raises ValueError for options outside those, and for a grid whose steps do not join.
    """
    check_choice("mode", mode, MODES)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    kind = canonical(prediction)
    if isinstance(order, bool) or order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if not grid.contiguous:
        raise ValueError(
            "grid must join its steps for a multistep solver, got one whose steps end elsewhere "
            f"than at the next evaluation ({grid.name})"
        )
    if lower_order_final is None:
        lower_order_final = mode == "parity"
    n = len(grid)
    registers = order
    rows = []
    for i in range(n):
        lam, target = float(grid.lambdas[i]), float(grid.targets[i])
        alpha, sigma = map(float, schedule.marginal(lam))
        alpha_to, sigma_to = map(float, schedule.marginal(target))
        h = target - lam
        from_x = sigma_to / sigma
        first = -alpha_to * math.expm1(-h)  # alpha_t (1 - e^{-h})
        lower = i == n - 1 and (
            euler_at_final or (lower_order_final and grid.planned_steps < FEW_STEPS)
        )
        second = 0.0
        if order == 2 and i > 0 and not lower and math.isfinite(h):
            phi = first / 2 if solver_type == "midpoint" else alpha_to * _phi_heun(h)
            second = phi * h / (lam - float(grid.lambdas[i - 1]))
        history = (-second,) if order == 2 else ()
        updates = [Update(0, (from_x, *history), first + second)]
        if order == 2 and i < n - 1:
            updates.append(Update(1, (0.0, 0.0), 1.0))
        from_state, from_output = to_x0(kind, alpha, sigma)
        rows.append(Row(0, float(grid.times[i]), 1.0, from_state, from_output, tuple(updates)))
    return SolverTable(
        name="dpmpp_2m" if order == 2 else "dpmpp_1",
        num_registers=registers,
        rows=tuple(rows),
        prediction="x0",
        description=(
            f"DPM-Solver++ order {order}, {solver_type}, {kind} model, {grid.name} grid, {mode}"
        ),
    )
