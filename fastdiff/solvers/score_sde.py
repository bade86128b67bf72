"""Predictor-corrector samplers of score-based SDEs (arXiv 2011.13456).

With s the score, a step of the forward process from level ' to the present one
x = a x' + sqrt(v) z, a = alpha/alpha' and v = sigma^2 - a^2 sigma'^2 (for VP a^2 = 1 - beta and
v = beta, for VE a = 1), the predictors are ::

    reverse_diffusion    x' = (2 - a) x + v s + sqrt(v) z                            (equation 46)
    ancestral_sampling   x' = (x + v s)/a + std z        std = sqrt(v) for VP, sigma'/sigma sqrt(v)
                                                         for VE       (equations 4 and 47)
    euler_maruyama       x' = (1 + b/2) x + b s + sqrt(b) z    b = beta(t) dt         VP
                         x' = x + b s + sqrt(b) z              b = 2 sigma^2 |d ln sigma|  VE

and the probability flow has half of the score's term and no noise (equation 13). The correctors,
run before the predictor at its level, are Langevin steps x + e s + sqrt(2e) z (algorithms 4, 5)::

    langevin    e = 2 a^2 (snr |z|/|s|)^2      norms averaged over the batch: a rule of the row
    ald         e = 2 a^2 (snr sigma)^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fastdiff.solvers.continuous import ContinuousVP, SigmaSchedule
from fastdiff.solvers.grids import MODES, TimeGrid, check_choice, check_steps, end_of
from fastdiff.solvers.prediction import Step, canonical, steps_of, table_of
from fastdiff.solvers.schedules import DiscreteVP, NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update

PREDICTORS = ("reverse_diffusion", "ancestral_sampling", "euler_maruyama", "none")
CORRECTORS = ("none", "langevin", "ald")
# Where the VE SDE stops, as a fraction of its time.
VE_EPS = 1e-5


def sde_grid(schedule: NoiseSchedule, steps: int, *, final: str = "zero") -> TimeGrid:
    """``steps`` evaluations uniform in the SDE's time, both ends among them.

    From 1 to t_end for VP, from 1 to 1e-5 for VE, whose sigma is geometric in time; whole timesteps
    from T-1 to 0 for a schedule that has those. Where the least noisy time has no noise at all
    (rectified flow), the steps are as long, but the last evaluation is a step before it.
    ``final``: as in :func:`make_grid`.
    """
    check_steps(steps, schedule.num_timesteps if isinstance(schedule, DiscreteVP) else None)
    if isinstance(schedule, SigmaSchedule):
        least, most = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
        lambdas = -(least + _sde_times(schedule, steps) * (most - least))
        lambdas[0] = schedule.lambda_at(schedule.t_max)
        times = schedule.time_at(lambdas)
    else:
        noisy = np.isfinite(schedule.lambda_at(schedule.t_min))
        times = schedule.between(np.linspace(0.0, 1.0, steps if noisy else steps + 1)[:steps])
        if isinstance(schedule, DiscreteVP):
            times = np.round(times)
        lambdas = schedule.lambda_at(times)
    return TimeGrid("sde", times, lambdas, np.append(lambdas[1:], end_of(schedule, final)), steps)


def _sde_times(schedule: ContinuousVP | SigmaSchedule, steps: int) -> np.ndarray:
    eps = schedule.t_end if isinstance(schedule, ContinuousVP) else VE_EPS
    return np.linspace(1.0, eps, steps)


@dataclass(frozen=True)
class _Transition:
    """What a step's coefficients are made of; see the top of this file.

    ratio: a. variance: v. posterior: the factor on sqrt(v) in ancestral_sampling. drift: b/2 x of
    euler_maruyama, diffusion: its b.
    """

    ratio: float
    variance: float
    posterior: float
    drift: float = 0.0
    diffusion: float = 0.0


def _exact(schedule: NoiseSchedule, step: Step) -> _Transition:
    """From the marginals at the two ends of the step."""
    ratio = step.alpha / step.alpha_to
    variance = step.sigma**2 * -math.expm1(-2.0 * step.h)
    if isinstance(schedule, SigmaSchedule):
        # ln sigma has no end: the step to the clean sample takes out the variance there is.
        amount = 2 * step.sigma**2 * step.h if math.isfinite(step.h) else variance
        return _Transition(ratio, variance, step.sigma_to / step.sigma, 0.0, amount)
    if isinstance(schedule, ContinuousVP):
        t, t_to = schedule.time_at(np.array([step.lam, step.target])) / schedule.time_scale
        if math.isinf(step.target):
            t_to = 0.0
        amount = float(_beta(schedule, t) * (t - t_to))
        return _Transition(ratio, variance, 1.0, amount / 2, amount)
    return _Transition(ratio, variance, 1.0)


def _beta(schedule: ContinuousVP, t: float) -> float:
    return schedule.beta_min + t * (schedule.beta_max - schedule.beta_min)


def _reference(schedule: ContinuousVP | SigmaSchedule, steps: int) -> list[_Transition]:
    """score_sde's: N betas, or N sigmas, indexed by floor(t (N - 1)), and dt = 1/N."""
    transitions = []
    times = _sde_times(schedule, steps)
    for t, index in zip(times, np.floor(times * (steps - 1)).astype(int), strict=True):
        if isinstance(schedule, ContinuousVP):
            betas = np.linspace(schedule.beta_min, schedule.beta_max, steps) / steps
            beta, amount = float(betas[index]), float(_beta(schedule, t)) / steps
            ratio = math.sqrt(1 - beta) if beta < 1 else math.nan
            transition = _Transition(ratio, beta, 1.0, amount / 2, amount)
        else:
            span = math.log(schedule.sigma_max / schedule.sigma_min)
            sigmas = schedule.sigma_min * np.exp(np.linspace(0.0, span, steps))
            sigma = float(sigmas[index])
            sigma_to = float(sigmas[index - 1]) if index > 0 else 0.0
            amount = 2 * span / steps * (schedule.sigma_min * math.exp(t * span)) ** 2
            variance = (sigma - sigma_to) * (sigma + sigma_to)
            transition = _Transition(1.0, variance, sigma_to / sigma, 0.0, amount)
        transitions.append(transition)
    return transitions


