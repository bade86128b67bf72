"""Time grids: where the model is evaluated, and the noise level each step goes to.

A grid is three arrays: the times handed to the model, the lambda of the state at each evaluation,
and the lambda each step goes to. They are apart because reference implementations keep them apart:
Karras spacing rounds the time the model sees but not the noise level, and DDIM steps to
``t - T//N`` rather than to the next entry of its list.

The conventions for the same word, all from diffusers (``timestep_spacing``):

=========  =====================================  ========================================
spacing    "ddim" (DDIM, DDPM, PNDM)              "dpm" (DPM-Solver, UniPC, DEIS)
=========  =====================================  ========================================
linspace   linspace(0, T-1, N)                    linspace(0, T-1, N+1) without the 0
leading    (0..N-1) * (T // N) + steps_offset     (1..N) * (T // (N+1)) + steps_offset
trailing   round(arange(T, 0, -T/N)) - 1          the same
quadratic  floor(linspace(0, sqrt(0.8 T), N)^2)   the same
=========  =====================================  ========================================

(quadratic: the DDIM authors' code, which leaves the noisiest fifth of the timesteps out.)

"sgm_uniform" is linspace(T-1, 0, N+1) without the 0, unrounded, under every convention (ComfyUI's
and A1111's "SGM Uniform"); lambda is linear in t in between, as there.

"euler" (Euler, Heun, LMS) is "ddim" without the rounding of linspace; between whole timesteps
sigma/alpha is linear in t, and level spacings hand the model fractional times.

On a schedule in continuous time, "linspace" is N points uniform from t_max towards t_min, without
t_min (time-shifted where the schedule has a shift).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.solvers.schedules import DiscreteVP, NoiseSchedule, unknown

TIME_SPACINGS = ("linspace", "leading", "trailing", "quadratic", "sgm_uniform")
LEVEL_SPACINGS = ("karras", "lambda", "exponential", "beta")
# "Align your steps" (arXiv 2404.14507): the timesteps found for ten steps with each model.
AYS_TIMESTEPS: dict[str, tuple[int, ...]] = {
    "ays_sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "ays_sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}
# And for Stable Video Diffusion ten steps of sigma/alpha (its appendix B).
AYS_SIGMAS: dict[str, tuple[float, ...]] = {
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
SPACINGS = (*TIME_SPACINGS, *LEVEL_SPACINGS, *AYS_TIMESTEPS, *AYS_SIGMAS, "angle")
# The spacings whose timesteps are T//N apart, more or less.
STRIDED = ("linspace", "leading", "trailing")
CONVENTIONS = ("ddim", "dpm", "euler")
FINALS = ("zero", "sigma_min")
MODES = ("parity", "exact")


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """N model evaluations from much noise to little.

    times: float64 [N], the times handed to the model.
    lambdas: float64 [N], strictly increasing: ln(alpha/sigma) of the state at each evaluation.
    targets: float64 [N], ln(alpha/sigma) after each step; +inf is the clean sample. A multistep
        solver needs ``targets[i] == lambdas[i+1]``, see :attr:`contiguous`.
    planned_steps: N before :meth:`from_step`; rules that depend on the number of steps use it.
    """

    name: str
    times: np.ndarray
    lambdas: np.ndarray
    targets: np.ndarray
    planned_steps: int

    def __post_init__(self) -> None:
        for field in ("times", "lambdas", "targets"):
            values = np.array(getattr(self, field), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, field, values)
        n = self.times.size
        if n < 1 or any(
            getattr(self, field).shape != (n,) for field in ("times", "lambdas", "targets")
        ):
            raise ValueError(
                "times, lambdas and targets must be 1-d of one length >= 1, got "
                f"{self.times.shape}, {self.lambdas.shape}, {self.targets.shape}"
            )
        if not np.all(np.isfinite(self.times)):
            raise ValueError(f"times must be finite, got {self.times}")
        if np.any(np.isnan(self.lambdas)) or np.any(np.isnan(self.targets)):
            raise ValueError("lambdas and targets must not be NaN")
        with np.errstate(invalid="ignore"):
            repeated = np.flatnonzero(~(np.diff(self.lambdas) > 0))
        if repeated.size:
            i = int(repeated[0])
            raise ValueError(
                "lambdas must increase strictly (equal ones would repeat a step); "
                f"evaluations {i} and {i + 1} have {self.lambdas[i]:g} and "
                f"{self.lambdas[i + 1]:g}: use fewer steps"
            )
        if np.any(self.targets < self.lambdas):
            i = int(np.flatnonzero(self.targets < self.lambdas)[0])
            raise ValueError(f"targets must not add noise, step {i} does")

    def __len__(self) -> int:
        return self.times.size

    @property
    def contiguous(self) -> bool:
        """Whether every step ends where the next evaluation is."""
        return bool(np.array_equal(self.targets[:-1], self.lambdas[1:]))

    def from_step(self, start: int) -> TimeGrid:
        """The grid without its first ``start`` evaluations (image-to-image starts part way)."""
        if not 0 <= start < len(self):
            raise ValueError(f"start must be in 0..{len(self) - 1}, got {start}")
        return dataclasses.replace(
            self,
            times=self.times[start:],
            lambdas=self.lambdas[start:],
            targets=self.targets[start:],
        )

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self)} evaluations", "step  time       lambda     target"]
        for i, (t, lam, target) in enumerate(
            zip(self.times, self.lambdas, self.targets, strict=True)
        ):
            lines.append(f"{i:<4}  {t:<9.6g}  {lam:<9.6g}  {target:.6g}")
        return "\n".join(lines)


def check_choice(arg: str, value: str, choices: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(unknown(arg, str(value), choices))


def check_steps(steps: int, most: int | None = None) -> None:
    """TypeError or ValueError unless ``steps`` is an integer in 1..most."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise TypeError(f"steps must be an integer, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if most is not None and steps > most:
        raise ValueError(
            f"steps must be at most {most} (the model's training timesteps), got {steps}"
        )


