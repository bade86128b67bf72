"""UniPC, multistep, of any order (arXiv 2302.04867, algorithms 5 to 8).

With m0 the prediction at s, m_j the ones before it, r_j = (lambda_j - lambda_s)/h, g = -h in data
prediction and h in noise prediction, S = alpha_t (sigma_t), the predictor adds to the exact linear
part ::

    - S (e^g - 1) m0 - S B sum_j rho_j (m_j - m0)/r_j          B = g (bh1) or e^g - 1 (bh2)

where the rho_j solve sum_j r_j^{k-1} rho_j = b_k, with b_k = k! g phi_{k+1}(g)/B. The corrector,
once the model has been evaluated at the predicted state, redoes the same step with that evaluation
as one more point (r = 1). Order 2's predictor and order 1's corrector take rho = 1/2, as the
authors' code does.

The corrector needs no evaluation of its own: the state handed to the model is the predictor's, and
the row that follows corrects it and predicts the next one in a single update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.multistep import History, check_joined, check_order, phi
from fastdiff.solvers.prediction import Step, canonical, steps_of, table_of
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update

SOLVER_TYPES = ("bh1", "bh2")


@dataclass(frozen=True)
class _Stage:
    """x_t = from_x x_s + now m_t + sum_j weights[j] m_j; m_t is the corrector's new point."""

    from_x: float
    weights: tuple[float, ...]
    now: float = 0.0


def _stage(step: Step, ratios: Sequence[float], corrector: bool, data: bool, kind: str) -> _Stage:
    """One predictor (ratios: of m_1 ..) or corrector step from step.lam to step.target."""
    h = step.h
    from_x = step.sigma_to / step.sigma if data else step.alpha_to / step.alpha
    size = step.alpha_to if data else step.sigma_to
    if h == 0:
        return _Stage(from_x, (0.0,))
    g = -h if data else h
    exponential = math.expm1(g)
    base = -size * exponential
    points = [*ratios, 1.0] if corrector else list(ratios)
    if not points:
        return _Stage(from_x, (base,))
    scale = g if kind == "bh1" and math.isfinite(g) else exponential
    if len(points) == 1:
        rho = np.array([0.5])
    else:
        # phi of multistep.py has e^{(s-1)h}; here e^{(1-s)g}: g = -h gives the same numbers.
        b = [math.factorial(k) * g * phi(k + 1, -g) / scale for k in range(1, len(points) + 1)]
        powers = np.vander(np.array(points), increasing=True).T
        rho = np.linalg.solve(powers, np.array(b))
    shares = [-size * scale * float(r) / p for r, p in zip(rho, points, strict=True)]
    back = shares[: len(ratios)]
    return _Stage(from_x, (base - sum(shares), *back), shares[-1] if corrector else 0.0)


def unipc(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool | None = None,
    disable_corrector: Sequence[int] = (),
) -> SolverTable:
    """The table of UniPC.

    order: of the predictor, 1 to 4; with the corrector the method has one more. solver_type: "bh1"
    or "bh2". predict_x0: data prediction; False is noise prediction (not to the clean sample).
    lower_order_final: the last steps are of order 1, 2, ... counted from the end; None is True in
    "parity" (as diffusers and the authors, at every number of steps) and False in "exact".
    disable_corrector: steps whose prediction is not corrected.

    The step to the clean sample is of order 1. Raises ValueError for options outside those, and for
    a grid whose steps do not join.
    """
    check_choice("mode", mode, MODES)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    kind = canonical(prediction)
    check_order(order, 4)
    check_joined(grid)
    if not predict_x0 and not math.isfinite(grid.targets[-1]):
        raise ValueError("final_sigmas_type must be sigma_min for noise prediction, got zero")
    if lower_order_final is None:
        lower_order_final = mode == "parity"
    n = len(grid)
    history = History(2, order)
    rows: list[Row] = []
    before: tuple[Step, int] | None = None

    # Nothing can be interpolated through a point at infinity (zero terminal SNR).
    endless = int(math.isinf(grid.lambdas[0]))

    def ratios(step: Step, count: int) -> list[float]:
        lambdas = grid.lambdas[step.index - count : step.index][::-1]
        return [float(lam - step.lam) / step.h for lam in lambdas] if step.h else []

    for step in steps_of(schedule, grid, kind, "x0" if predict_x0 else "eps"):
        i = step.index
        here = min(order, max(1, i + 1 - endless))
        if lower_order_final:
            here = min(here, n - i)
        if math.isinf(step.h):
            here = 1
        ahead = _stage(step, ratios(step, here - 1), False, predict_x0, solver_type)
        # The state this step starts from: what the model saw, or its correction.
        state, past, now = [1.0, 0.0], [0.0] * order, 0.0
        if before is not None and i - 1 not in disable_corrector:
            last, used = before
            fix = _stage(last, ratios(last, used - 1), True, predict_x0, solver_type)
            state, now = [0.0, fix.from_x], fix.now
            past[: len(fix.weights)] = fix.weights
        start = Update(1, history.row(i, state, past), now)
        following = [ahead.from_x * value for value in past]
        for j, weight in enumerate(ahead.weights[1:]):
            following[j] += weight
        moved = Update(
            0,
            history.row(i, [ahead.from_x * value for value in state], following),
            ahead.from_x * now + ahead.weights[0],
        )
        updates = [moved] if i == n - 1 else [moved, start, *history.keep(i)]
        rows.append(step.row(*updates))
        before = (step, here)
    return table_of(
        "unipc",
        schedule,
        grid,
        rows,
        registers=history.registers,
        prediction="x0" if predict_x0 else "eps",
        description=f"order {order}, {solver_type}, {kind} model, {mode}",
    )
