"""log p(x) of a diffusion model: the probability flow is a continuous normalising flow.

With n^2 = alpha^2 + sigma^2, z = x/n and the angle phi = atan(sigma/alpha), the probability-flow
ODE of every schedule is (arXiv 2202.00512, appendix D; arXiv 2011.13456, equation 13) ::

    dz/dphi = v(z, phi) = cos(phi) eps - sin(phi) x0

and the instantaneous change of variables (arXiv 1810.01367) gives, from the data's end phi_0 to the
noise's phi_T, ::

    log p_0(z_0) = log p_T(z_T) + int_{phi_0}^{phi_T} div v dphi

The divergence is estimated without bias by e^T (dv/dz) e with random e of unit covariance
(Hutchinson; arXiv 2011.13456, section 4.3), the same e for the whole path. z_T is taken to be
normal, with the deviation a run of the solvers starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.sampling.calls import Arguments, Outputs, schedule_for
from fastdiff.solvers.engine import state_dtype
from fastdiff.solvers.grids import check_choice
from fastdiff.solvers.prediction import canonical, input_scale, to_eps, to_x0
from fastdiff.solvers.schedules import NoiseSchedule

PROBES = ("rademacher", "gaussian", "exact")


@dataclass(frozen=True)
class Likelihood:
    """log_prob: log p(x), [B], in nats, float64. latent: x_T, [B, ...], the noise x belongs to.

    evaluations: how often the model was evaluated (each with a gradient).
    """

    log_prob: Tensor
    latent: Tensor
    evaluations: int

    def bits_per_dim(self, bins: int = 256) -> Tensor:
        """[B]: of images of ``bins`` levels scaled to -1..1 (uniformly dequantised)."""
        elements = self.latent[0].numel()
        # A level is 2/bins wide there.
        return -self.log_prob / (elements * math.log(2)) + math.log2(bins / 2)


def log_likelihood(
    model: Callable[..., Any],
    x: Tensor,
    *,
    schedule: str | NoiseSchedule,
    prediction: str = "eps",
    cond: Mapping[str, Any] | None = None,
    probe: str = "rademacher",
    generator: torch.Generator | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    drop_variance: bool = False,
) -> Likelihood:
    """log p(x) by the probability-flow ODE, solved by an adaptive Runge-Kutta method.

    model, prediction, cond, drop_variance: as for ``fastdiff.sample``; the model must be
    differentiable in its input, and float32 or float64.
    x: [B, ...] clean samples, taken to be at the schedule's least noise.
    probe: "rademacher" (+-1) or "gaussian" vectors for the estimate of the divergence, or "exact":
        one gradient for each element of a sample, for small ones. generator: draws the vectors, on
        x's device.
    rtol, atol: of the ODE's state and of the integral, per step (Dormand and Prince 5(4)).

    Averages over several calls tend to log p. Raises ValueError or TypeError for bad arguments.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a float32 or float64 tensor, got {kind}")
    check_choice("probe", probe, PROBES)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value}")
    levels = schedule_for(model, schedule)
    flow = _Flow(model, x, levels, canonical(prediction), cond, drop_variance)
    first, last = flow.angles
    alpha, sigma = flow.level(first)
    scale = math.hypot(alpha, sigma)
    if probe == "exact":
        probes = None
    else:
        draw = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        probes = draw.sign() if probe == "rademacher" else draw

    def slope(phi: float, z: Tensor) -> tuple[Tensor, Tensor]:
        return flow.slope(phi, z, probes)

    z, integral = _dormand_prince(slope, x.detach() / scale, first, last, rtol, atol)
    alpha, sigma = flow.level(last)
    end = math.hypot(alpha, sigma)
    std = flow.schedule.init_scale(flow.lambdas[1]) / end
    elements = x[0].numel()
    log_prior = -0.5 * (z.double().flatten(1) / std).square().sum(1)
    log_prior = log_prior - elements * (0.5 * math.log(2 * math.pi) + math.log(std))
    log_prob = log_prior + integral - elements * math.log(scale)
    return Likelihood(log_prob, z * end, flow.evaluations)