def check_data_std(data_std: float) -> None:
    """ValueError unless ``data_std`` is a positive finite number."""
    if not (isinstance(data_std, (int, float)) and math.isfinite(data_std) and data_std > 0):
        raise ValueError(f"data_std must be positive and finite, got {data_std}")


def angle(lam: float) -> float:
    """atan(sigma/alpha) at lambda: pi/2 at -inf, pure noise, and 0 at inf, the clean sample."""
    return math.atan2(1.0, math.exp(lam)) if lam < 700 else math.exp(-lam)


def timesteps(
    num_timesteps: int, steps: int, spacing: str, convention: str = "ddim", steps_offset: int = 0
) -> np.ndarray:
    """The timesteps of a time spacing, descending, float64 [N].

    See the table at the top of this file for ``convention``; ``steps_offset`` acts on "leading" and
    "quadratic".
    """
    check_choice("spacing", spacing, TIME_SPACINGS)
    check_choice("convention", convention, CONVENTIONS)
    check_steps(steps, num_timesteps)
    if spacing == "sgm_uniform":
        return np.linspace(num_timesteps - 1, 0, steps + 1)[:-1]
    extra = 1 if convention == "dpm" else 0
    if spacing == "linspace":
        points = np.linspace(0, num_timesteps - 1, steps + extra)[::-1]
        return points.copy() if convention == "euler" else points[:steps].round()
    if spacing == "leading":
        ratio = num_timesteps // (steps + extra)
        return (np.arange(extra, steps + extra) * float(ratio) + steps_offset)[::-1].copy()
    if spacing == "quadratic":
        ramp = np.linspace(0.0, 1.0, steps) if steps > 1 else np.ones(1)
        return np.floor((ramp * math.sqrt(0.8 * num_timesteps)) ** 2)[::-1] + steps_offset
    # arange's own length can be one too many when T/N is not exact in binary.
    points = np.round(num_timesteps - np.arange(steps) * (num_timesteps / steps))
    return points - 1


