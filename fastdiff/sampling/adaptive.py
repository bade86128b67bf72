"""DPM-Solver-12 and -23: steps sized by the difference of two orders (arXiv 2206.00927, app. C)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.sampling.api import Generators, Seed, noise_of, state_facts
from fastdiff.sampling.calls import schedule_for
from fastdiff.sampling.guidance import Guidance, Scale, check_scale, guided_table
from fastdiff.sampling.run import Run
from fastdiff.solvers.engine import StepInfo
from fastdiff.solvers.grids import check_choice
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.singlestep import embedded_step

CONTROLLERS = ("dpm_solver", "pid")


@dataclass(frozen=True)
class AdaptiveSample:
    """sample: [B, ...]. evaluations: of the model. accepted, rejected: steps."""

    sample: Tensor
    evaluations: int
    accepted: int
    rejected: int


def sample_adaptive(
    model: Callable[..., Any],
    shape: Sequence[int] | None = None,
    *,
    x: Tensor | None = None,
    schedule: str | NoiseSchedule,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    controller: str = "dpm_solver",
    algorithm_type: str = "dpmsolver",
    prediction: str = "eps",
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance_scale: Scale = 1.0,
    guidance: Guidance | None = None,
    seed: Seed | None = None,
    generator: Generators | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[StepInfo], Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    drop_variance: bool = False,
    engine: str = "auto",
    max_evaluations: int = 10_000,
) -> AdaptiveSample:
    """Draws samples in as many steps as the tolerance asks for, to the schedule's least noise.

    order: 2 (DPM-Solver-12) or 3 (-23), evaluations per step, tried or taken.
    rtol, atol: a step is taken when the root mean square of (x_high - x_low)/max(atol,
        rtol*max(|x_low|, |x_low of the step before|)) is at most 1. h_init: the first step, in
        lambda.
    controller: "dpm_solver": the largest error of the batch decides, and the next step is 0.9 h
        error^(-1/order). "pid": k-diffusion's ``sample_dpm_adaptive``: the error of x/alpha over
        the whole batch, h multiplied by 1 + atan(error^(-1/order) - 1), and a step taken where
        that is at least 0.81.
    algorithm_type: "dpmsolver" (noise prediction) or "dpmsolver++".
    callback: after each step that was taken. The other arguments are those of ``fastdiff.sample``;
    a guidance scale is one number.

    The error is read in every step, which on a GPU waits for it. Raises ValueError or TypeError for
    bad arguments, a schedule without a finite range of noise levels and a model that returns NaN or
    infinite values, and RuntimeError where ``max_evaluations`` do not reach the end.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    check_choice("controller", controller, CONTROLLERS)
    if seed is not None and generator is not None:
        raise ValueError("seed and generator must not both be given")
    for name, value in (("rtol", rtol), ("atol", atol), ("h_init", h_init)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value}")
    if guidance is None:
        guidance = Guidance(check_scale("guidance_scale", guidance_scale))
    if isinstance(guidance.scale, tuple):
        raise ValueError(f"guidance_scale must be one number here, got {guidance.scale}")
    levels = schedule_for(model, schedule)
    lam, end = map(float, levels.lambda_at([levels.t_max, levels.t_min]))
    if not (math.isfinite(lam) and math.isfinite(end)):
        raise ValueError(
            f"schedule must have a finite range of noise levels, got {levels.name} "
            f"({lam:g} .. {end:g} in lambda)"
        )
    shape, device, dtype = state_facts(model, None, shape, x, seed, device, dtype, "x")
    run = Run(
        model,
        shape,
        device,
        dtype,
        noise=noise_of(shape, seed, generator, dtype, device),
        guidance=guidance,
        cond=cond,
        uncond=uncond,
        model_kwargs=model_kwargs,
        drop_variance=drop_variance,
        engine=engine,
    )
    control = _Control(controller, order, h_init, atol, rtol, float(levels.marginal(lam)[0]))
    step = {"prediction": prediction, "order": order, "algorithm_type": algorithm_type}
    table = guided_table(embedded_step(levels, lam, end, **step), guidance.in_table)  # type: ignore[arg-type]
    run.check(table)
    if x is None:
        table = replace(table, init_scale=levels.init_scale(lam))
    state = run.start(table, x, None)
    low = state
    evaluations = accepted = rejected = 0
    while end - lam > 1e-5:
        if evaluations + order > max_evaluations:
            raise RuntimeError(
                f"max_evaluations must be enough to reach the end, got {max_evaluations} at lambda "
                f"{lam:g} of {end:g} (step {control.h:g})"
            )
        target = lam + control.within(end - lam)
        table = guided_table(embedded_step(levels, lam, target, **step), guidance.in_table)  # type: ignore[arg-type]
        tried: list[StepInfo] = []
        high = run.loop(table, state, after=lambda info, seen=tried: not seen.append(info))  # type: ignore[misc]
        last = tried[-1]
        below = last.registers[1]
        assert below is not None
        evaluations += order
        alpha = float(levels.marginal(target)[0])
        if control.accepts(high, below, low, alpha):
            state, low, lam = high, below, target
            accepted += 1
            info = replace(last, index=accepted - 1, total=0, x=state)
            if callback is not None and callback(info) is False:
                break
        else:
            rejected += 1
    return AdaptiveSample(state.to(dtype), evaluations, accepted, rejected)


@dataclass
class _Control:
    """Judges a step and proposes the next one's size.

    alpha: where the lower order's last result is.
    """

    kind: str
    order: int
    h: float
    atol: float
    rtol: float
    alpha: float

    def within(self, left: float) -> float:
        """The step to try; k-diffusion goes on from the size it would have liked."""
        if self.kind == "dpm_solver":
            self.h = min(self.h, left)
        return min(self.h, left)

    def accepts(self, high: Tensor, low: Tensor, before: Tensor, alpha: float) -> bool:
        """Whether the step is taken. ``before``: the lower order's result of the step before."""
        if self.kind == "pid":
            return self._pid(high / alpha, low / alpha, before / self.alpha, alpha)
        size = self._scaled(high, low, before).flatten(1).square().mean(1).sqrt().max()
        error = _finite(size)
        self.h *= 0.9 * max(error, 1e-12) ** (-1 / self.order)
        return error <= 1

    def _pid(self, high: Tensor, low: Tensor, before: Tensor, alpha: float) -> bool:
        error = _finite(self._scaled(high, low, before).square().mean().sqrt())
        factor = (1 / (error + 1e-8)) ** (1 / self.order)
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        taken = factor >= 0.81
        if taken:
            self.alpha = alpha
        return taken

    def _scaled(self, high: Tensor, low: Tensor, before: Tensor) -> Tensor:
        size = self.rtol * torch.maximum(low.abs(), before.abs())
        return (high - low) / size.clamp(min=self.atol)


def _finite(error: Tensor) -> float:
    value = float(error)
    if not math.isfinite(value):
        raise ValueError(f"model must return finite values, got a step whose error is {value}")
    return value
