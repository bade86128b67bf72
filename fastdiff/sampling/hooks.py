"""What happens in a run besides its linear steps: named hooks, given to ``sample(hooks=[...])``.

A hook overrides any of four methods of :class:`Hook`. They are called in the order of the list:
``arguments`` before each evaluation, ``predict`` on the clean sample each evaluation predicts, and
``step`` on the state after each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.solvers.engine import StepInfo
from fastdiff.solvers.table import SolverTable


@dataclass(frozen=True)
class Place:
    """Where in a run an evaluation is: the row, its time, and (alpha, sigma) of the state."""

    index: int
    time: float
    level: tuple[float, float] | None

    def needed(self, who: str) -> tuple[float, float]:
        """The level; ValueError for a table that does not know its own."""
        if self.level is None:
            raise ValueError(f"{who} must have a table whose rows give their level, got none")
        return self.level


@dataclass(frozen=True)
class RunFacts:
    """What a hook may want to know before the first step.

    initial_noise: gives the normal noise z the run started from, or fresh noise if ``x`` was given.
    """

    table: SolverTable
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    initial_noise: Callable[[], Tensor]


class Hook:
    """A hook that does nothing."""

    def begin(self, run: RunFacts) -> None:
        """Called once, before the first step."""

    def arguments(
        self, x: Tensor, t: Tensor, arguments: Mapping[str, Any], place: Place
    ) -> Mapping[str, Any]:
        """Further keyword arguments for the model.

        x: the model's input, [B, ...] or [2B, ...] with guidance. t: the times, [B] or [2B].
        arguments: those of this call, without what later hooks add.
        """
        return {}

    def predict(self, x0: Tensor, place: Place) -> Tensor:
        """The predicted clean sample to use instead of ``x0``, [B, ...] in the state's dtype."""
        return x0

    def step(self, info: StepInfo) -> None:
        """Called after each row; may write to ``info.x``."""


@dataclass
class DynamicThreshold(Hook):
    """Imagen's dynamic thresholding (arXiv 2205.11487, section 2.3), for models in pixel space.

    s is the ``quantile`` of |x0| in each image, at least ``minimum`` and at most ``maximum``; x0 is
    clipped to -s..s and divided by s. diffusers' ``thresholding`` has minimum 1 and
    ``maximum=sample_max_value``, which is 1 unless set.

    Raises ValueError for a quantile outside 0..1 or bounds that are not positive.
    """

    quantile: float = 0.995
    minimum: float = 1.0
    maximum: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in 0..1, got {self.quantile}")
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(
                "minimum must be positive and at most maximum, "
                f"got {self.minimum} and {self.maximum}"
            )

    def predict(self, x0: Tensor, place: Place) -> Tensor:
        size = torch.quantile(x0.flatten(1).abs(), self.quantile, dim=1)
        size = size.clamp(self.minimum, self.maximum).reshape(-1, *[1] * (x0.dim() - 1))
        return torch.minimum(torch.maximum(x0, -size), size) / size


@dataclass
class Clip(Hook):
    """x0 clipped to -limit..limit (``clip_sample`` in diffusers); for models in pixel space."""

    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit must be positive, got {self.limit}")

    def predict(self, x0: Tensor, place: Place) -> Tensor:
        return x0.clamp(-self.limit, self.limit)


@dataclass
class Inpaint(Hook):
    """Keeps the known part of a sample: after each step it is ``known`` at the state's noise level.

    known: the clean sample, [B or 1, ...]. mask: 1 where the model draws, 0 where ``known`` stays;
    anything that broadcasts to the state, fractions blend. noise: the noise of the known part; by
    default the run's own initial noise, as in diffusers' pipelines. The result holds ``known``
    exactly when the run ends on the clean sample, and with ``clean_end`` always: some tables end on
    the least noise of their schedule and take that for none.

    Raises ValueError for shapes that do not broadcast and a mask outside 0..1.
    """

    known: Tensor
    mask: Tensor
    noise: Tensor | None = None
    clean_end: bool = False

    def begin(self, run: RunFacts) -> None:
        self._last = len(run.table) - 1
        for name, value in (("known", self.known), ("mask", self.mask), ("noise", self.noise)):
            if value is None:
                continue
            try:
                broadcast = torch.broadcast_shapes(value.shape, run.shape)
            except RuntimeError:
                broadcast = torch.Size()
            if tuple(broadcast) != run.shape:
                raise ValueError(
                    f"{name} must broadcast to the state's shape {run.shape}, "
                    f"got {tuple(value.shape)}"
                )
        mask = self.mask.to(run.device, run.dtype)
        if mask.numel() and not (float(mask.min()) >= 0 and float(mask.max()) <= 1):
            raise ValueError(
                f"mask must be in 0..1, got {float(mask.min()):g}..{float(mask.max()):g}"
            )
        noise = run.initial_noise() if self.noise is None else self.noise
        keep = 1 - mask
        self._mask = mask
        self._known = self.known.to(run.device, run.dtype) * keep
        self._noise = noise.to(run.device, run.dtype) * keep

    def step(self, info: StepInfo) -> None:
        if self.clean_end and info.index == self._last:
            alpha, sigma = 1.0, 0.0
        else:
            alpha, sigma = Place(info.index, info.time, info.level).needed("Inpaint")
        info.x.mul_(self._mask).add_(self._known, alpha=alpha)
        if sigma:
            info.x.add_(self._noise, alpha=sigma)


@dataclass
class ControlNet(Hook):
    """The residuals of a ControlNet (arXiv 2302.05543), added to every evaluation.

    model: called as diffusers' ControlNetModel, ``model(x, t, encoder_hidden_states=...,
    controlnet_cond=condition, conditioning_scale=scale, return_dict=False)`` with the condition's
    other arguments too, returning (down_block_res_samples, mid_block_res_sample).
    condition: the control image, [B or 1, 3, H, W]. scale: its weight.
    start, end: the fraction of the rows in which it acts, as ``control_guidance_start`` and
    ``control_guidance_end`` there.
    """

    model: Callable[..., Any]
    condition: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"start and end must be in 0..1, start first, got {self.start} and {self.end}"
            )

    def begin(self, run: RunFacts) -> None:
        self._rows = len(run.table)

    def arguments(
        self, x: Tensor, t: Tensor, arguments: Mapping[str, Any], place: Place
    ) -> Mapping[str, Any]:
        first, last = place.index / self._rows, (place.index + 1) / self._rows
        if first < self.start or last > self.end:
            return {}
        condition = self.condition.to(x.device, x.dtype)
        if condition.shape[0] == 1:
            condition = condition.expand(x.shape[0], *condition.shape[1:])
        elif 2 * condition.shape[0] == x.shape[0]:
            condition = torch.cat([condition, condition])
        down, mid = self.model(
            x,
            t,
            controlnet_cond=condition,
            conditioning_scale=self.scale,
            return_dict=False,
            **arguments,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


@dataclass
class Preview(Hook):
    """Calls ``show(x0, index)`` with the predicted clean sample of every ``every``-th row.

    x0 is [B, ...] in the state's dtype, and the caller's to keep.
    """

    show: Callable[[Tensor, int], Any]
    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {self.every}")

    def predict(self, x0: Tensor, place: Place) -> Tensor:
        if place.index % self.every == 0:
            self.show(x0.clone(), place.index)
        return x0
