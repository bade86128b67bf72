"""Noise schedules: ``x_t = alpha_t x_0 + sigma_t eps``, in float64.

Solvers work in ``lambda = ln(alpha/sigma)`` (half the log signal-to-noise ratio). A schedule maps
time to lambda and back, and lambda to (alpha, sigma); a family of processes (variance preserving,
variance exploding, flow) differs from another in the second map only.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike


class NoiseSchedule(ABC):
    """What solvers and grids need to know about a diffusion process. Immutable.

    A subclass gives ``lambda_at``, ``time_at``, ``marginal`` and the range of times
    ``t_min`` (least noise) .. ``t_max`` (most noise), in the model's own units. Every method takes
    a number or an array and returns float64 of the same shape.
    """

    name: str
    t_min: float
    t_max: float
    # The spacing its models are used with, where that does not depend on the solver.
    spacing: ClassVar[str | None] = None

    @abstractmethod
    def lambda_at(self, t: ArrayLike) -> np.ndarray:
        """lambda(t) = ln(alpha_t/sigma_t), for t in t_min..t_max."""

    @abstractmethod
    def time_at(self, lam: ArrayLike) -> np.ndarray:
        """The inverse of :meth:`lambda_at`; lambdas outside the range give its nearer end."""

    @abstractmethod
    def marginal(self, lam: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) at lambda, which may be +inf (no noise) or -inf (no signal)."""

    def alpha(self, t: ArrayLike) -> np.ndarray:
        """alpha_t."""
        return self.marginal(self.lambda_at(t))[0]

    def sigma(self, t: ArrayLike) -> np.ndarray:
        """sigma_t."""
        return self.marginal(self.lambda_at(t))[1]

    def between(self, fraction: np.ndarray) -> np.ndarray:
        """Times a fraction of the way from t_max (0) to t_min (1): what "linspace" is made of."""
        return self.t_max + np.asarray(fraction, dtype=np.float64) * (self.t_min - self.t_max)

    def init_scale(self, lam: float) -> float:
        """The deviation of the state a run starts from, at lambda: x_T = init_scale*z."""
        return float(self.marginal(lam)[1])

    def _check_times(self, t: np.ndarray) -> None:
        if not np.all(np.isfinite(t)):
            raise ValueError(f"t must be finite, got {t}")
        if np.any(t < self.t_min) or np.any(t > self.t_max):
            raise ValueError(f"t must be in {self.t_min:g}..{self.t_max:g}, got {t}")