def _transitions(
    schedule: NoiseSchedule, grid: TimeGrid, steps: list[Step], mode: str
) -> list[_Transition]:
    if mode == "parity" and isinstance(schedule, (ContinuousVP, SigmaSchedule)):
        whole = sde_grid(schedule, grid.planned_steps)
        if np.array_equal(whole.lambdas[-len(grid) :], grid.lambdas):
            return _reference(schedule, grid.planned_steps)[-len(grid) :]
    return [_exact(schedule, step) for step in steps]


def _check_ratios(transitions: list[_Transition], grid: TimeGrid) -> None:
    if any(math.isnan(transition.ratio) for transition in transitions):
        raise ValueError(
            "steps must be above beta_max for the betas of score_sde to be below 1 "
            f"(mode='exact' takes fewer), got {grid.planned_steps}"
        )


def _predict(predictor: str, step: _Transition, flow: bool) -> tuple[float, float, float]:
    """(from_x, from_score, from_noise)."""
    half, noise = (0.5, 0.0) if flow else (1.0, 1.0)
    if predictor == "reverse_diffusion":
        return 2 - step.ratio, half * step.variance, noise * math.sqrt(step.variance)
    if predictor == "ancestral_sampling":
        std = step.posterior * math.sqrt(step.variance)
        return 1 / step.ratio, step.variance / step.ratio, std
    return 1 + step.drift, half * step.diffusion, noise * math.sqrt(step.diffusion)


