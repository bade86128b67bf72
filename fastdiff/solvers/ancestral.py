"""k-diffusion's single-step solvers of two evaluations: DPM2, DPM++ 2S and DPM++ SDE.

In y = x/alpha and rho = sigma/alpha. An ancestral step from rho to rho_to of size eta goes to
rho_down and adds noise of deviation rho_up, with h = lambda_to - lambda ::

    rho_up^2 = eta^2 rho_to^2 (1 - e^{-2h})       rho_down^2 = rho_to^2 - rho_up^2

which is the DDIM step of that eta (``ddim.posterior``). The second evaluation D' replaces the first
one, D = x0, and lies at ::

    dpm_2              sqrt(rho rho_down), reached with D; y' = y + (rho_down - rho)/rho_mid (y_mid - D')
    dpmpp_2s_ancestral the same place;    y' = (rho_down/rho) y + (1 - rho_down/rho) D'
    dpmpp_sde          sqrt(rho rho_to), reached by an ancestral step of its own; y' as above

The noise z of the whole step of dpmpp_sde and z1 of its first half belong to one Brownian path,
z = sqrt(w) z1 + sqrt(1 - w) z2: independent noises have weak order 1 instead of 2. In "parity" the
path's time is rho (k-diffusion's noise sampler), w = (rho - rho_mid)/(rho - rho_to). In "exact" it
is that of the SDE whose steps these are, where the half's noise decays over the other half,
w = (1 - k1)/k1 k/(1 - k) with k = (rho_down/rho_to)^2 of the whole and k1 of the half; for eta = 1,
w = expm1(h)/expm1(2h).

Source: k-diffusion (Crowson), whose ``sample_*`` functions have these names; diffusers'
KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler and DPMSolverSDEScheduler.
"""  # noqa: E501

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from fastdiff.solvers.ddim import posterior
from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.multistep import check_joined
from fastdiff.solvers.prediction import Step, canonical, step_between, steps_of, table_of
from fastdiff.solvers.runge_kutta import midpoint_update
from fastdiff.solvers.schedules import DiscreteVP, NoiseSchedule
from fastdiff.solvers.singlestep import check_eta, log_kept
from fastdiff.solvers.table import Row, SolverTable, Update


def dpm_2(
    schedule: NoiseSchedule, grid: TimeGrid, *, prediction: str = "eps", mode: str = "parity"
) -> SolverTable:
    """The table of DPM2: 2N - 1 evaluations for N steps to the clean sample, the last Euler's.

    mode: in "parity", a Karras grid hands a model with whole timesteps those at the ends of steps,
        and times between them inside, as diffusers' KDPM2DiscreteScheduler does.

    Raises ValueError for an unknown prediction or mode, and for a grid whose steps do not join.
    """
    return _dpm_2("dpm_2", schedule, grid, prediction, mode, 0.0, 1.0)