def vp_marginal(lam: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """alpha^2 = sigmoid(2 lambda), sigma^2 = sigmoid(-2 lambda), without overflow."""
    lam = np.asarray(lam, dtype=np.float64)
    small = np.exp(-2.0 * np.abs(lam))  # the smaller of the two odds, in 0..1
    major = np.sqrt(1.0 / (1.0 + small))
    minor = np.sqrt(small / (1.0 + small))
    return np.where(lam >= 0, major, minor), np.where(lam >= 0, minor, major)


@dataclass(frozen=True, eq=False)
class DiscreteVP(NoiseSchedule):
    """A variance-preserving schedule known at the timesteps 0..T-1 a model was trained on.

    alphas_cumprod: float64 [T], strictly decreasing within 0 <= a < 1; the product of (1 - beta).
        Only the last entry may be 0 (zero terminal SNR).

    Between timesteps lambda is linear in t, which is also how diffusers turns a sigma into a
    timestep. Solvers see (alpha, sigma, lambda) only: their order does not depend on this choice.
    """

    name: str
    alphas_cumprod: np.ndarray = field(repr=False)
    _lambdas: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        a = np.array(self.alphas_cumprod, dtype=np.float64)
        if a.ndim != 1 or a.size < 2:
            raise ValueError(
                f"alphas_cumprod must be 1-d with 2 or more values, got shape {a.shape}"
            )
        if not np.all(np.isfinite(a)) or a[0] >= 1 or a[-1] < 0 or np.any(np.diff(a) >= 0):
            raise ValueError(
                "alphas_cumprod must decrease strictly within 0 <= a < 1, "
                f"got {a[0]:.6g} .. {a[-1]:.6g}"
            )
        with np.errstate(divide="ignore"):
            lambdas = 0.5 * (np.log(a) - np.log1p(-a))
        a.setflags(write=False)
        lambdas.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", a)
        object.__setattr__(self, "_lambdas", lambdas)

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return self.alphas_cumprod.size

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """0: the timestep with the least noise."""
        return 0.0

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """T - 1: the timestep with the most noise."""
        return float(self.num_timesteps - 1)

    def lambda_at(self, t: ArrayLike) -> np.ndarray:
        """lambda at t in 0..T-1; ValueError outside. Linear in t between the timesteps."""
        t = np.asarray(t, dtype=np.float64)
        self._check_times(t)
        below = np.floor(t).astype(np.int64)
        weight = t - below
        above = np.minimum(below + 1, self.num_timesteps - 1)
        # Whole timesteps are looked up: 0 * -inf would turn a zero-SNR end into NaN.
        with np.errstate(invalid="ignore"):
            between = (1.0 - weight) * self._lambdas[below] + weight * self._lambdas[above]
        return np.where(weight == 0, self._lambdas[below], between)

    def time_at(self, lam: ArrayLike) -> np.ndarray:
        """The timestep, fractional, at lambda; clipped to 0..T-1."""
        lam = np.asarray(lam, dtype=np.float64)
        if np.any(np.isnan(lam)):
            raise ValueError(f"lam must not be NaN, got {lam}")
        return np.interp(-lam, -self._lambdas, np.arange(self.num_timesteps, dtype=np.float64))

    def marginal(self, lam: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """alpha = sqrt(sigmoid(2 lambda)), sigma = sqrt(sigmoid(-2 lambda))."""
        return vp_marginal(lam)

    def init_scale(self, lam: float) -> float:
        """1: the state of unit-variance data has unit variance at every level."""
        return 1.0


def from_alphas_cumprod(
    alphas_cumprod: ArrayLike | torch.Tensor, name: str = "alphas_cumprod"
) -> DiscreteVP:
    """The schedule with the given products of (1 - beta), [T]; ValueError unless decreasing."""
    return DiscreteVP(name, _to_numpy(alphas_cumprod))


def from_betas(betas: ArrayLike | torch.Tensor, name: str = "betas") -> DiscreteVP:
    """The schedule with the given betas, [T], each within 0 < beta <= 1 (1 at the last only)."""
    b = _to_numpy(betas)
    if b.ndim != 1 or not np.all(np.isfinite(b)) or np.any(b <= 0) or np.any(b > 1):
        raise ValueError(f"betas must be 1-d within 0 < beta <= 1, got {b}")
    return DiscreteVP(name, np.cumprod(1.0 - b))


def from_diffusers(scheduler: Any) -> DiscreteVP:
    """The schedule of a diffusers scheduler, with its float32 rounding of ``alphas_cumprod``.

    The named schedules below are the same curves in float64; this one agrees with the scheduler to
    the last bit, which matters where alpha is tiny (the last timesteps of the cosine schedule).
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, torch.Tensor):
        raise TypeError(
            f"scheduler must have a tensor alphas_cumprod, got {type(scheduler).__name__}"
        )
    name = getattr(getattr(scheduler, "config", None), "beta_schedule", "alphas_cumprod")
    return from_alphas_cumprod(table, name=str(name))


def linear(
    num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> DiscreteVP:
    """Betas linear in t (DDPM, arXiv 2006.11239, section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, num_timesteps), name="linear")


def scaled_linear(
    num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> DiscreteVP:
    """sqrt(beta) linear in t, with the values of Stable Diffusion (arXiv 2112.10752)."""
    roots = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps)
    return from_betas(roots**2, name="scaled_linear")


def cosine(num_timesteps: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
    """alphas_cumprod = cos^2((t/T + s)/(1 + s) pi/2), s = 0.008, betas capped at ``max_beta``.

    Improved DDPM (arXiv 2102.09672, equation 17); ``squaredcos_cap_v2`` in diffusers.
    """
    u = np.arange(num_timesteps + 1) / num_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta)
    return from_betas(betas, name="cosine")


def sigmoid(
    num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> DiscreteVP:
    """Betas along a sigmoid over -6..6 (GeoDiff, arXiv 2203.02923; ``sigmoid`` in diffusers)."""
    u = 1.0 / (1.0 + np.exp(-np.linspace(-6, 6, num_timesteps)))
    return from_betas(u * (beta_end - beta_start) + beta_start, name="sigmoid")


def zero_terminal_snr(schedule: DiscreteVP) -> DiscreteVP:
    """The schedule rescaled so that its last timestep is pure noise (arXiv 2305.08891, alg. 1).

    sqrt(alphas_cumprod) is shifted to end at 0 and scaled to start where it did. Needs a v or x0
    model.
    """
    roots = np.sqrt(schedule.alphas_cumprod)
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    return DiscreteVP(f"{schedule.name}, zero SNR", roots**2)


def unknown(arg: str, value: str, known: Sequence[str]) -> str:
    """The message for an unknown name, nearest names first."""
    nearest = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    return f"{arg} must be one of {', '.join(sorted(known))}, got {value!r}{hint}"


def _to_numpy(values: ArrayLike | torch.Tensor) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
