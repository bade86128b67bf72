"""Sampling with models that jump to the clean sample: LCM, TCD and consistency models.

LCM (arXiv 2310.04378, algorithm 3) and consistency models (arXiv 2303.01469, algorithm 1) predict
the clean sample and noise it again. TCD (arXiv 2402.19159, algorithm 4) jumps along the ODE to a
time s below the next one and adds the noise of the forward process from s to there::

    x_s = alpha_s x0 + sigma_s eps                      s = (1 - eta) t'
    x'  = (alpha'/alpha_s) x_s + sigma' sqrt(1 - e^{-2 (lambda_s - lambda')}) z
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fastdiff.solvers.grids import MODES, TimeGrid, check_choice, check_steps, end_of
from fastdiff.solvers.prediction import Step, canonical, steps_of, table_of
from fastdiff.solvers.schedules import DiscreteVP, NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update

SIGMA_DATA = 0.5


def lcm_grid(
    schedule: NoiseSchedule, steps: int, original_steps: int = 50, *, final: str = "zero"
) -> TimeGrid:
    """``steps`` of the ``original_steps`` timesteps the model was distilled on.

    Those are k T//original_steps - 1 for k = 1 .. original_steps; of them, in decreasing order, the
    ones at floor(i original_steps/steps). ``final``: as in :func:`make_grid`.
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
    targets = np.append(lambdas[1:], end_of(schedule, final))
    return TimeGrid("lcm", times, lambdas, targets, steps)


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