def make_grid(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "leading",
    *,
    convention: str = "ddim",
    steps_offset: int = 0,
    final: str = "zero",
    stride: bool = False,
    mode: str = "parity",
    rho: float = 7.0,
    data_std: float = 1.0,
) -> TimeGrid:
    """A grid by the name of its spacing.

    spacing: "linspace", "leading", "trailing", "quadratic", "sgm_uniform": times, see the top of
        this file.
        "karras": sigma/alpha between the schedule's ends by the rho rule of EDM (arXiv 2206.00364,
        equation 5). "lambda": uniform in lambda (DPM-Solver, arXiv 2206.00927, section 3.3), and
        "exponential" its other name, with the conventions diffusers has under that one. "beta":
        sigma/alpha at the quantiles of Beta(0.6, 0.6) (arXiv 2407.12173; needs SciPy).
        "ays_sd15", "ays_sdxl": those of "Align your steps" (arXiv 2404.14507); for other numbers
        of steps than ten, lambda is interpolated. "ays_svd": sigma/alpha from 700 to 0.002 from the
        same paper, lambda interpolated (``edm(0.002, 700.0)`` is a schedule that has them).
        "angle": the square root of
        atan(sigma/(alpha data_std)) is uniform, to 1/(N + 10) but not below ``t_min``'s; what is
        left is for the solver's last step. Times are fractional in both modes.
    final: "zero": the last step goes to the clean sample. "sigma_min": to the noise of ``t_min``.
    stride: step i goes to ``t_i - T//N`` instead of to the next evaluation (DDIM in diffusers).
    mode: in "parity", these four hand the model whole timesteps and, with
        ``final="sigma_min"``, end on an empty step, as diffusers does. In "exact" the times are
        fractional and agree with the noise levels, and no step is empty.

    Raises ValueError for a grid with repeated noise levels or timesteps the schedule lacks.
    """
    check_choice("spacing", spacing, SPACINGS)
    check_choice("final", final, FINALS)
    check_choice("mode", mode, MODES)
    check_steps(steps)
    if stride and spacing not in STRIDED:
        raise ValueError(f"stride must be False for {spacing} spacing, got True")
    if spacing in LEVEL_SPACINGS:
        rounded = mode == "parity" and convention != "euler"
        return _level_grid(schedule, steps, spacing, final, mode, rounded, rho)
    if spacing in AYS_TIMESTEPS:
        return _ays_grid(schedule, steps, spacing, final)
    if spacing in AYS_SIGMAS:
        return _ays_sigma_grid(schedule, steps, spacing, final)
    if spacing == "angle":
        check_data_std(data_std)
        return _angle_grid(schedule, steps, final, data_std)
    if not isinstance(schedule, DiscreteVP):
        if spacing != "linspace":
            raise TypeError(
                f"spacing must be linspace, {', '.join(LEVEL_SPACINGS)} for a schedule in "
                f"continuous time ({schedule.name}), got {spacing!r}"
            )
        times = schedule.between(np.arange(steps) / steps)
        lambdas = schedule.lambda_at(times)
        targets = np.append(lambdas[1:], end_of(schedule, final))
        return TimeGrid(f"linspace ({schedule.name})", times, lambdas, targets, steps)
    times = timesteps(schedule.num_timesteps, steps, spacing, convention, steps_offset)
    if times[0] > schedule.t_max or times[-1] < schedule.t_min:
        raise ValueError(
            f"steps_offset must keep the timesteps in 0..{schedule.t_max:g}, got {steps_offset} "
            f"({steps} steps: {times[0]:g} .. {times[-1]:g})"
        )
    lambdas = schedule.lambda_at(times)
    if convention == "euler" and spacing != "sgm_uniform":
        lambdas = _linear_in_sigma(schedule, times)
    end = end_of(schedule, final)
    if stride:
        previous = times - schedule.num_timesteps // steps
        inside = schedule.lambda_at(np.maximum(previous, 0))
        targets = np.where(previous >= 0, inside, end)
    else:
        targets = np.append(lambdas[1:], end)
    return TimeGrid(f"{spacing} ({convention})", times, lambdas, targets, steps)


