"""Denoisers with more inputs: ControlNets, and what is concatenated to the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff import images as pictures
from fastdiff.models.denoiser import Denoiser, Values
from fastdiff.sampling import Hook, Place


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


def scales_of(model: Any, controls: Sequence[Control], rows: int) -> list[Hook]:
    """Sets a ControlledUNet's scales; the hook that changes them in a run, where they change."""
    by_row = []
    for index in range(rows):
        first, last = index / rows, (index + 1) / rows
        by_row.append(
            tuple(0.0 if first < c.start or last > c.end else float(c.scale) for c in controls)
        )
    model.scales = by_row[0]
    return [] if len(set(by_row)) == 1 else [_Scales(model, by_row)]


class _Scales(Hook):
    """The scales of each row."""

    def __init__(self, model: Any, by_row: Sequence[tuple[float, ...]]) -> None:
        self.model, self.by_row = model, by_row

    def arguments(
        self, x: Tensor, t: Tensor, arguments: Mapping[str, Any], place: Place
    ) -> Mapping[str, Any]:
        self.model.scales = self.by_row[place.index]
        return {}