class _Flow:
    """v(z, phi) and its divergence."""

    def __init__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        schedule: NoiseSchedule,
        prediction: str,
        cond: Mapping[str, Any] | None,
        drop_variance: bool,
    ) -> None:
        self.schedule, self._prediction, self._model = schedule, prediction, model
        self._kwargs = Arguments.of(len(x), False, cond, None, None).cond
        self._outputs = Outputs(
            x.shape, x.dtype, x.device, torch.contiguous_format, drop_variance=drop_variance
        )
        self.evaluations = 0
        ends = schedule.lambda_at([schedule.t_min, schedule.t_max])
        self.lambdas = (float(ends[0]), float(ends[1]))

    @property
    def angles(self) -> tuple[float, float]:
        """phi at the schedule's two ends."""
        first, last = (math.atan2(1.0, math.exp(min(lam, 700.0))) for lam in self.lambdas)
        return first, last

    def level(self, phi: float) -> tuple[float, float]:
        """(alpha, sigma) at phi."""
        alpha, sigma = self.schedule.marginal(self._lambda(phi))
        return float(alpha), float(sigma)

    def _lambda(self, phi: float) -> float:
        first, last = self.angles
        if phi <= first:
            return self.lambdas[0]
        return self.lambdas[1] if phi >= last else -math.log(math.tan(phi))

    def _velocity(self, phi: float, z: Tensor) -> Tensor:
        lam = self._lambda(phi)
        alpha, sigma = map(float, self.schedule.marginal(lam))
        n = math.hypot(alpha, sigma)
        x = n * z
        time = float(self.schedule.time_at(lam))
        t = torch.full((len(z),), time, dtype=state_dtype(z.dtype), device=z.device)
        scale = input_scale(self._prediction, alpha, sigma)
        output = self._outputs.accept(self._model(scale * x, t, **self._kwargs))
        self.evaluations += 1
        (x_eps, out_eps), (x_x0, out_x0) = (
            convert(self._prediction, alpha, sigma) for convert in (to_eps, to_x0)
        )
        cos, sin = alpha / n, sigma / n
        return (cos * x_eps - sin * x_x0) * x + (cos * out_eps - sin * out_x0) * output

    def slope(self, phi: float, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """(v, its divergence [B] in float64)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            v = self._velocity(phi, z)
            if probes is not None:
                (pulled,) = torch.autograd.grad(v, z, probes)
                trace = (pulled.double() * probes.double()).flatten(1).sum(1)
                return v.detach(), trace
            trace = torch.zeros(len(z), dtype=torch.float64, device=z.device)
            elements = z[0].numel()
            for j in range(elements):
                (row,) = torch.autograd.grad(
                    v.flatten(1)[:, j].sum(), z, retain_graph=j + 1 < elements
                )
                trace += row.flatten(1)[:, j].double()
            return v.detach(), trace


# Dormand and Prince (1980): the stages, the fifth order's weights, and fifth minus fourth.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERRORS = (
    71 / 57600,
    0.0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)


def _dormand_prince(
    slope: Callable[[float, Tensor], tuple[Tensor, Tensor]],
    z: Tensor,
    first: float,
    last: float,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    """(z at ``last``, the integral of the slope's second part [B])."""
    total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    at, step = first, (last - first) / 20
    here = slope(at, z)
    while at < last:
        step = min(step, last - at)
        stages = [here]
        for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
            moved = z + step * _combine(weights, [s[0] for s in stages])
            stages.append(
                slope(last if step == last - at and node == 1 else at + node * step, moved)
            )
        following = z + step * _combine(_STAGES[-1], [s[0] for s in stages])
        gained = total + step * _combine(_STAGES[-1], [s[1] for s in stages])
        error = max(
            _size(step * _combine(_ERRORS, [s[0] for s in stages]), z, following, rtol, atol),
            _size(step * _combine(_ERRORS, [s[1] for s in stages]), total, gained, rtol, atol),
        )
        if not math.isfinite(error):
            raise ValueError("model must return finite values with finite gradients, got others")
        if error <= 1:
            at = last if step == last - at else at + step
            z, total, here = following, gained, stages[-1]
        step *= min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        if step < 1e-12:
            raise ValueError(f"rtol must be reachable in {z.dtype}, got {rtol} and atol {atol}")
    return z, total


def _combine(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    """The weighted sum of the first of ``values``, one for each weight."""
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=False):
        if weight:
            total = total + weight * value
    return total


def _size(error: Tensor, before: Tensor, after: Tensor, rtol: float, atol: float) -> float:
    """The root mean square of the error in units of the tolerance."""
    scale = atol + rtol * torch.maximum(before.abs(), after.abs())
    return float((error / scale).square().mean().sqrt())
