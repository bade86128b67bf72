"""DDIM (arXiv 2010.02502) and, as its eta = 1, the DDPM posterior (arXiv 2006.11239).

With h = lambda' - lambda, the step from (alpha, sigma) to (alpha', sigma') of equation 12 is ::

    std = eta sigma' sqrt(1 - e^{-2h})                                   (equation 16)
    x'  = alpha' x0 + sqrt(sigma'^2 - std^2) eps + std z
        = (sigma'/sigma) q x + alpha' (1 - q e^{-h}) x0 + std z,   q = sqrt(1 - eta^2 (1 - e^{-2h}))

since eps = (x - alpha x0)/sigma. The second form holds for every schedule, not only where
alpha^2 + sigma^2 = 1, and has no cancellation at small h.

With eta = 0 it is a step of an ODE, which runs the other way too (section 4.3): from the image to
the noise that gives it, x' = (alpha'/alpha) x + sigma' (1 - e^{lambda' - lambda}) eps.
"""

from __future__ import annotations

import math

from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.prediction import Step, canonical, input_scale, steps_of, table_of, to_eps
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update


def posterior(step: Step, eta: float) -> tuple[float, float, float]:
    """(from_x, from_x0, from_noise) of one step; see the top of this file."""
    h, alpha_to, sigma_to = step.h, step.alpha_to, step.sigma_to
    variance = -math.expm1(-2.0 * h)  # 1 - e^{-2h}, in 0..1
    q_squared = max(1.0 - eta * eta * variance, 0.0)
    from_x = sigma_to / step.sigma * math.sqrt(q_squared)
    if h == 0:
        from_x0 = 0.0
    elif q_squared == 0 or math.isinf(h):
        from_x0 = alpha_to
    elif eta == 1:
        from_x0 = alpha_to * variance
    else:
        # 1 - q e^{-h} through one expm1: both factors tend to 1 as h tends to 0.
        log_q = 0.5 * math.log1p(-eta * eta * variance)
        from_x0 = -alpha_to * math.expm1(log_q - h)
    return from_x, from_x0, eta * sigma_to * math.sqrt(variance)


def ddim(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    eta: float = 0.0,
) -> SolverTable:
    """The table of DDIM.

    prediction: what the model predicts: "eps", "v" or "x0".
    eta: 0 is deterministic, 1 has the variance of DDPM; within 0..1.
    mode: in "parity" every step draws noise when eta > 0, even with coefficient 0, so that a
        generator is left where diffusers leaves it. "exact" draws only noise that is used. (The
        larger difference, where a step goes, is in the grid: ``make_grid(stride=...)``.)

    Raises ValueError for eta outside 0..1 or an unknown prediction or mode.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    if not (isinstance(eta, (int, float)) and 0 <= eta <= 1):
        raise ValueError(f"eta must be in 0..1, got {eta}")
    rows: list[Row] = []
    draws = 0
    for step in steps_of(schedule, grid, kind):
        from_x, from_x0, std = posterior(step, eta)
        draw = -1
        if std > 0 or (eta > 0 and mode == "parity"):
            draw, draws = draws, draws + 1
        update = Update(0, (from_x,), from_x0, std)
        rows.append(step.row(update, draw=draw))
    description = f"eta={eta:g}, {kind} model, {mode}"
    return table_of("ddim", schedule, grid, rows, description=description)


def ddim_inverse(
    schedule: NoiseSchedule, grid: TimeGrid, *, prediction: str = "eps", mode: str = "parity"
) -> SolverTable:
    """The table of DDIM run backwards, from an image to noise; ``x`` of the run is the image.

    grid: the grid of the sampling run to invert, from noise to data; its steps are taken in reverse
        order, each from where it ends to where it begins.
    mode: in "parity", as in DDIMInverseScheduler, the model is given the time that a step goes to.
        In "exact" it is given the time of the state it sees, which makes each step the explicit
        Euler step of the ODE; the clean sample is given the schedule's least noisy time.

    Raises ValueError for an unknown prediction or mode, and for a model of x0 ("x0", "edm") on a
    grid that ends at the clean sample: that leaves the first step without a direction.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    rows: list[Row] = []
    levels = zip(grid.times.tolist(), grid.targets.tolist(), grid.lambdas.tolist(), strict=True)
    for time, lam, target in reversed(list(levels)):
        alpha, sigma = map(float, schedule.marginal(lam))
        alpha_to, sigma_to = map(float, schedule.marginal(target))
        if sigma == 0 and kind in ("x0", "edm"):
            raise ValueError(
                "prediction must be eps, v, flow or score to invert from the clean sample "
                f"(or set_alpha_to_one False), got {kind}"
            )
        from_state, from_output = to_eps(kind, alpha, sigma)
        # From the clean sample lam is +inf, to pure noise target is -inf: both give 1 - 0.
        from_eps = -sigma_to * math.expm1(target - lam) if target < lam else 0.0
        update = Update(0, (alpha_to / alpha,), from_eps)
        rows.append(
            Row(
                feed=0,
                time=time if mode == "parity" else float(schedule.time_at(lam)),
                input_scale=input_scale(kind, alpha, sigma),
                from_state=from_state,
                from_output=from_output,
                updates=(update,),
                level=(alpha, sigma),
            )
        )
    alpha, sigma = map(float, schedule.marginal(float(grid.lambdas[0])))
    return SolverTable(
        name="ddim_inverse",
        num_registers=1,
        rows=tuple(rows),
        prediction="eps",
        description=f"{kind} model, {mode}, {grid.name} grid reversed",
        end_level=(alpha, sigma),
    )
