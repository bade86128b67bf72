"""Denoisers with more inputs: ControlNets, and what is concatenated to the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff import images as pictures
from fastdiff.models.denoiser import Denoiser, Values
from fastdiff.sampling import Hook, Place, RunFacts


@dataclass(frozen=True)
class Control:
    """A ControlNet (arXiv 2302.05543) and the picture it follows.

    model: a ControlNet of the zoo. image: what a call's ``image`` may be, of any size; values are
    0..1 for the network, so a tensor is in 0..1. scale: its weight. start, end: the fraction of the
    steps in which it acts.
    """

    model: Any
    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"start and end must be in 0..1, start first, got {self.start} and {self.end}"
            )

    def hint(self, size: tuple[int, int]) -> Tensor:
        """The picture [B, 3, H, W] in 0..1."""
        if isinstance(self.image, Tensor):
            return self.image
        return (pictures.to_tensor(self.image, size) + 1) / 2

    def part(self, piece: slice, count: int) -> Control:
        """For a piece of a batch of ``count``."""
        image = self.image
        if isinstance(image, (list, Tensor)) and len(image) == count > 1:
            return replace(self, image=image[piece])
        return self


class Concatenated(Denoiser):
    """A denoiser whose input is the state and further channels, its condition's ``extra``.

    extra: [B, E, h, w]. Inpainting models have the mask and the masked latents there, upsamplers
    the enlarged picture.
    """

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def prompt(self, *, extra: Tensor, **cond: Any) -> Values:
        return {"extra": extra, "model": self.model.prompt(**cond)}

    def schedule(self, t: Tensor, prompt: Values) -> Values:
        return self.model.schedule(t, prompt["model"])

    def step(self, x: Tensor, schedule: Values, prompt: Values) -> Tensor:
        joined = torch.cat([x, prompt["extra"].to(x.dtype)], dim=1)
        return self.model.step(joined, schedule, prompt["model"])


class Scales(Hook):
    """The weights of ControlNets in each row: 0 outside of their range."""

    def __init__(self, controls: Sequence[Control]) -> None:
        self.controls = controls

    def begin(self, run: RunFacts) -> None:
        """The rows' weights; equal ones are one object."""
        count = len(run.table)
        kept: dict[tuple[float, ...], tuple[float, ...]] = {}
        self._rows = []
        for index in range(count):
            first, last = index / count, (index + 1) / count
            weights = tuple(
                0.0 if first < one.start or last > one.end else one.scale for one in self.controls
            )
            self._rows.append(kept.setdefault(weights, weights))

    def arguments(
        self, x: Tensor, t: Tensor, arguments: Mapping[str, Any], place: Place
    ) -> Mapping[str, Any]:
        return {"scales": self._rows[place.index]}