def tcd(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    eta: float = 0.3,
) -> SolverTable:
    """The table of trajectory consistency distillation's strategic stochastic sampling.

    eta: gamma in the paper, within 0..1. 0 is DDIM, 1 goes through the end of the trajectory. The
        last step ends where the grid does and adds no noise.
    mode: "parity" is diffusers' TCDScheduler: on whole timesteps s is rounded down. Its runs end at
        the noise of timestep 0; ``final_sigmas_type="zero"`` goes to the clean sample instead.

    Raises ValueError for eta outside 0..1, an unknown prediction or mode, and a schedule whose
    times are not from 0 up (``edm``), where (1 - eta) t' means nothing.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    if not (isinstance(eta, (int, float)) and 0 <= eta <= 1):
        raise ValueError(f"eta must be in 0..1, got {eta}")
    if eta > 0 and schedule.t_min < 0:
        raise ValueError(f"schedule must have times from 0 up for tcd, got {schedule.name}")
    rows: list[Row] = []
    last = len(grid) - 1
    for step in steps_of(schedule, grid, kind):
        lam_s = step.target
        noisy = eta > 0 and step.index < last
        if noisy:
            lam_s = _further(schedule, float(grid.times[step.index + 1]), eta, mode)
            lam_s = max(lam_s, step.target)
        alpha_s, sigma_s = map(float, schedule.marginal(lam_s))
        update = Update(
            0,
            (step.alpha_to / alpha_s * sigma_s / step.sigma,),
            -step.alpha_to * math.expm1(step.lam - lam_s),
            step.sigma_to * math.sqrt(-math.expm1(2 * (step.target - lam_s))) if noisy else 0.0,
        )
        rows.append(step.row(update, draw=step.index if noisy else -1))
    description = f"eta={eta:g}, {kind} model, {mode}"
    return table_of("tcd", schedule, grid, rows, description=description)


def _further(schedule: NoiseSchedule, time: float, eta: float, mode: str) -> float:
    """lambda at (1 - eta) times ``time``."""
    if mode == "parity" and isinstance(schedule, DiscreteVP):
        # In float32, as there: one rounding can decide which timestep the floor is.
        at = float(np.floor(np.float32(1 - eta) * np.float32(time)))
    else:
        at = (1 - eta) * time
    return float(schedule.lambda_at(max(at, schedule.t_min)))


def consistency_grid(
    schedule: NoiseSchedule, steps: int, train_steps: int = 40, *, final: str = "zero"
) -> TimeGrid:
    """``steps`` of the ``train_steps`` Karras levels (rho 7) a consistency model was trained on.

    Every (train_steps//steps)-th, from the noisiest, as CMStochasticIterativeScheduler takes them.
    ``final``: as in :func:`make_grid`.
    """
    check_steps(steps)
    if train_steps < 2:
        raise ValueError(f"train_steps must be at least 2, got {train_steps}")
    if steps > train_steps:
        raise ValueError(f"steps must be in 1..{train_steps} (train_steps), got {steps}")
    ends = schedule.lambda_at(np.array([schedule.t_max, schedule.t_min]))
    if not np.all(np.isfinite(ends)):
        raise ValueError(
            "schedule must have a finite range of noise for a consistency grid, "
            f"got {schedule.name}"
        )
    most, least = np.exp(-ends / 7.0)
    ramp = np.arange(steps) * (train_steps // steps) / (train_steps - 1)
    lambdas = -7.0 * np.log(most + ramp * (least - most))
    lambdas = np.clip(lambdas, *ends)
    targets = np.append(lambdas[1:], end_of(schedule, final))
    return TimeGrid("consistency", schedule.time_at(lambdas), lambdas, targets, steps)


def consistency(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    s_noise: float = 1.0,
) -> SolverTable:
    """The table of multistep consistency sampling (arXiv 2303.01469, algorithm 1).

    With s = sigma/alpha, s_min that of the schedule's least noise and x0 the model's clean sample,
    x' = alpha' (x0 + sqrt(s'^2 - s_min^2) z).

    prediction: of a raw network F ("edm"), x0 is c_skip x + c_out F(c_in x) with the weights that
        make it x at s_min: c_skip = d^2/((s - s_min)^2 + d^2), c_out = (s - s_min) d/hypot(s, d),
        d = 0.5. Of any other kind, x0 is what it says.
    s_noise: a factor on the noise.
    mode: "parity" draws noise after the last of several steps too, with coefficient 0, as
        CMStochasticIterativeScheduler does.

    Raises ValueError for an unknown prediction or mode, or an s_noise that is negative.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    if not (math.isfinite(s_noise) and s_noise >= 0):
        raise ValueError(f"s_noise must be at least 0, got {s_noise}")
    least = math.exp(-float(schedule.lambda_at(schedule.t_min)))
    rows: list[Row] = []
    draws = 0
    last = len(grid) - 1
    if kind == "edm" and not math.isfinite(grid.lambdas[0]):
        raise ValueError(
            f"schedule must have some signal at the first step for an edm model, got alpha = 0 "
            f"({schedule.name})"
        )
    for step in steps_of(schedule, grid, kind):
        if kind == "edm":
            step = _bounded(step, least)
        s_to = 0.0 if step.index == last else step.sigma_to / step.alpha_to
        std = s_noise * math.sqrt(max(s_to - least, 0.0) * (s_to + least))
        draw = -1
        if std > 0 or (mode == "parity" and last > 0):
            draw, draws = draws, draws + 1
        alpha_to = 1.0 if step.index == last else step.alpha_to
        rows.append(step.row(Update(0, (0.0,), alpha_to, alpha_to * std), draw=draw))
    table = table_of("consistency", schedule, grid, rows, description=f"{kind} model, {mode}")
    return replace(table, end_level=(1.0, 0.0))


def _bounded(step: Step, least: float) -> Step:
    """The step with EDM's weights changed so that x0 is x at sigma/alpha = ``least``."""
    s = step.sigma / step.alpha
    skip = SIGMA_DATA**2 / ((s - least) ** 2 + SIGMA_DATA**2)
    out = (s - least) * SIGMA_DATA / math.hypot(s, SIGMA_DATA)
    return replace(step, from_state=skip / step.alpha, from_output=out)
