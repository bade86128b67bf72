"""Noise schedules in continuous time: VP with linear beta, VE, EDM and rectified flow.

Each is a closed form between time and lambda = ln(alpha/sigma); what time means is what the model
was trained to be given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from fastdiff.solvers.schedules import NoiseSchedule, vp_marginal


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _levels(lam: ArrayLike) -> np.ndarray:
    lam = np.asarray(lam, dtype=np.float64)
    if np.any(np.isnan(lam)):
        raise ValueError(f"lam must not be NaN, got {lam}")
    return lam


@dataclass(frozen=True)
class ContinuousVP(NoiseSchedule):
    """The VP SDE with beta(t) = beta_min + t (beta_max - beta_min) (arXiv 2011.13456, app. C).

    Its time runs over ``t_end .. 1``; the model is given ``time_scale`` times that (999 for the
    networks of score_sde, which were trained on 1000 timesteps).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_end: float = 1e-3
    time_scale: float = 1.0
    name: str = "vp"

    def __post_init__(self) -> None:
        _check_positive(
            beta_min=self.beta_min,
            beta_max=self.beta_max,
            t_end=self.t_end,
            time_scale=self.time_scale,
        )
        if self.beta_max <= self.beta_min:
            raise ValueError(
                f"beta_max must be above beta_min ({self.beta_min:g}), got {self.beta_max:g}"
            )
        if self.t_end >= 1:
            raise ValueError(f"t_end must be below 1, got {self.t_end:g}")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """The time with the least noise."""
        return self.t_end * self.time_scale

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The time with the most noise."""
        return self.time_scale

    def lambda_at(self, t: ArrayLike) -> np.ndarray:
        """ln(alpha/sigma) with ln alpha = -t^2 (beta_max - beta_min)/4 - t beta_min/2."""
        t = np.asarray(t, dtype=np.float64)
        self._check_times(t)
        s = t / self.time_scale
        log_alpha = -(s**2) * (self.beta_max - self.beta_min) / 4 - s * self.beta_min / 2
        return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))

    def time_at(self, lam: ArrayLike) -> np.ndarray:
        """The positive root of the quadratic for ln alpha, in the form without cancellation."""
        slope = self.beta_max - self.beta_min
        four = 2 * slope * np.logaddexp(-2 * _levels(lam), 0.0)  # -4 slope ln alpha
        s = four / (np.sqrt(self.beta_min**2 + four) + self.beta_min) / slope
        return np.clip(s * self.time_scale, self.t_min, self.t_max)

    def marginal(self, lam: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """alpha^2 + sigma^2 = 1."""
        return vp_marginal(lam)


@dataclass(frozen=True)
class SigmaSchedule(NoiseSchedule):
    """x = x0 + sigma eps (alpha = 1): VE and EDM.

    Grids are Karras' unless another is asked for.

    sigma_min, sigma_max: the noise levels at the ends. logarithmic: the model is given
    ln(sigma)/4 (EDM's c_noise, arXiv 2206.00364, table 1) instead of sigma (VE, arXiv 2011.13456).
    time_scale: what either is multiplied with (1000 for the networks of consistency models).
    """

    sigma_min: float
    sigma_max: float
    logarithmic: bool = False
    name: str = "sigma"
    time_scale: float = 1.0
    spacing: ClassVar[str | None] = "karras"

    def __post_init__(self) -> None:
        _check_positive(
            sigma_min=self.sigma_min, sigma_max=self.sigma_max, time_scale=self.time_scale
        )
        if self.sigma_max <= self.sigma_min:
            raise ValueError(
                f"sigma_max must be above sigma_min ({self.sigma_min:g}), got {self.sigma_max:g}"
            )

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """The time at sigma_min."""
        return self._time(self.sigma_min)

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The time at sigma_max."""
        return self._time(self.sigma_max)

    def _time(self, sigma: float) -> float:
        return self.time_scale * (math.log(sigma) / 4 if self.logarithmic else sigma)

    def lambda_at(self, t: ArrayLike) -> np.ndarray:
        """-ln sigma."""
        t = np.asarray(t, dtype=np.float64)
        self._check_times(t)
        t = t / self.time_scale
        return -4 * t if self.logarithmic else -np.log(t)

    def time_at(self, lam: ArrayLike) -> np.ndarray:
        """The inverse, clipped to the schedule's range."""
        lam = _levels(lam)
        with np.errstate(over="ignore"):
            t = self.time_scale * (-lam / 4 if self.logarithmic else np.exp(-lam))
        return np.clip(t, self.t_min, self.t_max)

    def marginal(self, lam: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """(1, e^-lambda)."""
        lam = np.asarray(lam, dtype=np.float64)
        return np.ones_like(lam), np.exp(-lam)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> SigmaSchedule:
    """EDM's noise levels (arXiv 2206.00364, table 1); ``prediction="edm"`` for its raw networks."""
    return SigmaSchedule(sigma_min, sigma_max, logarithmic=True, name="edm")


def cm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> SigmaSchedule:
    """EDM's noise levels with consistency models' times, 1000 ln(sigma)/4 (arXiv 2303.01469).

    ``prediction="edm"`` for their raw networks, with the solver "consistency".
    """
    return SigmaSchedule(sigma_min, sigma_max, logarithmic=True, name="cm", time_scale=1000.0)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> SigmaSchedule:
    """The VE SDE's noise levels (arXiv 2011.13456, appendix C); the model is given sigma."""
    return SigmaSchedule(sigma_min, sigma_max, name="ve")


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """Rectified flow: x = (1 - s) x0 + s eps (arXiv 2209.03003); the model is given time_scale*s.

    shift: grids that are uniform in time are warped to s -> shift s/(1 + (shift - 1) s), which
        spends more steps at much noise (SD3, arXiv 2403.03206, equation 23). 1 leaves them.
        :func:`dynamic_shift` gives FLUX's, which depends on the resolution.
    """

    shift: float = 1.0
    time_scale: float = 1000.0
    name: str = "flow"

    def __post_init__(self) -> None:
        _check_positive(shift=self.shift, time_scale=self.time_scale)

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """0: no noise."""
        return 0.0

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The time of pure noise."""
        return self.time_scale

    def lambda_at(self, t: ArrayLike) -> np.ndarray:
        """ln((1 - s)/s); infinite at both ends."""
        t = np.asarray(t, dtype=np.float64)
        self._check_times(t)
        s = t / self.time_scale
        with np.errstate(divide="ignore"):
            return np.log1p(-s) - np.log(s)

    def time_at(self, lam: ArrayLike) -> np.ndarray:
        """time_scale times sigma."""
        return self.time_scale * self.marginal(_levels(lam))[1]

    def marginal(self, lam: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """(sigmoid(lambda), sigmoid(-lambda))."""
        lam = np.asarray(lam, dtype=np.float64)
        small = np.exp(-np.abs(lam))
        major, minor = 1.0 / (1.0 + small), small / (1.0 + small)
        return np.where(lam >= 0, major, minor), np.where(lam >= 0, minor, major)

    def between(self, fraction: np.ndarray) -> np.ndarray:
        """Times from t_max (0) to t_min (1), warped by ``shift``."""
        s = 1.0 - np.asarray(fraction, dtype=np.float64)
        return self.time_scale * self.shift * s / (1.0 + (self.shift - 1.0) * s)


def dynamic_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """FLUX's shift for an image of that many tokens: e^mu, mu linear in the tokens.

    (black-forest-labs' sampling code; ``calculate_shift`` of diffusers' pipelines gives mu.)
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))
