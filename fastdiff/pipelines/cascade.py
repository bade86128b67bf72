"""Cascades (arXiv 2106.15282): a small picture, then models that enlarge it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.pipelines.control import Concatenated
from fastdiff.pipelines.recipes import Recipe
from fastdiff.sampling import sample
from fastdiff.sampling.api import noise_of
from fastdiff.solvers.noise import beside


def enlarge(
    model: Any,
    images: Tensor,
    recipe: Recipe,
    *,
    size: tuple[int, int],
    noise: float = 0.0,
    cond: dict[str, Any] | None = None,
    steps: int = 50,
    solver: str | None = None,
    seed: int | Sequence[int] = 0,
    **options: Any,
) -> Tensor:
    """Pictures [B, C, h, w] in -1..1 enlarged to ``size`` (height, width) by an upsampler.

    model: a U-Net whose input is the state and the enlarged picture (guided-diffusion's 64 to 256
    and 128 to 512), so its ``in_channels`` are 2C. The small pictures are enlarged bilinearly, as
    there. noise: the noise augmentation of cascaded diffusion, as the fraction s of
    sqrt(1 - s^2) x + s z that the condition is given; a model must have been trained with it.
    cond: the model's other arguments (labels). options: of ``fastdiff.sample``.
    """
    batch, channels = images.shape[:2]
    if model.config.in_channels != 2 * channels:
        raise ValueError(
            f"model must take {2 * channels} channels (state and picture), "
            f"got {model.config.in_channels}"
        )
    if not 0 <= noise < 1:
        raise ValueError(f"noise must be at least 0 and below 1, got {noise}")
    place = next(model.parameters())
    small = images.to(place.device, place.dtype)
    large = F.interpolate(small, size=size, mode="bilinear")
    if noise:
        seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
        other = [beside(one) for one in seeds]
        z = noise_of(tuple(large.shape), other, None, large.dtype, large.device).initial()
        large = (1 - noise**2) ** 0.5 * large + noise * z.to(large)
    with torch.no_grad():
        return sample(
            Concatenated(model),
            tuple(large.shape),
            solver=recipe.table(steps, solver=solver),
            cond={**(cond or {}), "extra": large},
            hooks=recipe.hooks,
            seed=seed,
            device=place.device,
            dtype=place.dtype,
            drop_variance=getattr(model.config, "learn_sigma", False)
            or model.config.out_channels == 2 * channels,
            **options,
        )