def explicit_grid(
    schedule: NoiseSchedule, times: Sequence[float] | np.ndarray, *, final: str = "zero"
) -> TimeGrid:
    """A grid through the given times, which must be finite, in range and strictly decreasing."""
    check_choice("final", final, FINALS)
    points = np.asarray(times, dtype=np.float64)
    if points.ndim != 1 or points.size == 0:
        raise ValueError(f"timesteps must be a non-empty list of numbers, got {times}")
    if not np.all(np.isfinite(points)):
        raise ValueError(f"timesteps must be finite, got {times}")
    if np.any(np.diff(points) >= 0):
        raise ValueError(f"timesteps must decrease strictly, got {times}")
    if points[0] > schedule.t_max or points[-1] < schedule.t_min:
        raise ValueError(
            f"timesteps must be in {schedule.t_min:g}..{schedule.t_max:g}, got {times}"
        )
    lambdas = schedule.lambda_at(points)
    return TimeGrid(
        "explicit", points, lambdas, np.append(lambdas[1:], end_of(schedule, final)), points.size
    )


def sigma_grid(
    schedule: NoiseSchedule, sigmas: Sequence[float] | np.ndarray, *, name: str = "sigmas"
) -> TimeGrid:
    """A grid through the given sigma/alpha, which must decrease strictly; N values are N-1 steps.

    The last value is where the run ends: 0 is the clean sample. The first may be infinite on a
    schedule that starts from noise alone. Times are fractional; the model is given the nearest time
    it knows for values beyond the schedule's range.

    Raises ValueError for fewer than two values, and for values that are negative or do not
    decrease.
    """
    points = np.asarray(sigmas, dtype=np.float64)
    if points.ndim != 1 or points.size < 2:
        raise ValueError(f"sigmas must be a list of 2 or more numbers, got {sigmas}")
    with np.errstate(invalid="ignore"):
        decreasing = np.all(np.diff(points) < 0)
    if not decreasing or points[-1] < 0:
        raise ValueError(f"sigmas must decrease strictly and end at 0 or above, got {sigmas}")
    if math.isinf(points[0]) and math.isfinite(schedule.lambda_at(schedule.t_max)):
        raise ValueError(f"sigmas must be finite for the schedule {schedule.name}, got {sigmas}")
    with np.errstate(divide="ignore"):
        lambdas = -np.log(points)
    times = schedule.time_at(lambdas[:-1])
    return TimeGrid(name, times, lambdas[:-1], lambdas[1:], points.size - 1)


def _beta_quantiles(probabilities: np.ndarray, shape: float = 0.6) -> np.ndarray:
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ValueError("spacing='beta' needs SciPy: pip install scipy") from error
    return np.asarray(beta.ppf(probabilities, shape, shape), dtype=np.float64)


def end_of(schedule: NoiseSchedule, final: str) -> float:
    """The lambda a run ends at: +inf for "zero", the schedule's largest for "sigma_min"."""
    check_choice("final", final, FINALS)
    return math.inf if final == "zero" else float(schedule.lambda_at(schedule.t_min))


def _ays_grid(schedule: NoiseSchedule, steps: int, spacing: str, final: str) -> TimeGrid:
    if not isinstance(schedule, DiscreteVP) or schedule.num_timesteps != 1000:
        raise ValueError(
            f"schedule must have 1000 timesteps for {spacing} spacing, got {schedule.name}"
        )
    known = schedule.lambda_at(AYS_TIMESTEPS[spacing])
    places = np.linspace(0, len(known) - 1, steps) if steps > 1 else np.zeros(1)
    times = np.round(schedule.time_at(np.interp(places, np.arange(len(known)), known)))
    lambdas = schedule.lambda_at(times)
    return TimeGrid(spacing, times, lambdas, np.append(lambdas[1:], end_of(schedule, final)), steps)