def dpm_2_ancestral(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> SolverTable:
    """The table of DPM2 with ancestral noise: 2N - 1 evaluations and N - 1 draws.

    eta: 0 (then it is DPM2) to 1. s_noise: a factor on the noise. mode: as of :func:`dpm_2`.

    Raises ValueError for eta outside 0..1, a negative s_noise, an unknown prediction or mode, and
    for a grid whose steps do not join.
    """
    check_eta(eta, s_noise)
    return _dpm_2("dpm_2_ancestral", schedule, grid, prediction, mode, eta, s_noise)


def dpmpp_2s_ancestral(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> SolverTable:
    """The table of DPM-Solver++(2S) with ancestral noise: 2N - 1 evaluations and N - 1 draws.

    eta: 0 (then it is DPM-Solver++(2S)) to 1. s_noise: a factor on the noise. The modes are one.

    Raises ValueError for eta outside 0..1, a negative s_noise, an unknown prediction or mode, and
    for a grid whose steps do not join.
    """
    check_eta(eta, s_noise)
    kind = canonical(prediction)

    def halves(step: Step, draws: Iterator[int]) -> tuple[Row, Row]:
        mid = _mid(schedule, kind, step, step.h - 0.5 * log_kept(step.h, eta))
        whole, from_x0, std = posterior(step, eta)
        second = Update(0, (0.0, whole), from_x0, s_noise * std)
        return _to_mid(step, mid, 2), mid.row(second, draw=_draw(std, draws))

    options = f"eta={eta:g}, s_noise={s_noise:g}"
    name = "dpmpp_2s_ancestral"
    return _table(name, schedule, grid, kind, mode, eta, s_noise, 2, halves, options)


def dpmpp_sde(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> SolverTable:
    """The table of DPM++ SDE: 2N - 1 evaluations and 2N - 2 draws for N steps to the clean sample.

    eta: 0 (then it is DPM-Solver++(2S)) to 1. s_noise: a factor on the noise.
    mode: which path the two noises of a step lie on, see the top of this file. Each is of the law
        of the reference's; the reference draws them from a Brownian tree of its own.

    Raises ValueError for eta outside 0..1, a negative s_noise, an unknown prediction or mode, and
    for a grid whose steps do not join.
    """
    check_eta(eta, s_noise)
    kind = canonical(prediction)

    def halves(step: Step, draws: Iterator[int]) -> tuple[Row, Row]:
        mid = _mid(schedule, kind, step, step.h)
        half = replace(step, target=mid.lam, alpha_to=mid.alpha, sigma_to=mid.sigma)
        from_x, from_x0, std = posterior(half, eta)
        whole, whole_x0, whole_std = posterior(step, eta)
        noisy = s_noise * std > 0
        keep = [Update(1, (1.0, 0.0, 0.0), 0.0)]
        if noisy:
            keep.append(Update(2, (0.0, 0.0, 0.0), 0.0, 1.0))
        first = Update(0, (from_x, 0.0, 0.0), from_x0, s_noise * std)
        share = _shared(step.h, eta, mode) if noisy else 0.0
        second = Update(
            0,
            (0.0, whole, s_noise * whole_std * math.sqrt(share)),
            whole_x0,
            s_noise * whole_std * math.sqrt(1.0 - share),
        )
        at_first = step.row(first, *keep, draw=_draw(s_noise * std, draws))
        return at_first, mid.row(second, draw=_draw(second.from_noise, draws))

    options = f"eta={eta:g}, s_noise={s_noise:g}"
    return _table("dpmpp_sde", schedule, grid, kind, mode, eta, s_noise, 3, halves, options)


def _shared(h: float, eta: float, mode: str) -> float:
    """w: the share of the first half's noise in the variance of the whole step's."""
    if mode == "parity":
        return math.expm1(-0.5 * h) / math.expm1(-h)
    whole, half = log_kept(h, eta), log_kept(0.5 * h, eta)
    return math.expm1(-half) / math.expm1(-whole)


def _dpm_2(
    name: str,
    schedule: NoiseSchedule,
    grid: TimeGrid,
    prediction: str,
    mode: str,
    eta: float,
    s_noise: float,
) -> SolverTable:
    kind = canonical(prediction)
    whole = mode == "parity" and grid.name == "karras" and isinstance(schedule, DiscreteVP)

    def halves(step: Step, draws: Iterator[int]) -> tuple[Row, Row]:
        down = step.h - 0.5 * log_kept(step.h, eta)
        mid = _mid(schedule, kind, step, down)
        scales = (step.alpha, mid.alpha, step.alpha_to)
        # In units of rho.
        update = midpoint_update(scales, (1.0, math.exp(-0.5 * down), math.exp(-down)))
        std = posterior(step, eta)[2]
        update = replace(update, from_noise=s_noise * std)
        return _to_mid(step, mid, 2), mid.row(update, draw=_draw(std, draws))

    if whole:
        grid = replace(grid, times=grid.times.round())
    options = f"eta={eta:g}, s_noise={s_noise:g}" if name != "dpm_2" else ""
    return _table(name, schedule, grid, kind, mode, eta, s_noise, 2, halves, options)


def _table(
    name: str,
    schedule: NoiseSchedule,
    grid: TimeGrid,
    kind: str,
    mode: str,
    eta: float,
    s_noise: float,
    registers: int,
    halves: Callable[[Step, Iterator[int]], tuple[Row, Row]],
    options: str,
) -> SolverTable:
    """Two rows a step; one where the step is empty or its middle has no limit."""
    check_choice("mode", mode, MODES)
    check_joined(grid)
    rows: list[Row] = []
    draws = itertools.count()
    for step in steps_of(schedule, grid, kind):
        if step.h > 0 and math.isfinite(step.h):
            rows += halves(step, draws)
            continue
        from_x, from_x0, std = posterior(step, eta)
        update = Update(0, (from_x, *[0.0] * (registers - 1)), from_x0, s_noise * std)
        rows.append(step.row(update, draw=_draw(std, draws)))
    description = f"{options}{', ' * bool(options)}{kind} model, {mode}"
    return table_of(name, schedule, grid, rows, registers=registers, description=description)


def _mid(schedule: NoiseSchedule, kind: str, step: Step, length: float) -> Step:
    """The second evaluation, half of ``length`` in lambda from the first."""
    lam = step.lam + 0.5 * length
    time = float(schedule.time_at(lam))
    return step_between(schedule, kind, "x0", step.index, time, lam, step.target)


def _to_mid(step: Step, mid: Step, registers: int) -> Row:
    """The row that takes the state there without noise and keeps the old one in register 1."""
    reached = replace(step, target=mid.lam, alpha_to=mid.alpha, sigma_to=mid.sigma)
    from_x, from_x0, _ = posterior(reached, 0.0)
    rest = [0.0] * (registers - 1)
    return step.row(Update(0, (from_x, *rest), from_x0), Update(1, (1.0, *rest), 0.0))


def _draw(std: float, draws: Iterator[int]) -> int:
    return next(draws) if std > 0 else -1