def pc(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    snr: float = 0.16,
    n_steps: int = 1,
    probability_flow: bool = False,
    denoise: bool = True,
) -> SolverTable:
    """The table of a predictor-corrector sampler: N (n_steps + 1) evaluations, N without corrector.

    predictor: "reverse_diffusion", "ancestral_sampling", "euler_maruyama" (schedules with an SDE:
        ContinuousVP, VE and EDM) or "none".
    corrector: "langevin" (its rows have ``rule="langevin"``), "ald" or "none"; ``n_steps`` of them
        before each predictor, of the signal-to-noise ratio ``snr``.
    probability_flow: the predictor takes the step of the ODE.
    denoise: the predictor adds no noise in the last step.
    mode: "parity", on the grid "sde" of ContinuousVP, VE and EDM, is score_sde: the step's
        coefficients are of N discrete betas or sigmas, and every evaluation draws noise, even with
        coefficient 0. (Its index floor(t (N - 1)) is float64's here; in float32 it is off by one
        somewhere for many N above 1000. Euler-Maruyama's ``probability_flow``, an error there, is
        the ODE's step.)
        Other grids and "exact": from the noise levels at the two ends of each step.

    Raises ValueError for an unknown name or option value, two times "none", a probability flow by
    ancestral_sampling, euler_maruyama on another schedule, and ancestral_sampling from pure noise
    (alpha = 0), and beta_max steps or fewer of score_sde's betas, the largest of which is then 1.
    """
    check_choice("mode", mode, MODES)
    check_choice("predictor", predictor, PREDICTORS)
    check_choice("corrector", corrector, CORRECTORS)
    kind = canonical(prediction)
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"n_steps must be an integer of at least 1, got {n_steps}")
    if not (isinstance(snr, (int, float)) and math.isfinite(snr) and snr > 0):
        raise ValueError(f"snr must be positive, got {snr}")
    if predictor == corrector == "none":
        raise ValueError("corrector must be langevin or ald for the predictor 'none', got 'none'")
    if probability_flow and predictor == "ancestral_sampling":
        raise ValueError(
            "predictor must be reverse_diffusion or euler_maruyama for a probability flow, "
            f"got {predictor!r}"
        )
    if predictor == "euler_maruyama" and not isinstance(schedule, (ContinuousVP, SigmaSchedule)):
        raise ValueError(
            "predictor must be reverse_diffusion or ancestral_sampling for a schedule that is no "
            f"SDE in continuous time ({schedule.name}), got {predictor!r}"
        )
    steps = list(steps_of(schedule, grid, kind, "score"))
    transitions = _transitions(schedule, grid, steps, mode)
    if predictor != "euler_maruyama" or corrector != "none":
        _check_ratios(transitions, grid)
    if predictor == "ancestral_sampling" and steps[0].alpha == 0:
        raise ValueError(
            "predictor must be reverse_diffusion for a run that starts from pure noise "
            f"(alpha = 0), got {predictor!r}"
        )
    rows: list[Row] = []
    draws = 0
    for step, transition in zip(steps, transitions, strict=True):
        for _ in range(n_steps if corrector != "none" else 0):
            rows.append(_correct(corrector, step, transition.ratio, snr, draws))
            draws += 1
        if predictor == "none":
            continue
        from_x, from_score, std = _predict(predictor, transition, probability_flow)
        if denoise and step.index == len(grid) - 1:
            std = 0.0
        draw = -1
        if std > 0 or mode == "parity":
            draw, draws = draws, draws + 1
        rows.append(step.row(Update(0, (from_x,), from_score, std), draw=draw))
    flow = ", probability flow" if probability_flow else ""
    description = f"{predictor} and {corrector}{flow}, snr={snr:g}, {kind} model, {mode}"
    table = table_of("pc", schedule, grid, rows, prediction="score", description=description)
    if predictor == "none":
        table = replace(table, end_level=(steps[-1].alpha, steps[-1].sigma))
    if mode == "parity" and isinstance(schedule, ContinuousVP):
        table = replace(table, init_scale=1.0)
    return table


def _correct(corrector: str, step: Step, ratio: float, snr: float, draw: int) -> Row:
    size = 2 * (ratio * snr) ** 2
    if corrector == "ald":
        size *= step.sigma**2
    row = step.row(Update(0, (1.0,), size, math.sqrt(2 * size)), draw=draw)
    # At pure noise (a = 0) the corrector leaves the state as it is.
    return replace(row, rule="langevin") if corrector == "langevin" and size > 0 else row