def _ays_sigma_grid(schedule: NoiseSchedule, steps: int, spacing: str, final: str) -> TimeGrid:
    known = AYS_SIGMAS[spacing]
    with np.errstate(over="ignore"):
        most, least = np.exp(-schedule.lambda_at(np.array([schedule.t_max, schedule.t_min])))
    rounding = 1e-12
    if most < known[0] * (1 - rounding) or least > known[-1] * (1 + rounding):
        raise ValueError(
            f"schedule must have sigma/alpha from {known[0]:g} to {known[-1]:g} for {spacing} "
            f"spacing, got {most:g} to {least:g} ({schedule.name})"
        )
    places = np.linspace(0, len(known) - 1, steps + 1)
    points = np.exp(np.interp(places, np.arange(len(known)), np.log(known)))
    if final == "zero":
        points[-1] = 0.0
    return sigma_grid(schedule, points, name=spacing)


def _angle_grid(schedule: NoiseSchedule, steps: int, final: str, data_std: float) -> TimeGrid:
    most, least = (float(schedule.lambda_at(t)) for t in (schedule.t_max, schedule.t_min))
    offset = math.log(data_std)  # sigma/(alpha data_std) = e^-(lambda + offset)
    ends = [angle(most + offset), angle(least + offset)]
    if final == "zero":
        ends[1] = max(ends[1], 1.0 / (steps + 10))
    ramp = np.linspace(0.0, 1.0, steps if final == "zero" else steps + 1)[:steps]
    roots = np.sqrt(ends[0]) + ramp * (np.sqrt(ends[1]) - np.sqrt(ends[0]))
    lambdas = -np.log(np.tan(roots**2)) - offset
    lambdas[0] = most
    lambdas = np.minimum(lambdas, least)
    targets = np.append(lambdas[1:], end_of(schedule, final))
    return TimeGrid("angle", schedule.time_at(lambdas), lambdas, targets, steps)


def _linear_in_sigma(schedule: DiscreteVP, times: np.ndarray) -> np.ndarray:
    whole = np.arange(schedule.num_timesteps)
    return -np.log(np.interp(times, whole, np.exp(-schedule.lambda_at(whole))))


def _level_grid(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str,
    final: str,
    mode: str,
    rounded: bool,
    rho: float,
) -> TimeGrid:
    """Grids laid out in noise level rather than in time."""
    ends = schedule.lambda_at(np.array([schedule.t_max, schedule.t_min]))
    if not np.all(np.isfinite(ends)):
        raise ValueError(
            f"spacing must be linspace, leading or trailing for a schedule whose noise has no "
            f"finite range, got {spacing!r}"
        )
    # In exact mode the end is a point of the grid; diffusers repeats it as the target.
    closing = mode == "exact" and final == "sigma_min"
    ramp = np.linspace(0.0, 1.0, steps + 1 if closing else steps)
    if spacing == "karras":
        most, least = np.exp(-ends / rho)  # (sigma/alpha)^(1/rho)
        lambdas = -rho * np.log(most + ramp * (least - most))
    elif spacing == "beta":
        most, least = np.exp(-ends)
        lambdas = -np.log(least + (most - least) * _beta_quantiles(1.0 - ramp))
    else:
        lambdas = ends[0] + ramp * (ends[1] - ends[0])
    # Rounding must not push the ends out of the schedule's range.
    lambdas[-1] = ends[1]
    lambdas[0] = ends[0]
    targets = np.append(lambdas[1:], end_of(schedule, final))
    if closing:
        lambdas, targets = lambdas[:-1], targets[:-1]
    times = schedule.time_at(lambdas)
    if rounded and isinstance(schedule, DiscreteVP):
        # diffusers rounds, except for the cosine schedule, where a cast to int64 truncates.
        truncated = schedule.name in ("cosine", "squaredcos_cap_v2") or spacing in (
            "exponential",
            "beta",
        )
        times = np.floor(times) if truncated else np.round(times)
    return TimeGrid(spacing, times, lambdas, targets, steps)
