r"""Analytic diffusion models: data whose score and whose ODE solution are known.

Data x0 with a smooth density are diffused to ``x = alpha x0 + sigma eps``. The probability-flow ODE
(arXiv 2011.13456, equation 13) carries x from one noise level to another, and a deterministic
solver tries to follow it. With n^2 = alpha^2 + sigma^2, z = x/n and the angle ::

    phi = atan(sigma/alpha) = atan(e^-lambda)        alpha/n = cos phi      sigma/n = sin phi

it is the same for every schedule (arXiv 2202.00512, appendix D)::

    dz/dphi = v(z, phi) = cos phi E[eps | x] - sin phi E[x0 | x]

and regular up to both ends: phi = pi/2 is pure noise, phi = 0 the clean sample.

:class:`GaussianMixture`, elementwise: x0 ~ sum_k w_k N(mu_k, s_k^2). With g_k = x - alpha mu_k,
V_k = alpha^2 s_k^2 + sigma^2 and p_k proportional to w_k V_k^-1/2 exp(-g_k^2/2V_k) ::

    score = -sum_k p_k g_k/V_k         E[x0 | x] = sum_k p_k (mu_k + alpha s_k^2 g_k/V_k)

:class:`AnisotropicGaussian`, x0 ~ N(mu, C) over the last dimension: along each eigenvector of C,
with eigenvalue c, the above for one component; the ODE's solution keeps each ::

    (x - alpha mu)/sqrt(alpha^2 c + sigma^2)

Everywhere E[eps | x] = -sigma score.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.solvers.named import get_schedule
from fastdiff.solvers.prediction import EDM_SIGMA_DATA, canonical, input_scale
from fastdiff.solvers.schedules import NoiseSchedule

TOLERANCE = 1e-14  # of the integrator, per step
# Extrapolated midpoint rule: the substeps of each level, and so order 12 with 10 embedded.
SUBSTEPS = (2, 4, 6, 8, 10, 12)


class Oracle(ABC):
    """A model ``oracle(x, t)`` that is exact for its data.

    schedule: a name in SCHEDULES, or a NoiseSchedule. prediction: what the model returns: "eps",
    "v", "x0", "flow", "score" or "edm" (whose input is scaled; see ``prediction.py``).
    """

    def __init__(self, schedule: str | NoiseSchedule, prediction: str = "eps") -> None:
        self.schedule = get_schedule(schedule)
        self.prediction = canonical(prediction)

    @abstractmethod
    def posterior(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], score), both of x's shape, at x = alpha x0 + sigma eps."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction at model input x [...] and time t (its first entry, in model units).

        Times beyond the schedule's range are taken to be at its end.

        Computed in float32 for half-precision inputs, in x's dtype otherwise; returned in x's.
        """
        schedule = self.schedule
        # Rounded to t's dtype, a time at an end may lie beyond it.
        time = min(max(float(t.reshape(-1)[0]), schedule.t_min), schedule.t_max)
        alpha, sigma = map(float, self.schedule.marginal(self.schedule.lambda_at(time)))
        return self.at(x / input_scale(self.prediction, alpha, sigma), alpha, sigma)

    def at(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The prediction at the state x [...] (not scaled) and the level (alpha, sigma)."""
        dtype = x.dtype
        state = x.float() if dtype in (torch.float16, torch.bfloat16) else x
        x0, score = self.posterior(state, alpha, sigma)
        eps = -sigma * score
        kind = self.prediction
        if kind == "x0":
            out = x0
        elif kind == "eps":
            out = eps
        elif kind == "score":
            out = score
        elif kind == "flow":
            out = eps - x0
        elif kind == "v":
            out = (alpha * eps - sigma * x0) / math.hypot(alpha, sigma)
        else:
            s = EDM_SIGMA_DATA
            out = (sigma * x0 - s * s * alpha * eps) / (s * math.hypot(sigma, alpha * s))
        return out.to(dtype)

    def endpoint(self, x: Tensor, from_lambda: float, to_lambda: float = math.inf) -> Tensor:
        """The probability-flow ODE's solution at ``to_lambda``, float64, of x's shape.

        x: the state [...] at ``from_lambda``. ``to_lambda=inf`` is the clean sample. The error is
        below 1e-12 times 1 + |d endpoint/dx|, for states of size 1 (that factor is what any
        rounding of x is multiplied by; it is hundreds where a mixture's components part).

        Raises ValueError for a lambda that is NaN or whose level is infinite, and for data without
        a density (a deviation of 0).
        """
        return integrate(self, x, from_lambda, to_lambda)

    def _level(self, name: str, lam: float) -> tuple[float, float]:
        alpha, sigma = map(float, self.schedule.marginal(lam)) if lam == lam else (lam, lam)
        if not (math.isfinite(alpha) and math.isfinite(sigma)):
            raise ValueError(f"{name} must be a level of the schedule, got {lam}")
        return alpha, sigma


class GaussianMixture(Oracle):
    """Every element of x0 is independently drawn from sum_k w_k N(mu_k, s_k^2).

    weights: positive, and sum to 1. means, stds: of the components, as many; stds 0 or more.

    Raises ValueError for other numbers.
    """

    def __init__(
        self,
        schedule: str | NoiseSchedule,
        prediction: str = "eps",
        *,
        weights: Sequence[float] = (0.5, 0.3, 0.2),
        means: Sequence[float] = (-0.8, 0.3, 1.1),
        stds: Sequence[float] = (0.3, 0.2, 0.4),
    ) -> None:
        super().__init__(schedule, prediction)
        self.weights, self.means, self.stds = tuple(weights), tuple(means), tuple(stds)
        count = len(self.weights)
        if not count or min(self.weights) <= 0 or abs(sum(self.weights) - 1) > 1e-9:
            raise ValueError(f"weights must be positive and sum to 1, got {self.weights}")
        if len(self.means) != count or not np.all(np.isfinite(self.means)):
            raise ValueError(f"means must be {count} finite numbers, got {self.means}")
        if len(self.stds) != count or not np.all(np.isfinite(self.stds)) or min(self.stds) < 0:
            raise ValueError(f"stds must be {count} finite numbers, 0 or more, got {self.stds}")

    @property
    def mean(self) -> float:
        """E[x0]."""
        return float(np.dot(self.weights, self.means))

    @property
    def variance(self) -> float:
        """Var[x0]."""
        second = np.dot(self.weights, np.square(self.stds) + np.square(self.means))
        return float(second - self.mean**2)

    def posterior(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], score), see the top of this file."""
        gaps, variances, logits = [], [], []
        for w, mu, s in zip(self.weights, self.means, self.stds, strict=True):
            variance = alpha**2 * s**2 + sigma**2
            gap = x - alpha * mu
            gaps.append(gap)
            variances.append(variance)
            logits.append(math.log(w) - 0.5 * math.log(variance) - 0.5 * gap**2 / variance)
        share = torch.softmax(torch.stack(logits), dim=0)
        x0, score = torch.zeros_like(x), torch.zeros_like(x)
        for k, (mu, s) in enumerate(zip(self.means, self.stds, strict=True)):
            pull = gaps[k] / variances[k]
            x0 = x0 + share[k] * (mu + alpha * s**2 * pull)
            score = score - share[k] * pull
        return x0, score

    def endpoint(self, x: Tensor, from_lambda: float, to_lambda: float = math.inf) -> Tensor:
        """See :meth:`Oracle.endpoint`."""
        if min(self.stds) == 0:
            raise ValueError(f"stds must be above 0 for an endpoint, got {self.stds}")
        return super().endpoint(x, from_lambda, to_lambda)


class AnisotropicGaussian(Oracle):
    """x0 ~ N(mean, covariance) over the last dimension.

    covariance: [d, d], symmetric and positive definite. mean: [d], default 0.
    :meth:`conditioned` gives a covariance by its condition number.

    Raises ValueError for a covariance that is none, or a mean of another length.
    """

    def __init__(
        self,
        schedule: str | NoiseSchedule,
        prediction: str = "eps",
        *,
        covariance: np.ndarray | Sequence[Sequence[float]],
        mean: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        super().__init__(schedule, prediction)
        c = np.array(covariance, dtype=np.float64)
        if c.ndim != 2 or c.shape[0] != c.shape[1] or not c.size or not np.all(np.isfinite(c)):
            raise ValueError(f"covariance must be a finite matrix [d, d], got shape {c.shape}")
        if not np.allclose(c, c.T, rtol=1e-12, atol=1e-14):
            raise ValueError("covariance must be symmetric, got one that is not")
        values, vectors = np.linalg.eigh((c + c.T) / 2)
        if values[0] <= 0:
            raise ValueError(f"covariance must be positive definite, got eigenvalue {values[0]:g}")
        centre = np.zeros(len(c)) if mean is None else np.array(mean, dtype=np.float64)
        if centre.shape != (len(c),) or not np.all(np.isfinite(centre)):
            raise ValueError(f"mean must be {len(c)} finite numbers, got {mean}")
        self.mean, self.covariance = torch.from_numpy(centre), torch.from_numpy(c)
        self.variances, self.axes = torch.from_numpy(values), torch.from_numpy(vectors)

    @staticmethod
    def conditioned(dimension: int, condition: float, largest: float = 1.0) -> np.ndarray:
        """A covariance [d, d]: eigenvalues log-spaced from largest/condition to largest.

        Its eigenvectors are those of the reflection along (1, 2, .., d).
        """
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {dimension}")
        if not (math.isfinite(condition) and condition >= 1):
            raise ValueError(f"condition must be finite and at least 1, got {condition}")
        values = largest * np.geomspace(1.0 / condition, 1.0, dimension)
        normal = np.arange(1.0, dimension + 1.0)
        mirror = np.eye(dimension) - 2.0 * np.outer(normal, normal) / (normal @ normal)
        covariance = mirror @ np.diag(values) @ mirror
        return (covariance + covariance.T) / 2

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, eigenvalues, eigenvectors) where x is; ValueError for another last dimension."""
        if x.dim() < 1 or x.shape[-1] != len(self.mean):
            raise ValueError(
                f"x must have {len(self.mean)} in its last dimension, got shape {tuple(x.shape)}"
            )
        mean, values, axes = (
            tensor.to(x.device, x.dtype) for tensor in (self.mean, self.variances, self.axes)
        )
        return mean, values, axes

    def posterior(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], score), see the top of this file."""
        mean, values, axes = self._constants(x)
        pull = ((x - alpha * mean) @ axes) / (alpha**2 * values + sigma**2)
        return mean + (alpha * values * pull) @ axes.T, -pull @ axes.T

    def endpoint(self, x: Tensor, from_lambda: float, to_lambda: float = math.inf) -> Tensor:
        """The closed form at the top of this file; see :meth:`Oracle.endpoint`."""
        x = x.detach().double()
        mean, values, axes = self._constants(x)
        alpha, sigma = self._level("from_lambda", from_lambda)
        alpha_to, sigma_to = self._level("to_lambda", to_lambda)
        ratio = (alpha_to**2 * values + sigma_to**2) / (alpha**2 * values + sigma**2)
        return alpha_to * mean + (((x - alpha * mean) @ axes) * ratio.sqrt()) @ axes.T


def integrate(oracle: Oracle, x: Tensor, from_lambda: float, to_lambda: float) -> Tensor:
    """The probability-flow ODE of any oracle, numerically; see :meth:`Oracle.endpoint`.

    Extrapolation of the midpoint rule (Gragg, Bulirsch and Stoer): an explicit Runge-Kutta family
    in which each level is embedded in the next (Hairer, Norsett and Wanner, Solving ODEs I, section
    II.9); the last two levels' difference sets the step.
    """
    z = x.detach().double()
    if z.numel() and not bool(z.isfinite().all()):
        raise ValueError("x must be finite, got NaN or infinite values")
    start = math.hypot(*oracle._level("from_lambda", from_lambda))
    end = math.hypot(*oracle._level("to_lambda", to_lambda))

    def slope(z: Tensor, phi: float) -> Tensor:
        # The schedule-free level (cos phi, sin phi), in which z is the state.
        alpha, sigma = math.cos(phi), math.sin(phi)
        x0, score = oracle.posterior(z, alpha, sigma)
        return -alpha * sigma * score - sigma * x0

    first, last = (math.atan2(1.0, _exp(lam)) for lam in (from_lambda, to_lambda))
    return end * _extrapolate(slope, z / start, first, last)


def _exp(lam: float) -> float:
    return math.inf if lam > 700 else math.exp(lam)


def _extrapolate(
    slope: Callable[[Tensor, float], Tensor], z: Tensor, first: float, last: float
) -> Tensor:
    """z at ``last``, from z at ``first``, by steps whose estimated error is below TOLERANCE."""
    order = 2 * len(SUBSTEPS) - 1
    at, step = first, (last - first) / 8
    while at != last:
        if abs(step) >= abs(last - at):
            step = last - at
        here = slope(z, at)
        table: list[Tensor] = []
        for j, count in enumerate(SUBSTEPS):
            h = step / count
            before, now = z, z + h * here
            for i in range(1, count):
                before, now = now, before + 2 * h * slope(now, at + i * h)
            row = [now]
            for k in range(j):
                factor = (count / SUBSTEPS[j - 1 - k]) ** 2 - 1
                row.append(row[k] + (row[k] - table[k]) / factor)
            table = row
        size = max(1.0, float(table[-1].abs().max())) if z.numel() else 1.0
        gap = table[-1] - table[-2]
        error = float(gap.abs().max()) / size if z.numel() else 0.0
        if error <= TOLERANCE:
            at, z = (last if step == last - at else at + step), table[-1]
        if abs(step) < 1e-9:
            raise ValueError("x must be where the ODE can be solved, got a singular point")
        step *= min(3.0, max(0.2, 0.85 * (TOLERANCE / max(error, 1e-18)) ** (1 / order)))
    return z
